"""No 32-bit number of any Triton kernel can overflow at 2**19 + 1 rows of an 8B head, where N x H is past 2**31.

bench.offsets carries ranges through the kernels' IR, in a process of its own, where triton does not interpret.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def analysed():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "bench.offsets", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_nothing_can_overflow(analysed):
    assert analysed["problems"] == []


def test_every_kernel_was_looked_at(analysed):
    """Those that the host code launches: the table of steps in kernels/README.md, whichever way they are served."""
    sources = [ROOT / "kernels" / "unlearn_kernels" / f"triton_{name}.py" for name in ("kernels", "distributions")]
    names = {
        line.removeprefix("def ").partition("(")[0]
        for source in sources
        for previous, line in zip([""] + source.read_text().splitlines(), source.read_text().splitlines(), strict=False)
        if previous == "@launched"
    }
    assert names <= analysed["largest"].keys(), "bench.offsets.calls launches too little"
    assert analysed["checked"] > 300


def test_the_bounds_are_not_idle(analysed):
    """N rows were seen as N rows: 4 columns' worth of programs each, or one program a row."""
    assert analysed["largest"]["target_logits_kernel"] >= 1 << 19
    assert analysed["largest"]["add_target_rows_kernel"] >= 1 << 19
