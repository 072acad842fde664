"""The tables of train-a to train-d, as cells: bench.readme makes Markdown of them, bench.gpu_summary lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Cells = list[list[str]]
GIB = 1 << 30


def attention_cells(rows: list[Row]) -> Cells:
    cells = [["heads", "tokens", "sequences", "core", "ms", "TFLOP/s", "peak MiB", "errors"]]
    for row in (row for row in rows if row["case"] == "attention"):
        name = row["provider"] + (f" ({row['kernel']})" if row.get("kernel") else "")
        cells.append([row["model"], thousands(row["context"]), str(row["sequences"]), name])
        if "forward_ms" not in row:
            cells[-1] += [state(row), "", ""]
        else:
            cells[-1].append(f"{row['forward_ms']:.1f} / {row['backward_ms']:.1f}")
            cells[-1].append(f"{row['forward_tflops']:.0f} / {row['backward_tflops']:.0f}")
            cells[-1].append("" if row.get("peak_mib") is None else f"{row['peak_mib']:.0f}")
        errors = [row[key] for key in ("output_relative", "gradient_relative") if key in row]
        cells[-1].append(" / ".join(f"{float(error):.0e}" for error in errors))
    return cells


def depth_cells(rows: list[Row]) -> Cells:
    """Measured and planned GiB side by side; the row of all layers is extended from two depths."""
    cells = [["model", "layers", "tokens", "s", "weights", "gradients", "states", "host", "head", "layer", "update",
              "allocated", "reserved"]]  # fmt: skip
    for row in (row for row in rows if row["case"] in ("depth", "extended")):
        layers = str(row["layers"]) + (" (extended)" if row["case"] == "extended" else "")
        cells.append([row["model"], layers, thousands(row["context"])])
        if not timed(row):
            cells[-1] += [state(row), *[""] * 9]
            continue
        plan = row["planned"]
        planned, moments = plan["parts_bytes"], plan["moments_bytes"]
        cells[-1] += [
            f"{row['seconds']:.1f} / {plan['seconds']:.1f}",
            against(row["weights_bytes"], planned["weights"]),
            against(row["gradient_bytes"], planned["gradients"]),
            against(row["optimizer_bytes"], planned["optimizer"]),
            against(row["host_bytes"], plan["host_bytes"]),
            against(row["forward_allocated_mib"] * 2**20, moments["head"]),
            against(row["backward_allocated_mib"] * 2**20, max(moments["top layer"], moments["bottom layer"])),
            against(row["update_allocated_mib"] * 2**20, moments["update"]),
            against(row["allocated_mib"] * 2**20, plan["total_bytes"]),
            reserved(row),
        ]
    return cells


def full_cells(rows: list[Row]) -> Cells:
    cells = [["model", "tokens", "s per step", "forward", "backward", "update", "tokens/s", "MFU",
              "allocated / planned [GiB]", "reserved", "host", "reference [s]", "pinning [s]", "measures"]]  # fmt: skip
    for row in (row for row in rows if row["case"] == "full"):
        cells.append([row["model"], " + ".join(map(thousands, row["documents"]))])
        if not timed(row):
            cells[-1] += [state(row), *[""] * 10, measures(row)]
            continue
        phases = (f"{row[f'{name}_seconds']:.1f}" for name in ("forward", "backward", "update"))
        cells[-1] += [
            f"{row['seconds']:.1f}",
            *phases,
            f"{row['tokens_per_second']:.0f}",
            "" if row["mfu"] is None else f"{row['mfu']:.1%}",
            against(row["allocated_mib"] * 2**20, row["planned"]["total_bytes"]),
            reserved(row),
            f"{row['host_bytes'] / GIB:.1f}",
            f"{row['reference_seconds']:.1f}",
            f"{row['pinning_seconds']:.1f}",
            measures(row),
        ]
    return cells


def ablation_cells(rows: list[Row]) -> Cells:
    cells = [["layers", "step", "s", "tokens/s", "MFU", "allocated [GiB]", "reserved", "host",
              "gradient norm differs by"]]  # fmt: skip
    for row in (row for row in rows if row["case"] == "rung"):
        cells.append([str(row["layers"]), row["rung"]])
        if not timed(row):
            cells[-1] += [state(row), *[""] * 6]
            continue
        difference = row.get("grad_norm_relative")
        cells[-1] += [
            f"{row['seconds']:.2f}",
            f"{row['tokens_per_second']:.0f}",
            "" if row["mfu"] is None else f"{row['mfu']:.1%}",
            f"{row['allocated_mib'] / 1024:.1f}",
            reserved(row),
            f"{row['host_bytes'] / GIB:.1f}",
            "" if difference is None else f"{difference:.1e}",
        ]
    return cells


@dataclass(frozen=True)
class Table:
    """labels: how many of the first columns say what a row is; note: what the numbers are."""

    cells: Callable[[list[Row]], Cells]
    labels: int
    note: str


TABLES = {
    "train-a": Table(
        attention_cells,
        4,
        "One layer's core, forward / backward; TFLOP/s of the causal half; errors of output / gradients.",
    ),
    "train-b": Table(
        depth_cells,
        3,
        "Seconds and GiB, measured / planned; head, layer, update: peaks of forward, backward, optimizer.",
    ),
    "train-c": Table(full_cells, 2, "MFU: causal attention, nothing counted twice, the optimizer's time included."),
    "train-d": Table(ablation_cells, 2, "A document to forget and one to keep; each line adds a measure to the last."),
}


def timed(row: Row) -> bool:
    return not {"failed", "refused"} & set(row)


def state(row: Row) -> str:
    if row.get("out_of_memory"):
        return "out of memory"
    return "refused" if "refused" in row else "failed"


def against(measured: float, planned: float) -> str:
    return f"{measured / GIB:.2f} / {planned / GIB:.2f}"


def reserved(row: Row) -> str:
    return "" if row.get("reserved_mib") is None else f"{row['reserved_mib'] / 1024:.1f}"


def measures(row: Row) -> str:
    """The settings that differ from those of a short run."""
    on = dict(row["measures"])
    named = {
        "gradient_checkpointing": "recomputed",
        "tile_tokens": "tiled",
        "offload_checkpoints": f"{on.get('offload_checkpoints')} layers' inputs on the host",
        "save_attention": "attention kept",
        "optimizer": on.get("optimizer"),
        "optimizer_in_backward": "stepped in the backward",
    }
    return ", ".join(str(text) for key, text in named.items() if key in on)


def thousands(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def summary_lines(name: str, rows: list[Row]) -> list[str]:
    """Columns as wide as their widest cell; a table wider than the summary's 100 characters goes on below."""
    table = TABLES[name]
    cells, labels = table.cells(rows), table.labels
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    blocks: list[list[int]] = []
    for index in range(labels, len(widths)):
        used = sum(widths[i] + 2 for i in [*range(labels), *(blocks[-1] if blocks else []), index])
        if blocks and used <= 98:
            blocks[-1].append(index)
        else:
            blocks.append([index])
    found = [table.note]
    for block in blocks:
        for row in cells:
            head = "".join(f"{row[i]:{widths[i] + 2}}" for i in range(labels))
            found.append("  " + head + "".join(f"{row[i]:>{widths[i]}}  " for i in block))
    return found
