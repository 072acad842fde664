"""What the layout promises: imports point down, the kernels need torch alone, and no folder shadows a package."""

import ast
import inspect
import os
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import unlearn_kernels

ROOT = Path(__file__).resolve().parents[1]

PUBLIC_KERNELS = {
    "token_logprobs",
    "sequence_logprobs",
    "npo_loss",
    "simnpo_loss",
    "sequence_loss",
    "token_stats",
    "linear_kl",
    "pack_labels",
    "release_memory",
    "Options",
    "Packed",
    "SequenceLoss",
    "TokenStats",
}


def run(*command, **environment):
    """Runs a command with the tree first on the path; returns the finished process."""
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **paths, **environment}, capture_output=True, text=True, timeout=300
    )


def imported_packages(file):
    """Top-level packages that a source file imports anywhere, relative imports aside."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def test_kernels_is_no_importable_package():
    """A kernels/__init__.py on the path would be taken for Hugging Face's package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    result = run(sys.executable, "-c", "from transformers import activations, AutoModelForCausalLM")
    assert result.returncode == 0, result.stderr


def test_import_contracts_hold():
    result = run(sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


def test_every_module_has_a_layer():
    """A module that no layer names could import anything."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = next(contract["layers"] for contract in config["contracts"] if contract["type"] == "layers")
    named = set(re.findall(r"unlearn\.(\w+)", " ".join(layers)))
    modules = {path.stem for path in (ROOT / "unlearn").glob("[!_]*") if path.suffix == ".py" or path.is_dir()}
    assert modules <= named, f"name these in [tool.importlinter] of pyproject.toml: {sorted(modules - named)}"


def test_objectives_import_torch_alone():
    imports = set(imported_packages(ROOT / "unlearn" / "objectives.py"))
    assert imports - set(sys.stdlib_module_names) == {"torch"}


def test_kernels_import_torch_and_triton_alone():
    allowed = {"torch", "triton", "unlearn_kernels"} | set(sys.stdlib_module_names)
    for file in (ROOT / "kernels" / "unlearn_kernels").rglob("*.py"):
        assert set(imported_packages(file)) <= allowed, file


def test_product_imports_neither_tests_nor_benchmarks():
    for package in ("unlearn", "kernels/unlearn_kernels"):
        for file in (ROOT / package).rglob("*.py"):
            assert not {"tests", "bench", "pytest", "hypothesis"} & set(imported_packages(file)), file


def test_public_functions_of_the_kernels():
    names = {n for n, v in vars(unlearn_kernels).items() if not n.startswith("_") and not inspect.ismodule(v)}
    assert names == PUBLIC_KERNELS
    for name in PUBLIC_KERNELS:
        assert getattr(unlearn_kernels, name).__doc__, f"{name} has no docstring"


def test_importing_the_kernels_does_not_import_transformers():
    result = run(sys.executable, "-c", "import sys, unlearn_kernels; sys.exit('transformers' in sys.modules)")
    assert result.returncode == 0, result.stderr


def test_command_line_starts_without_torch():
    """`unlearn --help` answers at once."""
    code = "import sys, unlearn.cli; sys.exit('torch' in sys.modules)"
    result = run(sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr or "import unlearn.cli imported torch"


def test_tests_cannot_reach_the_network():
    """conftest.py's promise; 192.0.2.1 is reserved for documentation, so nothing would answer."""
    with pytest.raises(RuntimeError, match="must not use the network: getaddrinfo to 'example.org'"):
        socket.getaddrinfo("example.org", 80)
    with socket.socket() as sock, pytest.raises(RuntimeError, match="must not use the network: connect"):
        sock.connect(("192.0.2.1", 80))
