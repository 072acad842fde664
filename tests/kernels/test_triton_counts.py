"""FLOP, bytes and memory of each schedule, from the launches that the Triton backend makes, against what is promised.

bench.schedule_costs does the counting in a process of its own, where triton does not interpret.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from bench import rows as row_files

pytest.importorskip("triton")
ROOT = pathlib.Path(__file__).parents[2]
# units, E written, E read (in N V e): the table of schedules in kernels/README.md
PROMISED = {
    "no gradient": (1, 0, 0),
    "kept": (3, 1, 2),
    "kept, hidden only": (2, 1, 1),
    "kept, weight only": (2, 1, 1),
    "sequence_loss, kept": (3, 1, 2),
    "sequence_loss, chunks": (3, 1, 2),
    "npo_loss, chunks": (3, 1, 2),
    "npo_loss, chunks, hidden only": (2, 1, 1),
    "npo_loss, chunks, weight only": (2, 1, 1),
    "unscaled": (2, 1, 1),
    "recompute": (4, 1, 2),
    "recompute, weight only": (3, 1, 1),
    "token_stats": (1, 0, 0),
    "linear_kl": (2, 0, 0),
    "linear_kl, kept": (4, 1, 2),
    "linear_kl, hidden only": (3, 1, 1),
    "linear_kl, recompute": (6, 1, 2),
}
GIB = 1024  # MiB


def counted(target, *shape):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "bench.schedule_costs", "--json", "--target", target]
    shape = ["--shape", *map(str, shape)] if shape else []
    done = subprocess.run([*command, *shape], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return {row["case"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def hopper():
    return counted("sm_90")


def check_counts(costs, padding):
    assert costs.keys() == PROMISED.keys()
    for name, (units, written, read) in PROMISED.items():
        cost = costs[name]
        # tiles that stick out add FLOP; nothing may be left out
        assert units <= cost["units"] * (1 + 1e-9) <= units * padding, name
        assert cost["e_written"] == pytest.approx(written, abs=2e-3), name
        assert cost["e_read"] == pytest.approx(read, abs=2e-3), name


def test_flop_and_bytes_of_every_schedule(hopper):
    check_counts(hopper, padding=1.02)


@pytest.mark.parametrize(("target", "shape"), [("sm_80", (4096, 3584, 152064)), ("gfx942", (8192, 2304, 256000))])
def test_flop_and_bytes_elsewhere(target, shape):
    check_counts(counted(target, *shape), padding=1.02)


def test_peak_memory_of_a_seven_billion_parameter_head(hopper):
    """N = 16384, H = 4096, V = 128256, whose bf16 logits alone are 3.9 GiB: extra memory, gradients included."""
    for name in ("sequence_loss, chunks", "npo_loss, chunks", "recompute"):
        assert hopper[name]["peak_mib"] <= 3.4 * GIB, name
    for name in ("npo_loss, chunks, hidden only", "unscaled", "linear_kl, hidden only"):
        assert hopper[name]["peak_mib"] <= 1.3 * GIB, name
    for name in ("no gradient", "token_stats", "linear_kl"):
        assert hopper[name]["peak_mib"] <= 64, name
    # gradients, and a workspace in use: the count sees what it should
    assert hopper["npo_loss, chunks"]["peak_mib"] >= (4 * 128256 * 4096 + (1 << 29)) / (1 << 20)
    assert hopper["kept"]["peak_mib"] >= 2 * 16384 * 128256 / (1 << 20)


def test_the_weight_streams_once_for_many_row_blocks(hopper):
    assert hopper["no gradient"]["weight_passes"] == 8  # 128 row blocks of 128, by 16


def test_the_committed_rows_are_what_is_counted(hopper):
    """So the table in kernels/README.md, made of them, is today's."""
    committed = {row["case"]: row for row in row_files.read("schedules")}
    assert committed.keys() == hopper.keys()
    for name, row in hopper.items():
        assert {key: committed[name][key] for key in row} == row, f"{name}: python -m bench.schedule_costs --write"
