"""Cost and error of the kernels on this machine's CPU: `python -m bench.kernels`.

For each shape and dtype: the log-likelihoods without gradients, NPO forward and backward with a trained head and with a
frozen one, by unlearn_kernels and by plain torch with full logits. Costs are in units: the time over the time of one
torch.mm of N x H x V in the same dtype into memory that exists, measured between them in the same process. A row whose
error is out of bounds is not written: a fast wrong answer is no measurement.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.inputs import BETA, Case
from bench.providers import Ours, PlainTorch, Provider, work_of
from bench.rows import environment, write
from bench.timing import Stopwatch, Unit, peak_mib
from unlearn_kernels import reference

SHAPES = ((1024, 512, 8192), (512, 1024, 32000))
DTYPES = (torch.float32, torch.bfloat16)
KINDS = ("forward", "full", "frozen")
# Root mean square error of token log-probabilities is held to the provider's own bound.
GRADIENT_BOUND = 2e-2  # relative, for bf16 results
PROVIDERS = (Ours("unlearn_kernels"), PlainTorch("torch"))
CPU = torch.device("cpu")


def measure(case: Case, repeats: int) -> dict[tuple[str, str], list[float]]:
    """Milliseconds of each (provider, kind) and of the bare product, interleaved so that a busy moment hits all
    alike."""
    work: dict[tuple[str, str], Callable[[], Any]] = {("mm", "unit"): Unit(case.hidden, case.weight)}
    for provider in PROVIDERS:
        for kind in KINDS:
            work[provider.name, kind] = work_of(provider, kind, case)
    stopwatch = Stopwatch(CPU)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in work}
    for repeat in range(repeats + 1):
        for key, run in work.items():
            elapsed = stopwatch(run)
            if repeat:  # the first is warm-up
                times[key].append(elapsed)
    return times


def peak(case: Case, provider: Provider, kind: str) -> float:
    """MiB that one call has allocated at its highest, gradients included."""
    case.ask(hidden=False, weight=False)
    return peak_mib(work_of(provider, kind, case), CPU)


def errors(case: Case, provider: Provider) -> dict[str, float]:
    """Against float64 full logits of the same inputs: rms of log-probabilities, relative error of both gradients."""
    exact = Case(case.hidden.detach().double(), case.weight.detach().double(), case.targets, case.cu_seqlens, case.ref)
    with torch.no_grad():
        truth = reference.token_logprobs(exact.hidden, exact.weight, exact.targets)
        value = provider.tokens(case.hidden, case.weight, case.targets)
        logprob = (value.double() - truth).square().mean().sqrt().item()
    exact.ask(hidden=True, weight=True)
    exact_npo(exact).backward()
    work_of(provider, "full", case)()
    result = {"logprob_rms": logprob}
    for key in ("hidden", "weight"):
        got, want = getattr(case, key).grad.double(), getattr(exact, key).grad
        result[f"d{key}_relative"] = ((got - want).norm() / want.norm()).item()
    return result


def exact_npo(case: Case) -> Tensor:
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
            times_ms = measure(case, args.repeats)
            unit = statistics.median(times_ms["mm", "unit"])
            for provider in PROVIDERS:
                name, error = provider.name, errors(case, provider)
                for key, value in error.items():
                    bound = provider.error_bound if key == "logprob_rms" else GRADIENT_BOUND
                    if not value <= bound:
                        raise SystemExit(f"{name} {shape} {dtype}: {key} {value:.3g}; nothing is written")
                for kind in KINDS:
                    times = sorted(times_ms[name, kind])
                    row = {
                        "case": kind,
                        "provider": name,
                        "shape": dict(zip(("N", "H", "V"), shape, strict=True)),
                        "dtype": str(dtype).removeprefix("torch."),
                        "units": statistics.median(times) / unit,
                        "units_quartiles": [times[len(times) // 4] / unit, times[3 * len(times) // 4] / unit],
                        "unit_ms": unit,
                        "peak_mib": peak(case, provider, kind),
                        **error,
                    }
                    rows.append(row | shared)
                    print(f"{name:16} {kind:8} {shape} {row['dtype']:9} {row['units']:.2f} units, "
                          f"{row['peak_mib']:.0f} MiB, log-prob error {error['logprob_rms']:.1e}")  # fmt: skip
    print(write("kernels", rows).name)


if __name__ == "__main__":
    main()
