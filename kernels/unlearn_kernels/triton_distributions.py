"""Triton kernels that look at whole distributions: statistics of log p, and the KL divergence. No offset is known in
advance here, so each program keeps a running maximum per row; one pass over the vocabulary all the same."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kernels import LOG2E, _column_numbers, _log1p, _logits_tile, launched

# Stands for -inf (a masked token): its probability is 0 all the same, and 0 x 1e4 is not NaN.
FLOOR = tl.constexpr(-1.0e4)
STATS_PLANES = 7  # log of the mass, mean, variance (over v != y); maximum, its lowest index, z_y, whether y is here
KL_PLANES = 6  # maximum and sum of both models, A, T


@launched
def token_stats_kernel(
    hidden,
    weight,
    bias_ptr,
    lora_hidden_ptr,
    lora_b_ptr,
    targets_ptr,
    partial_ptr,  # [7, splits, N] float32, written
    num_rows,
    vocab,
    width,
    rank,
    hidden_stride_t,
    hidden_stride_k,
    weight_stride_v,
    weight_stride_k,
    lora_b_stride_v,
    lora_b_stride_r,
    logit_scale,
    softcap,
    splits,
    tiles,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_T: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    LORA_PRECISION: tl.constexpr,
):
    """Per row and split: mass, mean and variance of z under p over v != y; maximum and argmax over all; z_y.

    Moments are merged tile by tile (Chan, Golub, LeVeque 1979), never as E[x^2] - E[x]^2.
    """
    pid = tl.program_id(0)
    row_blocks = tl.cdiv(num_rows, BLOCK_T)
    first_block = pid // (GROUP_T * splits) * GROUP_T
    group_size = tl.minimum(row_blocks - first_block, GROUP_T)
    within = pid % (GROUP_T * splits)
    first_row = (first_block + within % group_size) * BLOCK_T
    split = within // group_size
    t_rows = first_row + tl.arange(0, BLOCK_T).to(tl.int64)
    t_mask = t_rows < num_rows
    t_safe = tl.where(t_mask, t_rows, num_rows - 1)
    y_T = _column_numbers(tl.load(targets_ptr + t_safe), vocab)
    top_T = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    best_T = tl.zeros((BLOCK_T,), tl.int32)
    target_T = tl.zeros((BLOCK_T,), tl.float32)
    seen_T = tl.zeros((BLOCK_T,), tl.float32)
    base_T = tl.full((BLOCK_T,), float("-inf"), tl.float32)  # offset of mass
    mass_T = tl.zeros((BLOCK_T,), tl.float32)
    mean_T = tl.zeros((BLOCK_T,), tl.float32)
    variance_T = tl.zeros((BLOCK_T,), tl.float32)
    first_tile = split * tiles
    for tile in range(first_tile, tl.minimum(first_tile + tiles, tl.cdiv(vocab, BLOCK_V))):
        first_col = tile * BLOCK_V
        z = _logits_tile(
            hidden, weight, bias_ptr, lora_hidden_ptr, lora_b_ptr, first_row, t_safe, first_col, vocab, width, rank,
            hidden_stride_t, hidden_stride_k, weight_stride_v, weight_stride_k, lora_b_stride_v, lora_b_stride_r,
            logit_scale, softcap, BLOCK_T, BLOCK_V, BLOCK_K, BLOCK_R, False, EVEN_K, WIDEN,
            HAS_BIAS, HAS_SCALE, HAS_CAP, LORA_PRECISION,
        )  # fmt: skip
        v_cols = first_col + tl.arange(0, BLOCK_V)
        z = tl.where((v_cols < vocab)[None, :], z, float("-inf"))
        is_target = v_cols[None, :] == y_T[:, None]
        has_target = (y_T >= first_col) & (y_T < tl.minimum(first_col + BLOCK_V, vocab))
        target_T = tl.where(has_target, tl.sum(tl.where(is_target, z, 0.0), 1), target_T)
        seen_T = tl.where(has_target, 1.0, seen_T)
        high_T = tl.max(z, 1)
        # the lowest index of the maximum, in this tile and (by the strict comparison) over the tiles
        index_T = tl.min(tl.where(z == high_T[:, None], v_cols[None, :], 2147483647), 1)
        best_T = tl.where(high_T > top_T, index_T, best_T)
        top_T = tl.maximum(top_T, high_T)
        rest = tl.where(is_target, float("-inf"), z)
        centre_T = tl.max(rest, 1)
        centre_T = tl.where(centre_T > float("-inf"), centre_T, 0.0)
        x = tl.maximum(rest - centre_T[:, None], FLOOR)
        x = tl.where(z != z, z, x)
        p = tl.exp2(x * LOG2E)
        part_mass_T = tl.sum(p, 1)
        safe_T = tl.where(part_mass_T > 0, part_mass_T, 1.0)
        part_mean_T = tl.sum(p * x, 1) / safe_T
        x = x - part_mean_T[:, None]
        part_variance_T = tl.sum(p * x * x, 1) / safe_T
        # merge: masses in the larger of the two offsets, means relative to 0
        new_base_T = tl.maximum(base_T, centre_T)
        old_mass_T = mass_T * tl.exp2(tl.maximum(base_T - new_base_T, FLOOR) * LOG2E)
        part_mass_T = part_mass_T * tl.exp2((centre_T - new_base_T) * LOG2E)
        mass_T = old_mass_T + part_mass_T
        share_T = part_mass_T / tl.where(mass_T > 0, mass_T, 1.0)
        # a first or an empty side has no mean worth a difference
        delta_T = tl.where(old_mass_T > 0, part_mean_T + centre_T - mean_T, 0.0)
        mean_T = tl.where(old_mass_T > 0, mean_T + share_T * delta_T, part_mean_T + centre_T)
        variance_T = (1.0 - share_T) * variance_T + share_T * part_variance_T
        variance_T += share_T * (1.0 - share_T) * delta_T * delta_T
        base_T = new_base_T
    plane = tl.cast(splits, tl.int64) * num_rows
    out = partial_ptr + tl.cast(split, tl.int64) * num_rows + t_rows
    tl.store(out, base_T + tl.log(mass_T), mask=t_mask)
    tl.store(out + plane, mean_T, mask=t_mask)
    tl.store(out + 2 * plane, variance_T, mask=t_mask)
    tl.store(out + 3 * plane, top_T, mask=t_mask)
    # exact: column numbers stay below 2**24
    tl.store(out + 4 * plane, best_T.to(tl.float32), mask=t_mask)
    tl.store(out + 5 * plane, target_T, mask=t_mask)
    tl.store(out + 6 * plane, seen_T, mask=t_mask)


@triton.jit
def _plane(partial_ptr, plane, first_split, ss, rows, mask, num_rows, splits, other: tl.constexpr):
    """float64 [BLOCK_S, BLOCK_T]: splits first_split on of one plane of the partials [planes, splits, N]."""
    lines = tl.cast(plane * splits, tl.int64) + first_split + ss
    ptrs = partial_ptr + lines[:, None] * num_rows + rows[None, :]
    return tl.load(ptrs, mask=(first_split + ss < splits)[:, None] & mask[None, :], other=other).to(tl.float64)


@launched
def token_stats_finish_kernel(
    partial_ptr,
    targets_ptr,
    stats_ptr,
    num_rows,
    vocab,
    splits,
    stats_stride,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """stats [4, N] float64 = log p_y, is_argmax, mean and variance of log p, from token_stats_kernel's partials.

    Weights of the splits first, then means, then variances around the common mean: each a plain sum.
    """
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    mask = rows < num_rows
    y = tl.load(targets_ptr + rows, mask=mask, other=-1)
    ss = tl.arange(0, BLOCK_S)
    infinity = float("inf")
    top = tl.full((BLOCK_T,), float("-inf"), tl.float64)
    log_mass = tl.full((BLOCK_T,), float("-inf"), tl.float64)
    z_y = tl.zeros((BLOCK_T,), tl.float64)
    seen = tl.zeros((BLOCK_T,), tl.int32)
    for split in range(0, splits, BLOCK_S):
        log_mass = tl.maximum(
            log_mass, tl.max(_plane(partial_ptr, 0, split, ss, rows, mask, num_rows, splits, -infinity), 0)
        )
        top = tl.maximum(top, tl.max(_plane(partial_ptr, 3, split, ss, rows, mask, num_rows, splits, -infinity), 0))
        here = _plane(partial_ptr, 6, split, ss, rows, mask, num_rows, splits, 0.0) > 0.0
        target = _plane(partial_ptr, 5, split, ss, rows, mask, num_rows, splits, 0.0)
        z_y += tl.sum(tl.where(here, target, 0.0), 0)
        seen += tl.sum(here.to(tl.int32), 0)
    base = tl.where(log_mass > -infinity, log_mass, 0.0)
    rest = tl.zeros((BLOCK_T,), tl.float64)
    first_moment = tl.zeros((BLOCK_T,), tl.float64)
    best = tl.full((BLOCK_T,), 2147483647, tl.int32)
    for split in range(0, splits, BLOCK_S):
        weight = tl.exp(_plane(partial_ptr, 0, split, ss, rows, mask, num_rows, splits, -infinity) - base[None, :])
        mean = _plane(partial_ptr, 1, split, ss, rows, mask, num_rows, splits, 0.0)
        rest += tl.sum(weight, 0)
        first_moment += tl.sum(tl.where(weight == 0.0, 0.0, weight * mean), 0)
        high = _plane(partial_ptr, 3, split, ss, rows, mask, num_rows, splits, -infinity)
        index = _plane(partial_ptr, 4, split, ss, rows, mask, num_rows, splits, 0.0).to(tl.int32)
        inside = (split + ss < splits)[:, None] & (high == top[None, :])
        best = tl.minimum(best, tl.min(tl.where(inside, index, 2147483647), 0))
    # log p_y = -log(1 + rest / e_y): keeps its relative accuracy where p_y is next to 1
    lead = base + tl.log(rest) - z_y
    lead = tl.where(rest == 0.0, -infinity, lead)
    logprob = -(tl.where(lead > 0, lead, 0.0) + _log1p(tl.exp(-tl.abs(lead))))
    # the target joins: moments around the new mean
    target_weight = tl.exp(z_y - base)
    centre = tl.where(rest > 0.0, base, z_y)  # without any other token the target is all there is
    target_weight = tl.where(rest > 0.0, target_weight, 1.0)
    mass = rest + target_weight
    mean = (first_moment + tl.where(target_weight == 0.0, 0.0, target_weight * z_y)) / mass
    second_moment = tl.where(target_weight == 0.0, 0.0, target_weight * (z_y - mean) * (z_y - mean))
    for split in range(0, splits, BLOCK_S):
        weight = tl.exp(_plane(partial_ptr, 0, split, ss, rows, mask, num_rows, splits, -infinity) - base[None, :])
        distance = _plane(partial_ptr, 1, split, ss, rows, mask, num_rows, splits, 0.0) - mean[None, :]
        spread = _plane(partial_ptr, 2, split, ss, rows, mask, num_rows, splits, 0.0) + distance * distance
        second_moment += tl.sum(tl.where(weight == 0.0, 0.0, weight * spread), 0)
    valid = (y >= 0) & (y < vocab)
    nan = float("nan")
    tl.store(stats_ptr + rows, tl.where(valid, logprob, nan), mask=mask)
    tl.store(stats_ptr + stats_stride + rows, tl.where(valid, (best == y).to(tl.float64), nan), mask=mask)
    mean_logprob = mean - (centre + tl.log(mass))
    tl.store(stats_ptr + 2 * stats_stride + rows, tl.where(valid, mean_logprob, nan), mask=mask)
    tl.store(stats_ptr + 3 * stats_stride + rows, tl.where(valid, second_moment / mass, nan), mask=mask)


@launched
def kl_kernel(
    hidden,
    weight,
    bias_ptr,
    lora_hidden_ptr,
    lora_b_ptr,
    ref_hidden,
    ref_weight,
    partial_ptr,  # [6, splits, N] float32, written
    num_rows,
    vocab,
    width,
    rank,
    ref_width,
    hidden_stride_t,
    hidden_stride_k,
    weight_stride_v,
    weight_stride_k,
    lora_b_stride_v,
    lora_b_stride_r,
    ref_hidden_stride_t,
    ref_hidden_stride_k,
    ref_weight_stride_v,
    ref_weight_stride_k,
    logit_scale,
    softcap,
    splits,
    tiles,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_T: tl.constexpr,
    EVEN_K: tl.constexpr,
    REF_EVEN_K: tl.constexpr,
    WIDEN: tl.constexpr,
    REF_WIDEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    LORA_PRECISION: tl.constexpr,
):
    """What KL(ref || policy) needs, in one pass over both heads: no logits are stored.

    With policy logits z, reference logits r and u = z - r, per row and split:
        maxima of z and r;  sums of exp(z - max z) and exp(r - max r);
        A = sum exp(r - max r) u;   T = sum [exp(z - c) - exp(r - c) - exp(r - c) u],  c = max(max z, max r)
    KL = -A / S_q + lse_p - lse_q. Every term of T is >= 0 (a series gives it where it would cancel), and
    KL = T / S_q - (x - 1 - log x), x = S_p / S_q, is exact where the models nearly agree: equal models give 0.
    """
    pid = tl.program_id(0)
    row_blocks = tl.cdiv(num_rows, BLOCK_T)
    first_block = pid // (GROUP_T * splits) * GROUP_T
    group_size = tl.minimum(row_blocks - first_block, GROUP_T)
    within = pid % (GROUP_T * splits)
    first_row = (first_block + within % group_size) * BLOCK_T
    split = within // group_size
    t_rows = first_row + tl.arange(0, BLOCK_T).to(tl.int64)
    t_mask = t_rows < num_rows
    t_safe = tl.where(t_mask, t_rows, num_rows - 1)
    top_p_T = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    top_q_T = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    sum_p_T = tl.zeros((BLOCK_T,), tl.float32)
    sum_q_T = tl.zeros((BLOCK_T,), tl.float32)
    a_T = tl.zeros((BLOCK_T,), tl.float32)
    t_T = tl.zeros((BLOCK_T,), tl.float32)
    first_tile = split * tiles
    for tile in range(first_tile, tl.minimum(first_tile + tiles, tl.cdiv(vocab, BLOCK_V))):
        first_col = tile * BLOCK_V
        z = _logits_tile(
            hidden, weight, bias_ptr, lora_hidden_ptr, lora_b_ptr, first_row, t_safe, first_col, vocab, width, rank,
            hidden_stride_t, hidden_stride_k, weight_stride_v, weight_stride_k, lora_b_stride_v, lora_b_stride_r,
            logit_scale, softcap, BLOCK_T, BLOCK_V, BLOCK_K, BLOCK_R, False, EVEN_K, WIDEN,
            HAS_BIAS, HAS_SCALE, HAS_CAP, LORA_PRECISION,
        )  # fmt: skip
        r = _logits_tile(
            ref_hidden, ref_weight, bias_ptr, lora_hidden_ptr, lora_b_ptr, first_row, t_safe, first_col, vocab,
            ref_width, rank, ref_hidden_stride_t, ref_hidden_stride_k, ref_weight_stride_v, ref_weight_stride_k,
            lora_b_stride_v, lora_b_stride_r, logit_scale, softcap, BLOCK_T, BLOCK_V, BLOCK_K, 0, False, REF_EVEN_K,
            REF_WIDEN, False, HAS_SCALE, HAS_CAP, LORA_PRECISION,
        )  # fmt: skip
        inside = (first_col + tl.arange(0, BLOCK_V) < vocab)[None, :]
        z = tl.where(inside, z, float("-inf"))
        r = tl.where(inside, r, float("-inf"))
        new_p_T = tl.maximum(top_p_T, tl.max(z, 1))
        new_q_T = tl.maximum(top_q_T, tl.max(r, 1))
        old_c_T = tl.maximum(top_p_T, top_q_T)
        new_c_T = tl.maximum(new_p_T, new_q_T)
        p = tl.exp2((z - _finite(new_p_T)[:, None]) * LOG2E)
        q = tl.exp2((r - _finite(new_q_T)[:, None]) * LOG2E)
        # no weight under the reference, so u does not count; -inf - -inf would be NaN
        u = tl.where(q == 0.0, 0.0, z - r)
        sum_p_T = sum_p_T * _shrink(top_p_T, new_p_T) + tl.sum(p, 1)
        shrink_q_T = _shrink(top_q_T, new_q_T)
        sum_q_T = sum_q_T * shrink_q_T + tl.sum(q, 1)
        a_T = a_T * shrink_q_T + tl.sum(q * u, 1)
        p = p * _shrink(new_p_T, new_c_T)[:, None]
        q = q * _shrink(new_q_T, new_c_T)[:, None]
        series = u * u * (0.5 + u * (1.0 / 6 + u * (1.0 / 24 + u * (1.0 / 120 + u * (1.0 / 720 + u * (1.0 / 5040))))))
        term = tl.where((tl.abs(u) < 0.5) & (q > 0.0), q * series, p - q - q * u)
        t_T = t_T * _shrink(old_c_T, new_c_T) + tl.sum(term, 1)
        top_p_T = new_p_T
        top_q_T = new_q_T
    plane = tl.cast(splits, tl.int64) * num_rows
    out = partial_ptr + tl.cast(split, tl.int64) * num_rows + t_rows
    tl.store(out, top_p_T, mask=t_mask)
    tl.store(out + plane, sum_p_T, mask=t_mask)
    tl.store(out + 2 * plane, top_q_T, mask=t_mask)
    tl.store(out + 3 * plane, sum_q_T, mask=t_mask)
    tl.store(out + 4 * plane, a_T, mask=t_mask)
    tl.store(out + 5 * plane, t_T, mask=t_mask)


@triton.jit
def _finite(top_T):
    return tl.where(top_T > float("-inf"), top_T, 0.0)


@triton.jit
def _shrink(old_T, new_T):
    """exp(old - new) for old <= new; 0 where there was nothing."""
    return tl.where(old_T > float("-inf"), tl.exp2((old_T - _finite(new_T)) * LOG2E), 0.0)


@launched
def kl_finish_kernel(partial_ptr, kl_ptr, num_rows, splits, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr):
    """kl [N] from kl_kernel's partials, merged in float64."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    mask = rows < num_rows
    ss = tl.arange(0, BLOCK_S)
    infinity = float("inf")
    top_p = tl.full((BLOCK_T,), float("-inf"), tl.float64)
    top_q = tl.full((BLOCK_T,), float("-inf"), tl.float64)
    for split in range(0, splits, BLOCK_S):
        top_p = tl.maximum(top_p, tl.max(_plane(partial_ptr, 0, split, ss, rows, mask, num_rows, splits, -infinity), 0))
        top_q = tl.maximum(top_q, tl.max(_plane(partial_ptr, 2, split, ss, rows, mask, num_rows, splits, -infinity), 0))
    top_c = tl.maximum(top_p, top_q)
    sum_p = tl.zeros((BLOCK_T,), tl.float64)
    sum_q = tl.zeros((BLOCK_T,), tl.float64)
    a = tl.zeros((BLOCK_T,), tl.float64)
    t = tl.zeros((BLOCK_T,), tl.float64)
    for split in range(0, splits, BLOCK_S):
        part_p = _plane(partial_ptr, 0, split, ss, rows, mask, num_rows, splits, -infinity)
        part_q = _plane(partial_ptr, 2, split, ss, rows, mask, num_rows, splits, -infinity)
        part_c = tl.maximum(part_p, part_q)
        scale_q = tl.exp(part_q - top_q[None, :])
        part = _plane(partial_ptr, 1, split, ss, rows, mask, num_rows, splits, 0.0)
        sum_p += tl.sum(part * tl.exp(part_p - top_p[None, :]), 0)
        sum_q += tl.sum(_plane(partial_ptr, 3, split, ss, rows, mask, num_rows, splits, 0.0) * scale_q, 0)
        a += tl.sum(_plane(partial_ptr, 4, split, ss, rows, mask, num_rows, splits, 0.0) * scale_q, 0)
        part = _plane(partial_ptr, 5, split, ss, rows, mask, num_rows, splits, 0.0)
        t += tl.sum(part * tl.exp(part_c - top_c[None, :]), 0)
    difference = (top_p - top_q) + (tl.log(sum_p) - tl.log(sum_q))
    near = t / (sum_q * tl.exp(top_q - top_c)) - (tl.exp(difference) - 1.0 - difference)
    far = difference - a / sum_q
    kl = tl.where(tl.abs(difference) < 0.5, near, far)
    tl.store(kl_ptr + rows, kl.to(tl.float32), mask=mask)


@launched
def kl_rows_kernel(
    z_ptr,  # [R, V] float32: the policy's logits, complete
    r_ptr,  # [R, V] float32: the reference's
    kl_ptr,
    g_ptr,
    vocab,
    g_stride_t,
    softcap,
    HAS_CAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """KL of a row and G = (p - q) times the softcap's slope, from stored logits; one program per row, two passes."""
    t = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, BLOCK_V)
    top_p = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    top_q = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    sum_p = tl.zeros((BLOCK_V,), tl.float32)
    sum_q = tl.zeros((BLOCK_V,), tl.float32)
    for first in range(0, vocab, BLOCK_V):
        inside = first + v < vocab
        z = tl.load(z_ptr + t * vocab + first + v, mask=inside, other=float("-inf"))
        r = tl.load(r_ptr + t * vocab + first + v, mask=inside, other=float("-inf"))
        new_p = tl.maximum(top_p, z)
        new_q = tl.maximum(top_q, r)
        sum_p = sum_p * _shrink(top_p, new_p) + tl.exp2((z - _finite(new_p)) * LOG2E)
        sum_q = sum_q * _shrink(top_q, new_q) + tl.exp2((r - _finite(new_q)) * LOG2E)
        top_p = new_p
        top_q = new_q
    max_p = tl.max(top_p, 0)
    max_q = tl.max(top_q, 0)
    mass_p = tl.sum(sum_p * _shrink(top_p, max_p), 0)
    mass_q = tl.sum(sum_q * _shrink(top_q, max_q), 0)
    log_mass_p = tl.log(mass_p)
    log_mass_q = tl.log(mass_q)
    shift = log_mass_p - log_mass_q
    total = tl.zeros((BLOCK_V,), tl.float32)
    for first in range(0, vocab, BLOCK_V):
        inside = first + v < vocab
        z = tl.load(z_ptr + t * vocab + first + v, mask=inside, other=float("-inf"))
        r = tl.load(r_ptr + t * vocab + first + v, mask=inside, other=float("-inf"))
        p = tl.exp2((z - max_p - log_mass_p) * LOG2E)
        q = tl.exp2((r - max_q - log_mass_q) * LOG2E)
        # each logit meets its own maximum first: logits far from 0 would round in z - r
        u = tl.where(q == 0.0, 0.0, ((z - max_p) - (r - max_q)) - shift)
        near = (tl.abs(u) < 0.5) & (q > 0.0)
        # expm1(u) - u and expm1(u): series where exp(u) - 1 would cancel
        series = u * u * (0.5 + u * (1.0 / 6 + u * (1.0 / 24 + u * (1.0 / 120 + u * (1.0 / 720 + u * (1.0 / 5040))))))
        total += tl.where(near, q * series, p - q - q * u)
        difference = tl.where(near, q * (u + series), p - q)
        if HAS_CAP:
            difference *= 1.0 - (z / softcap) * (z / softcap)
        tl.store(g_ptr + t * g_stride_t + first + v, difference.to(g_ptr.dtype.element_ty), mask=inside)
    tl.store(kl_ptr + t, tl.sum(total, 0))
