"""The native backend: the torch backend's steps on a CPU, with what costs time compiled (kernels/native).

bf16 heads on a CPU with bf16 tile products (AMX, AVX-512 BF16) run fused, tile by tile. For other dtypes and CPUs the
products are the library's and the exponentials compiled. What neither serves (a scratch of a few rows, a weight without
contiguous rows, thin LoRA products) is the torch backend's.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from . import chunked, tiles
from .chunked import finish_rows, matmul, redo_rows, segment_sums, target_logits
from .chunked_distributions import fill_kl_logits, finish_stats, kl_split
from .native import operators, serves_bf16
from .tiles import Scratch, blocks, logits_tile, operand, slice_bias, slice_lora

__all__ = [
    "col_grad",
    "empty",
    "exp_sums",
    "finish_rows",
    "kl_rows",
    "kl_scratch_elements",
    "matmul",
    "redo_rows",
    "row_grad",
    "scratch_elements",
    "segment_sums",
    "target_logits",
    "token_stats",
]

# what the kernels want for each thread's tiles, in float32: 3 MiB
_ROOM = (os.cpu_count() or 1) * (3 << 18)
_SUMS_WIDTH = (os.cpu_count() or 1) * 1024
# glibc maps blocks from here on anew each time, at most
_LARGE = 32 << 20


def scratch_elements(
    num_rows: int, width: int, vocab: int, *, is_cuda: bool, max_elements: int, gradients: bool
) -> int:
    """Rows packed for the products (16 bits), or a row gradient's float32 sums of 1024 columns a thread, and 3 MiB a
    thread. The kernels take fewer rows at a time if they get less."""
    rows = num_rows * (max(width // 2, min(width, _SUMS_WIDTH), 32) + 64)
    at_least = chunked.scratch_elements(
        num_rows, width, vocab, is_cuda=is_cuda, max_elements=max_elements, gradients=gradients
    )
    return max(at_least, min(rows + _ROOM, max_elements))


def kl_scratch_elements(
    num_rows: int, width: int, vocab: int, *, is_cuda: bool, max_elements: int, gradients: bool
) -> int:
    """Both models' logits of some rows beside what a product of that many rows wants."""
    rows = min(num_rows, 512)
    at_least = chunked.kl_scratch_elements(
        num_rows, width, vocab, is_cuda=is_cuda, max_elements=max_elements, gradients=gradients
    )
    return max(at_least, min(rows * (2 * vocab + width + 64) + _ROOM, max_elements))


def prefers_columns(hidden: Tensor, weight: Tensor) -> bool:
    return _fused(hidden, weight)


def empty(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Large memory from what earlier calls gave back (pool.cpp). A trace, and tensors that only stand for memory, see
    torch.empty."""
    large = math.prod(shape) * dtype.itemsize >= _LARGE
    if large and type(like) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling():
        return operators().pooled_empty(shape, dtype)
    return tiles.empty(shape, dtype, like)


def _fused(*matrices: Tensor) -> bool:
    """Whether the fused kernels serve these operands."""
    return serves_bf16() and all(x.dtype == torch.bfloat16 and x.stride(-1) == 1 for x in matrices)


def exp_sums(
    hidden_CH: Tensor,
    weight_VH: Tensor,
    targets_C: Tensor,
    bias_V: Tensor | None,
    lora_hidden_CR: Tensor | None,
    lora_b_VR: Tensor | None,
    logit_scale: float,
    softcap: float,
    offset_C: Tensor,
    sums_C: Tensor,
    e_CV: Tensor | None,
    scratch: Tensor,
) -> None:
    inputs = (hidden_CH, weight_VH, targets_C, bias_V, lora_hidden_CR, lora_b_VR, logit_scale, softcap)
    if _fused(hidden_CH, weight_VH) and operators().exp_sums(*inputs, offset_C, sums_C, e_CV, scratch):
        return
    if offset_C.dtype != torch.float32:
        chunked.exp_sums(*inputs, offset_C, sums_C, e_CV, scratch)
        return
    _exp_sums_of_products(*inputs, offset_C, sums_C, e_CV, scratch)


def _exp_sums_of_products(
    hidden_CH: Tensor,
    weight_VH: Tensor,
    targets_C: Tensor,
    bias_V: Tensor | None,
    lora_hidden_CR: Tensor | None,
    lora_b_VR: Tensor | None,
    logit_scale: float,
    softcap: float,
    offset_C: Tensor,
    sums_C: Tensor,
    e_CV: Tensor | None,
    scratch: Tensor,
) -> None:
    """Tiles by the library's float32 product, everything else in one compiled pass over them."""
    vocab, width = weight_VH.shape
    regions = Scratch(scratch, hidden_CH.shape[0], width, vocab, planes=1)
    in_place = e_CV is not None and e_CV.dtype == torch.float32
    for start, stop in blocks(hidden_CH.shape[0], regions.rows):
        rows = slice(start, stop)
        hidden_RH = operand(hidden_CH[rows], regions.rows_region(stop - start, width), None)
        total_R = torch.zeros(stop - start, dtype=torch.float64)
        for first, last in blocks(vocab, regions.cols):
            cols = slice(first, last)
            z_RK = e_CV[rows, cols] if in_place and e_CV is not None else regions.tile(stop - start, last - first)
            weight_KH = operand(weight_VH[cols], regions.vocab_region(last - first, width), None)
            lora = slice_lora(lora_hidden_CR, lora_b_VR, rows, cols)
            logits_tile(z_RK, hidden_RH, weight_KH, None, lora, 1.0, 0.0)
            head = (slice_bias(bias_V, cols), logit_scale, softcap)
            operators().exp_rows(z_RK, targets_C[rows], *head, offset_C[rows], first, total_R)
            if e_CV is not None and not in_place:
                e_CV[rows, cols].copy_(z_RK)
        sums_C[rows].copy_(total_R)


def row_grad(
    e_CV: Tensor,
    matrix_VD: Tensor,
    targets_C: Tensor | None,
    target_coeff_C: Tensor | None,
    e_coeff_C: Tensor,
    accumulate: bool,
    out_CD: Tensor,
    scratch: Tensor,
) -> None:
    inputs = (e_CV, matrix_VD, targets_C, target_coeff_C, e_coeff_C, accumulate)
    served = _fused(e_CV, matrix_VD) and _writable(out_CD) and matrix_VD.shape[1] >= 32
    if not (served and operators().row_grad(*inputs, out_CD, scratch)):
        chunked.row_grad(*inputs, out_CD, scratch)


def col_grad(
    e_CV: Tensor,
    rows_CD: Tensor,
    targets_C: Tensor | None,
    target_coeff_C: Tensor | None,
    e_coeff_C: Tensor,
    accumulate: bool,
    out_VD: Tensor,
    scratch: Tensor,
) -> None:
    inputs = (e_CV, rows_CD, targets_C, target_coeff_C, e_coeff_C, accumulate)
    served = _fused(e_CV, rows_CD) and _writable(out_VD) and rows_CD.shape[1] >= 32
    if not (served and operators().col_grad(*inputs, out_VD, scratch)):
        chunked.col_grad(*inputs, out_VD, scratch)


def _writable(out: Tensor) -> bool:
    return out.dtype in (torch.float32, torch.bfloat16) and out.stride(-1) == 1


def token_stats(
    hidden_CH: Tensor,
    weight_VH: Tensor,
    targets_C: Tensor,
    bias_V: Tensor | None,
    lora_hidden_CR: Tensor | None,
    lora_b_VR: Tensor | None,
    logit_scale: float,
    softcap: float,
    stats_4C: Tensor,
    scratch: Tensor,
) -> None:
    inputs = (hidden_CH, weight_VH, targets_C, bias_V, lora_hidden_CR, lora_b_VR, logit_scale, softcap)
    moments_5C = torch.empty(5, hidden_CH.shape[0], dtype=torch.float64)
    if _fused(hidden_CH, weight_VH) and operators().token_stats(*inputs, moments_5C, scratch):
        target, argmax, log_mass, mean, variance = moments_5C
        stats_4C.copy_(finish_stats(target, argmax, log_mass, mean, variance, targets_C, weight_VH.shape[0]))
    else:
        chunked.token_stats(*inputs, stats_4C, scratch)


def kl_rows(
    hidden_CH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    lora_hidden_CR: Tensor | None,
    lora_b_VR: Tensor | None,
    ref_hidden_CG: Tensor,
    ref_weight_VG: Tensor,
    logit_scale: float,
    softcap: float,
    kl_C: Tensor,
    g_CV: Tensor | None,
    scratch: Tensor,
) -> None:
    """Both models' logits of some rows in the scratch, then one compiled pass over them."""
    policy = (hidden_CH, weight_VH, bias_V, lora_hidden_CR, lora_b_VR)
    scalars = (logit_scale, softcap)
    if kl_C.dtype != torch.float32:
        chunked.kl_rows(*policy, ref_hidden_CG, ref_weight_VG, *scalars, kl_C, g_CV, scratch)
        return
    fill: _Fill = _FillByTiles(scratch, hidden_CH, weight_VH, ref_weight_VG)
    if _fused(hidden_CH, weight_VH, ref_hidden_CG, ref_weight_VG):
        fused = _FillFused(scratch, hidden_CH, weight_VH, ref_weight_VG)
        fill = fused if fused.rows >= fill.rows else fill
    vocab = weight_VH.shape[0]
    for start, stop in blocks(hidden_CH.shape[0], fill.rows):
        rows, count = slice(start, stop), stop - start
        z_RV, r_RV = fill.logits[: 2 * count * vocab].view(2, count, vocab)
        fill(z_RV, *policy, rows, *scalars)
        fill(r_RV, ref_hidden_CG, ref_weight_VG, None, None, None, rows, *scalars)
        operators().kl_rows(z_RV, r_RV, softcap, kl_C[rows], None if g_CV is None else g_CV[rows])


class _FillByTiles:
    """The torch backend's way to whole rows of logits."""

    def __init__(self, scratch: Tensor, hidden: Tensor, weight: Tensor, ref_weight: Tensor) -> None:
        vocab, wide = weight.shape[0], max(weight.shape[1], ref_weight.shape[1])
        self.split = kl_split(scratch, hidden.shape[0], vocab, wide)
        self.rows, self.logits = self.split.rows, self.split.logits

    def __call__(self, out_RV: Tensor, *inputs: Any) -> None:
        fill_kl_logits(out_RV, self.split, *inputs)


class _FillFused:
    """Rows of logits at the front of the scratch, what their products want behind them."""

    def __init__(self, scratch: Tensor, hidden: Tensor, weight: Tensor, ref_weight: Tensor) -> None:
        vocab, wide = weight.shape[0], max(weight.shape[1], ref_weight.shape[1])
        self.rows = min(hidden.shape[0], (scratch.numel() - _ROOM) // (2 * vocab + wide + 64))
        self.logits = scratch[: 2 * max(0, self.rows) * vocab]
        self.rest = scratch[self.logits.numel() :]

    def __call__(
        self,
        out_RV: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_hidden: Tensor | None,
        lora_b: Tensor | None,
        rows: slice,
        logit_scale: float,
        softcap: float,
    ) -> None:
        lora_hidden = None if lora_hidden is None else lora_hidden[rows]
        head = (bias, lora_hidden, lora_b, logit_scale, softcap)
        if not operators().logits(hidden[rows], weight, *head, out_RV, self.rest):
            raise RuntimeError(f"{self.rest.numel()} elements of scratch are too few for a width of {weight.shape[1]}")


_Fill = _FillByTiles | _FillFused
