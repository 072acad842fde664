"""Cost and error of the kernels on a GPU, alone or beside the peers: `python -m bench.gpu_kernels [--peers]`.

For each shape: log-likelihoods without gradients (forward), NPO forward and backward with a trained head (full) and
with a frozen one (frozen). Costs are in units: the time over that of one bf16 torch.mm of N x H x V in the same
process, measured between the providers' calls, median of many rounds. Each row also has the peak memory above what lay
there before, and the error against float64 on a sample of rows; a row whose error no rounding explains is marked
refused and has no speed. Other rows: the unit measured twice (how far equal work spreads), a copy's bandwidth, a CUDA
graph's replay at the two smallest shapes, and batches as trainers pad them, where 15 % of positions carry a label.

--peers: fewer shapes, every other provider with ours between them, and the mean cross entropy, which is all that some
of them compute.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench import part as parts
from bench import providers as everyone
from bench.inputs import Case, Padded, Shape, padded_truth, relative_error, truth_of
from bench.measure import Fields, checked, has_speed, named, outcome, speed
from bench.part import Part
from bench.providers import Ours, Provider, work_of
from bench.rows import first_line
from bench.timing import Interleaved, Stopwatch, Unit, copy_gb_per_second, graphed, peak_if_any, quartiles, release

HEADS = ((2048, 128256), (4096, 32000), (4096, 128256), (3584, 152064), (2304, 256000))
# The most telling first: time may run out.
ROWS = (16384, 4096, 1024, 32768)
PEER_ROWS = (16384, 4096)
# Compiling takes longer than measuring: such providers are asked for one head.
SLOW_HEAD = (4096, 128256)
PADDED_HEADS = ((4096, 128256), (2048, 128256))
PADDED_BATCH, PADDED_LENGTH, LABELLED = 32, 512, 0.15
# The weight's gradient in float64 costs a pass over all rows.
DWEIGHT_ROWS = 4096
DTYPE = torch.bfloat16


def main() -> int:
    parser = parts.parser_of(__doc__, seconds=165)
    parser.add_argument("--peers", action="store_true", help="the peers' shapes and providers")
    parser.add_argument("--rounds", type=int, default=40, help="at most this many per shape")
    parser.add_argument("--only", default="", help="providers whose name contains this")
    parser.add_argument("--every-plan", action="store_true", help="each of the Triton backend's plans, forced")
    name = "peers" if "--peers" in sys.argv else "kernels"
    return parts.run(name, parser, measure_all)


def measure_all(part: Part) -> None:
    wanted, absent = everyone.split(chosen_providers(part), part.device)
    wanted = [provider for provider in wanted if part.args.only in provider.name]
    for name, reason in absent.items():
        print(f"{name}: {reason}", flush=True)
        part.rows.write({"case": "missing", "provider": name, "reason": reason})
    stopwatch = Stopwatch(part.device)
    copied = 1 << (20 if part.tiny else 31)
    part.rows.write({"case": "copy", "gb_per_second": copy_gb_per_second(stopwatch, copied), "bytes": copied})
    todo: list[tuple[float, Fields, Callable[[float], None]]] = []
    for shape in shapes_of(part):
        todo.append((cost(shape), named(shape), Matrix(part, stopwatch, shape, wanted).measure))
    for head in ((48, 320),) if part.tiny else PADDED_HEADS:
        batch, length = (4, 20) if part.tiny else (PADDED_BATCH, PADDED_LENGTH)
        shape = (batch * length, *head)
        measure = PaddedBatch(part, stopwatch, shape, batch, wanted).measure
        todo.insert(5 if part.args.peers else len(todo), (cost(shape) / 2, named(shape) | {"batch": batch}, measure))
    for index, (share, what, measure) in enumerate(todo):
        if part.budget.spent:
            part.leave_out(what)
            continue
        seconds = part.budget.left * share / sum(other for other, _, _ in todo[index:])
        try:
            measure(seconds)
        except Exception as error:  # one shape out of memory leaves the others
            print(f"{what}: {first_line(error)}", flush=True)
            part.rows.write({"case": "error", **what, "message": first_line(error)}, failed=True)
        release(part.device)
    part.rows.write({"case": "autotuned", "plans": everyone.autotuned() if part.device.type == "cuda" else {}})


def chosen_providers(part: Part) -> list[Provider]:
    backends = [part.backend] if part.backend else []
    if part.args.peers:
        return [*everyone.ours(*backends), *everyone.peers()]
    variants = everyone.variants(part.device if part.args.every_plan else None)
    return [*everyone.ours(*(backends or ["torch"])), *variants, everyone.whole_e(), everyone.peers()[0]]


def shapes_of(part: Part) -> list[Shape]:
    if part.tiny:
        return [(128, 32, 300), (64, 48, 257)]
    return [(rows, *head) for rows in (PEER_ROWS if part.args.peers else ROWS) for head in HEADS]


def cost(shape: Shape) -> float:
    """A shape's share of the time: its product, and what starting costs whatever the size."""
    return math.prod(shape) + 4096 * 4096 * 128256


class Matrix:
    """One shape of N x H x V: every provider and kind, interleaved."""

    def __init__(self, part: Part, stopwatch: Stopwatch, shape: Shape, providers: Sequence[Provider]) -> None:
        self.part, self.stopwatch, self.shape = part, stopwatch, shape
        self.kinds = ("forward", "full", "frozen", "mean_ce") if part.args.peers else ("forward", "full", "frozen")
        self.providers = [provider for provider in providers if self._wants(provider)]

    def _wants(self, provider: Provider) -> bool:
        if self.part.tiny:
            return True
        num_tokens, *head = self.shape
        if provider.slow_to_start:
            return tuple(head) == SLOW_HEAD
        if self.part.args.peers:
            return True
        if provider.name == "torch":  # beside the kernels it is there for the padded batches
            return False
        return provider.name != "unlearn_kernels[torch]" or num_tokens == 4096

    def measure(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        case = Case.make(self.shape, DTYPE, self.part.device).unsaturated()
        columns = 256 if self.shape[0] <= DWEIGHT_ROWS else 0
        truth = truth_of(case, num_columns=columns)
        release(self.part.device)
        timed = Interleaved(self.stopwatch)
        unit = Unit(case.hidden, case.weight)
        for number in (0, 1):
            timed.add(("unit", number), unit)
        errors: dict[tuple[str, str], Fields] = {}
        for provider in self.providers:
            if isinstance(provider, Ours) and provider.whole_e and not self._e_fits():
                self.part.leave_out(named(self.shape) | {"provider": provider.name}, "E does not fit in free memory")
                continue
            provider.begin()
            for kind in (kind for kind in self.kinds if kind in provider.kinds):
                key = (provider.name, kind)
                errors[key] = checked(provider, kind, case, truth)
                if has_speed(errors[key]):
                    timed.add(key, work_of(provider, kind, case))
        tiny = self.part.tiny
        timed.rounds(end - time.monotonic(), least=1 if tiny else 3, most=2 if tiny else self.part.args.rounds)
        unit_ms = self._write_unit(timed, unit)
        del unit
        for provider in self.providers:
            for kind in (kind for kind in self.kinds if (provider.name, kind) in errors):
                self._write(provider, kind, case, errors[provider.name, kind], timed, unit_ms)
        if self.part.device.type == "cuda" and not self.part.args.peers and self.shape in smallest(self.part):
            self._write_graphs(case, unit_ms)

    def _e_fits(self) -> bool:
        if self.part.device.type != "cuda":
            return True
        free = torch.cuda.mem_get_info(self.part.device)[0] + _cached(self.part.device)
        num_tokens, width, vocab = self.shape
        return 2 * num_tokens * vocab + 8 * vocab * width + (2 << 30) < free

    def _write_unit(self, timed: Interleaved, unit: Unit) -> float:
        lower, unit_ms, upper = quartiles(timed.times["unit", 0])
        again = quartiles(timed.times["unit", 1])[1]
        row = {
            "case": "unit",
            **named(self.shape),
            "unit_ms": unit_ms,
            "unit_ms_quartiles": [lower, upper],
            "tflops": 2 * math.prod(self.shape) / unit_ms / 1e9,
            "duplicate": again / unit_ms,
            "blocks": unit.blocks,
            "rounds": len(timed.times["unit", 0]),
        }
        self.part.rows.write(row)
        print(f"{self.shape}: unit {unit_ms:.3f} ms, {row['tflops']:.0f} TFLOP/s, {row['rounds']} rounds", flush=True)
        return unit_ms

    def _write(
        self, provider: Provider, kind: str, case: Case, errors: Fields, timed: Interleaved, unit_ms: float
    ) -> None:
        key, row = (provider.name, kind), {"case": kind, "provider": provider.name, **named(self.shape), **errors}
        if key in timed.failed:
            row["failed"] = timed.failed[key]
        if has_speed(row):
            row |= speed(timed.times[key], unit_ms)
            case.ask(hidden=False, weight=False)
            row["peak_mib"] = peak_if_any(work_of(provider, kind, case), self.part.device)
            case.ask(hidden=False, weight=False)
        report(self.part, provider, row)

    def _write_graphs(self, case: Case, unit_ms: float) -> None:
        """Replay of a captured forward and of a captured loss with its gradients."""
        plain = Ours("unlearn_kernels", backend=self.part.backend)
        ours = Ours("unlearn_kernels", backend=self.part.backend, capturable=True)
        for kind in ("forward", "full"):
            row = {"case": f"graph_{kind}", "provider": ours.name, **named(self.shape)}
            try:
                with ours.context():
                    row |= _graph_fields(ours, plain, kind, case, self.stopwatch, unit_ms)
            except Exception as error:
                row["failed"] = first_line(error)
            case.ask(hidden=False, weight=False)
            release(self.part.device)
            report(self.part, ours, row)


def _graph_fields(ours: Ours, plain: Ours, kind: str, case: Case, stopwatch: Stopwatch, unit_ms: float) -> Fields:
    """Speed of the replay; refused where its values are not the eager call's. Captured losses may take another
    schedule, since the host cannot know lengths there: the error is that of two bf16 results."""

    def forward(provider: Ours) -> list[Tensor]:
        with torch.no_grad():
            return [provider.forward(case)]

    def step(provider: Ours) -> list[Tensor]:
        return list(torch.autograd.grad(provider.loss(case), (case.hidden, case.weight)))

    case.ask(hidden=kind == "full", weight=kind == "full")
    work = forward if kind == "forward" else step
    eager = [value.clone() for value in work(plain)]
    replay = graphed(lambda: work(ours))
    found = {"eager_relative": max(relative_error(*both) for both in zip(replay(), eager, strict=True))}
    if not found["eager_relative"] <= ours.gradient_bound:
        return found | {"refused": True}
    return found | speed([stopwatch(replay) for _ in range(20)], unit_ms)


class PaddedBatch:
    """Hidden states [B, T, H] of which few positions carry a label: ours through pack_labels, the others as their users
    run them. A unit is still the product of all B x T positions."""

    def __init__(
        self, part: Part, stopwatch: Stopwatch, shape: Shape, batch: int, providers: Sequence[Provider]
    ) -> None:
        self.part, self.stopwatch, self.shape, self.batch = part, stopwatch, shape, batch
        self.providers = [p for p in providers if p.has_tokens and "frozen" in p.kinds and not p.slow_to_start]
        self.providers = [p for p in self.providers if not (isinstance(p, Ours) and (p.whole_e or p.plan))]

    def measure(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        num_tokens, width, vocab = self.shape
        length = num_tokens // self.batch
        batch = Padded.make(self.batch, length, width, vocab, LABELLED, DTYPE, self.part.device)
        truth = padded_truth(batch)
        release(self.part.device)
        unit, timed = Unit(batch.hidden.flatten(0, 1), batch.weight), Interleaved(self.stopwatch)
        timed.add("unit", unit)
        errors: dict[tuple[str, str], Fields] = {}
        for provider in self.providers:
            for kind in ("full", "frozen"):
                key = (provider.name, kind)
                errors[key] = self._errors(provider, kind, batch, truth)
                if has_speed(errors[key]):
                    timed.add(key, padded_work(provider, kind, batch))
        del truth
        tiny = self.part.tiny
        timed.rounds(end - time.monotonic(), least=1 if tiny else 3, most=2 if tiny else self.part.args.rounds)
        unit_ms = quartiles(timed.times["unit"])[1]
        shared = named(self.shape) | {"batch": self.batch, "labels": batch.num_labels}
        for provider in self.providers:
            for kind in ("full", "frozen"):
                key = (provider.name, kind)
                row = {"case": f"padded_{kind}", "provider": provider.name, **shared, **errors[key]}
                if key in timed.failed:
                    row["failed"] = timed.failed[key]
                if has_speed(row):
                    row |= speed(timed.times[key], unit_ms)
                    batch.ask(hidden=False, weight=False)
                    row["peak_mib"] = peak_if_any(padded_work(provider, kind, batch), self.part.device)
                batch.ask(hidden=False, weight=False)
                report(self.part, provider, row)

    def _errors(self, provider: Provider, kind: str, batch: Padded, truth: Tensor) -> Fields:
        try:
            padded_work(provider, kind, batch)()
            found: Fields = {"dhidden_relative": relative_error(batch.hidden.grad, truth)}
        except Exception as error:
            found = {"failed": first_line(error)}
        batch.ask(hidden=False, weight=False)
        release(self.part.device)
        if "failed" in found or found["dhidden_relative"] <= provider.gradient_bound:
            return found
        return found | {"refused": True}


def padded_work(provider: Provider, kind: str, batch: Padded) -> Callable[[], None]:
    def step() -> None:
        batch.ask(hidden=True, weight=kind == "full")
        with provider.context():
            provider.padded(batch).backward()

    return step


def report(part: Part, provider: Provider, row: Fields) -> None:
    """Write and print a row. A wrong answer is a failure, and ours is if it does not run; a peer may be unable to."""
    failed = "refused" in row or ("failed" in row and isinstance(provider, Ours))
    part.rows.write(row, failed=failed)
    shape = " ".join(f"{letter}={size}" for letter, size in row["shape"].items())
    print(f"{shape} {row['case']:13} {row['provider']:34} {outcome(row)}", flush=True)


def smallest(part: Part) -> list[Shape]:
    return sorted(shapes_of(part), key=math.prod)[:2]


def _cached(device: torch.device) -> int:
    """Bytes that the allocator holds and nobody uses."""
    return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


if __name__ == "__main__":
    sys.exit(main())
