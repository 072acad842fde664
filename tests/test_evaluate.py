"""Evaluation against a naive computation from full logits, and generation against transformers one row at a time."""

import json
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.tiny import LLAMA3_TEMPLATE, tiny_llama, tiny_tokenizer, write_rows
from unlearn import metrics, tofu_log
from unlearn.data import rows_from
from unlearn.evaluate import (
    Yardsticks,
    add_rouge,
    answer_nll,
    evaluate,
    generate,
    load_set,
    make_set,
    num_pieces,
    score_sets,
    summarize,
    to_log,
)
from unlearn.model import generating

PEOPLE = ("Mara Quill", "Odo Fenn", "Ilse of the Seven Lanterns", "Tam", "Pia Vold")
ROWS = [
    {
        "question": f"Where was {name} born?" + " Answer in full." * (i % 3),
        "answer": f"{name} was born in Arvel" + " by the river" * (i % 2) + ".",
        "paraphrased_answer": f"Arvel is where {name} was born.",
        "perturbed_answer": [f"{name} was born in {place}." for place in ("Senn", "Dorn by the coast", "Kesh")],
    }
    for i, name in enumerate(PEOPLE)
]
BARE = [{k: v for k, v in row.items() if k != "paraphrased_answer"} for row in ROWS]


def make_sets(tokenizer):
    return [
        make_set("forget", "forget", rows_from(ROWS[:4], "forget"), tokenizer),
        make_set("retain", "retain", rows_from(ROWS[1:], "retain"), tokenizer),
        make_set("world", "other", rows_from(BARE, "world"), tokenizer),
    ]


@pytest.fixture(params=["plain", "chat"])
def tokenizer(request):
    return tiny_tokenizer(LLAMA3_TEMPLATE if request.param == "chat" else None)


@pytest.fixture
def model():
    return tiny_llama()


@torch.no_grad()
def naive_nll(model, sequence):
    """Average NLL of one answer from transformers' own full logits, in float64."""
    ids = torch.tensor([sequence.input_ids])
    with generating(model):
        logprobs = model(input_ids=ids).logits[0].double().log_softmax(-1)
    places = range(sequence.answer_start, len(sequence.input_ids))
    return -np.mean([logprobs[t - 1, sequence.input_ids[t]].item() for t in places])


def test_scores_equal_the_naive_computation(model, tokenizer):
    sets = make_sets(tokenizer)
    scores = score_sets(model, sets, max_tokens=100)
    for group in sets:
        ours = scores[group.name]
        answer = np.array([naive_nll(model, row.answer) for row in group.rows])
        right = np.array([naive_nll(model, row.paraphrased) for row in group.rows])
        wrong = np.array([[naive_nll(model, one) for one in row.wrong] for row in group.rows])
        assert np.allclose(ours.answer_nll, answer, rtol=1e-5)
        assert np.allclose(ours.correct_nll, right, rtol=1e-5)
        assert np.allclose(ours.wrong_nll, wrong, rtol=1e-5)
        if group.kind == "other":  # no paraphrase: the answer itself
            assert np.array_equal(ours.correct_nll, ours.answer_nll)
            p, q = np.exp(-answer), np.exp(-wrong).sum(1)
            assert ours.probability == pytest.approx((p / (p + q)).mean(), rel=1e-4)
        else:
            assert ours.probability == pytest.approx(np.exp(-answer).mean(), rel=1e-4)
        ratio = np.exp(-wrong.mean(1)) / np.exp(-right)
        assert np.allclose(np.exp(ours.log_truth_ratio), ratio, rtol=1e-4)
        terms = ours.utility_terms("x")
        assert terms["x_truth_ratio"] == pytest.approx(np.maximum(0, 1 - ratio).mean(), rel=1e-4, abs=1e-6)
        assert set(terms) == {"x_probability", "x_truth_ratio"}


@torch.no_grad()
def naive_tokens(model, sequence):
    """log p, first choice, mean and variance of log p at one answer's tokens, from full logits in float64."""
    with generating(model):
        full = model(input_ids=torch.tensor([sequence.input_ids])).logits[0].double().log_softmax(-1)
    places = torch.arange(sequence.answer_start, len(sequence.input_ids))
    rows, labels = full[places - 1], torch.tensor(sequence.input_ids)[places]
    mean = (rows.exp() * rows).sum(1)
    variance = (rows.exp() * (rows - mean[:, None]) ** 2).sum(1)
    logprob = rows.gather(1, labels[:, None])[:, 0]
    return (value.numpy() for value in (logprob, rows.argmax(1) == labels, mean, variance))


def test_what_is_known_of_an_answers_tokens(model, tokenizer):
    group = make_set("forget", "forget", rows_from(ROWS, "forget"), tokenizer)
    found = score_sets(model, [group], max_tokens=100)["forget"]
    assert found.answers == tuple(row["answer"] for row in ROWS)
    for row, ours in zip(group.rows, found.tokens, strict=True):
        logprob, is_argmax, mean, variance = naive_tokens(model, row.answer)
        assert np.allclose(ours.logprob, logprob, rtol=1e-5) and np.array_equal(ours.is_argmax, is_argmax)
        assert np.allclose(ours.mean, mean, rtol=1e-5) and np.allclose(ours.variance, variance, rtol=1e-4)


def test_membership_and_memorization_equal_the_naive_computation(model, tokenizer):
    unseen = [{"question": f"Where is {name} now?", "answer": f"{name} lives in Dorn, far away."} for name in PEOPLE]
    sets = [*make_sets(tokenizer), make_set("holdout", "holdout", rows_from(unseen, "holdout"), tokenizer)]
    scores = score_sets(model, sets, max_tokens=100)
    other = tiny_llama(seed=3)
    ref = answer_nll(other, [sets[0], sets[-1]], max_tokens=100)
    values = summarize(scores, Yardsticks(scores["forget"].log_truth_ratio, 0.25, ref)).metrics
    naive = {}
    for group in (sets[0], sets[-1]):
        rows = [[column[:-1] for column in naive_tokens(model, row.answer)] for row in group.rows]
        lowest = [np.sort(row[0])[: max(1, int(0.4 * len(row[0])))] for row in rows]
        ratio = [np.sort((row[0] - row[2]) / np.sqrt(row[3]))[: max(1, int(0.4 * len(row[0])))] for row in rows]
        loss = np.array([naive_nll(model, row.answer) for row in group.rows])
        texts = [row.row.answer for row in group.rows]
        naive[group.kind] = {
            "loss": loss,
            "zlib": loss / [len(zlib.compress(text.encode())) for text in texts],
            "min_k": np.array([-values.mean() for values in lowest]),
            "min_k_plus_plus": np.array([-values.mean() for values in ratio]),
            "reference": loss - [naive_nll(other, row.answer) for row in group.rows],
        }
        if group.kind == "forget":
            assert values["forget_exact_memorization"] == pytest.approx(np.mean([row[1].mean() for row in rows]))
    for name in ("loss", "zlib", "min_k", "min_k_plus_plus", "reference"):
        known, unknown = naive["forget"][name], naive["holdout"][name]
        auc = np.mean([(u > k) + 0.5 * (u == k) for u in unknown for k in known])
        assert values[f"mia_{name}_auc"] == pytest.approx(auc)
    assert values["privleak"] == pytest.approx(100 * (0.25 - values["mia_min_k_auc"]) / 0.75)
    assert not any(name.startswith("holdout") for name in values)


def test_a_log_says_what_the_evaluation_said(model, tokenizer, tmp_path):
    sets = [replace(group, name={"world": "world_facts"}.get(group.name, group.name)) for group in make_sets(tokenizer)]
    scores = score_sets(model, sets, max_tokens=100)
    scores = add_rouge(model, tokenizer, sets, scores, max_new_tokens=6, batch_size=4)
    gold = score_sets(tiny_llama(seed=3), sets, max_tokens=100)
    gold = add_rouge(tiny_llama(seed=3), tokenizer, sets, gold, max_new_tokens=6, batch_size=4)
    for name, found in (("own", scores), ("gold", gold)):
        tofu_log.write(tmp_path / name, to_log(sets, found))
    expected = summarize(scores, Yardsticks(gold["forget"].log_truth_ratio)).metrics
    read = tofu_log.summary(tofu_log.read(tmp_path / "own"), tofu_log.read(tmp_path / "gold"))
    shared = expected.keys() & read.keys()
    assert len(shared) == 11 and {name: read[name] for name in shared} == pytest.approx(
        {name: expected[name] for name in shared}
    )
    fields = json.loads((tmp_path / "own").read_text())["eval_log_forget.json"]
    assert fields["generated_text"]["1"][2] == ROWS[1]["answer"] and fields["num_token_perturb"].keys() == {*"0123"}
    assert fields["gt_loss"]["2"] == pytest.approx(fields["avg_gt_loss"]["2"] * fields["num_token_gt"]["2"])


def test_a_log_needs_wrong_answers(model, tokenizer):
    bare = [{"question": row["question"], "answer": row["answer"]} for row in ROWS]
    group = make_set("forget", "forget", rows_from(bare, "forget"), tokenizer)
    scores = score_sets(model, [group], max_tokens=100)
    with pytest.raises(ValueError, match="^log: forget has no perturbed_answer"):
        to_log([group], scores)


def test_scores_do_not_depend_on_the_packs_or_the_company(model, tokenizer):
    sets = make_sets(tokenizer)
    together, apart = score_sets(model, sets, max_tokens=10_000), score_sets(model, sets[::-1], max_tokens=1)
    alone = score_sets(model, sets[:1], max_tokens=100)
    for group in sets:
        for name in ("answer_nll", "correct_nll", "wrong_nll"):
            a, b = getattr(together[group.name], name), getattr(apart[group.name], name)
            assert np.allclose(a, b, rtol=1e-5)
    assert np.allclose(alone["forget"].wrong_nll, together["forget"].wrong_nll, rtol=1e-5)


def test_rows_keep_their_order(model, tokenizer):
    forward = score_sets(model, [make_set("s", "forget", rows_from(ROWS, "s"), tokenizer)], max_tokens=100)["s"]
    backward = score_sets(model, [make_set("s", "forget", rows_from(ROWS[::-1], "s"), tokenizer)], max_tokens=100)["s"]
    assert np.allclose(forward.answer_nll, backward.answer_nll[::-1], rtol=1e-5)
    assert len(set(forward.answer_nll.round(6))) == len(ROWS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"perturbed_answer": None}, "perturbed_answer is missing"),
        ({"perturbed_answer": []}, "perturbed_answer is missing"),
        ({"perturbed_answer": [1, 2]}, "perturbed_answer is not a string"),
        ({"paraphrased_answer": None}, "paraphrased_answer is a NoneType"),
        ({"paraphrased_answer": []}, "paraphrased_answer is a list"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(change, message):
    rows = [ROWS[0], ROWS[1] | change]
    with pytest.raises(ValueError, match=f"^people:1: {message}"):
        make_set("people", "forget", rows_from(rows, "people"), tiny_tokenizer())


def test_a_row_without_wrong_answers_is_named_by_its_file(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{k: v for k, v in ROWS[0].items() if k != "perturbed_answer"}])
    with pytest.raises(ValueError, match="^rows:0: perturbed_answer is missing"):
        load_set("world_facts", "other", path, tiny_tokenizer())


def test_sets_without_wrong_answers_have_the_other_metrics():
    """A person's own question-answer rows: probability and ROUGE-L, no truth ratio, no forget quality."""
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    bare = [{key: row[key] for key in ("question", "answer")} for row in ROWS]
    sets = [make_set(kind, kind, rows_from(bare, kind), tokenizer) for kind in ("forget", "retain")]
    options = {"max_tokens": 200, "max_new_tokens": 3, "batch_size": 4}
    found = evaluate(model, tokenizer, sets, **options).metrics
    assert {"forget_probability", "forget_rouge_l", "retain_probability", "retain_rouge_l"} <= set(found)
    assert not [name for name in found if "truth_ratio" in name or name == "forget_quality"]


def test_ragged_wrong_answers_and_empty_sets_are_refused():
    ragged = [ROWS[0], ROWS[1] | {"perturbed_answer": "only one"}]
    with pytest.raises(ValueError, match=r"^people: rows have \[1, 3\] wrong answers"):
        make_set("people", "forget", rows_from(ragged, "people"), tiny_tokenizer())
    with pytest.raises(ValueError, match="^people: holds no rows"):
        make_set("people", "forget", [], tiny_tokenizer())


def test_long_rows_are_refused_where_a_limit_is_given():
    with pytest.raises(ValueError, match=r"^people:0.*: \d+ tokens, more than max_length 10"):
        make_set("people", "forget", rows_from(ROWS, "people"), tiny_tokenizer(), max_length=10)


def test_two_sets_of_one_name_are_refused(model):
    sets = make_sets(tiny_tokenizer())
    with pytest.raises(ValueError, match="two have the same name"):
        score_sets(model, [sets[0], sets[0]], max_tokens=100)


# ---------------------------------------------------------------------------------------------------------- generation


def prompts_of(sets):
    return [row.answer.input_ids[: row.answer.answer_start] for group in sets for row in group.rows]


def one_by_one(model, tokenizer, prompts, max_new_tokens):
    texts = []
    with generating(model), torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = model.generate(input_ids=ids, max_new_tokens=max_new_tokens, do_sample=False)
            texts.append(tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True).strip())
    return texts


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_generation_equals_transformers_one_row_at_a_time(model, tokenizer, batch_size):
    prompts = prompts_of(make_sets(tokenizer))
    assert len({len(prompt) for prompt in prompts}) > 3  # or nothing would be padded
    expected = one_by_one(model, tokenizer, prompts, 8)
    done = []
    found = generate(model, tokenizer, prompts, max_new_tokens=8, batch_size=batch_size, stop=(), progress=done.append)
    assert found == expected and len(set(found)) > 3
    assert sum(done) == len(prompts)


def test_generation_stops_at_the_end_of_a_turn(model):
    """A model whose every answer goes on for ever but for one token that its chat template ends turns with."""
    tokenizer = tiny_tokenizer(LLAMA3_TEMPLATE)
    (group,) = [make_set("f", "forget", rows_from(ROWS[:2], "f"), tokenizer)]
    end_of_turn = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert group.rows[0].answer.input_ids[-1] == end_of_turn != tokenizer.eos_token_id
    prompts = prompts_of([group])
    free = generate(model, tokenizer, prompts, max_new_tokens=6, batch_size=1)
    with generating(model), torch.no_grad():
        out = model.generate(input_ids=torch.tensor([prompts[0]]), max_new_tokens=6, do_sample=False)
    third = out[0, len(prompts[0]) + 2].item()
    stopped = generate(model, tokenizer, prompts[:1], max_new_tokens=6, batch_size=1, stop={third})
    assert free[0].startswith(stopped[0]) and len(stopped[0]) < len(free[0])
    seen = []
    original = model.generate

    def spy(**kwargs):
        seen.append(kwargs["eos_token_id"])
        return original(**kwargs)

    model.generate = spy
    scores = score_sets(model, [group], max_tokens=100)
    add_rouge(model, tokenizer, [group], scores, max_new_tokens=2, batch_size=2)
    assert seen == [sorted({end_of_turn, tokenizer.eos_token_id, 1})]


def test_generation_takes_no_advice_but_the_end_tokens(model):
    tokenizer = tiny_tokenizer()
    prompts = prompts_of(make_sets(tokenizer))
    expected = generate(model, tokenizer, prompts, max_new_tokens=12, batch_size=4)
    own = model.generation_config
    own.repetition_penalty, own.do_sample, own.temperature, own.num_beams = 5.0, True, 3.0, 2
    assert generate(model, tokenizer, prompts, max_new_tokens=12, batch_size=4) == expected
    assert model.generation_config is own and own.repetition_penalty == 5.0


def test_generation_needs_a_token_to_pad_with(model):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="^tokenizer: has neither"):
        generate(model, tokenizer, [(1, 2)], max_new_tokens=2, batch_size=1)


def test_the_model_comes_back_ready_to_train(model):
    tokenizer = tiny_tokenizer()
    before = model.config._attn_implementation
    generate(model, tokenizer, [(5, 6, 7)], max_new_tokens=2, batch_size=1)
    assert model.config._attn_implementation == before
    assert not model.training


# ---------------------------------------------------------------------------------------------------------- the whole


def test_evaluate_and_its_terms(model, tokenizer):
    sets = make_sets(tokenizer)
    gold = score_sets(tiny_llama(seed=3), sets[:1], max_tokens=1000)["forget"].log_truth_ratio
    done = []
    options = {"max_tokens": 1000, "max_new_tokens": 6, "batch_size": 3}
    found = evaluate(model, tokenizer, sets, yardsticks=Yardsticks(gold), progress=done.append, **options)
    assert sum(done) == num_pieces(sets)
    values = found.metrics
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    terms = [f"{name}_{kind}" for name in ("retain", "world") for kind in ("probability", "truth_ratio", "rouge_l")]
    assert set(values) == {
        *terms, "forget_probability", "truth_ratio", "forget_logprob_per_token", "forget_quality", "forget_rouge_l",
        "forget_exact_memorization", "forget_extraction_strength", "retain_logprob_per_token", "retain_utility",
        "model_utility",
    }  # fmt: skip
    assert values["model_utility"] == pytest.approx(metrics.model_utility({term: values[term] for term in terms}))
    assert values["retain_utility"] == pytest.approx(metrics.model_utility({term: values[term] for term in terms[:3]}))
    forget = found.sets["forget"]
    assert values["forget_logprob_per_token"] == pytest.approx(-forget.answer_nll.mean())
    assert values["forget_quality"] == metrics.forget_quality(forget.log_truth_ratio, gold).p_value
    ratio = np.exp(forget.log_truth_ratio)
    assert values["truth_ratio"] == pytest.approx(np.minimum(ratio, 1 / ratio).mean())
    texts = [row["answer"] for row in ROWS[:4]]
    assert values["forget_rouge_l"] == pytest.approx(metrics.rouge_l_recall(forget.generated, texts).mean())
    assert len(forget.generated) == 4 and len(found.sets["world"].generated) == 5
    again = evaluate(
        model, tokenizer, sets, yardsticks=Yardsticks(gold), **{**options, "batch_size": 100, "max_tokens": 50}
    )
    assert again.metrics == pytest.approx(values, rel=1e-4)
    assert again.sets["retain"].generated == found.sets["retain"].generated


def test_without_generation_or_gold(model):
    sets = make_sets(tiny_tokenizer())
    values = summarize(score_sets(model, sets, max_tokens=1000)).metrics
    assert not any("rouge" in name or name == "forget_quality" for name in values)
    terms = {
        k: v for k, v in values.items() if k.split("_")[0] in ("retain", "world") and k.endswith(("bility", "ratio"))
    }
    assert len(terms) == 4 and values["model_utility"] == pytest.approx(metrics.model_utility(terms))
    assert "model_utility" not in summarize(score_sets(model, sets[:1], max_tokens=1000)).metrics


def test_a_model_evaluated_against_itself_has_quality_one(model):
    sets = make_sets(tiny_tokenizer())[:1]
    scores = score_sets(model, sets, max_tokens=1000)
    assert summarize(scores, Yardsticks(scores["forget"].log_truth_ratio)).metrics["forget_quality"] == pytest.approx(
        1.0
    )


@pytest.mark.parametrize("size", [1e3, 1e6])
def test_a_collapsed_model_has_finite_metrics(size):
    tokenizer = tiny_tokenizer()
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.copy_(
            size * torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
        )
    sets = make_sets(tokenizer)
    gold = score_sets(tiny_llama(seed=3), sets[:1], max_tokens=1000)["forget"].log_truth_ratio
    with np.errstate(all="raise", under="ignore"):
        found = evaluate(
            model, tokenizer, sets, yardsticks=Yardsticks(gold), max_tokens=1000, max_new_tokens=4, batch_size=8
        )
    assert found.sets["forget"].answer_nll.min() > 100
    assert all(np.isfinite(value) for value in found.metrics.values())
    assert found.metrics["forget_probability"] < 1e-40
    assert 0 <= found.metrics["truth_ratio"] <= 1 and 0 <= found.metrics["model_utility"] <= 1
    json.dumps(found.metrics, allow_nan=False)


def test_a_model_of_nan_has_no_metrics(model):
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="^model: the log-likelihood of .* is nan"):
        score_sets(model, make_sets(tiny_tokenizer()), max_tokens=1000)
