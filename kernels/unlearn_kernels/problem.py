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
from typing import NamedTuple

import torch
from torch import Tensor

from .backends import BACKENDS, Backend
from .options import Needs, Spec, accumulation_dtype, exponential_dtype

OFFSET = 40.0
_LORA_BLOCK_ROWS = 1024
# Slices of the vocabulary narrower than this would repack the rows for little.
_FEWEST_COLUMNS = 1024
_ADDED_ROWS = 4096


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
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.hidden_NH.device)

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
        rows = slice(start, stop)
        lora_hidden = None if self.lora_hidden_NR is None else self.lora_hidden_NR[rows]
        hidden, spec, steps = self.hidden_NH[rows], self.spec, self.backend.steps
        extras = (self.bias_V, lora_hidden, self.lora_b_VR)
        if self.ref_hidden_NG is not None:
            kl_C = self.empty(stop - start)
            ref = (self.ref_hidden_NG[rows], self.ref_weight_VG)
            scalars = (spec.logit_scale, spec.softcap)
            steps.kl_rows(hidden, self.weight_VH, *extras, *ref, *scalars, kl_C, e_CV, scratch)
            return Coefficients(kl_C.double(), None, torch.full_like(kl_C, -spec.logit_scale))
        assert self.targets_N is not None
        inputs = (hidden, self.weight_VH, self.targets_N[rows], *extras, spec.logit_scale, spec.softcap)
        target_logit_C, sums_C = self.empty(stop - start), self.empty(stop - start)
        steps.target_logits(*inputs, target_logit_C, scratch)
        offset_C = target_logit_C + OFFSET
        steps.exp_sums(*inputs, offset_C, sums_C, e_CV, scratch)
        steps.redo_rows(*inputs, offset_C, sums_C, e_CV, scratch)
        value_C = self.empty(stop - start, dtype=torch.float64)
        target_coeff_C, e_coeff_C = self.empty(stop - start), self.empty(stop - start)
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
            steps.row_grad(e_CV, self.weight_VH, targets_C, target_coeff_C, e_coeff_C, out, scratch)
        if self.lora_b_VR is not None and (grads.hidden_NH is not None or grads.lora_a_RH is not None):
            inner_CR = self.empty(stop - start, self.lora_b_VR.shape[1])
            steps.row_grad(e_CV, self.lora_b_VR, targets_C, target_coeff_C, e_coeff_C, inner_CR, scratch)
            self._add_lora_a(start, inner_CR, grads)
        if grads.weight_VH is not None:
            columns(hidden_CH, grads.weight_VH)
        if grads.bias_V is not None:
            columns(torch.ones_like(e_coeff_C)[:, None], grads.bias_V[:, None])
        if grads.lora_b_VR is not None:
            assert self.lora_hidden_NR is not None
            columns(self.lora_hidden_NR[span], grads.lora_b_VR)
        grads.accumulate = True

    def columns_that_fit(self) -> int:
        """Columns of E, for all rows, that fit the workspace beside the scratch."""
        scratch_bytes = self.scratch_elements(self.num_rows) * self.dtype.itemsize
        return (self.spec.workspace_bytes - scratch_bytes) // (self.num_rows * self.e_dtype.itemsize)

    def by_columns(self) -> bool:
        """Whether gradients of weights come from E computed again, a slice of the vocabulary at a time: where the
        backend's products cost less than weight gradients that are accumulated in float32 over chunks of rows."""
        needs, prefers = self.spec.needs, self.backend.prefers_columns
        asked = self.targets_N is not None and (needs.weight or needs.bias or needs.lora_b)
        return asked and prefers(self.hidden_NH, self.weight_VH) and self.columns_that_fit() >= _FEWEST_COLUMNS

    def gradients_by_columns(self, rows: Coefficients) -> Gradients:
        """All gradients, in their final dtypes, from rows with upstream applied: a slice of weight's gradient is formed
        once, from all rows; hidden's accumulates over the slices in float32."""
        assert self.targets_N is not None and rows.offset_C is not None and rows.target_coeff_C is not None
        grads, steps, spec = self.new_gradients(final=True), self.backend.steps, self.spec
        hidden_sum = None if grads.hidden_NH is None else self.empty(self.num_rows, self.width).zero_()
        inner_sum = None
        if self.lora_b_VR is not None and (grads.hidden_NH is not None or grads.lora_a_RH is not None):
            inner_sum = self.empty(self.num_rows, self.lora_b_VR.shape[1]).zero_()
        size = min(self.columns_that_fit(), self.vocab)
        size = -(-self.vocab // -(-self.vocab // size) // 32) * 32 + 32 if size < self.vocab else size
        e_flat = self.empty(self.num_rows * min(size, self.vocab), dtype=self.e_dtype)
        scratch, ignored = self.scratch(self.num_rows), self.empty(self.num_rows)
        for first in range(0, self.vocab, size):
            cols = slice(first, min(first + size, self.vocab))
            count = cols.stop - first
            e_NS = e_flat[: self.num_rows * count].view(self.num_rows, count)
            weight, bias = self.weight_VH[cols], None if self.bias_V is None else self.bias_V[cols]
            lora_b = None if self.lora_b_VR is None else self.lora_b_VR[cols]
            targets_N = self.targets_N - first
            inputs = (self.hidden_NH, weight, targets_N, bias, self.lora_hidden_NR, lora_b)
            steps.exp_sums(*inputs, spec.logit_scale, spec.softcap, rows.offset_C, ignored, e_NS, scratch)
            # a target beyond the slice is left out by a coefficient of 0
            inside_N = (targets_N >= 0) & (targets_N < count)
            target = (targets_N.clamp(0, count - 1), torch.where(inside_N, rows.target_coeff_C, 0.0), rows.e_coeff_C)
            for total, matrix in ((hidden_sum, weight), (inner_sum, lora_b)):
                if total is not None and matrix is not None:
                    self._add_row_grad(e_NS, matrix, *target, total, scratch)
            columns = (
                (self.hidden_NH, grads.weight_VH),
                (rows.e_coeff_C.new_ones(self.num_rows, 1), None if grads.bias_V is None else grads.bias_V[:, None]),
                (self.lora_hidden_NR, grads.lora_b_VR),
            )
            for rows_ND, out_VD in columns:
                if out_VD is not None and rows_ND is not None:
                    steps.col_grad(e_NS, rows_ND, *target, False, out_VD[cols], scratch)
        if grads.hidden_NH is not None and hidden_sum is not None:
            grads.hidden_NH.copy_(hidden_sum)
        if inner_sum is not None:
            self._add_lora_a(0, inner_sum, grads)
        return grads

    def _add_row_grad(
        self,
        e_NS: Tensor,
        matrix_SD: Tensor,
        targets_N: Tensor,
        target_coeff_N: Tensor,
        e_coeff_N: Tensor,
        total_ND: Tensor,
        scratch: Tensor,
    ) -> None:
        part = self.empty(min(self.num_rows, _ADDED_ROWS), matrix_SD.shape[1])
        for start in range(0, self.num_rows, _ADDED_ROWS):
            rows = slice(start, min(start + _ADDED_ROWS, self.num_rows))
            out = part[: rows.stop - start]
            of_rows = (targets_N[rows], target_coeff_N[rows], e_coeff_N[rows])
            self.backend.steps.row_grad(e_NS[rows], matrix_SD, *of_rows, out, scratch)
            total_ND[rows].add_(out)

    def _add_lora_a(self, start: int, inner_CR: Tensor, grads: Gradients) -> None:
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
        # Row blocks: where out has another dtype the CPU multiplies into a temporary.
        block = max(1, self.spec.workspace_bytes // (8 * max(1, grad[0].numel()) * self.dtype.itemsize))
        for start in range(0, grad.shape[0], block):
            factor = scale if scale.shape[0] == 1 else scale[start : start + block]
            torch.mul(grad[start : start + block], factor, out=out[start : start + block])
        return out
