"""What each schedule costs on a GPU, counted without one: FLOP, bytes of E, passes over the weight, memory.

    python -m bench.schedule_costs [--target sm_90] [--shape N H V] [--json | --write]

The numbers come from the launches that the host code makes (bench/launches.py): the grids, the tiles that each program
walks, the library's products, the bytes alive. --write keeps them in bench/results/schedules.jsonl, whence the table in
kernels/README.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

import unlearn_kernels as uk
from bench import rows as row_files
from bench.launches import FAMILIES, Launch, recording

FUSED = ("exp_sums_kernel", "token_stats_kernel", "kl_kernel")
COUNTED = ("units", "e_written", "e_read", "weight_passes", "peak_mib")


def product_flops(launch: Launch) -> int:
    """2 x rows x columns x width over the tiles that this launch's programs walk, padding included."""
    given = launch.arguments
    if launch.name not in FUSED:
        return 0  # no matrix product; or redo_*, whose loops end at once without rows out of range
    tiles = -(-given["vocab"] // given["BLOCK_V"])
    firsts = [split * given["tiles"] for split in range(given["splits"])]
    walked = sum(min(first + given["tiles"], tiles) - first for first in firsts)
    row_blocks, rest = divmod(launch.grid[0], given["splits"])
    assert rest == 0 and walked == tiles, f"{launch.name}: {walked} of {tiles} tiles, {rest} programs too many"
    widths = [given["width"], *([given["ref_width"]] if launch.name == "kl_kernel" else [])]
    steps = sum(-(-width // given["BLOCK_K"]) * given["BLOCK_K"] for width in widths)
    return 2 * row_blocks * given["BLOCK_T"] * tiles * given["BLOCK_V"] * steps


def weight_passes(launch: Launch) -> int:
    """How often the weight comes from memory: once for each group of row blocks that share it through the cache."""
    given = launch.arguments
    return -(-launch.grid[0] // (given["splits"] * given["GROUP_T"])) if launch.name in FUSED else 0


def e_bytes_written(launch: Launch) -> int:
    """E (KL's G) as stored: whole rows, columns within the vocabulary."""
    given = launch.arguments
    if launch.name == "kl_rows_kernel":
        return int(launch.grid[0] * given["vocab"] * given["g_ptr"].dtype.itemsize)
    if not given.get("STORE_E") or launch.name.startswith("redo"):
        return 0
    if launch.name == "exp_tile_kernel":
        return int(launch.grid[0] * given["cols"] * given["e_ptr"].dtype.itemsize)
    e = given["e"].base if isinstance(given["e"], TensorDescriptor) else given["e"]
    return int(given["num_rows"] * given["vocab"] * e.dtype.itemsize)


@dataclass(frozen=True)
class Schedule:
    """call(hidden, weight, targets, cu_seqlens, head): one of the public functions; backward if anything is trained."""

    call: Callable[..., Tensor]
    trained: tuple[str, ...] = ()  # of hidden, weight
    workspace_bytes: int | None = None


def _stats(hidden: Tensor, weight: Tensor, targets: Tensor, cu: Tensor, **head: Any) -> Tensor:
    return uk.token_stats(hidden, weight, targets, **head).logprobs


def _kl(hidden: Tensor, weight: Tensor, targets: Tensor, cu: Tensor, **head: Any) -> Tensor:
    return uk.linear_kl(hidden, weight, hidden.detach(), weight.detach(), **head)


def _npo(hidden: Tensor, weight: Tensor, targets: Tensor, cu: Tensor, **head: Any) -> Tensor:
    return uk.npo_loss(hidden, weight, targets, cu, torch.empty(cu.shape[0] - 1, dtype=torch.float64), beta=0.1, **head)


def _any_loss(hidden: Tensor, weight: Tensor, targets: Tensor, cu: Tensor, **head: Any) -> Tensor:
    return uk.sequence_loss(hidden, weight, targets, cu, lambda logprob, lengths, index: logprob / lengths, **head).loss


_BOTH, _LARGE = ("hidden", "weight"), 16 << 30
SCHEDULES = {
    "no gradient": Schedule(uk.sequence_logprobs),
    "kept": Schedule(uk.sequence_logprobs, _BOTH, _LARGE),
    "kept, hidden only": Schedule(uk.sequence_logprobs, ("hidden",), _LARGE),
    "kept, weight only": Schedule(uk.sequence_logprobs, ("weight",), _LARGE),
    "sequence_loss, kept": Schedule(_any_loss, _BOTH, _LARGE),
    "sequence_loss, chunks": Schedule(_any_loss, _BOTH),
    "npo_loss, chunks": Schedule(_npo, _BOTH),
    "npo_loss, chunks, hidden only": Schedule(_npo, ("hidden",)),
    "npo_loss, chunks, weight only": Schedule(_npo, ("weight",)),
    "unscaled": Schedule(uk.sequence_logprobs, ("hidden",)),
    "recompute": Schedule(uk.sequence_logprobs, _BOTH),
    "recompute, weight only": Schedule(uk.sequence_logprobs, ("weight",)),
    "token_stats": Schedule(_stats),
    "linear_kl": Schedule(_kl),
    "linear_kl, kept": Schedule(_kl, _BOTH, _LARGE),
    "linear_kl, hidden only": Schedule(_kl, ("hidden",)),
    "linear_kl, recompute": Schedule(_kl, _BOTH),
}


def cost(schedule: Schedule, target: str, rows: int, width: int, vocab: int) -> dict[str, Any]:
    """FLOP in units of 2 rows width vocab, bytes of E in units of 2 rows vocab, passes of fused kernels over the
    weight, and the most bytes allocated at once beyond the inputs (gradients and whatever waits for the backward
    included)."""
    boundaries = list(range(0, rows + 1, 512))
    with recording(target, boundaries) as (record, watch):
        hidden = torch.empty(rows, width, dtype=torch.bfloat16, requires_grad="hidden" in schedule.trained)
        weight = torch.empty(vocab, width, dtype=torch.bfloat16, requires_grad="weight" in schedule.trained)
        targets, cu = torch.empty(rows, dtype=torch.int64), torch.empty(len(boundaries), dtype=torch.int64)
        for tensor in (hidden, weight, targets, cu):
            watch.ignore(tensor)
        out = schedule.call(hidden, weight, targets, cu, options=uk.Options(schedule.workspace_bytes, backend="triton"))
        if schedule.trained:
            out.sum().backward()
    flops = sum(map(product_flops, record.launches)) + sum(product.flops for product in record.products)
    return {
        "units": flops / (2 * rows * width * vocab),
        "e_written": sum(map(e_bytes_written, record.launches)) / (2 * rows * vocab),
        "e_read": sum(product.e_bytes for product in record.products) / (2 * rows * vocab),
        "weight_passes": sum(map(weight_passes, record.launches)),
        "launches": len(record.launches),
        "peak_mib": watch.peak_bytes / (1 << 20),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", default="sm_90", choices=list(FAMILIES))
    parser.add_argument("--shape", nargs=3, type=int, default=(16384, 4096, 128256), metavar=("N", "H", "V"))
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    parser.add_argument("--write", action="store_true", help="replace bench/results/schedules.jsonl")
    args = parser.parse_args()
    shape = dict(zip("NHV", args.shape, strict=True))
    rows = [
        {"case": name, "shape": shape, "target": args.target, **cost(schedule, args.target, *args.shape)}
        for name, schedule in SCHEDULES.items()
    ]
    if args.write:
        shared = row_files.environment() | {"triton": row_files.version_of("triton")}
        row_files.write("schedules", [row | shared for row in rows])
    for row in rows:
        if args.json:
            print(json.dumps(row))
        else:
            print(f"{row['case']:32}" + "".join(f" {key} {row[key]:8.3f}" for key in COUNTED))


if __name__ == "__main__":
    main()
