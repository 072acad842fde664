"""Checks in several processes on one device, where compiling takes longer than running. Nothing is timed this way.

The parent hands out tasks, a few checks of a group each, as JSON lines on a worker's stdin, and reads rows from its
stdout. A worker that dies costs the check it was at; another takes its place and goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import IO, Any, Protocol

from bench.rows import ROOT

# Seconds beyond the limit before a worker that does not answer is killed; bench/gpu.sh waits longer.
GRACE = 8.0
# Deaths after which nobody takes a worker's place: a worker that cannot even start would fail every check.
_MOST_DEATHS = 3


@dataclass(frozen=True)
class Task:
    """Checks first:last of a group."""

    group: str
    first: int
    last: int


class Report(Protocol):
    """Called by one thread at a time."""

    def row(self, row: dict[str, Any]) -> None: ...

    def died(self, group: str, check: int, status: int) -> None: ...

    def left(self, group: str) -> None: ...


class Pool:
    def __init__(self, command: list[str], tasks: Iterable[Task], seconds_left: Callable[[], float], report: Report):
        self.command, self.tasks, self.seconds_left, self.report = command, deque(tasks), seconds_left, report
        self.lock = threading.RLock()
        self.processes: set[subprocess.Popen[str]] = set()

    def run(self, count: int) -> None:
        """Until all tasks are done or the time is over; what is left then is reported by its group."""
        threads = [threading.Thread(target=self._attend, daemon=True) for _ in range(min(count, len(self.tasks)))]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join(max(0.0, self.seconds_left()) + GRACE)
        finally:
            for process in list(self.processes):
                process.kill()
            for thread in threads:
                thread.join(GRACE)
        self._leave_rest()

    def _attend(self) -> None:
        """One worker, and those that take its place."""
        process: subprocess.Popen[str] | None = None
        deaths = 0
        while deaths < _MOST_DEATHS and (task := self._next()) is not None:
            process = process or self._start()
            done, end = self._hand_over(process, task)
            if end == "done":
                continue
            if end == "left":
                with self.lock:
                    self.report.left(task.group)
                continue
            status, process = self._stop(process), None
            following = task.first + done
            if end != "lost":  # it told of no end: the check it was at has killed it
                deaths += 1
                with self.lock:
                    self.report.died(task.group, following, status)
                following += 1
            if following < task.last:
                with self.lock:
                    self.tasks.appendleft(Task(task.group, following, task.last))
        if process is not None:
            self._stop(process)

    def _next(self) -> Task | None:
        with self.lock:
            if self.seconds_left() <= 0:
                self._leave_rest()
            return self.tasks.popleft() if self.tasks else None

    def _leave_rest(self) -> None:
        with self.lock:
            while self.tasks:
                self.report.left(self.tasks.popleft().group)

    def _hand_over(self, process: subprocess.Popen[str], task: Task) -> tuple[int, str]:
        """Rows that came, and how it ended: done, left (the time was over), lost (the device did not answer any more)
        or nothing."""
        assert process.stdin is not None and process.stdout is not None
        done = 0
        with contextlib.suppress(OSError, ValueError):  # it died while it was written to or wrote
            process.stdin.write(json.dumps(asdict(task) | {"seconds": self.seconds_left()}) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                row = json.loads(line)
                if "end" in row:
                    return done, str(row["end"])
                done += 1
                with self.lock:
                    self.report.row(row)
        return done, ""

    def _start(self) -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            self.command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        with self.lock:
            self.processes.add(process)
        return process

    def _stop(self, process: subprocess.Popen[str]) -> int:
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            status = process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        process.stdout.close()
        with self.lock:
            self.processes.discard(process)
        return status


def serve(rows_of: Callable[[Task], Iterator[dict[str, Any]]], alive: Callable[[], bool]) -> int:
    """A worker's life. alive: asked after a failed row; False where the device answers no more in this process."""
    out: IO[str] = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no row
    for line in sys.stdin:
        asked = json.loads(line)
        end = time.monotonic() + asked.pop("seconds")
        task = Task(**asked)
        for sent, row in enumerate(rows_of(task), start=1):
            out.write(json.dumps(row) + "\n")
            if not row["passed"] and not alive():
                out.write('{"end": "lost"}\n')
                return 1
            if time.monotonic() > end and task.first + sent < task.last:
                out.write('{"end": "left"}\n')
                break
        else:
            out.write('{"end": "done"}\n')
    return 0
