"""Gradients by slices of the vocabulary, all rows at a time: the schedule "columns", and hidden's gradient alone.

A weight's gradient that is accumulated over chunks of rows needs float32 sums of V x H, which on a CPU cost more than a
product: first touch, a pass per chunk, a cast. Over slices of the vocabulary each is formed once, in its final dtype,
and only hidden's is accumulated. E of as many columns as there is memory for is kept from the forward, and that of the
others computed again, a slice at a time: 3 + (1 - kept share) units.

That memory is the workspace and the weight's gradient itself: slices of E wait in rows of it that are written only
after they were used, and where N <= H all of E has room. The gradient is therefore allocated in the forward: between
forward and backward a call holds what it would hold at its peak, in the backward.

Where hidden alone wants a gradient nothing is kept: E W is summed before S is known and normalised at the end, 2 units
(StreamedChunks).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .options import ONLY_HIDDEN
from .problem import OFFSET, Coefficients, Gradients, Problem

# Slices of the vocabulary narrower than this would repack the rows for little.
_FEWEST = 1024
# Columns of a cache line of 16 bits. E's rows are an odd number of lines apart, or many would share a set of the cache.
_LINE = 32
# Rows that are normalised at a time, while their sums are in the cache.
_BLOCK_ROWS = 64


class Slices(NamedTuple):
    """The vocabulary by where E waits for the backward: the first columns in the memory of the weight's gradient, in
    slices of `size`; the next in the workspace; the rest nowhere, computed again in slices of `size`."""

    in_gradient: int
    in_workspace: int
    size: int

    @property
    def kept(self) -> int:
        return self.in_gradient + self.in_workspace

    def edges(self, vocab: int) -> list[tuple[int, int]]:
        """(start, stop) in the order in which the backward uses them."""
        starts = [
            *range(0, self.in_gradient, self.size),
            *([self.in_gradient] if self.in_workspace else []),
            *range(self.kept, vocab, self.size),
        ]
        return list(zip(starts, [*starts[1:], vocab], strict=True))


class Kept:
    """E of the kept slices by first column, and the weight's gradient in whose memory some of them lie: from `values`
    to the first `gradients`, which writes over both."""

    def __init__(self, slices: Slices) -> None:
        self.slices = slices
        self.e_NS: dict[int, Tensor] = {}
        self.weight_grad_VH: Tensor | None = None

    def take(self) -> tuple[dict[int, Tensor], Tensor | None]:
        taken = self.e_NS, self.weight_grad_VH
        self.e_NS, self.weight_grad_VH = {}, None
        return taken


def applies(problem: Problem) -> bool:
    """Whether weights want gradients and the backend's products cost less than float32 sums over chunks of rows."""
    needs = problem.spec.needs
    return (needs.weight or needs.bias or needs.lora_b) and _preferred(problem) and _that_fit(problem) >= _FEWEST


def _preferred(problem: Problem) -> bool:
    return problem.targets_N is not None and problem.backend.prefers_columns(problem.hidden_NH, problem.weight_VH)


def _that_fit(problem: Problem, num_rows: int | None = None, beside: int = 0) -> int:
    """Columns of E of so many rows (None: all) that fit the workspace beside the scratch and these bytes."""
    num_rows = num_rows or problem.num_rows
    scratch_bytes = problem.scratch_elements(num_rows) * problem.dtype.itemsize
    return (problem.spec.workspace_bytes - scratch_bytes - beside) // (num_rows * problem.e_dtype.itemsize)


def _of_a_slice(problem: Problem, that_fit: int) -> int:
    """Columns, the whole vocabulary or an odd number of lines: the widest, since each slice costs a pass over hidden's
    sums and packs the rows anew."""
    return problem.vocab if that_fit >= problem.vocab else _odd_lines(that_fit)


def _odd_lines(columns: int) -> int:
    lines = columns // _LINE
    return max(1, columns if lines == 0 else (lines - 1 + lines % 2) * _LINE)


def _slices(problem: Problem) -> Slices:
    """Nothing is kept while torch.compile traces, since whether a row was redone is read by the host."""
    num_rows, vocab, width = problem.num_rows, problem.vocab, problem.width
    size = _of_a_slice(problem, _that_fit(problem))
    if torch.compiler.is_compiling():
        return Slices(0, 0, size)
    if not problem.spec.needs.weight:
        return Slices(0, size, size)
    # E of c columns ends where the gradient ends. The slice from column a on begins (c - a) N before that end, and is
    # used while rows a to a + size are written: (c - a) N <= (V - a - size) H, for a = 0 and for a = c.
    most = (vocab - size) * min(width, num_rows) // num_rows
    return Slices(most if most == vocab - size else most // _LINE * _LINE, size, size)


def values(problem: Problem) -> tuple[Coefficients, Kept | None]:
    """Of all rows, and what is kept of E."""
    vocab, num_rows, slices = problem.vocab, problem.num_rows, _slices(problem)
    kept, scratch, exp_sums = Kept(slices), problem.scratch(num_rows), problem.backend.steps.exp_sums
    all_inputs, target_logit_N = problem.begin(slice(0, num_rows), scratch)
    offset_N, sums_N = target_logit_N + OFFSET, torch.zeros_like(target_logit_N)
    if slices.in_gradient:
        grad_VH = problem.empty(*problem.weight_VH.shape, dtype=problem.weight_VH.dtype)
        at_its_end = grad_VH.view(-1).view(problem.e_dtype)[-num_rows * slices.in_gradient :]
        for e_flat in at_its_end.split(num_rows * slices.size):
            kept.e_NS[len(kept.e_NS) * slices.size] = e_flat.view(num_rows, -1)
        kept.weight_grad_VH = grad_VH
    if slices.in_workspace:
        kept.e_NS[slices.in_gradient] = problem.empty(num_rows, slices.in_workspace, dtype=problem.e_dtype)
    part_N = torch.empty_like(sums_N)
    for start, e_NS in kept.e_NS.items():
        inputs = _inputs(problem, slice(start, start + e_NS.shape[1]))
        exp_sums(*inputs, offset_N, part_N, e_NS, scratch)
        sums_N.add_(part_N)
    if slices.kept < vocab:
        exp_sums(*_inputs(problem, slice(slices.kept, vocab)), offset_N, part_N, None, scratch)
        sums_N.add_(part_N)
    rows = problem.finish(all_inputs, target_logit_N, offset_N, sums_N, None, scratch)
    # a row that was redone has another offset than its part of E
    return rows, kept if kept.e_NS and torch.equal(offset_N, target_logit_N + OFFSET) else None


def gradients(problem: Problem, rows: Coefficients, kept: Kept | None) -> Gradients:
    """All gradients, in their final dtypes, from rows with upstream applied and what `values` kept. A second call (of a
    retained graph) computes the kept columns again, in the same slices: the same bits."""
    assert problem.targets_N is not None and rows.offset_C is not None
    num_rows, vocab, needs = problem.num_rows, problem.vocab, problem.spec.needs
    slices = _slices(problem)._replace(in_gradient=0, in_workspace=0) if kept is None else kept.slices
    there, weight_grad_VH = ({}, None) if kept is None else kept.take()
    grads = problem.new_gradients(final=True, needs=needs._replace(weight=needs.weight and weight_grad_VH is None))
    grads.weight_VH = grads.weight_VH if weight_grad_VH is None else weight_grad_VH
    hidden_sum = None if grads.hidden_NH is None else problem.empty(num_rows, problem.width).zero_()
    inner_sum = None
    if problem.lora_b_VR is not None and (grads.hidden_NH is not None or grads.lora_a_RH is not None):
        inner_sum = problem.empty(num_rows, problem.lora_b_VR.shape[1]).zero_()
    scratch, ignored_N = problem.scratch(num_rows), torch.empty_like(rows.e_coeff_C)
    edges = slices.edges(vocab)
    again = there.get(slices.in_gradient)  # written over once it is used
    if again is None and any(start not in there for start, _ in edges):
        widest = max(stop - start for start, stop in edges if start not in there)
        again = problem.empty(num_rows, widest, dtype=problem.e_dtype)
    for start, stop in edges:
        e_NS = there.pop(start, None)
        if e_NS is None:
            assert again is not None
            e_NS = again.view(-1)[: num_rows * (stop - start)].view(num_rows, stop - start)
            inputs = _inputs(problem, slice(start, stop))
            problem.backend.steps.exp_sums(*inputs, rows.offset_C, ignored_N, e_NS, scratch)
        _add_slice(problem, rows, start, e_NS, grads, (hidden_sum, inner_sum), scratch)
    if grads.hidden_NH is not None and hidden_sum is not None:
        grads.hidden_NH.copy_(hidden_sum)
    if inner_sum is not None:
        problem.add_lora_a(0, inner_sum, grads)
    return grads


def _inputs(problem: Problem, cols: slice, rows: slice = slice(None)) -> tuple[Any, ...]:
    """exp_sums' for these columns; a target beyond them is no column's number."""
    assert problem.targets_N is not None
    bias, inner, lora_b, spec = problem.bias_V, problem.lora_hidden_NR, problem.lora_b_VR, problem.spec
    head = (
        None if bias is None else bias[cols],
        None if inner is None else inner[rows],
        None if lora_b is None else lora_b[cols],
    )
    targets_C = problem.targets_N[rows] - cols.start
    return problem.hidden_NH[rows], problem.weight_VH[cols], targets_C, *head, spec.logit_scale, spec.softcap


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


# ------------------------------------------------------------------------------------------------------- hidden alone


class StreamedChunks:
    """Chunks of rows whose hidden alone wants a gradient (problem.RowChunks has the same methods).

    Each slice of E is used as soon as it is there: sum_v E_tv W_v in float32, to which `add_gradients` applies the
    coefficients. A chunk has more rows than one that holds E of the whole vocabulary, so the weight is packed less
    often.
    """

    @staticmethod
    def serves(problem: Problem) -> bool:
        """Whether the backend prefers this. Not while torch.compile traces: rows that are redone are read by the
        host."""
        if torch.compiler.is_compiling() or problem.spec.needs != ONLY_HIDDEN or not _preferred(problem):
            return False
        size = StreamedChunks.most(problem)
        return size > 0 and _that_fit(problem, size, StreamedChunks._sums_bytes(problem, size)) >= _FEWEST

    @staticmethod
    def most(problem: Problem) -> int:
        """Rows whose sums take a quarter of the workspace."""
        return min(problem.num_rows, problem.spec.workspace_bytes // 4 // StreamedChunks._sums_bytes(problem, 1))

    @staticmethod
    def _sums_bytes(problem: Problem, num_rows: int) -> int:
        return num_rows * problem.dtype.itemsize * sum(matrix.shape[1] for matrix in _matrices(problem))

    def __init__(self, problem: Problem, size: int) -> None:
        self.problem, self.size, self.scratch = problem, size, problem.scratch(size)
        that_fit = _that_fit(problem, size, self._sums_bytes(problem, size))
        self.columns = _of_a_slice(problem, that_fit)
        self._e = problem.empty(size * self.columns, dtype=problem.e_dtype)
        self._sums = [problem.empty(size, matrix.shape[1]) for matrix in _matrices(problem)]

    def values(self, start: int, stop: int) -> Coefficients:
        return self.problem.evaluate(start, stop, None, self.scratch)

    def evaluate(self, start: int, stop: int) -> Coefficients:
        """Values of rows start:stop; their sums stay until the next call."""
        problem, steps, span, count = self.problem, self.problem.backend.steps, slice(start, stop), stop - start
        all_inputs, target_logit_C = problem.begin(span, self.scratch)
        offset_C, sums_C = target_logit_C + OFFSET, torch.zeros_like(target_logit_C)
        part_C = torch.empty_like(sums_C)
        for first in range(0, problem.vocab, self.columns):
            cols = slice(first, min(first + self.columns, problem.vocab))
            e_CS = self._e[: count * (cols.stop - first)].view(count, -1)
            steps.exp_sums(*_inputs(problem, cols, span), offset_C, part_C, e_CS, self.scratch)
            sums_C.add_(part_C)
            self._add_products(e_CS, cols, [total[:count] for total in self._sums], accumulate=first > 0)
        rows = problem.finish(all_inputs, target_logit_C, offset_C, sums_C, None, self.scratch)
        redone = (offset_C != target_logit_C + OFFSET).nonzero()[:, 0]
        that_fit = max(1, self._e.numel() // problem.vocab)
        for first in range(0, len(redone), that_fit):
            index = redone[first : first + that_fit]
            self._redo(index, problem.select(index + start), rows)
        return rows

    def _add_products(self, e_CS: Tensor, cols: slice, sums: list[Tensor], *, accumulate: bool) -> None:
        """(+)= E W of these columns, and E B."""
        none = (
            torch.zeros(len(e_CS), dtype=torch.int64, device=e_CS.device),
            e_CS.new_zeros(len(e_CS), dtype=self.problem.dtype),
        )
        for total, matrix in zip(sums, _matrices(self.problem), strict=True):
            self.problem.backend.steps.row_grad(e_CS, matrix[cols], *none, none[1] - 1, accumulate, total, self.scratch)

    def _redo(self, index: Tensor, part: Problem, rows: Coefficients) -> None:
        """Sums and coefficients of these rows of the chunk, for the offset that they got in the end."""
        elements = part.num_rows * part.vocab
        e_CV = self._e[:elements].view(-1, part.vocab) if elements <= self._e.numel() else part.new_e(part.num_rows)
        again = part.evaluate(0, part.num_rows, e_CV, self.scratch)
        sums = [total.new_empty(part.num_rows, total.shape[1]) for total in self._sums]
        self._add_products(e_CV, slice(None), sums, accumulate=False)
        for total, corrected in zip(self._sums, sums, strict=True):
            total[index] = corrected
        for mine, corrected in zip(rows, again, strict=True):
            if mine is not None:
                mine[index] = corrected

    def add_gradients(self, start: int, stop: int, rows: Coefficients, grads: Gradients) -> None:
        """Writes hidden's rows start:stop, the last evaluated."""
        problem = self.problem
        assert grads.hidden_NH is not None
        normalised = [
            self._normalised(start, stop, rows, *pair) for pair in zip(self._sums, _matrices(problem), strict=True)
        ]
        grads.hidden_NH[start:stop] = normalised[0]
        for inner_CR in normalised[1:]:
            problem.add_lora_a(start, inner_CR, grads)

    def _normalised(self, start: int, stop: int, rows: Coefficients, total: Tensor, matrix: Tensor) -> Tensor:
        """target_coeff matrix[y] - e_coeff sum, written over the sum."""
        assert self.problem.targets_N is not None and rows.target_coeff_C is not None
        targets_C, count = self.problem.targets_N[start:stop], stop - start
        for first in range(0, count, _BLOCK_ROWS):
            block = slice(first, min(first + _BLOCK_ROWS, count))
            part, at_target = total[block].mul_(-rows.e_coeff_C[block, None]), matrix[targets_C[block]].to(total.dtype)
            part.addcmul_(at_target, rows.target_coeff_C[block, None])
        return total[:count]


def _matrices(problem: Problem) -> list[Tensor]:
    """What E is multiplied with for hidden's gradient."""
    return [problem.weight_VH, *([] if problem.lora_b_VR is None else [problem.lora_b_VR])]
