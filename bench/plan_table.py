"""The longest context that a GPU is planned to train: `python -m bench.plan_table` writes bench/results/plan.jsonl.

A row for each model, size of GPU and way of training (everything, LoRA, 4-bit LoRA). Every row is computed by
unlearn.plan and says "planned"; a measured one would say "measured" and stand in the same table.
"""

from __future__ import annotations

import argparse
from typing import Any

from bench.rows import environment, write
from unlearn.measures import GIB, Load
from unlearn.plan import Budget, Plan, Wanted, choose, longest_context
from unlearn.rates import rates_for
from unlearn.shapes import SHAPES

MODELS = ("llama-2-7b", "llama-3.1-8b")
GPUS_GB = (24, 48, 80, 141)
HOST_GIB = 128
RANK = 16
WAYS = {
    "full": Wanted(),
    "LoRA": Wanted(adapter="lora", rank=RANK),
    "QLoRA": Wanted(adapter="qlora", rank=RANK),
}


def step(context: int) -> Load:
    """One document to forget and one to keep, a forward each."""
    return Load((context,), packs=2)


def row(model: str, gpu_gb: int, way: str) -> dict[str, Any]:
    """At the longest context that fits with every measure."""
    shape, wanted = SHAPES[model], WAYS[way]
    gpu = gpu_gb * 1e9
    budget = Budget(gpu, HOST_GIB * GIB, rates=rates_for(gpu))
    longest = longest_context(shape, step, budget, wanted)
    plan = choose(shape, step(longest), budget, wanted) if longest else None
    kind = {"case": "plan", "kind": "planned", "model": model, "gpu_gb": gpu_gb, "way": way, "host_gib": HOST_GIB}
    return kind | {"context": longest} | (_details(plan) if plan else {})


def _details(plan: Plan) -> dict[str, Any]:
    return {
        "measures": list(plan.on.names()),
        "host_layers": plan.on.host_layers,
        "allocated_gib": round(plan.total / GIB, 2),
        "reserve_gib": round(plan.reserve / GIB, 2),
        "host_used_gib": round(plan.host / GIB, 2),
        "seconds": round(plan.seconds, 1),
        "rates": plan.budget.rates.name,
    }


def rows() -> list[dict[str, Any]]:
    return [row(model, gpu_gb, way) for model in MODELS for gpu_gb in GPUS_GB for way in WAYS]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    shared = environment()
    made = rows()
    path = write("plan", [line | shared for line in made])
    for line in made:
        print(f"{line['model']:13} {line['gpu_gb']:4} GB {line['way']:6} {line['context']:8}")
    print(f"{len(made)} rows in {path.name}")


if __name__ == "__main__":
    main()
