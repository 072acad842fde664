"""What is measured of one provider and one kind of call: errors against float64, whether they refuse it, and speed."""

from __future__ import annotations

from typing import Any

import torch

from bench.inputs import Case, Shape, Truth, relative_error
from bench.providers import Provider, work_of
from bench.rows import first_line
from bench.timing import quartiles, release

Fields = dict[str, Any]


def named(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Fields:
    return {"shape": dict(zip("NHV", shape, strict=True)), "dtype": str(dtype).removeprefix("torch.")}


def errors_of(provider: Provider, kind: str, case: Case, truth: Truth) -> Fields:
    """What this kind gets wrong: rms of log-probabilities (nats), relative error of the gradients it computes."""
    if kind == "forward":
        with torch.no_grad(), provider.context():
            logprob = provider.tokens(case.hidden, case.weight, case.targets)[truth.rows]
        return {"logprob_rms": float((logprob.double() - truth.logprob_S).square().mean().sqrt())}
    work_of(provider, kind, case)()
    want = truth.dhidden_SH
    if kind == "mean_ce":
        want = want / truth.slope_S[:, None] / -len(case.hidden)
    found = {"dhidden_relative": relative_error(case.hidden.grad[truth.rows], want)}
    if kind == "full" and truth.dweight_CH is not None:
        found["dweight_relative"] = relative_error(case.weight.grad[truth.columns], truth.dweight_CH)
    return found


def checked(provider: Provider, kind: str, case: Case, truth: Truth) -> Fields:
    """errors_of, with `refused` where one is out of the provider's bounds; or `failed`, the message of what was raised.

    A row with either has no speed: a fast wrong answer is no measurement.
    """
    device = case.hidden.device
    try:
        found = errors_of(provider, kind, case, truth)
    except Exception as error:  # a peer may raise anything
        found = {"failed": first_line(error)}
    case.ask(hidden=False, weight=False)
    release(device)
    if "failed" in found:
        return found
    bounds = {"logprob_rms": provider.refused_above(device, case.shape[1], truth.logsumexp_S)}
    inside = all(value <= bounds.get(key, provider.gradient_bound) for key, value in found.items())
    return found if inside else found | {"refused": True}


def has_speed(row: Fields) -> bool:
    return not {"refused", "failed"} & set(row)


def speed(times: list[float], unit_ms: float) -> Fields:
    lower, middle, upper = quartiles(times)
    return {
        "units": middle / unit_ms,
        "units_quartiles": [lower / unit_ms, upper / unit_ms],
        "ms": middle,
        "unit_ms": unit_ms,
        "rounds": len(times),
    }


def outcome(row: Fields) -> str:
    """A row's result in a few words."""
    if "refused" in row:
        return f"REFUSED { ({key: row[key] for key in row if key.endswith(('rms', 'relative'))}) }"
    return (
        row.get("failed") or f"{row['units']:.3f} units, {row.get('peak_mib') or row.get('peak_rss_mib') or 0:.0f} MiB"
    )
