"""The providers beside each other on whatever device is here: `python -m pytest bench --benchmark-only`.

A quick look while working on a kernel; rows that are kept come from bench.cpu and bench/gpu.sh. A provider whose
answer is out of bounds fails and is not timed; one that is not here is skipped with the reason.
"""

from __future__ import annotations

import functools

import pytest
import torch

from bench import providers as everyone
from bench.inputs import Case, Truth, truth_of
from bench.measure import errors_of
from bench.providers import Provider, work_of

pytest.importorskip("pytest_benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE, DTYPE = ((4096, 4096, 128256), torch.bfloat16) if DEVICE.type == "cuda" else ((128, 64, 1000), torch.float32)
PROVIDERS = [*everyone.ours("torch", "triton"), *everyone.variants(), everyone.whole_e(), *everyone.peers()]


@functools.cache
def inputs() -> tuple[Case, Truth]:
    case = Case.make(SHAPE, DTYPE, DEVICE).unsaturated()
    return case, truth_of(case, num_columns=64)


@pytest.mark.parametrize("kind", ["forward", "full", "frozen", "mean_ce"])
@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: provider.name)
def test_provider(benchmark, provider: Provider, kind: str):
    reason = provider.missing(DEVICE) or (None if kind in provider.kinds else f"has no {kind}")
    if reason is not None:
        pytest.skip(f"{provider.name}: {reason}")
    case, truth = inputs()
    provider.begin()
    for name, error in errors_of(provider, kind, case, truth).items():
        bound = provider.error_bound if name == "logprob_rms" else provider.gradient_bound
        assert error <= bound, f"{name} {error:.2g}"
    work = work_of(provider, kind, case)

    def call() -> None:
        work()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{kind} {' x '.join(map(str, SHAPE))} {DTYPE}"
    benchmark.extra_info["provider"] = provider.name
    benchmark.pedantic(call, rounds=10, warmup_rounds=2)
    case.ask(hidden=False, weight=False)
