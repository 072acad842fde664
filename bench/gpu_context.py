"""Long-context steps of 7B and 8B models against their memory plan: `python -m bench.gpu_context PART`.

    train-b   models of 2 and 4 layers at 128k and 512k tokens, one document to forget: every part of the plan beside
              what was allocated, and both extended to all layers, since time and memory are affine in the depth
    train-c   all layers: a document to forget and one to keep at 32k and at 128k, one NPO step with its optimizer,
              under the measures that the plan chooses for this device
    train-d   all layers at 32k, from the plain loop with full logits through one measure after another; then the same
              with 4 layers, where the plain loop can be timed too

What does not fit the device is a row that says so. A case begins only if the seconds that the plan predicts, scaled by
how the cases before came out, are left.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench import part as parts
from bench.models import model_flop, peak_tflops, random_ids, random_model, shapes, with_layers
from bench.part import Part
from bench.rows import first_line
from bench.steps import Clock, Documents, Optimizers, Ours, Plain, measured, settings
from bench.timing import release
from unlearn import plan as planning
from unlearn.config import TrainConfig
from unlearn.data import Sequence
from unlearn.engage import OFF, settings_of
from unlearn.measures import GIB, Load, Measures
from unlearn.memory import is_out_of_memory
from unlearn.plan import Budget, Plan, Wanted
from unlearn.shapes import Shape
from unlearn_kernels import Options

K = 1024
# At first a case is taken to last half again as long as the plan says, and 5 s for what is not the step.
FIRST_SCALE, OVERHEAD = 1.5, 5.0
HOST_SHARE = 0.8  # of the host's memory, for checkpoints
Fields = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """tokens of a document by part; layers of a cut model; tokens of a tile and of the step that warms up."""

    depth_contexts: tuple[int, ...] = (128 * K, 512 * K)
    full_contexts: tuple[int, ...] = (32 * K, 128 * K)
    ablation: int = 32 * K
    layers: tuple[int, int] = (2, 4)
    tile: int = 4096
    warmup: int = 1024


TINY_SIZES = Sizes((48, 96), (32, 64), 32, (1, 2), 16, 16)
# AdamW where it fits; 8-bit states, which the plan would take next, need a library that is not assumed here.
OPTIMIZERS = ("adamw", "adafactor")
# How far a gradient's norm may be from the first rung's that ran: bf16 logits make a per cent or two of difference.
NORM_BOUND = 0.1


def main() -> int:
    names = {"train-b": by_depth, "train-c": full, "train-d": ablation}
    name = next((argument for argument in sys.argv[1:] if argument in names), None)
    parser = parts.parser_of(__doc__, seconds=500)
    parser.add_argument("name", choices=list(names), metavar="PART", help=", ".join(names))
    if name is None:
        parser.parse_args()  # says what is missing
        return 2
    return parts.run(name, parser, lambda part: names[name](Bench(part)))


class Bench:
    """What the three parts share: sizes, the device's limits, and how long predictions are off."""

    def __init__(self, part: Part) -> None:
        self.part, self.device = part, part.device
        self.sizes = TINY_SIZES if part.tiny else Sizes()
        self.shapes = shapes(part.tiny)
        self.scale = FIRST_SCALE
        gpu = None
        if self.device.type == "cuda":
            gpu = float(torch.cuda.get_device_properties(self.device).total_memory)
        host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * HOST_SHARE
        self.budget = Budget(gpu, host, Options(backend=part.backend).workspace(self.device))
        self.itemsize = 2 if self.device.type == "cuda" else 4

    def measures(self, **on: Any) -> Measures:
        return Measures(itemsize=self.itemsize, tile_tokens=self.sizes.tile, **on)

    def documents(self, shape: Shape, num_tokens: int, *, retain: bool) -> Documents:
        ids = [random_ids(shape, num_tokens + 1, seed) for seed in range(2)]
        forget, keep = (Sequence(key, row, 1) for key, row in zip(("forget", "retain"), ids, strict=True))
        return Documents(forget, keep if retain else None)

    def config(self, on: Measures, **more: Any) -> TrainConfig:
        """The settings that switch on what was planned, and what no plan counts."""
        return settings(**settings_of(on), **more)

    def expected(self, plan: Plan) -> float:
        """Seconds of a case: one step, and one document's reference pass, a quarter of what it takes there."""
        documents = plan.load.packs * len(plan.load.lengths)
        return OVERHEAD + self.scale * plan.seconds * (1 + 0.25 / documents)

    def room_for(self, what: Fields, plan: Plan) -> bool:
        if self.part.budget.spent:
            self.part.leave_out(what)
            return False
        wanted, left = self.expected(plan), self.part.budget.left
        if wanted > left:
            self.part.leave_out(what, f"it would take about {wanted:.0f} s, {left:.0f} s were left")
            return False
        return True

    def release(self) -> None:
        """What is no longer referred to, cycles included, is the device's again."""
        gc.collect()
        release(self.device)

    def made(self, name: str, shape: Shape) -> nn.Module:
        with Clock(self.device) as clock:
            model = random_model(shape, self.device)
        self.part.rows.write({"case": "model", "model": name, "layers": shape.layers, "seconds": clock.seconds})
        return model

    def measure(
        self, case: str, what: Fields, way: Ours, optimizers: Optimizers, plan: Plan, norm: float | None = None
    ) -> Fields | None:
        """Measure and write one case; None where it has no times. norm: what the gradient's should be. Memory is
        released whatever happens."""
        row: Fields = {"case": case, **what, "documents": way.documents.lengths, "measures": measures_of(way.config)}
        row["planned"] = planned(plan)

        def another(seconds: float) -> bool:
            return not self.part.tiny and seconds < 30 and 2 * seconds + OVERHEAD < self.part.budget.left / 8

        try:
            with way:
                row |= measured(way, optimizers, warmup_tokens=self.sizes.warmup, another=another)
        except Exception as error:
            row["failed"] = first_line(error)
            if is_out_of_memory(error):
                row["out_of_memory"] = True
        # Outside the except blocks, whose exceptions would keep the failed call's tensors alive.
        if "failed" in row:
            way.model.zero_grad(set_to_none=True)
            optimizers.drop()  # its states may be half made
        self.release()
        if "failed" not in row:
            row |= self.rates(plan.shape, way.documents.lengths, row["seconds"])
            if norm is not None:
                row["grad_norm_relative"] = abs(row["grad_norm"] - norm) / norm
                if not row["grad_norm_relative"] <= NORM_BOUND:
                    row["refused"] = True
            self.scale = max(1.0, 1.1 * row["seconds"] / plan.seconds) if plan.seconds else FIRST_SCALE
        # a plain loop that runs out of memory is what the part is about; so is a case that the plan did not see fit
        excused = row.get("out_of_memory") and (isinstance(way, Plain) or not plan.fits)
        self.part.rows.write(row, failed=bool({"failed", "refused"} & set(row)) and not excused)
        print(f"{' '.join(map(str, what.values()))}: {outcome(row)}", flush=True)
        return None if {"failed", "refused"} & set(row) else row

    def rates(self, shape: Shape, lengths: list[int], seconds: float) -> Fields:
        """Of model FLOP: causal attention, nothing that is computed twice."""
        flop, peak = model_flop(shape, lengths), peak_tflops(self.device)
        found = {"tokens_per_second": sum(lengths) / seconds, "model_tflops": flop / seconds / 1e12}
        return found | {"peak_tflops": peak, "mfu": None if peak is None else flop / seconds / 1e12 / peak}


def measures_of(config: TrainConfig) -> Fields:
    names = ("gradient_checkpointing", "liger_kernels", "tile_tokens", "offload_checkpoints", "save_attention",
             "optimizer", "optimizer_in_backward")  # fmt: skip
    return {name: getattr(config, name) for name in names if getattr(config, name) not in (OFF.get(name), False)}


def planned(plan: Plan) -> Fields:
    """Bytes on the device by part, at most; by moment; and what a step takes in seconds."""
    parts_ = {name: plan.part(name) for name in planning.PARTS}
    moments = {name: plan.moment_total(name) for name in planning.MOMENTS}
    return {
        "measures": plan.on.names(),
        "host_layers": plan.on.host_layers,
        "parts_bytes": parts_,
        "moments_bytes": moments,
        "total_bytes": plan.total,
        "reserve_bytes": plan.reserve,
        "host_bytes": plan.host,
        "seconds": plan.seconds,
        "fits": plan.fits,
    }


def outcome(row: Fields) -> str:
    if {"failed", "refused"} & set(row):
        return row.get("failed") or f"REFUSED: loss {row['loss']}, gradient norm {row['grad_norm']}"
    return (
        f"{row['seconds']:.2f} s, {row['allocated_mib'] / 1024:.2f} GiB allocated,"
        f" {row['planned']['total_bytes'] / GIB:.2f} planned"
    )


def by_depth(bench: Bench) -> None:
    shallow, deep = bench.sizes.layers
    for context in bench.sizes.depth_contexts:
        for name, whole in bench.shapes.items():
            found = {}
            for layers in (shallow, deep):
                shape = with_layers(whole, layers)
                on = bench.measures(checkpointing=True, tiled=True, host_layers=layers)
                plan = planning.make(shape, Load((context,)), on, bench.budget)
                what = {"model": name, "layers": layers, "context": context}
                if bench.room_for(what, plan):
                    model = bench.made(name, shape)
                    documents = bench.documents(shape, context, retain=False)
                    way = Ours(model, documents, bench.config(on))
                    found[layers] = bench.measure("depth", what, way, Optimizers(model), plan)
                    del model, way  # all that holds its memory
                    bench.release()
            if found.get(shallow) and found.get(deep):
                extend(bench, name, whole, context, found[shallow], found[deep])


def extend(bench: Bench, name: str, whole: Shape, context: int, low: Fields, high: Fields) -> None:
    """The row of all layers from those of two depths: y(L) = y(low) + (L - low) slope."""
    steps = (whole.layers - low["layers"]) / (high["layers"] - low["layers"])
    keys = [key for key in low if key.endswith(("seconds", "_mib", "_bytes")) and low[key] is not None]
    keys = [key for key in keys if key not in ("warmup_seconds", "pinning_seconds")]
    row = {key: low[key] + steps * (high[key] - low[key]) for key in keys}
    on = bench.measures(checkpointing=True, tiled=True, host_layers=whole.layers)
    plan = planning.make(whole, Load((context,)), on, bench.budget)
    bench.part.rows.write(
        {"case": "extended", "model": name, "layers": whole.layers, "context": context, **row,
         "from_layers": [low["layers"], high["layers"]], "planned": planned(plan),
         **bench.rates(whole, [context], row["seconds"])}
    )  # fmt: skip


def full(bench: Bench) -> None:
    """The 8B model first; the 7B one in what time is left."""
    for name, shape in bench.shapes.items():
        model = optimizers = None
        for context in bench.sizes.full_contexts:
            what = {"model": name, "layers": shape.layers, "context": context}
            for plan in candidates(bench, shape, context):
                if not bench.room_for(what, plan):
                    break
                if model is None or optimizers is None:
                    model = bench.made(name, shape)
                    optimizers = Optimizers(model)
                documents = bench.documents(shape, context, retain=True)
                if bench.measure("full", what, Ours(model, documents, bench.config(plan.on)), optimizers, plan):
                    break
        del model, optimizers  # all that holds their memory
        bench.release()


def candidates(bench: Bench, shape: Shape, context: int) -> Iterator[Plan]:
    """What the plan chooses with the first optimizer that fits; should it not run, every layer's input on the host, and
    then the leaner optimizer too. Without a GPU's limit nothing is chosen."""
    load = Load((context,), packs=2)
    first = bench.measures(checkpointing=True, tiled=True, host_layers=shape.layers)
    if bench.budget.gpu is not None:
        wanted = [Wanted(optimizer=name, itemsize=bench.itemsize) for name in OPTIMIZERS]
        plans = [planning.choose(shape, load, bench.budget, one) for one in wanted]
        first = next((plan for plan in plans if plan.fits), plans[-1]).on
    lean = dataclasses.replace(first, checkpointing=True, tiled=True, host_layers=shape.layers)
    for on in dict.fromkeys((first, lean, dataclasses.replace(lean, optimizer=OPTIMIZERS[-1]))):
        yield planning.make(shape, load, on, bench.budget)


@dataclass(frozen=True)
class Rung:
    """One more measure than the rung before; liger is one that the plan does not count."""

    name: str
    way: type[Ours]
    on: Measures
    liger: bool = False


def rungs(bench: Bench, shape: Shape, optimizer: str) -> Iterator[Rung]:
    on = bench.measures(optimizer=optimizer)
    yield Rung("plain loop, full logits", Plain, on)
    yield Rung("+ this project's loss and packing", Ours, on)
    recomputed = dataclasses.replace(on, checkpointing=True)
    yield Rung("+ layers recomputed", Ours, recomputed)
    on_gpu = bench.device.type == "cuda"
    if on_gpu and importlib.util.find_spec("liger_kernel") is not None:
        yield Rung("+ liger-kernel's layers", Ours, recomputed, liger=True)
    tiled = dataclasses.replace(recomputed, tiled=True)
    yield Rung("+ layers tiled", Ours, tiled)
    offloaded = dataclasses.replace(tiled, host_layers=shape.layers)
    yield Rung("+ layers' inputs on the host", Ours, offloaded)
    yield Rung("+ attention's output kept", Ours, dataclasses.replace(offloaded, save_attention=True))
    away = dataclasses.replace(offloaded, optimizer="adamw-offload")
    if on_gpu and planning.make(shape, Load((bench.sizes.ablation,), packs=2), away, bench.budget).fits:
        yield Rung("+ AdamW's states on the host, attention's output not kept", Ours, away)
    lean = dataclasses.replace(offloaded, optimizer=OPTIMIZERS[-1])
    yield Rung("+ Adafactor, attention's output not kept", Ours, lean)
    yield Rung("+ stepped in the backward", Ours, dataclasses.replace(lean, in_backward=True))


def ablation(bench: Bench) -> None:
    """Whole models first, then as many layers as leave the plain loop some memory."""
    whole = bench.shapes["8b"]
    for shape in (whole, with_layers(whole, bench.sizes.layers[1] if not bench.part.tiny else 1)):
        context = bench.sizes.ablation
        load = Load((context,), packs=2)
        tiled = bench.measures(checkpointing=True, tiled=True)
        fits = bench.budget.gpu is None or planning.make(shape, load, tiled, bench.budget).fits
        optimizer = OPTIMIZERS[0] if fits else OPTIMIZERS[-1]
        model = optimizers = previous = norm = None
        for rung in rungs(bench, shape, optimizer):
            plan = planning.make(shape, load, rung.on, bench.budget)
            what = {"model": "8b", "layers": shape.layers, "context": context, "rung": rung.name}
            config = bench.config(rung.on, liger_kernels=rung.liger)
            if (rung.way, config) == previous or not bench.room_for(what, plan):
                continue
            previous = rung.way, config
            if model is None or optimizers is None:
                model = bench.made("8b", shape)
                optimizers = Optimizers(model)
            documents = bench.documents(shape, context, retain=True)
            row = bench.measure("rung", what, rung.way(model, documents, config), optimizers, plan, norm)
            norm = row["grad_norm"] if row and norm is None else norm
        del model, optimizers  # all that holds their memory
        bench.release()


if __name__ == "__main__":
    sys.exit(main())
