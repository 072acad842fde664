"""Metrics of unlearning as pure functions of numbers and strings; no model, no tensor library.

avg_nll (A) is the mean negative log-likelihood of an answer's tokens, in nats: A = -logprob / length. Everything that
can leave exp's range is computed from its logarithm, so a collapsed model (A in the hundreds) still gives right values.
NaN is refused everywhere with a ValueError that names the argument: a NaN that passed through a mean, a minimum or a
sort would come out as a plausible number.

Sources: TOFU (Maini et al. 2024, arXiv:2401.06121) for probability, truth ratio, forget quality and model utility;
Carlini et al. 2024 and the open-unlearning code for memorisation; Shi et al. 2024 (arXiv:2310.16789, 2407.06460) for
min-k and privacy leakage; Zhang et al. 2024 (arXiv:2404.02936) for min-k++.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp
from scipy.stats import ks_2samp, rankdata

Array = NDArray[np.float64]
WrongMean = Literal["geometric", "arithmetic"]


class KSTest(NamedTuple):
    p_value: float
    statistic: float


class Rouge(NamedTuple):
    recall: Array  # [n]
    f1: Array  # [n]


def probability(avg_nll: ArrayLike) -> Array:
    """exp(-A) per answer: the geometric mean of its tokens' probabilities. avg_nll [n] -> [n]; A = inf gives 0."""
    return np.exp(-numbers("avg_nll", avg_nll, ndim=1))


def normalized_probability(avg_nll: ArrayLike, avg_nll_wrong: ArrayLike) -> Array:
    """p / (p + sum of wrong p) with p = exp(-A), per row: TOFU's probability for multiple-choice sets.

    avg_nll: [n]; avg_nll_wrong: [n, w], every row with the same number of wrong answers. Returns [n].
    """
    correct, wrong = _paired_nll("avg_nll", avg_nll, avg_nll_wrong)
    # A softmax over right and wrong answers: finite where every p underflows to 0.
    return np.exp(-correct - logsumexp(np.column_stack([-correct, -wrong]), axis=1))


def log_truth_ratio(avg_nll_correct: ArrayLike, avg_nll_wrong: ArrayLike, *, mean: WrongMean = "geometric") -> Array:
    """log R, R = mean over wrong answers of exp(-A_wrong) / exp(-A_correct), per row. Never overflows.

    avg_nll_correct: [n], of the paraphrased answer (of the answer itself where the set has no paraphrases).
    avg_nll_wrong: [n, w]. Returns [n]; positive where the wrong answers are the likelier ones.
    mean: "geometric" is what the published code and numbers use, "arithmetic" what the TOFU paper writes.
    """
    correct, wrong = _paired_nll("avg_nll_correct", avg_nll_correct, avg_nll_wrong)
    if mean == "geometric":
        return correct - wrong.mean(axis=1)
    if mean == "arithmetic":
        return correct + logsumexp(-wrong, axis=1) - np.log(wrong.shape[1])
    raise ValueError(f"mean must be 'geometric' or 'arithmetic', got {mean!r}")


def truth_ratio(avg_nll_correct: ArrayLike, avg_nll_wrong: ArrayLike, *, mean: WrongMean = "geometric") -> Array:
    """R of `log_truth_ratio`, per row [n].

    Beyond float64's range (|log R| > 709) it is inf or 0, which both scores below read rightly.
    """
    with np.errstate(over="ignore"):
        return np.exp(log_truth_ratio(avg_nll_correct, avg_nll_wrong, mean=mean))


def forget_truth_ratio_score(ratio: ArrayLike) -> float:
    """mean of min(R, 1/R), in [0, 1]; 1 where right and wrong answers are equally likely. ratio: [n], 0 to inf."""
    r = _ratios(ratio)
    with np.errstate(divide="ignore", over="ignore"):
        return float(np.minimum(r, 1 / r).mean())


def utility_truth_ratio_score(ratio: ArrayLike) -> float:
    """mean of max(0, 1 - R), in [0, 1]; 1 where the wrong answers are impossible. ratio: [n], 0 to inf."""
    return float(np.maximum(0.0, 1 - _ratios(ratio)).mean())


def forget_quality(ratio_unlearned: ArrayLike, ratio_retain: ArrayLike) -> KSTest:
    """Two-sided two-sample Kolmogorov-Smirnov test between two models' truth ratios on the forget set.

    p_value is TOFU's forget quality: near 1 where the unlearned model cannot be told from the one retrained without the
    forget set. The test sees only the order of the values, so log ratios give the same result as ratios; give both
    samples in the same form. Prefer logs: ratios that overflowed to inf (or fell to 0) tie, and ties hide an order.
    """
    unlearned, retain = (
        numbers(name, values, ndim=1)
        for name, values in (("ratio_unlearned", ratio_unlearned), ("ratio_retain", ratio_retain))
    )
    with warnings.catch_warnings():
        # scipy's exact p-value can round to just above 1 for equal sizes; its fallback then says 1, which is right.
        warnings.filterwarnings("ignore", "ks_2samp: Exact calculation unsuccessful", RuntimeWarning)
        result = ks_2samp(unlearned, retain)
    return KSTest(p_value=float(result.pvalue), statistic=float(result.statistic))


def rouge_l(generated: Sequence[str], references: Sequence[str], *, use_stemmer: bool = True) -> Rouge:
    """ROUGE-L recall and F1 per row: the longest common subsequence of words over the reference's (and both) lengths.

    Words are runs of ASCII letters and digits, in lower case and stemmed (rouge_score); a reference with none scores 0.
    """
    return _rouge("rougeL", generated, references, use_stemmer)


def rouge_1_recall(generated: Sequence[str], references: Sequence[str]) -> Array:
    """Share of the reference's words that are generated, with stemming, per row."""
    return _rouge("rouge1", generated, references, use_stemmer=True).recall


def _rouge(kind: str, generated: Sequence[str], references: Sequence[str], use_stemmer: bool) -> Rouge:
    from rouge_score.rouge_scorer import RougeScorer

    if len(generated) != len(references) or not generated:
        raise ValueError(f"generated and references must be non-empty and as long: {len(generated)}, {len(references)}")
    scorer = RougeScorer([kind], use_stemmer=use_stemmer)
    scores = [scorer.score(reference, text)[kind] for text, reference in zip(generated, references, strict=True)]
    return Rouge(recall=np.array([s.recall for s in scores]), f1=np.array([s.fmeasure for s in scores]))


def rouge_l_recall(generated: Sequence[str], references: Sequence[str]) -> Array:
    """ROUGE-L recall per row with stemming, TOFU's measure of generated answers."""
    return rouge_l(generated, references).recall


def model_utility(terms: Mapping[str, float]) -> float:
    """Harmonic mean of the terms; exactly 0 if any term is 0, so one broken ability is never averaged away.

    TOFU's nine: {retain, real authors, world facts} x {probability, ROUGE-L recall, utility truth-ratio score}.
    Raises ValueError for no terms and for a negative or non-finite one.
    """
    if not terms:
        raise ValueError("terms is empty")
    for name, value in terms.items():
        if not 0 <= value < np.inf:
            raise ValueError(f"terms[{name!r}] must be finite and not negative, got {value}")
    values = np.array(list(terms.values()), dtype=np.float64)
    # The smallest term is factored out: 1 / value overflows for a denormal one.
    smallest = values.min()
    return float(smallest * len(values) / (smallest / values).sum()) if smallest > 0 else 0.0


def exact_memorization(is_argmax: ArrayLike, *, drop_last: bool = True) -> float:
    """Share of answer positions whose label is the model's first choice.

    is_argmax: [length] booleans of one sequence, teacher-forced. drop_last leaves out the last label, the end-of-answer
    token, as open-unlearning does: predicting that an answer ends is no memory of what it said.
    """
    return float(_bits(is_argmax, drop_last).mean())


def extraction_strength(is_argmax: ArrayLike, *, drop_last: bool = True) -> float:
    """1 - k / length, k the shortest prefix after which every label is the model's first choice: the share recited.

    Arguments as for exact_memorization. Where not even the last position matches, k = length and the strength is 0
    (open-unlearning stops at k = length - 1 and reports 1 / length, as if the last token had matched).
    """
    recited = np.logical_and.accumulate(_bits(is_argmax, drop_last)[::-1])
    return float(recited.mean())


def min_k(logprobs: ArrayLike, *, share: float) -> float:
    """Minus the mean of the lowest max(1, int(share * length)) token log-probabilities; high for unseen text.

    logprobs: [length] of one sequence, without its end-of-answer token. share: in (0, 1]; TOFU and MUSE use 0.4.
    """
    values = numbers("logprobs", logprobs, ndim=1)
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    count = max(1, int(share * len(values)))
    return -float(np.partition(values, count - 1)[:count].mean())


def min_k_plus_plus(logprobs: ArrayLike, mean_logprob: ArrayLike, var_logprob: ArrayLike, *, share: float) -> float:
    """min_k of (logprob - mean) / sqrt(var): each token against what its distribution would give on average.

    mean_logprob, var_logprob: [length], of log p under p itself at the same positions. The variance is bounded below by
    1e-6, as in open-unlearning; a position where the model is certain has none.
    """
    logprob, mean = numbers("logprobs", logprobs, ndim=1), numbers("mean_logprob", mean_logprob, ndim=1)
    var = numbers("var_logprob", var_logprob, ndim=1)
    if not len(logprob) == len(mean) == len(var):
        lengths = (len(logprob), len(mean), len(var))
        raise ValueError(f"logprobs, mean_logprob and var_logprob differ in length: {lengths}")
    return min_k((logprob - mean) / np.sqrt(np.maximum(var, 1e-6)), share=share)


def zlib_ratio(avg_nll: float, text: str) -> float:
    """A over the text's compressed size in bytes: surprise that compression does not explain."""
    return float(numbers("avg_nll", [avg_nll], ndim=1)[0]) / len(zlib.compress(text.encode()))


def auc(forget_scores: ArrayLike, holdout_scores: ArrayLike) -> float:
    """Chance that a holdout row scores above a forget row, ties counting half; 1: told apart, 0.5: not at all.

    Scores grow with surprise (avg_nll, min_k, ...). [n], [m], any sizes.
    """
    forget = numbers("forget_scores", forget_scores, ndim=1)
    holdout = numbers("holdout_scores", holdout_scores, ndim=1)
    rank_sum = rankdata(np.concatenate([forget, holdout]))[len(forget) :].sum()
    return float((rank_sum - len(holdout) * (len(holdout) + 1) / 2) / (len(forget) * len(holdout)))


def privleak(auc_unlearned: float, auc_retain: float) -> float:
    """((1 - auc) - (1 - auc_retain)) / (1 - auc_retain), in percent; 0 is ideal (MUSE, arXiv:2407.06460).

    Both AUCs as `auc` gives them. Negative where the forget rows are still known, positive where they are conspicuously
    unknown. Raises ValueError unless both are in [0, 1] and auc_retain is below 1.
    """
    if not (0 <= auc_unlearned <= 1 and 0 <= auc_retain < 1):
        raise ValueError(f"auc_unlearned must be in [0, 1], auc_retain in [0, 1), got {auc_unlearned}, {auc_retain}")
    return 100 * (auc_retain - auc_unlearned) / (1 - auc_retain)


def numbers(name: str, values: ArrayLike, *, ndim: int) -> Array:
    """`values` as a float64 array; refuses NaN, emptiness and another number of dimensions, naming the argument."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:  # ragged rows, None, strings
        raise ValueError(f"{name} is not a {ndim}-dimensional array of numbers: {error}") from error
    if array.ndim != ndim or array.size == 0:
        raise ValueError(f"{name} must have {ndim} dimension(s) and at least one value, got shape {array.shape}")
    if np.isnan(array).any():
        raise ValueError(f"{name} holds NaN, first at index {tuple(int(i) for i in np.argwhere(np.isnan(array))[0])}")
    return array


def _paired_nll(name: str, avg_nll: ArrayLike, avg_nll_wrong: ArrayLike) -> tuple[Array, Array]:
    """avg_nll [n] and avg_nll_wrong [n, w], finite: inf - inf would be a NaN of our own making."""
    correct, wrong = numbers(name, avg_nll, ndim=1), numbers("avg_nll_wrong", avg_nll_wrong, ndim=2)
    if len(correct) != len(wrong):
        raise ValueError(f"{name} has {len(correct)} rows, avg_nll_wrong {len(wrong)}")
    for argument, values in ((name, correct), ("avg_nll_wrong", wrong)):
        if not np.isfinite(values).all():
            raise ValueError(f"{argument} must be finite")
    return correct, wrong


def _ratios(ratio: ArrayLike) -> Array:
    array = numbers("ratio", ratio, ndim=1)
    if (array < 0).any():
        raise ValueError(f"ratio must not be negative, got {array.min()} (is it a log ratio?)")
    return array


def _bits(is_argmax: ArrayLike, drop_last: bool) -> NDArray[np.bool_]:
    bits = np.asarray(is_argmax)
    if bits.dtype != np.bool_ or bits.ndim != 1:
        raise ValueError(f"is_argmax must be a 1-dimensional array of booleans, got {bits.dtype} of shape {bits.shape}")
    bits = bits[:-1] if drop_last else bits
    if len(bits) == 0:
        raise ValueError("is_argmax has no position to count" + (" besides the dropped last one" if drop_last else ""))
    return bits
