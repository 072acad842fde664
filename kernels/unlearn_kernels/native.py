"""Loads the compiled library beside this package, `_native*.so`, if it was built, and says once if it was not."""

from __future__ import annotations

import functools
import pathlib
import warnings
from typing import Any

import torch
from torch import Tensor

_MEND = "pip install --no-build-isolation -e ."
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What this version asks of the library; an older build lacks some.
_OPERATORS = (
    "col_grad", "exp_rows", "exp_sums", "isa", "kl_rows", "logits", "pooled_empty", "release_memory", "row_grad",
    "serves_bf16", "target_dot", "token_stats",
)  # fmt: skip


def find_library() -> pathlib.Path | None:
    # __path__ and not __file__: an editable install leaves the library in site-packages and the sources elsewhere.
    import unlearn_kernels

    for folder in unlearn_kernels.__path__:
        for path in sorted(pathlib.Path(folder).glob("_native*.so")):
            return path
    return None


@torch.compiler.assume_constant_result  # a trace loads nothing and warns of nothing: it calls this, keeps the answer
def load() -> bool:
    """Whether torch.ops.unlearn_native is there. Not there: one warning with the reason and the mending command."""
    return _load()


@functools.cache
def _load() -> bool:
    path = find_library()
    if path is None:
        reason = "no _native*.so beside unlearn_kernels: the native kernels were not built"
    else:
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            reason = f"{path} could not be loaded ({error}): it was built against another torch"
        else:
            absent = [name for name in _OPERATORS if not hasattr(torch.ops.unlearn_native, name)]
            if not absent:
                return True
            reason = f"{path} has no {', '.join(absent)}: it was built from an older version"
    warnings.warn(f"unlearn_kernels runs its torch formulation on the CPU: {reason}. To mend: {_MEND}", stacklevel=4)
    return False


def operators() -> Any:
    """The library's operators, after load() said that they are there."""
    return torch.ops.unlearn_native


def release_memory() -> int:
    """Gives back to the system what the CPU kernels keep of the memory that earlier calls used: E (at most
    Options.workspace_bytes a call) and large gradients that are no longer in use. Returns how many bytes that was.

    What is kept never exceeds what was in use at a time, and the next call of these sizes does without page faults.
    """
    return int(operators().release_memory()) if _load.cache_info().currsize and load() else 0


@torch.compiler.assume_constant_result
def serves_bf16() -> bool:
    """Whether this CPU multiplies bf16 tiles into float32 (AMX or AVX-512 BF16)."""
    return _serves_bf16()


@functools.cache
def _serves_bf16() -> bool:
    return bool(operators().serves_bf16())


def target_dot(hidden_CH: Tensor, weight_VH: Tensor, targets_C: Tensor, *, out: Tensor) -> bool:
    """out_t = hidden_t . weight[targets_t] in float32 without gathering [C, H]; False if this library cannot serve
    it."""
    if hidden_CH.device.type != "cpu" or hidden_CH.dtype not in _DTYPES or hidden_CH.dtype != weight_VH.dtype:
        return False
    # Strided inputs stay with the torch formulation: making weight contiguous would copy [V, H].
    if not load() or not (hidden_CH.is_contiguous() and weight_VH.is_contiguous()):
        return False
    out.copy_(torch.ops.unlearn_native.target_dot(hidden_CH, weight_VH, targets_C))
    return True
