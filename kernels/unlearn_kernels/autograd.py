"""The autograd functions and the choice of schedule. Backend-agnostic: what is computed on a run of rows is in
`problem.py`.

RowValues serves every per-row value (log-probabilities, KL) under any upstream gradient:
    none       nothing wants a gradient: no E, 1 unit (2 for KL)
    keep       E of the batch fits the workspace and is kept; both products in the backward: 3 units, 2 with a side
               frozen
    unscaled   it does not, and only hidden wants a gradient: E is used up chunk by chunk into an unscaled dhidden in
               the forward; the backward is a row scaling: 2 units. Chunks of rows, or, where the backend's products are
               cheap, of more rows and a slice of the vocabulary at a time (columns.StreamedChunks)
    columns    weights want one too, and the backend's products are cheap: E of some columns is kept, that of the rest
               computed again, a slice of the vocabulary at a time, in the backward: 3 to 4 units, and each gradient is
               written once (columns.py)
    recompute  otherwise: E is computed again, chunk by chunk, in the backward: 4 units
SequenceLoss knows the loss, so chunks of whole groups get their upstream gradient in the forward: 3 units at any size;
or "columns" as above.

A retained graph gives the same gradients twice: neither backward writes into what the forward saved, but for
"columns", which computes that part again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import columns
from .backends import BACKENDS
from .objectives import Objective
from .options import ONLY_HIDDEN, Spec
from .problem import Coefficients, Gradients, Problem, RowChunks

_NO_DOUBLE_BACKWARD = (
    "unlearn_kernels: second derivatives are not available; the gradient of a fused log-likelihood or loss was itself "
    "differentiated. Call backward without create_graph=True, or use unlearn_kernels.reference"
)


class _Once(torch.autograd.Function):
    """Identity on a gradient that refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *sources: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(_NO_DOUBLE_BACKWARD)


def _once(gradients: tuple[Tensor | None, ...], *sources: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under create_graph=True the gradients stay connected to what they depend on, by a node that refuses."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return gradients
    connected = [source for source in sources if source is not None and source.requires_grad]
    return tuple(None if grad is None else _Once.apply(grad, *connected) for grad in gradients)


def choose_schedule(problem: Problem) -> str:
    needs = problem.spec.needs
    if not any(needs):
        return "none"
    if problem.num_rows <= problem.rows_that_fit():
        return "keep"
    if columns.applies(problem):
        return "columns"
    return "unscaled" if needs == ONLY_HIDDEN else "recompute"


class RowValues(torch.autograd.Function):
    """value_t per row, float64 [N]: log p(y_t), or KL(ref || policy) where a reference is given."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        targets: Tensor | None,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        spec: Spec,
    ) -> Tensor:
        problem = Problem(hidden, weight, bias, lora_a, lora_b, targets, ref_hidden, ref_weight, spec)
        num_rows = problem.num_rows
        schedule = choose_schedule(problem)
        inputs = (hidden, weight, bias, lora_a, lora_b, targets, ref_hidden, ref_weight)
        kept: tuple[Tensor | None, ...] = (None, None, None)
        if schedule == "keep":
            e_NV = problem.new_e(num_rows)
            rows = problem.evaluate(0, num_rows, e_NV, problem.scratch(num_rows))
            kept = (e_NV, rows.target_coeff_C, rows.e_coeff_C)
            value = rows.value_C
        elif schedule == "unscaled":
            value, dhidden = _unscaled(problem)
            kept = (dhidden, None, None)
        elif schedule == "columns":
            rows, ctx.columns = columns.values(problem)
            value, kept = rows.value_C, (rows.target_coeff_C, rows.e_coeff_C, rows.offset_C)
        else:
            value = problem.evaluate(0, num_rows, None, problem.scratch(num_rows)).value_C
        ctx.spec, ctx.schedule = spec, schedule
        ctx.save_for_backward(*inputs, *kept)
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        hidden, weight, bias, lora_a, lora_b, targets, ref_hidden, ref_weight, *kept = ctx.saved_tensors
        with torch.no_grad():
            problem = Problem(hidden, weight, bias, lora_a, lora_b, targets, ref_hidden, ref_weight, ctx.spec)
            if ctx.schedule == "keep":
                gradients = _from_kept(problem, kept, upstream)
            elif ctx.schedule == "columns":
                gradients = _by_columns(problem, kept, ctx.columns, upstream)
            elif ctx.schedule == "unscaled":
                gradients = problem.scaled(Gradients(hidden_NH=kept[0]), upstream)
            else:
                gradients = _recompute(problem, upstream)
        return *_once(gradients, upstream, hidden, weight, bias, lora_a, lora_b), None, None, None, None


def _from_kept(problem: Problem, kept: Any, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
    e_NV, target_coeff_N, e_coeff_N = kept
    rows = Coefficients(upstream_N, target_coeff_N, e_coeff_N).times(upstream_N)
    grads = problem.new_gradients(final=True)
    problem.add_gradients(0, problem.num_rows, e_NV, rows, grads, problem.scratch(problem.num_rows))
    return problem.scaled(grads, None)


def _by_columns(
    problem: Problem, saved: Any, kept: columns.Kept | None, upstream_N: Tensor
) -> tuple[Tensor | None, ...]:
    target_coeff_N, e_coeff_N, offset_N = saved
    rows = Coefficients(upstream_N, target_coeff_N, e_coeff_N, offset_N).times(upstream_N)
    return problem.scaled(columns.gradients(problem, rows, kept), None)


Chunks = RowChunks | columns.StreamedChunks


def _kind_of_chunks(problem: Problem) -> type[RowChunks] | type[columns.StreamedChunks]:
    return columns.StreamedChunks if columns.StreamedChunks.serves(problem) else RowChunks


def _unscaled(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """Values and the gradient of hidden for an upstream gradient of 1, chunk by chunk."""
    grads = problem.new_gradients(final=False)
    kind = _kind_of_chunks(problem)
    chunks = kind(problem, even_chunk(problem.num_rows, kind.most(problem)))
    values = []
    for start in range(0, problem.num_rows, chunks.size):
        stop = min(start + chunks.size, problem.num_rows)
        rows = chunks.evaluate(start, stop)
        chunks.add_gradients(start, stop, rows, grads)
        values.append(rows.value_C)
    return torch.cat(values), grads.hidden_NH


def _recompute(problem: Problem, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
    size = min(even_chunk(problem.num_rows, problem.rows_that_fit()), problem.num_rows)
    grads = problem.new_gradients(final=size == problem.num_rows)
    add_recomputed(RowChunks(problem, size), 0, problem.num_rows, upstream_N, grads)
    return problem.scaled(grads, None)


def add_recomputed(chunks: Chunks, first: int, last: int, upstream_N: Tensor, grads: Gradients) -> None:
    """Gradients of rows first:last under a known upstream gradient."""
    for start in range(first, last, chunks.size):
        stop = min(start + chunks.size, last)
        rows = chunks.evaluate(start, stop).times(upstream_N[start:stop])
        chunks.add_gradients(start, stop, rows, grads)


class Plan(NamedTuple):
    """Where the sequences and groups lie, on the host and (boundaries alone, int64) on the device."""

    boundaries: list[int]  # B + 1 row numbers
    groups: list[int]  # sizes in sequences
    on_device: Tensor

    def chunks(self, max_rows: int) -> list[tuple[int, int]]:
        """Runs of whole groups, as sequence ranges, of at most max_rows rows; a longer group is a chunk of its own.

        Of about equal size: a small last chunk would leave most of a GPU idle.
        """
        max_rows = even_chunk(self.boundaries[-1], max_rows, slack=max_rows // 16)
        chunks, first, last = [], 0, 0
        for size in self.groups:
            if last > first and self.boundaries[last + size] - self.boundaries[first] > max_rows:
                chunks.append((first, last))
                first = last
            last += size
        return [*chunks, (first, last)]


def even_chunk(num_rows: int, max_rows: int, slack: int = 0) -> int:
    """The size of the fewest equal chunks, rounded up to whole tiles of 128 rows, plus slack; never above max_rows."""
    count = -(-num_rows // max_rows)
    return min(max_rows, (-(-num_rows // count) + 127) // 128 * 128 + slack)


class _Scores(NamedTuple):
    """Of some whole sequences: log-likelihoods, losses and dloss / dlogprob, float64 [b]."""

    logprob: Tensor
    loss: Tensor
    slope: Tensor


class SequenceLoss(torch.autograd.Function):
    """(sum of the objective's losses, logprobs [B], active [B]); gradients of the sum only."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        targets: Tensor,
        spec: Spec,
        objective: Objective,
        plan: Plan,
    ) -> tuple[Tensor, Tensor, Tensor]:
        problem = Problem(hidden, weight, bias, lora_a, lora_b, targets, None, None, spec)
        run = _LossRun(problem, objective, plan)
        ctx.spec = spec
        saved: tuple[Tensor | None, ...]
        if not any(spec.needs) or spec.skip_below > 0:
            run.values_first()
            grads = run.gradients_of_active() if any(spec.needs) else Gradients()
            ctx.kind, saved = "scale", _buffers(grads)
        elif problem.num_rows <= problem.rows_that_fit():
            e_NV, rows = run.keep()
            ctx.kind, saved = "keep", (e_NV, rows.target_coeff_C, rows.e_coeff_C)
        elif columns.applies(problem):
            rows, ctx.columns = run.by_columns()
            ctx.kind, saved = "columns", (rows.target_coeff_C, rows.e_coeff_C, rows.offset_C)
        else:
            ctx.kind, saved = "scale", _buffers(run.chunk_by_chunk())
        scores = run.scores()
        ctx.save_for_backward(hidden, weight, bias, lora_a, lora_b, targets, *saved)
        active = run.active(scores.slope)
        ctx.mark_non_differentiable(scores.logprob, active)
        ctx.set_materialize_grads(False)
        return scores.loss.sum(), scores.logprob, active

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *unused: Any) -> Any:
        if upstream is None:
            return (None,) * 9
        hidden, weight, bias, lora_a, lora_b, targets, *saved = ctx.saved_tensors
        with torch.no_grad():
            problem = Problem(hidden, weight, bias, lora_a, lora_b, targets, None, None, ctx.spec)
            if ctx.kind == "keep":
                gradients = _from_kept(problem, saved, upstream.expand(problem.num_rows))
            elif ctx.kind == "columns":
                gradients = _by_columns(problem, saved, ctx.columns, upstream.expand(problem.num_rows))
            else:
                gradients = problem.scaled(Gradients(*saved), upstream)
        return *_once(gradients, upstream, hidden, weight, bias, lora_a, lora_b), None, None, None, None


def _buffers(grads: Gradients) -> tuple[Tensor | None, ...]:
    return grads.hidden_NH, grads.weight_VH, grads.bias_V, grads.lora_a_RH, grads.lora_b_VR


class _LossRun:
    """One forward of SequenceLoss: rows to log-likelihoods to losses to slopes, in the order a schedule asks for."""

    def __init__(self, problem: Problem, objective: Objective, plan: Plan) -> None:
        self.problem, self.objective, self.plan = problem, objective, plan
        device = problem.hidden_NH.device
        self.boundaries = plan.on_device
        self.lengths = self.boundaries.diff()
        self.index = torch.arange(len(plan.boundaries) - 1, device=device)
        self.parts: list[_Scores] = []

    def score(self, first: int, last: int, value_C: Tensor) -> Tensor:
        """Sequences first:last from their rows' log-probabilities; returns the slope per row, float64."""
        offsets = self.boundaries[first : last + 1] - self.plan.boundaries[first]
        logprob = sequence_sums(value_C, offsets, self.problem.spec.backend)
        lengths, index = self.lengths[first:last], self.index[first:last]
        loss, slope = evaluate_objective(self.objective, logprob, lengths, index)
        self.parts.append(_Scores(logprob, loss, slope))
        return torch.repeat_interleave(slope, lengths, output_size=value_C.shape[0])

    def scores(self) -> _Scores:
        return _Scores(*(torch.cat(column) for column in zip(*self.parts, strict=True)))

    def active(self, slope: Tensor) -> Tensor:
        """A weight of exactly zero is inactive; so is one below the asked share of the largest. A NaN is active."""
        weight = slope.abs() * self.lengths
        return ~((weight == 0) | (weight < self.problem.spec.skip_below * weight.max()))

    def values_first(self) -> None:
        problem = self.problem
        rows = problem.evaluate(0, problem.num_rows, None, problem.scratch(problem.num_rows))
        self.score(0, self.index.shape[0], rows.value_C)

    def by_columns(self) -> tuple[Coefficients, columns.Kept | None]:
        rows, kept = columns.values(self.problem)
        return rows.times(self.score(0, self.index.shape[0], rows.value_C)), kept

    def keep(self) -> tuple[Tensor, Coefficients]:
        problem = self.problem
        e_NV = problem.new_e(problem.num_rows)
        rows = problem.evaluate(0, problem.num_rows, e_NV, problem.scratch(problem.num_rows))
        return e_NV, rows.times(self.score(0, self.index.shape[0], rows.value_C))

    def chunk_by_chunk(self) -> Gradients:
        problem = self.problem
        kind = _kind_of_chunks(problem)
        chunks = kind(problem, kind.most(problem))
        grads = problem.new_gradients(final=False)
        for first, last in self.plan.chunks(chunks.size):
            start, stop = self.plan.boundaries[first], self.plan.boundaries[last]
            if stop - start <= chunks.size:
                rows = chunks.evaluate(start, stop)
                rows = rows.times(self.score(first, last, rows.value_C))
                chunks.add_gradients(start, stop, rows, grads)
                continue
            # A group longer than the workspace: its values first, then its E again, piece by piece (one unit more).
            slope = self.score(first, last, chunks.values(start, stop).value_C)
            upstream_N = torch.cat([slope.new_zeros(start), slope])
            add_recomputed(chunks, start, stop, upstream_N, grads)
        return grads

    def gradients_of_active(self) -> Gradients:
        """skip_below: the largest weight is known only after all values (1 unit), then 3 units on the active rows."""
        problem, slope = self.problem, self.scores().slope
        grads = problem.new_gradients(final=False)
        for buffer in _buffers(grads):
            if buffer is not None:
                buffer.zero_()
        row_active = torch.repeat_interleave(self.active(slope), self.lengths)
        index = row_active.nonzero()[:, 0]
        if index.numel() == 0:
            return grads
        part = problem.select(index)
        part_grads = replace(grads, hidden_NH=part.new_gradients(final=False).hidden_NH, accumulate=True)
        kind = _kind_of_chunks(part)
        chunks = kind(part, min(kind.most(part), part.num_rows))
        add_recomputed(chunks, 0, part.num_rows, torch.repeat_interleave(slope, self.lengths)[index], part_grads)
        if grads.hidden_NH is not None:
            grads.hidden_NH[index] = part_grads.hidden_NH
        return grads


class _SequenceSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, boundaries: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(boundaries)
        ctx.num_rows = value.shape[0]
        out = torch.empty(boundaries.shape[0] - 1, dtype=value.dtype, device=value.device)
        BACKENDS[backend].steps.segment_sums(value, boundaries, out)
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        (boundaries,) = ctx.saved_tensors
        # output_size: without it the host would wait for the sum of the lengths
        return torch.repeat_interleave(upstream, boundaries.diff(), output_size=ctx.num_rows), None, None


def sequence_sums(value_N: Tensor, boundaries: Tensor, backend: str) -> Tensor:
    """Sums over value[boundaries[b]:boundaries[b + 1]], float64 [B]; a sequence's sum does not depend on its
    neighbours."""
    return _SequenceSums.apply(value_N, boundaries, backend)


def evaluate_objective(
    objective: Callable[[Tensor, Tensor, Tensor], Tensor], logprob: Tensor, lengths: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """The objective's losses [b] and their derivatives; constants where the objective ignores the log-likelihoods."""
    with torch.enable_grad():
        leaf = logprob.detach().requires_grad_()
        loss = objective(leaf, lengths, index)
        if not isinstance(loss, Tensor) or loss.shape != logprob.shape:
            given = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            accepted = f"a Tensor of shape {tuple(logprob.shape)}, one loss per sequence"
            raise ValueError(f"objective returned {given}; accepted: {accepted}")
        slope = torch.autograd.grad(loss.sum(), leaf, allow_unused=True)[0] if loss.requires_grad else None
    slope = torch.zeros_like(logprob) if slope is None else slope
    return loss.detach().to(logprob.dtype), slope
