"""The measures of a run: those that its settings name, those that they leave open, and what a plan makes of these.

`unlearn train` and `unlearn plan` go the same way: wanted_of(settings), then unlearn.plan.choose, then settled or
options_of. Nothing here needs torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from unlearn.config import BY_NEED, TrainConfig, parse_size
from unlearn.measures import IN_BACKWARD, Measures
from unlearn.plan import OPTIMIZERS, Plan, Wanted
from unlearn.shapes import Shape

# Settings that may be left open, and what stands for off. Each leaves the result of a step the same.
OFF: Mapping[str, Any] = {
    "gradient_checkpointing": False,
    "tile_tokens": 0,
    "save_attention": False,
    "offload_checkpoints": "0",
}


def is_open(config: TrainConfig, name: str) -> bool:
    """Whether one of OFF's settings, or the optimizer, is left to be chosen by need."""
    return getattr(config, name) in (None, BY_NEED)


def layers_on_host(config: TrainConfig, num_layers: int) -> int | None:
    """How many of so many layers offload_checkpoints names; None where it is left open."""
    named = config.offload_checkpoints
    return None if named is None or named == BY_NEED else num_layers if named == "all" else int(named)


def wanted_of(
    config: TrainConfig, shape: Shape, *, tileable: bool = True, available: Callable[[str], bool] = lambda name: True
) -> Wanted:
    """What the settings ask of a plan. tileable: whether unlearn.tiled knows the model's layers; available: whether an
    optimizer can be had here."""
    optimizer = None
    if not is_open(config, "optimizer"):
        optimizer = config.optimizer + IN_BACKWARD * config.optimizer_in_backward
    can_tile = tileable and not config.liger_kernels  # which is for layers that are not tiled
    return Wanted(
        optimizer=optimizer,
        optimizers=_optimizers(config, available),
        adapter=None if config.lora is None else "qlora" if config.lora_4bit else "lora",
        rank=config.lora or Wanted.rank,
        itemsize=2 if config.dtype == "bfloat16" else 4,
        checkpointing=config.gradient_checkpointing,
        tile_tokens=0 if config.tile_tokens is None and not can_tile else config.tile_tokens,
        save_attention=bool(config.save_attention),
        host_layers=layers_on_host(config, shape.layers),
    )


def _optimizers(config: TrainConfig, available: Callable[[str], bool]) -> tuple[str, ...]:
    """The plan's, as far as these settings can be had with them."""
    if config.dtype == "float32":
        names: tuple[str, ...] = OPTIMIZERS[:1]
    else:
        names = tuple(name for name in OPTIMIZERS if available(name.removesuffix(IN_BACKWARD)))
    if config.optimizer_in_backward:
        return tuple(dict.fromkeys(name.removesuffix(IN_BACKWARD) + IN_BACKWARD for name in names))
    whole_gradient = config.max_grad_norm is not None or config.on_non_finite == "skip"
    return tuple(name for name in names if not (whole_gradient and name.endswith(IN_BACKWARD)))


def limits_of(config: TrainConfig) -> tuple[float | None, float | None]:
    """gpu_memory and host_memory in bytes, None where they are not given."""
    gpu, host = config.gpu_memory, config.host_memory
    return None if gpu is None else parse_size("gpu_memory", gpu), None if host is None else parse_size(
        "host_memory", host
    )


def settings_of(on: Measures) -> dict[str, Any]:
    """The settings of `unlearn train` that engage exactly these measures. Tiled layers recompute themselves."""
    return {
        "gradient_checkpointing": on.checkpointing and not on.tiled,
        "tile_tokens": on.tile_tokens if on.tiled else 0,
        "save_attention": on.save_attention,
        "offload_checkpoints": str(on.host_layers),
        "optimizer": on.optimizer,
        "optimizer_in_backward": on.in_backward,
    }


def options_of(plan: Plan) -> list[str]:
    """settings_of(plan.on) as options of `unlearn train`, with the token budget that makes the planned packs."""
    on, found = plan.on, settings_of(plan.on)
    options = ["--max-tokens", str(plan.load.tokens)]
    if not on.checkpointing:
        options.append("--no-gradient-checkpointing")  # keeps the others off too
    else:
        options += ["--tile-tokens", str(found["tile_tokens"])] if on.tiled else ["--gradient-checkpointing"]
        options += ["--save-attention"] if on.save_attention else []
        options += [] if on.tiled else ["--tile-tokens", "0"]
        options += ["--offload-checkpoints", found["offload_checkpoints"]]
    options += ["--optimizer", on.optimizer, *(["--optimizer-in-backward"] if on.in_backward else [])]
    options += ["--lora", str(on.rank)] if on.adapter else []
    options += ["--lora-4bit"] if on.adapter == "qlora" else []
    return options + (["--dtype", "float32"] if on.itemsize == 4 else [])


def settled(config: TrainConfig, plan: Plan | None, *, limited: bool) -> TrainConfig:
    """`config` with nothing left open: as the plan has it, and where there is none off, with AdamW. limited: by a
    memory; there inputs whose number cannot be planned all go to the host."""
    if plan is not None:
        found = settings_of(plan.on)
    else:
        recomputed = config.gradient_checkpointing or config.tile_tokens
        every = limited and recomputed and config.offload_checkpoints == BY_NEED
        found = {**OFF, "offload_checkpoints": "all" if every else "0", "optimizer": OPTIMIZERS[0]}
        if layers_on_host(config, 1) and not config.tile_tokens:  # what waits there has to be recomputed
            found["gradient_checkpointing"] = True
        found["optimizer_in_backward"] = config.optimizer_in_backward
    names = [name for name in (*OFF, "optimizer") if is_open(config, name)]
    if "optimizer" in names:
        names.append("optimizer_in_backward")
    return dataclasses.replace(config, **{name: found[name] for name in names})
