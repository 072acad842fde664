"""Pictures of committed rows; `python -m bench.readme` draws them with the tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.rows import RESULTS, read
from unlearn.files import replacing
from unlearn.plots import COLORS

KINDS = {"forward": "log-likelihoods", "full": "NPO, trained head", "frozen": "NPO, frozen head"}


def draw_cpu_peers(path: Path = RESULTS / "cpu_peers.png") -> None:
    """Units of each provider at the largest shape that all were measured at; nothing without rows."""
    rows = [row for row in read("cpu_peers") if "units" in row and not row["tiny"]]
    if not rows:
        return
    shape = max((row["shape"] for row in rows), key=lambda sizes: sizes["V"])
    rows = [row for row in rows if row["shape"] == shape]
    units = {(row["provider"], row["case"]): row["units"] for row in rows}
    names = sorted({name for name, _ in units}, key=lambda name: -units[name, "full"])
    figure = Figure(figsize=(12, 0.75 * len(names) + 1.8), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for index, (kind, label) in enumerate(KINDS.items()):
        there = [(place, units[name, kind]) for place, name in enumerate(names) if (name, kind) in units]
        places = [place + 0.27 * (1 - index) for place, _ in there]
        bars = axes.barh(places, [value for _, value in there], height=0.25, color=COLORS[index], label=label)
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=10)
    axes.set_yticks(range(len(names)), names, fontsize=12)
    axes.set_xscale("log")
    axes.set_xlim(right=1.6 * max(units.values()))
    axes.set_xlabel("time in units of one torch.mm of the same shape and dtype (log scale)", fontsize=12)
    axes.axvline(1, color="0.6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(KINDS), fontsize=12, frameon=False)
    figure.supxlabel(caption(rows[0]), fontsize=10, color="0.35")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def caption(row: dict[str, Any]) -> str:
    sizes = ", ".join(f"{letter} = {size}" for letter, size in row["shape"].items())
    return f"{sizes}, {row['dtype']}; {row['device']}, {row['threads']} threads, torch {row['torch']}"
