"""Peak memory of a stretch of work: what the device allocated, the process's resident set on a CPU, or, of tensors that
hold nothing, what they would take; and how the want of it shows."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_CGROUP = Path("/sys/fs/cgroup/memory.max")


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


def host_bytes() -> float:
    """The machine's memory, or what a container leaves this process of it."""
    sizes = [float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))]
    with contextlib.suppress(OSError, ValueError):  # "max" where nothing limits it
        sizes.append(float(int(_CGROUP.read_text())))
    return min(sizes)


def is_out_of_memory(error: Exception) -> bool:
    """torch raises OutOfMemoryError on a GPU, a plain RuntimeError on a CPU."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(
        words in text for words in ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")
    )


def resident_mib(device: torch.device) -> float:
    """Held now, as peak_mib counts it; on a CPU without Linux's /proc the process's peak."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    with contextlib.suppress(OSError, StopIteration, ValueError):
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) / 1024
    return peak_mib(device)


class LiveStorages(TorchDispatchMode):
    """Bytes of the storages that operators return inside and that are alive: meta and fake tensors count as what they
    would take. Each storage once, however many tensors view it; what an operator holds within itself is not seen.

    peak_bytes: the most so far; peak_buffers: (bytes, operator, shape and dtype) of all that was alive then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int, str]] = {}
        self.ignored: set[int] = set()
        self.peak_bytes, self.peak_buffers = 0, list[tuple[int, str]]()

    def ignore(self, tensor: Tensor) -> None:
        """Not to be counted: an input of the caller's, or host memory. The peak starts anew."""
        self.ignored.add(tensor.untyped_storage()._cdata)
        self.live.pop(tensor.untyped_storage()._cdata, None)
        self.reset_peak()

    def see(self, tensor: Tensor, name: str) -> None:
        """Count a tensor, as what an operator called `name` returned."""
        storage = tensor.untyped_storage()
        if storage._cdata in self.ignored:
            return
        if storage._cdata in self.live and not self.live[storage._cdata][0].expired():
            return
        self.forget_dead()  # a new storage may have a dead one's address
        text = f"{name} {list(tensor.shape)} {tensor.dtype}"
        self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes(), text)
        total = self.live_bytes()
        if total > self.peak_bytes:
            self.peak_bytes = total
            self.peak_buffers = [entry[1:] for entry in self.live.values()]

    def forget_dead(self) -> None:
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}

    def live_bytes(self) -> int:
        """What is alive of what was seen, as of the last new storage."""
        return sum(entry[1] for entry in self.live.values())

    def reset_peak(self) -> int:
        """The peak until now; from here on it is counted anew, from what is alive."""
        peak = self.peak_bytes
        self.forget_dead()
        self.peak_bytes, self.peak_buffers = self.live_bytes(), list[tuple[int, str]]()
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.see(leaf, func.overloadpacket.__name__)
        return out
