"""Evaluation logs in TOFU's own format: written, read, and turned into model utility and forget quality.

A log is one JSON object of up to four sets (the TOFU code's file names are its keys), field -> {row index: value};
some codes write lists in place of the inner dictionaries, and both are read. Losses are in nats: gt_loss of the answer,
paraphrased_loss of the right answer in other words, perturb_loss of the wrong ones, with averages per token.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unlearn.files import replacing
from unlearn.metrics import (
    WrongMean,
    forget_quality,
    forget_truth_ratio_score,
    log_truth_ratio,
    model_utility,
    normalized_probability,
    numbers,
    probability,
    utility_truth_ratio_score,
)

SETS = {
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
    "forget": "eval_log_forget.json",
}
Log = Mapping[str, Mapping[str, Sequence[Any]]]


class LogMetrics(NamedTuple):
    terms: dict[str, float]  # the nine terms of model utility, "<retain | real_authors | world_facts>_<kind>"
    model_utility: float | None  # None for a log of the forget set alone
    log_truth_ratio: NDArray[np.float64]  # [n], of the forget set; forget_quality compares two models' of these
    forget: dict[str, float]  # forget_probability, truth_ratio and forget_rouge_l


def read(path: str | os.PathLike[str]) -> dict[str, dict[str, list[Any]]]:
    """A log's sets: set -> field -> one entry per row, in row order. Raises ValueError naming the file where it is no
    log; the forget set must be there."""
    try:
        log = json.loads(Path(path).read_text(encoding="utf-8"))
        there = {name: log[key] for name, key in SETS.items() if key in log or name == "forget"}
        return {name: {f: _in_row_order(v) for f, v in fields.items()} for name, fields in there.items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} is not a TOFU evaluation log: {type(error).__name__}: {error}") from error


def write(path: str | os.PathLike[str], log: Log) -> None:
    """Store a log, whole or not at all; sets that it lacks are left out."""
    rows = {
        SETS[name]: {field: {str(i): value for i, value in enumerate(values)} for field, values in fields.items()}
        for name, fields in log.items()
    }
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        temporary.write_text(json.dumps(rows, allow_nan=False), encoding="utf-8")


def set_fields(
    *,
    answer_nll: NDArray[np.float64],
    answer_lengths: Sequence[int],
    correct_nll: NDArray[np.float64],
    correct_lengths: Sequence[int],
    wrong_nll: NDArray[np.float64],
    wrong_lengths: Sequence[Sequence[int]],
    texts: Sequence[tuple[str, str, str]],
    rouge_1: ArrayLike,
    rouge_l: ArrayLike,
    normalized: bool,
) -> dict[str, list[Any]]:
    """One set's fields. *_nll: averages per token, [n] and [n, w]; texts: (question, generated, answer) per row;
    normalized: the set's probability is relative to the wrong answers, and its loss is logged too."""
    ratio = np.exp(np.clip(log_truth_ratio(correct_nll, wrong_nll), -700, 700))
    wrong = np.asarray(wrong_lengths)
    fields: dict[str, Any] = {
        "avg_gt_loss": answer_nll,
        "gt_loss": answer_nll * np.asarray(answer_lengths),
        "num_token_gt": np.asarray(answer_lengths),
        "generated_text": np.array(texts, dtype=object),
        "rouge1_recall": np.asarray(rouge_1),
        "rougeL_recall": np.asarray(rouge_l),
        "average_perturb_loss": wrong_nll,
        "avg_paraphrased_loss": correct_nll,
        "truth_ratio": ratio,
        "paraphrased_loss": correct_nll * np.asarray(correct_lengths),
        "perturb_loss": wrong_nll * wrong,
        "num_token_paraphrased": np.asarray(correct_lengths),
        "num_token_perturb": wrong,
    }
    if normalized:
        with np.errstate(divide="ignore"):
            loss = -np.log(normalized_probability(answer_nll, wrong_nll))
        fields["normalized_gt_loss"] = np.minimum(loss, np.finfo(np.float64).max)
    return {name: values.tolist() for name, values in fields.items()}


def metrics_of(log: Log, *, mean: WrongMean = "geometric") -> LogMetrics:
    """Model utility, its terms and the forget set's truth ratios from the losses in a log. Raises ValueError naming the
    set and the field that is missing or no numbers."""
    terms: dict[str, float] = {}
    forget: dict[str, float] = {}
    log_ratios: dict[str, NDArray[np.float64]] = {}
    for name, fields in log.items():
        try:
            # avg_paraphrased_loss is the answer's own loss in the sets that have no paraphrases.
            log_ratio = log_truth_ratio(fields["avg_paraphrased_loss"], fields["average_perturb_loss"], mean=mean)
            log_ratios[name] = log_ratio
            if name in ("retain", "forget"):
                row_probability = probability(fields["avg_gt_loss"])
            else:
                row_probability = normalized_probability(fields["avg_gt_loss"], fields["average_perturb_loss"])
            rouge_l = float(numbers("rougeL_recall", fields["rougeL_recall"], ndim=1).mean())
        except KeyError as error:
            raise ValueError(f"{SETS[name]} has no {error.args[0]}") from None
        except ValueError as error:
            raise ValueError(f"{SETS[name]}: {error}") from None
        with np.errstate(over="ignore"):
            ratio = np.exp(log_ratio)
        if name == "forget":
            forget = {
                "forget_probability": float(row_probability.mean()),
                "truth_ratio": forget_truth_ratio_score(ratio),
                "forget_rouge_l": rouge_l,
            }
            continue
        terms[f"{name}_probability"] = float(row_probability.mean())
        terms[f"{name}_rouge_l"] = rouge_l
        terms[f"{name}_truth_ratio"] = utility_truth_ratio_score(ratio)
    return LogMetrics(terms, model_utility(terms) if terms else None, log_ratios["forget"], forget)


def summary(log: Log, retain_log: Log | None, *, mean: WrongMean = "geometric") -> dict[str, float]:
    """What a table of results has: forget quality (against the retrained model's log), utility, and their parts."""
    found = metrics_of(log, mean=mean)
    values = dict(found.forget)
    if retain_log is not None:
        test = forget_quality(found.log_truth_ratio, metrics_of(retain_log, mean=mean).log_truth_ratio)
        values |= {"forget_quality": test.p_value, "ks_statistic": test.statistic}
    if found.model_utility is not None:
        values |= {"model_utility": found.model_utility}
    return values | found.terms


def _in_row_order(field: list[Any] | dict[str, Any]) -> list[Any]:
    if isinstance(field, list):
        return field
    return [field[index] for index in sorted(field, key=int)]
