"""Tiles, operands and scratch for the torch backend: how logits of a tile come to float32 accuracy on any device.

CPU matmuls of 16-bit inputs return 16 bits (out_dtype is CUDA only), which costs 2e-2 in a peaked token's
log-probability. So tiles of 16-bit operands are widened to float32 inside the scratch and multiplied there. On CUDA the
operands stay as they are and mm(out_dtype=float32) keeps the accumulator's precision. One tile of logits (512 x 1024
float32, 2 MiB) is sized for the L2 cache of a CPU core: the epilogue's passes (subtract, mask, exp, sum) then cost
little next to the product.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

CPU_TILE = (512, 1024)
GPU_TILE = (4096, 8192)


class Scratch:
    """Views of the one flat scratch tensor a schedule allocates: rows_RD, vocab_KD and one or two tiles [R, K].

    The sizes follow from the scratch's length alone, so that the schedule (which allocates) and the step agree.
    """

    def __init__(self, flat: Tensor, num_rows: int, width: int, vocab: int, planes: int) -> None:
        max_rows, max_vocab = GPU_TILE if flat.is_cuda else CPU_TILE
        rows, cols = min(max_rows, num_rows), min(max_vocab, vocab)
        while _tile_elements(rows, cols, width, planes) > flat.numel() and rows * cols > 1:
            rows, cols = (rows, (cols + 1) // 2) if cols >= rows else ((rows + 1) // 2, cols)
        self.rows, self.cols, self.width = rows, cols, width
        sizes = [rows * width, cols * width, *[rows * cols] * planes]
        parts = flat[: sum(sizes)].split(sizes)
        self._rows, self._vocab, self._tiles = parts[0], parts[1], parts[2:]

    def rows_region(self, rows: int, width: int) -> Tensor:
        return self._rows[: rows * width].view(rows, width)

    def vocab_region(self, rows: int, width: int) -> Tensor:
        return self._vocab[: rows * width].view(rows, width)

    def tile(self, rows: int, cols: int, plane: int = 0) -> Tensor:
        return self._tiles[plane][: rows * cols].view(rows, cols)


def _tile_elements(rows: int, cols: int, width: int, planes: int) -> int:
    return rows * width + cols * width + planes * rows * cols


def scratch_elements(
    num_rows: int, width: int, vocab: int, *, is_cuda: bool, max_elements: int, gradients: bool
) -> int:
    """How long a scratch the steps want for chunks of num_rows rows: full tiles, less when max_elements is smaller."""
    max_rows, max_vocab = GPU_TILE if is_cuda else CPU_TILE
    rows, cols = min(max_rows, num_rows), min(max_vocab, vocab)
    smallest = _tile_elements(1, 1, width, 2)
    return max(smallest, min(_tile_elements(rows, cols, width, 2), max_elements))


def kl_scratch_elements(
    num_rows: int, width: int, vocab: int, *, is_cuda: bool, max_elements: int, gradients: bool
) -> int:
    """As scratch_elements, for kl_rows: whole rows of both models' logits."""
    rows = min((GPU_TILE if is_cuda else CPU_TILE)[0], num_rows)
    cols = min(CPU_TILE[1], vocab)
    smallest = 2 * vocab + 2 * width
    return max(smallest, min(rows * (2 * vocab + width) + cols * width, max_elements))


class _Exact:
    """Switches torch's shortcuts for products on one kind of device off, and back on as they were.

    The switches are the process's, not the thread's: the first to enter throws them, the last to leave restores them,
    so that a backward on another thread neither loses its precision nor keeps the caller's from coming back.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend  # as torch names it: "cuda", "mkldnn"
        self.lock = threading.Lock()
        self.inside = 0
        self.restore: list[Callable[[], object]] = []

    def enter(self) -> None:
        with self.lock:
            if not self.inside:
                self.restore = self._switch_off()
            self.inside += 1

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                for restore in self.restore:
                    restore()

    def _switch_off(self) -> list[Callable[[], object]]:
        restore: list[Callable[[], object]] = []
        if _precision is None:
            precision = torch.get_float32_matmul_precision()
            if precision != "highest":
                restore.append(partial(torch.set_float32_matmul_precision, precision))
                torch.set_float32_matmul_precision("highest")
        elif _precision(self.backend, "matmul") not in ("ieee", "none"):
            restore.append(partial(_set_precision, self.backend, "matmul", _own_precision(self.backend)))
            _set_precision(self.backend, "matmul", "ieee")
        if self.backend == "cuda":
            settings = torch.backends.cuda.matmul
            for name in _REDUCED:
                if getattr(settings, name):
                    restore.append(partial(setattr, settings, name, True))
                    setattr(settings, name, False)
        return restore


# Of 16-bit products on CUDA: partial sums, or all of the accumulator, in 16 bits.
_REDUCED = (
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)
# What float32 products may be made of, by (backend, operation); since torch 2.9. torch.set_float32_matmul_precision,
# the older switch, sets the same values, but cannot be read where only these were set: it raises.
_precision: Any = getattr(torch._C, "_get_fp32_precision_getter", None)
_set_precision: Any = getattr(torch._C, "_set_fp32_precision_setter", None)
_on_cuda, _on_cpu = _Exact("cuda"), _Exact("mkldnn")


def _own_precision(backend: str) -> str:
    """What was set for matmul itself, "none" where it inherits: reading gives what holds in the end, so its parents are
    set aside for a moment."""
    generic = _precision("generic", "all")
    _set_precision("generic", "all", "none")
    whole = _precision(backend, "all")
    _set_precision(backend, "all", "none")
    own = _precision(backend, "matmul")
    _set_precision(backend, "all", whole)
    _set_precision("generic", "all", generic)
    return str(own)


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """No autocast, no TF32 / bf16 stand-ins for float32 products and no 16-bit partial sums in split products, whatever
    the caller has switched on."""
    exact = _on_cuda if device.type == "cuda" else _on_cpu
    exact.enter()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        exact.leave()


def blocks(total: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, total, size):
        yield start, min(start + size, total)


def operand(x: Tensor, region: Tensor, native_dtype: torch.dtype | None) -> Tensor:
    """x as a matmul operand: in native_dtype where the device multiplies 16 bits into float32, else widened into
    region."""
    if native_dtype is not None:
        return x.to(native_dtype)
    if x.dtype == region.dtype:
        return x
    return region.copy_(x)


def native_product_dtype(x: Tensor, y: Tensor) -> torch.dtype | None:
    """The 16-bit dtype in which this device multiplies x and y into float32, or None: widen them.

    fp16 operands beside bf16 ones (E is always bf16) go through bf16.
    """
    if not x.is_cuda or x.dtype.itemsize != 2 or y.dtype.itemsize != 2:
        return None
    return x.dtype if x.dtype == y.dtype else torch.bfloat16


def gather_rows(x: Tensor, index: Tensor, *, out: Tensor) -> Tensor:
    """x[index] in out's dtype, without a second copy where that is x's."""
    if x.dtype == out.dtype:
        return torch.index_select(x, 0, index, out=out)
    return out.copy_(x.index_select(0, index))


def mm(out: Tensor, x: Tensor, y: Tensor, *, accumulate: bool, alpha: float = 1.0) -> None:
    """out (+)= alpha x y with out's precision in the accumulator."""
    if x.dtype == out.dtype:
        torch.addmm(out, x, y, beta=1.0 if accumulate else 0.0, alpha=alpha, out=out)
    elif accumulate:
        out.add_(torch.mm(x, y, out_dtype=out.dtype), alpha=alpha)
    else:
        torch.mm(x, y, out_dtype=out.dtype, out=out)
        if alpha != 1.0:
            out.mul_(alpha)


def product_rows(acc_RD: Tensor, e_RV: Tensor, matrix_VD: Tensor, regions: Scratch | None) -> None:
    """acc = E matrix with acc's precision; regions hold widened tiles, where the device multiplies nothing else."""
    native = native_product_dtype(e_RV, matrix_VD)
    if e_RV.dtype == matrix_VD.dtype and (e_RV.dtype == acc_RD.dtype or native is not None):
        mm(acc_RD, e_RV, matrix_VD, accumulate=False)
        return
    assert regions is not None
    for first, last in blocks(matrix_VD.shape[0], regions.cols):
        e_RK = operand(e_RV[:, first:last], regions.tile(e_RV.shape[0], last - first), native)
        matrix_KD = operand(matrix_VD[first:last], regions.vocab_region(last - first, matrix_VD.shape[1]), native)
        mm(acc_RD, e_RK, matrix_KD, accumulate=first > 0)


def logits_tile(
    out_RK: Tensor,
    hidden_RH: Tensor,
    weight_KH: Tensor,
    bias_K: Tensor | None,
    lora: tuple[Tensor, Tensor] | None,  # lora_hidden [R, r], lora_b [K, r]
    logit_scale: float,
    softcap: float,
) -> Tensor:
    """softcap(logit_scale (hidden W^T + bias + lora_hidden B^T)) for one tile, written into out."""
    mm(out_RK, hidden_RH, weight_KH.T, accumulate=False)
    if bias_K is not None:
        out_RK.add_(bias_K)
    if lora is not None:
        out_RK.addmm_(lora[0], lora[1].to(out_RK.dtype).T)
    if logit_scale != 1.0:
        out_RK.mul_(logit_scale)
    if softcap:
        out_RK.div_(softcap).tanh_().mul_(softcap)
    return out_RK


def slice_lora(
    lora_hidden: Tensor | None, lora_b: Tensor | None, rows: slice, cols: slice
) -> tuple[Tensor, Tensor] | None:
    return None if lora_hidden is None or lora_b is None else (lora_hidden[rows], lora_b[cols])


def slice_bias(bias: Tensor | None, cols: slice) -> Tensor | None:
    return None if bias is None else bias[cols]


def fill_target_column(tile_RK: Tensor, targets_R: Tensor, first_column: int, value: float) -> None:
    """tile[t, y_t - first_column] = value for the rows whose target lies in this tile, without asking which those
    are."""
    column_R1 = (targets_R - first_column)[:, None]
    inside_R1 = (column_R1 >= 0) & (column_R1 < tile_RK.shape[1])
    column_R1 = column_R1.clamp(0, tile_RK.shape[1] - 1)
    kept_R1 = tile_RK.gather(1, column_R1)
    tile_RK.scatter_(1, column_R1, torch.where(inside_R1, value, kept_R1))


def empty(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)
