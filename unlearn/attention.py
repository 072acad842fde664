"""Attention over packed sequences without a T x T mask, on any device that has scaled_dot_product_attention.

Transformers builds a T x T mask for packed rows under SDPA (3.5 to 8 times the time of the same tokens in a batch).
Here sequences of similar length share one causal call: padding stands at the end, where a causal query never looks, so
no mask is needed, and padded queries are thrown away. A sliding window is cut into blocks of its own width, each of
which sees itself and the block before it: [window, 2 window] masks whatever the length. Key heads that several query
heads share go to the kernel as they are, where a kernel takes them so, and are repeated where none does. Registered
with transformers as ATTENTION; the model passes the plan of a batch through as the keyword `segments`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

ATTENTION = "unlearn_packed"
# Sequences share a call while padding adds at most a quarter: below that a call's fixed cost weighs more.
MAX_PADDING = 1.25


@dataclass(frozen=True)
class Bucket:
    """Sequences that share one call. gather [b, L]: token of the pack at each place (padding repeats the last);
    valid [n]: the places, in the flattened [b * L], that hold a token, None where all do."""

    gather: Tensor
    valid: Tensor | None


@dataclass(frozen=True)
class Segments:
    """The plan of one packed batch: its buckets, and for each token its place in their concatenated outputs.

    order is None where the pack is one bucket in its own order: a single document, or chunks of one length. Then
    nothing is gathered at all.
    """

    buckets: tuple[Bucket, ...]
    order: Tensor | None

    @staticmethod
    def plan(lengths: Sequence[int], device: torch.device | str = "cpu") -> Segments:
        """Group sequences of these lengths (in pack order) into buckets of similar length."""
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        groups: list[list[int]] = []
        longest = tokens = 0
        for b in sorted(range(len(lengths)), key=lambda b: -lengths[b]):
            if groups and longest * (len(groups[-1]) + 1) <= MAX_PADDING * (tokens + lengths[b]):
                groups[-1].append(b)
                tokens += lengths[b]
            else:
                groups.append([b])
                longest = tokens = lengths[b]
        buckets, order = [], torch.empty(starts[-1], dtype=torch.int64)
        done = 0
        for group in groups:
            place = torch.arange(lengths[group[0]])
            length = torch.tensor([lengths[b] for b in group])[:, None]
            start = torch.tensor([starts[b] for b in group])[:, None]
            gather = start + torch.minimum(place, length - 1)
            valid = (place < length).flatten().nonzero().squeeze(1)
            order[gather.flatten()[valid]] = torch.arange(done, done + len(valid))
            done += len(valid)
            padded = len(valid) < gather.numel()
            # non_blocking: a blocking copy would wait for everything that the device still has to do
            buckets.append(
                Bucket(gather.to(device, non_blocking=True), valid.to(device, non_blocking=True) if padded else None)
            )
        in_order = len(buckets) == 1 and buckets[0].valid is None  # sorted() is stable
        return Segments(tuple(buckets), None if in_order else order.to(device, non_blocking=True))


class Projected(Exception):
    """Carries query, key, value and the attention's options out of a model's attention module, before its core ran.

    How a layer's own projections, norms and rotation are reached without its attention (unlearn.tiled).
    """

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> None:
        self.projected = (query, key, value, options)


def packed_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, T, D]
    key: Tensor,  # [1, kv_heads, T, D]
    value: Tensor,  # [1, kv_heads, T, Dv]
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    project_only: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a packed row. Returns [1, T, heads, Dv].

    project_only: computes nothing and raises Projected with the arguments that a later call has to pass.
    Raises ValueError for a row without a plan and for what it does not compute: masks, attention sinks, position
    biases, chunked attention, softcap with dropout, and windows that the model leaves to a mask.
    """
    if project_only:
        options = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window, "softcap": softcap}
        raise Projected(query, key, value, options | kwargs)
    if segments is None:
        raise ValueError(f"attention: {ATTENTION} needs a packed batch; call unlearn.model.hidden_states")
    _check_supported(module, max(bucket.gather.shape[1] for bucket in segments.buckets), sliding_window, kwargs)
    if attention_mask is not None:
        raise ValueError(f"attention: {type(module).__name__} got a mask; {ATTENTION} takes packed batches without one")
    if softcap is not None and dropout:
        raise ValueError(f"attention: dropout {dropout} with a softcap is not accepted; dropout 0 is")
    outputs = []
    for bucket in segments.buckets:
        q, k, v = (_take(tensor, bucket, in_order=segments.order is None) for tensor in (query, key, value))
        if sliding_window is not None and q.shape[2] > sliding_window:
            out = _windowed(q, k, v, sliding_window, scaling=scaling, dropout=dropout, softcap=softcap)
        else:
            out = _attend(q, k, v, None, scaling=scaling, dropout=dropout, softcap=softcap)
        out = out.transpose(1, 2).flatten(0, 1)
        outputs.append(out if bucket.valid is None else out.index_select(0, bucket.valid))
    if segments.order is None:
        return outputs[0].unsqueeze(0), None
    return torch.cat(outputs).index_select(0, segments.order).unsqueeze(0), None


def _check_supported(module: nn.Module, longest: int, sliding_window: int | None, kwargs: dict[str, Any]) -> None:
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attention: {type(module).__name__} uses {name}, which packed attention does not compute")
    # Some models narrow a layer's view by its mask alone, and packed attention makes no mask (Llama 4, Qwen2-MoE).
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    kind = kinds[layer] if kinds and layer is not None else None
    if kind == "full_attention" or sliding_window is not None:
        return
    name = "attention_chunk_size" if kind == "chunked_attention" else "sliding_window"
    width = getattr(config, name, None)
    if width and longest > width:  # 0 is how some configurations say that there is none
        raise ValueError(
            f"attention: {type(module).__name__} masks by {name} {width} what packed attention would see in"
            f" {longest} tokens; sequences of at most {width} are accepted"
        )


def _take(tensor: Tensor, bucket: Bucket, *, in_order: bool) -> Tensor:
    """[1, heads, T, D] -> the bucket's [b, heads, L, D]."""
    rows = tensor.squeeze(0).transpose(0, 1)  # the gradient of tensor[0] would be a copy
    if not in_order:
        rows = rows.index_select(0, bucket.gather.flatten())
    return rows.unflatten(0, tuple(bucket.gather.shape)).transpose(1, 2)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
) -> Tensor:
    """softmax(scores) v; mask [Lq, Lk] bool, True where a query sees a key, None for causal."""
    grouped = k.shape[1] != q.shape[1]
    if grouped and (softcap is not None or not takes_fewer_key_heads(q, k, v, mask, dropout)):
        k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], 1) for tensor in (k, v))
        grouped = False
    if softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=scaling, enable_gqa=grouped
        )
    # scaled_dot_product_attention has no cap tanh(score / cap) (Gemma 2): the scores in full, L x L per sequence
    scores = (q @ k.transpose(-1, -2)) * (scaling if scaling is not None else q.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, float("-inf"))
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    return scores.softmax(-1, dtype=accumulate).to(q.dtype) @ v


def takes_fewer_key_heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> bool:
    """Whether scaled_dot_product_attention has a kernel that reads each key head for all of its query heads.

    On CUDA flash attention does, and cuDNN; the memory-efficient kernel does not, and what neither takes (a mask,
    float32, older cards) would end in plain matrices, L x L per head. Flash attention alone is asked for: torch tries
    plain matrices before cuDNN, except where it prefers cuDNN to everything. On a CPU the kernel adds a group's
    gradients up in the inputs' dtype: in bf16 the keys' are 1.4 times as far off with groups of four, 3.3 times with
    groups of 32. The forward is the same to the bit.
    """
    if q.device.type == "cuda":
        asked = torch.backends.cuda.SDPAParams(q, k, v, mask, dropout, mask is None, True)
        return torch.backends.cuda.can_use_flash_attention(asked)
    return q.device.type == "cpu" and (q.dtype in (torch.float32, torch.float64) or not torch.is_grad_enabled())


def _windowed(q: Tensor, k: Tensor, v: Tensor, window: int, **options: Any) -> Tensor:
    """[b, heads, L, D], L > window: query i sees the keys j with 0 <= i - j < window.

    The first block of `window` queries is plainly causal; every other block sees itself and the block before.
    """
    batch, heads, length, _ = q.shape
    padding = -length % window  # at the end, where no causal query looks
    q, k, v = (F.pad(tensor, (0, 0, 0, padding)) for tensor in (q, k, v))
    first = _attend(q[:, :, :window], k[:, :, :window], v[:, :, :window], None, **options)
    q = q[:, :, window:].unflatten(2, (-1, window)).transpose(1, 2).flatten(0, 1)
    k, v = (tensor.unfold(2, 2 * window, window).movedim(-1, -2).transpose(1, 2).flatten(0, 1) for tensor in (k, v))
    # how far key j of the two blocks lies before query i of the second
    distance = torch.arange(window, device=q.device)[:, None] + window - torch.arange(2 * window, device=q.device)
    rest = _attend(q, k, v, (distance >= 0) & (distance < window), **options)
    rest = rest.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, rest], 2)[:, :, :length]


AttentionInterface.register(ATTENTION, packed_attention)
