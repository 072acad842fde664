"""The Triton backend: the steps of `backends.STEPS` by the kernels of triton_kernels.py and triton_distributions.py.

The two large gradient products are the library's (cuBLAS, hipBLASLt) and so is, where a plan says so, the product that
forms logits; everything around them is one kernel each. Inputs are bf16, fp16 or float32 on CUDA or ROCm; float64 is
served by `chunked`. Under Triton's interpreter the same steps run on CPU tensors.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import chunked, triton_distributions, triton_kernels, triton_tuning
from .chunked import MAX_SUM, matmul
from .chunked_distributions import fill_kl_logits, kl_split
from .tiles import Scratch, blocks, logits_tile, native_product_dtype, operand, product_rows, slice_lora
from .triton_tuning import LIBRARY, Config, Plan

__all__ = [
    "col_grad",
    "exp_sums",
    "finish_rows",
    "kl_rows",
    "kl_scratch_elements",
    "matmul",
    "redo_rows",
    "row_grad",
    "scratch_elements",
    "segment_sums",
    "target_logits",
    "token_stats",
]

# Partial sums are [splits, rows] float32: at most 16 MiB.
MAX_SPLITS = 256
ROWS_PER_LAUNCH = 16384
# One tile of logits for the library's product, or a block of float32 rows of dhidden.
TILE_ELEMENTS = 1 << 23
GRADIENT_ELEMENTS = 1 << 24
_ROW_BLOCK = 128
# float32 elements of 16 bytes: where a tile of logits begins, so that loads are vectors whatever lies before it
_ALIGNED = 4
# Of the kernels that add up partials: splits and rows at a time. Those with many planes hold them in registers.
_SPLIT_BLOCKS = {"BLOCK_S": 64, "BLOCK_T": 32}
_PLANE_BLOCKS = {"BLOCK_S": 32, "BLOCK_T": 32, "num_warps": 8}
_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def scratch_elements(
    num_rows: int, width: int, vocab: int, *, is_cuda: bool, max_elements: int, gradients: bool
) -> int:
    """float32 elements: partial sums beside one tile of logits, or one operand of a gradient product."""
    partials = min(num_rows, ROWS_PER_LAUNCH) * (min(MAX_SPLITS, triton.cdiv(vocab, 64)) + 2) + 64
    wanted = partials + min(TILE_ELEMENTS, num_rows * vocab)
    if gradients:
        wanted = max(wanted, num_rows * width // 2 + 1, min(GRADIENT_ELEMENTS, num_rows * width))
    smallest = chunked.scratch_elements(
        1, width, vocab, is_cuda=is_cuda, max_elements=0, gradients=gradients
    ) + _minimum_rows(vocab)
    return max(smallest, min(wanted, max_elements))


def kl_scratch_elements(
    num_rows: int, width: int, vocab: int, *, is_cuda: bool, max_elements: int, gradients: bool
) -> int:
    """Whole rows of both models' logits where gradients are wanted; partial sums otherwise."""
    count = chunked.kl_scratch_elements if gradients else scratch_elements
    return count(num_rows, width, vocab, is_cuda=is_cuda, max_elements=max_elements, gradients=gradients)


def _minimum_rows(vocab: int) -> int:
    """One block of rows' partial sums, all planes of them for the statistics."""
    return triton_distributions.STATS_PLANES * 16 * min(MAX_SPLITS, triton.cdiv(vocab, 64)) + 64


# -- launching ---------------------------------------------------------------------------------------------------------


def _device(tensor: Tensor) -> Any:
    """Triton launches on the current device; autograd's threads and callers may be on another."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _power_of_two(count: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(count)))


def _head_arguments(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_hidden: Tensor | None, lora_b: Tensor | None
) -> dict[str, Any]:
    """Pointers that are not used point at the weight: a kernel that does not read them is what is compiled."""
    return {
        "bias_ptr": weight if bias is None else bias,
        "lora_hidden_ptr": weight if lora_hidden is None else lora_hidden.contiguous(),
        "lora_b_ptr": weight if lora_b is None else lora_b,
        "vocab": weight.shape[0],
        "width": weight.shape[1],
        "rank": 0 if lora_b is None else lora_b.shape[1],
        "hidden_stride_t": hidden.stride(0),
        "hidden_stride_k": hidden.stride(1),
        "weight_stride_v": weight.stride(0),
        "weight_stride_k": weight.stride(1),
        "lora_b_stride_v": 0 if lora_b is None else lora_b.stride(0),
        "lora_b_stride_r": 0 if lora_b is None else lora_b.stride(1),
    }


def _flags(
    config: Config, hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_b: Tensor | None, scale: float, cap: float
) -> dict[str, Any]:
    return {
        "logit_scale": scale,
        "softcap": cap,
        "BLOCK_T": config.block_t,
        "BLOCK_V": config.block_v,
        "BLOCK_K": config.block_k,
        "BLOCK_R": 0 if lora_b is None else _power_of_two(lora_b.shape[1], 32),
        "tiles": _tiles(config, weight.shape[0]),
        "EVEN_K": weight.shape[1] % config.block_k == 0,
        "WIDEN": _widened(hidden, weight),
        "HAS_BIAS": bias is not None,
        "HAS_SCALE": scale != 1.0,
        "HAS_CAP": cap != 0.0,
        # three TF32 products carry float32 through the matrix cores; AMD's have no such mode
        "LORA_PRECISION": "ieee" if torch.version.hip else "tf32x3",
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _widened(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the kernels multiply in float32: for operands of float32 or of two types. (The interpreter's product of
    bf16 is wrong.)"""
    if hidden.dtype != weight.dtype or hidden.dtype == torch.float32:
        return True
    return hidden.dtype == torch.bfloat16 and triton_tuning.interpreted()


def _tiles(config: Config, vocab: int) -> int:
    """Tiles per program: more than the config's where the splits would pass MAX_SPLITS."""
    return max(config.tiles, triton.cdiv(triton.cdiv(vocab, config.block_v), MAX_SPLITS))


def _splits(config: Config, vocab: int) -> int:
    return triton.cdiv(triton.cdiv(vocab, config.block_v), _tiles(config, vocab))


def _config(table: dict[str, Config], hidden: Tensor, weight: Tensor) -> Config:
    family = triton_tuning.family(hidden.device)
    if _widened(hidden, weight) and family != "interpret":
        return triton_tuning.FLOAT32_CONFIG
    if not _aligned(hidden, weight) and family != "interpret":
        return triton_tuning.UNALIGNED_CONFIG
    return table.get(family, table["safe"])


def _aligned(*tensors: Tensor) -> bool:
    """Whether rows come in 16-byte loads; others take a register per element's address."""
    return all(map(_describable, tensors))


def _describable(tensor: Tensor) -> bool:
    """Whether the copy engine can address this matrix: dense rows, 16-byte steps."""
    step = tensor.stride(0) * tensor.element_size()
    return tensor.stride(1) == 1 and step % 16 == 0 and step > 0 and tensor.data_ptr() % 16 == 0


def _descriptor(tensor: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))


# -- steps of the log-likelihood ---------------------------------------------------------------------------------------


def target_logits(
    hidden_CH: Tensor,
    weight_VH: Tensor,
    targets_C: Tensor,
    bias_V: Tensor | None,
    lora_hidden_CR: Tensor | None,
    lora_b_VR: Tensor | None,
    logit_scale: float,
    softcap: float,
    out_C: Tensor,
    scratch: Tensor,
) -> None:
    num_rows, width = hidden_CH.shape
    block_t, block_k = 4, _power_of_two(width, 1024)
    arguments = _head_arguments(hidden_CH, weight_VH, bias_V, lora_hidden_CR, lora_b_VR)
    with _device(hidden_CH):
        triton_kernels.target_logits_kernel[(triton.cdiv(num_rows, block_t),)](
            hidden_ptr=hidden_CH,
            weight_ptr=weight_VH,
            targets_ptr=targets_C,
            out_ptr=out_C,
            num_rows=num_rows,
            logit_scale=logit_scale,
            softcap=softcap,
            BLOCK_T=block_t,
            BLOCK_K=block_k,
            BLOCK_R=0 if lora_b_VR is None else _power_of_two(lora_b_VR.shape[1], 64),
            HAS_BIAS=bias_V is not None,
            HAS_CAP=softcap != 0.0,
            **arguments,
        )


def exp_sums(
    hidden_CH: Tensor,
    weight_VH: Tensor,
    targets_C: Tensor,
    bias_V: Tensor | None,
    lora_hidden_CR: Tensor | None,
    lora_b_VR: Tensor | None,
    logit_scale: float,
    softcap: float,
    offset_C: Tensor,
    sums_C: Tensor,
    e_CV: Tensor | None,
    scratch: Tensor,
) -> None:
    """The fused kernel or the library's product and a pass over it, whichever the head's plan says."""
    head = (bias_V, lora_hidden_CR, lora_b_VR, logit_scale, softcap)

    def run(plan: Plan) -> None:
        form = _library_sums if plan == LIBRARY else _fused_sums
        # the fused kernel's partial sums are all it wants of the scratch
        room = ROWS_PER_LAUNCH if isinstance(plan, str) else scratch.numel() // _splits(plan, weight_VH.shape[0])
        for start, stop in blocks(hidden_CH.shape[0], min(ROWS_PER_LAUNCH, room)):
            rows = slice(start, stop)
            lora_hidden = None if lora_hidden_CR is None else lora_hidden_CR[rows]
            form(
                plan, hidden_CH[rows], weight_VH, targets_C[rows], head[0], lora_hidden, *head[2:], offset_C[rows],
                sums_C[rows], None if e_CV is None else e_CV[rows], scratch,
            )  # fmt: skip

    with _device(hidden_CH):
        traits = {"lora": lora_b_VR is not None, "capped": softcap != 0.0, "aligned": _aligned(hidden_CH, weight_VH)}
        run(triton_tuning.choose(hidden_CH, weight_VH, run, writes_e=e_CV is not None, **traits))


def _fused_sums(
    config: Any,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_b: Tensor | None,
    logit_scale: float,
    softcap: float,
    offset: Tensor,
    sums: Tensor,
    e: Tensor | None,
    scratch: Tensor,
) -> None:
    num_rows, vocab = hidden.shape[0], weight.shape[0]
    splits = _splits(config, vocab)
    partials = scratch[: splits * num_rows]
    tma = config.tma and not _widened(hidden, weight) and _aligned(hidden, weight)
    e_tma = config.tma and e is not None and _describable(e)
    e_cols = config.block_v // 2 if config.halves else config.block_v
    e_argument: Any = weight if e is None else e
    triton_kernels.exp_sums_kernel[(triton.cdiv(num_rows, config.block_t) * splits,)](
        hidden=_descriptor(hidden, (config.block_t, config.block_k)) if tma else hidden,
        weight=_descriptor(weight, (config.block_v, config.block_k)) if tma else weight,
        targets_ptr=targets,
        offset_ptr=offset,
        partial_ptr=partials,
        e=_descriptor(e_argument, (config.block_t, e_cols)) if e_tma else e_argument,
        num_rows=num_rows,
        e_stride_t=0 if e is None else e.stride(0),
        e_cols=_e_columns(e),
        splits=splits,
        GROUP_T=config.group_t,
        TMA=tma,
        E_TMA=e_tma,
        STORE_E=e is not None,
        HALVES=config.halves,
        FLATTEN=config.flatten,
        E_TYPE=tl.bfloat16 if e is None else _DTYPES[e.dtype],
        **_head_arguments(hidden, weight, bias, lora_hidden, lora_b),
        **_flags(config, hidden, weight, bias, lora_b, logit_scale, softcap),
    )
    _add_partials(partials, sums, splits)


def _e_columns(e: Tensor | None) -> int:
    """Columns that may be written: up to the next row where that is E's own padding, so that stores can be vectors."""
    if e is None:
        return 0
    vocab, stride = e.shape[1], e.stride(0)
    end = (e.storage_offset() + e.shape[0] * stride) * e.element_size()
    return stride if vocab <= stride < vocab + 16 and end <= e.untyped_storage().nbytes() else vocab


def _add_partials(partials: Tensor, sums: Tensor, splits: int) -> None:
    num_rows = sums.shape[0]
    triton_kernels.add_partials_kernel[(triton.cdiv(num_rows, _SPLIT_BLOCKS["BLOCK_T"]),)](
        partials, sums, sums, sums, num_rows, splits, INDEXED=False, **_SPLIT_BLOCKS
    )


def _library_sums(
    plan: Any,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_b: Tensor | None,
    logit_scale: float,
    softcap: float,
    offset: Tensor,
    sums: Tensor,
    e: Tensor | None,
    scratch: Tensor,
) -> None:
    num_rows, (vocab, width) = hidden.shape[0], weight.shape
    native = native_product_dtype(hidden, weight)
    widened = [0 if native is not None or x.dtype == torch.float32 else width for x in (hidden, weight)]
    # one partial sum per row and tile lies beside the tile and its operands
    tile_rows, tile_cols = _library_tile(scratch.numel(), num_rows, vocab, *widened)
    splits = triton.cdiv(vocab, tile_cols)
    sizes = [tile_rows * splits, tile_rows * widened[0], tile_cols * widened[1]]
    sizes = [triton.cdiv(size, _ALIGNED) * _ALIGNED for size in sizes]
    partial_flat, hidden_flat, weight_flat, tile_flat = scratch.split([*sizes, scratch.numel() - sum(sizes)])
    for start, stop in blocks(num_rows, tile_rows):
        rows, count = slice(start, stop), stop - start
        partials = partial_flat[: splits * count].view(splits, count)
        hidden_RH = operand(hidden[rows], hidden_flat[: count * widened[0]].view(count, widened[0]), native)
        for split, (first, last) in enumerate(blocks(vocab, tile_cols)):
            cols, num_cols = slice(first, last), last - first
            z_RK = tile_flat[: count * num_cols].view(count, num_cols)
            weight_KH = operand(weight[cols], weight_flat[: num_cols * widened[1]].view(num_cols, widened[1]), native)
            logits_tile(z_RK, hidden_RH, weight_KH, None, slice_lora(lora_hidden, lora_b, rows, cols), 1.0, 0.0)
            triton_kernels.exp_tile_kernel[(count,)](
                z_RK,
                weight if bias is None else bias,
                targets[rows],
                offset[rows],
                partials[split],
                weight if e is None else e[rows],
                first,
                last - first,
                0 if e is None else e.stride(0),
                logit_scale,
                softcap,
                BLOCK_V=_power_of_two(last - first, 4096),
                HAS_BIAS=bias is not None,
                HAS_SCALE=logit_scale != 1.0,
                HAS_CAP=softcap != 0.0,
                STORE_E=e is not None,
                num_warps=8,
            )
        _add_partials(partials, sums[rows], splits)


def _library_tile(elements: int, num_rows: int, vocab: int, hidden_width: int, weight_width: int) -> tuple[int, int]:
    """Rows and columns of a tile of logits that fits beside its rows' partial sums of all tiles and the operands that
    must be widened (widths 0: none)."""
    elements -= 3 * _ALIGNED
    rows, cols = min(num_rows, 4096), min(vocab, TILE_ELEMENTS // 1024)
    while rows * (cols + triton.cdiv(vocab, cols) + hidden_width) + cols * weight_width > elements and rows * cols > 1:
        rows, cols = (rows, (cols + 1) // 2) if cols > rows // 2 or rows == 1 else ((rows + 1) // 2, cols)
    return rows, cols


def redo_rows(
    hidden_CH: Tensor,
    weight_VH: Tensor,
    targets_C: Tensor,
    bias_V: Tensor | None,
    lora_hidden_CR: Tensor | None,
    lora_b_VR: Tensor | None,
    logit_scale: float,
    softcap: float,
    offset_C: Tensor,
    sums_C: Tensor,
    e_CV: Tensor | None,
    scratch: Tensor,
) -> None:
    """Finds the rows on the device and launches the rest whether there are any or not: the host never waits."""
    vocab = weight_VH.shape[0]
    lora = lora_b_VR is not None
    config = _config(triton_tuning.LORA_CONFIGS if lora else triton_tuning.PLAIN_CONFIGS, hidden_CH, weight_VH)
    splits = _splits(config, vocab)
    per_launch = max(1, min(ROWS_PER_LAUNCH, (scratch.numel() - 8) // (splits + 1)))
    with _device(hidden_CH):
        programs = _programs(hidden_CH.device)
        for start, stop in blocks(hidden_CH.shape[0], per_launch):
            rows, count = slice(start, stop), stop - start
            found, index = scratch[:1].view(torch.int32), scratch[8 : 8 + count].view(torch.int32)
            partials = scratch[8 + count : 8 + count + splits * count]
            hidden, targets, offset, sums = (x[rows] for x in (hidden_CH, targets_C, offset_C, sums_C))
            e = None if e_CV is None else e_CV[rows]
            lora_hidden = None if lora_hidden_CR is None else lora_hidden_CR[rows]
            arguments = _head_arguments(hidden, weight_VH, bias_V, lora_hidden, lora_b_VR)
            flags = _flags(config, hidden, weight_VH, bias_V, lora_b_VR, logit_scale, softcap)
            chosen = {"index_ptr": index, "count_ptr": found, "partial_ptr": partials, "splits": splits}
            found.zero_()
            grid = (min(programs, triton.cdiv(count, config.block_t) * splits),)
            small = (min(programs, triton.cdiv(count, _ROW_BLOCK)),)
            triton_kernels.find_rows_kernel[(triton.cdiv(count, 1024),)](
                sums, index, found, count, MAX_SUM=MAX_SUM, BLOCK=1024
            )
            triton_kernels.redo_maxima_kernel[grid](
                hidden=hidden, weight=weight_VH, capacity=count, **chosen, **arguments, **flags
            )
            triton_kernels.redo_offsets_kernel[small](partials, index, found, offset, count, splits, BLOCK=_ROW_BLOCK)
            triton_kernels.redo_sums_kernel[grid](
                hidden=hidden,
                weight=weight_VH,
                targets_ptr=targets,
                offset_ptr=offset,
                e=weight_VH if e is None else e,
                capacity=count,
                e_stride_t=0 if e is None else e.stride(0),
                e_cols=_e_columns(e),
                STORE_E=e is not None,
                E_TYPE=tl.bfloat16 if e is None else _DTYPES[e.dtype],
                **chosen,
                **arguments,
                **flags,
            )
            triton_kernels.add_partials_kernel[small](
                partials, sums, index, found, count, splits, INDEXED=True, **_SPLIT_BLOCKS
            )


def _programs(device: torch.device) -> int:
    """Enough to fill the device with the rare work, few enough to cost nothing without it."""
    return 4 if device.type == "cpu" else 2 * torch.cuda.get_device_properties(device).multi_processor_count


def finish_rows(
    target_logit_C: Tensor,
    offset_C: Tensor,
    sums_C: Tensor,
    logit_scale: float,
    softcap: float,
    value_C: Tensor,
    target_coeff_C: Tensor,
    e_coeff_C: Tensor,
) -> None:
    num_rows = sums_C.shape[0]
    with _device(sums_C):
        triton_kernels.finish_rows_kernel[(triton.cdiv(num_rows, _ROW_BLOCK),)](
            target_logit_C,
            offset_C,
            sums_C,
            value_C,
            target_coeff_C,
            e_coeff_C,
            num_rows,
            logit_scale,
            softcap,
            HAS_CAP=softcap != 0.0,
            BLOCK=_ROW_BLOCK,
        )


def segment_sums(value_N: Tensor, boundaries: Tensor, out_B: Tensor) -> None:
    with _device(value_N):
        triton_kernels.segment_sums_kernel[(out_B.shape[0],)](value_N, boundaries, out_B, BLOCK=1024)


# -- steps of the gradients --------------------------------------------------------------------------------------------


def row_grad(
    e_CV: Tensor,
    matrix_VD: Tensor,
    targets_C: Tensor | None,
    target_coeff_C: Tensor | None,
    e_coeff_C: Tensor,
    accumulate: bool,
    out_CD: Tensor,
    scratch: Tensor,
) -> None:
    vocab, width = matrix_VD.shape
    direct = e_CV.dtype == matrix_VD.dtype and (e_CV.is_cuda or e_CV.dtype == torch.float32)
    # a library product straight into float32 needs no tiles beside it
    regions = None if direct else Scratch(scratch, e_CV.shape[0], width, vocab, planes=1)
    per_block = max(1, scratch.numel() // width) if regions is None else regions.rows
    for start, stop in blocks(e_CV.shape[0], per_block):
        rows, count = slice(start, stop), stop - start
        acc_RD = scratch[: count * width].view(count, width) if regions is None else regions.rows_region(count, width)
        product_rows(acc_RD, e_CV[rows], matrix_VD, regions)
        out_RD = torch.empty_like(out_CD[rows]) if accumulate else out_CD[rows]
        with _device(e_CV):
            triton_kernels.row_grad_kernel[(count,)](
                acc_RD,
                matrix_VD,
                acc_RD if targets_C is None else targets_C[rows],
                acc_RD if target_coeff_C is None else target_coeff_C[rows],
                e_coeff_C[rows],
                out_RD,
                vocab,
                width,
                matrix_VD.stride(0),
                matrix_VD.stride(1),
                out_RD.stride(0),
                HAS_TARGETS=targets_C is not None,
                BLOCK_D=_power_of_two(width, 2048),
            )
        if accumulate:
            out_CD[rows].add_(out_RD)


def col_grad(
    e_CV: Tensor,
    rows_CD: Tensor,
    targets_C: Tensor | None,
    target_coeff_C: Tensor | None,
    e_coeff_C: Tensor,
    accumulate: bool,
    out_VD: Tensor,
    scratch: Tensor,
) -> None:
    """One product, straight into out where out has E's dtype or float32; fp16 gradients go by chunked's blocks."""
    num_rows, width = rows_CD.shape
    scaled_elements = triton.cdiv(num_rows * width * e_CV.element_size(), scratch.element_size())
    straight = out_VD.dtype == e_CV.dtype and not (accumulate and e_CV.dtype != torch.float32)
    widening = e_CV.is_cuda and out_VD.dtype == torch.float32
    if scaled_elements <= scratch.numel() and (straight or widening) and (e_CV.is_cuda or e_CV.dtype == torch.float32):
        scaled = scratch[:scaled_elements].view(e_CV.dtype)[: num_rows * width].view(num_rows, width)
        with _device(e_CV):
            triton_kernels.scale_rows_kernel[(num_rows,)](
                rows_CD, e_coeff_C, scaled, width, rows_CD.stride(0), rows_CD.stride(1), width,
                BLOCK_D=_power_of_two(width, 2048),
            )  # fmt: skip
            _product_columns(out_VD, e_CV.T, scaled, accumulate)
    else:
        chunked.col_grad(e_CV, rows_CD, None, None, e_coeff_C, accumulate, out_VD, scratch)
    if targets_C is not None and target_coeff_C is not None:
        add_target_rows(out_VD, rows_CD, target_coeff_C, targets_C)


def _product_columns(out: Tensor, x: Tensor, y: Tensor, accumulate: bool) -> None:
    """out (+)= x y, accumulated in float32."""
    if out.dtype == x.dtype:
        torch.addmm(out, x, y, beta=1.0 if accumulate else 0.0, out=out)
    elif accumulate:
        torch.addmm(out, x, y, out_dtype=out.dtype, out=out)
    else:
        torch.mm(x, y, out_dtype=out.dtype, out=out)


def add_target_rows(out_VD: Tensor, rows_CD: Tensor, coeff_C: Tensor, targets_C: Tensor) -> None:
    num_rows, width = rows_CD.shape
    vocab = out_VD.shape[0]
    # 32-bit keys: half the passes of a radix sort
    sorted_C, order_C = torch.sort(targets_C.clamp(0, vocab - 1).int(), stable=True)
    block_d = _power_of_two(width, 512)
    with _device(out_VD):
        triton_kernels.add_target_rows_kernel[(num_rows * triton.cdiv(width, block_d),)](
            rows_CD, coeff_C, sorted_C, order_C, out_VD, num_rows, width, rows_CD.stride(0), rows_CD.stride(1),
            out_VD.stride(0), BLOCK_T=16, BLOCK_D=block_d,
        )  # fmt: skip


# -- whole distributions -----------------------------------------------------------------------------------------------


def token_stats(
    hidden_CH: Tensor,
    weight_VH: Tensor,
    targets_C: Tensor,
    bias_V: Tensor | None,
    lora_hidden_CR: Tensor | None,
    lora_b_VR: Tensor | None,
    logit_scale: float,
    softcap: float,
    stats_4C: Tensor,
    scratch: Tensor,
) -> None:
    vocab = weight_VH.shape[0]
    lora = lora_b_VR is not None
    config = _config(triton_tuning.LORA_CONFIGS if lora else triton_tuning.PLAIN_CONFIGS, hidden_CH, weight_VH)
    splits = _splits(config, vocab)
    planes = triton_distributions.STATS_PLANES
    with _device(hidden_CH):
        for start, stop in blocks(hidden_CH.shape[0], max(1, scratch.numel() // (planes * splits))):
            rows, count = slice(start, stop), stop - start
            hidden, targets = hidden_CH[rows], targets_C[rows]
            lora_hidden = None if lora_hidden_CR is None else lora_hidden_CR[rows]
            triton_distributions.token_stats_kernel[(triton.cdiv(count, config.block_t) * splits,)](
                hidden=hidden,
                weight=weight_VH,
                targets_ptr=targets,
                partial_ptr=scratch,
                num_rows=count,
                splits=splits,
                GROUP_T=config.group_t,
                **_head_arguments(hidden, weight_VH, bias_V, lora_hidden, lora_b_VR),
                **_flags(config, hidden, weight_VH, bias_V, lora_b_VR, logit_scale, softcap),
            )
            triton_distributions.token_stats_finish_kernel[(triton.cdiv(count, _PLANE_BLOCKS["BLOCK_T"]),)](
                scratch, targets, stats_4C[:, rows], count, vocab, splits, stats_4C.stride(0), **_PLANE_BLOCKS
            )


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
    """Without gradients one fused pass over both heads. G needs both normalisers first: logits of some rows in scratch,
    by the library, then one kernel."""
    policy = (hidden_CH, weight_VH, bias_V, lora_hidden_CR, lora_b_VR)
    with _device(hidden_CH):
        if g_CV is None:
            _fused_kl(policy, ref_hidden_CG, ref_weight_VG, logit_scale, softcap, kl_C, scratch)
            return
        vocab = weight_VH.shape[0]
        split = kl_split(scratch, hidden_CH.shape[0], vocab, max(weight_VH.shape[1], ref_weight_VG.shape[1]))
        for start, stop in blocks(hidden_CH.shape[0], split.rows):
            rows, count = slice(start, stop), stop - start
            z_RV, r_RV = split.logits[: 2 * count * vocab].view(2, count, vocab)
            fill_kl_logits(z_RV, split, *policy, rows, logit_scale, softcap)
            fill_kl_logits(r_RV, split, ref_hidden_CG, ref_weight_VG, None, None, None, rows, logit_scale, softcap)
            triton_distributions.kl_rows_kernel[(count,)](
                z_RV, r_RV, kl_C[rows], g_CV[rows], vocab, g_CV.stride(0), softcap, HAS_CAP=softcap != 0.0,
                BLOCK_V=_power_of_two(vocab, 2048), num_warps=8,
            )  # fmt: skip


def _fused_kl(
    policy: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
    ref_hidden: Tensor,
    ref_weight: Tensor,
    logit_scale: float,
    softcap: float,
    kl: Tensor,
    scratch: Tensor,
) -> None:
    hidden_CH, weight, bias, lora_hidden_CR, lora_b = policy
    config = _config(triton_tuning.KL_CONFIGS, hidden_CH, weight)
    if _widened(ref_hidden, ref_weight):
        config = _config(triton_tuning.KL_CONFIGS, ref_hidden, ref_weight)
    splits = _splits(config, weight.shape[0])
    for start, stop in blocks(hidden_CH.shape[0], max(1, scratch.numel() // (triton_distributions.KL_PLANES * splits))):
        rows, count = slice(start, stop), stop - start
        hidden, reference = hidden_CH[rows], ref_hidden[rows]
        lora_hidden = None if lora_hidden_CR is None else lora_hidden_CR[rows]
        triton_distributions.kl_kernel[(triton.cdiv(count, config.block_t) * splits,)](
            hidden=hidden,
            weight=weight,
            ref_hidden=reference,
            ref_weight=ref_weight,
            partial_ptr=scratch,
            num_rows=count,
            ref_width=ref_weight.shape[1],
            ref_hidden_stride_t=reference.stride(0),
            ref_hidden_stride_k=reference.stride(1),
            ref_weight_stride_v=ref_weight.stride(0),
            ref_weight_stride_k=ref_weight.stride(1),
            splits=splits,
            GROUP_T=config.group_t,
            REF_EVEN_K=ref_weight.shape[1] % config.block_k == 0,
            REF_WIDEN=_widened(ref_hidden, ref_weight),
            **_head_arguments(hidden, weight, bias, lora_hidden, lora_b),
            **_flags(config, hidden, weight, bias, lora_b, logit_scale, softcap),
        )
        triton_distributions.kl_finish_kernel[(triton.cdiv(count, _PLANE_BLOCKS["BLOCK_T"]),)](
            scratch, kl[rows], count, splits, **_PLANE_BLOCKS
        )
