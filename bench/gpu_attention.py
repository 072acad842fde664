"""Attention cores beside each other at long contexts, forward and backward: `python -m bench.gpu_attention`.

One sequence of 32k and of 128k tokens, and the same number of tokens as sixteen sequences packed end to end, with the
heads of Llama-3.1-8B (grouped) and Llama-2-7B. `unlearn` is the path of this project's own models, whatever kernel
scaled_dot_product_attention picks for it, `unlearn, keys repeated` the same with as many key heads as query heads made
first; the others are called as their authors mean them to be. Times are of one layer's core; TFLOP/s count the causal
half, and a backward as 2.5 forwards.

A provider has a speed only if output and gradients are right: float64 attention of the last queries and keys of the
first and of the last sequence, whose gradients depend on nothing behind them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import part as parts
from bench.models import attention_flop, shapes
from bench.part import Part
from bench.rows import first_line
from bench.timing import Interleaved, Stopwatch, peak_if_any, quartiles, release
from unlearn.attention import Segments, packed_attention, takes_fewer_key_heads
from unlearn.shapes import Shape

CONTEXTS, TINY_CONTEXTS = (32768, 131072), (96, 192)
NUM_PACKED = 16
# bf16 keeps 8 bits of the output and of the scores' gradient; errors are relative to the norm of what is compared.
BOUND = 3e-2
CHECKED = 32  # queries and keys at a sequence's end
Fields = dict[str, Any]


@dataclass(frozen=True)
class Inputs:
    """query [T, heads, D], key and value [T, kv_heads, D], upstream as query; lengths of the packed sequences."""

    query: Tensor
    key: Tensor
    value: Tensor
    upstream: Tensor
    lengths: list[int]
    segments: Segments
    cu_seqlens: Tensor

    @staticmethod
    def make(shape: Shape, lengths: list[int], device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

        def draw(heads: int) -> Tensor:
            size = (sum(lengths), heads, shape.head_dim)
            return torch.randn(size, generator=generator, device=device, dtype=dtype)

        heads = (shape.heads, shape.kv_heads, shape.kv_heads)
        query, key, value = (draw(count).requires_grad_() for count in heads)
        cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
        segments = Segments.plan(lengths, device)
        return Inputs(query, key, value, draw(shape.heads), lengths, segments, cu_seqlens)

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    @functools.cached_property
    def batched(self) -> tuple[Tensor, Tensor, Tensor]:
        """[1, heads, T, D], views: the layout of transformers' projections."""
        return tuple(tensor.transpose(0, 1).unsqueeze(0) for tensor in self.leaves)


Core = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Provider:
    """core: output [T, heads, D] of inputs; module: what has to be importable; packed: takes several sequences without
    a mask of all pairs; grouped: only where key heads are fewer than query heads; compiles: for every case anew, so
    that it comes after all others."""

    name: str
    core: Core
    packed: bool = True
    grouped: bool = False
    module: str | None = None
    compiles: bool = False


def ours(inputs: Inputs) -> Tensor:
    return packed_attention(torch.nn.Module(), *inputs.batched, None, segments=inputs.segments)[0][0]


def ours_repeated(inputs: Inputs) -> Tensor:
    repeated = (tensor.repeat_interleave(_repeats(inputs), 1) for tensor in inputs.batched[1:])
    return packed_attention(torch.nn.Module(), inputs.batched[0], *repeated, None, segments=inputs.segments)[0][0]


def sdpa(backend: SDPBackend, inputs: Inputs) -> Tensor:
    with sdpa_kernel(backend):
        out = torch.nn.functional.scaled_dot_product_attention(*inputs.batched, is_causal=True, enable_gqa=_gqa(inputs))
    return out[0].transpose(0, 1)


def kernel_of(inputs: Inputs) -> str | None:
    """What scaled_dot_product_attention picks for this project's path, one causal call, and whether keys go to it
    repeated."""
    if len(inputs.lengths) > 1:
        return None
    query, key, value = inputs.batched
    grouped = _gqa(inputs) and takes_fewer_key_heads(query, key, value, None, 0.0)
    if not grouped:
        key, value = (tensor.repeat_interleave(_repeats(inputs), 1) for tensor in (key, value))
    with contextlib.suppress(AttributeError, RuntimeError, ValueError):  # no public name says it
        choice = torch._fused_sdp_choice(query, key, value, None, 0.0, True, enable_gqa=grouped)
        return SDPBackend(choice).name.lower() + (", keys repeated" if _gqa(inputs) and not grouped else "")
    return None


def _repeats(inputs: Inputs) -> int:
    return inputs.query.shape[1] // inputs.key.shape[1]


def _gqa(inputs: Inputs) -> bool:
    return _repeats(inputs) > 1


def varlen(inputs: Inputs) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest, cu = max(inputs.lengths), inputs.cu_seqlens
    return varlen_attn(*inputs.leaves, cu, cu, longest, longest, window_size=(-1, 0), enable_gqa=_gqa(inputs))


def flash_attn_2(inputs: Inputs) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    longest, cu = max(inputs.lengths), inputs.cu_seqlens
    return flash_attn_varlen_func(*inputs.leaves, cu, cu, longest, longest, causal=True)


def flash_attn_3(inputs: Inputs) -> Tensor:
    from flash_attn_interface import flash_attn_varlen_func

    longest, cu = max(inputs.lengths), inputs.cu_seqlens
    out = flash_attn_varlen_func(*inputs.leaves, cu, cu, longest, longest, causal=True)
    return out[0] if isinstance(out, tuple) else out


@dataclass
class Flex:
    """flex_attention with the causal mask within each sequence; compiled on a GPU, in plain torch on a CPU."""

    masks: dict[tuple[int, ...], Any] = field(default_factory=dict)

    def __call__(self, inputs: Inputs) -> Tensor:
        device = inputs.query.device
        key = tuple(inputs.lengths)
        if key not in self.masks:
            self.masks = {key: self.mask(inputs.lengths, device)}
        out = self.attention(device)(*inputs.batched, block_mask=self.masks[key], enable_gqa=_gqa(inputs))
        return out[0].transpose(0, 1)

    @staticmethod
    def mask(lengths: list[int], device: torch.device) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        document = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))

        def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (q >= k) & (document[q] == document[k])

        # compiled: otherwise all T x T entries are laid out before they are reduced to blocks
        compiled = device.type == "cuda"
        return create_block_mask(causal, None, None, sum(lengths), sum(lengths), device=device, _compile=compiled)

    @staticmethod
    @functools.cache
    def attention(device: torch.device) -> Callable[..., Tensor]:
        from torch.nn.attention.flex_attention import flex_attention

        return torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention


def providers() -> list[Provider]:
    return [
        Provider("unlearn", ours),
        Provider("unlearn, keys repeated", ours_repeated, grouped=True),
        Provider("sdpa flash", functools.partial(sdpa, SDPBackend.FLASH_ATTENTION), packed=False),
        Provider("sdpa cudnn", functools.partial(sdpa, SDPBackend.CUDNN_ATTENTION), packed=False),
        Provider("torch varlen", varlen, module="torch.nn.attention.varlen"),
        Provider("flash_attn 2", flash_attn_2, module="flash_attn"),
        Provider("flash_attn 3", flash_attn_3, module="flash_attn_interface"),
        Provider("flex", Flex(), module="torch.nn.attention.flex_attention", compiles=True),
    ]


@dataclass(frozen=True)
class Truth:
    """Of the last tokens of one sequence: rows (of the pack), and output, dquery, dkey, dvalue there, in float64."""

    rows: slice
    tensors: tuple[Tensor, ...]


def truth_of(inputs: Inputs, sequence: int) -> Truth:
    """The last keys are seen by the last queries alone, so that these suffice for every gradient there."""
    start, end = inputs.cu_seqlens[sequence].item(), inputs.cu_seqlens[sequence + 1].item()
    first = max(start, end - CHECKED)
    rows, seen = slice(first, end), slice(start, end)
    repeats = _repeats(inputs)
    hidden = torch.arange(start, end, device=inputs.query.device) > torch.arange(
        first, end, device=inputs.query.device
    ).unsqueeze(1)
    found: list[list[Tensor]] = []
    for head in range(inputs.key.shape[1]):  # one by one: scores of all heads would be large
        group = slice(head * repeats, (head + 1) * repeats)
        q, do = (t.detach()[rows, group].double().transpose(0, 1) for t in (inputs.query, inputs.upstream))
        k, v = (t.detach()[seen, head].double() for t in (inputs.key, inputs.value))
        scale = q.shape[-1] ** -0.5
        p = (q @ k.T * scale).masked_fill(hidden, float("-inf")).softmax(-1)  # [repeats, rows, seen]
        dp = do @ v.T
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        last = slice(first - start, end - start)
        dk = torch.einsum("rqk,rqd->kd", ds[:, :, last], q)
        dv = torch.einsum("rqk,rqd->kd", p[:, :, last], do)
        out, dq = ((p @ v).transpose(0, 1), (ds @ k).transpose(0, 1))
        found.append([out, dq, dk[:, None], dv[:, None]])
    return Truth(rows, tuple(torch.cat(heads, 1) for heads in zip(*found, strict=True)))


def errors_of(provider: Provider, inputs: Inputs, truths: list[Truth]) -> Fields:
    """The largest relative error of output and of gradients over the sequences that are looked at."""
    out = provider.core(inputs)
    grads = torch.autograd.grad(out, inputs.leaves, inputs.upstream)
    found = {"output_relative": 0.0, "gradient_relative": 0.0}
    for truth in truths:
        errors = []
        for tensor, want in zip((out.detach(), *grads), truth.tensors, strict=True):
            errors.append(float((tensor[truth.rows].double() - want).norm() / want.norm()))
        found["output_relative"] = _larger(found["output_relative"], errors[0])
        for error in errors[1:]:
            found["gradient_relative"] = _larger(found["gradient_relative"], error)
    return found


def _larger(a: float, b: float) -> float:
    """A NaN stays."""
    return b if not b <= a else a


def main() -> int:
    parser = parts.parser_of(__doc__, seconds=300)
    parser.add_argument("--rounds", type=int, default=5)
    return parts.run("train-a", parser, measure)


def measure(part: Part) -> None:
    here = []
    for provider in providers():
        if reason := _missing(provider):
            part.rows.write({"case": "missing", "provider": provider.name, "reason": reason})
        else:
            here.append(provider)
    cases = [
        (compiles, name, shape, context, packed)
        for compiles in (False, True)
        for context in (TINY_CONTEXTS if part.tiny else CONTEXTS)
        for name, shape in shapes(part.tiny).items()
        for packed in (False, True)
    ]
    stopwatch = Stopwatch(part.device)
    for index, (compiles, name, shape, context, packed) in enumerate(cases):
        what = {"model": name, "context": context, "packed": packed}
        taking = [
            one
            for one in here
            if one.compiles == compiles and (one.packed or not packed) and (not one.grouped or fewer_keys(shape))
        ]
        if part.budget.spent:
            for provider in taking:
                part.leave_out({"provider": provider.name, **what})
            continue
        torch.compiler.reset()  # Dynamo gives up a function that it has compiled for eight shapes
        lengths = packed_lengths(context) if packed else [context]
        seconds = part.budget.left / (len(cases) - index) * 0.5
        measure_case(part, stopwatch, what, Inputs.make(shape, lengths, part.device), taking, seconds)
        release(part.device)


def fewer_keys(shape: Shape) -> bool:
    return shape.kv_heads < shape.heads


def packed_lengths(context: int) -> list[int]:
    """Sixteen lengths from a quarter to seven quarters of their mean, in no order, `context` together."""
    shares = [0.25 + 0.1 * (index * 5 % NUM_PACKED) for index in range(NUM_PACKED)]
    ends = [round(context * sum(shares[: index + 1]) / NUM_PACKED) for index in range(NUM_PACKED)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _missing(provider: Provider) -> str | None:
    if provider.module is None:
        return None
    with contextlib.suppress(ImportError):
        importlib.import_module(provider.module)
        return None
    return "not installed" if importlib.util.find_spec(provider.module.partition(".")[0]) is None else "not importable"


def measure_case(
    part: Part, stopwatch: Stopwatch, what: Fields, inputs: Inputs, here: list[Provider], seconds: float
) -> None:
    truths = [truth_of(inputs, sequence) for sequence in sorted({0, len(inputs.lengths) - 1})]
    timed, found, outputs = Interleaved(stopwatch, warmups=1), {}, {}
    for provider in here:
        found[provider.name] = _checked(provider, inputs, truths)
        release(part.device)
        if set(found[provider.name]) & {"failed", "refused"}:
            continue

        def forward(provider: Provider = provider) -> None:
            outputs.clear()  # one at a time is alive
            outputs[provider.name] = provider.core(inputs)

        def backward(provider: Provider = provider) -> None:
            torch.autograd.grad(outputs.pop(provider.name), inputs.leaves, inputs.upstream)

        timed.add((provider.name, "forward"), forward)
        timed.add((provider.name, "backward"), backward, forward)
    timed.rounds(seconds, least=2, most=part.args.rounds)
    flop = attention_flop(inputs.lengths, inputs.query.shape[1] * inputs.query.shape[2])
    for provider in here:
        row = {"case": "attention", "provider": provider.name, **what, "sequences": len(inputs.lengths),
               **found[provider.name]}  # fmt: skip
        if provider.core is ours:
            row["kernel"] = kernel_of(inputs)
        failures = [reason for (name, _), reason in timed.failed.items() if name == provider.name]
        if failures:
            row["failed"] = failures[0]
        if not {"failed", "refused"} & set(row):
            for kind, factor in (("forward", 1.0), ("backward", 2.5)):
                lower, middle, upper = quartiles(timed.times[provider.name, kind])
                row |= {
                    f"{kind}_ms": middle,
                    f"{kind}_ms_quartiles": [lower, upper],
                    f"{kind}_tflops": factor * flop / middle / 1e9,
                }
            outputs.clear()
            row["peak_mib"] = peak_if_any(functools.partial(_once, provider, inputs), part.device)
        _report(part, row)


def _checked(provider: Provider, inputs: Inputs, truths: list[Truth]) -> Fields:
    try:
        found = errors_of(provider, inputs, truths)
    except Exception as error:  # a kernel that is not there for this shape, or memory that is not
        return {"failed": first_line(error)}
    return found if all(error <= BOUND for error in found.values()) else found | {"refused": True}


def _once(provider: Provider, inputs: Inputs) -> None:
    torch.autograd.grad(provider.core(inputs), inputs.leaves, inputs.upstream)


def _report(part: Part, row: Fields) -> None:
    """A wrong answer is a failure, and ours is if it does not run; another may be unable to."""
    part.rows.write(row, failed="refused" in row or ("failed" in row and row["provider"] == "unlearn"))
    kind = f"{row['sequences']} sequences" if row["packed"] else "one sequence"
    said = row.get("failed") or (
        "REFUSED" if "refused" in row else f"{row['forward_ms']:.1f} + {row['backward_ms']:.1f} ms"
    )
    print(f"{row['model']} {row['context']} tokens, {kind}, {row['provider']}: {said}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
