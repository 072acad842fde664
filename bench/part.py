"""What the parts of bench/gpu.sh share: their options, their row file, and when a part need not run again.

A part is a module with `run(part)`; rows go to OUT/gpu_NAME.jsonl as they are measured. Its exit status is 1 if a row
failed, 0 otherwise; shapes that its share of the time did not reach are rows of case "left_out" and no failure.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.rows import RESULTS, RowFile, device_name, environment, read, source_digest, version_of
from bench.timing import Budget


@dataclass(frozen=True)
class Part:
    """backend: forced by name, None for what the device gets by default. tiny: the script is tried, not the machine."""

    args: argparse.Namespace
    device: torch.device
    budget: Budget
    rows: RowFile

    @property
    def backend(self) -> str | None:
        return self.args.backend

    @property
    def tiny(self) -> bool:
        return self.args.tiny

    def leave_out(self, what: dict[str, Any], reason: str = "the part's time was spent") -> None:
        print(f"left out: {what} ({reason})", flush=True)
        self.rows.write({"case": "left_out", **what, "reason": reason})


def parser_of(description: str | None, *, seconds: float) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script")
    parser.add_argument("--backend", help="force a backend of unlearn_kernels: triton, torch")
    parser.add_argument("--seconds", type=float, default=seconds, help="take no new work after this many")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of gpu_NAME.jsonl")
    parser.add_argument("--if-missing", action="store_true", help="do nothing where rows of this tree and device exist")
    parser.add_argument("--tiny", action="store_true", help="shapes of a few rows: tries the script, measures nothing")
    return parser


def run(name: str, parser: argparse.ArgumentParser, measure: Callable[[Part], None]) -> int:
    """Run a part and return its exit status."""
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"{name}: no GPU here; --device cpu --backend torch --tiny tries the script", file=sys.stderr)
        return 2
    device = torch.device(args.device)
    shared = _environment(name, args, device)
    if args.if_missing:
        earlier = finished(name, args.out, shared)
        if earlier is not None:
            print(f"{name}: rows of this source on this device exist; name the part or use --again to repeat it")
            return 1 if earlier["failed"] else 0
    signal.signal(signal.SIGTERM, _stop)  # `timeout` sends it; the row file closes with a row that says so
    try:
        with RowFile(args.out, f"gpu_{name}", shared) as rows:
            measure(Part(args, device, Budget(args.seconds), rows))
    except Stopped as error:
        print(f"{name}: stopped {error}", file=sys.stderr)
    if rows.failed:
        print(f"{name}: {rows.failed} rows failed, see gpu_{name}.jsonl", file=sys.stderr)
    return 1 if rows.failed else 0


def finished(name: str, folder: Path, shared: dict[str, Any]) -> dict[str, Any] | None:
    """The last row of a part that ran to its end from the same source on the same device."""
    rows = read(f"gpu_{name}", folder)
    same = bool(rows) and all(rows[-1].get(key) == shared[key] for key in ("source", "device", "tiny"))
    return rows[-1] if same and rows[-1]["case"] == "end" else None


class Stopped(BaseException):
    """No Exception: what catches a provider's failure must not take this for one."""


def _stop(number: int, frame: Any) -> None:
    raise Stopped("at the part's hard limit")


def _environment(name: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    shared = environment()
    for folder in sorted({str(args.out), str(args.out.resolve())}, key=len, reverse=True):
        shared["command"] = shared["command"].replace(folder, "DIR")  # where things lie here is nobody's business
    shared |= {"part": name, "device": device_name(device), "source": source_digest(), "tiny": args.tiny}
    shared["triton"] = version_of("triton")
    if device.type == "cuda":
        shared["cuda"] = torch.version.cuda
        shared["capability"] = list(torch.cuda.get_device_capability(device))
        shared["memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
    return shared
