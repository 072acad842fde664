"""The measures for long contexts that a run's settings ask for, engaged on a model and taken back again."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

from torch import nn

from unlearn.config import TrainConfig
from unlearn.engage import layers_on_host
from unlearn.liger import liger_layers
from unlearn.offload import CheckpointStore, offloaded_checkpoints
from unlearn.tiled import decoder_layers, tiled


@contextlib.contextmanager
def long_context(
    model: nn.Module, config: TrainConfig, *, longest: int = 0, say: Callable[[str], None]
) -> Iterator[None]:
    """Tiled layers, offloaded checkpoints and liger-kernel's layers as `config` names them, nothing of what it leaves
    open; longest: tokens of the longest pack. Without tiles, offloading needs transformers' own checkpointing to be on
    already (unlearn.train.repeatable).

    Raises ValueError for layers that cannot be tiled or replaced and for more layers to offload than there are.
    """
    if config.liger_kernels:
        plain = dataclasses.replace(config, liger_kernels=False)
        with liger_layers(model), long_context(model, plain, longest=longest, say=say):
            yield
        return
    if not config.tile_tokens and not layers_on_host(config, 1):
        yield
        return
    layers = decoder_layers(model)
    store = CheckpointStore(len(layers), layers_on_host(config, len(layers)) or 0, longest=longest, say=say)
    if config.tile_tokens:
        measures = tiled(model, config.tile_tokens, store=store, save_attention=bool(config.save_attention))
    else:
        measures = offloaded_checkpoints(layers, store)
    with measures:
        yield
