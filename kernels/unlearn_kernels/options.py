"""The two small records every function shares: what a caller may ask for, and what a schedule needs to know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

DEFAULT_WORKSPACE_BYTES = {"cuda": 1 << 30, "cpu": 256 << 20}


@dataclass(frozen=True)
class Options:
    """Nobody needs these; tests and experts do.

    workspace_bytes: the most memory for stored exponentials and scratch; None is 1 GiB on CUDA and 256 MiB elsewhere.
    skip_below: a sequence whose |dloss/dlogprob| x length is below this share of the call's largest is left out of
        both gradient products and reported inactive. 0 leaves nothing out.
    backend: "torch", "native" or "triton" to force one; None lets the device and dtype decide.
    capturable: take the path that a CUDA graph captures, which knows no lengths on the host, whether one is being
        captured or not. Call once with it before capturing: what is launched in a capture must have been launched
        before. npo_loss and simnpo_loss recompute beyond the workspace on it (4 units); sequence_loss has none.
    """

    workspace_bytes: int | None = None
    skip_below: float = 0.0
    backend: str | None = None
    capturable: bool = False

    def workspace(self, device: torch.device) -> int:
        if self.workspace_bytes is not None:
            return self.workspace_bytes
        return DEFAULT_WORKSPACE_BYTES.get(device.type, DEFAULT_WORKSPACE_BYTES["cpu"])


class Needs(NamedTuple):
    """Which inputs want a gradient; the order is that of the differentiable arguments of the autograd functions."""

    hidden: bool
    weight: bool
    bias: bool
    lora_a: bool
    lora_b: bool


ONLY_HIDDEN = Needs(True, False, False, False, False)


class Spec(NamedTuple):
    """Everything about a call that is not a tensor. softcap 0.0 means none."""

    logit_scale: float
    softcap: float
    lora_scale: float
    workspace_bytes: int
    skip_below: float
    backend: str
    needs: Needs


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Logits, exponential sums and gradient accumulators: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def exponential_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """E's dtype. bf16 and not fp16 for 16-bit inputs: e = exp(z - m) spans 2**-126 to 2**90, beyond fp16's exponent.

    A float32 weight makes E float32 even if hidden is 16-bit: the product E W has one operand dtype.
    """
    if hidden.dtype == torch.float64:
        return torch.float64
    return torch.float32 if weight.dtype == torch.float32 else torch.bfloat16
