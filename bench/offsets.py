"""Can any 32-bit number in a Triton kernel overflow? Ranges of every integer in its IR, from the launches themselves.

    python -m bench.offsets [--rows N] [--json]

A row number times a stride passes 2**31 at 524288 rows of width 4096, and N x V long before; 32-bit arithmetic wraps
and reads elsewhere, without an error. bench/launches.py records what the host code launches for 2**19 + 1 rows of an 8B
head, without a GPU; each kernel is lowered to Triton's IR, and ranges are carried from the grid and the arguments
through its integer operations. An i32 sum, difference or product that can leave [-2**31, 2**31) is reported.

Taken as given: integers that are loaded, reduced or carried through a loop are counts of rows, row numbers or targets,
within [0, max(N, V)].
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

import unlearn_kernels as uk
from bench.launches import Launch, recording
from unlearn_kernels import triton_tuning

Range = tuple[int, int]
ROWS, WIDTH, VOCAB = (1 << 19) + 1, 4096, 128256
_RESULT = re.compile(r"\s*%([\w$.-]+)(?::\d+)? = ([\w.]+)(.*)")
_VALUE = re.compile(r"%([\w$.-]+)(?:#\d+)?")
_INTEGER = re.compile(r"(?:tensor<(?:\d+x)+)?i(\d+)>?")
# operations that hand their first operand on
_SAME = ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "arith.extsi", "arith.extui",
         "arith.trunci", "arith.index_cast", "ttg.convert_layout")  # fmt: skip
_CHECKED = ("arith.addi", "arith.subi", "arith.muli", "arith.shli", "arith.trunci")


@dataclass
class Analysis:
    """grid: programs of the largest launch; arguments: the largest value of each integer argument; loaded: a bound on
    what is loaded."""

    name: str
    grid: int
    arguments: dict[str, int]
    loaded: int
    ranges: dict[str, Range] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    largest: int = 0  # of any i32 result
    checked: int = 0

    def run(self, ttir: str) -> Analysis:
        for line in ttir.splitlines():
            if "tt.func" in line:
                for name in re.findall(r"%([\w$.-]+): i\d+", line):
                    if "." not in name:  # of a descriptor, whose addresses the copy engine computes in 64 bits
                        self.ranges[name] = (0, self.arguments[name])
                continue
            self._given(line)
            line = line.split(" loc(")[0]
            if match := _RESULT.match(line):
                self._operation(match[1], match[2], match[3])
        return self

    def _given(self, line: str) -> None:
        """Loop counters, from their bounds; what is carried through loops, reduced or loaded, by assumption."""
        if match := re.search(r"scf\.for %([\w$.-]+) = %([\w$.-]+) to %([\w$.-]+)", line):
            first, last = self.ranges.get(match[2]), self.ranges.get(match[3])
            if first is not None and last is not None:
                self.ranges[match[1]] = (first[0], max(first[0], last[1] - 1))
        names: list[str] = []
        if "scf.while" in line or "iter_args(" in line:
            names += re.findall(r"%([\w$.-]+) = %", re.split(r"iter_args|scf\.while", line)[1])
        if line.lstrip().startswith("^bb"):
            names += re.findall(r"%([\w$.-]+): i\d+", line)
        if match := re.match(r'\s*%([\w$.-]+)(?::\d+)? = (?:"tt\.reduce"|tt\.load .*ptr<i\d+>|tt\.atomic_rmw)', line):
            names.append(match[1])
        self.ranges |= dict.fromkeys(names, (0, self.loaded))  # a pointer's or a float's is never asked for

    def _operation(self, result: str, operation: str, rest: str) -> None:
        types = rest.rpartition(" : ")[2].rpartition(" to ")[2].rpartition("-> ")[2]
        kind = _INTEGER.fullmatch(types.rpartition(", ")[2].strip())
        if operation == "arith.constant":
            if found := re.match(r" (?:dense<)?(-?\d+)>? : ", rest):
                self.ranges[result] = (int(found[1]), int(found[1]))
            elif " true" in rest or " false" in rest:
                self.ranges[result] = (0, 1)
            return
        if operation == "arith.cmpi":
            self.ranges[result] = (0, 1)
            return
        if kind is None:
            return
        operands = [self.ranges.get(name) for name in _VALUE.findall(rest)]
        found = self._range(operation, rest, operands)
        if operation in _CHECKED and kind[1] == "32":
            self.checked += 1
            if found is None:
                self.problems.append(f"{self.name}: %{result} = {operation}{rest}: unknown operand")
                found = (0, self.loaded)
            elif not -(1 << 31) <= found[0] <= found[1] < 1 << 31:
                self.problems.append(f"{self.name}: %{result} = {operation}{rest}: up to {found[1]}")
            self.largest = max(self.largest, *map(abs, found))
        if found is not None:
            self.ranges[result] = found

    def _range(self, operation: str, rest: str, operands: list[Range | None]) -> Range | None:
        if operation == "tt.get_program_id":
            return 0, self.grid - 1
        if operation == "tt.get_num_programs":
            return self.grid, self.grid
        if operation == "tt.make_range":
            end = re.search(r"end = (\d+)", rest)
            return (0, int(end[1]) - 1) if end else None
        if operation == "arith.select":
            operands = operands[1:]
        known = [operand for operand in operands if operand is not None]
        if not known or len(known) < len(operands):
            return None
        if operation in _SAME:
            return known[0]
        if operation in ("arith.select", "arith.andi", "arith.ori", "arith.xori"):
            return min(low for low, _ in known), max(high for _, high in known)
        step = _ARITHMETIC.get(operation)
        return None if step is None else step(*known)


def _corners(function: Callable[[int, int], int]) -> Callable[[Range, Range], Range]:
    """Of a function that is monotone in each operand."""

    def bound(x: Range, y: Range) -> Range:
        values = [function(a, b) for a in x for b in y]
        return min(values), max(values)

    return bound


_ARITHMETIC: dict[str, Callable[[Range, Range], Range]] = {
    "arith.addi": _corners(lambda a, b: a + b),
    "arith.subi": _corners(lambda a, b: a - b),
    "arith.muli": _corners(lambda a, b: a * b),
    "arith.shli": _corners(lambda a, b: a << max(0, min(b, 63))),
    "arith.minsi": lambda x, y: (min(x[0], y[0]), min(x[1], y[1])),
    "arith.maxsi": lambda x, y: (max(x[0], y[0]), max(x[1], y[1])),
    # a divisor's range begins at 0 where it is an argument; the least that divides is 1
    "arith.divsi": lambda x, y: (min(0, x[0]), max(0, x[1]) // max(1, y[0])),
    "arith.ceildivsi": lambda x, y: (min(0, x[0]), max(0, x[1]) // max(1, y[0]) + 1),
    "arith.remsi": lambda x, y: (min(0, x[0]), min(max(0, x[1]), max(0, y[1] - 1))),
}


def calls(rows: int, workspace: int | None = 1 << 44) -> tuple[Callable[[], None], ...]:
    """NPO's loss, token log-probabilities with every part of a head, LoRA on the head, statistics, KL without
    gradients; workspace: as large as E, so that a launch sees all rows."""
    bf16 = torch.bfloat16

    def run(kind: str, **head: Any) -> None:
        hidden = torch.empty(rows, WIDTH, dtype=bf16, requires_grad=True)
        weight = torch.empty(VOCAB, WIDTH, dtype=bf16, requires_grad=True)
        targets, cu = torch.empty(rows, dtype=torch.int64), torch.empty(2, dtype=torch.int64)
        if head.pop("bias", False):
            head["bias"] = torch.empty(VOCAB, dtype=bf16, requires_grad=True)
        if rank := head.pop("rank", 0):
            a, b = torch.empty(rank, WIDTH, dtype=bf16), torch.empty(VOCAB, rank, dtype=bf16)
            head["lora"] = (a.requires_grad_(), b.requires_grad_(), 2.0)
        head["options"] = uk.Options(workspace, backend="triton")
        if kind == "loss":
            ref = torch.empty(1, dtype=torch.float64)
            uk.npo_loss(hidden, weight, targets, cu, ref, beta=0.1, **head).backward()
        elif kind == "tokens":
            uk.token_logprobs(hidden, weight, targets, **head).sum().backward()
        elif kind == "stats":
            uk.token_stats(hidden, weight, targets, **head)
        else:
            uk.linear_kl(hidden.detach(), weight.detach(), hidden.detach(), weight.detach(), **head)

    return (
        lambda: run("loss"),
        lambda: run("tokens", bias=True, softcap=30.0, logit_scale=0.5),
        lambda: run("loss", rank=16),
        lambda: run("stats"),
        lambda: run("kl, no gradient"),
    )


def record(rows: int) -> list[Launch]:
    """By pointers on sm_80, where the kernels compute every address themselves; through descriptors on sm_90.

    A quarter of the rows, whose N x V is past 2**31 too, where most of the time goes to recording library products and
    what is launched sees a chunk or a tile of the rows: the default workspace, tiled logits, KL with gradients.
    """
    loss, parts, lora, stats, kl = calls(rows)
    few = rows // 4
    chunks, *_ = calls(few, None)
    work = [("sm_80", "fused", rows, call) for call in (loss, parts, lora, stats, kl)]
    work += [("sm_90", "fused", rows, call) for call in (loss, parts, stats, kl)]
    work += [("sm_80", "fused", few, call) for call in (chunks, lambda: _kl_with_gradients(few))]
    work.append(("sm_80", "library", few, next(iter(calls(few)))))
    found: list[Launch] = []
    for target, plan, count, call in work:
        with recording(target, [0, count]) as (made, _), triton_tuning.force(plan):
            call()
        found += made.launches
    return found


def _kl_with_gradients(rows: int) -> None:
    hidden = torch.empty(rows, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(VOCAB, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    options = uk.Options(1 << 44, backend="triton")
    uk.linear_kl(hidden, weight, hidden.detach(), weight.detach(), options=options).sum().backward()


def analyses(launches: list[Launch]) -> Iterable[Analysis]:
    """One for each binary, under the largest grid and arguments that it is launched with."""
    groups: dict[str, list[Launch]] = {}
    for launch in launches:
        groups.setdefault(launch.key(), []).append(launch)
    for same in groups.values():
        arguments: dict[str, int] = {}
        for launch in same:
            for name, value in launch.arguments.items():
                if isinstance(value, int):
                    arguments[name] = max(arguments.get(name, 0), value)
        grid = max(launch.grid[0] for launch in same)
        yield Analysis(same[0].name, grid, arguments, max(ROWS, VOCAB)).run(same[0].ttir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args()
    done = list(analyses(record(args.rows)))
    problems = sorted({problem for analysis in done for problem in analysis.problems})
    kernels = {analysis.name: 0 for analysis in done}
    for analysis in done:
        kernels[analysis.name] = max(kernels[analysis.name], analysis.largest)
    if args.json:
        checked = sum(analysis.checked for analysis in done)
        print(json.dumps({"binaries": len(done), "checked": checked, "largest": kernels, "problems": problems}))
        return
    for name, largest in kernels.items():
        print(f"{name:28} largest 32-bit number {largest:>14,} ({largest / 2**31:.1%} of 2**31)")
    print("\n".join(problems) or f"{len(done)} binaries: nothing can overflow")


if __name__ == "__main__":
    main()
