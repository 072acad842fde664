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
            return True
        except OSError as error:
            reason = f"{path} could not be loaded ({error}): it was built against another torch"
    warnings.warn(f"unlearn_kernels runs its torch formulation on the CPU: {reason}. To mend: {_MEND}", stacklevel=4)
    return False


def operators() -> Any:
    """The library's operators, after load() said that they are there."""
    return torch.ops.unlearn_native


@functools.cache
def serves_bf16() -> bool:
    """Whether this CPU multiplies bf16 tiles into float32 (AMX or AVX-512 BF16)."""
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
