"""What the demo trains on, forgets and measures: the invented corpus or TOFU from local files, each with its recipe."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unlearn import corpus
from unlearn.data import Row, load_rows, rows_from
from unlearn.evaluate import EvalSet, make_set


@dataclass(frozen=True)
class Task:
    """What a demo trains on, forgets and measures, with its recipe.

    pretrain and methods: TrainConfig values; methods are shown under their key. utility: the metric that the picture's
    axis shows. A trajectory is scored at trajectory_points even steps on trajectory_rows of each set to be kept.
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
    utility: str
    trajectory_rows: int
    trajectory_points: int
    notes: tuple[str, ...]


def invented_task(seed: int) -> Task:
    """60 people who do not exist and their country; the last 6 people are to be forgotten."""
    made = corpus.generate(seed)
    retain_eval = spread(tuple(made.retain_eval), 120)

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
            "SimNPO+RT": {
                **unlearn, "method": "simnpo", "beta": 2.0, "gamma": 0.0, "retain_term": "nll", "lr": 1e-3,
            },  # fmt: skip
            # an epoch walks through all five alternates of each row
            "AltPO": {
                **unlearn, "method": "altpo", "beta": 0.5, "retain_term": "nll", "epochs": 1, "warmup_epochs": 0.2,
            },  # fmt: skip
        },
        max_new_tokens=48,
        utility="model_utility",
        trajectory_rows=60,
        trajectory_points=12,
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
    # Answers of 40 tokens move far for a sequence loss: at beta 0.1 NPO's weight is spent while half is still known.
    keep = {"retain_term": "nll", "retain_per_forget": 2, "lr": 1e-3}
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
            "NPO+RT": {**unlearn, **keep, "method": "npo", "beta": 0.03},
            "SimNPO+RT": {**unlearn, **keep, "method": "simnpo", "beta": 1.0, "gamma": 0.0},
            "AltPO": {**unlearn, **keep, "method": "altpo", "beta": 0.1, "epochs": 5},
        },
        max_new_tokens=96,
        utility="retain_utility",
        trajectory_rows=60,
        trajectory_points=5,
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


def spread(rows: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """`count` rows at even distances, so that every part of the set is seen."""
    if len(rows) <= count:
        return rows
    return tuple(rows[math.floor(i * len(rows) / count)] for i in range(count))
