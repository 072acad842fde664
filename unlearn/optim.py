"""AdamW with stochastic rounding for bf16 weights, and the learning-rate schedule.

bf16 values near 0.02 are 1.2e-4 apart, and a step moves a weight only past half of that: AdamW's steps at lr 1e-5 are
six times too small and are dropped whole. Over N(0, 0.02) weights plain bf16 AdamW travels 18 % of the intended
distance. Rounding up with a probability equal to the fraction lost keeps the expectation exact, at 2 bytes per weight
where float32 master weights cost 4 more.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# float32 temporaries of one parameter slice; a 128256 x 4096 head taken whole would need 2 GiB for each of four
_SLICE_NUMEL = 1 << 24
_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


class AdamWSR(torch.optim.Optimizer):
    """AdamW with decoupled decay (arXiv:1711.05101) whose bf16 weights, and bf16 states, are rounded stochastically.

    params: bfloat16, float32 or float64, all on one device. The update is computed in float32 (float64 for float64
    weights); float32 and float64 weights are updated in place, as torch.optim.AdamW does.
    state_dtype: of exp_avg and exp_avg_sq, float32 or bfloat16. bfloat16 saves 4 bytes per weight and is rounded
    stochastically too: to nearest, exp_avg_sq could never decay by its 0.1 %. float64 weights keep float64 states.
    The noise comes from the optimizer's own generator, seeded with `seed` and part of state_dict: a run resumed from
    one continues bitwise the same.

    Raises ValueError for another dtype, several devices, or a state_dict of another state_dtype.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        weight_decay: float,
        seed: int,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= b < 1 for b in betas)):
            raise ValueError(f"must be >= 0, and betas in [0, 1): got {lr=} {eps=} {weight_decay=} {betas=}")
        if state_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"state_dtype must be torch.float32 or torch.bfloat16, got {state_dtype}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.state_dtype = state_dtype
        weights = self._weights()
        wrong = {w.dtype for w in weights} - set(_DTYPES)
        devices = {w.device for w in weights}
        if wrong or len(devices) != 1:
            raise ValueError(f"weights must be bfloat16, float32 or float64 on one device, got {wrong or devices}")
        self.generator = torch.Generator(device=devices.pop()).manual_seed(seed)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every weight that has a gradient; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)
        return loss

    def _update(self, weight: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            dtype = torch.float64 if weight.dtype == torch.float64 else self.state_dtype
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(weight, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(weight, dtype=dtype)
        state["step"] += 1
        tensors = [torch.atleast_1d(t) for t in (weight, weight.grad, state["exp_avg"], state["exp_avg_sq"])]
        rows = max(1, _SLICE_NUMEL * len(tensors[0]) // max(1, weight.numel()))
        for w, g, m, v in zip(*(t.split(rows) for t in tensors), strict=True):
            self._update_slice(w, g, m, v, state["step"], group)

    def _update_slice(
        self, weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, group: dict[str, Any]
    ) -> None:
        beta1, beta2 = group["betas"]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        w, g, m, v = (t.to(dtype) for t in (weight, grad, exp_avg, exp_avg_sq))  # no copy where the dtype is right
        w.mul_(1 - group["lr"] * group["weight_decay"])
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denom = v.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
        w.addcdiv_(m, denom, value=-group["lr"] / (1 - beta1**step))
        for stored, computed in ((weight, w), (exp_avg, m), (exp_avg_sq, v)):
            if stored.dtype == torch.bfloat16:
                round_stochastically_(stored, computed, generator=self.generator)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "generator": self.generator.get_state(), "state_dtype": str(self.state_dtype)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores states, groups and generator, copying tensors. Raises ValueError for another state_dtype."""
        if state_dict["state_dtype"] != str(self.state_dtype):
            raise ValueError(f"state_dict holds {state_dict['state_dtype']} states, this optimizer {self.state_dtype}")
        super().load_state_dict(state_dict)
        restore_states(self, state_dict)
        self.generator.set_state(state_dict["generator"].cpu())

    def _weights(self) -> list[Tensor]:
        return [weight for group in self.param_groups for weight in group["params"]]


def restore_states(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """States as they were saved: load_state_dict casts them to the weight's dtype, which rounds a bf16 weight's."""
    saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for weight, i in zip(weights, saved_ids, strict=True):
        for name, value in state_dict["state"].get(i, {}).items():
            if isinstance(value, Tensor):
                # the count of steps is read by the host
                value = value.to("cpu" if name == "step" else weight.device, copy=True)
            optimizer.state[weight][name] = value


def round_stochastically_(target: Tensor, source: Tensor, *, generator: torch.Generator) -> None:
    """Writes source into target, rounded up or down to a neighbouring bf16 so that the expectation is the value itself.

    target: bfloat16; source: float32, same shape and device. bf16 is the upper half of float32, sign and magnitude:
    adding 16 random bits and cutting off the lower half carries with probability (lower half) / 2**16, for either sign
    and across binades (beyond the largest bf16: to infinity). Infinities and NaNs are kept.
    """
    bits = torch.empty_like(source, dtype=torch.int32).random_(0, 1 << 16, generator=generator)
    bits.add_(source.view(torch.int32)).bitwise_and_(-(1 << 16))
    # CUDA's NaN is 0x7fffffff: the addition would wrap it to -0
    target.copy_(torch.where(source.isfinite(), bits.view(torch.float32), source))


def linear_schedule(step: int, total_steps: int, warmup_steps: int) -> float:
    """Learning-rate factor: step / warmup_steps while warming up, then straight down to 0 at total_steps.

    step: optimizer steps already taken, so the first of a warmed-up run has factor 0 (the convention of transformers'
    get_linear_schedule_with_warmup, which the published recipes use). Past total_steps it stays 0.

    Raises ValueError unless 0 <= warmup_steps <= total_steps, total_steps > 0 and step >= 0.
    """
    if not (0 <= warmup_steps <= total_steps and total_steps > 0 and step >= 0):
        raise ValueError(f"need 0 <= warmup_steps <= total_steps, step >= 0: {step=} {total_steps=} {warmup_steps=}")
    if step < warmup_steps:
        return step / warmup_steps
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))
