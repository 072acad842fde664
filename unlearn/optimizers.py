"""The optimizers by name, and the mode that steps each weight inside the backward.

Bytes per trained weight beside the weight itself (bf16), with the gradient kept until the step / freed in the backward:

    adamw       unlearn.optim.AdamWSR: 2 + 8 / 8     two float32 states
    adamw-offload  the same bits:      2 / 0         and 8 bytes on the host (unlearn.optim.AdamWOffload)
    adamw-bf16  the same but bits:     2 + 4 / 4     two bf16 states, rounded stochastically
    adamw8bit   torchao's AdamW8bit:   2 + 2.03 / 2.03   two 8-bit states with a scale per 256; weights of fewer than
                                       4096 values keep states in their own dtype
    adafactor   torch's Adafactor:     2 / 0         row and column sums; 16 bytes per weight of the largest matrix
                                       while that one is stepped (float32 copies)

Each of them rounds bf16 weights stochastically, for the reason that unlearn.optim gives. Adafactor's rate is relative:
a step moves a tensor by lr times its own root mean square, so a rate chosen for AdamW is another one for it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from unlearn.config import TrainConfig
from unlearn.optim import AdamWOffload, AdamWSR, restore_states, round_stochastically_


def make_optimizer(config: TrainConfig, weights: Iterable[Tensor]) -> torch.optim.Optimizer:
    """config.optimizer over these weights. Raises ValueError where its library is not installed."""
    options = {"lr": config.lr, "weight_decay": config.weight_decay, "seed": config.seed}
    return _MAKERS[config.optimizer](list(weights), **options)


def is_available(name: str, device: torch.device) -> bool:
    """Whether the optimizer `name` can step weights on `device` with the libraries that are here."""
    if name == "adamw8bit":
        return importlib.util.find_spec("torchao") is not None
    return name != "adamw-offload" or device.type == "cuda"


def check_device(name: str, device: torch.device) -> None:
    """Raises ValueError for an optimizer that does nothing for weights on `device`."""
    if name == "adamw-offload" and device.type != "cuda":
        raise ValueError(
            f"optimizer: adamw-offload spares a GPU's memory and the model is on {device.type!r}; adamw is accepted"
        )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao: a number would be compiled in
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def gradient_norm(norms: list[Tensor]) -> float:
    """The whole gradient's norm from its tensors' norms; 0 where there is none."""
    return torch.linalg.vector_norm(torch.stack(norms)).item() if norms else 0.0


def tensor_norm(grad: Tensor) -> Tensor:
    """In float32 whatever the gradient is, or float64."""
    return torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32))


class InBackward:
    """Steps every weight of `optimizer` as soon as its gradient is complete, and frees the gradient. A context manager.

    One gradient exists at a time, so there is none to accumulate over micro-batches, to clip by a norm over all of
    them, or to look at before the first weight moves. Otherwise it is the same step: the same bits for float32
    weights; bf16 weights draw their rounding noise in the order of the backward, not of the weights.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        self._norms: dict[Tensor, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> InBackward:
        self._handles = [weight.register_post_accumulate_grad_hook(self._step) for weight in self.weights]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    def _step(self, weight: Tensor) -> None:
        assert weight.grad is not None
        self._norms[weight] = tensor_norm(weight.grad)
        self.optimizer.step()  # the other weights have no gradient: this one alone moves
        weight.grad = None

    def pop_gradient_norm(self) -> float:
        """Of the gradients stepped since the last call."""
        norms, self._norms = self._norms, {}
        return gradient_norm([norms[weight] for weight in self.weights if weight in norms])


class AdafactorSR(torch.optim.Adafactor):
    """torch's Adafactor, computed in float32 for bf16 weights, which are then rounded stochastically.

    The noise comes from its own generator, seeded with `seed` and part of state_dict.
    """

    def __init__(self, params: Iterable[Any], *, lr: float, weight_decay: float, seed: int) -> None:
        # foreach would hold the float32 temporaries of all weights at once
        super().__init__(params, lr=lr, weight_decay=weight_decay, foreach=False)
        self.generator = torch.Generator(device=self.param_groups[0]["params"][0].device).manual_seed(seed)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        assert closure is None
        waiting = [(w, w.grad) for group in self.param_groups for w in group["params"] if w.grad is not None]
        for weight, _ in waiting:
            weight.grad = None
        for weight, grad in waiting:
            stored = weight.data
            if weight.dtype == torch.bfloat16:
                weight.data = stored.float()
            weight.grad = grad.to(weight.dtype)
            super().step()
            weight.grad = None
            if stored.dtype == torch.bfloat16:
                computed, weight.data = weight.data, stored
                round_stochastically_(weight, computed, generator=self.generator)
        for weight, grad in waiting:
            weight.grad = grad

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        restore_states(self, state_dict)
        self.generator.set_state(state_dict["generator"].cpu())


class _OwnNoise:
    """For an optimizer that rounds with torch's global generator: a state of its own, seeded and part of state_dict."""

    def __init__(self, params: list[Any], *, seed: int, **options: Any) -> None:
        super().__init__(params, **options)  # type: ignore[call-arg]
        device = params[0].device
        self._devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(self._devices):
            torch.manual_seed(seed)
            self._noise = self._read()

    def _read(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices)]

    def step(self, closure: Any = None) -> Any:
        with torch.random.fork_rng(self._devices):
            torch.set_rng_state(self._noise[0])
            for device, state in zip(self._devices, self._noise[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            loss = super().step(closure)  # type: ignore[misc]
            self._noise = self._read()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "noise": self._noise}  # type: ignore[misc]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # type: ignore[misc]
        restore_states(self, state_dict)
        self._noise = [state.cpu() for state in state_dict["noise"]]


def _adamw_offload(weights: list[Tensor], **options: Any) -> torch.optim.Optimizer:
    check_device("adamw-offload", weights[0].device)
    return AdamWOffload(weights, **options)


def _adamw8bit(weights: list[Tensor], *, lr: float, weight_decay: float, seed: int) -> torch.optim.Optimizer:
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            f"optimizer: adamw8bit needs torchao ({error}); install it, or take adamw or adafactor"
        ) from None
    kind = type("AdamW8bitSR", (_OwnNoise, AdamW8bit), {})
    return kind(weights, lr=lr, weight_decay=weight_decay, seed=seed, bf16_stochastic_round=True)


_MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": AdamWSR,
    "adamw-offload": _adamw_offload,
    "adamw-bf16": partial(AdamWSR, state_dtype=torch.bfloat16),
    "adamw8bit": _adamw8bit,
    "adafactor": AdafactorSR,
}
