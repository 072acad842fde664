"""What a caller can get wrong, refused before anything is launched, with the argument, its value and what is
accepted."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_HALF = (torch.bfloat16, torch.float16)


def refuse(name: str, value: Any, accepted: str) -> None:
    raise ValueError(f"{name} is {value}; accepted: {accepted}")


def _tensor(name: str, value: Any, ndim: int, accepted: str) -> None:
    if not isinstance(value, Tensor):
        refuse(name, f"a {type(value).__name__}", f"a Tensor {accepted}")
    if type(value).__name__ == "DTensor":
        refuse(name, "a DTensor", "a plain Tensor (gather it with .full_tensor() first)")
    if value.ndim != ndim:
        refuse(f"{name}.shape", tuple(value.shape), accepted)


def check_hidden_weight(
    hidden: Tensor, weight: Tensor, hidden_name: str = "hidden", weight_name: str = "weight"
) -> None:
    _tensor(hidden_name, hidden, 2, "[N, H]")
    _tensor(weight_name, weight, 2, "[V, H]")
    if hidden.shape[0] == 0:
        refuse(f"{hidden_name}.shape", tuple(hidden.shape), "[N, H] with N >= 1 (an empty batch has no loss)")
    if weight.shape[0] == 0 or weight.shape[1] != hidden.shape[1] or hidden.shape[1] == 0:
        refuse(
            f"{weight_name}.shape", tuple(weight.shape), f"[V, {hidden.shape[1]}] with V >= 1, to match {hidden_name}"
        )
    for name, value in ((hidden_name, hidden), (weight_name, weight)):
        if value.dtype not in _DTYPES:
            refuse(f"{name}.dtype", value.dtype, "bfloat16, float16, float32 or float64")
    mixed = weight.dtype == torch.float32 and hidden.dtype in _HALF
    if hidden.dtype != weight.dtype and not mixed:
        refuse(
            f"{weight_name}.dtype",
            weight.dtype,
            f"{hidden.dtype} as {hidden_name}, or float32 beside a 16-bit {hidden_name}",
        )
    same_device(weight_name, weight, hidden)


def same_device(name: str, value: Tensor, hidden: Tensor) -> None:
    if value.device != hidden.device:
        refuse(f"{name}.device", value.device, f"{hidden.device} as hidden")


def _head_dtype(name: str, value: Tensor, hidden: Tensor, weight: Tensor) -> None:
    accepted = {hidden.dtype, weight.dtype}
    if hidden.dtype != torch.float64:
        accepted.add(torch.float32)
    if value.dtype not in accepted:
        refuse(f"{name}.dtype", value.dtype, " or ".join(sorted(str(dtype) for dtype in accepted)))


def check_head(hidden: Tensor, weight: Tensor, bias: Any, logit_scale: Any, softcap: Any, lora: Any) -> None:
    vocab, width = weight.shape
    if bias is not None:
        _tensor("bias", bias, 1, "[V]")
        if bias.shape[0] != vocab:
            refuse("bias.shape", tuple(bias.shape), f"[{vocab}], one per row of weight")
        _head_dtype("bias", bias, hidden, weight)
        same_device("bias", bias, hidden)
    if isinstance(logit_scale, Tensor) or not math.isfinite(logit_scale) or logit_scale == 0:
        refuse("logit_scale", logit_scale, "a finite float that is not 0")
    if softcap is not None and (isinstance(softcap, Tensor) or not math.isfinite(softcap) or softcap <= 0):
        refuse("softcap", softcap, "a positive float, or None")
    if lora is None:
        return
    if not isinstance(lora, (tuple, list)) or len(lora) != 3:
        refuse("lora", f"a {type(lora).__name__}", "(A [r, H], B [V, r], s)")
    lora_a, lora_b, lora_scale = lora
    _tensor("lora[0]", lora_a, 2, "[r, H]")
    _tensor("lora[1]", lora_b, 2, "[V, r]")
    if lora_a.shape[0] == 0 or lora_a.shape[1] != width:
        refuse("lora[0].shape", tuple(lora_a.shape), f"[r, {width}] with r >= 1")
    if tuple(lora_b.shape) != (vocab, lora_a.shape[0]):
        refuse("lora[1].shape", tuple(lora_b.shape), f"[{vocab}, {lora_a.shape[0]}]")
    for index, value in enumerate((lora_a, lora_b)):
        _head_dtype(f"lora[{index}]", value, hidden, weight)
        same_device(f"lora[{index}]", value, hidden)
    if isinstance(lora_scale, Tensor) or not math.isfinite(lora_scale):
        refuse("lora[2]", lora_scale, "a finite float")


def check_options(options: Any) -> None:
    if options.workspace_bytes is not None and options.workspace_bytes <= 0:
        refuse("options.workspace_bytes", options.workspace_bytes, "a positive number of bytes, or None")
    if not 0.0 <= options.skip_below < 1.0:
        refuse("options.skip_below", options.skip_below, "a share in [0, 1)")


def check_targets(targets: Tensor, hidden: Tensor, vocab: int) -> None:
    """Shape, dtype, device; and the range on the CPU. Elsewhere looking at values would stop the host: see
    `deferred`."""
    _tensor("targets", targets, 1, "[N]")
    if targets.shape[0] != hidden.shape[0]:
        refuse("targets.shape", tuple(targets.shape), f"[{hidden.shape[0]}], one per row of hidden")
    if targets.dtype != torch.int64:
        refuse("targets.dtype", targets.dtype, "torch.int64")
    same_device("targets", targets, hidden)
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        check_target_values(targets, vocab)


def check_target_values(targets: Tensor, vocab: int) -> None:
    lowest, highest = (int(value) for value in targets.aminmax())
    if lowest < 0 or highest >= vocab:
        bad = (targets < 0) | (targets >= vocab)
        row = int(bad.nonzero()[0, 0])
        refuse(f"targets[{row}]", int(targets[row]), f"0 to {vocab - 1} (weight has {vocab} rows)")


def check_cu_seqlens(cu_seqlens: Tensor, hidden: Tensor) -> None:
    """Shape, dtype, device; the values are checked by check_boundaries."""
    _tensor("cu_seqlens", cu_seqlens, 1, "[B + 1]")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        refuse("cu_seqlens.dtype", cu_seqlens.dtype, "torch.int32 or torch.int64")
    if cu_seqlens.shape[0] < 2:
        refuse("cu_seqlens.shape", tuple(cu_seqlens.shape), "[B + 1] with B >= 1")
    same_device("cu_seqlens", cu_seqlens, hidden)


def check_boundaries(boundaries: list[int], num_tokens: int) -> None:
    if boundaries[0] != 0:
        refuse("cu_seqlens[0]", boundaries[0], "0")
    for b in range(len(boundaries) - 1):
        if boundaries[b + 1] <= boundaries[b]:
            refuse(
                f"cu_seqlens[{b}:{b + 2}]",
                boundaries[b : b + 2],
                "strictly rising values (an empty sequence has no log-likelihood)",
            )
    if boundaries[-1] != num_tokens:
        refuse("cu_seqlens[-1]", boundaries[-1], f"{num_tokens}, the number of rows of hidden")


def check_groups(groups: Any, num_sequences: int) -> list[int]:
    """Group sizes as ints; None is groups of one."""
    if groups is None:
        return [1] * num_sequences
    sizes = [int(size) for size in (groups.tolist() if isinstance(groups, Tensor) else groups)]
    if any(size < 1 for size in sizes) or sum(sizes) != num_sequences:
        refuse("groups", sizes, f"positive sizes that add up to {num_sequences}, the number of sequences")
    return sizes


def check_positive(name: str, value: Any) -> None:
    if isinstance(value, Tensor) or not (math.isfinite(value) and value > 0):
        refuse(name, value, "a positive float")


def check_finite(name: str, value: Any) -> None:
    if isinstance(value, Tensor) or not math.isfinite(value):
        refuse(name, value, "a finite float")
