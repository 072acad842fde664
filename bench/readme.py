"""Write the README's tables and pictures from the committed rows: `python -m bench.readme`; `--check` only compares
tables.

A table stands between `<!-- rows:NAME -->` and `<!-- end -->`; NAME picks the function below that makes it.
"""

from __future__ import annotations

import argparse
import functools
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import charts, context_tables
from bench.rows import read
from unlearn.report import format_number

ROOT = Path(__file__).parent.parent
FILES = (ROOT / "README.md", ROOT / "kernels" / "README.md")
DEMO_COLUMNS = {
    "forget_probability": "forget prob.",
    "retain_probability": "retain prob.",
    "truth_ratio": "truth ratio",
    "forget_quality": "forget quality (p)",
    "forget_rouge_l": "forget ROUGE-L",
    "model_utility": "utility",
    "seconds": "time [s]",
    "peak_memory_mib": "memory [MiB]",
}


def demo_table() -> str:
    """Seed 0's values; forget quality and utility also with their range over all seeds."""
    return _results_table("demo", DEMO_COLUMNS, spread=("forget_quality", "model_utility"))


def tofu_table() -> str:
    columns = dict(DEMO_COLUMNS)
    columns["retain_utility"] = "retain utility"
    return _results_table("tofu", columns, spread=())


def _results_table(case: str, columns: dict[str, str], spread: tuple[str, ...]) -> str:
    rows = read(case)
    if not rows:
        return f"No rows yet: `python -m bench.demo` makes `bench/results/{case}.jsonl`."
    seeds = sorted({row["seed"] for row in rows})
    head = ["model"]
    for key, title in columns.items():
        head.append(title)
        if key in spread and len(seeds) > 1:
            head.append(f"{len(seeds)} seeds")
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for first in (row for row in rows if row["seed"] == seeds[0]):
        cells = [first["model"]]
        for key in columns:
            cells.append(format_number(first.get(key)))
            if key in spread and len(seeds) > 1:
                values = [row[key] for row in rows if row["model"] == first["model"]]
                cells.append(f"{format_number(min(values))} to {format_number(max(values))}")
        lines.append(cells)
    wall = statistics.median({row["seed"]: row["wall_s"] for row in rows}.values())
    return _markdown(lines) + _source(case, rows) + f" A run took {wall / 60:.1f} minutes."


def demo_backends_table() -> str:
    """Seconds of each model of the demo, and of the whole, by backend."""
    rows = read("demo_backends")
    if not rows:
        return "No rows yet: `python -m bench.demo --backends` makes `bench/results/demo_backends.jsonl`."
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = [["backend", *models, "whole demo [s]"], ["---"] + ["---:"] * (len(models) + 1)]
    for backend in dict.fromkeys(row["backend"] for row in rows):
        mine = {row["model"]: row for row in rows if row["backend"] == backend}
        cells = [f"{mine[model]['seconds']:.1f}" for model in models]
        lines.append([backend, *cells, f"{mine[models[0]]['wall_s']:.0f}"])
    return _markdown(lines) + _source("demo_backends", rows)


def cpu_table() -> str:
    """Units, errors and memory on a CPU of this project and of plain torch, a line per shape, dtype and provider."""
    return _cpu_table("cpu_ours")


def cpu_peers_table() -> str:
    return _cpu_table("cpu_peers")


def _cpu_table(name: str) -> str:
    rows = [row for row in read(name) if "shape" in row and not row["tiny"]]
    if not rows:
        return f"No rows yet: `python -m bench.cpu {name.removeprefix('cpu_')}` makes `bench/results/{name}.jsonl`."
    lines = [["N x H x V", "dtype", "provider", "forward", "NPO full", "NPO frozen head", "log-prob error", "dH error",
              "dW error", "peak MiB, full"], ["---", "---", "---", *["---:"] * 7]]  # fmt: skip
    found = {(str(row["shape"]), row["dtype"], row["provider"], row["case"]): row for row in rows}
    for key in dict.fromkeys(key[:3] for key in found):
        same = {kind: found[*key, kind] for kind in ("forward", "full", "frozen") if (*key, kind) in found}
        first, full = next(iter(same.values())), same.get("full", {})
        errors = [
            same.get("forward", {}).get("logprob_rms"),
            full.get("dhidden_relative"),
            full.get("dweight_relative"),
        ]
        peak = full.get("peak_mib")
        lines.append(
            [
                " x ".join(str(first["shape"][letter]) for letter in "NHV"),
                first["dtype"],
                first["provider"],
                *(_units(same.get(kind)) for kind in ("forward", "full", "frozen")),
                *("" if error is None else f"{error:.1e}" for error in errors),
                "" if peak is None else f"{peak:.0f}",
            ]
        )
    return _markdown(lines) + _source(name, rows)


def cpu_memory_table() -> str:
    """How far one call raises a process's resident memory."""
    rows = [row for row in read("cpu_memory") if "peak_rss_mib" in row and not row["tiny"]]
    if not rows:
        return "No rows yet: `python -m bench.cpu memory` makes `bench/results/cpu_memory.jsonl`."
    lines = [["call", "resident memory rises by", "of it gradients", "workspace", "inputs", "units"],
             ["---", *["---:"] * 5]]  # fmt: skip
    for row in rows:
        sizes = [f"{row[key]:.0f} MiB" for key in ("peak_rss_mib", "gradients_mib", "workspace_mib", "inputs_mib")]
        lines.append([row["case"], *sizes, f"{row['units']:.2f}"])
    shape = ", ".join(f"{letter} = {size}" for letter, size in rows[0]["shape"].items())
    return _markdown(lines) + _source("cpu_memory", rows) + f" {shape}, bf16."


def schedules_table() -> str:
    """What the Triton backend's launches add up to, a line per schedule."""
    rows = read("schedules")
    if not rows:
        return "No rows yet: `python -m bench.schedule_costs --write` makes `bench/results/schedules.jsonl`."
    lines = [["call", "units", "E written [N V e]", "E read [N V e]", "passes over W", "peak memory"],
             ["---", *["---:"] * 5]]  # fmt: skip
    for row in rows:
        counted = [f"{row[key]:.2f}" for key in ("units", "e_written", "e_read")]
        lines.append([row["case"], *counted, str(row["weight_passes"]), f"{row['peak_mib']:.0f} MiB"])
    first = rows[0]
    shape = ", ".join(f"{letter} = {size}" for letter, size in first["shape"].items())
    dirty = " with uncommitted changes" if first["dirty"] else ""
    return _markdown(lines) + (
        f"\n\nRows: `bench/results/schedules.jsonl`, counted by `python -m bench.schedule_costs --write` at "
        f"{first['commit']}{dirty} for {first['target']}, bf16, {shape}."
    )


def evaluation_table() -> str:
    """Rows per second of an evaluation's likelihood metrics, a line per dtype and way of doing it."""
    rows = [row for row in read("evaluation") if row["case"] == "evaluation" and not row["tiny"]]
    if not rows:
        return "No rows yet: `python -m bench.evaluation` makes `bench/results/evaluation.jsonl`."
    lines = [["dtype", "likelihood metrics from", "rows/s", "units", "sequences fed", "peak MiB", "NLL differs by"],
             ["---", "---", *["---:"] * 5]]  # fmt: skip
    for row in rows:
        speed = ["refused" if "refused" in row else "failed", ""]
        if "ms" in row:
            speed = [f"{row['rows_per_second']:.1f}", f"{row['units']:.1f}"]
        peak = "" if row.get("peak_mib") is None else f"{row['peak_mib']:.0f}"
        differs = f"{row['nll_difference']:.1e}" if "nll_difference" in row else ""
        lines.append([row["dtype"], row["provider"], *speed, str(row["sequences"]), peak, differs])
    first = rows[0]
    shape = ", ".join(f"{letter} = {size}" for letter, size in first["shape"].items())
    return (
        _markdown(lines) + _source("evaluation", rows) + f" {first['rows']} forget and as many holdout rows; {shape}."
    )


def gpu_kernels_table() -> str:
    return _gpu_table("gpu_kernels", ("forward", "full", "frozen"))


def gpu_peers_table() -> str:
    return _gpu_table("gpu_peers", ("forward", "full", "frozen", "mean_ce"))


def _gpu_table(name: str, kinds: tuple[str, ...]) -> str:
    """Units of the bf16 product, a line per shape and provider; what was refused or failed says so."""
    rows = [row for row in read(name) if "shape" in row and not row["tiny"]]
    if not rows:
        return f"Not measured yet: `bench/gpu.sh` makes `bench/results/{name}.jsonl` on a machine with a GPU."
    titles = {"forward": "forward", "full": "NPO full", "frozen": "NPO frozen head", "mean_ce": "mean CE"}
    head = ["N x H x V", "unit [ms]", "provider", *(titles[kind] for kind in kinds), "log-prob error", "peak MiB, full"]
    lines = [head, ["---", "---:", "---", *["---:"] * (len(head) - 3)]]
    found = {(str(row["shape"]), row["provider"], row["case"]): row for row in rows if row["case"] in kinds}
    for key, provider in dict.fromkeys((key, provider) for key, provider, _ in found):
        same = {kind: found[key, provider, kind] for kind in kinds if (key, provider, kind) in found}
        first = next(iter(same.values()))
        unit = next(row["unit_ms"] for row in rows if row["case"] == "unit" and row["shape"] == first["shape"])
        units = [_units(same.get(kind)) for kind in kinds]
        error, peak = same.get("forward", {}).get("logprob_rms"), same.get("full", {}).get("peak_mib")
        lines.append(
            [
                " x ".join(str(first["shape"][letter]) for letter in "NHV"),
                f"{unit:.2f}",
                provider,
                *units,
                "" if error is None else f"{error:.1e}",
                "" if peak is None else f"{peak:.0f}",
            ]
        )
    return _markdown(lines) + _gpu_source(name, rows[-1])


def gpu_context_table(part: str) -> str:
    """What bench.context_tables makes of the rows of one of the parts about long contexts."""
    name, table = f"gpu_{part}", context_tables.TABLES[part]
    head, *cells = table.cells([row for row in read(name) if not row["tiny"]])
    if not cells:
        return f"Not measured yet: `bench/gpu.sh {part}` makes `bench/results/{name}.jsonl` on a machine with a GPU."
    lines = [head, ["---"] * table.labels + ["---:"] * (len(head) - table.labels), *cells]
    return _markdown(lines) + "\n\n" + table.note + _gpu_source(name, read(name)[-1]).replace("\n\n", " ")


def _units(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    return "refused" if "refused" in row else "failed" if "failed" in row else f"{row['units']:.2f}"


def _gpu_source(name: str, row: dict[str, Any]) -> str:
    return (
        f"\n\nRows: `bench/results/{name}.jsonl`, from `bench/gpu.sh` at {row['commit'] or row['source']}"
        f"{' with uncommitted changes' if row['dirty'] else ''}; {row['device']}, torch {row['torch']}, "
        f"triton {row['triton']}, transformers {row['transformers']}."
    )


def _markdown(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _source(case: str, rows: list[dict[str, Any]]) -> str:
    first = rows[0]
    return (
        f"\n\nRows: `bench/results/{case}.jsonl`, from `{first['command']}` at {first['commit']}"
        f"{' with uncommitted changes' if first['dirty'] else ''}; "
        f"{first['device']}, {first['threads']} threads, torch {first['torch']}."
    )


def gpu_train_table() -> str:
    """A whole step, this project's way and with padded rows, full logits and a resident reference model."""
    rows = [row for row in read("gpu_train-e") if row["case"] == "train_step" and not row["tiny"]]
    if not rows:
        return "Not measured yet: `bench/gpu.sh` makes `bench/results/gpu_train-e.jsonl` on a machine with a GPU."
    lines = [["labelled", "step", "ms", "tokens/s", "peak MiB", "MiB of models", "loss differs by"],
             ["---:", "---", *["---:"] * 5]]  # fmt: skip
    for row in rows:
        cells = ["refused" if "refused" in row else "failed", "", ""]
        if "ms" in row:
            cells = [f"{row['ms']:.1f}", f"{row['tokens_per_second']:.0f}", f"{row['peak_mib']:.0f}"]
        agreement = f"{row['loss_relative']:.1e}" if "loss_relative" in row else ""
        lines.append([f"{row['labelled']:.0%}", row["provider"], *cells, f"{row['resident_mib']:.0f}", agreement])
    return _markdown(lines) + _gpu_source("gpu_train-e", rows[-1])


def plan_table() -> str:
    """The longest context by model, GPU and what is trained; each line says whether it was planned or measured."""
    rows = read("plan")
    if not rows:
        return "No rows yet: `python -m bench.plan_table` makes `bench/results/plan.jsonl`."
    lines = [["model", "GPU", "trained", "longest context", "s per step", "allocated + reserve",
              "host", "measures", ""], ["---", "---:", "---", *["---:"] * 4, "---", "---"]]  # fmt: skip
    for row in rows:
        cells = ["none", "", "", "", ""]
        if row["context"]:
            memory = f"{row['allocated_gib']:.1f} + {row['reserve_gib']:.1f} GiB"
            host = f"{row['host_used_gib']:.0f} GiB" if row["host_used_gib"] else ""
            seconds = f"{row['seconds']:.0f}"
            cells = [_thousands(row["context"]), seconds, memory, host, ", ".join(row["measures"])]
        lines.append([row["model"], f"{row['gpu_gb']} GB", row["way"], *cells, row["kind"]])
    first = rows[0]
    dirty = " with uncommitted changes" if first["dirty"] else ""
    return _markdown(lines) + (
        f"\n\nRows: `bench/results/plan.jsonl`, computed by `python -m bench.plan_table` at {first['commit']}{dirty}; "
        f"nothing here ran. A step is one document to forget and one to keep, each of that length, a forward each; "
        f"a host of {first['host_gib']} GiB; LoRA of rank 16. `unlearn plan --help` states the rates."
    )


def _thousands(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens else "none"


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo_table,
    "demo-backends": demo_backends_table,
    "tofu": tofu_table,
    "cpu": cpu_table,
    "cpu-peers": cpu_peers_table,
    "cpu-memory": cpu_memory_table,
    "evaluation": evaluation_table,
    "schedules": schedules_table,
    "gpu-kernels": gpu_kernels_table,
    "gpu-attention": functools.partial(gpu_context_table, "train-a"),
    "gpu-depth": functools.partial(gpu_context_table, "train-b"),
    "gpu-context": functools.partial(gpu_context_table, "train-c"),
    "gpu-ablation": functools.partial(gpu_context_table, "train-d"),
    "gpu-peers": gpu_peers_table,
    "gpu-train": gpu_train_table,
    "plan": plan_table,
}


def render(text: str) -> str:
    """The text with each table made anew. Raises ValueError for a marker without a table."""

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"no table {name!r}; {', '.join(TABLES)} are known")
        return f"<!-- rows:{name} -->\n{TABLES[name]()}\n<!-- end -->"

    return re.sub(r"<!-- rows:(?P<name>[\w-]+) -->.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if a table does not match the rows")
    args: Any = parser.parse_args(argv)
    stale = []
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        made = render(text)
        if made != text:
            stale.append(path.name)
            if not args.check:
                path.write_text(made, encoding="utf-8")
    if not args.check:
        charts.draw_cpu_peers()
    if args.check and stale:
        print(f"{', '.join(stale)}: tables do not match bench/results; run python -m bench.readme", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
