"""The C++ tests of the native kernels (kernels/native/tests), under ASan and UBSan: built and run by CMake."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def find(name: str) -> str | None:
    """Beside the interpreter, where pip puts cmake and ninja, or on the path."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def test_the_cpp_tests_pass(tmp_path):
    cmake, ctest, ninja = find("cmake"), find("ctest"), find("ninja")
    compiler = os.environ.get("CXX") or find("c++") or find("g++")
    if cmake is None or ctest is None or compiler is None:
        reason = "the C++ tests need cmake and a C++ compiler"
        # set where both are known to be there (test_native.py)
        if os.environ.get("UNLEARN_REQUIRE_NATIVE") == "1":
            pytest.fail(reason)
        pytest.skip(reason)

    def run(*command: str) -> str:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        if done.returncode != 0:
            pytest.fail(f"{' '.join(command)} gave {done.returncode}:\n{done.stdout[-20000:]}", pytrace=False)
        return done.stdout

    settings = [f"-DPython_EXECUTABLE={sys.executable}", "-DUNLEARN_NATIVE_TESTS=ON"]
    if ninja is not None:
        settings += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    run(cmake, "-S", str(ROOT), "-B", str(tmp_path), *settings)
    # one process: the suite runs one per core
    run(cmake, "--build", str(tmp_path), "--target", "native_tests", "--parallel", "1")
    report = run(ctest, "--test-dir", str(tmp_path), "--output-on-failure", "--no-tests=error")
    print(report)
    assert "100% tests passed" in report
