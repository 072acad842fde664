"""The whole story in one command: train a small model, retrain it without a part, let five methods forget that part.

The corpus is invented (unlearn.corpus) or TOFU from local files; the model is a Llama trained from scratch, so the
gold standard, the same model trained on the retain part alone, can be made and every method measured against it.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from unlearn import corpus
from unlearn.batches import make_training_set, num_steps_per_epoch
from unlearn.config import TrainConfig
from unlearn.data import Row
from unlearn.evaluate import EvalSet, Evaluation, Yardsticks, evaluate, num_pieces, score_sets, summarize
from unlearn.model import load_model, prepare, resolve_device
from unlearn.report import console_table, write_report
from unlearn.runs import sample_places
from unlearn.tasks import Task, invented_task, spread, tofu_task
from unlearn.train import METRICS_FILE, MODEL_FOLDER, TrainResult, provenance, train

Say = Callable[[str], None]
MAX_TOKENS = 8192  # of one packed forward
GENERATION_BATCH = 128
RECORD_FILE = "result.json"  # of a finished full or gold model: what it was made from, and at what cost
COLUMNS = (
    "forget_probability",
    "retain_probability",
    "truth_ratio",
    "forget_quality",
    "forget_rouge_l",
    "model_utility",
    "seconds",
    "peak_memory_mib",
)


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

    data: a folder with TOFU's files, None for the invented corpus. methods: a subset, by the names the table shows.
    reuse_models: take the finished full and gold models of the same settings that `out` holds.
    Raises ValueError for a method that the demo does not have, a device that is not there and missing files.
    """
    task = tofu_task(data) if data is not None else invented_task(seed)
    for name in methods or []:
        if name not in task.methods:
            raise ValueError(f"methods: {name!r} is not accepted; {', '.join(task.methods)} are")
    chosen = {name: values for name, values in task.methods.items() if methods is None or name in methods}
    demo = Demo.start(task, out, seed, resolve_device(device), say)
    full, full_run = demo.pretrained("full", task.full, reuse=reuse_models)
    gold, gold_run = demo.pretrained("gold", task.retain, reuse=reuse_models)
    gold_ratio = score_sets(gold, demo.sets[:1], max_tokens=MAX_TOKENS)["forget"].log_truth_ratio
    models = [
        demo.entry("full", full, full_run, [demo.look(full, gold_ratio, 0)], gold_ratio),
        demo.entry("gold", gold, gold_run, [demo.look(gold, gold_ratio, 0)], gold_ratio),
    ]
    del gold
    for name, values in chosen.items():
        model = copy.deepcopy(full)
        run, trajectory = demo.unlearn(name, values, model, gold_ratio)
        models.append(demo.entry(name, model, run, trajectory, gold_ratio))
        metrics = models[-1]["metrics"]
        say(
            f"{name}: forget quality {metrics['forget_quality']:.2g}, "
            f"{task.utility.replace('_', ' ')} {metrics[task.utility]:.3f}"
        )
    results = demo.results(models, chosen, provenance(full))
    path = write_report(results, out)
    say("")
    say(console_table(results))
    say(f"\nreport: {path}")
    return results


@dataclass(frozen=True)
class Demo:
    """One run: its task and where it goes. sets: the evaluation's; small: what trajectories are scored on."""

    task: Task
    out: Path
    seed: int
    device: torch.device
    say: Say
    tokenizer: Any
    sets: list[EvalSet] = field(repr=False)
    small: list[EvalSet] = field(repr=False)

    @staticmethod
    def start(task: Task, out: Path, seed: int, device: torch.device, say: Say) -> Demo:
        """Make the folder, the tokenizer and the evaluation sets."""
        out.mkdir(parents=True, exist_ok=True)
        tokenizer = corpus.train_tokenizer(texts(task), task.vocab_size)
        sets = task.evaluation(tokenizer)
        # Forget quality needs the whole forget set: a test on fewer rows has less power and other p-values.
        few = task.trajectory_rows
        small = [s if s.kind == "forget" else dataclasses.replace(s, rows=spread(s.rows, few)) for s in sets]
        say(
            f"{task.title}: {len(task.full)} rows, {len(task.forget)} to forget, "
            f"{len(tokenizer)} tokens in the vocabulary"
        )
        return Demo(task, out, seed, device, say, tokenizer, sets, small)

    def config(self, values: dict[str, Any], folder: Path) -> TrainConfig:
        """A configuration whose rows come from memory: the file names are what the metrics header shows."""
        shared = {"model": "from scratch", "output": str(folder), "dtype": "float32", "max_tokens": MAX_TOKENS}
        return TrainConfig(**{**shared, "device": str(self.device), "seed": self.seed, **values})

    def pretrained(self, name: str, rows: list[Row], *, reuse: bool) -> tuple[nn.Module, TrainResult]:
        """Train a model from scratch on these rows, or take the finished one of the same settings."""
        folder = self.out / name
        config = self.config({"method": "finetune", "retain": name, **self.task.pretrain}, folder)
        record = folder / RECORD_FILE
        settings = {key: value for key, value in config.to_dict().items() if key != "output"}
        signature = {"config": settings, "model": self.task.model, "rows": digest(rows)}
        if reuse and record.exists():
            stored = json.loads(record.read_text())
            if stored["signature"] == json.loads(json.dumps(signature)):
                self.say(f"{name}: taken from {folder / MODEL_FOLDER}")
                model = load_model(str(folder / MODEL_FOLDER), dtype=config.dtype, device=self.device)
                return model, TrainResult(**stored["result"])
        model = prepare(new_model(self.task, self.tokenizer, self.seed).to(self.device))
        data = make_training_set(config, self.tokenizer, [], rows, [], max_length=None)
        start_anew(folder)
        result = train(config, model, self.tokenizer, data, say=silent)
        record.write_text(json.dumps({"signature": signature, "result": dataclasses.asdict(result)}))
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        self.say(f"{name}: {millions:.2f} M parameters trained on {len(rows)} rows in {result.seconds:.0f} s")
        return model, result

    def unlearn(
        self, name: str, values: dict[str, Any], model: nn.Module, gold_ratio: np.ndarray
    ) -> tuple[TrainResult, list[dict[str, float]]]:
        """One method on a copy of the full model; returns its run and its trajectory."""
        folder = self.out / re.sub(r"\W+", "-", name.lower())
        names: dict[str, Any] = {"forget": "forget"}
        if values.get("retain_term", "none") != "none":
            names["retain"] = "retain"
        config = self.config({**names, **values}, folder)
        data = make_training_set(config, self.tokenizer, self.task.forget, self.task.retain, [], max_length=None)
        num_steps = num_steps_per_epoch(data, config) * config.epochs
        points = self.task.trajectory_points
        marks = {round(num_steps * i / points) for i in range(points + 1)}
        trajectory: list[dict[str, float]] = []

        def after_step(step: int) -> None:
            if step in marks:
                trajectory.append(self.look(model, gold_ratio, step))

        start_anew(folder)
        run = train(config, model, self.tokenizer, data, after_step=after_step, save_model=False, say=silent)
        return run, trajectory

    def look(self, model: nn.Module, gold_ratio: np.ndarray, step: int) -> dict[str, float]:
        """A point of a trajectory: the smaller sets, log-likelihoods alone."""
        scores = score_sets(model, self.small, max_tokens=MAX_TOKENS)
        found = summarize(scores, Yardsticks(log_truth_ratio=gold_ratio)).metrics
        return {
            "step": step,
            "forget_logprob_per_token": found["forget_logprob_per_token"],
            "retain_logprob_per_token": found["retain_logprob_per_token"],
            "forget_quality": found["forget_quality"],
            "utility": found[self.task.utility],
        }

    def entry(
        self,
        name: str,
        model: nn.Module,
        run: TrainResult,
        trajectory: list[dict[str, float]],
        gold_ratio: np.ndarray,
    ) -> dict[str, Any]:
        """A model's part of the results: full evaluation with generated answers, cost, trajectory."""
        found = self.evaluate(name, model, gold_ratio)
        metrics: dict[str, Any] = dict(found.metrics)
        metrics |= {
            "likelihood_utility": trajectory[-1]["utility"],
            "steps": run.num_steps,
            "seconds": run.seconds + run.reference_seconds,
            "peak_memory_mib": run.peak_memory_mib,
        }
        return {"name": name, "metrics": metrics, "trajectory": trajectory, "generated": found.sets["forget"].generated}

    def evaluate(self, name: str, model: nn.Module, gold_ratio: np.ndarray) -> Evaluation:
        with tqdm(total=num_pieces(self.sets), desc=f"evaluate {name}", unit="answer", leave=False) as bar:
            return evaluate(
                model,
                self.tokenizer,
                self.sets,
                yardsticks=Yardsticks(log_truth_ratio=gold_ratio),
                max_tokens=MAX_TOKENS,
                max_new_tokens=self.task.max_new_tokens,
                batch_size=GENERATION_BATCH,
                progress=bar.update,
            )

    def results(self, models: list[dict[str, Any]], chosen: dict[str, Any], where: dict[str, Any]) -> dict[str, Any]:
        """What results.json holds."""
        task = self.task
        return {
            "title": task.title,
            "columns": [*COLUMNS, *(["retain_utility"] if task.utility == "retain_utility" else [])],
            "utility_axis": f"{task.utility.replace('_', ' ').capitalize()} from log-likelihoods",
            "settings": {
                "seed": self.seed,
                "vocabulary": len(self.tokenizer),
                "model": task.model,
                "pretrain": task.pretrain,
                "methods": chosen,
                "rows": {"full": len(task.full), "forget": len(task.forget), "retain": len(task.retain)},
            },
            "provenance": where,
            "models": [{k: v for k, v in entry.items() if k != "generated"} for entry in models],
            "samples": self.samples(models),
            "notes": list(task.notes),
        }

    def samples(self, models: list[dict[str, Any]], count: int = 3) -> list[dict[str, str]]:
        """What each model answers to a few forget questions."""
        rows = self.sets[0].rows
        return [
            {
                "question": rows[i].row.turns[-1][1],
                "answer": rows[i].row.answer,
                **{entry["name"]: entry["generated"][i] for entry in models},
            }
            for i in sample_places(len(rows), count)
        ]


def texts(task: Task) -> Iterator[str]:
    """What the tokenizer is trained on."""
    for row in task.full:
        yield row.turns[-1][1]
        yield " " + row.answer


def digest(rows: list[Row]) -> str:
    """Names the training rows, in order; the tokenizer follows from the full ones."""
    return hashlib.blake2b(repr([(row.turns, row.answer) for row in rows]).encode(), digest_size=16).hexdigest()


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


def start_anew(folder: Path) -> None:
    """What an earlier demo left here would be refused as a run to resume, or as another model's reference."""
    for name in (METRICS_FILE, RECORD_FILE):
        (folder / name).unlink(missing_ok=True)
    for stale in (folder / "reference").glob("reference*.safetensors"):
        stale.unlink()


def silent(text: str) -> None:
    """The demo tells its own story; what single runs say of themselves is in their metrics files."""
