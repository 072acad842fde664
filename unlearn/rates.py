"""How long a step takes: its FLOP and bytes over what a GPU is taken to sustain."""

from __future__ import annotations

from dataclasses import dataclass

from unlearn.footprint import checkpoint_bytes, host_state_bytes, trained_params
from unlearn.measures import GIB, Load, Measures
from unlearn.shapes import Shape


@dataclass(frozen=True)
class Rates:
    """What a GPU is taken to sustain: TFLOP/s of linear layers and of attention, forward and backward; TB/s of its
    memory and GB/s to the host."""

    name: str
    linear: float
    attention_forward: float
    attention_backward: float
    memory: float
    host: float
    source: str


_SHARE = "0.55 of the data sheet's dense bf16 rate"
RATES = {
    rates.name: rates
    for rates in (
        Rates("rtx4090", 91, 91, 91, 1.0, 25, f"{_SHARE}, 165 TFLOP/s"),
        Rates("l40s", 199, 199, 199, 0.86, 25, f"{_SHARE}, 362 TFLOP/s"),
        Rates("h100", 600, 360, 310, 3.35, 50, "published bf16 training runs and FlashAttention-2 charts, SXM"),
        Rates("h200", 600, 360, 310, 4.8, 50, "as h100, with the H200's memory"),
    )
}


def rates_for(gpu_bytes: float) -> Rates:
    """The usual card of that size."""
    for largest, name in ((30, "rtx4090"), (60, "l40s"), (100, "h100")):
        if gpu_bytes < largest * GIB:
            return RATES[name]
    return RATES["h200"]


def step_seconds(shape: Shape, load: Load, on: Measures, rates: Rates) -> float:
    """Predicted seconds of an optimizer step: FLOP over rates, nothing overlapped, attention with its causal half.

    A token through P weights costs 2P; gradients 4P more (2P where weights are frozen), recomputing 2P, tiles 2P of
    q, k, v again. Attention costs 2 T^2 Q forward, 2.5 times that backward; where it is kept it is not recomputed. The
    head takes 4 of 2NHV, 3 frozen: a document longer than the workspace computes E twice. AdamW's unfused passes move
    150 bytes a weight; states on the host cross the bus both ways.
    """
    frozen = on.adapter is not None
    weights = shape.layer_matmul_params * shape.layers
    units = (2 if frozen else 3) + on.checkpointing
    linear = 2.0 * units * weights * load.tokens
    if on.tiled:
        linear += 2.0 * shape.layers * sum(x * y for x, y in shape.linears[:3]) * load.tokens
    linear += (3 if frozen else 4) * 2.0 * load.rows * shape.head_params
    scores = sum(2.0 * length**2 * shape.q_width * shape.layers for length in load.lengths)
    forwards = 1 + (on.checkpointing and not on.save_attention)
    attention = scores * (forwards / rates.attention_forward + 2.5 / rates.attention_backward)
    moved = 2 * on.host_layers * checkpoint_bytes(shape, load.tokens, on) / (rates.host * 1e9)
    pack = (linear / rates.linear + attention) / 1e12 + moved
    visits = 2 * host_state_bytes(shape, on) / (rates.host * 1e9)
    return load.packs * pack + 150 * trained_params(shape, on) / (rates.memory * 1e12) + visits
