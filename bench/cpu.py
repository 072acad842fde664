"""Cost, error and memory of the kernels on this machine's CPU: `python -m bench.cpu ours | peers | memory`.

ours: unlearn_kernels at many shapes, and plain torch where N is 1024. peers: every provider that runs on a CPU, at one
shape. memory: how far a call raises the resident memory of a process of its own, at N = 16384.

Each call is the log-likelihoods without gradients (forward), NPO forward and backward with a trained head (full), or
the same with a frozen one (frozen). "bare products" are torch.mm alone, of the forward and of the gradients that are
asked for. Costs are in units: the time over the time of one torch.mm of N x H x V in the same dtype into memory that
exists, measured between the calls in the same process, median of several rounds. A row whose error against float64 is
out of bounds is marked refused and has no speed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bench import providers as everyone
from bench.inputs import Case, Shape, truth_of
from bench.measure import Fields, checked, has_speed, named, outcome, speed
from bench.providers import Ours, Provider, work_of
from bench.rows import RESULTS, ROOT, RowFile, environment
from bench.timing import Interleaved, Products, Stopwatch, Unit, peak_if_any, quartiles

CPU = torch.device("cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KINDS = ("forward", "full", "frozen")
WIDTHS, VOCABS = (1024, 2048, 4096), (32000, 128256)
LARGE = [(rows, width, vocab) for rows in (1024, 4096) for width in WIDTHS for vocab in VOCABS]
SMALL = [(rows, 2048, vocab) for rows in (64, 256) for vocab in VOCABS]
OTHER_DTYPES = [((1024, 2048, 32000), dtype) for dtype in (FP32, FP16)]
PEER_SHAPES = [(1024, 2048, 32000)]
MEMORY_SHAPE = (16384, 2048, 128256)
TINY = {"ours": [(48, 32, 257)], "peers": [(128, 32, 300)], "memory": (256, 32, 300)}
# float64 truths: of the log-probabilities, a sample of rows; of the weight's gradient, a pass over all of them
TRUE_ROWS, TRUE_COLUMNS, DWEIGHT_ROWS = 256, 64, 1024
SLOW_SECONDS = 3.0  # of one call: no warm-up besides


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("ours", "peers", "memory"))
    parser.add_argument("--rounds", type=int, default=15, help="at most this many per shape, at least 2")
    parser.add_argument("--seconds", type=float, default=20.0, help="no new round of a shape after this many")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of cpu_PART.jsonl")
    parser.add_argument("--tiny", action="store_true", help="one small shape: tries the script, measures nothing")
    parser.add_argument("--resident", choices=KINDS, help=argparse.SUPPRESS)  # how memory calls itself
    args = parser.parse_args()
    if args.resident:
        print(json.dumps(resident(args.resident, TINY["memory"] if args.tiny else MEMORY_SHAPE)))
        return 0
    shared = environment() | {"tiny": args.tiny}
    shared["command"] = shared["command"].replace(str(args.out), "DIR")  # where things lie here is nobody's business
    with RowFile(args.out, f"cpu_{args.part}", shared) as rows:
        for row in {"ours": ours, "peers": peers, "memory": memory}[args.part](args):
            rows.write(row, failed="refused" in row or ("failed" in row and row["provider"] == "unlearn_kernels"))
            shape = " x ".join(str(size) for size in row["shape"].values())
            print(f"{shape:20} {row['dtype']:9} {row['case']:8} {row['provider']:36} {outcome(row)}", flush=True)
    return 1 if rows.failed else 0


def ours(args: argparse.Namespace) -> Iterator[Fields]:
    asked = [(shape, BF16) for shape in [*SMALL, *LARGE]] + OTHER_DTYPES
    for shape, dtype in [(shape, BF16) for shape in TINY["ours"]] if args.tiny else asked:
        torch_too = [everyone.PlainTorch("torch")] if shape[0] <= 1024 else []
        yield from measure(shape, dtype, [Ours("unlearn_kernels"), *torch_too], args)


def peers(args: argparse.Namespace) -> Iterator[Fields]:
    there, absent = everyone.split(everyone.cpu_peers(), CPU)
    for name, reason in absent.items():
        print(f"{name}: {reason}", flush=True)
    for shape in TINY["peers"] if args.tiny else PEER_SHAPES:
        yield from measure(shape, BF16, [Ours("unlearn_kernels"), *there], args)


def measure(shape: Shape, dtype: torch.dtype, providers: list[Provider], args: argparse.Namespace) -> Iterator[Fields]:
    """A row per provider and kind."""
    case = Case.make(shape, dtype).unsaturated()
    truth = truth_of(case, num_rows=TRUE_ROWS, num_columns=TRUE_COLUMNS if shape[0] <= DWEIGHT_ROWS else 0)
    timed = Interleaved(Stopwatch(CPU), warmups=1)
    unit = Unit(case.hidden, case.weight)
    timed.add("unit", unit)
    for kind in ("full", "frozen"):
        timed.add(("mm", kind), Products(unit, frozen=kind == "frozen"))
    errors: dict[tuple[str, str], Fields] = {}
    for provider in providers:
        provider.begin()
        for kind in (kind for kind in KINDS if kind in provider.kinds):
            key = (provider.name, kind)
            start = time.perf_counter()
            errors[key] = checked(provider, kind, case, truth)
            timed.warmups = 0 if time.perf_counter() - start > SLOW_SECONDS else 1  # the check was one
            if has_speed(errors[key]):
                timed.add(key, work_of(provider, kind, case))
    timed.rounds(args.seconds, least=1 if args.tiny else 2, most=2 if args.tiny else args.rounds)
    unit_ms = quartiles(timed.times["unit"])[1]
    gflops = 2e-6 * math.prod(shape) / unit_ms
    for kind in ("full", "frozen"):
        timing = speed(timed.times["mm", kind], unit_ms) | {"unit_gflops": gflops}
        yield {"case": kind, "provider": "bare products", **named(shape, dtype)} | timing
    for provider in providers:
        for kind in (kind for kind in KINDS if (provider.name, kind) in errors):
            key = (provider.name, kind)
            row = {"case": kind, "provider": provider.name, **named(shape, dtype), **errors[key]}
            if key in timed.failed:
                row["failed"] = timed.failed[key]
            if has_speed(row):
                case.ask(hidden=False, weight=False)
                peak = peak_if_any(work_of(provider, kind, case), CPU)
                row |= speed(timed.times[key], unit_ms) | {"peak_mib": peak, "unit_gflops": gflops}
            case.ask(hidden=False, weight=False)
            yield row


# -- resident memory ---------------------------------------------------------------------------------------------------


def memory(args: argparse.Namespace) -> Iterator[Fields]:
    command = [sys.executable, "-m", "bench.cpu", "memory", *(["--tiny"] if args.tiny else []), "--resident"]
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]))
    for kind in KINDS:
        row = {"case": kind, "provider": "unlearn_kernels", **named(TINY["memory"] if args.tiny else MEMORY_SHAPE)}
        done = subprocess.run(
            [*command, kind], env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=False
        )
        yield row | (json.loads(done.stdout) if done.returncode == 0 else {"failed": f"exit status {done.returncode}"})


def resident(kind: str, shape: Shape) -> Fields:
    """How far one call raises this process's resident memory (Linux), and how much of that are the gradients; with the
    call's cost, timed once."""
    case, provider = Case.make(shape, BF16), Ours("unlearn_kernels")
    small = Case.make((64, 64, 512), BF16)
    work_of(provider, kind, small)()  # libraries and threads
    unit_ms = Stopwatch(CPU)(unit := Unit(case.hidden[:1024], case.weight)) * shape[0] / min(1024, shape[0])
    del unit
    work = work_of(provider, kind, case)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins at what is resident now
    before = _status_mib("VmHWM")
    elapsed = Stopwatch(CPU)(work)
    gradients = sum(x.numel() * x.element_size() for x in (case.hidden.grad, case.weight.grad) if x is not None)
    return {
        "peak_rss_mib": _status_mib("VmHWM") - before,
        "gradients_mib": gradients / 2**20,
        "inputs_mib": sum(x.numel() * x.element_size() for x in (case.hidden, case.weight)) / 2**20,
        "workspace_mib": provider.options(shape[0], shape[2]).workspace(CPU) / 2**20,
    } | speed([elapsed], unit_ms)


def _status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


if __name__ == "__main__":
    sys.exit(main())
