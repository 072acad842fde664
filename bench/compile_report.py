"""Registers, spills, shared memory and matrix instructions of every Triton kernel, without a GPU.

    python -m bench.compile_report [--targets sm_80 sm_90 sm_100 gfx942] [--json] [--quick]

Compiles what the host code would launch (bench/launches.py) ahead of time: each shipped configuration of
unlearn_kernels.triton_tuning, each dtype, with and without E, with every part of a head. Binaries and ptxas's words are
kept under build/triton-<version> (--cache), so a second run takes seconds. --quick is the selection `make test` checks:
every kernel and every configuration once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pathlib
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest import mock

import torch
import triton

import unlearn_kernels as uk
from bench.launches import FAMILIES, Launch, Recording, recording
from unlearn_kernels import triton_tuning
from unlearn_kernels.triton_tuning import Config, Plan

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """One head and what is asked of it."""

    name: str
    hidden: torch.dtype = BF16
    weight: torch.dtype = BF16
    width: int = 4096
    vocab: int = 128256
    rows: int = 4096
    parts: tuple[str, ...] = ()  # of bias, scale, cap, lora
    plan: Plan = "fused"  # a name of triton_tuning.force's, or any Config
    calls: tuple[str, ...] = ("values", "loss")

    def inputs(self) -> dict[str, Any]:
        head: dict[str, Any] = {"options": uk.Options(backend="triton")}
        if "bias" in self.parts:
            head["bias"] = torch.empty(self.vocab, dtype=self.weight, requires_grad=True)
        if "scale" in self.parts:
            head["logit_scale"] = 0.5
        if "cap" in self.parts:
            head["softcap"] = 30.0
        if "lora" in self.parts:
            a = torch.empty(16, self.width, dtype=self.weight, requires_grad=True)
            head["lora"] = (a, torch.empty(self.vocab, 16, dtype=self.weight, requires_grad=True), 2.0)
        return head


def run_case(case: Case, target: str) -> Recording:
    sequences = case.rows // 512
    boundaries = [512 * b for b in range(sequences + 1)]
    with recording(target, boundaries) as (record, _), forced(case.plan):
        hidden = torch.empty(case.rows, case.width, dtype=case.hidden, requires_grad=True)
        weight = torch.empty(case.vocab, case.width, dtype=case.weight, requires_grad="lora" not in case.parts)
        targets, cu = torch.empty(case.rows, dtype=torch.int64), torch.empty(sequences + 1, dtype=torch.int64)
        ref, head = torch.empty(sequences, dtype=torch.float64), case.inputs()
        inputs = (hidden, weight, targets)
        if "values" in case.calls:
            with torch.no_grad():
                uk.sequence_logprobs(*inputs, cu, **head)
        if "loss" in case.calls:
            uk.npo_loss(*inputs, cu, ref, beta=0.1, **head).backward()
        if "stats" in case.calls:
            uk.token_stats(*inputs, **head)
        if "kl" in case.calls:
            with torch.no_grad():
                uk.linear_kl(hidden, weight, hidden, weight, **head)
            uk.linear_kl(hidden, weight, hidden, weight, **head).sum().backward()
    return record


def forced(plan: Plan) -> contextlib.AbstractContextManager[Any]:
    if isinstance(plan, str):
        return triton_tuning.force(plan)
    return mock.patch.object(triton_tuning, "choose", lambda *args, **kwargs: plan)


# -- what is compiled --------------------------------------------------------------------------------------------------


def shipped(target: str, case: Case) -> list[Config]:
    with recording(target):
        traits = {"lora": "lora" in case.parts, "capped": "cap" in case.parts, "aligned": case.width % 8 == 0}
        plans = triton_tuning.candidates(torch.device("cuda"), case.hidden, case.weight, **traits)
    return [plan for plan in plans if isinstance(plan, Config)]


def cases(quick: bool) -> Iterator[Case]:
    everything = ("values", "loss", "stats", "kl")
    yield Case("plain", calls=everything)
    yield Case("library", plan=triton_tuning.LIBRARY)
    yield Case("LoRA", parts=("lora",), calls=("loss", "stats"))
    yield Case("float32", FP32, FP32, calls=("loss",) if quick else everything)
    yield Case("softcap", parts=("cap",), calls=("loss",))
    yield Case("V 50257", vocab=50257, calls=("loss",))
    yield Case("H 2052", width=2052, calls=everything)
    if quick:
        return
    yield Case("bias scale softcap", parts=("bias", "scale", "cap"), calls=everything)
    yield Case("bias scale softcap library", parts=("bias", "scale", "cap"), plan=triton_tuning.LIBRARY)
    yield Case("LoRA, all parts", parts=("lora", "bias", "scale", "cap"), calls=everything)
    yield Case("float16", FP16, FP16, calls=everything)
    yield Case("float32 weight", BF16, FP32, calls=everything)
    yield Case("float32, all", FP32, FP32, parts=("bias", "scale", "cap", "lora"), calls=everything)
    yield Case("H 2052 V 50257 N 3584", width=2052, vocab=50257, rows=3584, parts=("bias",), calls=everything)


# what quick tries with each head, and not only with each configuration: where registers run out
_BY_HEAD = ("exp_sums_kernel", "redo_sums_kernel", "kl_kernel")


def launches(target: str, quick: bool) -> Iterator[tuple[str, str, Launch]]:
    """(configuration, variant, launch): each binary once; quick: each kernel and configuration once."""
    seen: set[str] = set()

    def fresh(case: Case, only: str = "") -> Iterator[tuple[str, str, Launch]]:
        for launch in run_case(case, target).distinct():
            name = configuration(launch)
            kind = f"{name} {case.name}" if launch.name in _BY_HEAD else name if "tiles" in launch.arguments else ""
            key = f"{launch.name} {kind}" if quick else launch.key()
            if only in launch.name and key not in seen:
                seen.add(key)
                yield name, case.name, launch

    for case in cases(quick):
        yield from fresh(case)
    heads = [Case("plain"), Case("float32", FP32, FP32), Case("LoRA", parts=("lora",)), Case("softcap", parts=("cap",))]
    for head in heads:
        for config in shipped(target, head):
            asked = replace(head, plan=config, rows=1024, calls=("loss",)) if quick else replace(head, plan=config)
            yield from fresh(asked, "exp_sums")


def configuration(launch: Launch) -> str:
    """The Config of a launch that has one, by the name it has in triton_tuning; else its block sizes."""
    given = launch.arguments
    if "tiles" not in given:
        return " ".join(f"{name}={value}" for name, value in given.items() if name.startswith("BLOCK"))
    config = Config(
        *(given[name] for name in ("BLOCK_T", "BLOCK_V", "BLOCK_K", "num_warps", "num_stages", "tiles")),
        given.get("GROUP_T", 16), *(bool(given.get(name)) for name in ("TMA", "HALVES", "FLATTEN")),
    )  # fmt: skip
    return config.name + ("-E" if given.get("STORE_E") else "")


# -- what came out -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """registers: per thread, 32 bits each. spill: bytes per thread (NVIDIA), registers (AMD). shared: bytes per program
    (LDS on AMD). serialized: ptxas gave up running wgmma asynchronously. mma: matrix instructions in the text."""

    kernel: str
    configuration: str
    variant: str
    target: str
    registers: int
    spill: int
    shared: int
    stages: int
    warps: int
    wgmma: int
    mma: int
    tcgen05: int
    mfma: int
    tma_loads: int
    tma_stores: int
    serialized: bool
    store_e: bool
    tma: bool
    triton: str


def measure(configured: str, variant: str, launch: Launch, logs: pathlib.Path) -> Row:
    compiled, log = _compiled(launch, logs)
    text = compiled.asm["ptx"] if "ptx" in compiled.asm else compiled.asm["amdgcn"]
    if "ptx" in compiled.asm:
        registers = _number(r"Used (\d+) registers", log)
        spill = _number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log)
    else:
        registers = _number(r"\.vgpr_count:\s+(\d+)", text)  # accumulation registers included
        spill = _number(r"\.vgpr_spill_count:\s+(\d+)", text)
    count = {name: len(re.findall(pattern, text)) for name, pattern in _INSTRUCTIONS.items()}
    given = launch.arguments
    return Row(
        launch.name, configured, variant, launch.target, registers, spill, compiled.metadata.shared,
        compiled.metadata.num_stages, compiled.metadata.num_warps, serialized="serialized" in log,
        store_e=bool(given.get("STORE_E")), tma=bool(given.get("TMA")), triton=triton.__version__, **count,
    )  # fmt: skip


_INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "mma": r"(?<!wg)mma\.sync",
    "tcgen05": r"tcgen05\.mma",
    "mfma": r"v_mfma",
    "tma_loads": r"cp\.async\.bulk\.tensor\.\dd\.shared",
    "tma_stores": r"cp\.async\.bulk\.tensor\.\dd\.global",
}


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return 0 if found is None else int(found.group(1))


def _compiled(launch: Launch, logs: pathlib.Path) -> tuple[Any, str]:
    """The binary and what ptxas said of it, which triton's own cache does not keep."""
    triton.knobs.nvidia.dump_ptxas_log = True
    with contextlib.redirect_stdout(io.StringIO()) as said:
        compiled = launch.compile()
    path = logs / f"{compiled.hash}.ptxas"
    log = said.getvalue()
    if not log and path.exists():
        log = path.read_text()
    if not log and "ptx" in compiled.asm:
        raise RuntimeError(f"{launch.name} was in triton's cache without {path}: empty the cache folder")
    path.write_text(log)
    return compiled, log


def report(target: str, quick: bool, cache: str) -> list[Row]:
    folder = pathlib.Path(cache)
    folder.mkdir(parents=True, exist_ok=True)
    triton.knobs.cache.dir = str(folder)
    return [measure(*item, folder) for item in launches(target, quick)]


COLUMNS = (
    "registers", "spill", "shared", "stages", "warps", "wgmma", "mma", "tcgen05", "mfma", "tma_loads", "tma_stores",
)  # fmt: skip


def table(rows: list[Row]) -> str:
    header = ("kernel", "configuration", "variant", "target", *COLUMNS, "")
    lines = [header] + [
        (row.kernel, row.configuration, row.variant, row.target, *(str(getattr(row, name)) for name in COLUMNS),
         "SERIALIZED" if row.serialized else "") for row in rows
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(FAMILIES))
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    parser.add_argument("--quick", action="store_true", help="every kernel and configuration once")
    parser.add_argument("--cache", default=f"build/triton-{triton.__version__}")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args()
    print(f"triton {triton.__version__}, torch {torch.__version__}", file=sys.stderr)
    asked = [(target, args.quick, args.cache) for target in args.targets]
    if min(args.processes, len(asked)) == 1:
        rows = [row for each in asked for row in report(*each)]
    else:
        with ProcessPoolExecutor(args.processes) as pool:
            rows = [row for part in pool.map(report, *zip(*asked, strict=True)) for row in part]
    if args.json:
        for row in rows:
            print(json.dumps(asdict(row)))
    else:
        print(table(rows))


if __name__ == "__main__":
    main()
