"""Runs of the command line in forked processes, to be limited, stopped and killed.

A process of its own takes four seconds to import torch; a fork has it, and whatever a run before it in the parent has
loaded and warmed up: a test makes one first. torch runs with one thread here (see conftest),
so that a fork lacks none, and transformers must not ask for its pool of loaders.
"""

import os
import resource
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from unlearn import cli

OUTSIDE = 97  # the exit status of a child that failed outside of cli.main


class Ended(NamedTuple):
    """status: as cli.main returned it, or minus the signal that killed the process."""

    status: int
    out: str
    err: str

    @property
    def line(self):
        """The one line of an error, without its beginning."""
        last = self.err.rpartition("\r")[2]
        assert last.startswith("unlearn: error: ") and last.count("\n") == 1 and last.endswith("\n"), self.err
        assert "Traceback" not in self.err, self.err
        return last.removeprefix("unlearn: error: ").rstrip("\n")


class Fork:
    """cli.main(arguments) in a child, after before() there; as a context manager it ends when the block does."""

    def __init__(self, arguments, before=None):
        self._files = [tempfile.TemporaryFile("w+", newline="") for _ in range(2)]  # noqa: SIM115
        self._ended = None
        self.started = time.perf_counter()
        self.pid = os.fork()
        if self.pid == 0:
            self._run([str(argument) for argument in arguments], before)

    def _run(self, arguments, before):
        status = OUTSIDE
        try:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
            # tqdm's own lock is a semaphore that forks share: a child killed while it holds that would stop them all
            tqdm.set_lock(threading.RLock())
            # a shell starts what runs in the background deaf to Ctrl-C, and children inherit that
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.stdout, sys.stderr = self._files
            if before is not None:
                before()
            status = cli.main(arguments)
        except BaseException as error:
            print(f"outside of cli.main: {error!r}", file=sys.stderr)
        finally:
            for file in self._files:
                file.flush()
            os._exit(status)

    def send(self, number):
        if self.running:
            os.kill(self.pid, number)

    @property
    def running(self):
        if self._ended is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._ended = os.waitstatus_to_exitcode(status)
        return self._ended is None

    def wait_for_cpu(self, seconds):
        """Until the child has computed for so long: how far it has come, however busy the machine is."""
        clock = (~self.pid << 3) | 2  # the kernel's name for the processor time of a process
        return self.wait_until(lambda: time.clock_gettime(clock) >= seconds)

    def wait(self, seconds=120):
        if not self.wait_until(lambda: False, seconds) and self.running:
            os.kill(self.pid, signal.SIGKILL)
            raise TimeoutError(f"the child did not end within {seconds} s")
        texts = []
        for file in self._files:
            file.seek(0)
            texts.append(file.read())
        return Ended(self._ended, *texts)

    def wait_until(self, condition, seconds=60):
        """Returns whether condition() came true before the child's end."""
        deadline = time.monotonic() + seconds
        while not condition():
            if not self.running or time.monotonic() > deadline:
                return False
            time.sleep(1e-4)  # or the child would share its core
        return True

    def __enter__(self):
        return self

    def __exit__(self, *reason):
        if self.running:
            self.send(signal.SIGKILL)
        self.wait()
        for file in self._files:
            file.close()


def run_forked(arguments, before=None):
    with Fork(arguments, before) as fork:
        return fork.wait()


def cpu_seconds(arguments):
    """Processor time of a good run."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = run_forked(arguments)
    assert ended.status == 0, ended.err
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def largest_file(num_bytes):
    """A limit to run a child under: a write beyond fails with EFBIG, as on a disk that is full but for the number."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))

    return limit


def more_memory(num_bytes):
    """A limit to run a child under: what it may map beyond what it has."""

    def limit():
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        total = pages * os.sysconf("SC_PAGE_SIZE") + num_bytes
        resource.setrlimit(resource.RLIMIT_AS, (total, total))

    return limit


def contents(folder):
    """Every file below a folder, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
