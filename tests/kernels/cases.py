"""Inputs that are hard on purpose, and the bound every kernel is held to.

Half the targets are aligned with their hidden state (peaked rows), the others are random; upstream gradients are
random, signed and some exactly zero; N, H and V are not multiples of anything unless a test says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

SMALL = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 2e-3}
# Set by the `backend` fixture: which backend serves the test at hand, and where its tensors lie.
_backend = "torch"
_device = torch.device("cpu")
# For tests about the torch backend's own tiles; test_triton.py has their like.
TORCH_ONLY = pytest.mark.parametrize("backend", ["torch"], indirect=True)
TRITON_ONLY = pytest.mark.parametrize("backend", ["triton"], indirect=True)
DIFFERENTIABLE = ("hidden", "weight", "bias", "lora_a", "lora_b")


def device() -> torch.device:
    return _device


def widest() -> torch.dtype:
    """The most precise dtype the backend at hand serves; SMALL[widest()] is its bound."""
    return torch.float64 if _backend == "torch" else torch.float32


def interpreted() -> bool:
    return _backend == "triton" and _device.type == "cpu"


def too_slow_interpreted(condition: bool, covered: str) -> None:
    """Skips what would take Triton's interpreter too long; covered: what is run in its place."""
    if condition and interpreted():
        pytest.skip(f"too slow under Triton's interpreter; {covered}")


@dataclass
class Case:
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    upstream: Tensor  # [N] float64
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    lora_scale: float = 0.0
    scalars: dict[str, Any] = field(default_factory=dict)

    @property
    def head(self) -> dict[str, Any]:
        head: dict[str, Any] = dict(self.scalars)
        if self.bias is not None:
            head["bias"] = self.bias
        if self.lora_a is not None:
            head["lora"] = (self.lora_a, self.lora_b, self.lora_scale)
        return head

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.targets

    @property
    def packed(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return *self.inputs, self.cu_seqlens

    def leaves(self) -> dict[str, Tensor]:
        """The tensors that ask for a gradient, by name."""
        named = {name: getattr(self, name) for name in DIFFERENTIABLE}
        return {name: tensor for name, tensor in named.items() if tensor is not None and tensor.requires_grad}

    def like(self, dtype: torch.dtype | None = None, frozen: tuple[str, ...] = ()) -> Case:
        """The same values as new leaves, in dtype if given; the frozen ones ask for no gradient."""
        changed = {}
        for name in DIFFERENTIABLE:
            tensor = getattr(self, name)
            if tensor is not None:
                tensor = tensor.detach().to(dtype or tensor.dtype).clone()
                changed[name] = tensor.requires_grad_(name not in frozen and getattr(self, name).requires_grad)
        return replace(self, **changed)


def lengths_of(num_rows: int, generator: torch.Generator) -> list[int]:
    """Uneven lengths, the first of them 1."""
    lengths = [1] if num_rows > 1 else []
    while sum(lengths) < num_rows:
        longest = num_rows - sum(lengths)
        lengths.append(min(longest, int(torch.randint(1, max(2, num_rows // 3) + 1, (), generator=generator))))
    return lengths


def make_case(
    num_rows: int = 37,
    width: int = 24,
    vocab: int = 257,
    dtype: torch.dtype = torch.float32,
    *,
    weight_dtype: torch.dtype | None = None,
    parts: tuple[str, ...] = (),
    logit_std: float = 4.0,
    lead: float = 12.0,
    seed: int = 0,
) -> Case:
    """logit_std: spread of the logits in nats. lead: how many nats the aligned half of the targets gains."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def leaf(value: Tensor, to: torch.dtype) -> Tensor:
        return value.to(device(), to).requires_grad_()

    weight = normal(vocab, width) / width**0.5
    hidden = normal(num_rows, width) * logit_std
    targets = torch.randint(0, vocab, (num_rows,), generator=generator)
    aligned = weight[targets]
    aligned = lead * aligned / aligned.square().sum(1, keepdim=True)
    hidden[::2] += aligned[::2]
    upstream = normal(num_rows)
    upstream[torch.rand(num_rows, generator=generator) < 0.3] = 0.0
    lengths = torch.tensor([0, *lengths_of(num_rows, generator)])
    head_dtype = weight_dtype or dtype
    case = Case(
        leaf(hidden, dtype),
        leaf(weight, head_dtype),
        targets.to(device()),
        lengths.cumsum(0).to(device()),
        upstream.to(device()),
    )
    if "bias" in parts:
        case.bias = leaf(normal(vocab), head_dtype)
    if "lora" in parts:
        case.lora_a = leaf(normal(3, width) / width**0.5, head_dtype)
        case.lora_b = leaf(0.5 * normal(vocab, 3), head_dtype)
        case.lora_scale = 0.5
    if "scale" in parts:
        case.scalars["logit_scale"] = 0.7
    if "softcap" in parts:
        case.scalars["softcap"] = 15.0
    return case


def relative_error(value: Tensor, truth: Tensor) -> float:
    scale = float(truth.detach().double().norm())
    return float((value.detach().double() - truth.detach().double()).norm()) / (scale if scale > 0 else 1.0)


def assert_as_good_as_torch(name: str, value: Tensor, torch_value: Tensor, truth: Tensor, small: float) -> None:
    """error(kernel) <= 2 error(torch, same dtype) + small, against float64. A NaN or an infinity in value fails."""
    error, yardstick = relative_error(value, truth), relative_error(torch_value, truth)
    # torch may itself overflow (fp16): then only `small` is granted.
    bound = 2 * yardstick + small if yardstick == yardstick and yardstick != float("inf") else small
    assert error <= bound, f"{name}: error {error:.2e}, torch's {yardstick:.2e}, bound {bound:.2e}"


def check_gradients(case: Case, kernel, reference, *, frozen: tuple[str, ...] = (), small: float | None = None) -> None:
    """kernel and reference map a Case to a scalar; values and gradients are held to assert_as_good_as_torch."""
    mine, theirs, truth = case.like(frozen=frozen), case.like(frozen=frozen), case.like(torch.float64, frozen)
    results = []
    for one, function in ((mine, kernel), (theirs, reference), (truth, reference)):
        value = function(one)
        leaves = one.leaves()
        results.append((value, dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))))
    (value, grads), (torch_value, torch_grads), (true_value, true_grads) = results
    small = SMALL[case.hidden.dtype] if small is None else small
    assert_as_good_as_torch("value", value, torch_value, true_value, small)
    assert set(grads) == set(case.like(frozen=frozen).leaves())
    for name, grad in grads.items():
        assert grad.dtype == getattr(case, name).dtype
        assert_as_good_as_torch(f"d{name}", grad, torch_grads[name], true_grads[name], small)


def e_bytes(case: Case) -> int:
    """Bytes of E for the whole batch."""
    itemsize = 2 if case.weight.dtype.itemsize == 2 else case.weight.dtype.itemsize
    return case.hidden.shape[0] * case.weight.shape[0] * itemsize


# Workspaces by what they make the schedules do: all of E kept; about three chunks; a row or two at a time.
WORKSPACES = {"keep": lambda case: None, "chunks": lambda case: e_bytes(case) // 2, "rows": lambda case: 8192}
