"""The short table that bench/gpu.sh prints last, made from the rows alone: `python -m bench.gpu_summary --out DIR`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench import context_tables
from bench.rows import RESULTS, read

Row = dict[str, Any]
PARTS = ("correctness", "kernels", "peers", "train-e")
# Units of one bf16 matrix product: no gradient, trained head, frozen head.
TARGETS = {"forward": 1.05, "full": 3.2, "frozen": 2.1}
ERROR_TARGET = 1e-5
MEMORY_SHAPE, MEMORY_TARGET_MIB = "16384 x 4096 x 128256", 3.4 * 1024
OURS = "unlearn_kernels"
# of a row that was left out, what says which it would have been
_NAMING = ("provider", "check", "optimizer", "model", "layers", "context", "rung")


def summary(folder: Path, names: Iterable[str] = PARTS) -> str:
    """At most 100 columns wide."""
    lines: list[str] = []
    for name in names:
        rows = read(f"gpu_{name}", folder)
        lines += ["", f"== {name}{_origin(rows)}"]
        if not rows:
            lines.append("no rows")
            continue
        if rows[-1]["tiny"]:
            lines.append("tiny shapes: the scripts were tried, nothing was measured")
        if name in context_tables.TABLES:
            lines += context_tables.summary_lines(name, rows)
        else:
            lines += {"correctness": _correctness, "train-e": _train}.get(name, _kernels)(rows)
        lines += _endings(rows)
    return "\n".join(line[:100].rstrip() for line in lines[1:]) + "\n"


def _origin(rows: list[Row]) -> str:
    if not rows:
        return ""
    last = rows[-1]
    commit = (last["commit"] or "no commit") + (" + changes" if last["dirty"] else "")
    return f": {last['device'].partition(' (')[0]}, torch {last['torch']}, {commit}"


def _endings(rows: list[Row]) -> list[str]:
    """What is not there and why."""
    lines = [f"error in {_shape(row)}: {row['message']}" for row in rows if row["case"] == "error"]
    missing = {row["provider"]: row["reason"] for row in rows if row["case"] == "missing"}
    lines += [f"missing: {name}: {reason}" for name, reason in missing.items()]
    left: dict[str, list[str]] = {}
    for row in rows:
        if row["case"] == "left_out":
            what = [str(row[key]) for key in _NAMING if key in row and not isinstance(row[key], dict)]
            left.setdefault(row["reason"], []).append(" ".join(([_shape(row)] if "shape" in row else []) + what))
    for reason, what in left.items():
        lines.append(f"left out, {reason}:")
        lines += [f"    {item or 'a case'}" for item in dict.fromkeys(what)]
    if rows[-1]["case"] != "end":
        lines.append("CUT OFF: the part did not reach its end; the rows above are valid")
    return lines


def _correctness(rows: list[Row]) -> list[str]:
    checks = [row for row in rows if row["case"] == "check"]
    failed = [row for row in checks if not row["passed"]]
    lines = [f"{len(checks) - len(failed)} checks passed, {len(failed)} failed"]
    for row in failed[:12]:
        why = row.get("message") or f"{row['what']}: error {_number(row['error'])}, bound {_number(row['bound'])}"
        lines.append(f"FAILED {row['check']}: {why}")
    sums = [row["error"] for row in checks if row.get("what") == "nats rms"]
    if sums:
        over = [error for error in sums if not _within(error, ERROR_TARGET)]
        worst = max(map(float, sums), key=_nan_last)
        met = f"NOT met in {len(over)} of {len(sums)}" if over else f"met in all {len(sums)} checks"
        lines.append(f"target log-prob error <= {ERROR_TARGET:.0e}: {met}, worst {worst:.1e}")
    return lines + [f"tests/kernels: {row['summary']}" for row in rows if row["case"] == "pytest"]


def _kernels(rows: list[Row]) -> list[str]:
    lines = []
    for shape in dict.fromkeys(_shape(row) for row in rows if row["case"] in TARGETS):
        here = [row for row in rows if "provider" in row and _shape(row) == shape and "batch" not in row]
        unit = next((row for row in rows if row["case"] == "unit" and _shape(row) == shape), None)
        head = f", unit {unit['unit_ms']:.2f} ms = {unit['tflops']:.0f} TFLOP/s" if unit else ""
        lines.append(f"N x H x V = {shape}{head}")
        lines.append(_line("", "forward", "full", "frozen", "mean CE", "peak MiB", "logp rms"))
        for name in dict.fromkeys(row["provider"] for row in here):
            found = {row["case"]: row for row in here if row["provider"] == name}
            units = [_units(found.get(kind)) for kind in (*TARGETS, "mean_ce")]
            peak = found.get("full", {}).get("peak_mib")
            error = found.get("forward", {}).get("logprob_rms")
            lines.append(_line(name, *units, "" if peak is None else f"{peak:.0f}", _number(error)))
        graphs = [row for row in here if row["case"].startswith("graph_")]
        if graphs:
            lines.append("  CUDA graph: " + ", ".join(f"{row['case'][6:]} {_units(row)}" for row in graphs))
    return lines + _padded(rows) + ([] if rows[-1]["tiny"] else _targets(rows))


def _padded(rows: list[Row]) -> list[str]:
    lines = []
    padded = [row for row in rows if row["case"].startswith("padded_")]
    for shape in dict.fromkeys(_shape(row) for row in padded):
        here = [row for row in padded if _shape(row) == shape]
        lines.append(f"padded batch, B T x H x V = {shape}, {here[0]['labels']} labels")
        lines.append(_line("", "", "full", "frozen", "", "peak MiB", ""))
        for name in dict.fromkeys(row["provider"] for row in here):
            found = {row["case"]: row for row in here if row["provider"] == name}
            peak = found.get("padded_full", {}).get("peak_mib")
            units = [_units(found.get(f"padded_{kind}")) for kind in ("full", "frozen")]
            lines.append(_line(name, "", *units, "", "" if peak is None else f"{peak:.0f}", ""))
    return lines


def _targets(rows: list[Row]) -> list[str]:
    """Whether our default reaches what was aimed at, shape by shape."""
    ours = [row for row in rows if row.get("provider") == OURS and row["case"] in TARGETS and "shape" in row]
    lines = []
    for kind, target in TARGETS.items():
        lines.append(_verdict(f"{kind} <= {target} units", kind, ours, "units", target))
    lines.append(_verdict(f"log-prob error <= {ERROR_TARGET:.0e}", "forward", ours, "logprob_rms", ERROR_TARGET))
    large = [row for row in ours if _shape(row) == MEMORY_SHAPE]
    if large:
        lines.append(_verdict(f"peak <= 3.4 GiB at {MEMORY_SHAPE}", "full", large, "peak_mib", MEMORY_TARGET_MIB))
    return lines


def _verdict(text: str, kind: str, ours: list[Row], key: str, target: float) -> str:
    found = {_shape(row): row.get(key) for row in ours if row["case"] == kind}
    missed = [shape for shape, value in found.items() if not _within(value, target)]
    if not found:
        return f"target {text}: not measured"
    # "nan" is how a row spells one
    worst = max((float(value) for value in found.values() if value is not None), key=_nan_last, default=math.nan)
    if not missed:
        return f"target {text}: met at all {len(found)} shapes, worst {worst:.3g}"
    first = ", ".join(shape.replace(" ", "") for shape in missed[:1])
    more = " ..." if missed[1:] else ""
    return f"target {text}: NOT met at {len(missed)} of {len(found)}, worst {worst:.3g}: {first}{more}"


def _within(value: Any, target: float) -> bool:
    return isinstance(value, float) and value <= target


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _train(rows: list[Row]) -> list[str]:
    lines = []
    optimizer = next((row["ms"] for row in rows if row["case"] == "optimizer"), None)
    steps = [row for row in rows if row["case"] == "train_step"]
    for share in dict.fromkeys(row["labelled"] for row in steps):
        here = {row["provider"]: row for row in steps if row["labelled"] == share}
        lines.append(f"{share:.0%} labelled: {next(iter(here.values()))['tokens']} tokens")
        for name, row in here.items():
            if "ms" not in row:
                lines.append(f"  {name:10} {row.get('failed', 'REFUSED')}")
                continue
            lines.append(
                f"  {name:10} {row['ms']:9.1f} ms {row['tokens_per_second']:9.0f} tokens/s "
                f"peak {row['peak_mib']:8.0f} MiB over {row['resident_mib']:7.0f} MiB of models"
            )
        if all("ms" in row for row in here.values()) and len(here) == 2:
            mine, theirs = here["unlearn"]["ms"], here["padded"]["ms"]
            whole = ""
            if optimizer is not None:
                whole = f", {(theirs + optimizer) / (mine + optimizer):.2f} with {optimizer:.1f} ms of optimizer each"
            lines.append(f"  {theirs / mine:.2f} times as fast{whole}; target >= 4")
            lines.append(f"  loss differs by {here['unlearn']['loss_relative']:.1e} of its size")
    return lines


def _shape(row: Row) -> str:
    return " x ".join(str(row["shape"][letter]) for letter in "NHV") if "shape" in row else ""


def _units(row: Row | None) -> str:
    if row is None:
        return "-"
    return "REFUSED" if "refused" in row else "failed" if "failed" in row else f"{row['units']:.2f}"


def _number(value: Any) -> str:
    return "" if value is None else f"{float(value):.1e}"


def _line(name: str, *cells: str) -> str:
    if len(name) > 38:
        name = name.replace("unlearn_kernels", "uk")[:38]
    return f"  {name:38}" + "".join(f"{cell:>9}" for cell in cells)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("parts", nargs="*", default=PARTS)
    args = parser.parse_args()
    print(summary(args.out, args.parts), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
