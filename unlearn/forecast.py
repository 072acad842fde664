"""A run's memory plan before its first step, and what it took in the end beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from unlearn.batches import Step, num_tokens, packs_of
from unlearn.config import TrainConfig
from unlearn.memory import is_out_of_memory, resident_mib
from unlearn.methods import METHODS
from unlearn.plan import Budget, Load, Measures, Plan, Wanted, choose, make, saturation, shape_of_config
from unlearn_kernels import Options

MIB = 1 << 20
# Nats by which a step is taken to move a token's log-probability, for the warning alone.
DRIFT = 1e-3


@dataclass(frozen=True)
class Forecast:
    """plan: None for a model whose layers unlearn.plan does not count; held_mib: by the device, or on a CPU by the
    process, when it was made."""

    plan: Plan | None
    device: torch.device
    held_mib: float

    @contextlib.contextmanager
    def beside_errors(self) -> Iterator[None]:
        """An error that says that memory is short carries what was planned as a note."""
        try:
            yield
        except Exception as error:
            if self.plan is not None and is_out_of_memory(error):
                error.add_note(f"{self.plan.total / MIB:.0f} MiB were planned ({self.plan.peak_moment})")
            raise

    def compare(self, peak_mib: float) -> str | None:
        """The run's measured peak against the plan, in a line."""
        if self.plan is None:
            return None
        planned = self.plan.total / MIB
        if self.device.type == "cuda":
            return f"peak memory: {peak_mib:.0f} MiB allocated, {planned:.0f} planned ({peak_mib / planned - 1:+.0%})"
        planned -= self.plan.part("weights") / MIB
        return (
            f"peak memory: the process rose by {peak_mib - self.held_mib:.0f} MiB over the {self.held_mib:.0f} it held "
            f"with the model; {planned:.0f} planned beside the weights"
        )


def forecast(config: TrainConfig, model: nn.Module, steps: list[Step], *, say: Callable[[str], None]) -> Forecast:
    """Say what the run's largest pack will take, and what is wrong with it. Never raises: a plan is advice."""
    device = next(model.parameters()).device
    held = resident_mib(device)
    for warning in _saturated(config, steps):
        say(f"warning: {warning}")
    try:
        shape = shape_of_config(model.config, type(model).__name__)
    except ValueError as error:
        say(f"memory plan: none ({error})")
        return Forecast(None, device, held)
    load = run_load(config, steps)
    on = Measures(
        checkpointing=config.gradient_checkpointing or config.tile_tokens > 0,
        tiled=config.tile_tokens > 0,
        tile_tokens=config.tile_tokens or Measures.tile_tokens,
        host_layers=_host_layers(config, shape.layers),
        optimizer=config.optimizer,
        in_backward=config.optimizer_in_backward,
        adapter=None if config.lora is None else "qlora" if config.lora_4bit else "lora",
        rank=config.lora or 0,
        itemsize=2 if config.dtype == "bfloat16" else 4,
    )
    gpu = float(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None
    budget = Budget(gpu, workspace=Options().workspace(device))
    plan = make(shape, load, on, budget)
    parts = [
        f"{name} {size / MIB:.0f}" for name, size in plan.moments[plan.peak_moment].items() if round(size / MIB) > 0
    ]
    say(
        f"memory plan: {load.tokens} tokens in the largest pack take {plan.total / MIB:.0f} MiB"
        f" ({plan.peak_moment}: {', '.join(parts) or 'less than 1 each'})"
    )
    if not plan.fits:
        wanted = Wanted(None, on.adapter, on.rank, on.itemsize, built_only=True)
        other = choose(shape, load, budget, wanted)
        advice = ", ".join(other.on.names()) + " would do" if other.fits else "a smaller --max-tokens"
        say(f"warning: that and a reserve are {-plan.headroom / MIB:.0f} MiB more than the GPU has; {advice}")
    return Forecast(plan, device, held)


def _host_layers(config: TrainConfig, layers: int) -> int:
    """auto: all of them, which is what the device holds least with."""
    wanted = config.offload_checkpoints
    if wanted is None:
        return 0
    return layers if wanted in ("all", "auto") else int(wanted)


def run_load(config: TrainConfig, steps: list[Step]) -> Load:
    """The run's largest pack, and the most packs that a step takes."""
    packs = [packs_of(step, config.max_tokens) for step in steps]
    largest = max((packed for step in packs for packed in step), key=num_tokens)
    return Load(
        tuple(s.num_tokens for s in largest),
        packs=max(map(len, packs)),
        answers=sum(s.num_answer_tokens for s in largest),
        reference_head=config.retain_term == "kl",
    )


def _saturated(config: TrainConfig, steps: list[Step]) -> list[str]:
    """Of the methods that compare summed log-likelihoods with a reference's."""
    if not METHODS[config.method].reference or config.beta is None:
        return []
    longest = max(s.num_answer_tokens for step in steps for s in step.sequences())
    warning = saturation(beta=config.beta, tokens=longest, drift=DRIFT)
    return [] if warning is None else [warning]
