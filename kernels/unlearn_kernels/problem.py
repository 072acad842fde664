"""One batch as the schedules see it: its tensors, and the two things done to a run of rows, evaluate and add gradients.

With m_t = z_t[y_t] + 40, E_tv = exp(z_tv - m_t) for v != y_t (0 at y_t), S_t = sum_v E_tv and e_y = exp(z_y - m):

    logprob_t = -log1p(S_t / e_y)         (equal to -d - log(S_t + e_y), d = m - z_y, which is used when S_t / e_y may
    overflow) dlogprob_t / dz_tv = (1 - p_y) [v = y_t]  -  E_tv / (S_t + e_y)

so every gradient is made of `target_coeff_t x (a row at y_t) - e_coeff_t x (E's row t)` with coefficients that are N
numbers. The KL divergence has the same shape: dKL_t / dz_tv = p_tv - q_tv = G_tv, with no target term and e_coeff = -1.

Shape letters: N rows of the batch, C rows of the chunk at hand, H hidden, G the reference's hidden, V vocabulary, R
LoRA rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import BACKENDS, Backend
from .options import Needs, Spec, accumulation_dtype, exponential_dtype

OFFSET = 40.0
_LORA_BLOCK_ROWS = 1024
_CACHED_BYTES = 1 << 20


class Coefficients(NamedTuple):
    """value [C] float64 and what the gradient products need per row, all for an upstream gradient of 1; offset: E's m,
    for whoever computes E again."""

    value_C: Tensor
    target_coeff_C: Tensor | None
    e_coeff_C: Tensor
    offset_C: Tensor | None = None

    def times(self, upstream_C: Tensor) -> Coefficients:
        dtype, target_C = self.e_coeff_C.dtype, self.target_coeff_C
        target_C = None if target_C is None else (target_C * upstream_C).to(dtype)
        return Coefficients(self.value_C, target_C, (self.e_coeff_C * upstream_C).to(dtype), self.offset_C)


@dataclass
class Gradients:
    """Buffers the gradients are accumulated in; None where none is wanted. lora_a is always in the accumulation
    dtype."""

    hidden_NH: Tensor | None = None
    weight_VH: Tensor | None = None
    bias_V: Tensor | None = None
    lora_a_RH: Tensor | None = None
    lora_b_VR: Tensor | None = None
    accumulate: bool = False


@dataclass
class Problem:
    hidden_NH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None
    lora_a_RH: Tensor | None
    lora_b_VR: Tensor | None
    targets_N: Tensor | None
    ref_hidden_NG: Tensor | None
    ref_weight_VG: Tensor | None
    spec: Spec
    lora_hidden_NR: Tensor | None = None  # s h A^T in the accumulation dtype

    def __post_init__(self) -> None:
        self.dtype = accumulation_dtype(self.hidden_NH.dtype)
        self.e_dtype = exponential_dtype(self.hidden_NH, self.weight_VH)
        self.num_rows, self.width = self.hidden_NH.shape
        self.vocab = self.weight_VH.shape[0]
        self.backend: Backend = BACKENDS[self.spec.backend]
        if self.lora_a_RH is not None and self.lora_hidden_NR is None:
            self.lora_hidden_NR = self.empty(self.num_rows, self.lora_a_RH.shape[0])
            for start in range(0, self.num_rows, _LORA_BLOCK_ROWS):
                rows = slice(start, start + _LORA_BLOCK_ROWS)
                out = self.lora_hidden_NR[rows]
                self.backend.steps.matmul(self.hidden_NH[rows], self.lora_a_RH.T, self.spec.lora_scale, False, out)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.backend.empty(shape, dtype or self.dtype, self.hidden_NH)

    def select(self, index: Tensor) -> Problem:
        """The same problem on some of its rows."""
        assert self.ref_hidden_NG is None and self.targets_N is not None
        lora_hidden = None if self.lora_hidden_NR is None else self.lora_hidden_NR[index]
        head = (self.weight_VH, self.bias_V, self.lora_a_RH, self.lora_b_VR)
        return Problem(self.hidden_NH[index], *head, self.targets_N[index], None, None, self.spec, lora_hidden)

    # -- memory ------------------------------------------------------------------------------------------------------

    def scratch_elements(self, num_rows: int) -> int:
        """At most a quarter of the workspace goes to scratch (half of it for KL), the rest to E."""
        elements = self.spec.workspace_bytes // self.dtype.itemsize
        is_cuda = self.hidden_NH.is_cuda
        rank = 0 if self.lora_a_RH is None else self.lora_a_RH.shape[0]
        if self.ref_weight_VG is None:
            count, wide, share = self.backend.scratch_elements, max(self.width, rank), 4
        else:
            count, share = self.backend.kl_scratch_elements, 2
            wide = max(self.width, rank, self.ref_weight_VG.shape[1])
        gradients = any(self.spec.needs)
        return count(num_rows, wide, self.vocab, is_cuda=is_cuda, max_elements=elements // share, gradients=gradients)

    def scratch(self, num_rows: int) -> Tensor:
        return self.empty(self.scratch_elements(num_rows))

    def rows_that_fit(self) -> int:
        """Rows whose E fits the workspace beside the scratch; at least 1."""
        row_bytes = self._e_stride() * self.e_dtype.itemsize
        at_most = max(1, min(self.num_rows, self.spec.workspace_bytes // row_bytes))
        scratch_bytes = self.scratch_elements(at_most) * self.dtype.itemsize
        return max(1, (self.spec.workspace_bytes - scratch_bytes) // row_bytes)

    def _e_stride(self) -> int:
        """Rows of E begin at multiples of 16 elements on a GPU: its copy engine and matrix products want 16 bytes, and
        Triton vectorises what it knows to be a multiple of 16."""
        return -(-self.vocab // 16) * 16 if self.hidden_NH.is_cuda else self.vocab

    def new_e(self, num_rows: int) -> Tensor:
        return self.empty(num_rows, self._e_stride(), dtype=self.e_dtype)[:, : self.vocab]

    # -- steps -------------------------------------------------------------------------------------------------------

    def evaluate(self, start: int, stop: int, e_CV: Tensor | None, scratch: Tensor) -> Coefficients:
        """Values of rows start:stop, and their E in e_CV if given."""
        rows, spec, steps = slice(start, stop), self.spec, self.backend.steps
        if self.ref_hidden_NG is not None:
            kl_C, hidden = self.empty(stop - start), self.hidden_NH[rows]
            lora_hidden = None if self.lora_hidden_NR is None else self.lora_hidden_NR[rows]
            extras = (self.bias_V, lora_hidden, self.lora_b_VR)
            ref = (self.ref_hidden_NG[rows], self.ref_weight_VG)
            scalars = (spec.logit_scale, spec.softcap)
            steps.kl_rows(hidden, self.weight_VH, *extras, *ref, *scalars, kl_C, e_CV, scratch)
            return Coefficients(kl_C.double(), None, torch.full_like(kl_C, -spec.logit_scale))
        inputs, target_logit_C = self.begin(rows, scratch)
        offset_C, sums_C = target_logit_C + OFFSET, torch.empty_like(target_logit_C)
        steps.exp_sums(*inputs, offset_C, sums_C, e_CV, scratch)
        return self.finish(inputs, target_logit_C, offset_C, sums_C, e_CV, scratch)

    def begin(self, rows: slice, scratch: Tensor) -> tuple[tuple[Any, ...], Tensor]:
        """What exp_sums and the steps after it take, and the rows' target logits."""
        assert self.targets_N is not None
        lora_hidden = None if self.lora_hidden_NR is None else self.lora_hidden_NR[rows]
        head = (self.bias_V, lora_hidden, self.lora_b_VR, self.spec.logit_scale, self.spec.softcap)
        inputs = (self.hidden_NH[rows], self.weight_VH, self.targets_N[rows], *head)
        target_logit_C = self.empty(rows.stop - rows.start)
        self.backend.steps.target_logits(*inputs, target_logit_C, scratch)
        return inputs, target_logit_C

    def finish(
        self,
        inputs: tuple[Any, ...],
        target_logit_C: Tensor,
        offset_C: Tensor,
        sums_C: Tensor,
        e_CV: Tensor | None,
        scratch: Tensor,
    ) -> Coefficients:
        """Rows out of range are redone, which changes their offset, sum and E; then values and coefficients."""
        steps = self.backend.steps
        steps.redo_rows(*inputs, offset_C, sums_C, e_CV, scratch)
        value_C = self.empty(len(sums_C), dtype=torch.float64)
        target_coeff_C, e_coeff_C = torch.empty_like(sums_C), torch.empty_like(sums_C)
        steps.finish_rows(target_logit_C, offset_C, sums_C, *inputs[-2:], value_C, target_coeff_C, e_coeff_C)
        return Coefficients(value_C, target_coeff_C, e_coeff_C, offset_C)

    def token_stats(self) -> Tensor:
        """float64 [4, N]: logprob, is_argmax, mean and variance of log p under p."""
        assert self.targets_N is not None
        stats = self.empty(4, self.num_rows, dtype=torch.float64)
        head = (self.bias_V, self.lora_hidden_NR, self.lora_b_VR, self.spec.logit_scale, self.spec.softcap)
        scratch = self.scratch(self.num_rows)
        self.backend.steps.token_stats(self.hidden_NH, self.weight_VH, self.targets_N, *head, stats, scratch)
        return stats

    def add_gradients(
        self, start: int, stop: int, e_CV: Tensor, rows: Coefficients, grads: Gradients, scratch: Tensor
    ) -> None:
        """Gradients of rows start:stop: hidden's rows are written, the others' are accumulated over calls."""
        span, steps = slice(start, stop), self.backend.steps
        targets_C = None if self.targets_N is None else self.targets_N[span]
        hidden_CH, target_coeff_C, e_coeff_C = self.hidden_NH[span], rows.target_coeff_C, rows.e_coeff_C

        def columns(rows_CD: Tensor, out_VD: Tensor) -> None:
            steps.col_grad(e_CV, rows_CD, targets_C, target_coeff_C, e_coeff_C, grads.accumulate, out_VD, scratch)

        if grads.hidden_NH is not None:
            out = grads.hidden_NH[span]
            steps.row_grad(e_CV, self.weight_VH, targets_C, target_coeff_C, e_coeff_C, False, out, scratch)
        if self.lora_b_VR is not None and (grads.hidden_NH is not None or grads.lora_a_RH is not None):
            inner_CR = self.empty(stop - start, self.lora_b_VR.shape[1])
            steps.row_grad(e_CV, self.lora_b_VR, targets_C, target_coeff_C, e_coeff_C, False, inner_CR, scratch)
            self.add_lora_a(start, inner_CR, grads)
        if grads.weight_VH is not None:
            columns(hidden_CH, grads.weight_VH)
        if grads.bias_V is not None:
            columns(torch.ones_like(e_coeff_C)[:, None], grads.bias_V[:, None])
        if grads.lora_b_VR is not None:
            assert self.lora_hidden_NR is not None
            columns(self.lora_hidden_NR[span], grads.lora_b_VR)
        grads.accumulate = True

    def add_lora_a(self, start: int, inner_CR: Tensor, grads: Gradients) -> None:
        """dlogits B = inner: dhidden += s inner A and dA += s inner^T h, a thousand rows at a time."""
        assert self.lora_a_RH is not None
        scale, matmul = self.spec.lora_scale, self.backend.steps.matmul
        for first in range(0, inner_CR.shape[0], _LORA_BLOCK_ROWS):
            part_RR = inner_CR[first : first + _LORA_BLOCK_ROWS]
            span = slice(start + first, start + first + part_RR.shape[0])
            if grads.hidden_NH is not None:
                matmul(part_RR, self.lora_a_RH, scale, True, grads.hidden_NH[span])
            if grads.lora_a_RH is not None:
                matmul(part_RR.T, self.hidden_NH[span], scale, grads.accumulate or first > 0, grads.lora_a_RH)

    # -- gradient buffers --------------------------------------------------------------------------------------------

    def new_gradients(self, *, final: bool, needs: Needs | None = None) -> Gradients:
        """Buffers in the inputs' dtypes (final: each written once), or weight-shaped ones in the accumulation dtype.

        hidden's rows are written once in either case. float16 rows wait for their upstream scale in float32: a loss
        scale of 65536 exists because the unscaled ones underflow.
        """
        needs = needs or self.spec.needs

        def like(wanted: bool, tensor: Tensor | None) -> Tensor | None:
            if not wanted or tensor is None:
                return None
            return self.empty(*tensor.shape, dtype=tensor.dtype if final else self.dtype)

        hidden = None
        if needs.hidden:
            wait_in_float32 = not final and self.hidden_NH.dtype == torch.float16
            hidden = self.empty(*self.hidden_NH.shape, dtype=torch.float32 if wait_in_float32 else self.hidden_NH.dtype)
        lora_a = None
        if needs.lora_a and self.lora_a_RH is not None:
            lora_a = self.empty(*self.lora_a_RH.shape)
        weight, bias = like(needs.weight, self.weight_VH), like(needs.bias, self.bias_V)
        return Gradients(hidden, weight, bias, lora_a, like(needs.lora_b, self.lora_b_VR))

    def scaled(self, grads: Gradients, scale: Tensor | None) -> tuple[Tensor | None, ...]:
        """New tensors in the inputs' dtypes: each gradient times scale (None: only the dtype). The buffers stay as they
        are."""
        pairs = (
            (grads.hidden_NH, self.hidden_NH),
            (grads.weight_VH, self.weight_VH),
            (grads.bias_V, self.bias_V),
            (grads.lora_a_RH, self.lora_a_RH),
            (grads.lora_b_VR, self.lora_b_VR),
        )
        return tuple(
            None if grad is None or like is None else self._scaled_one(grad, scale, like.dtype) for grad, like in pairs
        )

    def _scaled_one(self, grad: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        if scale is None and grad.dtype == dtype:
            return grad
        if scale is None:
            return grad.to(dtype)
        # Never a scalar: 16-bit rows times a scalar would round the scalar to 16 bits first.
        scale = scale.to(self.dtype).reshape(-1, *[1] * (grad.ndim - 1))
        out = torch.empty_like(grad, dtype=dtype)
        # Row blocks: where out has another dtype the CPU multiplies into a temporary, best in its cache.
        at_most = self.spec.workspace_bytes // 8
        at_most = at_most if grad.is_cuda else min(at_most, _CACHED_BYTES)
        block = max(1, at_most // (max(1, grad[0].numel()) * self.dtype.itemsize))
        for start in range(0, grad.shape[0], block):
            factor = scale if scale.shape[0] == 1 else scale[start : start + block]
            torch.mul(grad[start : start + block], factor, out=out[start : start + block])
        return out


class RowChunks:
    """Chunks of at most `size` rows of a problem, with the memory for their E of the whole vocabulary."""

    @staticmethod
    def most(problem: Problem) -> int:
        return problem.rows_that_fit()

    def __init__(self, problem: Problem, size: int) -> None:
        self.problem, self.size = problem, size
        self._e_CV, self.scratch = problem.new_e(size), problem.scratch(size)

    def values(self, start: int, stop: int) -> Coefficients:
        """Of any number of rows, without E."""
        return self.problem.evaluate(start, stop, None, self.scratch)

    def evaluate(self, start: int, stop: int) -> Coefficients:
        """Values of rows start:stop; what their gradients need stays until the next call."""
        return self.problem.evaluate(start, stop, self._e_CV[: stop - start], self.scratch)

    def add_gradients(self, start: int, stop: int, rows: Coefficients, grads: Gradients) -> None:
        """Of the rows last evaluated, upstream applied: hidden's are written, the others' accumulated."""
        self.problem.add_gradients(start, stop, self._e_CV[: stop - start], rows, grads, self.scratch)
