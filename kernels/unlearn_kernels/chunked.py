"""The torch-in-chunks backend: every step in plain torch, for any device and dtype. Accuracy before speed.

Tensors end in shape letters: C rows of the chunk, R rows and K vocabulary columns of one tile, H hidden size, V
vocabulary, D width of whatever is multiplied with E (H for the head, the rank for LoRA, 1 for the bias), G the
reference's hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .chunked_distributions import kl_rows, token_stats
from .native import target_dot
from .tiles import (
    CPU_TILE,
    Scratch,
    blocks,
    fill_target_column,
    gather_rows,
    kl_scratch_elements,
    logits_tile,
    mm,
    native_product_dtype,
    operand,
    product_rows,
    scratch_elements,
    slice_bias,
    slice_lora,
)

__all__ = [
    "col_grad",
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

# Beyond 2**90 the row's E, S and gradient coefficient no longer share float32's range: 1 / S times E flushes to zero.
MAX_SUM = 2.0**90
# exp(-87) is float32's smallest normal number. Below it E is 0: denormals make exp 3-7 times and the two products 2
# times slower on x86, for terms at most e^-47 of the target's.
MIN_EXPONENT = -87.0


def target_logits(
    hidden_CH: Tensor,
    weight_VH: Tensor,
    targets_C: Tensor,
    bias_V: Tensor | None,
    lora_hidden_CR: Tensor | None,
    lora_b_VR: Tensor | None,
    logit_scale: float,
    softcap: float,
    out_C: Tensor,
    scratch: Tensor,
) -> None:
    """z_t[y_t] by a gather and a row-wise dot product, in out's precision. A target outside [0, V) gives NaN."""
    vocab, width = weight_VH.shape
    safe_C = targets_C.clamp(0, vocab - 1)
    if not target_dot(hidden_CH, weight_VH, safe_C, out=out_C):
        block = max(1, min(scratch.numel() // (2 * width), CPU_TILE[0] if not scratch.is_cuda else hidden_CH.shape[0]))
        for start, stop in blocks(hidden_CH.shape[0], block):
            rows_RH = scratch[: (stop - start) * width].view(-1, width)
            gather_rows(weight_VH, safe_C[start:stop], out=rows_RH).mul_(hidden_CH[start:stop])
            torch.sum(rows_RH, dim=1, out=out_C[start:stop])
    if bias_V is not None:
        out_C.add_(bias_V[safe_C])
    if lora_hidden_CR is not None and lora_b_VR is not None:
        out_C.add_((lora_hidden_CR * lora_b_VR[safe_C]).sum(1))
    out_C.mul_(logit_scale)
    if softcap:
        out_C.div_(softcap).tanh_().mul_(softcap)
    out_C.masked_fill_(safe_C != targets_C, float("nan"))


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
    """S_t = sum over v != y_t of exp(z_tv - offset_t); E = those terms, times the softcap's slope 1 - (z/cap)^2."""
    vocab, width = weight_VH.shape
    keeps_slope = e_CV is not None and softcap != 0.0
    regions = Scratch(scratch, hidden_CH.shape[0], width, vocab, planes=2 if keeps_slope else 1)
    native = native_product_dtype(hidden_CH, weight_VH)
    # float32 and float64 logits are computed in E's own memory and exponentiated there.
    in_place = e_CV is not None and e_CV.dtype == scratch.dtype
    for start, stop in blocks(hidden_CH.shape[0], regions.rows):
        rows = slice(start, stop)
        hidden_RH = operand(hidden_CH[rows], regions.rows_region(stop - start, width), native)
        total_R = torch.zeros(stop - start, dtype=torch.float64, device=scratch.device)
        for first, last in blocks(vocab, regions.cols):
            cols = slice(first, last)
            z_RK = e_CV[rows, cols] if in_place and e_CV is not None else regions.tile(stop - start, last - first)
            weight_KH = operand(weight_VH[cols], regions.vocab_region(last - first, width), native)
            lora = slice_lora(lora_hidden_CR, lora_b_VR, rows, cols)
            logits_tile(z_RK, hidden_RH, weight_KH, slice_bias(bias_V, cols), lora, logit_scale, softcap)
            if keeps_slope:
                slope_RK = torch.mul(z_RK, z_RK, out=regions.tile(stop - start, last - first, plane=1))
                slope_RK.mul_(-1.0 / softcap**2).add_(1.0)
            z_RK.sub_(offset_C[rows, None])
            fill_target_column(z_RK, targets_C[rows], first, -torch.inf)
            if z_RK.dtype == torch.float32:
                torch.threshold_(z_RK, MIN_EXPONENT, -torch.inf)
            z_RK.exp_()
            total_R.add_(z_RK.sum(1))
            if keeps_slope:
                z_RK.mul_(slope_RK)
            if e_CV is not None and not in_place:
                e_CV[rows, cols].copy_(z_RK)
        sums_C[rows].copy_(total_R)


def redo_rows(
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
    """Rows whose S left float32's useful range get their own offset, the row's maximum, and are computed again.

    Finding them is a host synchronisation on CUDA; they are rare, and a good row costs one comparison.
    """
    bad = (sums_C > MAX_SUM).nonzero()[:, 0]
    if bad.numel() == 0:
        return
    vocab = weight_VH.shape[0]
    row_bytes = vocab * (1 if e_CV is None else e_CV.dtype.itemsize)
    for start, stop in blocks(bad.numel(), max(1, scratch.numel() * scratch.dtype.itemsize // row_bytes)):
        rows = bad[start:stop]
        lora_hidden = None if lora_hidden_CR is None else lora_hidden_CR[rows]
        offset, sums = offset_C[rows], sums_C[rows]
        e = None if e_CV is None else e_CV.new_empty(stop - start, vocab)
        head = (bias_V, lora_hidden, lora_b_VR, logit_scale, softcap)
        _row_maximum(hidden_CH[rows], weight_VH, *head, offset, scratch)
        exp_sums(hidden_CH[rows], weight_VH, targets_C[rows], *head, offset, sums, e, scratch)
        offset_C[rows], sums_C[rows] = offset, sums
        if e_CV is not None:
            e_CV[rows] = e


def _row_maximum(
    hidden_CH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    lora_hidden_CR: Tensor | None,
    lora_b_VR: Tensor | None,
    logit_scale: float,
    softcap: float,
    out_C: Tensor,
    scratch: Tensor,
) -> None:
    vocab, width = weight_VH.shape
    regions = Scratch(scratch, hidden_CH.shape[0], width, vocab, planes=1)
    native = native_product_dtype(hidden_CH, weight_VH)
    out_C.fill_(-torch.inf)
    for start, stop in blocks(hidden_CH.shape[0], regions.rows):
        rows = slice(start, stop)
        hidden_RH = operand(hidden_CH[rows], regions.rows_region(stop - start, width), native)
        for first, last in blocks(vocab, regions.cols):
            cols = slice(first, last)
            z_RK = regions.tile(stop - start, last - first)
            weight_KH = operand(weight_VH[cols], regions.vocab_region(last - first, width), native)
            lora = slice_lora(lora_hidden_CR, lora_b_VR, rows, cols)
            logits_tile(z_RK, hidden_RH, weight_KH, slice_bias(bias_V, cols), lora, logit_scale, softcap)
            out_C[rows] = torch.maximum(out_C[rows], z_RK.amax(1))


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
    """out_t (+)= target_coeff_t matrix[y_t] - e_coeff_t (E matrix)_t, accumulated in the scratch's dtype."""
    vocab, width = matrix_VD.shape
    regions = Scratch(scratch, e_CV.shape[0], width, vocab, planes=1)
    for start, stop in blocks(e_CV.shape[0], regions.rows):
        rows = slice(start, stop)
        acc_RD = regions.rows_region(stop - start, width)
        product_rows(acc_RD, e_CV[rows], matrix_VD, regions)
        acc_RD.mul_(e_coeff_C[rows, None].neg())
        if targets_C is not None and target_coeff_C is not None:
            safe_R = targets_C[rows].clamp(0, vocab - 1)
            for first, last in blocks(stop - start, regions.cols):
                # The vocabulary region is free again; it has room for this many rows.
                picked = gather_rows(matrix_VD, safe_R[first:last], out=regions.vocab_region(last - first, width))
                coeff = target_coeff_C[start + first : start + last, None]
                acc_RD[first:last].addcmul_(coeff, picked)
        if accumulate:
            acc_RD.add_(out_CD[rows])
        out_CD[rows].copy_(acc_RD)


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
    """out_v (+)= sum over t with y_t = v of target_coeff_t rows_t - sum_t e_tv e_coeff_t rows_t."""
    num_rows, vocab = e_CV.shape
    width = rows_CD.shape[1]
    regions = Scratch(scratch, num_rows, width, vocab, planes=1)
    native = native_product_dtype(e_CV, e_CV)
    direct = out_VD.dtype == scratch.dtype
    for first, last in blocks(vocab, regions.cols):
        acc_KD = out_VD[first:last] if direct else regions.vocab_region(last - first, width)
        if not direct and accumulate:
            acc_KD.copy_(out_VD[first:last])
        for start, stop in blocks(num_rows, regions.rows):
            e_RK = operand(e_CV[start:stop, first:last], regions.tile(stop - start, last - first), native)
            scaled_RD = regions.rows_region(stop - start, width)
            scaled_RD.copy_(rows_CD[start:stop]).mul_(e_coeff_C[start:stop, None])
            scaled_RD = scaled_RD if native is None else scaled_RD.to(native)
            mm(acc_KD, e_RK.T, scaled_RD, accumulate=accumulate or start > 0, alpha=-1.0)
        if not direct:
            out_VD[first:last].copy_(acc_KD)
    if targets_C is not None and target_coeff_C is not None:
        add_target_rows(out_VD, rows_CD, target_coeff_C, targets_C, scratch)


def add_target_rows(out_VD: Tensor, rows_CD: Tensor, coeff_C: Tensor, targets_C: Tensor, scratch: Tensor) -> None:
    """out[y_t] += coeff_t rows_t. Rows of equal target are summed first, in the scratch's dtype and in row order.

    A stable sort and segment sums instead of atomics: same bits every run, and out is rounded once per label, however
    often the label occurs. Columns are taken in blocks, never rows, or a frequent label would be rounded once per
    block.
    """
    num_rows, width = rows_CD.shape
    targets_C = targets_C.clamp(0, out_VD.shape[0] - 1)
    sorted_C, order_C = torch.sort(targets_C, stable=True)
    starts_C = torch.ones_like(sorted_C)
    starts_C[1:] = sorted_C[1:] != sorted_C[:-1]
    segment_C = starts_C.cumsum(0) - 1
    # As many segments as rows: the number of distinct targets is known to the device only. The empty ones repeat the
    # last real one, so that index_copy_ writes the same bits twice.
    length_C = torch.zeros_like(sorted_C).scatter_add_(0, segment_C, torch.ones_like(sorted_C))
    real_C = torch.minimum(torch.arange(num_rows, device=segment_C.device), segment_C[-1])
    label_C = sorted_C[(length_C.cumsum(0) - length_C)[real_C]]
    for first, last in blocks(width, max(1, min(width, scratch.numel() // num_rows))):
        picked = scratch[: num_rows * (last - first)].view(num_rows, -1) if scratch.numel() >= num_rows else None
        terms = rows_CD[order_C, first:last] if picked is None else picked.copy_(rows_CD[:, first:last][order_C])
        terms = terms.to(scratch.dtype).mul_(coeff_C[order_C, None])
        sums = torch.segment_reduce(terms, "sum", lengths=length_C, axis=0, unsafe=True)[real_C]
        sums.add_(out_VD[label_C, first:last])
        out_VD[:, first:last].index_copy_(0, label_C, sums.to(out_VD.dtype))


def matmul(x: Tensor, y: Tensor, alpha: float, accumulate: bool, out: Tensor) -> None:
    """out (+)= alpha x y for the thin LoRA products, in at least float32; out may be 16-bit and is rounded once."""
    dtype = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
    product = x.to(dtype) @ y.to(dtype)
    if alpha != 1.0:
        product.mul_(alpha)
    out.copy_(product.add_(out) if accumulate else product)


def finish_rows(
    target_logit_C: Tensor,
    offset_C: Tensor,
    sums_C: Tensor,
    logit_scale: float,
    softcap: float,
    value_C: Tensor,
    target_coeff_C: Tensor,
    e_coeff_C: Tensor,
) -> None:
    """Log-probability (float64) and gradient coefficients of each row from z_y, m and S; float64: it is N numbers only.

    d is taken as m - z_y and not as 40: adding 40 to z_y rounds, and the rounded m is what E was computed with.
    """
    d_C = offset_C.double() - target_logit_C.double()
    sums_C = sums_C.double()
    e_y_C = torch.exp(-d_C)
    total_C = sums_C + e_y_C
    logprob_C = torch.where(sums_C < e_y_C, -torch.log1p(sums_C / e_y_C), -d_C - torch.log(total_C))
    slope = 1.0 - (target_logit_C.double() / softcap).square() if softcap else 1.0
    value_C.copy_(logprob_C)
    target_coeff_C.copy_(-torch.expm1(logprob_C) * logit_scale * slope)
    e_coeff_C.copy_(logit_scale / total_C)


def segment_sums(value_N: Tensor, boundaries: Tensor, out_B: Tensor) -> None:
    """out_b = sum of value[boundaries[b]:boundaries[b + 1]] in float64 and in row order: a sequence's sum is a function
    of its rows alone."""
    out_B.copy_(torch.segment_reduce(value_N, "sum", offsets=boundaries.long(), axis=0))
