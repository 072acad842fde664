"""The deliberate faults of the Triton backend, and what a fault is; mutants.py applies them.

Without a GPU the tests run the kernels under Triton's interpreter, whose small tiles their shapes lie around.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]  # files of this folder, or file::test
    only: str = ""  # of these tests the ones that pytest's -k selects


KERNELS, WHOLE, BACKEND, TUNING = (
    "triton_kernels.py",
    "triton_distributions.py",
    "triton_backend.py",
    "triton_tuning.py",
)
TRITON, PLANS = "test_triton.py", "test_triton_tuning.py"
GRADIENTS, LOGPROBS, DISTRIBUTIONS = "test_gradients.py", "test_logprobs.py", "test_distributions.py"
# Of the tests that run once per backend: Triton's share of the head, everything kept.
KEPT = "triton and keep"
HEAD = (f"{GRADIENTS}::test_every_part_of_the_head",)
FUSED = (f"{TRITON}::test_fused_around_its_tiles",)
REDONE = (f"{TRITON}::test_redone_rows_and_the_bits_of_the_others",)
LIBRARY_TILES = (f"{TRITON}::test_library_tiles_smaller_than_the_head",)
SMALLEST = (f"{TRITON}::test_the_smallest_scratch_is_enough",)

TILES = (
    Mutant(
        "triton: the columns beyond the vocabulary count",
        KERNELS,
        "wanted = (v_cols[None, :] != y_T[:, None]) & (v_cols < vocab)[None, :]",
        "wanted = v_cols[None, :] != y_T[:, None]",
        FUSED,
        "17-24-257",
    ),
    Mutant(
        "triton: the target's own column stays in S and E",
        KERNELS,
        "wanted = (v_cols[None, :] != y_T[:, None]) & (v_cols < vocab)[None, :]",
        "wanted = (v_cols < vocab)[None, :]",
        FUSED,
        "17-24-257",
    ),
    Mutant(
        "triton: the offset is forgotten",
        KERNELS,
        "tl.exp2((z - m_T[:, None]) * LOG2E)",
        "tl.exp2(z * LOG2E)",
        FUSED,
        "17-24-257",
    ),
    Mutant(
        "triton: E without the softcap's slope",
        KERNELS,
        "e = terms * (1.0 - (z / softcap) * (z / softcap))\n    return terms, e",
        "e = terms\n    return terms, e",
        HEAD,
        KEPT,
    ),
    Mutant(
        "triton: logits without the logit scale",
        KERNELS,
        "z *= logit_scale\n    if HAS_CAP:\n        z = _cap(z, softcap)\n    return z",
        "z *= 1.0\n    if HAS_CAP:\n        z = _cap(z, softcap)\n    return z",
        HEAD,
        KEPT,
    ),
    Mutant(
        "triton: the target's logit without the logit scale",
        KERNELS,
        "z *= logit_scale\n    if HAS_CAP:\n        z = _cap(z, softcap)\n    tl.store",
        "z *= 1.0\n    if HAS_CAP:\n        z = _cap(z, softcap)\n    tl.store",
        HEAD,
        KEPT,
    ),
    Mutant(
        "triton: the target's logit without the bias",
        KERNELS,
        "z += tl.load(bias_ptr + y_safe, mask=t_mask, other=0.0).to(tl.float32)",
        "z += 0.0",
        HEAD,
        KEPT,
    ),
    Mutant(
        "triton: every tile takes the first tile's bias",
        KERNELS,
        "z += tl.load(bias_ptr + v_safe).to(tl.float32)[None, :]",
        "z += tl.load(bias_ptr + v_safe % BLOCK_V).to(tl.float32)[None, :]",
        HEAD,
        KEPT,
    ),
    Mutant(
        "triton: LoRA's second block of ranks repeats the first",
        KERNELS,
        "lora_hidden_ptr + t_rows[:, None] * rank + r + rs[None, :]",
        "lora_hidden_ptr + t_rows[:, None] * rank + rs[None, :]",
        (f"{TRITON}::test_ranks_around_the_block",),
        "40",
    ),
    Mutant(
        "triton: the softcap overflows far beyond the cap",
        KERNELS,
        "decay = tl.exp(-2.0 * tl.abs(x))\n    bounded = softcap * (1.0 - decay) / (1.0 + decay)",
        "growth = tl.exp(2.0 * tl.abs(x))\n    bounded = softcap * (growth - 1.0) / (growth + 1.0)",
        (f"{TRITON}::test_logits_far_beyond_the_softcap",),
    ),
    Mutant(
        "triton: the right half of E lands on the left",
        KERNELS,
        "first_row, first_col + BLOCK_V // 2, t_rows",
        "first_row, first_col, t_rows",
        FUSED,
        "17-24-128",
    ),
    Mutant(
        "triton: the right half looks for the target among the left half's columns",
        KERNELS,
        "right_cols = left_cols + BLOCK_V // 2",
        "right_cols = left_cols",
        FUSED,
        "17-24-128",
    ),
    Mutant(
        "triton: a group that is not full leaves splits out",
        KERNELS,
        "split = within // group_size",
        "split = within // GROUP_T",
        SMALLEST,
        "fused and 385",
    ),
    Mutant(
        "triton: the last block's rows beyond the batch write partial sums",
        KERNELS,
        "partial_stride + partial_cols, sum_T, mask=t_mask)",
        "partial_stride + partial_cols, sum_T)",
        (f"{TRITON}::test_a_row_has_the_same_bits_in_any_batch_and_order",),
        "parts0 and dtype1",
    ),
    Mutant(
        "triton: only the first block of splits is added up",
        KERNELS,
        "for split in range(0, splits, BLOCK_S):",
        "for split in range(0, 1):",
        (f"{TRITON}::test_more_splits_than_the_finishers_add_at_once",),
    ),
    Mutant(
        "triton: the last, shorter split is dropped",
        BACKEND,
        "return triton.cdiv(triton.cdiv(vocab, config.block_v), _tiles(config, vocab))",
        "return max(1, triton.cdiv(vocab, config.block_v) // _tiles(config, vocab))",
        FUSED,
        "17-24-257",
    ),
    Mutant(
        "triton: the second launch reads the first launch's hidden states",
        BACKEND,
        "plan, hidden_CH[rows], weight_VH,",
        "plan, hidden_CH[: stop - start], weight_VH,",
        (f"{TRITON}::test_many_splits_and_launches",),
    ),
    Mutant(
        "triton: the second launch takes the first launch's part of LoRA",
        BACKEND,
        "lora_hidden = None if lora_hidden_CR is None else lora_hidden_CR[rows]\n            form(",
        "lora_hidden = lora_hidden_CR\n            form(",
        (f"{TRITON}::test_every_part_of_the_head_in_every_launch",),
    ),
    Mutant(
        "triton: any hidden dimension counts as a multiple of the block",
        BACKEND,
        'weight.shape[1] % config.block_k == 0,\n        "WIDEN"',
        'True,\n        "WIDEN"',
        FUSED,
        "17-33-130",
    ),
    Mutant(
        "triton: the weight is taken for dense",
        BACKEND,
        '"weight_stride_v": weight.stride(0)',
        '"weight_stride_v": weight.shape[1]',
        (f"{TRITON}::test_strides",),
        "odd and dtype1",
    ),
    Mutant(
        "triton: LoRA's B is taken for dense",
        BACKEND,
        "else lora_b.stride(1)",
        "else 1",
        (f"{TRITON}::test_strided_lora",),
    ),
    Mutant(
        "triton: the copy engine at any row stride",
        BACKEND,
        "step % 16 == 0 and step > 0",
        "step > 0",
        (f"{TRITON}::test_what_the_copy_engine_can_address",),
    ),
    Mutant(
        "triton: the copy engine at any address",
        BACKEND,
        " and tensor.data_ptr() % 16 == 0",
        "",
        (f"{TRITON}::test_what_the_copy_engine_can_address",),
    ),
    Mutant(
        "triton: E stored as if its rows lay side by side",
        BACKEND,
        "num_rows=num_rows,\n        e_stride_t=0 if e is None else e.stride(0),",
        "num_rows=num_rows,\n        e_stride_t=vocab,",
        (f"{TRITON}::test_rows_of_e_further_apart_than_the_vocabulary",),
        "fused and dtype1",
    ),
)

LIBRARY = (
    Mutant(
        "triton, library's product: E without the softcap's slope",
        KERNELS,
        "e = terms * (1.0 - (z / softcap) * (z / softcap))\n            tl.store",
        "e = terms\n            tl.store",
        LIBRARY_TILES,
        "library-triton",
    ),
    Mutant(
        "triton, library's product: every tile takes the first tile's bias",
        KERNELS,
        "bias_ptr + first_col + v",
        "bias_ptr + v",
        LIBRARY_TILES,
        "library-triton",
    ),
    Mutant(
        "triton, library's product: the target is looked for in the first tile only",
        KERNELS,
        "y = tl.load(targets_ptr + t) - first_col",
        "y = tl.load(targets_ptr + t)",
        LIBRARY_TILES,
        "library-triton",
    ),
    Mutant(
        "triton, library's product: every tile of E lands on the first",
        KERNELS,
        "e_ptr + t * e_stride_t + first_col + v",
        "e_ptr + t * e_stride_t + v",
        LIBRARY_TILES,
        "library-triton",
    ),
    Mutant(
        "triton, library's product: a block of rows takes the first block's offsets",
        BACKEND,
        "offset[rows],\n                partials[split]",
        "offset,\n                partials[split]",
        (f"{TRITON}::test_rows_of_e_further_apart_than_the_vocabulary",),
        "library",
    ),
    Mutant(
        "triton, library's product: the tile leaves the partial sums no room",
        BACKEND,
        "rows * (cols + triton.cdiv(vocab, cols) + hidden_width)",
        "rows * (cols + hidden_width)",
        SMALLEST,
        "library",
    ),
)

REDOING = (
    Mutant(
        "triton: only infinite sums are redone",
        KERNELS,
        "bad = sums > MAX_SUM",
        'bad = sums == float("inf")',
        (f"{TRITON}::test_the_limit_between_good_and_redone",),
    ),
    Mutant(
        "triton: the last split alone decides a redone row's offset",
        KERNELS,
        "top = tl.maximum(top, part)",
        "top = part",
        REDONE,
        "third-dtype3",
    ),
    Mutant(
        "triton: a program redoes one block and stops",
        KERNELS,
        'belongs to row index[i]."""\n    count = tl.load(count_ptr)\n'
        "    for item in range(tl.program_id(0), tl.cdiv(count, BLOCK_T) * splits, tl.num_programs(0)):",
        'belongs to row index[i]."""\n    count = tl.load(count_ptr)\n'
        "    for item in range(tl.program_id(0), tl.cdiv(count, BLOCK_T) * splits, 1 << 20):",
        REDONE,
        "all-dtype6",
    ),
    Mutant(
        "triton: redone rows' sums go to the first rows",
        KERNELS,
        "rows = tl.load(index_ptr + places, mask=mask, other=0)",
        "rows = places",
        REDONE,
        "third-dtype3",
    ),
    Mutant(
        "triton: a redone row keeps its old E",
        BACKEND,
        "STORE_E=e is not None,\n                E_TYPE",
        "STORE_E=False,\n                E_TYPE",
        REDONE,
        "third-dtype3",
    ),
    Mutant(
        "triton: E of rows redone by the second launch lands on the first rows",
        BACKEND,
        "e = None if e_CV is None else e_CV[rows]\n",
        "e = e_CV\n",
        REDONE,
        "third-dtype8",
    ),
    Mutant(
        "triton: rows redone by the second launch take the first launch's part of LoRA",
        BACKEND,
        "lora_hidden = None if lora_hidden_CR is None else lora_hidden_CR[rows]\n            arguments",
        "lora_hidden = lora_hidden_CR\n            arguments",
        (f"{TRITON}::test_every_part_of_the_head_in_every_launch",),
    ),
    Mutant(
        "triton: the list of redone rows has no room beside the partial sums",
        BACKEND,
        "(scratch.numel() - 8) // (splits + 1)",
        "(scratch.numel() - 8) // splits",
        (f"{TRITON}::test_redoing_every_row_stays_within_the_scratch",),
    ),
)

FINISHING = (
    Mutant(
        "triton: log instead of log1p where the target dominates",
        KERNELS,
        "tl.where(near, -_log1p(tl.where(near, sums / e_y, 0.0)), -d - tl.log(total))",
        "-d - tl.log(total)",
        (f"{TRITON}::test_finish_rows_at_every_size_of_the_sum",),
    ),
    Mutant(
        "triton: log1p without its correction",
        KERNELS,
        "tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0))",
        "tl.log(u)",
        (f"{TRITON}::test_finish_rows_at_every_size_of_the_sum",),
    ),
    Mutant(
        "triton: 1 - exp instead of expm1",
        KERNELS,
        "-_expm1(logprob) * logit_scale",
        "(1.0 - tl.exp(logprob)) * logit_scale",
        (f"{TRITON}::test_finish_rows_at_every_size_of_the_sum",),
    ),
    Mutant(
        "triton: target term without the softcap's slope",
        KERNELS,
        "target_coeff *= 1.0 - ratio * ratio",
        "target_coeff *= 1.0",
        HEAD,
        KEPT,
    ),
    Mutant(
        "triton: E term without the logit scale",
        KERNELS,
        "(logit_scale / total)",
        "(1.0 / total)",
        HEAD,
        KEPT,
    ),
    Mutant(
        "triton: a target out of range has a number, not NaN",
        KERNELS,
        'tl.where(valid, z, float("nan"))',
        "z",
        (f"{TRITON}::test_a_target_out_of_range_is_nan_in_its_row_only",),
        "257",
    ),
    Mutant(
        "triton: sequences add up float32 values",
        KERNELS,
        "mask=rows < last, other=0.0)\n    tl.store(out_ptr + b",
        "mask=rows < last, other=0.0).to(tl.float32)\n    tl.store(out_ptr + b",
        (f"{TRITON}::test_segment_sums_around_the_block",),
    ),
    Mutant(
        "triton: a sequence's last token is left out",
        KERNELS,
        "mask=rows < last, other=0.0)\n    tl.store(out_ptr + b",
        "mask=rows < last - 1, other=0.0)\n    tl.store(out_ptr + b",
        (f"{TRITON}::test_segment_sums_around_the_block",),
    ),
)

PRODUCTS = (
    Mutant(
        "triton: hidden's gradient without the row's scale",
        KERNELS,
        "out = -e_coeff * tl.load(product_ptr",
        "out = -1.0 * tl.load(product_ptr",
        (f"{TRITON}::test_row_grad",),
        "24",
    ),
    Mutant(
        "triton: hidden's gradient is taken for dense",
        KERNELS,
        "tl.store(out_ptr + t * out_stride_t + d, out.to",
        "tl.store(out_ptr + t * width + d, out.to",
        (f"{TRITON}::test_row_grad",),
        "24",
    ),
    Mutant(
        "triton: hidden's gradient picks rows of a weight taken for dense",
        KERNELS,
        "d.to(tl.int64) * matrix_stride_d",
        "d.to(tl.int64)",
        (f"{TRITON}::test_strides",),
        "transposed and dtype1",
    ),
    Mutant(
        "triton: every block of hidden's gradient lands on the first",
        BACKEND,
        "e_coeff_C[rows],\n                out_CD[rows],",
        "e_coeff_C[rows],\n                out_CD,",
        (f"{TRITON}::test_row_grad_in_blocks_of_rows",),
    ),
    Mutant(
        "triton: every block of hidden's gradient takes the first block's targets",
        BACKEND,
        "else targets_C[rows],\n                acc_RD",
        "else targets_C,\n                acc_RD",
        (f"{TRITON}::test_row_grad_in_blocks_of_rows",),
    ),
    Mutant(
        "triton: the weight's gradient forgets the earlier chunks",
        BACKEND,
        "beta=1.0 if accumulate else 0.0",
        "beta=0.0",
        (f"{TRITON}::test_col_grad",),
        "dtype2-24",
    ),
    Mutant(
        "triton: 16-bit gradients add the target rows twice",
        BACKEND,
        "chunked.col_grad(e_CV, rows_CD, None, None,",
        "chunked.col_grad(e_CV, rows_CD, targets_C, target_coeff_C,",
        (f"{TRITON}::test_col_grad",),
        "dtype0-24",
    ),
    Mutant(
        "triton: repeated labels take another row's coefficient",
        KERNELS,
        "rows = tl.load(order_ptr + places, mask=ours, other=0)",
        "rows = places",
        (f"{TRITON}::test_col_grad",),
        "dtype2-24",
    ),
    Mutant(
        "triton: a label's rows beyond the first block are lost",
        KERNELS,
        "more = tl.where(tl.sum(ours.to(tl.int32), 0) == BLOCK_T, more + BLOCK_T, num_rows)",
        "more = num_rows",
        (f"{TRITON}::test_a_repeated_label_in_wide_rows",),
    ),
    Mutant(
        "triton: every row of a repeated label adds the rest of it",
        KERNELS,
        "if (place == 0) | (before != label):",
        "if place >= 0:",
        (f"{TRITON}::test_a_repeated_label_in_wide_rows",),
    ),
    Mutant(
        "triton: the lowest label of the batch is left out",
        KERNELS,
        "if (place == 0) | (before != label):",
        "if before != label:",
        (f"{TRITON}::test_a_repeated_label_in_wide_rows",),
    ),
)

DISTRIBUTION = (
    Mutant(
        "triton statistics: a later tile wins a tie",
        WHOLE,
        "tl.where(high_T > top_T, index_T, best_T)",
        "tl.where(high_T >= top_T, index_T, best_T)",
        (f"{TRITON}::test_the_lowest_index_wins_a_tie_in_tile_split_and_batch",),
    ),
    Mutant(
        "triton statistics: a later split wins a tie",
        WHOLE,
        "tl.min(tl.where(inside, index, 2147483647), 0)",
        "tl.max(tl.where(inside, index, -1), 0)",
        (f"{TRITON}::test_the_lowest_index_wins_a_tie_in_tile_split_and_batch",),
    ),
    Mutant(
        "triton statistics: variances of tiles merged without the distance of the means",
        WHOLE,
        "variance_T += share_T * (1.0 - share_T) * delta_T * delta_T",
        "variance_T += 0.0",
        (f"{DISTRIBUTIONS}::test_token_stats",),
        "triton and dtype1 and keep",
    ),
    Mutant(
        "triton statistics: variances of splits merged without the distance of the means",
        WHOLE,
        " + distance * distance",
        "",
        (f"{DISTRIBUTIONS}::test_token_stats",),
        "triton and dtype1 and keep",
    ),
    Mutant(
        "triton statistics: an older tile's mass keeps its old offset",
        WHOLE,
        "mass_T * tl.exp2(tl.maximum(base_T - new_base_T, FLOOR) * LOG2E)",
        "mass_T",
        (f"{DISTRIBUTIONS}::test_token_stats",),
        "triton and dtype1 and keep",
    ),
    Mutant(
        "triton statistics: the target counts twice",
        WHOLE,
        'rest = tl.where(is_target, float("-inf"), z)',
        "rest = z",
        (f"{DISTRIBUTIONS}::test_token_stats",),
        "triton and dtype1 and keep",
    ),
    Mutant(
        "triton statistics: log instead of log1p",
        WHOLE,
        "_log1p(tl.exp(-tl.abs(lead)))",
        "tl.log(1.0 + tl.exp(-tl.abs(lead)))",
        (f"{TRITON}::test_token_stats_of_a_memorised_row_below_the_last_bit_of_1",),
    ),
    Mutant(
        "triton statistics: a NaN among the logits is swallowed",
        WHOLE,
        "x = tl.where(z != z, z, x)",
        "x = x + 0.0",
        (f"{TRITON}::test_a_nan_reaches_every_row_that_it_should",),
    ),
    Mutant(
        "triton statistics: a target out of range has a number, not NaN",
        WHOLE,
        "tl.where(valid, logprob, nan)",
        "logprob",
        (f"{TRITON}::test_a_target_out_of_range_is_nan_in_its_row_only",),
        "257",
    ),
    Mutant(
        "triton statistics: every block of rows lands on the first",
        BACKEND,
        "stats_4C[:, rows], count",
        "stats_4C, count",
        SMALLEST,
        "300 and fused",
    ),
    Mutant(
        "triton KL: the reference gets the policy's bias",
        WHOLE,
        "REF_WIDEN, False, HAS_SCALE",
        "REF_WIDEN, HAS_BIAS, HAS_SCALE",
        (f"{TRITON}::test_kl_without_gradients",),
        "17-129-15-dtype2",
    ),
    Mutant(
        "triton KL: the reference gets the policy's LoRA",
        WHOLE,
        "BLOCK_K, 0, False, REF_EVEN_K",
        "BLOCK_K, BLOCK_R, False, REF_EVEN_K",
        (f"{TRITON}::test_kl_without_gradients_with_lora",),
    ),
    Mutant(
        "triton KL: the reference's width is masked like the policy's",
        BACKEND,
        "REF_EVEN_K=ref_weight.shape[1] % config.block_k == 0",
        "REF_EVEN_K=weight.shape[1] % config.block_k == 0",
        (f"{TRITON}::test_kl_without_gradients_of_an_even_and_an_odd_width",),
    ),
    Mutant(
        "triton KL: a split's sum keeps its old maximum",
        WHOLE,
        "a_T = a_T * shrink_q_T + tl.sum(q * u, 1)",
        "a_T = a_T + tl.sum(q * u, 1)",
        (f"{TRITON}::test_kl_without_gradients_of_models_far_apart",),
    ),
    Mutant(
        "triton KL: -inf - -inf beyond the vocabulary",
        WHOLE,
        "u = tl.where(q == 0.0, 0.0, z - r)",
        "u = z - r",
        (f"{TRITON}::test_kl_without_gradients",),
        "17-129-15-dtype2",
    ),
    Mutant(
        "triton KL: terms of nearby models cancel",
        WHOLE,
        "term = tl.where((tl.abs(u) < 0.5) & (q > 0.0), q * series, p - q - q * u)",
        "term = p - q - q * u",
        (f"{TRITON}::test_kl_without_gradients_of_equal_and_nearby_models",),
    ),
    Mutant(
        "triton KL: the form for nearby models serves all",
        WHOLE,
        "kl = tl.where(tl.abs(difference) < 0.5, near, far)",
        "kl = near",
        (f"{TRITON}::test_kl_without_gradients_of_models_far_apart",),
    ),
    Mutant(
        "triton KL: the form for distant models serves all",
        WHOLE,
        "kl = tl.where(tl.abs(difference) < 0.5, near, far)",
        "kl = far",
        (f"{TRITON}::test_kl_without_gradients_of_equal_and_nearby_models",),
    ),
    Mutant(
        "triton KL: every block of rows takes the first block's reference",
        BACKEND,
        "hidden_CH[rows], ref_hidden[rows]",
        "hidden_CH[rows], ref_hidden",
        SMALLEST,
        "300 and fused",
    ),
    Mutant(
        "triton KL: G without the softcap's slope",
        WHOLE,
        "difference *= 1.0 - (z / softcap) * (z / softcap)",
        "difference *= 1.0",
        (f"{DISTRIBUTIONS}::test_kl_of_another_width",),
        "triton and dtype1 and parts1 and keep",
    ),
    Mutant(
        "triton KL: logits far from 0 round before they meet their maximum",
        WHOLE,
        "((z - max_p) - (r - max_q)) - shift",
        "(z - r) - ((max_p + log_mass_p) - (max_q + log_mass_q))",
        (f"{TRITON}::test_the_gradient_of_kl_does_not_see_how_far_the_logits_lie_from_0",),
    ),
)

CHOOSING = (
    Mutant(
        "triton plans: heads of other dtypes share a measurement",
        TUNING,
        'V {vocab} {dtypes}"',
        'V {vocab} bfloat16/bfloat16"',
        (f"{PLANS}::test_every_kind_of_head_has_a_measurement_of_its_own",),
    ),
    Mutant(
        "triton plans: heads of other widths share a measurement",
        TUNING,
        "H {width} V {vocab}",
        "V {vocab}",
        (f"{PLANS}::test_every_kind_of_head_has_a_measurement_of_its_own",),
    ),
    Mutant(
        "triton plans: a broken cache file is an error",
        TUNING,
        "except (OSError, ValueError, AttributeError):",
        "except OSError:",
        (f"{PLANS}::test_a_broken_cache_is_measured_anew_and_written_anew",),
    ),
    Mutant(
        "triton plans: a folder that cannot be written is an error",
        TUNING,
        "with contextlib.suppress(OSError):",
        "with contextlib.nullcontext():",
        (f"{PLANS}::test_a_folder_that_cannot_be_written_costs_nothing_but_the_file",),
    ),
    Mutant(
        "triton plans: a stored plan that is no longer shipped is an error",
        TUNING,
        "with contextlib.suppress(ValueError):",
        "with contextlib.nullcontext():",
        (f"{PLANS}::test_a_plan_that_is_no_longer_shipped_is_measured_anew",),
    ),
    Mutant(
        "triton plans: a plan is measured while a graph is captured",
        TUNING,
        "if hidden.shape[0] < MIN_ROWS or torch.cuda.is_current_stream_capturing():",
        "if hidden.shape[0] < MIN_ROWS:",
        (f"{PLANS}::test_nothing_is_measured_with_few_rows_under_capture_or_when_told_not_to",),
    ),
    Mutant(
        "triton plans: a plan that the device refuses is an error",
        TUNING,
        "except Exception as error:",
        "except RuntimeError as error:",
        (f"{PLANS}::test_a_plan_the_device_refuses_is_left_out",),
    ),
    Mutant(
        "triton plans: a forced plan is never forgotten",
        TUNING,
        "_forced.pop()",
        "pass",
        (f"{PLANS}::test_forced_plans",),
    ),
)

TRITON_MUTANTS = (*TILES, *LIBRARY, *REDOING, *FINISHING, *PRODUCTS, *DISTRIBUTION, *CHOOSING)
