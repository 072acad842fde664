"""Evaluate a model on TOFU-shaped sets: likelihood metrics from one pass over all answers, ROUGE-L from generation.

A set is rows with question, answer and, where it has them, perturbed_answer (wrong ones) and paraphrased_answer. The
definitions are in unlearn.metrics; TOFU (Maini et al. 2024, arXiv:2401.06121) is their source.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from torch import nn

from unlearn import metrics, tofu_log
from unlearn.data import Row, Sequence, encode, load_rows, special_ids, windows
from unlearn.generate import generate
from unlearn.scoring import Progress, TokenScores, score, token_scores, unique

MIN_K_SHARE = 0.4  # TOFU's and MUSE's
Kind = Literal["forget", "retain", "other", "known", "holdout"]


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
    ones); known (whole sentences that training data held too: a plain probability); holdout (text like the forget
    set's that no model has seen, for membership inference)."""

    name: str
    kind: Kind
    rows: tuple[EvalRow, ...]

    @property
    def has_documents(self) -> bool:
        """Documents, all of them: nothing to generate an answer to."""
        return self.rows[0].row.document


@dataclass(frozen=True)
class SetScores:
    """Average NLL per row, nats per token: of the answer [n], of the right one in the truth ratio [n], of the wrong
    ones [n, w]."""

    answer_nll: np.ndarray
    correct_nll: np.ndarray
    wrong_nll: np.ndarray
    kind: Kind
    tokens: tuple[TokenScores, ...] = ()  # of the answers
    answers: tuple[str, ...] = ()
    rouge_l: np.ndarray | None = None
    generated: tuple[str, ...] = ()
    documents: bool = False  # the last token is the text's, not one that ends an answer

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

    def memorization(self) -> dict[str, float]:
        """Exact memorization and extraction strength, means over the rows whose answer has a token besides its end."""
        ended = not self.documents
        bits = [row.is_argmax for row in self.tokens if len(row.is_argmax) > ended]
        if not bits:
            return {}
        measures = {
            "exact_memorization": metrics.exact_memorization,
            "extraction_strength": metrics.extraction_strength,
        }
        return {
            name: float(np.mean([measure(row, drop_last=ended) for row in bits])) for name, measure in measures.items()
        }

    def inner(self) -> list[TokenScores]:
        """Token statistics without the token that ends an answer, as open-unlearning's min-k and min-k++; documents end
        in none."""
        return [row if self.documents else row.without_last() for row in self.tokens]

    def utility_terms(self, name: str) -> dict[str, float]:
        """The set's terms of model utility: probability, truth ratio given wrong answers, ROUGE-L if generated."""
        terms = {f"{name}_probability": self.probability}
        if self.has_wrong_answers:
            terms[f"{name}_truth_ratio"] = metrics.utility_truth_ratio_score(self.truth_ratio)
        if self.rouge_l is not None:
            terms[f"{name}_rouge_l"] = float(self.rouge_l.mean())
        return terms


@dataclass(frozen=True)
class Yardsticks:
    """What other models say of the same sets; None leaves out the metrics that need it.

    log_truth_ratio [n]: the forget set's under the gold model, retrained without it, for forget quality. min_k_auc: the
    gold model's between the forget and the holdout set, for PrivLeak. answer_nll [n] by set: average NLL of the forget
    and the holdout set's answers under a reference model, for membership inference.
    """

    log_truth_ratio: np.ndarray | None = None
    min_k_auc: float | None = None
    answer_nll: dict[str, np.ndarray] | None = None


NO_YARDSTICKS = Yardsticks()


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
    kinds = {row.row.document: row.row.key for row in encoded}
    if len(kinds) != 1:
        raise ValueError(f"{name}: {kinds[True]} is a document and {kinds[False]} is none; a set has one kind of rows")
    counts = {len(row.wrong) for row in encoded}
    if len(counts) != 1:
        raise ValueError(f"{name}: rows have {sorted(counts)} wrong answers; every row of a set needs as many")
    return EvalSet(name, kind, tuple(encoded))


def load_set(
    name: str,
    kind: Kind,
    source: str,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    fields: str | None = None,
    window: int | None = None,
) -> EvalSet:
    rows = windows(load_rows(source, role=name, fields=fields), tokenizer, size=window)
    return make_set(name, kind, rows, tokenizer, max_length=max_length)


def score_sets(
    model: nn.Module, sets: Iterable[EvalSet], *, max_tokens: int, progress: Progress | None = None
) -> dict[str, SetScores]:
    """All answers of all sets, each sequence once: the right ones with everything about their tokens.

    Raises ValueError where the model says NaN or inf.
    """
    sets = list(sets)
    if len({group.name for group in sets}) != len(sets):
        raise ValueError(f"sets: two have the same name among {', '.join(group.name for group in sets)}")
    answers = unique(row.answer for group in sets for row in group.rows)
    tokens = {
        sequence.content_key: scores
        for sequence, scores in zip(
            answers, token_scores(model, answers, max_tokens=max_tokens, progress=progress), strict=True
        )
    }
    # paraphrased and wrong answers count by their sums alone
    others = [sequence for sequence in _distinct(sets) if sequence.content_key not in tokens]
    nll = _average_nll(answers, (float(tokens[sequence.content_key].logprob.sum()) for sequence in answers))
    if others:
        nll |= _average_nll(others, score(model, others, max_tokens=max_tokens, progress=progress))

    def average(sequences: Iterable[Sequence]) -> np.ndarray:
        return np.array([nll[s.content_key] for s in sequences])

    return {
        group.name: SetScores(
            answer_nll=average(row.answer for row in group.rows),
            correct_nll=average(row.paraphrased for row in group.rows),
            wrong_nll=np.stack([average(row.wrong) for row in group.rows]),
            kind=group.kind,
            tokens=tuple(tokens[row.answer.content_key] for row in group.rows),
            answers=tuple(row.row.answer for row in group.rows),
            documents=group.has_documents,
        )
        for group in sets
    }


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
    """The same scores with generated answers and their ROUGE-L recall; not of a holdout set, nor of documents, which
    unlearn.muse goes on with."""
    sets, scores = _generated(sets), dict(scores)
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
    done = 0
    for group in sets:
        own = texts[done : done + len(group.rows)]
        done += len(own)
        recall = metrics.rouge_l_recall(own, [row.row.answer for row in group.rows])
        scores[group.name] = replace(scores[group.name], rouge_l=recall, generated=tuple(own))
    return scores


def _generated(sets: Iterable[EvalSet]) -> list[EvalSet]:
    return [group for group in sets if group.kind != "holdout" and not group.has_documents]


def answer_nll(
    model: nn.Module, sets: Iterable[EvalSet], *, max_tokens: int, progress: Progress | None = None
) -> dict[str, np.ndarray]:
    """Average NLL of each set's answers [n], nats per token: all that is asked of a reference model."""
    sets = list(sets)
    answers = unique(row.answer for group in sets for row in group.rows)
    nll = _average_nll(answers, score(model, answers, max_tokens=max_tokens, progress=progress))
    return {group.name: np.array([nll[row.answer.content_key] for row in group.rows]) for group in sets}


def _average_nll(sequences: list[Sequence], logprobs: Iterable[float]) -> dict[str, float]:
    """content_key -> nats per token. Raises ValueError where the model says NaN or inf."""
    nll: dict[str, float] = {}
    for sequence, value in zip(sequences, logprobs, strict=True):
        if not math.isfinite(value):
            raise ValueError(f"model: the log-likelihood of {sequence.key} is {value}; such a model has no metrics")
        nll[sequence.content_key] = -value / sequence.num_answer_tokens
    return nll


# Scores [n] by which rows that were trained on lie below those that were not.
MEMBERSHIP: dict[str, Callable[[SetScores], np.ndarray]] = {
    "loss": lambda s: s.answer_nll,
    "zlib": lambda s: np.array([metrics.zlib_ratio(*pair) for pair in zip(s.answer_nll, s.answers, strict=True)]),
    "min_k": lambda s: np.array([metrics.min_k(row.logprob, share=MIN_K_SHARE) for row in s.inner()]),
    "min_k_plus_plus": lambda s: np.array(
        [metrics.min_k_plus_plus(row.logprob, row.mean, row.variance, share=MIN_K_SHARE) for row in s.inner()]
    ),
}


def membership_auc(name: str, forget: SetScores, holdout: SetScores) -> float:
    """AUC of the score MEMBERSHIP[name], forget rows against holdout rows: above 0.5 where forget rows are known."""
    return metrics.auc(MEMBERSHIP[name](forget), MEMBERSHIP[name](holdout))


def gold_min_k_auc(scores: dict[str, SetScores]) -> float:
    """The gold model's AUC of min-k, for PrivLeak, which divides by what it lacks to 1. Raises ValueError for 1."""
    auc = membership_auc("min_k", scores["forget"], scores["holdout"])
    if auc == 1:
        raise ValueError(
            "gold: it tells every forget row from every holdout row (an AUC of 1), and PrivLeak divides by what is"
            " left to 1; give other --holdout rows, or no --gold"
        )
    return auc


def _membership_metrics(scores: dict[str, SetScores], yardsticks: Yardsticks) -> dict[str, float]:
    """AUCs of the forget against the holdout set, where there is one, and what other models' say of them."""
    by_kind = {s.kind: (name, s) for name, s in scores.items()}
    if "holdout" not in by_kind:
        return {}
    (forget_name, forget), (holdout_name, holdout) = by_kind["forget"], by_kind["holdout"]
    values = {f"mia_{name}_auc": membership_auc(name, forget, holdout) for name in MEMBERSHIP}
    if (ref := yardsticks.answer_nll) is not None:
        values["mia_reference_auc"] = metrics.auc(
            forget.answer_nll - ref[forget_name], holdout.answer_nll - ref[holdout_name]
        )
    if yardsticks.min_k_auc is not None:
        values["privleak"] = metrics.privleak(values["mia_min_k_auc"], yardsticks.min_k_auc)
    return values


def summarize(scores: dict[str, SetScores], yardsticks: Yardsticks = NO_YARDSTICKS) -> Evaluation:
    """The run's table row: forget-set metrics, forget quality against the gold model, utility over the other sets."""
    values: dict[str, float] = {}
    terms: dict[str, float] = {}
    for name, s in scores.items():
        if s.kind == "forget":
            values["forget_probability"] = s.probability
            values["forget_logprob_per_token"] = float(-s.answer_nll.mean())
            if s.has_wrong_answers:
                values["truth_ratio"] = metrics.forget_truth_ratio_score(s.truth_ratio)
            if yardsticks.log_truth_ratio is not None:
                test = metrics.forget_quality(s.log_truth_ratio, yardsticks.log_truth_ratio)
                values["forget_quality"] = test.p_value
            if s.rouge_l is not None:
                values["forget_rouge_l"] = float(s.rouge_l.mean())
            values |= {f"forget_{name}": value for name, value in s.memorization().items()}
            values |= _membership_metrics(scores, yardsticks)
        elif s.kind != "holdout":
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
    max_tokens: int,
    max_new_tokens: int,
    batch_size: int,
    yardsticks: Yardsticks = NO_YARDSTICKS,
    progress: Progress | None = None,
) -> Evaluation:
    """Everything of a model in its table row. progress counts scored sequences and generated answers alike."""
    scores = score_sets(model, sets, max_tokens=max_tokens, progress=progress)
    scores = add_rouge(
        model, tokenizer, sets, scores, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
    )
    return summarize(scores, yardsticks)


def num_pieces(sets: Iterable[EvalSet]) -> int:
    """What `progress` of evaluate() counts to: distinct sequences and generated answers."""
    sets = list(sets)
    return num_scored(sets) + sum(len(group.rows) for group in _generated(sets))


def num_scored(sets: Iterable[EvalSet]) -> int:
    """What `progress` of score_sets() counts to."""
    return len(_distinct(sets))


def to_log(sets: Iterable[EvalSet], scores: dict[str, SetScores]) -> dict[str, dict[str, list[Any]]]:
    """The sets that a TOFU log has, in its fields. Raises ValueError for one without wrong or generated answers."""
    log = {}
    for group in sets:
        s = scores[group.name]
        if group.name not in tofu_log.SETS:
            continue
        if not s.has_wrong_answers or s.rouge_l is None:
            raise ValueError(f"log: {group.name} has no perturbed_answer, and TOFU's logs hold truth ratios")
        log[group.name] = tofu_log.set_fields(
            answer_nll=s.answer_nll,
            answer_lengths=[row.answer.num_answer_tokens for row in group.rows],
            correct_nll=s.correct_nll,
            correct_lengths=[row.paraphrased.num_answer_tokens for row in group.rows],
            wrong_nll=s.wrong_nll,
            wrong_lengths=[[one.num_answer_tokens for one in row.wrong] for row in group.rows],
            texts=[
                (row.row.turns[-1][1], text, row.row.answer) for row, text in zip(group.rows, s.generated, strict=True)
            ],
            rouge_1=metrics.rouge_1_recall(s.generated, s.answers),
            rouge_l=s.rouge_l,
            normalized=group.kind == "other",
        )
    return log


def _distinct(sets: Iterable[EvalSet]) -> list[Sequence]:
    return unique(sequence for group in sets for row in group.rows for sequence in row.sequences)
