"""Cost and error of the kernels on this machine's CPU: `python -m bench.kernels`.

For each shape and dtype: the log-likelihoods without gradients, NPO forward and backward with a trained head and with a
frozen one, by unlearn_kernels and by plain torch with full logits. Costs are in units: the time over the time of one
torch.mm of N x H x V in the same dtype into memory that exists, measured between them in the same process. A row whose
error is out of bounds is not written: a fast wrong answer is no measurement.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.rows import environment, write
from unlearn_kernels import npo_loss, reference, sequence_logprobs, token_logprobs

SHAPES = ((1024, 512, 8192), (512, 1024, 32000))
DTYPES = (torch.float32, torch.bfloat16)
# Peaked rows: root mean square error of token log-probabilities against float64 that a provider must not exceed.
ERROR_BOUND = {"unlearn_kernels": 1e-5, "torch": 1e-1}
GRADIENT_BOUND = 2e-2  # relative, for bf16 results
BETA = 0.1


@dataclass(frozen=True)
class Case:
    """Peaked inputs: half of the targets are aligned with their hidden state, some by 30 nats."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    ref: Tensor

    @staticmethod
    def make(shape: tuple[int, int, int], dtype: torch.dtype) -> Case:
        num_tokens, width, vocab = shape
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(vocab, width, generator=generator) * width**-0.5
        targets = torch.randint(vocab, (num_tokens,), generator=generator)
        hidden = torch.randn(num_tokens, width, generator=generator) * 2
        aligned = torch.arange(num_tokens) % 2 == 0
        hidden[aligned] += 15 * weight[targets[aligned]] / weight[targets[aligned]].norm(dim=1, keepdim=True) ** 2
        cu_seqlens = torch.arange(0, num_tokens + 1, 64)
        ref = torch.randn(len(cu_seqlens) - 1, generator=generator, dtype=torch.float64) - 64 * 5
        return Case(hidden.to(dtype), weight.to(dtype), targets, cu_seqlens, ref)


def plain_logprobs(case: Case) -> Tensor:
    """What trainers do: full logits in the model's dtype, log-softmax in float32."""
    return (case.hidden @ case.weight.T).float().log_softmax(-1).gather(1, case.targets[:, None])[:, 0]


def plain_npo(case: Case) -> Tensor:
    lengths = case.cu_seqlens.diff()
    index = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    logprob = torch.zeros(len(lengths), dtype=torch.float64).index_add(0, index, plain_logprobs(case).double())
    return (-2 / BETA * torch.nn.functional.logsigmoid(-BETA * (logprob - case.ref))).mean()


def our_npo(case: Case) -> Tensor:
    return npo_loss(case.hidden, case.weight, case.targets, case.cu_seqlens, case.ref, beta=BETA)


def our_forward(case: Case) -> Tensor:
    return sequence_logprobs(case.hidden, case.weight, case.targets, case.cu_seqlens)


PROVIDERS: dict[str, tuple[Callable[[Case], Tensor], Callable[[Case], Tensor], Callable[[Case], Tensor]]] = {
    # forward without gradients, NPO loss, token log-probabilities (for the error)
    "unlearn_kernels": (our_forward, our_npo, lambda c: token_logprobs(c.hidden, c.weight, c.targets)),
    "torch": (plain_logprobs, plain_npo, plain_logprobs),
}


def step(loss: Callable[[Case], Tensor], case: Case, *, frozen: bool) -> None:
    case.hidden.requires_grad_().grad = None
    case.weight.requires_grad_(not frozen).grad = None
    loss(case).backward()


def measure(case: Case, repeats: int) -> dict[tuple[str, str], list[float]]:
    """Seconds of each (provider, kind) and of the bare product, interleaved so that a busy moment hits all alike."""
    out = torch.empty(len(case.hidden), len(case.weight), dtype=case.hidden.dtype)
    work: dict[tuple[str, str], Callable[[], Any]] = {
        ("mm", "unit"): lambda: torch.mm(case.hidden.detach(), case.weight.detach().T, out=out)
    }
    for name, (forward, loss, _) in PROVIDERS.items():
        work[name, "forward"] = torch.no_grad()(lambda forward=forward: forward(case))
        work[name, "full"] = lambda loss=loss: step(loss, case, frozen=False)
        work[name, "frozen"] = lambda loss=loss: step(loss, case, frozen=True)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in work}
    for repeat in range(repeats + 1):
        for key, run in work.items():
            start = time.perf_counter()
            run()
            if repeat:  # the first is warm-up
                seconds[key].append(time.perf_counter() - start)
    return seconds


def peak(case: Case, name: str, kind: str) -> float:
    """MiB that one call has allocated at its highest, gradients included; the profiler sees inside operators."""
    forward, loss, _ = PROVIDERS[name]
    case.hidden.grad = case.weight.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        if kind == "forward":
            with torch.no_grad():
                forward(case)
        else:
            step(loss, case, frozen=kind == "frozen")
    live = highest = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            highest = max(highest, live)
    return highest / 2**20


def errors(case: Case, name: str) -> dict[str, float]:
    """Against float64 full logits of the same inputs: rms of log-probabilities, relative error of both gradients."""
    _, loss, tokens = PROVIDERS[name]
    exact = Case(case.hidden.detach().double(), case.weight.detach().double(), case.targets, case.cu_seqlens, case.ref)
    with torch.no_grad():
        truth = reference.token_logprobs(exact.hidden, exact.weight, exact.targets)
        logprob = (tokens(case).double() - truth).square().mean().sqrt().item()
    step(plain_npo_exact, exact, frozen=False)
    step(loss, case, frozen=False)
    result = {"logprob_rms": logprob}
    for key in ("hidden", "weight"):
        got, want = getattr(case, key).grad.double(), getattr(exact, key).grad
        result[f"d{key}_relative"] = ((got - want).norm() / want.norm()).item()
    return result


def plain_npo_exact(case: Case) -> Tensor:
    token = reference.token_logprobs(case.hidden, case.weight, case.targets)
    logprob = torch.segment_reduce(token, "sum", offsets=case.cu_seqlens)
    return (-2 / BETA * torch.nn.functional.logsigmoid(-BETA * (logprob - case.ref))).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    shared, rows = environment(), []
    for shape in SHAPES:
        for dtype in DTYPES:
            case = Case.make(shape, dtype)
            seconds = measure(case, args.repeats)
            unit = statistics.median(seconds["mm", "unit"])
            for name in PROVIDERS:
                error = errors(case, name)
                for key, value in error.items():
                    bound = ERROR_BOUND[name] if key == "logprob_rms" else GRADIENT_BOUND
                    if not value <= bound:
                        raise SystemExit(f"{name} {shape} {dtype}: {key} {value:.3g}; nothing is written")
                for kind in ("forward", "full", "frozen"):
                    times = sorted(seconds[name, kind])
                    row = {
                        "case": kind,
                        "provider": name,
                        "shape": dict(zip(("N", "H", "V"), shape, strict=True)),
                        "dtype": str(dtype).removeprefix("torch."),
                        "units": statistics.median(times) / unit,
                        "units_quartiles": [times[len(times) // 4] / unit, times[3 * len(times) // 4] / unit],
                        "unit_ms": unit * 1e3,
                        "peak_mib": peak(case, name, kind),
                        **error,
                    }
                    rows.append(row | shared)
                    print(f"{name:16} {kind:8} {shape} {row['dtype']:9} {row['units']:.2f} units, "
                          f"{row['peak_mib']:.0f} MiB, log-prob error {error['logprob_rms']:.1e}")  # fmt: skip
    print(write("kernels", rows).name)


if __name__ == "__main__":
    main()
