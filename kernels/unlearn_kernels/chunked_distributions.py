"""The torch backend's two steps that look at whole distributions: statistics of log p, and the KL divergence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .tiles import (
    CPU_TILE,
    Scratch,
    blocks,
    fill_target_column,
    logits_tile,
    native_product_dtype,
    operand,
    slice_bias,
    slice_lora,
)


def token_stats(
    hidden_CH: Tensor,
    weight_VH: Tensor,
    targets_C: Tensor,
    bias_V: Tensor | None,
    lora_hidden_CR: Tensor | None,
    lora_b_VR: Tensor | None,
    logit_scale: float,
    softcap: float,
    stats_4C: Tensor,  # float64: logprob, is_argmax (0 or 1), mean, variance
    scratch: Tensor,
) -> None:
    """One pass with an online maximum; moments are merged tile by tile (Chan et al. 1979), never as E[x^2] - E[x]^2."""
    vocab, width = weight_VH.shape
    regions = Scratch(scratch, hidden_CH.shape[0], width, vocab, planes=2)
    native = native_product_dtype(hidden_CH, weight_VH)
    for start, stop in blocks(hidden_CH.shape[0], regions.rows):
        rows = slice(start, stop)
        hidden_RH = operand(hidden_CH[rows], regions.rows_region(stop - start, width), native)
        state = _Moments(stop - start, scratch.device)
        for first, last in blocks(vocab, regions.cols):
            cols = slice(first, last)
            z_RK = regions.tile(stop - start, last - first)
            weight_KH = operand(weight_VH[cols], regions.vocab_region(last - first, width), native)
            lora = slice_lora(lora_hidden_CR, lora_b_VR, rows, cols)
            logits_tile(z_RK, hidden_RH, weight_KH, slice_bias(bias_V, cols), lora, logit_scale, softcap)
            state.add_tile(z_RK, regions.tile(stop - start, last - first, plane=1), targets_C[rows], first)
        stats_4C[:, rows] = state.finish(targets_C[rows], vocab)


class _Moments:
    """Per row, float64 [R]: the maximum and its lowest index; log mass, mean and variance of z over v != y."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        def row(value: float) -> Tensor:
            return torch.full((num_rows,), value, dtype=torch.float64, device=device)

        self.maximum, self.target = row(-torch.inf), row(torch.nan)
        self.argmax = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.log_mass, self.mean, self.variance = row(-torch.inf), row(0.0), row(0.0)

    def add_tile(self, z_RK: Tensor, p_RK: Tensor, targets_R: Tensor, first: int) -> None:
        """Merges one tile of logits. z and p are overwritten."""
        top_R, index_R = z_RK.max(1)
        column_R = targets_R - first
        inside_R = (column_R >= 0) & (column_R < z_RK.shape[1])
        target_R = z_RK.gather(1, column_R.clamp(0, z_RK.shape[1] - 1)[:, None])[:, 0].double()
        self.target = torch.where(inside_R, target_R, self.target)
        # Strictly greater: an equal maximum in an earlier tile has the lower index and stays.
        self.argmax = torch.where(top_R > self.maximum, index_R + first, self.argmax)
        self.maximum = torch.maximum(self.maximum, top_R.double())
        # The tile's own maximum offsets its exponents, so its mass lies in [1, K] (or below, without the target).
        base_R = torch.where(torch.isfinite(top_R), top_R, 0.0)
        # -1e4 stands for -inf (a masked token): its probability is 0 all the same, and 0 x 1e4 is not NaN.
        z_RK.sub_(base_R[:, None]).clamp_(min=-1e4)
        torch.exp(z_RK, out=p_RK)
        fill_target_column(p_RK, targets_R, first, 0.0)
        mass_R = p_RK.sum(1).double()
        safe_mass_R = mass_R.clamp(min=1e-300)
        mean_R = (p_RK * z_RK).sum(1).double() / safe_mass_R
        square_R = p_RK.mul_(z_RK.sub_(mean_R[:, None].to(z_RK.dtype)).square_()).sum(1).double()
        more = (mass_R.log() + base_R, mean_R + base_R, square_R / safe_mass_R)
        self.log_mass, self.mean, self.variance = _merged((self.log_mass, self.mean, self.variance), more)

    def finish(self, targets_R: Tensor, vocab: int) -> Tensor:
        moments = (self.log_mass, self.mean, self.variance)
        return finish_stats(self.target, self.argmax, *moments, targets_R, vocab)


_Mass = tuple[Tensor, Tensor, Tensor]  # log mass, mean, variance


def _merged(some: _Mass, more: _Mass) -> _Mass:
    (log_mass, mean, variance), (more_mass, more_mean, more_variance) = some, more
    total = torch.logaddexp(log_mass, more_mass)
    share = torch.nan_to_num(torch.exp(more_mass - total), nan=0.0)
    delta = more_mean - mean
    variance = (1 - share) * variance + share * more_variance + share * (1 - share) * delta.square()
    return total, mean + share * delta, variance


def finish_stats(
    target_R: Tensor,
    argmax_R: Tensor,
    log_mass_R: Tensor,
    mean_R: Tensor,
    variance_R: Tensor,
    targets_R: Tensor,
    vocab: int,
) -> Tensor:
    """[4, R]: logprob, is_argmax, mean and variance of log p, from the target's logit, the index of the largest, and
    log mass, mean and variance of the others. A target outside [0, V) gives NaN."""
    valid_R = (targets_R >= 0) & (targets_R < vocab)
    # log p_y = -log(1 + rest / e_y): keeps its relative accuracy when p_y is next to 1.
    logprob = -torch.nn.functional.softplus(log_mass_R - target_R, threshold=40.0)
    others = (log_mass_R, mean_R, variance_R)
    log_mass, mean, variance = _merged(others, (target_R, target_R, torch.zeros_like(target_R)))
    is_argmax = (argmax_R == targets_R).double()
    stats = torch.stack([logprob, is_argmax, mean - log_mass, variance])
    return torch.where(valid_R, stats, torch.nan)


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
    """KL(ref || policy) per row, and G = (p - q) times the softcap's slope: minus the gradient's E.

    Both models' logits of a few rows lie in the scratch, so no online maximum is needed here and the sum has terms
    q (expm1(u) - u) >= 0, u = log p - log q: no cancellation where policy and reference nearly agree.
    """
    vocab = weight_VH.shape[0]
    split = kl_split(scratch, hidden_CH.shape[0], vocab, max(weight_VH.shape[1], ref_weight_VG.shape[1]))
    piece_rows = max(1, split.cols * 64 // vocab)
    for start, stop in blocks(hidden_CH.shape[0], split.rows):
        rows = slice(start, stop)
        z_RV, r_RV = split.logits[: 2 * (stop - start) * vocab].view(2, stop - start, vocab)
        policy = (hidden_CH, weight_VH, bias_V, lora_hidden_CR, lora_b_VR)
        fill_kl_logits(z_RV, split, *policy, rows, logit_scale, softcap)
        fill_kl_logits(r_RV, split, ref_hidden_CG, ref_weight_VG, None, None, None, rows, logit_scale, softcap)
        for part in range(0, stop - start, piece_rows):
            piece = slice(part, min(part + piece_rows, stop - start))
            out = slice(start + piece.start, start + piece.stop)
            _kl_piece(z_RV[piece], r_RV[piece], softcap, kl_C[out], None if g_CV is None else g_CV[out])


class KLSplit(NamedTuple):
    """A scratch cut up for KL: an operand of `rows` hidden rows, one of `cols` weight rows, and both models' logits of
    `rows` rows."""

    rows: int
    cols: int
    hidden: Tensor
    weight: Tensor
    logits: Tensor


def kl_split(scratch: Tensor, num_rows: int, vocab: int, wide: int) -> KLSplit:
    """wide: the larger of both models' hidden sizes."""
    budget = scratch.numel()
    cols = max(1, min(CPU_TILE[1], vocab, (budget - 2 * vocab - wide) // wide // 2))
    rows = max(1, min(num_rows, (budget - cols * wide) // (2 * vocab + wide)))
    return KLSplit(rows, cols, *scratch.split([rows * wide, cols * wide, budget - (rows + cols) * wide]))


def fill_kl_logits(
    out_RV: Tensor,
    split: KLSplit,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_b: Tensor | None,
    rows: slice,
    logit_scale: float,
    softcap: float,
) -> None:
    """out = all logits of these rows, tile by tile; in one product where the device multiplies 16 bits into float32."""
    native, (vocab, width) = native_product_dtype(hidden, weight), weight.shape
    cols_per_tile = vocab if native is not None and hidden.dtype == weight.dtype else split.cols
    hidden_RH = operand(hidden[rows], split.hidden[: out_RV.shape[0] * width].view(-1, width), native)
    for first, last in blocks(vocab, cols_per_tile):
        cols = slice(first, last)
        region = split.weight[: min(last - first, split.cols) * width].view(-1, width)
        weight_KH = operand(weight[cols], region, native)
        lora = slice_lora(lora_hidden, lora_b, rows, cols)
        logits_tile(out_RV[:, cols], hidden_RH, weight_KH, slice_bias(bias, cols), lora, logit_scale, softcap)


def _kl_piece(z_RV: Tensor, r_RV: Tensor, softcap: float, kl_R: Tensor, g_RV: Tensor | None) -> None:
    slope_RV = 1.0 - (z_RV / softcap).square() if softcap and g_RV is not None else None
    log_p_RV = z_RV.sub_(torch.logsumexp(z_RV, 1, keepdim=True))
    log_q_RV = r_RV.sub_(torch.logsumexp(r_RV, 1, keepdim=True))
    p_RV, q_RV = log_p_RV.exp(), log_q_RV.exp()
    # Ruled out by both models (-inf - -inf): no difference.
    u_RV = log_p_RV.sub_(log_q_RV).nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    # expm1 where p and q are close and p - q would cancel; p - q where expm1 could overflow.
    difference_RV = torch.where(u_RV.abs() < 0.5, torch.expm1(u_RV).mul_(q_RV), p_RV.sub_(q_RV))
    if g_RV is not None:
        g_RV.copy_(difference_RV if slope_RV is None else slope_RV.mul_(difference_RV))
    weighted_RV = torch.where(q_RV == 0, 0.0, u_RV.mul_(q_RV))
    torch.sum(difference_RV.sub_(weighted_RV), dim=1, out=kl_R)
