"""The whole story in one command: train a small model, retrain it without a part, let five methods forget that part.

The corpus is invented (unlearn.corpus) or TOFU from local files; the model is a Llama trained from scratch, so the
gold standard, the same model trained on the retain part alone, can be made and every method measured against it.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from unlearn import corpus
from unlearn.batches import make_training_set, num_steps_per_epoch
from unlearn.config import TrainConfig
from unlearn.data import Row, load_rows, rows_from
from unlearn.evaluate import EvalSet, Evaluation, evaluate, make_set, num_pieces, score_sets, summarize
from unlearn.model import load_model, prepare, resolve_device
from unlearn.report import console_table, write_report
from unlearn.train import METRICS_FILE, MODEL_FOLDER, TrainResult, provenance, train

Say = Callable[[str], None]
MAX_TOKENS = 8192  # of one packed forward


@dataclass(frozen=True)
class Task:
    """What a demo trains on, forgets and measures, with its recipe.

    trajectory: the sets that are scored along the way, smaller than the evaluation's.
    pretrain and methods: TrainConfig values; methods are shown under their key.
    """

    title: str
    full: list[Row]
    forget: list[Row]
    retain: list[Row]
    evaluation: Callable[[Any], list[EvalSet]]
    vocab_size: int
    model: dict[str, Any]
    pretrain: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    max_new_tokens: int
    trajectory_rows: int
    notes: tuple[str, ...]


def run_demo(
    out: Path,
    *,
    data: Path | None,
    seed: int,
    methods: list[str] | None = None,
    reuse_models: bool = False,
    device: str = "cpu",
    say: Say = print,
) -> dict[str, Any]:
    """Run a demo and write its report into `out`; returns what results.json holds.

    Raises ValueError for a method that the demo does not have, for missing files and for an `out` that is in use.
    """
    task = tofu_task(data) if data is not None else invented_task(seed)
    chosen = _choose(task, methods)
    where = resolve_device(device)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = corpus.train_tokenizer(_texts(task), task.vocab_size)
    sets = task.evaluation(tokenizer)
    say(f"{task.title}: {len(task.full)} rows, {len(task.forget)} to forget, {len(tokenizer)} tokens in the vocabulary")

    full, full_run = _pretrained("full", task, task.full, tokenizer, out, seed, where, reuse_models, say)
    gold, gold_run = _pretrained("gold", task, task.retain, tokenizer, out, seed, where, reuse_models, say)
    gold_ratio = score_sets(gold, sets[:1], max_tokens=MAX_TOKENS)["forget"].log_truth_ratio
    judge = _judge(task, tokenizer, sets, gold_ratio)
    models = [
        _entry("full", judge(full, "full"), full_run, []),
        _entry("gold", judge(gold, "gold"), gold_run, []),
    ]
    del gold
    for name, values in chosen.items():
        model = copy.deepcopy(full)
        trajectory: list[dict[str, float]] = []
        result = _unlearn(name, values, task, model, tokenizer, sets, gold_ratio, out, seed, trajectory)
        models.append(_entry(name, judge(model, name), result, trajectory))
        metrics = models[-1]["metrics"]
        say(f"{name}: forget quality {metrics['forget_quality']:.2g}, utility {metrics['model_utility']:.3f}")
    results = {
        "title": task.title,
        "settings": {
            "seed": seed,
            "vocabulary": len(tokenizer),
            "model": task.model,
            "pretrain": task.pretrain,
            "methods": chosen,
            "rows": {"full": len(task.full), "forget": len(task.forget), "retain": len(task.retain)},
        },
        "provenance": provenance(full),
        "models": [{k: v for k, v in entry.items() if k != "generated"} for entry in models],
        "samples": _samples(sets[0], models),
        "notes": list(task.notes),
    }
    path = write_report(results, out)
    say("")
    say(console_table(results))
    say(f"\nreport: {path}")
    return results


def _choose(task: Task, methods: list[str] | None) -> dict[str, dict[str, Any]]:
    for name in methods or []:
        if name not in task.methods:
            raise ValueError(f"methods: {name!r} is not accepted; {', '.join(task.methods)} are")
    return {name: values for name, values in task.methods.items() if methods is None or name in methods}


def _texts(task: Task) -> Iterator[str]:
    for row in task.full:
        yield row.turns[-1][1]
        yield " " + row.answer


# ---------------------------------------------------------------------------------------------------------- training


def _config(values: dict[str, Any], out: Path, seed: int, device: torch.device) -> TrainConfig:
    """A configuration whose rows come from memory: the file names are what the metrics header shows."""
    shared = {"model": "from scratch", "output": str(out), "dtype": "float32", "max_tokens": MAX_TOKENS}
    return TrainConfig(**{**shared, "device": str(device), "seed": seed, **values})


def _pretrained(
    name: str,
    task: Task,
    rows: list[Row],
    tokenizer: Any,
    out: Path,
    seed: int,
    device: torch.device,
    reuse: bool,
    say: Say,
) -> tuple[nn.Module, TrainResult]:
    """Train a model from scratch on these rows, or take the finished one of the same settings that `out` holds."""
    folder = out / name
    config = _config({"method": "finetune", "retain": name, **task.pretrain}, folder, seed, device)
    record = folder / "result.json"
    signature = {"config": config.to_dict(), "model": task.model, "rows": len(rows), "vocabulary": len(tokenizer)}
    if reuse and record.exists():
        stored = json.loads(record.read_text())
        if stored["signature"] == json.loads(json.dumps(signature)):
            say(f"{name}: taken from {folder / MODEL_FOLDER}")
            model = load_model(str(folder / MODEL_FOLDER), dtype=config.dtype, device=device)
            return model, TrainResult(**stored["result"])
    model = prepare(new_model(task, tokenizer, seed).to(device))
    data = make_training_set(config, tokenizer, [], rows, [], max_length=None)
    _forget_run(folder)
    result = train(config, model, tokenizer, data, say=lambda text: None)
    record.write_text(json.dumps({"signature": signature, "result": dataclasses.asdict(result)}))
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{name}: {parameters / 1e6:.2f} M parameters trained on {len(rows)} rows in {result.seconds:.0f} s")
    return model, result


def new_model(task: Task, tokenizer: Any, seed: int) -> nn.Module:
    """A randomly initialised Llama; the same seed gives the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        **task.model,
    )
    return LlamaForCausalLM(config)


def _forget_run(folder: Path) -> None:
    """A demo starts anew: an earlier run's metrics in its own folder would be refused as a run to resume."""
    (folder / METRICS_FILE).unlink(missing_ok=True)


def _unlearn(
    name: str,
    values: dict[str, Any],
    task: Task,
    model: nn.Module,
    tokenizer: Any,
    sets: list[EvalSet],
    gold_ratio: np.ndarray,
    out: Path,
    seed: int,
    trajectory: list[dict[str, float]],
) -> TrainResult:
    """One method on a copy of the full model, scored along the way on the smaller sets (likelihoods alone)."""
    folder = out / re.sub(r"\W+", "-", name.lower())
    device = next(model.parameters()).device
    names: dict[str, Any] = {"forget": "forget"}
    if values.get("retain_term", "none") != "none":
        names["retain"] = "retain"
    config = _config({**names, **values}, folder, seed, device)
    data = make_training_set(config, tokenizer, task.forget, task.retain, [], max_length=None)
    few = task.trajectory_rows
    small = [s if s.kind == "forget" else dataclasses.replace(s, rows=_spread(s.rows, few)) for s in sets]
    marks = _marks(num_steps_per_epoch(data, config) * config.epochs)

    def look(step: int) -> None:
        if step in marks:
            found = summarize(score_sets(model, small, max_tokens=MAX_TOKENS), gold_ratio).metrics
            trajectory.append(
                {
                    "step": step,
                    "forget_logprob_per_token": found["forget_logprob_per_token"],
                    "retain_logprob_per_token": found["retain_logprob_per_token"],
                    "forget_quality": found["forget_quality"],
                    "utility": found["model_utility"],
                }
            )

    _forget_run(folder)
    for stale in (folder / "reference").glob("reference*.safetensors"):
        stale.unlink()
    return train(config, model, tokenizer, data, after_step=look, save_model=False, say=lambda text: None)


def _marks(num_steps: int, points: int = 12) -> set[int]:
    """Steps at which a trajectory is scored: the start, the end, evenly between."""
    return {round(num_steps * i / points) for i in range(points + 1)}


def _spread(rows: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """`count` rows at even distances, so that every part of the set is seen."""
    if len(rows) <= count:
        return rows
    return tuple(rows[math.floor(i * len(rows) / count)] for i in range(count))


# --------------------------------------------------------------------------------------------------------- measuring


def _judge(
    task: Task, tokenizer: Any, sets: list[EvalSet], gold_ratio: np.ndarray
) -> Callable[[nn.Module, str], Evaluation]:
    def judge(model: nn.Module, name: str) -> Evaluation:
        with tqdm(total=num_pieces(sets), desc=f"evaluate {name}", unit="answer", leave=False) as bar:
            return evaluate(
                model,
                tokenizer,
                sets,
                gold_log_truth_ratio=gold_ratio,
                max_tokens=MAX_TOKENS,
                max_new_tokens=task.max_new_tokens,
                batch_size=128,
                progress=bar.update,
            )

    return judge


def _entry(name: str, found: Evaluation, run: TrainResult, trajectory: list[dict[str, float]]) -> dict[str, Any]:
    metrics: dict[str, Any] = dict(found.metrics)
    metrics |= {
        "steps": run.num_steps,
        "seconds": run.seconds + run.reference_seconds,
        "peak_memory_mib": run.peak_memory_mib,
    }
    return {"name": name, "metrics": metrics, "trajectory": trajectory, "generated": found.sets["forget"].generated}


def _samples(forget: EvalSet, models: list[dict[str, Any]], count: int = 3) -> list[dict[str, str]]:
    """What each model answers to a few forget questions."""
    rows = _spread(tuple(range(len(forget.rows))), count)
    return [
        {
            "question": forget.rows[i].row.turns[-1][1],
            "answer": forget.rows[i].row.answer,
            **{entry["name"]: entry["generated"][i] for entry in models},
        }
        for i in rows
    ]


# ------------------------------------------------------------------------------------------------------------- tasks


def invented_task(seed: int) -> Task:
    """60 people who do not exist and their country; the last 6 people are to be forgotten."""
    made = corpus.generate(seed)
    retain_eval = _spread(tuple(made.retain_eval), 120)

    def evaluation(tokenizer: Any) -> list[EvalSet]:
        return [
            make_set("forget", "forget", rows_from(made.forget_eval, "forget_eval"), tokenizer),
            make_set("retain", "retain", rows_from(list(retain_eval), "retain_eval"), tokenizer),
            make_set("world", "known", rows_from(made.world_eval, "world_eval"), tokenizer),
        ]

    unlearn = {"epochs": 10, "batch_size": 24, "warmup_epochs": 1.0, "weight_decay": 0.01, "lr": 3e-4}
    return Task(
        title="Forgetting 6 of 60 invented people",
        full=rows_from(made.full, "full"),
        forget=rows_from(made.forget, "forget"),
        retain=rows_from(made.retain, "retain"),
        evaluation=evaluation,
        vocab_size=2048,
        model={
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
        },
        pretrain={"lr": 2e-3, "epochs": 16, "batch_size": 32, "warmup_epochs": 1.0, "weight_decay": 0.01},
        methods={
            "GA": {**unlearn, "method": "ga"},
            "NPO": {**unlearn, "method": "npo", "beta": 0.1},
            "NPO+RT": {**unlearn, "method": "npo", "beta": 0.1, "retain_term": "nll"},
            "SimNPO+RT": {**unlearn, "method": "simnpo", "beta": 4.5, "gamma": 0.0, "retain_term": "nll"},
            # an epoch walks through all five alternates of each row
            "AltPO": {
                **unlearn, "method": "altpo", "beta": 0.5, "retain_term": "nll", "epochs": 1, "warmup_epochs": 0.2,
            },  # fmt: skip
        },
        max_new_tokens=48,
        trajectory_rows=60,
        notes=(),
    )


def tofu_task(folder: Path) -> Task:
    """TOFU from local files: train on full, gold on retain90, forget forget10, measure with the perturbed files."""
    names = ("full", "retain90", "forget10", "forget10_perturbed", "retain_perturbed", "real_authors_perturbed",
             "world_facts_perturbed")  # fmt: skip
    missing = [f"{name}.json" for name in names if not (folder / f"{name}.json").is_file()]
    if missing:
        raise ValueError(f"data: {folder} lacks {', '.join(missing)}")
    rows = {name: load_rows(str(folder / f"{name}.json"), role="data") for name in names}
    forget = with_neighbour_alternates(rows["forget10"], rows["retain90"], count=2)

    def evaluation(tokenizer: Any) -> list[EvalSet]:
        return [
            make_set("forget", "forget", rows["forget10_perturbed"], tokenizer),
            make_set("retain", "retain", rows["retain_perturbed"], tokenizer),
            make_set("real_authors", "other", rows["real_authors_perturbed"], tokenizer),
            make_set("world_facts", "other", rows["world_facts_perturbed"], tokenizer),
        ]

    unlearn = {"epochs": 10, "batch_size": 32, "warmup_epochs": 1.0, "weight_decay": 0.01, "lr": 3e-4}
    return Task(
        title="Forgetting 20 of TOFU's 200 authors (forget10)",
        full=rows["full"],
        forget=forget,
        retain=rows["retain90"],
        evaluation=evaluation,
        vocab_size=4096,
        model={
            "hidden_size": 192,
            "intermediate_size": 576,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
        },
        pretrain={"lr": 2e-3, "epochs": 14, "batch_size": 32, "warmup_epochs": 1.0, "weight_decay": 0.01},
        methods={
            "GA": {**unlearn, "method": "ga"},
            "NPO": {**unlearn, "method": "npo", "beta": 0.1},
            "NPO+RT": {**unlearn, "method": "npo", "beta": 0.1, "retain_term": "nll"},
            "SimNPO+RT": {**unlearn, "method": "simnpo", "beta": 4.5, "gamma": 0.0, "retain_term": "nll"},
            "AltPO": {**unlearn, "method": "altpo", "beta": 0.1, "retain_term": "nll", "epochs": 5},
        },
        max_new_tokens=96,
        trajectory_rows=60,
        notes=(
            "The models are trained from scratch on TOFU alone: they know no real authors and no world facts, so two "
            "of the three sets behind model utility are near chance. The retain utility beside it is the harmonic "
            "mean of the retain set's three terms.",
            "Alternates for AltPO are the answers to the most similar retain questions: a model this small cannot be "
            "prompted for alternates.",
        ),
    )


def with_neighbour_alternates(forget: list[Row], retain: list[Row], *, count: int) -> list[Row]:
    """Forget rows with the answers to the `count` most similar retain questions as alternates.

    Similarity is the cosine of word counts weighted by inverse document frequency; ties go to the earlier row.
    """
    words = [Counter(re.findall(r"\w+", row.turns[-1][1].lower())) for row in [*forget, *retain]]
    frequency = Counter(word for counts in words for word in counts)
    column = {word: i for i, word in enumerate(frequency)}
    matrix = np.zeros((len(words), len(column)))
    for i, counts in enumerate(words):
        for word, number in counts.items():
            matrix[i, column[word]] = number * math.log(len(words) / frequency[word])
    matrix /= np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-12)
    similarity = matrix[: len(forget)] @ matrix[len(forget) :].T
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :count]
    return [
        dataclasses.replace(row, alternates=tuple(retain[j].answer for j in picks))
        for row, picks in zip(forget, nearest, strict=True)
    ]
