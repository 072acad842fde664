"""The schedule "columns": gradients from slices of the vocabulary, all rows at a time.

A weight's gradient that is accumulated over chunks of rows needs float32 sums of V x H, which on a CPU cost more than a
product: first touch, a pass per chunk, a cast. Over slices of the vocabulary each is formed once, in its final dtype,
and only hidden's is accumulated. E of as many columns as the workspace holds is kept from the forward; once it is used,
that of the others is computed again in its place, a slice at a time: 3 + (1 - kept share) units.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from .problem import OFFSET, Coefficients, Gradients, Problem

# Slices of the vocabulary narrower than this would repack the rows for little.
_FEWEST = 1024
# A slice of E much larger than the caches costs its page faults and comes back from memory all the same.
_SLICE_BYTES = 64 << 20
# Of E: one chunk of rows more costs about as much as computing a tenth of E again.
_NEARLY_ALL = 0.9


class Kept:
    """E [N, K] of the first K columns, from `values` to the first `gradients`, which writes over it; then None."""

    def __init__(self, e_NK: Tensor) -> None:
        self.e_NK: Tensor | None = e_NK
        self.columns = e_NK.shape[1]

    def take(self) -> Tensor | None:
        e_NK, self.e_NK = self.e_NK, None
        return e_NK


def applies(problem: Problem) -> bool:
    """Whether the backend's products cost less than float32 sums over chunks of rows, where weights want gradients; or,
    where hidden alone does, than the weight packed anew for each chunk, because nearly all of E fits."""
    needs, prefers = problem.spec.needs, problem.backend.prefers_columns
    if problem.targets_N is None or not prefers(problem.hidden_NH, problem.weight_VH):
        return False
    fewest = _FEWEST if needs.weight or needs.bias or needs.lora_b else max(_FEWEST, _NEARLY_ALL * problem.vocab)
    return _that_fit(problem) >= fewest


def _that_fit(problem: Problem) -> int:
    """Columns of E, for all rows, that fit the workspace beside the scratch."""
    scratch_bytes = problem.scratch_elements(problem.num_rows) * problem.dtype.itemsize
    return (problem.spec.workspace_bytes - scratch_bytes) // (problem.num_rows * problem.e_dtype.itemsize)


def _of_a_slice(problem: Problem) -> int:
    preferred = max(_SLICE_BYTES // (problem.num_rows * problem.e_dtype.itemsize), _FEWEST)
    return min(_that_fit(problem), preferred, problem.vocab)


def _to_keep(problem: Problem) -> int:
    """What fits; nothing while torch.compile traces, since whether a row was redone is read by the host."""
    return 0 if torch.compiler.is_compiling() else min(_that_fit(problem), problem.vocab) // 32 * 32


def values(problem: Problem) -> tuple[Coefficients, Kept | None]:
    """Of all rows, and what is kept of E."""
    scratch = problem.scratch(problem.num_rows)
    inputs, target_logit_N = problem.begin(slice(0, problem.num_rows), scratch)
    offset_N, sums_N = target_logit_N + OFFSET, torch.empty_like(target_logit_N)
    exp_sums, count = problem.backend.steps.exp_sums, _to_keep(problem)
    if not count:
        exp_sums(*inputs, offset_N, sums_N, None, scratch)
        return problem.finish(inputs, target_logit_N, offset_N, sums_N, None, scratch), None
    e_NK = problem.empty(problem.num_rows, count, dtype=problem.e_dtype)
    exp_sums(*_inputs(problem, 0, count), offset_N, sums_N, e_NK, scratch)
    rest_N = torch.empty_like(sums_N)
    exp_sums(*_inputs(problem, count, problem.vocab), offset_N, rest_N, None, scratch)
    rows = problem.finish(inputs, target_logit_N, offset_N, sums_N.add_(rest_N), None, scratch)
    # a row that was redone has another offset than its part of e_NK
    return rows, Kept(e_NK) if torch.equal(offset_N, target_logit_N + OFFSET) else None


def gradients(problem: Problem, rows: Coefficients, kept: Kept | None) -> Gradients:
    """All gradients, in their final dtypes, from rows with upstream applied and what `values` kept. A second call (of a
    retained graph) computes the kept columns again, as one slice: the same bits."""
    assert problem.targets_N is not None and rows.offset_C is not None
    num_rows, vocab = problem.num_rows, problem.vocab
    grads = problem.new_gradients(final=True)
    hidden_sum = None if grads.hidden_NH is None else problem.empty(num_rows, problem.width).zero_()
    inner_sum = None
    if problem.lora_b_VR is not None and (grads.hidden_NH is not None or grads.lora_a_RH is not None):
        inner_sum = problem.empty(num_rows, problem.lora_b_VR.shape[1]).zero_()
    scratch, ignored_N = problem.scratch(num_rows), torch.empty_like(rows.e_coeff_C)
    first = 0 if kept is None else kept.columns
    size = _even(vocab - first, min(_of_a_slice(problem), first or vocab))
    e_NK = None if kept is None else kept.take()
    is_there = e_NK is not None
    e_flat = problem.empty(num_rows * max(first, size), dtype=problem.e_dtype) if e_NK is None else e_NK.view(-1)
    edges = [*([0] if first else []), *range(first, vocab, size), vocab]
    for start, stop in itertools.pairwise(edges):
        e_NS = e_flat[: num_rows * (stop - start)].view(num_rows, stop - start)
        if start > 0 or not is_there:
            inputs = _inputs(problem, start, stop)
            problem.backend.steps.exp_sums(*inputs, rows.offset_C, ignored_N, e_NS, scratch)
        _add_slice(problem, rows, start, e_NS, grads, (hidden_sum, inner_sum), scratch)
    if grads.hidden_NH is not None and hidden_sum is not None:
        grads.hidden_NH.copy_(hidden_sum)
    if inner_sum is not None:
        problem.add_lora_a(0, inner_sum, grads)
    return grads


def _even(count: int, at_most: int) -> int:
    """The size of slices of about equal size, in whole tiles of 32 columns where at_most has one."""
    if count <= at_most:
        return max(1, count)
    even = -(-count // -(-count // at_most))
    return min(-(-even // 32) * 32, at_most // 32 * 32 or at_most)


def _inputs(problem: Problem, first: int, last: int) -> tuple[Any, ...]:
    """exp_sums' for these columns; a target beyond them is no column's number."""
    assert problem.targets_N is not None
    cols = slice(first, last)
    bias, lora_b, spec = problem.bias_V, problem.lora_b_VR, problem.spec
    head = (None if bias is None else bias[cols], problem.lora_hidden_NR, None if lora_b is None else lora_b[cols])
    targets_N = problem.targets_N - first
    return problem.hidden_NH, problem.weight_VH[cols], targets_N, *head, spec.logit_scale, spec.softcap


def _add_slice(
    problem: Problem,
    rows: Coefficients,
    first: int,
    e_NS: Tensor,
    grads: Gradients,
    sums: tuple[Tensor | None, Tensor | None],
    scratch: Tensor,
) -> None:
    """Writes the slice of each weight's gradient and adds to the sums for hidden and for LoRA's A."""
    assert problem.targets_N is not None and rows.target_coeff_C is not None
    count = e_NS.shape[1]
    cols, targets_N = slice(first, first + count), problem.targets_N - first
    # a target beyond the slice is left out by a coefficient of 0
    inside_N = (targets_N >= 0) & (targets_N < count)
    target = (targets_N.clamp(0, count - 1), torch.where(inside_N, rows.target_coeff_C, 0.0), rows.e_coeff_C)
    for total, matrix in zip(sums, (problem.weight_VH, problem.lora_b_VR), strict=True):
        if total is not None and matrix is not None:
            problem.backend.steps.row_grad(e_NS, matrix[cols], *target, True, total, scratch)
    columns = (
        (problem.hidden_NH, grads.weight_VH),
        (rows.e_coeff_C.new_ones(problem.num_rows, 1), None if grads.bias_V is None else grads.bias_V[:, None]),
        (problem.lora_hidden_NR, grads.lora_b_VR),
    )
    for rows_ND, out_VD in columns:
        if out_VD is not None and rows_ND is not None:
            problem.backend.steps.col_grad(e_NS, rows_ND, *target, False, out_VD[cols], scratch)
