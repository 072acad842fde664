"""What a run will do, from its configuration, tokenizer and rows: no weights are read and nothing is written.

Counts are those of the run itself: the same steps, packs and reference sequences, made by the same functions. Bytes are
static ones (weights, gradients, optimizer states, files); activations and workspace depend on the device and are in the
memory plan alone, which stands beside them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from unlearn import adapters, reference
from unlearn.batches import Packing, Step, TrainingSet, all_steps, num_steps_per_epoch, packing_of
from unlearn.config import TrainConfig
from unlearn.data import Role, Sequence
from unlearn.engage import settings_of
from unlearn.footprint import NF4_BYTES
from unlearn.forecast import Forecast, budget_of, forecast
from unlearn.longcontext import long_context
from unlearn.measures import HOST_STATE_BYTES, STATE_BYTES, Measures
from unlearn.methods import check_config
from unlearn.model import check_ids, resolve_device
from unlearn.optimizers import check_device
from unlearn.runfiles import METRICS_FILE
from unlearn.scoring import unique
from unlearn.train import check_packs, learning_rates, reference_sequences


def dry_run(config: TrainConfig, skeleton: nn.Module, tokenizer: Any, data: TrainingSet) -> dict[str, Any]:
    """The plan of a run as numbers. skeleton: the model on the meta device, with its adapters where it gets some.

    Raises ValueError where the run would before its first step.
    """
    check_config(config)
    plan = all_steps(data, config)
    rates = learning_rates(config, data, len(plan))
    packing = packing_of(plan, config.max_tokens)
    check_packs(packing, config)
    expected = _forecast(config, skeleton, packing)
    config = expected.config
    check_device(config.optimizer, expected.device)
    with long_context(skeleton, config, say=lambda text: None):  # what its layers cannot do
        pass
    check_ids(skeleton, unique(sequence for step in plan for sequence in step.sequences()))
    parameters = list(skeleton.parameters())
    trained = [p for p in parameters if p.requires_grad]
    weight_bytes, trained_bytes = (sum(p.numel() * p.element_size() for p in ps) for ps in (parameters, trained))
    optimizer_bytes = round(sum(p.numel() for p in trained) * STATE_BYTES[config.optimizer])
    host_bytes = sum(p.numel() for p in trained) * HOST_STATE_BYTES.get(config.optimizer, 0)
    gradient_bytes = trained_bytes
    if config.optimizer_in_backward:  # one weight's at a time
        gradient_bytes = max(p.numel() * p.element_size() for p in trained)
    layer, _ = adapters.parts(skeleton.get_output_embeddings())
    head = layer.weight
    if config.lora_4bit:
        weight_bytes -= _spared_by_4bit(skeleton, layer)
    own_head = config.retain_term == "kl" and reference.needs_own_head(head, getattr(layer, "bias", None))
    copied_head = head.numel() * head.element_size() if own_head else 0
    peak = max(range(len(rates)), key=rates.__getitem__)
    return {
        "model": {
            "name": config.model,
            "class": type(skeleton).__name__,
            "dtype": config.dtype,
            "in_4bit": config.lora_4bit,
            "parameters": sum(p.numel() for p in parameters),
            "trained_parameters": sum(p.numel() for p in trained),
        },
        "method": config.method,
        "retain_term": config.retain_term,
        "sets": _sets(data, plan),
        "steps": _steps(config, data, packing),
        "learning_rate": {"first": rates[0], "peak": rates[peak], "peak_step": peak + 1, "last": rates[-1]},
        "reference": _reference(config, tokenizer, plan, head.shape[1] * head.element_size()),
        "bytes": {
            "weights": weight_bytes,
            "gradients": gradient_bytes,
            "optimizer": optimizer_bytes,
            "optimizer_host": host_bytes,
            "reference_head": copied_head,
            "static": weight_bytes + gradient_bytes + optimizer_bytes + copied_head,
            "checkpoint": trained_bytes + optimizer_bytes + host_bytes,
            "final_model": trained_bytes if config.lora is not None and not config.lora_merge else weight_bytes,
        },
        "measures": _measures(expected),
        "checkpoints": (len(plan) - 1) // config.save_every if config.save_every else 0,
        "output": {"folder": config.output, "holds_a_run": (Path(config.output) / METRICS_FILE).exists()},
    }


def _forecast(config: TrainConfig, skeleton: nn.Module, packing: Packing) -> Forecast:
    """On the device that the run would have; where that is not here, without its limits. A named memory is of a GPU,
    here or not, unless the run is to be on a CPU."""
    here = torch.device("cpu")
    if config.gpu_memory is None:
        with contextlib.suppress(ValueError):
            here = resolve_device(config.device)
    elsewhere = config.device.startswith("cuda") or (config.device == "auto" and config.gpu_memory is not None)
    there = torch.device("cuda") if here.type == "cpu" and elsewhere else here
    return forecast(config, skeleton, packing, budget=budget_of(config, here), device=there)


def _measures(expected: Forecast) -> dict[str, Any]:
    """What the run engages, and the plan's peak under it; bytes."""
    plan, budget = expected.plan, expected.budget
    names = settings_of(Measures())
    return {
        "settings": {name: getattr(expected.config, name) for name in names},
        "text": expected.measures(),
        "planned": None if plan is None else plan.total,
        "reserve": None if plan is None else plan.reserve,
        "host": None if plan is None else plan.host,
        "gpu_memory": budget.gpu,
        "host_memory": budget.host,
        "fits": None if plan is None or budget.gpu is None else plan.fits,
    }


def _spared_by_4bit(model: nn.Module, head: nn.Module) -> int:
    """Bytes that the matrices do without in 4 bits: those of every linear layer but the head and the adapters."""
    matrices = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and ".lora_" not in name
    ]
    return round(sum(matrix.numel() * (matrix.element_size() - NF4_BYTES) for matrix in matrices))


def _counts(sequences: Iterable[Sequence]) -> dict[str, int | float]:
    fed, labels = [], []
    for sequence in sequences:
        fed.append(sequence.num_tokens)
        labels.append(sequence.num_answer_tokens)
    return {
        "rows": len(fed),
        "tokens": sum(fed),
        "labels": sum(labels),
        "label_share": sum(labels) / sum(fed),
        "longest": max(fed),
    }


def _sets(data: TrainingSet, plan: list[Step]) -> dict[str, Any]:
    """Per set what it holds; of refusals, which are drawn, what the first epoch draws."""
    members = [member for group in data.forget for member in group]
    drawn = [s for step in plan if step.epoch == 0 for s in step.refusals]
    if data.refusals and not drawn:  # as the chosen half of a pair
        drawn = [s for step in plan if step.epoch == 0 for g in step.groups for s, role in g if role == Role.CHOSEN]
    # by identity: a row is repeated for each of its alternates, and two rows may say the same
    forget = {id(s): s for s, role in members if role != Role.CHOSEN}
    found = {
        "forget": list(forget.values()),
        "alternates": [s for s, role in members if role == Role.CHOSEN],
        "refusals": drawn,
        "retain": list(data.retain),
    }
    return {name: _counts(sequences) for name, sequences in found.items() if sequences}


def _steps(config: TrainConfig, data: TrainingSet, packing: Packing) -> dict[str, Any]:
    packs = packing.tokens
    return {
        "epochs": config.epochs,
        "per_epoch": num_steps_per_epoch(data, config),
        "total": len(packing.counts),
        "micro_batches": len(packs),
        "tokens": sum(packs),
        "max_tokens": config.max_tokens,
        "fill": sum(min(size, config.max_tokens) for size in packs) / (len(packs) * config.max_tokens),
        "largest_pack": max(packs),
        "packs_over_budget": sum(size > config.max_tokens for size in packs),
    }


def _reference(config: TrainConfig, tokenizer: Any, plan: list[Step], row_bytes: int) -> dict[str, Any]:
    """What has to be computed of the unchanged model first, and what of it is stored already."""
    scored, kept = reference_sequences(config, plan)
    found: dict[str, Any] = {}
    for name, file, sequences in (
        ("logprobs", reference.LOGPROB_FILE, scored), ("states", reference.HIDDEN_FILE, kept)
    ):  # fmt: skip
        if sequences:
            labels = sum(s.num_answer_tokens for s in sequences)
            found[name] = {
                "sequences": len(sequences),
                "tokens": sum(s.num_tokens for s in sequences),
                "file": str(config.reference_dir / file),
                "bytes": labels * row_bytes if name == "states" else 8 * len(sequences),
                "stored": reference.look(config.reference_dir / file, tokenizer, config.dtype, sequences),
            }
    return found


# -------------------------------------------------------------------------------------------------------------- words


def lines(found: dict[str, Any]) -> list[str]:
    """The plan for a person."""
    model, steps, size = found["model"], found["steps"], found["bytes"]
    term = "" if found["retain_term"] == "none" else f", retain term {found['retain_term']}"
    rows = [
        ("method", found["method"] + term),
        (
            "model",
            f"{model['name']}: {model['class']}, {model['parameters']:,} parameters in {model['dtype']}"
            + (", its layers' matrices in 4 bits" if model["in_4bit"] else "")
            + f", {model['trained_parameters']:,} trained",
        ),
    ]
    for name, one in found["sets"].items():
        rows.append(
            (
                name,
                f"{one['rows']:,} rows, {one['tokens']:,} tokens, {one['labels']:,} of them labels "
                f"({one['label_share']:.0%}); the longest has {one['longest']:,}",
            )
        )
    rows += [
        (
            "steps",
            f"{steps['total']:,} in {steps['epochs']} epochs of {steps['per_epoch']:,}, {steps['micro_batches']:,} "
            f"micro-batches ({steps['micro_batches'] / steps['epochs']:.4g} an epoch), {steps['tokens']:,} tokens",
        ),
        (
            "packs",
            f"{steps['fill']:.0%} of {steps['max_tokens']:,} tokens full, the largest has {steps['largest_pack']:,}"
            + (f"; {steps['packs_over_budget']:,} hold a row beyond the budget" if steps["packs_over_budget"] else ""),
        ),
        ("learning rate", _rate_line(found["learning_rate"], steps["total"])),
    ]
    for name, one in found["reference"].items():
        what = "log-likelihoods" if name == "logprobs" else f"states, {_bytes(one['bytes'])}"
        rows.append(
            (
                "reference",
                f"{what} of {one['sequences']:,} sequences, {one['tokens']:,} tokens: {_stored_line(one['stored'])}",
            )
        )
    if not found["reference"]:
        rows.append(("reference", "none needed"))
    kept = found["checkpoints"]
    rows += [
        (
            "checkpoints",
            f"{kept:,} written, the newest kept, {_bytes(size['checkpoint'])} each"
            if kept
            else f"none before the end; with --save-every, {_bytes(size['checkpoint'])} each",
        ),
        (
            "static memory",
            f"{_bytes(size['static'])}: weights {_bytes(size['weights'])}, gradients {_bytes(size['gradients'])}, "
            f"optimizer {_bytes(size['optimizer'])}"
            + (f" (and {_bytes(size['optimizer_host'])} on the host)" if size["optimizer_host"] else "")
            + (f", reference head {_bytes(size['reference_head'])}" if size["reference_head"] else "")
            + "; activations come on top",
        ),
        ("measures", _measures_line(found["measures"])),
        ("output", _output_line(found["output"], size["final_model"])),
    ]
    width = max(len(name) for name, _ in rows)
    return [f"{name:{width}}  {text}" for name, text in rows]


def _rate_line(rate: dict[str, Any], total: int) -> str:
    if rate["peak_step"] == 1:
        return f"{rate['peak']:.3g} at step 1, straight down to {rate['last']:.3g} at step {total:,}"
    return (
        f"from {rate['first']:.3g} up to {rate['peak']:.3g} at step {rate['peak_step']:,}, straight down to "
        f"{rate['last']:.3g} at step {total:,}"
    )


def _measures_line(measures: dict[str, Any]) -> str:
    planned, limit = measures["planned"], measures["gpu_memory"]
    if planned is None:
        return measures["text"]
    words = f"{measures['text']}; {_bytes(planned)} planned"
    if limit is None:
        return words
    words += f", of {_bytes(limit)} with a reserve of {_bytes(measures['reserve'])}"
    return words if measures["fits"] else words + ": DOES NOT FIT"


def _stored_line(stored: str | None) -> str:
    if stored is None:
        return "to be computed"
    return "stored (whether by this model, the run checks)" if stored == "complete" else f"REFUSED: {stored}"


def _output_line(output: dict[str, Any], final: int) -> str:
    there = "; it HOLDS A RUN already: --resume goes on with it" if output["holds_a_run"] else ""
    return f"{output['folder']}, {_bytes(final)} when finished{there}"


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:,.1f} GiB"
