"""Every Triton kernel, compiled ahead of time for four kinds of device by two versions of triton: no GPU is needed.

`python -m bench.compile_report` does the compiling, in a process of its own (this one may have told triton to interpret
kernels, which it cannot take back). Its --quick selection is every kernel and every shipped configuration once; the
whole matrix of dtypes and parts of a head is for reading.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# The GPU machines' version, where `make` put it; "" is the environment's own.
OLD_TRITON = ROOT / ".venv" / "triton-3.6"
VERSIONS = {"installed": "", "3.6.0": str(OLD_TRITON)}
TARGETS = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")

KIB = 1024
SHARED = {"sm_80": 163 * KIB, "sm_86": 99 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "gfx942": 64 * KIB}
# NVIDIA: 65536 registers per multiprocessor; CDNA: 512 per lane of a SIMD, and four SIMDs share a program's waves.
REGISTER_FILE = 65536
REGISTERS_PER_LANE = 512
MATRIX = {"sm_80": "mma", "sm_86": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
USES_LOGITS = {"exp_sums_kernel", "redo_maxima_kernel", "redo_sums_kernel", "token_stats_kernel", "kl_kernel"}
WITHOUT_LOGITS = {
    "add_partials_kernel", "add_target_rows_kernel", "exp_tile_kernel", "find_rows_kernel", "finish_rows_kernel",
    "kl_finish_kernel", "kl_rows_kernel", "redo_offsets_kernel", "row_grad_kernel", "scale_rows_kernel",
    "segment_sums_kernel", "target_logits_kernel", "token_stats_finish_kernel",
}  # fmt: skip
# Rare rows: ptxas keeps to 128 or 168 registers for the sake of occupancy.
TOLERATED_SPILLS = {("redo_sums_kernel", "H 2052", "sm_100"): 8, ("redo_sums_kernel", "float32", "sm_80"): 24}


def complaints(row: SimpleNamespace) -> list[str]:
    """What is wrong with one compiled kernel."""
    found = []
    if row.spill > TOLERATED_SPILLS.get((row.kernel, row.variant, row.target), 0):
        found.append(f"{row.spill} spilled")
    if row.shared > SHARED[row.target]:
        found.append(f"{row.shared} bytes of shared memory, the device has {SHARED[row.target]}")
    if row.target == "gfx942":
        too_many = row.registers * -(-row.warps // 4) > REGISTERS_PER_LANE
    else:
        too_many = -(-row.registers // 8) * 8 * 32 * row.warps > REGISTER_FILE
    if too_many:
        found.append(f"{row.registers} registers in {row.warps} warps do not fit")
    if row.serialized:
        found.append("ptxas serialized its wgmma")
    if row.kernel in USES_LOGITS and row.variant != "float32" and getattr(row, MATRIX[row.target]) == 0:
        found.append(f"no {MATRIX[row.target]}")
    by_pointers = row.target not in ("sm_90", "sm_100") or row.variant in ("float32", "H 2052")
    if row.kernel == "exp_sums_kernel" and not by_pointers:
        if row.tma_loads == 0:
            found.append("operands do not come by TMA")
        if row.store_e and row.tma_stores == 0:
            found.append("E is not stored by TMA")
    return found


def compile_for(target: str, folder: str, *options: str) -> list[SimpleNamespace]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, str(ROOT), str(ROOT / "kernels")]))
    command = [sys.executable, "-W", "ignore", "-m", "bench.compile_report", "--json", "--processes", "1"]
    done = subprocess.run(
        [*command, "--targets", target, *options], cwd=ROOT, env=env | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [SimpleNamespace(**json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("version", "target"),
    [*(("installed", target) for target in TARGETS), ("3.6.0", "sm_80"), ("3.6.0", "sm_90")],
)
def test_every_kernel_compiles_and_fits(version, target):
    folder = VERSIONS[version]
    if folder and not OLD_TRITON.is_dir():
        reason = f"no {OLD_TRITON}: pip install --no-deps --target {OLD_TRITON} triton==3.6.0"
        assert os.environ.get("UNLEARN_REQUIRE_NATIVE") != "1", reason
        pytest.skip(reason)
    rows = compile_for(target, folder, "--quick")
    assert {row.triton for row in rows} == {version} or not folder
    assert {row.kernel for row in rows} == USES_LOGITS | WITHOUT_LOGITS
    wrong = {f"{row.kernel} {row.configuration} {row.variant}": complaints(row) for row in rows}
    assert {name: why for name, why in wrong.items() if why} == {}
    assert {without_tiles(row.configuration) for row in rows if row.kernel == "exp_sums_kernel"} >= shipped(target)
    if target == "sm_90":
        check_two_programs_fit([row for row in rows if row.kernel == "exp_sums_kernel" and row.variant == "plain"])


def check_two_programs_fit(rows: list[SimpleNamespace]) -> None:
    """The tiles of 128 x 128 and 64 x 256 are there so that two programs share a multiprocessor of 228 KiB."""
    small = [row for row in rows if row.configuration.startswith(("128x128x", "64x256x"))]
    assert len(small) >= 2
    for row in small:
        assert row.shared <= 113 * KIB and row.registers * 32 * row.warps <= REGISTER_FILE // 2, row


def without_tiles(name: str) -> str:
    """A large vocabulary gives a program more tiles than its Config asks for."""
    return re.sub(r"-v\d+", "", name.removesuffix("-E"))


def shipped(target: str) -> set[str]:
    """Every Config that triton_tuning ships for the target's log-likelihoods."""
    tuning = pytest.importorskip("unlearn_kernels.triton_tuning")
    family = "safe" if target == "sm_86" else target
    plans = [*tuning._16_BIT[family], *tuning._CAPPED[family], *tuning._32_BIT["safe"]]
    plans += [tuning.LORA_CONFIGS[family], tuning.UNALIGNED_CONFIG]
    return {without_tiles(plan.name) for plan in plans if plan != tuning.LIBRARY}


GOOD = dict(
    kernel="exp_sums_kernel", variant="plain", target="sm_90", registers=183, spill=0, shared=180248, warps=8, wgmma=4,
    mma=0, tcgen05=0, mfma=0, tma_loads=6, tma_stores=2, serialized=False, store_e=True,
)  # fmt: skip


@pytest.mark.parametrize(
    "fault",
    [
        {"spill": 8},
        {"shared": 227 * KIB + 1},
        {"target": "sm_86", "mma": 1, "shared": 99 * KIB + 1},
        {"registers": 255, "warps": 16},
        {"target": "gfx942", "mfma": 1, "shared": 0, "registers": 257},
        {"wgmma": 0},
        {"target": "sm_100"},
        {"tma_loads": 0},
        {"tma_stores": 0},
        {"serialized": True},
    ],
    ids=str,
)
def test_a_bad_kernel_is_noticed(fault):
    assert complaints(SimpleNamespace(**GOOD)) == []
    assert len(complaints(SimpleNamespace(**GOOD | fault))) == 1
