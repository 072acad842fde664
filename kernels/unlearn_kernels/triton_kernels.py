"""Triton kernels of the log-likelihood: one tile body, and what is done with its logits; row kernels around them.

Every kernel that sees logits gets them from `_logits_tile`, in registers and float32: nothing of size N x V is written
but E where a gradient asks for it. A program owns one block of rows and one split of the vocabulary (`tiles` tiles of
BLOCK_V columns), adds up its exponentials in registers and writes one partial sum per row. There are no locks and no
atomics, and how a row's sum is put together depends on the vocabulary and the block sizes alone: the same row gives the
same bits in any batch.

Names: t counts rows, v vocabulary columns, k the hidden dimension, r LoRA's rank. Row numbers are int64 before they
meet a stride: t * stride passes 2**31 at 524288 rows of width 4096, and N x V long before. Column numbers times the
weight's stride likewise.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# What changes from call to call at one head: numbers of rows, and vectors of rows from whichever row on. Nothing loads
# these in wide vectors; knowing that they divide by 16 would be worth little, and each mixture a compilation.
_CHANGING = ("num_rows", "capacity", "splits", "tiles", "stats_stride")
_SLICED = (
    "targets_ptr", "offset_ptr", "sums_ptr", "partial_ptr", "index_ptr", "count_ptr", "value_ptr", "boundaries_ptr",
    "coeff_ptr", "target_coeff_ptr", "e_coeff_ptr", "kl_ptr", "stats_ptr",
)  # fmt: skip


def launched(kernel: Any) -> Any:
    """triton.jit for what the host launches: few binaries per head, whatever the numbers of rows."""
    changing = [name for name in _CHANGING if "constexpr" not in str(kernel.__annotations__.get(name))]
    return triton.jit(kernel, do_not_specialize=changing, do_not_specialize_on_alignment=_SLICED)


@triton.jit
def _cap(z, softcap):
    """softcap tanh(z / softcap), from exp(-2|x|), which cannot overflow; near 0, where that cancels, from tanh's
    series."""
    x = z / softcap
    decay = tl.exp(-2.0 * tl.abs(x))
    bounded = softcap * (1.0 - decay) / (1.0 + decay)
    square = x * x
    series = z * (1.0 + square * (-0.333333333 + square * (0.133333333 - square * 0.053968254)))
    return tl.where(square < 0.04, series, tl.where(x < 0, -bounded, bounded))


@triton.jit
def _logits_tile(
    hidden,  # [N, K] tensor descriptor (TMA) or pointer
    weight,  # [V, K] likewise
    bias_ptr,  # [V]
    lora_hidden_ptr,  # [N, R] float32: s h A^T
    lora_b_ptr,  # [V, R]
    first_row,
    t_rows,  # [BLOCK_T] int64, all valid
    first_col,
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
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,  # 0: no LoRA
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDEN: tl.constexpr,  # operands of different or float32 type meet in float32
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    LORA_PRECISION: tl.constexpr,
):
    """softcap(logit_scale (hidden W^T + bias + lora_hidden B^T)) for one tile, float32 [BLOCK_T, BLOCK_V].

    Columns beyond the vocabulary hold some finite number: the caller masks them.
    """
    z = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    v_cols = first_col + tl.arange(0, BLOCK_V)
    v_safe = tl.where(v_cols < vocab, v_cols, 0).to(tl.int64)
    if TMA:
        # the copy engine fills what lies outside the tensors with zeros
        for k in range(0, width, BLOCK_K):
            hidden_TK = hidden.load([first_row, k])
            weight_VK = weight.load([first_col, k])
            z = tl.dot(hidden_TK, weight_VK.T, z)
    else:
        ks = tl.arange(0, BLOCK_K)
        hidden_ptrs = hidden + t_rows[:, None] * hidden_stride_t + ks[None, :] * hidden_stride_k
        weight_ptrs = weight + v_safe[:, None] * weight_stride_v + ks[None, :] * weight_stride_k
        for k in range(0, width, BLOCK_K):
            if EVEN_K:
                hidden_TK = tl.load(hidden_ptrs)
                weight_VK = tl.load(weight_ptrs)
            else:
                k_mask = (ks < width - k)[None, :]
                hidden_TK = tl.load(hidden_ptrs, mask=k_mask, other=0.0)
                weight_VK = tl.load(weight_ptrs, mask=k_mask, other=0.0)
            if WIDEN:
                z = tl.dot(hidden_TK.to(tl.float32), weight_VK.to(tl.float32).T, z, input_precision="ieee")
            else:
                z = tl.dot(hidden_TK, weight_VK.T, z)
            hidden_ptrs += BLOCK_K * hidden_stride_k
            weight_ptrs += BLOCK_K * weight_stride_k
    if BLOCK_R > 0:
        # its own accumulator: two dots of different types into one have been miscompiled on Blackwell
        low = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
        rs = tl.arange(0, BLOCK_R)
        for r in range(0, rank, BLOCK_R):
            r_mask = (rs < rank - r)[None, :]
            inner_TR = tl.load(lora_hidden_ptr + t_rows[:, None] * rank + r + rs[None, :], mask=r_mask, other=0.0)
            b_ptrs = lora_b_ptr + v_safe[:, None] * lora_b_stride_v + (r + rs)[None, :] * lora_b_stride_r
            b_VR = tl.load(b_ptrs, mask=r_mask, other=0.0).to(tl.float32)
            low = tl.dot(inner_TR, b_VR.T, low, input_precision=LORA_PRECISION)
        z += low
    if HAS_BIAS:
        z += tl.load(bias_ptr + v_safe).to(tl.float32)[None, :]
    if HAS_SCALE:
        z *= logit_scale
    if HAS_CAP:
        z = _cap(z, softcap)
    return z


@triton.jit
def _exp_part(z, m_T, y_T, first_col, vocab, softcap, HAS_CAP: tl.constexpr):
    """exp(z - m) without the target's column and the columns beyond the vocabulary; and E, those times the softcap's
    slope. The subtraction comes first, exactly: log2(e) folded into one multiply-add would round m."""
    # counted from the tile's first: compared with constants, in a fifth fewer instructions
    cols = tl.arange(0, z.shape[1])
    wanted = (cols[None, :] != (y_T - first_col)[:, None]) & (first_col + cols < vocab)[None, :]
    terms = tl.where(wanted, tl.exp2((z - m_T[:, None]) * LOG2E), 0.0)
    e = terms
    if HAS_CAP:
        e = terms * (1.0 - (z / softcap) * (z / softcap))
    return terms, e


@triton.jit
def _column_numbers(targets, vocab):
    """Targets as 32-bit numbers, which compare in half the instructions; -1, no column's number, for one out of
    range."""
    return tl.where((targets >= 0) & (targets < vocab), targets, -1).to(tl.int32)


@triton.jit
def _sum_one_split(
    hidden,
    weight,
    bias_ptr,
    lora_hidden_ptr,
    lora_b_ptr,
    y_T,  # [BLOCK_T] int32 or int64
    offset_ptr,
    partial_ptr,
    e,
    first_row,
    t_rows,
    t_mask,
    partial_cols,  # [BLOCK_T] int64: where in its row of the partials each sum goes
    partial_stride,
    split,
    tiles,
    vocab,
    width,
    rank,
    hidden_stride_t,
    hidden_stride_k,
    weight_stride_v,
    weight_stride_k,
    lora_b_stride_v,
    lora_b_stride_r,
    e_stride_t,
    e_cols,
    logit_scale,
    softcap,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TMA: tl.constexpr,
    E_TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    LORA_PRECISION: tl.constexpr,
    STORE_E: tl.constexpr,
    HALVES: tl.constexpr,  # the epilogue takes half a tile at a time: half the registers and shared memory
    FLATTEN: tl.constexpr,  # the tile loop and the k loop are pipelined as one
    E_TYPE: tl.constexpr,
):
    m_T = tl.load(offset_ptr + t_rows)
    sum_T = tl.zeros((BLOCK_T,), tl.float32)
    first_tile = split * tiles
    last_tile = tl.minimum(first_tile + tiles, tl.cdiv(vocab, BLOCK_V))
    for tile in tl.range(first_tile, last_tile, flatten=FLATTEN):
        first_col = tile * BLOCK_V
        z = _logits_tile(
            hidden, weight, bias_ptr, lora_hidden_ptr, lora_b_ptr, first_row, t_rows, first_col, vocab, width, rank,
            hidden_stride_t, hidden_stride_k, weight_stride_v, weight_stride_k, lora_b_stride_v, lora_b_stride_r,
            logit_scale, softcap, BLOCK_T, BLOCK_V, BLOCK_K, BLOCK_R, TMA, EVEN_K, WIDEN,
            HAS_BIAS, HAS_SCALE, HAS_CAP, LORA_PRECISION,
        )  # fmt: skip
        if HALVES:
            z_left, z_right = tl.split(tl.permute(tl.reshape(z, (BLOCK_T, 2, BLOCK_V // 2)), (0, 2, 1)))
            left_cols = first_col + tl.arange(0, BLOCK_V // 2)
            terms, e_part = _exp_part(z_left, m_T, y_T, first_col, vocab, softcap, HAS_CAP)
            sum_T += tl.sum(terms, 1)
            if STORE_E:
                _store_e(e, e_part.to(E_TYPE), first_row, first_col, t_rows, t_mask, left_cols, e_cols, e_stride_t,
                         E_TMA)  # fmt: skip
            right_col = first_col + BLOCK_V // 2
            terms, e_part = _exp_part(z_right, m_T, y_T, right_col, vocab, softcap, HAS_CAP)
            sum_T += tl.sum(terms, 1)
            if STORE_E:
                _store_e(e, e_part.to(E_TYPE), first_row, right_col, t_rows, t_mask, left_cols + BLOCK_V // 2,
                         e_cols, e_stride_t, E_TMA)  # fmt: skip
        else:
            v_cols = first_col + tl.arange(0, BLOCK_V)
            terms, e_part = _exp_part(z, m_T, y_T, first_col, vocab, softcap, HAS_CAP)
            sum_T += tl.sum(terms, 1)
            if STORE_E:
                _store_e(e, e_part.to(E_TYPE), first_row, first_col, t_rows, t_mask, v_cols, e_cols, e_stride_t, E_TMA)
    tl.store(partial_ptr + tl.cast(split, tl.int64) * partial_stride + partial_cols, sum_T, mask=t_mask)


@triton.jit
def _store_e(e, e_part, first_row, first_col, t_rows, t_mask, v_cols, e_cols, e_stride_t, E_TMA: tl.constexpr):
    """e_cols: the vocabulary's size, or its rows' whole stride, which lets stores be vectors; E is 0 in between."""
    if E_TMA:
        e.store([first_row, first_col], e_part)
    else:
        e_ptrs = e + t_rows[:, None] * e_stride_t + v_cols[None, :]
        tl.store(e_ptrs, e_part, mask=t_mask[:, None] & (v_cols < e_cols)[None, :])


@launched
def exp_sums_kernel(
    hidden,
    weight,
    bias_ptr,
    lora_hidden_ptr,
    lora_b_ptr,
    targets_ptr,  # [N] int64
    offset_ptr,  # [N] float32
    partial_ptr,  # [splits, N] float32, written
    e,  # [N, V] descriptor or pointer, written if STORE_E
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
    e_stride_t,
    e_cols,
    logit_scale,
    softcap,
    splits,
    tiles,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_T: tl.constexpr,
    TMA: tl.constexpr,
    E_TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    LORA_PRECISION: tl.constexpr,
    STORE_E: tl.constexpr,
    HALVES: tl.constexpr,
    FLATTEN: tl.constexpr,
    E_TYPE: tl.constexpr,
):
    """partial[s, t] = sum over split s of exp(z_tv - offset_t), v != y_t; one program per (row block, split).

    Row blocks go by groups of GROUP_T, all splits of a group before the next group: the group's hidden rows stay in the
    L2 cache while the weight streams past once per group.
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
    _sum_one_split(
        hidden, weight, bias_ptr, lora_hidden_ptr, lora_b_ptr, y_T, offset_ptr, partial_ptr, e, first_row,
        t_safe, t_mask, t_rows, num_rows, split, tiles, vocab, width, rank, hidden_stride_t, hidden_stride_k,
        weight_stride_v, weight_stride_k, lora_b_stride_v, lora_b_stride_r, e_stride_t, e_cols, logit_scale, softcap,
        BLOCK_T, BLOCK_V, BLOCK_K, BLOCK_R, TMA, E_TMA, EVEN_K, WIDEN, HAS_BIAS, HAS_SCALE, HAS_CAP, LORA_PRECISION,
        STORE_E, HALVES, FLATTEN, E_TYPE,
    )  # fmt: skip


@launched
def redo_maxima_kernel(
    hidden,
    weight,
    bias_ptr,
    lora_hidden_ptr,
    lora_b_ptr,
    index_ptr,  # [count] int32: the rows to redo
    count_ptr,  # [1] int32
    partial_ptr,  # [splits, capacity] float32, written
    capacity,
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
    tiles: tl.constexpr,  # or triton 3.6 spills on sm_90 and sm_100
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    LORA_PRECISION: tl.constexpr,
):
    """partial[s, i] = max over split s of z_tv, t = index[i]. Always launched; without such rows it ends at once."""
    count = tl.load(count_ptr)
    for item in range(tl.program_id(0), tl.cdiv(count, BLOCK_T) * splits, tl.num_programs(0)):
        positions = item // splits * BLOCK_T + tl.arange(0, BLOCK_T)
        t_mask = positions < count
        t_rows = tl.load(index_ptr + tl.where(t_mask, positions, 0)).to(tl.int64)
        split = item % splits
        top_T = tl.full((BLOCK_T,), float("-inf"), tl.float32)
        first_tile = split * tiles
        for tile in range(first_tile, tl.minimum(first_tile + tiles, tl.cdiv(vocab, BLOCK_V))):
            z = _logits_tile(
                hidden, weight, bias_ptr, lora_hidden_ptr, lora_b_ptr, 0, t_rows, tile * BLOCK_V, vocab, width, rank,
                hidden_stride_t, hidden_stride_k, weight_stride_v, weight_stride_k, lora_b_stride_v, lora_b_stride_r,
                logit_scale, softcap, BLOCK_T, BLOCK_V, BLOCK_K, BLOCK_R, False, EVEN_K, WIDEN,
                HAS_BIAS, HAS_SCALE, HAS_CAP, LORA_PRECISION,
            )  # fmt: skip
            v_cols = tile * BLOCK_V + tl.arange(0, BLOCK_V)
            z = tl.where((v_cols < vocab)[None, :], z, float("-inf"))
            top_T = tl.maximum(top_T, tl.max(z, 1))
        tl.store(partial_ptr + tl.cast(split, tl.int64) * capacity + positions, top_T, mask=t_mask)


@launched
def redo_sums_kernel(
    hidden,
    weight,
    bias_ptr,
    lora_hidden_ptr,
    lora_b_ptr,
    targets_ptr,
    offset_ptr,
    index_ptr,
    count_ptr,
    partial_ptr,
    e,
    capacity,
    vocab,
    width,
    rank,
    hidden_stride_t,
    hidden_stride_k,
    weight_stride_v,
    weight_stride_k,
    lora_b_stride_v,
    lora_b_stride_r,
    e_stride_t,
    e_cols,
    logit_scale,
    softcap,
    splits,
    tiles: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    LORA_PRECISION: tl.constexpr,
    STORE_E: tl.constexpr,
    E_TYPE: tl.constexpr,
):
    """exp_sums_kernel for the rows index[0:count], whose offsets are new; partial[s, i] belongs to row index[i]."""
    count = tl.load(count_ptr)
    for item in range(tl.program_id(0), tl.cdiv(count, BLOCK_T) * splits, tl.num_programs(0)):
        positions = item // splits * BLOCK_T + tl.arange(0, BLOCK_T)
        t_mask = positions < count
        t_rows = tl.load(index_ptr + tl.where(t_mask, positions, 0)).to(tl.int64)
        y_T = _column_numbers(tl.load(targets_ptr + t_rows), vocab)
        _sum_one_split(
            hidden, weight, bias_ptr, lora_hidden_ptr, lora_b_ptr, y_T, offset_ptr, partial_ptr, e, 0, t_rows,
            t_mask, positions, capacity, item % splits, tiles, vocab, width, rank, hidden_stride_t, hidden_stride_k,
            weight_stride_v, weight_stride_k, lora_b_stride_v, lora_b_stride_r, e_stride_t, e_cols, logit_scale,
            softcap, BLOCK_T, BLOCK_V, BLOCK_K, BLOCK_R, False, False, EVEN_K, WIDEN, HAS_BIAS, HAS_SCALE,
            HAS_CAP, LORA_PRECISION, STORE_E, False, False, E_TYPE,
        )  # fmt: skip


@launched
def find_rows_kernel(sums_ptr, index_ptr, count_ptr, num_rows, MAX_SUM: tl.constexpr, BLOCK: tl.constexpr):
    """index[0:count] = the rows with S > MAX_SUM, in any order: a row's bits do not depend on its place in a tile."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.load(sums_ptr + rows, mask=rows < num_rows, other=0.0)
    bad = sums > MAX_SUM
    places = tl.atomic_add(count_ptr + tl.zeros_like(rows), tl.full((BLOCK,), 1, tl.int32), mask=bad)
    tl.store(index_ptr + places, rows, mask=bad)


@launched
def redo_offsets_kernel(partial_ptr, index_ptr, count_ptr, offset_ptr, capacity, splits, BLOCK: tl.constexpr):
    """offset[index[i]] = max over s of partial[s, i]."""
    count = tl.load(count_ptr)
    for first in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        places = first + tl.arange(0, BLOCK)
        mask = places < count
        top = tl.full((BLOCK,), float("-inf"), tl.float32)
        for split in range(splits):
            part = tl.load(partial_ptr + tl.cast(split, tl.int64) * capacity + places, mask=mask, other=float("-inf"))
            top = tl.maximum(top, part)
        tl.store(offset_ptr + tl.load(index_ptr + places, mask=mask, other=0), top, mask=mask)


@launched
def add_partials_kernel(
    partial_ptr,
    sums_ptr,
    index_ptr,
    count_ptr,
    num_rows,
    splits,
    INDEXED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """sums[t] = sum over s of partial[s, t], float64 in a fixed order; INDEXED: partial[s, i] is row index[i]'s."""
    count = num_rows
    if INDEXED:
        count = tl.load(count_ptr)
    ss = tl.arange(0, BLOCK_S)
    for first in range(tl.program_id(0) * BLOCK_T, count, tl.num_programs(0) * BLOCK_T):
        places = first + tl.arange(0, BLOCK_T)
        mask = places < count
        total = tl.zeros((BLOCK_T,), tl.float64)
        # many splits at once: one after the other would wait for memory each time
        for split in range(0, splits, BLOCK_S):
            part_ptrs = partial_ptr + (split + ss).to(tl.int64)[:, None] * num_rows + places[None, :]
            part_mask = (split + ss < splits)[:, None] & mask[None, :]
            total += tl.sum(tl.load(part_ptrs, mask=part_mask, other=0.0).to(tl.float64), 0)
        rows = places
        if INDEXED:
            rows = tl.load(index_ptr + places, mask=mask, other=0)
        tl.store(sums_ptr + rows, total.to(tl.float32), mask=mask)


@launched
def exp_tile_kernel(
    z_ptr,  # [R, K] float32, contiguous: hidden W^T of one tile, LoRA's part included
    bias_ptr,
    targets_ptr,
    offset_ptr,
    partial_ptr,  # [N] float32: this tile's row of the partials, written
    e_ptr,
    first_col,
    cols,
    e_stride_t,
    logit_scale,
    softcap,
    BLOCK_V: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    STORE_E: tl.constexpr,
):
    """The epilogue of exp_sums_kernel on logits that a library product has written: one program per row, one pass."""
    t = tl.program_id(0).to(tl.int64)
    y = _column_numbers(tl.load(targets_ptr + t) - first_col, cols)
    m = tl.load(offset_ptr + t)
    total = tl.zeros((BLOCK_V,), tl.float32)
    for first in range(0, cols, BLOCK_V):
        v = first + tl.arange(0, BLOCK_V)
        inside = v < cols
        z = tl.load(z_ptr + t * cols + v, mask=inside, other=0.0)
        if HAS_BIAS:
            z += tl.load(bias_ptr + first_col + v, mask=inside, other=0.0).to(tl.float32)
        if HAS_SCALE:
            z *= logit_scale
        if HAS_CAP:
            z = _cap(z, softcap)
        terms = tl.where(inside & (v != y), tl.exp2((z - m) * LOG2E), 0.0)
        total += terms
        if STORE_E:
            e = terms
            if HAS_CAP:
                e = terms * (1.0 - (z / softcap) * (z / softcap))
            tl.store(e_ptr + t * e_stride_t + first_col + v, e.to(e_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + t, tl.sum(total, 0))


@launched
def target_logits_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    lora_hidden_ptr,
    lora_b_ptr,
    targets_ptr,
    out_ptr,
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
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    """z_t[y_t] by a gather and a dot product in float32; NaN for a target outside [0, V)."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
    t_mask = rows < num_rows
    y_T = tl.load(targets_ptr + rows, mask=t_mask, other=0)
    valid = (y_T >= 0) & (y_T < vocab)
    y_safe = tl.where(valid, y_T, 0)
    ks = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for k in range(0, width, BLOCK_K):
        mask = t_mask[:, None] & (ks < width - k)[None, :]
        k_cols = (k + ks).to(tl.int64)[None, :]
        h = tl.load(hidden_ptr + rows[:, None] * hidden_stride_t + k_cols * hidden_stride_k, mask=mask, other=0.0)
        w = tl.load(weight_ptr + y_safe[:, None] * weight_stride_v + k_cols * weight_stride_k, mask=mask, other=0.0)
        acc += h.to(tl.float32) * w.to(tl.float32)
    z = tl.sum(acc, 1)
    if HAS_BIAS:
        z += tl.load(bias_ptr + y_safe, mask=t_mask, other=0.0).to(tl.float32)
    if BLOCK_R > 0:
        rs = tl.arange(0, BLOCK_R)
        low = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        for r in range(0, rank, BLOCK_R):
            mask = t_mask[:, None] & (rs < rank - r)[None, :]
            inner = tl.load(lora_hidden_ptr + rows[:, None] * rank + r + rs[None, :], mask=mask, other=0.0)
            b_ptrs = lora_b_ptr + y_safe[:, None] * lora_b_stride_v + (r + rs)[None, :] * lora_b_stride_r
            low += inner * tl.load(b_ptrs, mask=mask, other=0.0).to(tl.float32)
        z += tl.sum(low, 1)
    z *= logit_scale
    if HAS_CAP:
        z = _cap(z, softcap)
    tl.store(out_ptr + rows, tl.where(valid, z, float("nan")), mask=t_mask)


@triton.jit
def _log1p(x):
    """log(1 + x) in float64 to full relative accuracy (corrected by x / ((1 + x) - 1); Goldberg 1991, theorem 4)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0 in float64 to full relative accuracy (the same correction; Kahan)."""
    u = tl.exp(x)
    safe = (u == 1.0) | (u == 0.0)
    corrected = (u - 1.0) * (x / tl.log(tl.where(safe, 0.5, u)))
    return tl.where(u == 1.0, x, tl.where(u == 0.0, -1.0, corrected))


@launched
def finish_rows_kernel(
    target_logit_ptr,
    offset_ptr,
    sums_ptr,
    value_ptr,  # float64
    target_coeff_ptr,
    e_coeff_ptr,
    num_rows,
    logit_scale,
    softcap,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What chunked.finish_rows computes, in one launch."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < num_rows
    z_y = tl.load(target_logit_ptr + rows, mask=mask, other=0.0).to(tl.float64)
    d = tl.load(offset_ptr + rows, mask=mask, other=0.0).to(tl.float64) - z_y
    sums = tl.load(sums_ptr + rows, mask=mask, other=0.0).to(tl.float64)
    e_y = tl.exp(-d)
    total = sums + e_y
    near = sums < e_y
    logprob = tl.where(near, -_log1p(tl.where(near, sums / e_y, 0.0)), -d - tl.log(total))
    target_coeff = -_expm1(logprob) * logit_scale
    if HAS_CAP:
        ratio = z_y / softcap
        target_coeff *= 1.0 - ratio * ratio
    tl.store(value_ptr + rows, logprob, mask=mask)
    tl.store(target_coeff_ptr + rows, target_coeff.to(tl.float32), mask=mask)
    tl.store(e_coeff_ptr + rows, (logit_scale / total).to(tl.float32), mask=mask)


@launched
def segment_sums_kernel(value_ptr, boundaries_ptr, out_ptr, BLOCK: tl.constexpr):
    """out[b] = sum of value[boundaries[b]:boundaries[b + 1]] in float64: one program per sequence, always in this
    order."""
    b = tl.program_id(0)
    first = tl.load(boundaries_ptr + b).to(tl.int64)
    last = tl.load(boundaries_ptr + b + 1).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(first, last, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        total += tl.load(value_ptr + rows, mask=rows < last, other=0.0)
    tl.store(out_ptr + b, tl.sum(total, 0))


@launched
def row_grad_kernel(
    product_ptr,  # [C, D] float32: E matrix
    matrix_ptr,  # [V, D]
    targets_ptr,
    target_coeff_ptr,
    e_coeff_ptr,
    out_ptr,  # [C, D], any floating type
    vocab,
    width,
    matrix_stride_v,
    matrix_stride_d,
    out_stride_t,
    HAS_TARGETS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out_t = target_coeff_t matrix[y_t] - e_coeff_t product_t; one program per row."""
    t = tl.program_id(0).to(tl.int64)
    e_coeff = tl.load(e_coeff_ptr + t)
    y = tl.zeros((), tl.int64)
    target_coeff = 0.0
    if HAS_TARGETS:
        y = tl.load(targets_ptr + t)
        y = tl.minimum(tl.maximum(y, 0), vocab - 1)
        target_coeff = tl.load(target_coeff_ptr + t)
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        mask = d < width
        out = -e_coeff * tl.load(product_ptr + t * width + d, mask=mask, other=0.0)
        if HAS_TARGETS:
            picked = tl.load(matrix_ptr + y * matrix_stride_v + d.to(tl.int64) * matrix_stride_d, mask=mask, other=0.0)
            out += target_coeff * picked.to(tl.float32)
        tl.store(out_ptr + t * out_stride_t + d, out.to(out_ptr.dtype.element_ty), mask=mask)


@launched
def scale_rows_kernel(
    rows_ptr, coeff_ptr, out_ptr, width, rows_stride_t, rows_stride_d, out_stride_t, BLOCK_D: tl.constexpr
):
    """out_t = -coeff_t rows_t: the right-hand operand of the weight's gradient, in the product's dtype."""
    t = tl.program_id(0).to(tl.int64)
    coeff = -tl.load(coeff_ptr + t)
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        mask = d < width
        x = tl.load(rows_ptr + t * rows_stride_t + d.to(tl.int64) * rows_stride_d, mask=mask, other=0.0)
        tl.store(out_ptr + t * out_stride_t + d, (coeff * x.to(tl.float32)).to(out_ptr.dtype.element_ty), mask=mask)


@launched
def add_target_rows_kernel(
    rows_ptr,  # [C, D]
    coeff_ptr,  # [C]
    sorted_ptr,  # [C] int32: the targets, all in range, ascending
    order_ptr,  # [C] int64: the stable permutation that sorts them
    out_ptr,  # [V, D], any floating type
    num_rows,
    width,
    rows_stride_t,
    rows_stride_d,
    out_stride_v,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[y] += sum of coeff_t rows_t over the rows with target y, summed in float32 before the one addition.

    The program whose place in the sorted list is the first of its label adds all of that label; the others leave. No
    atomics: the same bits every run, and a label that fills the batch is rounded into out once.
    """
    blocks_d = tl.cdiv(width, BLOCK_D)
    place = tl.program_id(0) // blocks_d
    d = tl.program_id(0) % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    d_mask = d < width
    label = tl.load(sorted_ptr + place)
    before = tl.load(sorted_ptr + tl.maximum(place - 1, 0))
    if (place == 0) | (before != label):
        total = tl.zeros((BLOCK_D,), tl.float32)
        more = place
        while more < num_rows:
            places = more + tl.arange(0, BLOCK_T)
            ours = (places < num_rows) & (tl.load(sorted_ptr + places, mask=places < num_rows, other=-1) == label)
            rows = tl.load(order_ptr + places, mask=ours, other=0)
            coeff = tl.load(coeff_ptr + rows, mask=ours, other=0.0)
            row_ptrs = rows_ptr + rows[:, None] * rows_stride_t + d.to(tl.int64)[None, :] * rows_stride_d
            x = tl.load(row_ptrs, mask=ours[:, None] & d_mask[None, :], other=0.0).to(tl.float32)
            total += tl.sum(x * coeff[:, None], 0)
            # a block that is ours to its end may go on; any other ends the label
            more = tl.where(tl.sum(ours.to(tl.int32), 0) == BLOCK_T, more + BLOCK_T, num_rows)
        out_ptrs = out_ptr + label.to(tl.int64) * out_stride_v + d
        out = tl.load(out_ptrs, mask=d_mask, other=0.0).to(tl.float32) + total
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=d_mask)
