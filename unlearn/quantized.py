"""A model's matrices in 4 bits, through bitsandbytes: QLoRA, Dettmers et al. 2023, arXiv:2305.14314.

Every linear layer but the head holds its matrix as nf4, half a byte a weight, with one scale for 64 weights, itself in
8 bits with one float32 for 256 of them. A product widens the whole matrix to the activations' dtype and drops it again;
the backward widens it once more, for the gradient of the layer's input, and the matrix gets none. Embeddings, norms and
the head stay as they are: the head's kernel reads a plain weight.

bitsandbytes is an optional package and is imported where it is used; unlearn.footprint counts the bytes.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Adds nothing where a model is loaded on a CPU; see import_quietly and settle.
_CPU_KERNELS, _HUB = "bitsandbytes.backends.cpu.ops", "kernels"


def bitsandbytes(argument: str) -> Any:
    """The package. Raises ValueError naming `argument` where it, or accelerate, which loads with it, is missing."""
    try:
        import_quietly()
        import accelerate  # noqa: F401
        import bitsandbytes
    except ImportError as error:
        raise ValueError(
            f"{argument}: the packages bitsandbytes and accelerate are needed ({error}); pip install 'unlearn[qlora]'"
        ) from None
    return bitsandbytes


def import_quietly() -> None:
    """Import bitsandbytes where it is installed. peft does so too, whatever it is asked for: call this before.

    On a CPU with AVX512-BF16 its import asks the package `kernels` for code from the model hub, and warns on standard
    error where it gets none. That code is never run here (settle), so it is not asked for.
    """
    if "bitsandbytes" in sys.modules or importlib.util.find_spec("bitsandbytes") is None:
        return
    there, log = sys.modules.get(_HUB), logging.getLogger(_CPU_KERNELS)
    sys.modules[_HUB] = None  # type: ignore[assignment]  # what Python has for a module that must not be found
    log.disabled = True
    try:
        import bitsandbytes  # noqa: F401
    finally:
        log.disabled = False
        del sys.modules[_HUB]
        if there is not None:
            sys.modules[_HUB] = there


def loading_options(device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    """What makes transformers quantize each matrix as it reads it: the whole model never stands anywhere in `dtype`."""
    from transformers import BitsAndBytesConfig

    bitsandbytes("in_4bit")
    wanted = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": wanted, "device_map": {"": device}}


def settle(model: nn.Module, dtype: torch.dtype) -> None:
    """Make a freshly loaded model's 4-bit layers compute in `dtype`, and one way only.

    In evaluation on a CPU with AVX512-BF16, bitsandbytes would repack a matrix in place at the first forward without
    gradients, for a kernel that computes in bf16 whatever is asked and has no backward: reference and policy would be
    different functions, and a step after it would find no gradient below the layer. A layer whose matrix bitsandbytes
    widens wrongly does it by the definition instead (0.50.2 on such a CPU takes other blocks' scales where a width is a
    multiple of 16 and not of 64; transformers' quantized models compute with those).
    Raises ValueError for a model with no such layer.
    """
    found = layers(model)
    if not found:
        raise ValueError(f"model: {type(model).__name__} has no linear layer that bitsandbytes holds in 4 bits")
    right: dict[tuple[int, ...], bool] = {}
    for layer in found.values():
        layer.support_avx512bf16_for_cpu = False
        layer.compute_dtype, layer.compute_type_is_set = dtype, True
        shape = tuple(_state(layer.weight).shape)
        if shape not in right:
            right[shape] = _is_widened_rightly(layer.weight)
        if not right[shape]:
            layer.__class__ = _by_definition()


@torch.no_grad()
def _is_widened_rightly(weight: Tensor) -> bool:
    """Whether bitsandbytes makes of a matrix's first million weights what they stand for, within rounding."""
    state = _state(weight)
    if weight.device.type == "cpu" and state.shape[1] % 2:
        return False  # right, and compiled by torch.compile for each shape anew, which takes seconds
    rows = max(1, min(state.shape[0], (1 << 20) // state.shape[1]))
    found = bitsandbytes("model").functional.dequantize_4bit(weight.data, state)[:rows].float()
    expected = widened(weight, rows=rows)
    allowed = 2 * torch.finfo(state.dtype).eps * expected.abs().max()
    return not bool((found - expected).abs().max() > allowed)  # NaN: broken weights are told of elsewhere


def widened(weight: Tensor, *, rows: int | None = None) -> Tensor:
    """The matrix that a packed one stands for, or its first rows, in float32, straight from the definition: entry i is
    code[nibble i] * scale[i // 64], and where the scales are packed too, scale[j] = code'[byte j] * scale'[j // 256] +
    offset."""
    state = _state(weight)
    out_features, in_features = state.shape
    count = in_features * (out_features if rows is None else rows)
    blocks = -(-count // state.blocksize)
    scales = state.absmax[:blocks]
    if state.nested:
        outer = state.state2.absmax.repeat_interleave(state.state2.blocksize)[:blocks]
        scales = state.state2.code[scales.long()] * outer + state.offset
    packed = weight.data.view(torch.uint8).view(-1)[: -(-count // 2)]
    nibbles = torch.stack([packed >> 4, packed & 15], 1).view(-1)[:count]
    entries = state.code[nibbles.int()] * scales.repeat_interleave(state.blocksize)[:count]
    return entries.view(-1, in_features)


class _Product(torch.autograd.Function):
    """x W^T with the matrix widened for the product and once more for the gradient, and dropped in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return nn.functional.linear(x, widened(weight).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ widened(ctx.weight).to(dy.dtype), None


@functools.cache
def _by_definition() -> type:
    """bitsandbytes' layer, for peft and everybody who looks, with a product that does not go through its kernels."""

    class Linear4bit(bitsandbytes("model").nn.Linear4bit):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            product = _Product.apply(x.to(self.compute_dtype), self.weight)
            return (product if self.bias is None else product + self.bias.to(product.dtype)).to(x.dtype)

    return Linear4bit


def layers(model: nn.Module) -> dict[str, Any]:
    """The layers with a 4-bit matrix, by name; empty for a model without."""
    # not getattr: peft's wrapper shows the weight of the layer that it holds as its own
    return {name: module for name, module in model.named_modules() if _state(module._parameters.get("weight"))}


def described(model: nn.Module) -> str | None:
    """What the matrices are stored in, with the package that widens them; None for a model that is not quantized."""
    kinds = {(state.quant_type, bool(state.nested)) for state in (_state(p) for p in model.parameters()) if state}
    if not kinds:
        return None
    words = ", ".join(sorted(name + ", double quantization" * nested for name, nested in kinds))
    return f"{words} (bitsandbytes {bitsandbytes('model').__version__})"


def line(model: nn.Module, dtype: str) -> str:
    """What of a model is quantized, in a sentence."""
    found = layers(model)
    weights = sum(num_weights(layer.weight) for layer in found.values())
    return f"{len(found)} matrices of {weights:,} weights in {described(model)}; products in {dtype}"


def num_weights(parameter: Tensor) -> int:
    """Of a parameter: what a packed one stands for, not the bytes that it takes."""
    state = _state(parameter)
    return parameter.numel() if state is None else state.shape.numel()


def _state(parameter: Any) -> Any:
    return getattr(parameter, "quant_state", None)
