"""What a backend implements, and which one serves a device and dtype.

A backend is a name and a module of step functions. The schedules (`autograd.py`) allocate every buffer, cut the batch
into chunks and call steps that write into those buffers; steps allocate nothing that grows with N x V. Each step is a
registered operator, `torch.ops.unlearn_kernels.<backend>_<step>`, whose fake implementation does nothing: FakeTensor
and dispatch-mode accounting see the schedule's buffers, and torch.compile sees opaque calls without graph breaks.

Which one serves what:
  triton  CUDA and ROCm devices of compute capability 8.0 on, for bf16, fp16 and float32: one fused kernel instead of a
          product and five passes. Forced by name it also runs on CPU tensors under Triton's interpreter.
  native  CPU tensors of bf16, fp16 and float32 where the C++ library was built: bf16 heads fused on tile products.
  torch   any device, any dtype: the truth to fall back on, and the only one for float64.

To add one: write a module with the functions of STEPS (or take some of them from `chunked`), call `register`, and say
in `choose` where it serves and why.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import checks, chunked, native, native_backend, tiles

# Arguments shared by the steps that see logits. Shapes: C rows of the chunk, H hidden, V vocabulary, r LoRA rank.
# lora_hidden is s h A^T in the accumulation dtype, so the logits gain lora_hidden B^T. softcap 0.0 means none.
_HEAD = "Tensor? bias, Tensor? lora_hidden, Tensor? lora_b, float logit_scale, float softcap"
_ADDED = "Tensor? targets, Tensor? target_coeff, Tensor e_coeff, bool accumulate, Tensor(a!) out"
_KL_HEAD = _HEAD.replace("float", "Tensor ref_hidden, Tensor ref_weight, float", 1)
_INPUTS = f"Tensor hidden, Tensor weight, Tensor targets, {_HEAD}"

# Each step writes into the arguments marked (x!), in the accumulation dtype (float32; float64 for float64 inputs) where
# no other is named, and may use scratch as it likes. The docstrings are in chunked.py, whose functions define the
# steps.
STEPS = {
    # out [C] = z_y; NaN for a target outside [0, V).
    "target_logits": f"({_INPUTS}, Tensor(a!) out, Tensor(b!) scratch) -> ()",
    # sums [C] = S; e [C, V] (bf16, float32 or float64; None when no gradient is wanted) = E.
    "exp_sums": f"({_INPUTS}, Tensor offset, Tensor(a!) sums, Tensor(b!)? e, Tensor(c!) scratch) -> ()",
    # Rows whose S left the range get a new offset and are done again; must leave the others' bits alone.
    "redo_rows": f"({_INPUTS}, Tensor(a!) offset, Tensor(b!) sums, Tensor(c!)? e, Tensor(d!) scratch) -> ()",
    # value [C] float64 = log p_y; what the gradient products need per row for an upstream gradient of 1.
    "finish_rows": (
        "(Tensor target_logit, Tensor offset, Tensor sums, float logit_scale, float softcap, "
        "Tensor(a!) value, Tensor(b!) target_coeff, Tensor(c!) e_coeff) -> ()"
    ),
    # out [B] float64 = sums of value [N] over the segments between boundaries [B + 1].
    "segment_sums": "(Tensor value, Tensor boundaries, Tensor(a!) out) -> ()",
    # out [C, D] (any dtype) (+)= target_coeff matrix[y] - e_coeff (E matrix).
    "row_grad": f"(Tensor e, Tensor matrix, {_ADDED}, Tensor(b!) scratch) -> ()",
    # out [V, D] (any dtype) (+)= scatter(target_coeff rows at y) - E^T (e_coeff rows).
    "col_grad": f"(Tensor e, Tensor rows, {_ADDED}, Tensor(b!) scratch) -> ()",
    # out [M, D] (any dtype) (+)= alpha x y: the thin LoRA products.
    "matmul": "(Tensor x, Tensor y, float alpha, bool accumulate, Tensor(a!) out) -> ()",
    # stats [4, C] float64 = logprob, is_argmax, mean and variance of log p under p.
    "token_stats": f"({_INPUTS}, Tensor(a!) stats, Tensor(b!) scratch) -> ()",
    # kl [C] = KL(ref || policy); g [C, V] (E's dtype) = p - q times the softcap's slope.
    "kl_rows": f"(Tensor hidden, Tensor weight, {_KL_HEAD}, Tensor(a!) kl, Tensor(b!)? g, Tensor(c!) scratch) -> ()",
}

_library = torch.library.Library("unlearn_kernels", "DEF")


@dataclass(frozen=True)
class Backend:
    """steps: one operator per name in STEPS. scratch(rows, width, vocab, is_cuda, max_elements): how long a scratch to
    allocate. prefers_columns(hidden, weight): whether E again, by slices of the vocabulary, beats chunks of rows.
    empty(shape, dtype, like): memory on like's device."""

    name: str
    steps: Any
    scratch_elements: Callable[..., int]
    kl_scratch_elements: Callable[..., int]
    prefers_columns: Callable[[Tensor, Tensor], bool] = lambda hidden, weight: False
    empty: Callable[[tuple[int, ...], torch.dtype, Tensor], Tensor] = tiles.empty


BACKENDS: dict[str, Backend] = {}


def register(name: str, module: Any) -> None:
    """Makes module's step functions operators under `name`."""
    operators = {}
    for step, schema in STEPS.items():
        operator_name = f"{name}_{step}"
        _library.define(operator_name + schema, tags=(torch.Tag.needs_fixed_stride_order,))
        _library.impl(operator_name, _exact(getattr(module, step)), "CompositeExplicitAutograd")
        torch.library.register_fake(f"unlearn_kernels::{operator_name}", _no_output, lib=_library)
        operators[step] = getattr(getattr(torch.ops.unlearn_kernels, operator_name), "default")  # noqa: B009
    backend = Backend(name, SimpleNamespace(**operators), module.scratch_elements, module.kl_scratch_elements)
    own = {what: getattr(module, what) for what in ("prefers_columns", "empty") if hasattr(module, what)}
    BACKENDS[name] = replace(backend, **own)


def _no_output(*args: Any) -> None:
    return None


def _exact(step: Callable[..., None]) -> Callable[..., None]:
    def exact_step(*args: Any) -> None:
        with tiles.exact_products(next(arg.device for arg in args if isinstance(arg, Tensor))):
            step(*args)

    return exact_step


register("torch", chunked)
register("native", native_backend)


def _checked_targets(targets: Tensor, vocab: int) -> Tensor:
    if targets.device.type == "cpu":
        checks.check_target_values(targets, vocab)
    return targets.clone()


def _checked_boundaries(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    if not (cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()):
        checks.check_boundaries(cu_seqlens.tolist(), num_tokens)
    return cu_seqlens.clone()


def _like_first(checked: Tensor, limit: int) -> Tensor:
    return torch.empty_like(checked)


# A traced program checks values where it runs: the checks are operators whose result is used, or they would be dropped.
_library.define("checked_targets(Tensor targets, int vocab) -> Tensor")
_library.define("checked_boundaries(Tensor cu_seqlens, int num_tokens) -> Tensor")
_library.impl("checked_targets", _checked_targets, "CompositeExplicitAutograd")
_library.impl("checked_boundaries", _checked_boundaries, "CompositeExplicitAutograd")
torch.library.register_fake("unlearn_kernels::checked_targets", _like_first, lib=_library)
torch.library.register_fake("unlearn_kernels::checked_boundaries", _like_first, lib=_library)
checked_targets = torch.ops.unlearn_kernels.checked_targets
checked_boundaries = torch.ops.unlearn_kernels.checked_boundaries


@torch.compiler.assume_constant_result  # a trace neither imports nor registers: it calls this and keeps the answer
def load_triton() -> str:
    """Registers the Triton backend; the reason where that cannot be done, else ""."""
    return _load_triton()


@functools.cache
def _load_triton() -> str:
    try:
        module = importlib.import_module(".triton_backend", __package__)
    except ImportError as error:
        return str(error)
    register("triton", module)
    return ""


if torch.cuda.is_available():
    load_triton()


def choose(hidden: Tensor, weight: Tensor, forced: str | None) -> Backend:
    """The backend for these inputs. ValueError for a forced one that does not exist or cannot serve them."""
    if forced == "triton":
        if missing := load_triton():
            raise ValueError(f"options.backend is 'triton', which does not load ({missing}); accepted: 'torch' or None")
        if unserved := _triton_refusal(hidden):
            raise ValueError(f"options.backend is 'triton', which serves no {unserved}; accepted: 'torch' or None")
        return BACKENDS["triton"]
    if forced == "native":
        if not native.load():
            raise ValueError("options.backend is 'native', which was not built; accepted: 'torch', 'triton' or None")
        if hidden.device.type != "cpu" or hidden.dtype == torch.float64:
            unserved = "float64" if hidden.dtype == torch.float64 else f"{hidden.device.type} tensors"
            raise ValueError(f"options.backend is 'native', which serves no {unserved}; accepted: 'torch' or None")
        return BACKENDS["native"]
    if forced is not None:
        if forced not in BACKENDS:
            raise ValueError(f"options.backend is {forced!r}; accepted: 'torch', 'native', 'triton' or None")
        return BACKENDS[forced]
    if hidden.is_cuda and _triton_refusal(hidden) is None:
        if not load_triton():
            return BACKENDS["triton"]
        _warn_without_triton()
    if hidden.device.type == "cpu" and hidden.dtype != torch.float64 and native.load():
        return BACKENDS["native"]
    return BACKENDS["torch"]


def _triton_refusal(hidden: Tensor) -> str | None:
    """What about these inputs the Triton backend does not serve."""
    if hidden.dtype == torch.float64:
        return "float64"
    if hidden.is_cuda:
        if torch.version.hip is None and torch.cuda.is_available():
            capability = torch.cuda.get_device_capability(hidden.device)
            return None if capability >= (8, 0) else f"device of compute capability {capability}, below (8, 0)"
        return None
    if hidden.device.type == "cpu" and "triton" in BACKENDS and _interpreted():
        return None
    return f"{hidden.device.type} tensors (CPU ones under TRITON_INTERPRET=1, set before the first import of triton)"


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    return bool(importlib.import_module(".triton_tuning", __package__).interpreted())


@functools.cache
def _warn_without_triton() -> None:
    warnings.warn(
        f"unlearn_kernels runs its torch formulation on this GPU: {load_triton()}. To mend: pip install triton",
        stacklevel=2,
    )
