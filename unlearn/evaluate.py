"""Evaluate a model on TOFU-shaped sets: likelihood metrics from one pass over all answers, ROUGE-L from generation.

A set is rows with question, answer and, where it has them, perturbed_answer (wrong ones) and paraphrased_answer. The
definitions are in unlearn.metrics; TOFU (Maini et al. 2024, arXiv:2401.06121) is their source.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from unlearn import metrics
from unlearn.data import Row, Sequence, encode, load_rows, special_ids
from unlearn.model import generating
from unlearn.reference import score, unique

Progress = Callable[[int], None]
Kind = Literal["forget", "retain", "other", "known"]


@dataclass(frozen=True)
class EvalRow:
    """The encoded answers to one question: right, right in other words (or the right one again), wrong [w]."""

    row: Row
    answer: Sequence
    paraphrased: Sequence
    wrong: tuple[Sequence, ...]

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        return (self.answer, self.paraphrased, *self.wrong)


@dataclass(frozen=True)
class EvalSet:
    """kind: forget; retain; other (short answers, as TOFU's real authors: the probability is normalised over the wrong
    ones); known (whole sentences that training data held too: a plain probability)."""

    name: str
    kind: Kind
    rows: tuple[EvalRow, ...]


@dataclass(frozen=True)
class SetScores:
    """Average NLL per row, nats per token: of the answer [n], of the right one in the truth ratio [n], of the wrong
    ones [n, w]."""

    answer_nll: np.ndarray
    correct_nll: np.ndarray
    wrong_nll: np.ndarray
    kind: Kind
    rouge_l: np.ndarray | None = None
    generated: tuple[str, ...] = ()

    @property
    def has_wrong_answers(self) -> bool:
        return self.wrong_nll.shape[1] > 0

    @property
    def log_truth_ratio(self) -> np.ndarray:
        return metrics.log_truth_ratio(self.correct_nll, self.wrong_nll)

    @property
    def truth_ratio(self) -> np.ndarray:
        """Within float64's range, where both scores of it are long saturated."""
        return np.exp(np.clip(self.log_truth_ratio, -700, 700))

    @property
    def probability(self) -> float:
        if self.kind == "other":
            return float(metrics.normalized_probability(self.answer_nll, self.wrong_nll).mean())
        return float(metrics.probability(self.answer_nll).mean())

    def utility_terms(self, name: str) -> dict[str, float]:
        """The set's terms of model utility: probability, truth ratio given wrong answers, ROUGE-L if generated."""
        terms = {f"{name}_probability": self.probability}
        if self.has_wrong_answers:
            terms[f"{name}_truth_ratio"] = metrics.utility_truth_ratio_score(self.truth_ratio)
        if self.rouge_l is not None:
            terms[f"{name}_rouge_l"] = float(self.rouge_l.mean())
        return terms


@dataclass(frozen=True)
class Evaluation:
    """What evaluate() found. `metrics` is flat and JSON-ready; `sets` keeps the values per row."""

    metrics: dict[str, float]
    sets: dict[str, SetScores] = field(repr=False)


def make_set(name: str, kind: Kind, rows: list[Row], tokenizer: Any, *, max_length: int | None = None) -> EvalSet:
    """Encode a set. Raises ValueError naming the row whose answers cannot be used.

    A set without any wrong answers is a set without truth ratio; the other metrics are there.
    """
    encoded: list[EvalRow] = []
    for row in rows:
        fields = row.fields or {}
        wrong = fields.get("perturbed_answer") or []
        wrong = [wrong] if isinstance(wrong, str) else wrong
        if not isinstance(wrong, list) or not all(isinstance(text, str) for text in wrong):
            raise ValueError(f"{row.key}: perturbed_answer is not a string or a list of strings")
        if not wrong and (kind == "other" or any(other.wrong for other in encoded)):
            raise ValueError(f"{row.key}: perturbed_answer is missing; a string or a list of wrong answers is accepted")
        right = fields.get("paraphrased_answer", row.answer)
        right = right[0] if isinstance(right, list) and right else right
        if not isinstance(right, str):
            raise ValueError(f"{row.key}: paraphrased_answer is a {type(right).__name__}; a string is accepted")
        answers = [row.answer, right, *wrong]
        own, paraphrased, *others = (
            encode(row.with_answer(text, f"#{i}"), tokenizer, max_length=max_length) for i, text in enumerate(answers)
        )
        encoded.append(EvalRow(row, own, paraphrased, tuple(others)))
    if not encoded:
        raise ValueError(f"{name}: holds no rows")
    counts = {len(row.wrong) for row in encoded}
    if len(counts) != 1:
        raise ValueError(f"{name}: rows have {sorted(counts)} wrong answers; every row of a set needs as many")
    return EvalSet(name, kind, tuple(encoded))


def load_set(name: str, kind: Kind, source: str, tokenizer: Any, *, max_length: int | None = None) -> EvalSet:
    return make_set(name, kind, load_rows(source, role=name), tokenizer, max_length=max_length)


def score_sets(
    model: nn.Module, sets: Iterable[EvalSet], *, max_tokens: int, progress: Progress | None = None
) -> dict[str, SetScores]:
    """All answers of all sets in one pass, each sequence once. Raises ValueError where the model says NaN or inf."""
    sets = list(sets)
    if len({group.name for group in sets}) != len(sets):
        raise ValueError(f"sets: two have the same name among {', '.join(group.name for group in sets)}")
    distinct = _distinct(sets)
    nll: dict[str, float] = {}
    for sequence, value in zip(
        distinct, score(model, distinct, max_tokens=max_tokens, progress=progress), strict=True
    ):
        if not math.isfinite(value):
            raise ValueError(f"model: the log-likelihood of {sequence.key} is {value}; such a model has no metrics")
        nll[sequence.content_key] = -value / sequence.num_answer_tokens

    def average(sequences: Iterable[Sequence]) -> np.ndarray:
        return np.array([nll[s.content_key] for s in sequences])

    return {
        group.name: SetScores(
            answer_nll=average(row.answer for row in group.rows),
            correct_nll=average(row.paraphrased for row in group.rows),
            wrong_nll=np.stack([average(row.wrong) for row in group.rows]),
            kind=group.kind,
        )
        for group in sets
    }


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: list[tuple[int, ...]],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop: Iterable[int] = (),
    progress: Progress | None = None,
) -> list[str]:
    """Greedy answers to tokenised prompts, batched with a key-value cache, in the order given.

    Sorted by length so that little is padded; padding stands on the left and is masked. An answer ends at any of
    `stop`, the tokenizer's end-of-text token and what the model's own generation settings name; their other advice
    (sampling, penalties) is not taken.
    """
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise ValueError("tokenizer: has neither a padding nor an end-of-text token, and generation needs one")
    ends = sorted(set(stop) | _end_tokens(model, tokenizer)) or None
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    with generating(model), _plain_generation(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            longest = len(prompts[chosen[-1]])
            ids = torch.full((len(chosen), longest), pad)
            mask = torch.zeros_like(ids)
            for place, i in enumerate(chosen):
                ids[place, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[place, longest - len(prompts[i]) :] = 1
            out = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=pad,
                eos_token_id=ends,
            )
            for place, i in enumerate(chosen):
                texts[i] = tokenizer.decode(out[place, longest:], skip_special_tokens=True).strip()
            if progress is not None:
                progress(len(chosen))
    return texts


def _end_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """Chat models end a turn with a token of their own, which is not always the tokenizer's end of text."""
    named = getattr(model.generation_config, "eos_token_id", None)
    named = named if isinstance(named, (list, tuple)) else [named]
    return {int(token) for token in (*named, tokenizer.eos_token_id) if token is not None}


@contextlib.contextmanager
def _plain_generation(model: nn.Module) -> Iterator[None]:
    """generate() fills every setting it is not given from the model's; a repetition penalty would not be greedy."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def add_rouge(
    model: nn.Module,
    tokenizer: Any,
    sets: Iterable[EvalSet],
    scores: dict[str, SetScores],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Progress | None = None,
) -> dict[str, SetScores]:
    """The same scores with generated answers and their ROUGE-L recall."""
    sets = list(sets)
    prompts = [row.answer.input_ids[: row.answer.answer_start] for group in sets for row in group.rows]
    texts = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        stop={row.answer.input_ids[-1] for group in sets for row in group.rows} & special_ids(tokenizer),
        progress=progress,
    )
    result, done = {}, 0
    for group in sets:
        own = texts[done : done + len(group.rows)]
        done += len(own)
        recall = metrics.rouge_l_recall(own, [row.row.answer for row in group.rows])
        result[group.name] = replace(scores[group.name], rouge_l=recall, generated=tuple(own))
    return result


def summarize(scores: dict[str, SetScores], gold_log_truth_ratio: np.ndarray | None) -> Evaluation:
    """The run's table row: forget-set metrics, forget quality against the gold model, utility over the other sets.

    gold_log_truth_ratio [n]: the forget set's log truth ratios under the model retrained without it; None leaves forget
    quality out.
    """
    values: dict[str, float] = {}
    terms: dict[str, float] = {}
    for name, s in scores.items():
        if s.kind == "forget":
            values["forget_probability"] = s.probability
            values["forget_logprob_per_token"] = float(-s.answer_nll.mean())
            if s.has_wrong_answers:
                values["truth_ratio"] = metrics.forget_truth_ratio_score(s.truth_ratio)
            if gold_log_truth_ratio is not None:
                values["forget_quality"] = metrics.forget_quality(s.log_truth_ratio, gold_log_truth_ratio).p_value
            if s.rouge_l is not None:
                values["forget_rouge_l"] = float(s.rouge_l.mean())
        else:
            own_terms = s.utility_terms(name)
            terms |= own_terms
            if s.kind == "retain":
                values["retain_probability"] = s.probability
                values["retain_logprob_per_token"] = float(-s.answer_nll.mean())
                if s.rouge_l is not None:
                    values["retain_rouge_l"] = float(s.rouge_l.mean())
                values["retain_utility"] = metrics.model_utility(own_terms)
    if terms:
        values["model_utility"] = metrics.model_utility(terms)
    return Evaluation(values | terms, scores)


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    sets: list[EvalSet],
    *,
    gold_log_truth_ratio: np.ndarray | None,
    max_tokens: int,
    max_new_tokens: int,
    batch_size: int,
    progress: Progress | None = None,
) -> Evaluation:
    """Everything of a model in its table row. progress counts scored sequences and generated answers alike."""
    scores = score_sets(model, sets, max_tokens=max_tokens, progress=progress)
    scores = add_rouge(
        model, tokenizer, sets, scores, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
    )
    return summarize(scores, gold_log_truth_ratio)


def num_pieces(sets: Iterable[EvalSet]) -> int:
    """What `progress` of evaluate() counts to: distinct sequences and generated answers."""
    sets = list(sets)
    return len(_distinct(sets)) + sum(len(group.rows) for group in sets)


def _distinct(sets: Iterable[EvalSet]) -> list[Sequence]:
    return unique(sequence for group in sets for row in group.rows for sequence in row.sequences)
