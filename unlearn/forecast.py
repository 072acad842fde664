"""A run's memory plan before its first step: the measures that it engages, and what it took in the end beside it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from unlearn.batches import Packing, Step
from unlearn.config import BY_NEED, TrainConfig
from unlearn.engage import OFF, limits_of, options_of, settled, wanted_of
from unlearn.measures import GIB, Load
from unlearn.memory import host_bytes, is_out_of_memory, resident_mib
from unlearn.methods import METHODS
from unlearn.optimizers import is_available
from unlearn.plan import CONTEXT_BYTES, Budget, Plan, choose
from unlearn.saturation import saturation
from unlearn.shapes import shape_of_config
from unlearn.tiled import decoder_layers, not_understood
from unlearn_kernels import Options

MIB = 1 << 20
# Of the host's memory, for layers' inputs and optimizer states.
HOST_SHARE = 0.8
# Nats by which a step is taken to move a token's log-probability, for the warning alone.
DRIFT = 1e-3


@dataclass(frozen=True)
class Forecast:
    """config: the run's, with no measure left open. plan: None for a model whose layers unlearn.shapes does not know,
    as `missing` says. held_mib: by the device, or on a CPU by the process, when it was made."""

    config: TrainConfig
    budget: Budget
    plan: Plan | None
    device: torch.device
    held_mib: float
    missing: str = ""

    def lines(self) -> list[str]:
        """What a person should know before the first step."""
        plan, budget = self.plan, self.budget
        if plan is None:
            return [f"memory plan: none ({self.missing})" + "; nothing is engaged by need" * (budget.gpu is not None)]
        sizes = plan.moments[plan.peak_moment].items()
        parts = [f"{name} {size / MIB:.0f}" for name, size in sizes if round(size / MIB) > 0]
        found = [
            f"memory plan: {plan.load.tokens} tokens in the largest pack take {plan.total / MIB:.0f} MiB"
            f" ({plan.peak_moment}: {', '.join(parts) or 'less than 1 each'})"
        ]
        if budget.gpu is not None:
            host = "" if budget.host is None else f" and {budget.host / GIB:.4g} on the host"
            found.append(f"measures within {budget.gpu / GIB:.4g} GiB{host}: {self.measures()}")
        return found if plan.fits else [*found, self._warning(plan)]

    def measures(self) -> str:
        """Those of the plan, by name and number."""
        if self.plan is None:
            return f"none planned ({self.missing})"
        on, layers = self.plan.on, self.plan.shape.layers
        more = {
            "tiled layers": f" ({on.tile_tokens} tokens)",
            "checkpoints on host": f" ({on.host_layers} of {layers} layers, {self.plan.host / GIB:.3g} GiB)",
        }
        return ", ".join(name + more.get(name, "") for name in on.names())

    def _warning(self, plan: Plan) -> str:
        everything: dict[str, Any] = {**dict.fromkeys(OFF), "optimizer": BY_NEED}
        wanted = wanted_of(
            dataclasses.replace(self.config, **everything),
            plan.shape,
            available=lambda name: is_available(name, self.device),
        )
        other = choose(plan.shape, plan.load, plan.budget, wanted)
        if not other.fits and wanted.adapter is None:
            other = choose(plan.shape, plan.load, plan.budget, dataclasses.replace(wanted, adapter="lora"))
        advice = f"{' '.join(options_of(other))} would do" if other.fits else "a smaller --max-tokens takes less"
        if plan.headroom < 0:
            short = f"that and a reserve are {-plan.headroom / MIB:.0f} MiB more than the GPU has"
        else:
            lacking = plan.host - (plan.budget.host or 0.0)
            kept = ["the layers' inputs"] if plan.on.host_layers else []
            kept += ["the optimizer's states"] if plan.host_states else []
            short = f"{' and '.join(kept)} are {lacking / MIB:.0f} MiB more than the host has"
        return f"warning: {short}; {advice}; the run goes on, since plans are careful"

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


def forecast(
    config: TrainConfig, model: nn.Module, packing: Packing, *, budget: Budget, device: torch.device
) -> Forecast:
    """Plan the run's largest pack and engage by need what the settings leave open. Never raises: a plan is advice.

    model: may be on the meta device; `device` is where the run will be.
    """
    held = resident_mib(device)
    try:
        shape = shape_of_config(model.config, type(model).__name__)
        tileable = not_understood(decoder_layers(model)) is None
    except ValueError as error:
        return Forecast(settled(config, None, limited=budget.gpu is not None), budget, None, device, held, str(error))
    wanted = wanted_of(config, shape, tileable=tileable, available=lambda name: is_available(name, device))
    plan = choose(shape, run_load(config, packing), budget, wanted)
    return Forecast(settled(config, plan, limited=budget.gpu is not None), budget, plan, device, held)


def budget_of(config: TrainConfig, device: torch.device) -> Budget:
    """What the settings name; otherwise, on a GPU, what no one else holds of it and a share of the host's.

    A size that is named stands for a GPU's memory on every device, so that what it takes there can be tried here.
    """
    gpu, host = limits_of(config)
    on_gpu = device.type == "cuda"
    if on_gpu and host is None:
        host = HOST_SHARE * host_bytes()
    if gpu is not None:
        return Budget(gpu, host)
    if on_gpu:
        free, total = torch.cuda.mem_get_info(device)
        # the plan's reserve counts this process's context, which is not free any more
        gpu = float(min(total, free + torch.cuda.memory_reserved(device) + CONTEXT_BYTES))
    return Budget(gpu, host, workspace=Options().workspace(device))


def run_load(config: TrainConfig, packing: Packing) -> Load:
    """The run's largest pack, and the most packs that a step takes."""
    return Load(
        tuple(s.num_tokens for s in packing.largest),
        packs=max(packing.counts),
        answers=sum(s.num_answer_tokens for s in packing.largest),
        reference_head=config.retain_term == "kl",
        fixed=True,
    )


def saturated(config: TrainConfig, steps: list[Step]) -> list[str]:
    """A warning where the method compares summed log-likelihoods with a reference's and will drive its own weight to
    nothing."""
    if not METHODS[config.method].reference or config.beta is None:
        return []
    longest = max(s.num_answer_tokens for step in steps for s in step.sequences())
    warning = saturation(beta=config.beta, tokens=longest, drift=DRIFT)
    return [] if warning is None else [warning]
