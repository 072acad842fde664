"""AdamW with stochastic rounding for bf16 weights, its states on the device or the host; the learning-rate schedule.

bf16 values near 0.02 are 1.2e-4 apart, and a step moves a weight only past half of that: AdamW's steps at lr 1e-5 are
six times too small and are dropped whole. Over N(0, 0.02) weights plain bf16 AdamW travels 18 % of the intended
distance. Rounding up with a probability equal to the fraction lost keeps the expectation exact, at 2 bytes per weight
where float32 master weights cost 4 more.

The two states are as large as four bf16 weights. AdamWOffload keeps them on the host, for the price of the bus.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from unlearn.offload import host_bytes, unpin

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
        moving = ((weight, group) for group in self.param_groups for weight in group["params"])
        self._update(
            _slices(weight, self._state_of(weight), group) for weight, group in moving if weight.grad is not None
        )
        return loss

    def _state_of(self, weight: Tensor) -> dict[str, Any]:
        state = self.state[weight]
        if not state:
            state["step"] = 0
            for name in _STATES:
                state[name] = self._zeros(weight, name)
        state["step"] += 1
        return state

    def _dtype_of_state(self, weight: Tensor) -> torch.dtype:
        return torch.float64 if weight.dtype == torch.float64 else self.state_dtype

    def _zeros(self, weight: Tensor, name: str) -> Tensor:
        return torch.zeros_like(weight, dtype=self._dtype_of_state(weight))

    def _update(self, weights: Iterable[Iterator[_Slice]]) -> None:
        for piece in itertools.chain.from_iterable(weights):
            self._update_slice(*piece)

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


_STATES = ("exp_avg", "exp_avg_sq")
# weight, gradient, exp_avg, exp_avg_sq, the step that it is, group
_Slice = tuple[Tensor, Tensor, Tensor, Tensor, int, dict[str, Any]]


def _rows(weight: Tensor) -> int:
    """Of a slice: the first dimension of what is updated at once."""
    return max(1, _SLICE_NUMEL * len(torch.atleast_1d(weight)) // max(1, weight.numel()))


def _slices(weight: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Iterator[_Slice]:
    tensors = (torch.atleast_1d(t) for t in (weight, weight.grad, *(state[name] for name in _STATES)))
    for w, g, m, v in zip(*(t.split(_rows(weight)) for t in tensors), strict=True):
        yield w, g, m, v, state["step"], group


class AdamWOffload(AdamWSR):
    """AdamWSR whose states wait in host memory and visit the device slice by slice: the same bits, resumed ones too.

    Held on the host: 8 bytes per weight with float32 states, one slab of exactly that size, pinned for CUDA. On the
    device: two pairs of slices, one at work while the next one is fetched. 16 bytes per weight cross the bus in a step,
    on a stream of their own. On a CPU the same copies are made without streams.

    torchao's CPUOffloadOptimizer was not taken: it copies weights too, so that a resumed run goes on from those that
    it was constructed with; it copies a gradient before it could be clipped; it updates on the CPU, one optimizer and
    one noise generator per weight; and it cannot be constructed without a GPU.

    Raises ValueError where the host has no memory for the states.
    """

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        super().__init__(params, **options)
        device = self.generator.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._places: dict[tuple[Tensor, str], slice] = {}
        # a slab for each dtype: torch.save refuses one memory in two
        ends, largest = dict[torch.dtype, int](), 0
        for weight in self._weights():
            dtype = self._dtype_of_state(weight)
            for name in _STATES:
                end = ends.get(dtype, 0)
                ends[dtype] = end + weight.numel()
                self._places[weight, name] = slice(end, ends[dtype])
            row = weight.numel() // max(1, len(torch.atleast_1d(weight)))
            largest = max(largest, min(weight.numel(), _rows(weight) * row) * dtype.itemsize)
        self._slabs: dict[torch.dtype, Tensor] = {}
        for dtype, end in ends.items():
            slab = host_bytes(end * dtype.itemsize, device, "optimizer: adamw-offload", "adamw8bit or adafactor")
            self._slabs[dtype] = slab.view(dtype)
            if self._stream is not None:
                weakref.finalize(self, _give_back, slab, self._stream).atexit = False
        self._staged = [[torch.empty(largest, dtype=torch.uint8, device=device) for _ in _STATES] for _ in range(2)]

    @property
    def staged_bytes(self) -> int:
        """All that the device holds of the states."""
        return sum(tensor.nbytes for pair in self._staged for tensor in pair)

    def state_dict(self) -> dict[str, Any]:
        self._settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As AdamWSR's; the states go straight to the host."""
        super().load_state_dict({**state_dict, "state": {}})
        self._settle()
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for weight, i in zip(self._weights(), saved_ids, strict=True):
            saved = state_dict["state"].get(i)
            if saved is not None:
                here = {name: self._zeros(weight, name) for name in _STATES}
                for name, state in here.items():
                    state.copy_(saved[name])
                self.state[weight] = {"step": saved["step"], **here}

    def _zeros(self, weight: Tensor, name: str) -> Tensor:
        return self._slabs[self._dtype_of_state(weight)][self._places[weight, name]].zero_().view(weight.shape)

    def _settle(self) -> None:
        """The host may read what it holds."""
        if self._stream is not None:
            self._stream.synchronize()

    def _update(self, weights: Iterable[Iterator[_Slice]]) -> None:
        """One stream carries everything in order, so that a pair is fetched into only once it is back on the host."""
        if self._stream is not None:  # what is staged may lie where a tensor lay that queued kernels still read
            self._stream.wait_stream(torch.cuda.current_stream(self.generator.device))
        pieces = itertools.chain(itertools.chain.from_iterable(weights), [None])
        fetched = None
        for number, (piece, following) in enumerate(itertools.pairwise(pieces)):
            assert piece is not None
            (m, v), there = fetched or self._fetch(piece, number)
            fetched = None if following is None else self._fetch(following, number + 1)
            if there is not None:
                torch.cuda.current_stream(m.device).wait_event(there)
            w, g, m_home, v_home, step, group = piece
            self._update_slice(w, g, m, v, step, group)
            self._copy(((m_home, m), (v_home, v)), after_current=True)

    def _fetch(self, piece: _Slice, number: int) -> tuple[list[Tensor], Any]:
        here = []
        for staged, home in zip(self._staged[number % 2], piece[2:4], strict=True):
            here.append(staged[: home.nbytes].view(home.dtype).view(home.shape))
        self._copy(zip(here, piece[2:4], strict=True))
        return here, None if self._stream is None else self._stream.record_event()

    def _copy(self, pairs: Iterable[tuple[Tensor, Tensor]], *, after_current: bool = False) -> None:
        if self._stream is not None and after_current:
            self._stream.wait_stream(torch.cuda.current_stream(self.generator.device))
        with torch.cuda.stream(self._stream):  # None: nothing
            for target, source in pairs:
                target.copy_(source, non_blocking=True)


def _give_back(slab: Tensor, stream: torch.cuda.Stream) -> None:
    stream.synchronize()
    unpin(slab)


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
