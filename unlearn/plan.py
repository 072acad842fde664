"""The memory plan: what a step holds at each of its moments, before it runs, and which measures make it fit.

Pure arithmetic (no torch) over unlearn.footprint's parts. Four moments compete for the peak, and which one wins depends
on the length:

    head            every layer's checkpoint, the head's workspace and float32 gradient
    top layer       every checkpoint, and the working set of the last layer, recomputed
    bottom layer    all gradients, and the working set of the first layer
    update          all gradients, the optimizer's float32 slices
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from unlearn.footprint import (
    batch_bytes,
    checkpoint_bytes,
    gradient_bytes,
    head_bytes,
    head_gradient_bytes,
    host_state_bytes,
    kept_attention_bytes,
    largest_matrix,
    layer_bytes,
    resident_checkpoints,
    saved_bytes_per_token,
    state_bytes,
    update_bytes,
    weight_bytes,
)
from unlearn.measures import FLOAT32, GIB, IN_BACKWARD, Load, Measures
from unlearn.rates import RATES, Rates, step_seconds
from unlearn.shapes import Shape

# CUDA's context and libraries, which torch does not count
CONTEXT_BYTES = 1 * GIB
# Whole processes of published long-context runs held 1.1 to 1.35 times what counting tensors gives: fragmentation and
# library workspaces. A quarter more is planned for what is allocated and freed within a step.
ALLOWANCE = 0.25


@dataclass(frozen=True)
class Budget:
    """gpu, host: bytes (None: not limited); workspace: of the head, unlearn_kernels' default."""

    gpu: float | None
    host: float | None = None
    workspace: int = 1 * GIB
    rates: Rates = RATES["h200"]


PARTS = ("weights", "optimizer", "gradients", "checkpoints", "layer", "head", "update", "batch")
MOMENTS = ("head", "top layer", "bottom layer", "update")


@dataclass(frozen=True)
class Plan:
    """moments: name -> part -> bytes on the GPU. Bytes everywhere; seconds per optimizer step."""

    shape: Shape
    load: Load
    on: Measures
    budget: Budget
    moments: dict[str, dict[str, float]]
    host: float
    seconds: float

    @property
    def host_states(self) -> float:
        """What the optimizer's states take of `host`; the rest is checkpoints."""
        return host_state_bytes(self.shape, self.on)

    def moment_total(self, moment: str) -> float:
        """Bytes on the GPU at one of MOMENTS."""
        return sum(self.moments[moment].values())

    @property
    def peak_moment(self) -> str:
        """The one of MOMENTS that holds most."""
        return max(MOMENTS, key=self.moment_total)

    @property
    def total(self) -> float:
        """What torch.cuda.max_memory_allocated should read."""
        return self.moment_total(self.peak_moment)

    @property
    def reserve(self) -> float:
        """On top, so that it runs: CUDA's context, and an allowance on what comes and goes within a step."""
        passing = max(sum(parts.get(name, 0.0) for name in ("layer", "head")) for parts in self.moments.values())
        return CONTEXT_BYTES + ALLOWANCE * passing

    @property
    def headroom(self) -> float:
        """Negative where it does not fit."""
        return math.inf if self.budget.gpu is None else self.budget.gpu - self.total - self.reserve

    @property
    def fits(self) -> bool:
        """The GPU and the host."""
        return self.headroom >= 0 and (self.budget.host is None or self.host <= self.budget.host)

    def part(self, name: str) -> float:
        """The most that a part takes at any moment."""
        return max(parts.get(name, 0.0) for parts in self.moments.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, sizes in bytes."""
        return {
            "model": asdict(self.shape) | {"params": self.shape.params},
            "tokens": self.load.tokens,
            "lengths": list(self.load.lengths),
            "packs": self.load.packs,
            "measures": asdict(self.on) | {"names": self.on.names()},
            "moments": self.moments,
            "peak_moment": self.peak_moment,
            "parts": {name: self.part(name) for name in PARTS}
            | {"checkpoints_host": self.host - self.host_states, "optimizer_host": self.host_states},
            "total": self.total,
            "reserve": self.reserve,
            "gpu": self.budget.gpu,
            "host_limit": self.budget.host,
            "headroom": None if self.budget.gpu is None else self.headroom,
            "fits": self.fits,
            "seconds_per_step": self.seconds,
            "rates": asdict(self.budget.rates),
        }


def make(shape: Shape, load: Load, on: Measures, budget: Budget) -> Plan:
    """The plan with exactly these measures, whether it fits or not."""
    if on.in_backward:
        load = load.in_one_pack()
    tokens = load.tokens
    all_gradients, head_gradient = gradient_bytes(shape, on), head_gradient_bytes(shape, on)
    added_up = load.packs > 1 or on.in_backward  # gradients wait for the packs to come, or never do
    one, layer = checkpoint_bytes(shape, tokens, on), layer_bytes(shape, load, on)
    waiting = {moment: count * one for moment, count in resident_checkpoints(shape, on).items()}
    kept = kept_attention_bytes(shape, tokens, on)
    waiting["head"] += shape.layers * kept
    waiting["top layer"] += (shape.layers - 1) * kept  # the layer at work counts its own among what it works with
    if not on.checkpointing:  # what every layer saved, but the one at work
        saved = tokens * saved_bytes_per_token(shape, on, mixed=load.mixed)
        waiting = {"head": shape.layers * saved, "top layer": (shape.layers - 1) * saved, "bottom layer": 0.0}
    table = 0.0 if shape.tied or on.adapter else float(on.itemsize * shape.head_params)
    reference = on.itemsize * shape.head_params if load.reference_head else 0
    always = {
        "weights": weight_bytes(shape, on) + reference,
        "optimizer": state_bytes(shape, on),
        "batch": batch_bytes(shape, tokens, on),
    }
    moments = {
        "head": {
            "gradients": all_gradients if added_up else 0.0,
            "checkpoints": waiting["head"],
            "head": head_bytes(shape, load, on, budget.workspace),
        },
        "top layer": {
            "gradients": all_gradients if added_up else head_gradient,
            "checkpoints": waiting["top layer"],
            "layer": layer,
        },
        # the embedding's gradient is the last to come
        "bottom layer": {
            "gradients": all_gradients if added_up else all_gradients - table,
            "checkpoints": waiting["bottom layer"],
            "layer": layer,
        },
        "update": {"gradients": all_gradients, "update": update_bytes(on, shape.head_params)},
    }
    if on.in_backward:
        moments["head"]["update"] = moments["update"]["update"]
        for moment in ("top layer", "bottom layer"):
            moments[moment]["update"] = update_bytes(on, largest_matrix(shape))
    moments = {name: always | parts for name, parts in moments.items()}
    host = on.host_layers * one + host_state_bytes(shape, on)
    return Plan(shape, load, on, budget, moments, host, step_seconds(shape, load, on, budget.rates))


OPTIMIZERS = ("adamw", "adamw8bit", "adamw-offload", "adamw8bit" + IN_BACKWARD, "adamw-offload" + IN_BACKWARD)


@dataclass(frozen=True)
class Wanted:
    """What is asked for; what is None goes by need.

    optimizer: one of STATE_BYTES, with IN_BACKWARD behind it or not; None to go through `optimizers`. adapter: none,
    lora or qlora, only where asked for. checkpointing: False keeps tiles off too, which recompute; tile_tokens: 0 for
    no tiles; host_layers: 0 for none.
    """

    optimizer: str | None = None
    optimizers: tuple[str, ...] = OPTIMIZERS
    adapter: str | None = None
    rank: int = 16
    itemsize: int = 2
    checkpointing: bool | None = None
    tile_tokens: int | None = None
    save_attention: bool = False
    host_layers: int | None = None

    def ways(self, on: Measures) -> list[Measures]:
        """`on` with each way to recompute that is left open, in order: not at all, whole layers, tiles."""
        whole = replace(on, checkpointing=True)
        tile_tokens = self.tile_tokens or on.tile_tokens
        tiled = replace(whole, tiled=True, tile_tokens=tile_tokens, save_attention=self.save_attention)
        if self.tile_tokens:
            return [tiled]
        if self.checkpointing is False:
            return [on]
        found = [whole] if self.checkpointing or self.host_layers else [on, whole]
        return found if self.tile_tokens == 0 else [*found, tiled]


def ladder(shape: Shape, load: Load, budget: Budget, wanted: Wanted) -> Iterator[Plan]:
    """Plans in the order in which measures are engaged: recompute, tile, send checkpoints to the host (as few layers as
    will do), then the next optimizer."""
    optimizers = wanted.optimizers[:1] if wanted.adapter else wanted.optimizers
    if load.fixed and load.packs > 1:  # gradients to add up, unless nothing else will do
        optimizers = tuple(name for name in optimizers if not name.endswith(IN_BACKWARD)) or optimizers
    for optimizer in (wanted.optimizer,) if wanted.optimizer else optimizers:
        name = optimizer.removesuffix(IN_BACKWARD)
        start = Measures(
            optimizer=name,
            in_backward=name != optimizer,
            adapter=wanted.adapter,
            rank=wanted.rank if wanted.adapter else 0,
            itemsize=wanted.itemsize,
        )
        ways = wanted.ways(start)
        for on in ways:
            yield make(shape, load, replace(on, host_layers=wanted.host_layers or 0), budget)
        if wanted.host_layers is None and ways[-1].checkpointing:
            yield _fewest_on_host(shape, load, ways[-1], budget)


def _fewest_on_host(shape: Shape, load: Load, on: Measures, budget: Budget) -> Plan:
    """Bisection: the GPU's part falls with every layer sent away."""
    low, high = 1, shape.layers
    while low < high:
        middle = (low + high) // 2
        enough = make(shape, load, replace(on, host_layers=middle), budget).headroom >= 0
        low, high = (low, middle) if enough else (middle + 1, high)
    return make(shape, load, replace(on, host_layers=low), budget)


def choose(shape: Shape, load: Load, budget: Budget, wanted: Wanted) -> Plan:
    """The first plan of the ladder that fits; where none does, the one that lacks least."""
    plans = []
    for plan in ladder(shape, load, budget, wanted):
        if plan.fits:
            return plan
        plans.append(plan)
    # a plan that only the host's memory stops is nearer than one that the GPU's does
    return max(plans, key=lambda plan: min(plan.headroom, (budget.host or math.inf) - plan.host))


STEP, MOST = 1024, 1 << 24


def longest_context(shape: Shape, load: Callable[[int], Load], budget: Budget, wanted: Wanted) -> int:
    """The longest context, in whole thousands (1024), that fits; 0 where none does. load(context) is its step."""
    if budget.gpu is None:
        raise ValueError("gpu-memory: missing, and the longest context depends on it")

    def fits(context: int) -> bool:
        return choose(shape, load(context), budget, wanted).fits

    low, high = 0, MOST // STEP
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * STEP) else (low, middle - 1)
    return low * STEP


def remedies(plan: Plan, load: Callable[[int], Load], wanted: Wanted) -> list[str]:
    """What would make a plan fit that does not, one sentence each."""
    shape, budget, context = plan.shape, plan.budget, plan.load.lengths[0]
    found = []
    in_bf16 = wanted.itemsize < FLOAT32  # float32 is planned with adamw and without 4 bits
    for adapter in ("lora", "qlora") if in_bf16 else ("lora",):
        if wanted.adapter not in (adapter, "qlora"):
            other = choose(shape, load(context), budget, replace(wanted, adapter=adapter, optimizer=None))
            if other.fits:
                found.append(f"{adapter} of rank {wanted.rank}")
                break
    if wanted.optimizer is None and wanted.adapter is None and in_bf16:
        other = choose(shape, load(context), budget, replace(wanted, optimizer="adafactor" + IN_BACKWARD))
        if other.fits:
            found.append(f"--optimizer adafactor{IN_BACKWARD}")
    longest = longest_context(shape, load, budget, wanted)
    if longest:
        found.append(f"a context of at most {longest} tokens")
    if budget.host is not None:
        roomy = choose(shape, load(context), replace(budget, host=None), wanted)
        if roomy.fits:
            found.append(f"{math.ceil(roomy.host / GIB)} GiB of host memory")
    if gib := _smallest_gpu(shape, load(context), budget, wanted):
        found.append(f"a GPU of {gib} GiB")
    return found


def _smallest_gpu(shape: Shape, load: Load, budget: Budget, wanted: Wanted) -> int | None:
    """In GiB, beside this host; None where no GPU makes up for what the host lacks."""
    enough = choose(shape, load, replace(budget, gpu=None), wanted)
    if not enough.fits:
        return None
    low, high = 1, math.ceil((enough.total + enough.reserve) / GIB)
    while low < high:
        middle = (low + high) // 2
        fits = choose(shape, load, replace(budget, gpu=float(middle * GIB)), wanted).fits
        low, high = (low, middle) if fits else (middle + 1, high)
    return low
