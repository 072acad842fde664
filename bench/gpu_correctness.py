"""Every public function of unlearn_kernels on a GPU against float64: `python -m bench.gpu_correctness`.

A row per check: {check, passed, error, bound}. Errors are relative to float64 on the same inputs and held to twice
torch's own in the same dtype plus a small constant (tests/kernels/cases.py); token log-probabilities to 1e-5 nats rms,
on a GPU plus what its matrix cores' sums are off by themselves (bench/inputs.py, matrix_core_error).
A check that raises is a failed row and the next one goes on. On a GPU the checks run in several processes, as nearly
all their time goes into compiling (bench/workers.py). One more group holds optimizer states in host memory to the bits
of those on the device. Needs torch and triton alone; with --pytest-seconds and where pytest is installed, tests/kernels
follow.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import torch
from torch import Tensor

import unlearn_kernels as uk
from bench import part as parts
from bench.inputs import Case as BenchCase
from bench.inputs import matrix_core_error, truth_of
from bench.measure import errors_of
from bench.part import Part
from bench.providers import ERROR_TARGET, Ours, variants
from bench.rows import ROOT, first_line
from bench.timing import graphed, release
from bench.workers import Pool, Task, serve
from unlearn.optim import AdamWOffload, AdamWSR
from unlearn_kernels import Options, reference


def _load_cases() -> ModuleType:
    """By its file: another package called `tests`, installed beside torch, would hide ours. Its marks for tests are
    not used here, so that a machine without pytest gets by."""
    if importlib.util.find_spec("pytest") is None:
        sys.modules["pytest"] = MagicMock()
    spec = importlib.util.spec_from_file_location("unlearn_test_cases", ROOT / "tests" / "kernels" / "cases.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    if isinstance(sys.modules.get("pytest"), MagicMock):
        del sys.modules["pytest"]
    return module


cases: Any = _load_cases()
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PARTS = ("bias", "scale", "softcap", "lora")
# Of a check whose error gpu_summary holds to the target.
NATS = "nats rms"
FROZEN = {
    **{name: (name,) for name in ("hidden", "weight", "bias", "lora_a", "lora_b")},
    "all but hidden": ("weight", "bias", "lora_a", "lora_b"),
    "all but lora": ("hidden", "weight", "bias"),
}


class Outcome(NamedTuple):
    """error <= bound passes; a NaN fails. what: the tensor that came closest to its bound."""

    error: float
    bound: float
    what: str = ""


Check = tuple[str, Callable[[], Outcome]]


@dataclass(frozen=True)
class Maker:
    """Peaked cases on the device, as cases.make_case makes them on the CPU. tiny caps every size."""

    device: torch.device
    backend: str | None
    tiny: bool

    def options(self, workspace: int | None = None) -> Options:
        return Options(workspace_bytes=workspace, backend=self.backend)

    def case(
        self,
        num_rows: int,
        width: int,
        vocab: int,
        dtype: torch.dtype,
        *,
        weight_dtype: torch.dtype | None = None,
        parts: tuple[str, ...] = (),
        logit_std: float = 4.0,
        lead: float = 12.0,
    ) -> Any:
        if self.tiny:
            num_rows, width, vocab = min(num_rows, 20), min(width, 16), min(vocab, 80)
        generator = torch.Generator(self.device).manual_seed(num_rows + width + vocab)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device)

        weight = normal(vocab, width) / width**0.5
        hidden = normal(num_rows, width) * logit_std
        targets = torch.randint(vocab, (num_rows,), generator=generator, device=self.device)
        aligned = weight[targets]
        hidden[::2] += (lead * aligned / aligned.square().sum(1, keepdim=True))[::2]
        upstream = normal(num_rows).double()
        upstream[torch.rand(num_rows, generator=generator, device=self.device) < 0.3] = 0.0
        lengths = cases.lengths_of(num_rows, torch.Generator().manual_seed(num_rows))
        cu_seqlens = torch.tensor([0, *lengths], device=self.device).cumsum(0)
        head = weight_dtype or dtype
        case = cases.Case(hidden.to(dtype).requires_grad_(), weight.to(head).requires_grad_(), targets, cu_seqlens,
                          upstream)  # fmt: skip
        if "bias" in parts:
            case.bias = normal(vocab).to(head).requires_grad_()
        if "lora" in parts:
            case.lora_a = (normal(3, width) / width**0.5).to(head).requires_grad_()
            case.lora_b = (0.5 * normal(vocab, 3)).to(head).requires_grad_()
            case.lora_scale = 0.5
        if "scale" in parts:
            case.scalars["logit_scale"] = 0.7
        if "softcap" in parts:
            case.scalars["softcap"] = 15.0
        return case


# ------------------------------------------------------------------------------------------------- what is compared


def curved(logprobs: Tensor, lengths: Tensor, index: Tensor) -> Tensor:
    """Another slope for every sequence, both signs, exactly zero for some."""
    weight = torch.tensor([1.0, 0.0, -0.5, 2.0], dtype=torch.float64, device=index.device)[index % 4]
    return weight * (logprobs / lengths).square() - weight * logprobs


def ref_B(case: Any) -> Tensor:
    return -6.0 * case.cu_seqlens.diff().double()


def ref_head(case: Any) -> tuple[Tensor, Tensor]:
    """A narrower reference model for the KL."""
    width = max(8, case.hidden.shape[1] // 2 // 8 * 8)
    return case.hidden.detach()[:, :width].contiguous(), case.weight.detach()[:, :width].contiguous()


def npo_of(logprobs: Tensor, ref: Tensor) -> Tensor:
    return (-20.0 * torch.nn.functional.logsigmoid(-0.1 * (logprobs - ref))).mean()


def simnpo_of(logprobs: Tensor, lengths: Tensor) -> Tensor:
    return (-0.8 * torch.nn.functional.logsigmoid(-2.5 * logprobs / lengths - 0.1)).mean()


# Values of a case, [N], [B] or a scalar: by the kernels (with their options), and by the definitions with full logits.
KERNELS: dict[str, Callable[[Any, Options], Tensor]] = {
    "token_logprobs": lambda c, o: uk.token_logprobs(*c.inputs, **c.head, options=o),
    "sequence_logprobs": lambda c, o: uk.sequence_logprobs(*c.packed, **c.head, options=o),
    "npo_loss": lambda c, o: uk.npo_loss(*c.packed, ref_B(c), beta=0.1, **c.head, options=o),
    "simnpo_loss": lambda c, o: uk.simnpo_loss(*c.packed, beta=2.5, gamma=0.1, **c.head, options=o),
    "sequence_loss": lambda c, o: uk.sequence_loss(*c.packed, curved, **c.head, options=o).loss,
    "linear_kl": lambda c, o: uk.linear_kl(c.hidden, c.weight, *ref_head(c), **c.head, options=o),
}
DEFINITIONS: dict[str, Callable[[Any], Tensor]] = {
    "token_logprobs": lambda c: reference.token_logprobs(*c.inputs, **c.head),
    "sequence_logprobs": lambda c: reference.sequence_logprobs(*c.packed, **c.head),
    "npo_loss": lambda c: npo_of(reference.sequence_logprobs(*c.packed, **c.head), ref_B(c)),
    "simnpo_loss": lambda c: simnpo_of(reference.sequence_logprobs(*c.packed, **c.head), c.cu_seqlens.diff()),
    "sequence_loss": lambda c: reference.sequence_loss(*c.packed, curved, **c.head),
    "linear_kl": lambda c: reference.linear_kl(c.hidden, c.weight, *ref_head(c), **c.head),
}


def weighted(case: Any, value: Tensor) -> Tensor:
    """A scalar: values under random, signed upstream gradients, some of them zero; a loss as it is."""
    return value if value.ndim == 0 else (value.double() * case.upstream[: len(value)]).sum()


def compare(case: Any, name: str, options: Options, frozen: tuple[str, ...] = ()) -> Outcome:
    """Value and every gradient of one function; the outcome is the one closest to its bound."""
    small = cases.SMALL[case.hidden.dtype]

    def run(one: Any, function: Callable[[Any], Tensor]) -> dict[str, Tensor]:
        value, leaves = function(one), one.leaves()
        grads = torch.autograd.grad(weighted(one, value), list(leaves.values()))
        return {"value": value.detach(), **{f"d{key}": grad for key, grad in zip(leaves, grads, strict=True)}}

    mine = run(case.like(frozen=frozen), lambda one: KERNELS[name](one, options))
    theirs = run(case.like(frozen=frozen), DEFINITIONS[name])
    truth = run(case.like(torch.float64, frozen), DEFINITIONS[name])
    outcomes = []
    for key, value in mine.items():
        yardstick = cases.relative_error(theirs[key], truth[key])
        bound = 2 * yardstick + small if math.isfinite(yardstick) else small
        outcomes.append(Outcome(cases.relative_error(value, truth[key]), bound, key))
    return max(outcomes, key=lambda one: one.error / one.bound if one.error == one.error else math.inf)


def rms_of_tokens(case: Any, options: Options) -> Outcome:
    """Log-probabilities alone, without gradients. A long sum in float32 rounds as the square root of its length on a
    CPU, and is cut off once per step on matrix cores."""
    with torch.no_grad():
        value = uk.token_logprobs(*case.inputs, **case.head, options=options)
        exact = case.like(torch.float64)
        truth = reference.token_logprobs(*exact.inputs, **exact.head)
        logsumexp = reference.logits(exact.hidden, exact.weight).logsumexp(1)
    width = case.hidden.shape[1]
    bound = ERROR_TARGET * max(1.0, (width / 4096) ** 0.5)
    if case.hidden.is_cuda:
        bound += matrix_core_error(width, logsumexp)
    return Outcome(float((value.double() - truth).square().mean().sqrt()), bound, NATS)


def same_bits(first: list[Tensor], second: list[Tensor], what: str = "tensors that differ") -> Outcome:
    return Outcome(float(sum(not torch.equal(a, b) for a, b in zip(first, second, strict=True))), 0.0, what)


def outputs(case: Any, name: str, options: Options) -> list[Tensor]:
    """Value and gradients of new leaves."""
    one = case.like()
    value = KERNELS[name](one, options)
    return [value.detach(), *torch.autograd.grad(weighted(one, value), list(one.leaves().values()))]


# ------------------------------------------------------------------------------------------------------- the checks


def shapes(make: Maker) -> Iterator[Check]:
    """One less, exactly and one more than tiles of 128 and 256, in each dimension."""
    sizes = [(rows, 136, vocab) for rows in (127, 128, 129) for vocab in (255, 256, 257)]
    sizes += [(rows, 64, vocab) for rows, vocab in ((255, 1023), (256, 1024), (257, 1025), (1, 129), (513, 5))]
    sizes += [(130, width, 300) for width in (63, 64, 65, 100, 127, 128, 129)]
    for dtype in (BF16, FP32, FP16):
        for size in sizes[:: 4 if make.tiny else 1]:
            yield f"shape {size} {short(dtype)}", lambda size=size, dtype=dtype: compare(
                make.case(*size, dtype), "token_logprobs", make.options()
            )  # fmt: skip


def vocabularies_and_widths(make: Maker) -> Iterator[Check]:
    sizes = [(33, 896, vocab) for vocab in (50257, 128256, 151936, 256000)]
    sizes += [(33, width, 32001) for width in (2304, 3584, 4096, 5120, 8192)]
    for size in sizes[:: 4 if make.tiny else 1]:
        for dtype in (BF16,) if size[2] > 60000 else (BF16, FP16, FP32):
            case = lambda size=size, dtype=dtype: make.case(*size, dtype)  # noqa: E731
            yield f"log-probabilities {size} {short(dtype)}", lambda case=case: rms_of_tokens(case(), make.options())
            yield f"gradients {size} {short(dtype)}", lambda case=case: compare(
                case(), "token_logprobs", make.options()
            )  # fmt: skip


def heads(make: Maker) -> Iterator[Check]:
    for dtype in (BF16, FP16, FP32):
        for chosen in (*((name,) for name in PARTS), PARTS):
            yield f"head {'+'.join(chosen)} {short(dtype)}", lambda chosen=chosen, dtype=dtype: compare(
                make.case(150, 96, 517, dtype, parts=chosen), "token_logprobs", make.options()
            )  # fmt: skip
    for dtype in (BF16, FP16):
        yield f"float32 weight beside {short(dtype)} hidden", lambda dtype=dtype: compare(
            make.case(150, 96, 517, dtype, weight_dtype=FP32, parts=("bias", "lora")), "token_logprobs", make.options()
        )  # fmt: skip
    yield (
        "logits past exp's range",
        lambda: compare(make.case(150, 96, 517, BF16, logit_std=60.0, lead=0.0), "token_logprobs", make.options()),
    )


def functions(make: Maker) -> Iterator[Check]:
    """Every function in every schedule, and each input frozen in turn."""
    for name in KERNELS:
        for workspace in cases.WORKSPACES:
            for parts_ in ((), PARTS):
                # one row at a time costs a round of launches each
                num_rows = 40 if workspace == "rows" else 260
                case = lambda n=num_rows, parts_=parts_: make.case(n, 128, 777, BF16, parts=parts_)  # noqa: E731

                def run(name: str = name, workspace: str = workspace, case: Any = case) -> Outcome:
                    made = case()
                    return compare(made, name, make.options(cases.WORKSPACES[workspace](made)))

                yield f"{name} workspace {workspace}{' whole head' if parts_ else ''}", run
    for frozen, names in FROZEN.items():
        for name in ("token_logprobs", "sequence_loss"):
            for workspace in ("keep", "chunks"):

                def run_frozen(names: Any = names, name: str = name, workspace: str = workspace) -> Outcome:
                    made = make.case(150, 96, 517, BF16, parts=PARTS)
                    return compare(made, name, make.options(cases.WORKSPACES[workspace](made)), names)

                yield f"{name} frozen {frozen} workspace {workspace}", run_frozen


def plans(make: Maker) -> Iterator[Check]:
    """Every plan that the Triton backend may choose on this device, forced."""
    if make.device.type != "cuda":
        return

    def run(provider: Any, size: tuple[int, int, int]) -> Outcome:
        with provider.context():
            return compare(make.case(*size, BF16), "token_logprobs", make.options())

    for provider in variants(make.device):
        for size in ((300, 136, 1003), (129, 2304, 32001)):
            yield f"{provider.name} {size}", lambda provider=provider, size=size: run(provider, size)


def strides(make: Maker) -> Iterator[Check]:
    def run(dtype: torch.dtype, columns: bool) -> Outcome:
        case = make.case(140, 96, 300, dtype)
        wide = torch.cat([case.hidden.detach()] * 2, 1)
        hidden = wide[:, : case.hidden.shape[1]]
        weight = case.weight.detach().T.contiguous().T if columns else case.weight.detach()
        results = []
        for states, head in ((hidden, weight), (hidden.contiguous(), weight.contiguous())):
            states, head = states.detach().requires_grad_(), head.detach().requires_grad_()
            value = uk.token_logprobs(states, head, case.targets, options=make.options())
            results.append([value.detach(), *torch.autograd.grad(value, (states, head), case.upstream.to(value.dtype))])
        errors = [cases.relative_error(mine, theirs) for mine, theirs in zip(*results, strict=True)]
        return Outcome(max(errors), cases.SMALL[dtype], "against contiguous inputs")

    for dtype in (BF16, FP32):
        yield f"strided hidden {short(dtype)}", lambda dtype=dtype: run(dtype, False)
        yield f"strided hidden, column-major weight {short(dtype)}", lambda dtype=dtype: run(dtype, True)


def rows_with_lead(make: Maker, lead: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits are hidden itself (weight is the identity), so the target's lead over all others is exact."""
    num_rows, vocab = 9, 304
    hidden = torch.zeros(num_rows, vocab, device=make.device)
    row = torch.arange(num_rows, device=make.device)
    targets = row * 7 % vocab
    hidden[row, targets if lead > 0 else (targets + 11) % vocab] = abs(lead)
    return hidden.to(dtype), torch.eye(vocab, dtype=dtype, device=make.device), targets


def both_ends(make: Maker) -> Iterator[Check]:
    """Memorised rows keep relative accuracy, hopeless ones absolute; their gradients stay finite and right."""

    def value(lead: float, dtype: torch.dtype) -> Outcome:
        hidden, weight, targets = rows_with_lead(make, lead, dtype)
        got = uk.token_logprobs(hidden, weight, targets, options=make.options()).double()
        truth = reference.token_logprobs(hidden.double(), weight.double(), targets)
        if lead < 0:
            return Outcome(float((got - truth).abs().max()), 1e-4, "nats")
        truth = truth.new_tensor(-math.log1p((weight.shape[0] - 1) * math.exp(-lead)))
        return Outcome(float(((got - truth) / truth).abs().max()), 1e-5, "relative")

    def gradient(lead: float, workspace: int | None) -> Outcome:
        hidden, weight, targets = rows_with_lead(make, lead, FP32)
        grads = []
        for to, function in ((FP32, uk.token_logprobs), (torch.float64, reference.token_logprobs)):
            leaf = hidden.to(to).requires_grad_()
            more = {"options": make.options(workspace)} if to == FP32 else {}
            grads.append(torch.autograd.grad(function(leaf, weight.to(to), targets, **more).sum(), leaf)[0])
        mine, truth = grads
        if lead > 0:  # float64 autograd loses 1 - p to cancellation; the other entries, which sum to minus it, do not
            row = torch.arange(len(truth), device=truth.device)
            truth[row, targets] -= truth.sum(1)
        return Outcome(cases.relative_error(mine, truth), 3e-6, "dhidden")

    for lead in (24.0, 30.0, 40.0, -60.0, -101.0, -104.0, -128.0, -140.0, -300.0):
        for dtype in (BF16, FP16, FP32):
            yield f"target {lead:+.0f} nats {short(dtype)}", lambda lead=lead, dtype=dtype: value(lead, dtype)
        if lead > -200:
            for workspace in (None, 8192):
                yield f"gradient {lead:+.0f} nats workspace {workspace}", lambda lead=lead, w=workspace: gradient(
                    lead, w
                )  # fmt: skip


def statistics_and_packing(make: Maker) -> Iterator[Check]:
    def stats(dtype: torch.dtype, parts_: tuple[str, ...]) -> Outcome:
        case = make.case(150, 96, 1003, dtype, parts=parts_)
        with torch.no_grad():
            mine = uk.token_stats(*case.inputs, **case.head, options=make.options())
            exact = case.like(torch.float64)
            truth = reference.token_stats(*exact.inputs, **exact.head)
        wrong = int((mine.is_argmax != truth[1]).sum())
        errors = [cases.relative_error(mine[at], truth[at]) for at in (0, 2, 3)]
        return Outcome(max(errors) + wrong, 1e-5, "log p, argmax, mean and variance")

    def packing() -> Outcome:
        generator = torch.Generator(make.device).manual_seed(0)
        states = torch.randn(5, 11, 16, generator=generator, device=make.device, dtype=BF16)
        labels = torch.randint(50, (5, 11), generator=generator, device=make.device)
        labels[torch.rand(5, 11, generator=generator, device=make.device) < 0.6] = -100
        labels[2] = -100
        packed = uk.pack_labels(states, labels)
        rows = [(b, t) for b in range(5) for t in range(10) if labels[b, t + 1] != -100]
        wanted = [torch.stack([states[b, t] for b, t in rows]), torch.stack([labels[b, t + 1] for b, t in rows])]
        return same_bits([packed.hidden, packed.targets], wanted)

    for dtype in (BF16, FP16, FP32):
        for parts_ in ((), PARTS):
            yield f"token_stats {short(dtype)}{' whole head' if parts_ else ''}", lambda d=dtype, p=parts_: stats(d, p)
    yield "pack_labels", packing


def repeats(make: Maker) -> Iterator[Check]:
    """The same bits twice, also with one label in most rows, and where a graph is retained."""

    def repeated_label(workspace: int | None) -> Outcome:
        case = make.case(800, 64, 304, BF16, lead=0.0, logit_std=1.0)
        case.targets[: len(case.targets) * 7 // 8] = 13
        case.upstream = torch.ones_like(case.upstream)
        with torch.no_grad():
            case.hidden[:] = 1.0 + 0.01 * case.hidden
        grads = []
        for one, function in ((case.like(), lambda c: KERNELS["token_logprobs"](c, make.options(workspace))),
                              (case.like(torch.float64), DEFINITIONS["token_logprobs"])):  # fmt: skip
            grads.append(torch.autograd.grad(weighted(one, function(one)), one.weight)[0])
        return Outcome(cases.relative_error(grads[0][13], grads[1][13]), 4e-3, "dweight of the repeated label")

    def retained(name: str, workspace: str) -> Outcome:
        case = make.case(150, 96, 517, BF16, parts=("lora",))
        value = weighted(case, KERNELS[name](case, make.options(cases.WORKSPACES[workspace](case))))
        leaves = list(case.leaves().values())
        first = torch.autograd.grad(value, leaves, retain_graph=True)
        copies = [grad.clone() for grad in first]
        torch.autograd.grad(value * 3.0, leaves, retain_graph=True)
        again = torch.autograd.grad(value, leaves)
        return same_bits([*first, *first], [*copies, *again])

    def threaded() -> Outcome:
        here, there = (make.case(150, 96, 517, BF16) for _ in range(2))
        KERNELS["sequence_loss"](here, make.options(200_000)).backward()
        value = KERNELS["sequence_loss"](there, make.options(200_000))
        thread = threading.Thread(target=value.backward)
        thread.start()
        thread.join()
        synchronize(make.device)
        return same_bits([here.hidden.grad, here.weight.grad], [there.hidden.grad, there.weight.grad])

    def twice(name: str, workspace: str) -> Outcome:
        case = make.case(300, 128, 1003, BF16, parts=PARTS)
        case.targets[::3] = 5
        options = make.options(cases.WORKSPACES[workspace](case))
        return same_bits(outputs(case, name, options), outputs(case, name, options))

    for name in KERNELS:
        for workspace in ("keep", "chunks"):
            yield f"{name} same bits twice workspace {workspace}", lambda n=name, w=workspace: twice(n, w)
    for workspace_bytes in (None, 200_000, 8192):
        yield f"label in most rows workspace {workspace_bytes}", lambda w=workspace_bytes: repeated_label(w)
    for name in ("token_logprobs", "sequence_loss"):
        for workspace in cases.WORKSPACES:
            yield f"{name} retained graph workspace {workspace}", lambda n=name, w=workspace: retained(n, w)
    yield "backward on another thread", threaded


def bad_targets(make: Maker) -> Iterator[Check]:
    def run(bad: int) -> Outcome:
        case = make.case(40, 64, 304, BF16)
        good = uk.token_logprobs(*case.inputs, options=make.options()).detach()
        case.targets[7] = bad
        try:
            value = uk.token_logprobs(*case.inputs, options=make.options()).detach()
        except ValueError:
            return Outcome(0.0 if make.device.type == "cpu" else 1.0, 0.0, "raised at once")
        others = torch.arange(len(value), device=make.device) != 7
        wrong = int(not bool(value[7].isnan())) + int(not torch.equal(value[others], good[others]))
        synchronize(make.device)
        case.targets[7] = 0
        try:
            for _ in range(3):
                uk.token_logprobs(*case.inputs, options=make.options())
                synchronize(make.device)
        except ValueError:
            return Outcome(float(wrong), 0.0, "the bad row is NaN, the others keep their bits, a later call raises")
        return Outcome(wrong + 1.0, 0.0, "no later call raised")

    for bad in (10**9, 304 if not make.tiny else 80, -1, -100):
        yield f"target {bad} is out of range", lambda bad=bad: run(bad)


def large(make: Maker) -> Iterator[Check]:
    """N x V past 2**31 elements, whole and in chunks; more rows than a grid's second dimension takes."""

    def run(shape: tuple[int, int, int], kind: str, whole: bool) -> Outcome:
        case = BenchCase.make((128, 16, 300) if make.tiny else shape, BF16, make.device).unsaturated()
        truth = truth_of(case, num_rows=192, num_columns=32)
        ours = Ours("unlearn_kernels", backend=make.backend, whole_e=whole)
        found = errors_of(ours, kind, case, truth)
        release(make.device)
        bounds = {"logprob_rms": ours.refused_above(make.device, case.hidden.shape[1], truth.logsumexp_S)}
        return max((Outcome(error, bounds.get(key, ours.gradient_bound), key) for key, error in found.items()),
                   key=lambda one: one.error / one.bound if one.error == one.error else math.inf)  # fmt: skip

    for shape in ((17024, 256, 128256), (70016, 64, 1000)):
        for kind in ("forward", "full", "frozen"):
            for whole in (False,) if kind == "forward" else (False, True):
                name = f"{kind} {shape}{' all of E' if whole else ''}"
                yield name, lambda shape=shape, kind=kind, whole=whole: run(shape, kind, whole)


def graphs(make: Maker) -> Iterator[Check]:
    """Captured with cu_seqlens on the GPU, replayed with changed inputs: what the eager call gives, the same bits each
    time. A captured loss may take another schedule than the eager one, so gradients agree to bf16's rounding."""
    if make.device.type != "cuda":
        return

    def run(name: str, workspace: int | None) -> Outcome:
        case, other = make.case(256, 128, 1003, BF16), make.case(256, 128, 1003, BF16, lead=5.0)
        plain = make.options(workspace)

        def work(options: Options) -> list[Tensor]:
            if name == "sequence_logprobs":
                with torch.no_grad():
                    return [uk.sequence_logprobs(*case.packed, options=options)]
            loss = uk.npo_loss(*case.packed, ref_B(case), beta=0.1, options=options)
            return [loss.detach(), *torch.autograd.grad(loss, (case.hidden, case.weight))]

        replay = graphed(lambda: work(replace(plain, capturable=True)))
        with torch.no_grad():
            case.hidden.copy_(other.hidden.flip(0))
            case.weight.copy_(other.weight)
            case.targets.copy_(other.targets.flip(0))
        replayed = [value.clone() for value in replay()]
        again = same_bits(replayed, replay())
        if not again.error <= again.bound:
            return again
        errors = [cases.relative_error(mine, theirs) for mine, theirs in zip(replayed, work(plain), strict=True)]
        return Outcome(max(errors), 1e-6 if name == "sequence_logprobs" else 2 * cases.SMALL[BF16], "against eager")

    for name in ("sequence_logprobs", "npo_loss"):
        for workspace in (None, 300_000):
            yield f"CUDA graph of {name} workspace {workspace}", lambda n=name, w=workspace: run(n, w)


def compiled(make: Maker) -> Iterator[Check]:
    def run(backend: str) -> Outcome:
        torch._dynamo.reset()
        case = make.case(130, 64, 517, BF16, parts=("bias",))

        def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            value = uk.token_logprobs(hidden, weight, case.targets, bias=bias, options=make.options())
            return (value * case.upstream.float()).sum()

        leaves = list(case.leaves().values())
        eager = torch.autograd.grad(loss(*leaves), leaves)
        traced = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=backend)(*leaves), leaves)
        errors = [cases.relative_error(mine, theirs) for mine, theirs in zip(traced, eager, strict=True)]
        return Outcome(max(errors), 1e-5, "against eager")

    for backend in ("aot_eager",) if make.tiny else ("aot_eager", "inductor"):
        yield f"torch.compile {backend}, full graph", lambda backend=backend: run(backend)


def second_device(make: Maker) -> Iterator[Check]:
    """While the current device is the first."""
    if make.device.type != "cuda" or torch.cuda.device_count() < 2:
        return
    other = Maker(torch.device("cuda", 1), make.backend, make.tiny)
    for name in KERNELS:
        yield f"{name} on a second device", lambda name=name: compare(
            other.case(150, 96, 517, BF16), name, other.options()
        )  # fmt: skip


def states_on_the_host(make: Maker) -> Iterator[Check]:
    """Whose copies run on a stream of their own: five steps of several slices each, weights and states to the bit."""

    def steps(kind: type[AdamWSR]) -> list[Tensor]:
        generator = torch.Generator(make.device).manual_seed(0)
        rows = 48 if make.tiny else 9000
        weights = [
            torch.randn(size, generator=generator, device=make.device).to(dtype).requires_grad_()
            for size, dtype in (((rows, 4096), BF16), ((4096, rows), FP32), ((517,), BF16))
        ]
        optimizer = kind(weights, lr=1e-2, weight_decay=0.1, seed=1)
        for _ in range(5):
            for weight in weights:
                drawn = torch.randn(weight.shape, generator=generator, device=make.device)
                weight.grad = drawn.to(weight.dtype)
            optimizer.step()
        states = optimizer.state_dict()["state"].values()
        return [*weights, *(state[name].cpu() for state in states for name in ("exp_avg", "exp_avg_sq"))]

    yield "AdamWOffload, weights and states", lambda: same_bits(steps(AdamWOffload), steps(AdamWSR))


# What breaks most often first: the time may run out.
GROUPS = (functions, plans, bad_targets, both_ends, large, graphs, heads, repeats, strides, statistics_and_packing,
          vocabularies_and_widths, compiled, second_device, states_on_the_host, shapes)  # fmt: skip


CHECKS_PER_TASK = 6


def measure(part: Part) -> None:
    # The first plan of every head: what is checked must not hang on a timing.
    os.environ.setdefault("UNLEARN_KERNELS_AUTOTUNE", "0")
    make = Maker(part.device, part.backend, part.tiny)
    results = Results(part, {group.__name__: list(group(make)) for group in groups_of(part.args)})
    count = part.args.workers or (1 if part.tiny or part.device.type == "cpu" else min(8, os.cpu_count() or 1))
    print(f"backend {part.backend or 'as chosen'} on {part.device}, {count} processes", flush=True)
    if count == 1:
        for group, checks in results.checks.items():
            for name, check in checks:
                if part.budget.left < part.args.pytest_seconds:
                    results.left(group)
                    break
                results.row(judge(name, check, part.device))
    else:
        tasks = [
            Task(group, first, min(first + CHECKS_PER_TASK, len(checks)))
            for group, checks in results.checks.items()
            for first in range(0, len(checks), CHECKS_PER_TASK)
        ]
        release(part.device)
        Pool(worker_command(part.args), tasks, lambda: part.budget.left - part.args.pytest_seconds, results).run(count)
    print(f"{results.passed} checks passed, {part.rows.failed} failed", flush=True)
    if part.args.pytest_seconds and not part.tiny:
        run_pytest(part)


def groups_of(args: argparse.Namespace) -> list[Callable[[Maker], Iterator[Check]]]:
    return [group for group in GROUPS if not args.groups or group.__name__ in args.groups]


class Results:
    """Writes rows as they come, and says what failed."""

    def __init__(self, part: Part, checks: dict[str, list[Check]]) -> None:
        self.part, self.checks, self.passed = part, checks, 0
        self.left_out: set[str] = set()

    def row(self, row: dict[str, Any]) -> None:
        self.passed += row["passed"]
        self.part.rows.write(row, failed=not row["passed"])
        if not row["passed"]:
            why = row.get("message") or (row["what"], row["error"], row["bound"])
            print(f"FAILED {row['check']}: {why}", flush=True)

    def died(self, group: str, check: int, status: int) -> None:
        message = f"its process ended with status {status}"
        self.row({"case": "check", "check": self.checks[group][check][0], "passed": False, "message": message})

    def left(self, group: str) -> None:
        if group not in self.left_out:
            self.left_out.add(group)
            self.part.leave_out({"check": group})


def judge(name: str, check: Callable[[], Outcome], device: torch.device) -> dict[str, Any]:
    """Run one check and return its row."""
    start = time.monotonic()
    row: dict[str, Any] = {"case": "check", "check": name}
    try:
        outcome = check()
        synchronize(device)
        row |= {"passed": bool(outcome.error <= outcome.bound), **outcome._asdict()}
    except Exception as error:  # whatever it is, it is this check's result
        row |= {"passed": False, "message": first_line(error)}
    return row | {"seconds": round(time.monotonic() - start, 3)}


def worker_command(args: argparse.Namespace) -> list[str]:
    options = ["--device", args.device, *(["--backend", args.backend] if args.backend else [])]
    return [sys.executable, "-m", "bench.gpu_correctness", "--worker", *options, *(["--tiny"] if args.tiny else [])]


def work(args: argparse.Namespace) -> int:
    device = torch.device(args.device)
    make = Maker(device, args.backend, args.tiny)
    groups = {group.__name__: list(group(make)) for group in GROUPS}

    def rows_of(task: Task) -> Iterator[dict[str, Any]]:
        for name, check in groups[task.group][task.first : task.last]:
            yield judge(name, check, device)

    def alive() -> bool:
        with contextlib.suppress(Exception):
            synchronize(device)
            return True
        return False

    return serve(rows_of, alive)


def run_pytest(part: Part) -> None:
    """tests/kernels in their own process, with the seconds that are left; not counted where pytest is missing."""
    if importlib.util.find_spec("pytest") is None:
        part.leave_out({"check": "tests/kernels"}, "pytest is not installed")
        return
    command = [sys.executable, "-m", "pytest", "tests/kernels", "-x", "-q", "-p", "no:cacheprovider"]
    seconds = max(1.0, part.budget.left)
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        part.leave_out({"check": "tests/kernels"}, f"not done after {seconds:.0f} s")
        return
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    summary = lines[-1] if lines else done.stderr[-200:]
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))][:5]
    row = {"case": "pytest", "passed": done.returncode == 0, "summary": summary, "failures": failures}
    part.rows.write(row, failed=not row["passed"])
    print(f"tests/kernels: {summary}", *failures, sep="\n", flush=True)


def short(dtype: torch.dtype) -> str:
    return {BF16: "bf16", FP16: "fp16", FP32: "fp32"}[dtype]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> int:
    parser = parts.parser_of(__doc__, seconds=145)
    parser.add_argument("--pytest-seconds", type=float, default=0, help="of these for tests/kernels; 0 leaves it out")
    parser.add_argument("--workers", type=int, help="processes on the one device; a processor each, 8 at most")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    names = [group.__name__ for group in GROUPS]
    parser.add_argument("--groups", nargs="+", choices=names, metavar="GROUP", help=f"of {', '.join(names)}")
    if "--worker" in sys.argv:
        return work(parser.parse_args())
    return parts.run("correctness", parser, measure)


if __name__ == "__main__":
    sys.exit(main())
