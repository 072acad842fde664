"""Metrics against published values (the shipped TOFU logs), their bounds and their limits."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn import metrics, tofu_log

LOGS = Path(__file__).resolve().parents[2] / "shared" / "data" / "tofu_logs"
needs_logs = pytest.mark.skipif(not LOGS.is_dir(), reason=f"the TOFU evaluation logs are not at {LOGS}")
NAN = float("nan")

nll = st.floats(0, 2000)
row = st.tuples(nll, st.lists(nll, min_size=5, max_size=5))
rows = st.lists(row, min_size=1, max_size=20)


@pytest.fixture(scope="module")
def logs() -> dict[str, dict]:
    return {name: tofu_log.read(LOGS / f"llama2-7b_{name}_wd0.01.json") for name in ("full", "retain90")}


@needs_logs
@pytest.mark.parametrize(
    ("name", "mean", "digits", "utility"),
    [
        ("full", "geometric", 5, 0.62268),
        ("full", "arithmetic", 5, 0.58589),
        ("retain90", "geometric", 5, 0.61374),
        ("retain90", "arithmetic", 5, 0.57524),
    ],
)
def test_model_utility_of_the_published_logs(logs, name, mean, digits, utility):
    assert round(tofu_log.metrics_of(logs[name], mean=mean).model_utility, digits) == utility


@needs_logs
def test_the_nine_terms_of_the_published_log(logs):
    terms = tofu_log.metrics_of(logs["full"]).terms
    expected = {"retain": (0.9857, 0.9895, 0.4747), "real_authors": (0.9330, 0.4555, 0.5962)}
    expected["world_facts"] = (0.8825, 0.4186, 0.5390)
    for name, values in expected.items():
        assert tuple(round(terms[f"{name}_{kind}"], 4) for kind in ("rouge_l", "probability", "truth_ratio")) == values
    assert len(terms) == 9


@needs_logs
def test_forget_quality_of_the_published_logs(logs):
    full, retain = (tofu_log.metrics_of(logs[name]).log_truth_ratio for name in ("full", "retain90"))
    assert len(full) == len(retain) == 300
    test = metrics.forget_quality(full, retain)
    assert f"{test.p_value:.3e}" == "1.834e-21" and f"{test.statistic:.4f}" == "0.3967"
    assert metrics.forget_quality(np.exp(full), np.exp(retain)) == test
    assert metrics.forget_quality(full, full) == (1.0, 0.0)


@needs_logs
def test_recorded_truth_ratios_and_rouge_are_reproduced_row_by_row(logs):
    for sets in logs.values():
        for fields in sets.values():
            ours = metrics.truth_ratio(fields["avg_paraphrased_loss"], fields["average_perturb_loss"])
            np.testing.assert_allclose(ours, fields["truth_ratio"], rtol=2e-6)  # the log's values are float32
    fields = logs["full"]["forget"]
    _, generated, references = zip(*fields["generated_text"], strict=True)
    np.testing.assert_allclose(
        metrics.rouge_l_recall(generated[:60], references[:60]), fields["rougeL_recall"][:60], rtol=1e-12
    )


@needs_logs
def test_log_fields_may_be_lists_and_rows_come_in_index_order(tmp_path, logs):
    source = json.loads((LOGS / "llama2-7b_full_wd0.01.json").read_text())
    as_lists, shuffled = {}, {}
    for file, fields in source.items():
        as_lists[file] = {field: list(rows.values()) for field, rows in fields.items()}
        shuffled[file] = {field: dict(reversed(rows.items())) for field, rows in fields.items()}
    for log in (as_lists, shuffled):
        (tmp_path / "log.json").write_text(json.dumps(log))
        assert tofu_log.read(tmp_path / "log.json") == logs["full"]


def test_a_log_of_lists_says_what_one_of_dictionaries_says(tmp_path):
    """Some codes write a list per field, the wrong answers' losses as lists in it; no published log is needed here."""
    random = np.random.default_rng(0)
    lists = {}
    for file in tofu_log.SETS.values():
        wrong = random.uniform(2, 5, (12, 3)).tolist()
        own, right, rouge = (random.uniform(*span, 12).tolist() for span in ((0, 2), (1, 4), (0, 1)))
        lists[file] = {"avg_gt_loss": own, "avg_paraphrased_loss": right, "average_perturb_loss": wrong,
                       "rougeL_recall": rouge}  # fmt: skip
    dictionaries = {
        file: {field: {str(i): values[i] for i in reversed(range(12))} for field, values in fields.items()}
        for file, fields in lists.items()
    }
    read = []
    for name, log in (("lists", lists), ("dictionaries", dictionaries)):
        (tmp_path / name).write_text(json.dumps(log))
        read.append(tofu_log.read(tmp_path / name))
    assert read[0] == read[1] and read[0]["forget"] == lists["eval_log_forget.json"]
    found = [tofu_log.summary(log, read[0]) for log in read]
    assert found[0] == found[1] and found[0]["forget_quality"] == pytest.approx(1.0)
    fields = lists["eval_log_forget.json"]
    ratio = np.exp(np.array(fields["avg_paraphrased_loss"]) - np.mean(fields["average_perturb_loss"], axis=1))
    assert found[0]["truth_ratio"] == pytest.approx(np.minimum(ratio, 1 / ratio).mean())


@pytest.mark.parametrize("text", ["{}", "[1]", "not json", '{"eval_log.json": 3}'])
def test_another_file_is_refused_by_name(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="other.json is not a TOFU evaluation log"):
        tofu_log.read(path)


@given(rows)
def test_truth_ratio_properties(data):
    correct, wrong = [c for c, _ in data], [w for _, w in data]
    geometric = metrics.log_truth_ratio(correct, wrong)
    arithmetic = metrics.log_truth_ratio(correct, wrong, mean="arithmetic")
    assert np.isfinite(geometric).all() and np.isfinite(arithmetic).all()
    assert (arithmetic >= geometric - 1e-9 * (1 + np.abs(geometric))).all()  # arithmetic mean >= geometric mean
    reordered = [w[::-1] for w in wrong]
    np.testing.assert_allclose(metrics.log_truth_ratio(correct, reordered), geometric, rtol=1e-9, atol=1e-9)
    ratio = metrics.truth_ratio(correct, wrong)
    assert 0 <= metrics.forget_truth_ratio_score(ratio) <= 1
    assert 0 <= metrics.utility_truth_ratio_score(ratio) <= 1


def test_truth_ratio_scores_at_known_points():
    equal = metrics.truth_ratio([3.0], [[3.0] * 5])
    assert equal == 1 and metrics.forget_truth_ratio_score(equal) == 1 and metrics.utility_truth_ratio_score(equal) == 0
    double = metrics.truth_ratio([1 + math.log(2)], [[1.0] * 3])
    assert metrics.forget_truth_ratio_score(double) == pytest.approx(0.5)
    half = metrics.truth_ratio([1.0], [[1 + math.log(2)] * 3], mean="arithmetic")
    assert metrics.forget_truth_ratio_score(half) == pytest.approx(0.5)
    assert metrics.utility_truth_ratio_score(half) == pytest.approx(0.5)


@pytest.mark.filterwarnings("error")
def test_collapsed_models_give_right_values_without_warnings():
    assert metrics.probability([800.0, np.inf]).tolist() == [0.0, 0.0]
    correct, wrong = [900.0, 100.0], [[100.0] * 5, [900.0] * 5]
    assert metrics.log_truth_ratio(correct, wrong).tolist() == [800, -800]
    ratio = metrics.truth_ratio(correct, wrong)
    assert ratio.tolist() == [np.inf, 0.0]
    assert metrics.forget_truth_ratio_score(ratio) == 0 and metrics.utility_truth_ratio_score(ratio) == 0.5
    assert metrics.normalized_probability([900.0], [[900.0, 900.0, 900.0]]) == pytest.approx(0.25)
    # Infinite ratios still rank: the test equals that of the logs, which tell the same order.
    logs = np.array([800.0, -3.0, 0.5, 1.0])
    with np.errstate(over="ignore"):
        ratios = np.exp(logs)
    retain = [0.1, 0.2, 0.3]
    assert metrics.forget_quality(ratios, retain) == metrics.forget_quality(logs, np.log(retain))


@given(rows)
def test_probabilities_are_probabilities(data):
    correct, wrong = np.array([c for c, _ in data]), np.array([w for _, w in data])
    normalized = metrics.normalized_probability(correct, wrong)
    assert normalized.min() >= 0 and normalized.max() <= 1
    # The shares of all six answers add up to one.
    everything = np.column_stack([correct, wrong])
    total = sum(metrics.normalized_probability(everything[:, i], np.delete(everything, i, axis=1)) for i in range(6))
    np.testing.assert_allclose(total, 1.0, rtol=1e-9)
    assert (metrics.probability(correct) <= 1).all()


@settings(deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=2, max_size=30), st.lists(st.floats(-50, 50), min_size=2, max_size=30))
def test_forget_quality_is_symmetric_and_a_probability(a, b):
    test = metrics.forget_quality(a, b)
    assert 0 <= test.p_value <= 1 and 0 <= test.statistic <= 1
    reverse = metrics.forget_quality(b, a)
    assert reverse.statistic == test.statistic and reverse.p_value == pytest.approx(test.p_value, rel=1e-9)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_model_utility_lies_between_smallest_and_largest(values):
    utility = metrics.model_utility({str(i): v for i, v in enumerate(values)})
    assert min(values) * (1 - 1e-12) <= utility <= max(values) * (1 + 1e-12)
    assert (utility == 0) == (min(values) == 0)


def test_model_utility_by_hand():
    assert metrics.model_utility({"a": 1.0, "b": 0.5, "c": 0.25}) == pytest.approx(3 / 7)
    assert metrics.model_utility({"a": 1.0, "b": 0.0}) == 0
    for bad in (NAN, -0.1, math.inf):
        with pytest.raises(ValueError, match="terms\\['b'\\]"):
            metrics.model_utility({"a": 1.0, "b": bad})
    with pytest.raises(ValueError, match="empty"):
        metrics.model_utility({})


def test_rouge_l_by_hand():
    scores = metrics.rouge_l(["the cat sat", "", "running quickly"], ["the black cat sat down", "a b", "he runs"])
    assert scores.recall == pytest.approx([3 / 5, 0, 1 / 2])  # stemming makes running and runs one word
    assert scores.f1 == pytest.approx([2 * 3 / (3 + 5), 0, 1 / 2])
    with pytest.raises(ValueError, match="as long: 1, 2"):
        metrics.rouge_l(["a"], ["a", "b"])


@pytest.mark.parametrize(
    ("bits", "memorization", "strength"),
    [
        ("1111", 1.0, 1.0),
        ("0000", 0.0, 0.0),
        ("1110", 0.75, 0.0),
        ("0001", 0.25, 0.25),
        ("1011", 0.75, 0.5),
    ],
)
@pytest.mark.parametrize("last", [True, False])
def test_memorization_by_hand(bits, memorization, strength, last):
    whole = [bit == "1" for bit in bits]
    for is_argmax, drop_last in ((whole, False), ([*whole, last], True)):
        assert metrics.exact_memorization(is_argmax, drop_last=drop_last) == memorization
        assert metrics.extraction_strength(is_argmax, drop_last=drop_last) == strength


@given(st.lists(st.booleans(), min_size=2, max_size=40))
def test_extraction_strength_is_its_definition_and_at_most_exact_memorization(bits):
    strength = metrics.extraction_strength(bits)
    label = bits[:-1]
    smallest = next(k for k in range(len(label) + 1) if all(label[k:]))
    assert strength == pytest.approx(1 - smallest / len(label))
    assert strength <= metrics.exact_memorization(bits)


def test_membership_scores_by_hand():
    logprobs = [-1.0, -5.0, -2.0, -3.0, -4.0]
    assert metrics.min_k(logprobs, share=0.4) == pytest.approx(4.5)
    assert metrics.min_k(logprobs, share=0.01) == pytest.approx(5.0)  # at least one token
    assert metrics.min_k(logprobs, share=1.0) == pytest.approx(3.0)
    assert metrics.min_k_plus_plus(logprobs, [-1.0] * 5, [4.0] * 5, share=0.4) == pytest.approx(1.75)
    assert math.isfinite(metrics.min_k_plus_plus([0.0], [0.0], [0.0], share=0.4))
    assert metrics.zlib_ratio(2.0, "a" * 1000) > metrics.zlib_ratio(2.0, "".join(map(chr, range(32, 127))))
    assert metrics.auc([1, 2, 3], [4, 5]) == 1 and metrics.auc([4, 5], [1, 2, 3]) == 0
    assert metrics.auc([1, 2], [1, 2]) == 0.5 and metrics.auc([1, 3], [2, 3]) == pytest.approx(2.5 / 4)
    assert metrics.privleak(0.5, 0.5) == 0 and metrics.privleak(1.0, 0.5) == -100 and metrics.privleak(0.0, 0.5) == 100
    with pytest.raises(ValueError, match="auc_retain"):
        metrics.privleak(0.5, 1.0)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: metrics.probability([1.0, NAN]), "avg_nll"),
        (lambda: metrics.normalized_probability([NAN], [[1.0]]), "avg_nll"),
        (lambda: metrics.normalized_probability([1.0], [[NAN]]), "avg_nll_wrong"),
        (lambda: metrics.truth_ratio([NAN], [[1.0]]), "avg_nll_correct"),
        (lambda: metrics.truth_ratio([1.0], [[2.0, NAN]]), "avg_nll_wrong"),
        (lambda: metrics.truth_ratio([math.inf], [[2.0]]), "avg_nll_correct must be finite"),
        (lambda: metrics.truth_ratio([1.0, 2.0], [[2.0]]), "avg_nll_correct has 2 rows"),
        (lambda: metrics.truth_ratio([1.0, 2.0], [[2.0], [1.0, 2.0]]), "avg_nll_wrong is not"),
        (lambda: metrics.truth_ratio([1.0], [[2.0]], mean="harmonic"), "mean"),
        (lambda: metrics.truth_ratio([], [[2.0]]), "avg_nll_correct"),
        (lambda: metrics.forget_truth_ratio_score([NAN]), "ratio"),
        (lambda: metrics.utility_truth_ratio_score([-1.0]), "ratio must not be negative"),
        (lambda: metrics.forget_quality([NAN], [1.0]), "ratio_unlearned"),
        (lambda: metrics.forget_quality([1.0], [NAN]), "ratio_retain"),
        (lambda: metrics.min_k([NAN], share=0.4), "logprobs"),
        (lambda: metrics.min_k([1.0], share=0.0), "share"),
        (lambda: metrics.min_k_plus_plus([1.0], [1.0], [NAN], share=0.4), "var_logprob"),
        (lambda: metrics.min_k_plus_plus([1.0], [1.0, 2.0], [1.0], share=0.4), "mean_logprob"),
        (lambda: metrics.zlib_ratio(NAN, "a"), "avg_nll"),
        (lambda: metrics.auc([1.0], [NAN]), "holdout_scores"),
        (lambda: metrics.privleak(NAN, 0.5), "auc_unlearned"),
        (lambda: metrics.exact_memorization([True]), "is_argmax"),
        (lambda: metrics.extraction_strength([0.5, 1.0]), "is_argmax"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, name):
    with pytest.raises(ValueError, match=name):
        call()
