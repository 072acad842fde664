"""Peak memory of a stretch of work, in MiB: what the device allocated, or the process's resident set on a CPU; and how
the want of it shows."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch

_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def reset_peak(device: torch.device) -> None:
    """Start a new stretch. On a CPU this works on Linux alone; elsewhere peak_mib is the process's since its start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text("5")  # 5: set the high-water mark back to what is resident now


def peak_mib(device: torch.device) -> float:
    """Peak since reset_peak: torch's allocations on a GPU, the whole process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError, StopIteration, ValueError):
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (2**20 if sys.platform == "darwin" else 1024)


def is_out_of_memory(error: Exception) -> bool:
    """torch raises OutOfMemoryError on a GPU, a plain RuntimeError on a CPU."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(
        words in text for words in ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")
    )
