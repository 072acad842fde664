"""Time and memory of calls that are measured beside each other, on a GPU or a CPU.

Every round runs every call once, so that a change of clocks or a busy neighbour meets all alike; the median of many
rounds is the result. On a GPU a call is timed by events, after a write of more than the last-level cache so that no
call finds another's operands there. The first calls of each are warm-up: compilation, autotuning, first allocations.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.rows import first_line

Work = Callable[[], Any]
FLUSH_BYTES = 256 << 20  # five times the H100's and H200's L2


class Budget:
    """Seconds left of a part's share."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    @property
    def spent(self) -> bool:
        return self.left <= 0


class Stopwatch:
    """Milliseconds of one call on `device`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush: Tensor | None = None
        if device.type == "cuda":
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def __call__(self, work: Work, prepare: Work | None = None) -> float:
        """prepare runs before the clock starts."""
        if prepare is not None:
            prepare()
        if self._flush is None:
            start = time.perf_counter()
            work()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


class Interleaved:
    """Calls by key; those that raise are dropped, and `failed` says why."""

    def __init__(self, stopwatch: Stopwatch, *, warmups: int = 2) -> None:
        self.stopwatch, self.warmups = stopwatch, warmups
        self.work: dict[Hashable, Work] = {}
        self.prepare: dict[Hashable, Work | None] = {}
        self.times: dict[Hashable, list[float]] = {}
        self.failed: dict[Hashable, str] = {}

    def add(self, key: Hashable, work: Work, prepare: Work | None = None) -> None:
        """Warms the call up. prepare runs before each, outside the clock."""
        self.work[key], self.prepare[key], self.times[key] = work, prepare, []
        for _ in range(self.warmups):
            if key in self.work:
                self._run(key)

    def rounds(self, seconds: float, *, least: int, most: int) -> int:
        """Rounds until the seconds are over, at least `least`; returns how many."""
        end, done = time.monotonic() + seconds, 0
        while done < most and (done < least or time.monotonic() < end):
            for key in list(self.work):
                elapsed = self._run(key)
                if elapsed is not None:
                    self.times[key].append(elapsed)
            done += 1
        return done

    def _run(self, key: Hashable) -> float | None:
        try:
            return self.stopwatch(self.work[key], self.prepare[key])
        except Exception as error:  # a peer may raise anything; its row says what
            self.failed[key] = first_line(error)
            del self.work[key]
        # Outside the except block, whose exception would keep the failed call's tensors alive.
        release(self.stopwatch.device)
        return None


def release(device: torch.device) -> None:
    """Gives cached blocks back after a failure or between shapes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def quartiles(times: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    ordered = sorted(times)
    return ordered[len(ordered) // 4], statistics.median(ordered), ordered[3 * len(ordered) // 4]


def peak_mib(work: Work, device: torch.device) -> float:
    """MiB that one call has allocated at its highest above what lay there before, results included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:  # it sees inside operators
        work()
    live = highest = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            highest = max(highest, live)
    return highest / 2**20


def peak_if_any(work: Work, device: torch.device) -> float | None:
    """peak_mib, or None where the call fails that did not fail before."""
    try:
        return peak_mib(work, device)
    except Exception as error:
        print(f"no peak: {first_line(error)}", flush=True)
    release(device)
    return None


def graphed(work: Work) -> Work:
    """The replay of a CUDA graph of this call. `work` is run three times on a side stream first, and must launch then
    what it launches in the capture, where nothing new can be loaded: Options(capturable=True)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = work()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


class Unit:
    """One torch.mm of N x H x V into memory that exists: what costs are counted in.

    Where N x V is more than an eighth of the device's memory, the rows go in `blocks` that fit, one after another.
    """

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        self.hidden, self.weight = hidden.detach(), weight.detach()
        num_rows, num_bytes = len(hidden), len(hidden) * len(weight) * hidden.element_size()
        limit = num_bytes
        if hidden.is_cuda:
            limit = torch.cuda.get_device_properties(hidden.device).total_memory // 8
        self.blocks = -(-num_bytes // limit)
        self.rows = -(-num_rows // self.blocks)
        self.out = hidden.new_empty(self.rows, len(weight), requires_grad=False)

    def __call__(self) -> None:
        for rows in self.hidden.split(self.rows):
            torch.mm(rows, self.weight.T, out=self.out[: len(rows)])


class Products:
    """The bare library products of a forward and its gradients: h W^T, E W and E^T h (frozen: without the last), into
    memory that exists."""

    def __init__(self, unit: Unit, *, frozen: bool) -> None:
        assert unit.blocks == 1
        self.unit, hidden, weight = unit, unit.hidden, unit.weight
        self.dhidden = torch.empty_like(hidden)
        self.dweight = None if frozen else torch.empty_like(weight)

    def __call__(self) -> None:
        self.unit()
        torch.mm(self.unit.out, self.unit.weight, out=self.dhidden)
        if self.dweight is not None:
            torch.mm(self.unit.out.T, self.unit.hidden, out=self.dweight)


def copy_gb_per_second(stopwatch: Stopwatch, num_bytes: int) -> float:
    """Bytes read and written per second by a copy on the device, in 1e9."""
    source = torch.empty(num_bytes, dtype=torch.int8, device=stopwatch.device)
    target = torch.empty_like(source)
    times = [stopwatch(lambda: target.copy_(source)) for _ in range(10)][2:]
    return 2 * num_bytes / statistics.median(times) / 1e6
