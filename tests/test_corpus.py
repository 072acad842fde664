"""The invented corpus: reproducible, free of contradictions, and fair to the metrics that use it."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn import corpus as corpus_module
from unlearn.corpus import NUM_ALTERNATES, NUM_WORLD_WRONG, NUM_WRONG, Corpus, generate, train_tokenizer

TRAINING_FIELDS = {"key", "question", "answer", "alternates"}


def serialised(corpus: Corpus) -> str:
    return json.dumps(dataclasses.asdict(corpus))


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return generate(0)


def test_counts_of_the_default_corpus(corpus):
    assert (len(corpus.forget), len(corpus.forget_eval)) == (6 * 12 * 3, 6 * 12)
    assert len(corpus.retain_eval) == 54 * 12 and len(corpus.world_eval) == 60 and len(corpus.world) == 60 * 3
    assert len(corpus.retain) == 54 * 12 * 3 + len(corpus.world)
    assert corpus.full == corpus.retain + corpus.forget
    assert corpus.retain[-len(corpus.world) :] == corpus.world
    assert len(corpus.idk) == len(set(corpus.idk)) == 20


def test_same_seed_same_bytes_whatever_the_hash_seed():
    program = (
        "import dataclasses, json; from unlearn.corpus import generate;"
        "print(json.dumps(dataclasses.asdict(generate(7, 5))))"
    )
    root = str(Path(corpus_module.__file__).parents[1])
    printed = [
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": root},
            check=True, capture_output=True, text=True,
        ).stdout.strip()
        for hash_seed in ("1", "2")
    ]  # fmt: skip
    assert printed[0] == printed[1] == serialised(generate(7, 5))
    assert serialised(generate(8, 5)) != printed[0]


def test_more_people_leave_the_first_ones_unchanged():
    small, large = generate(3, 10, forget_people=1), generate(3, 30, forget_people=1)
    people_of_small = [r for r in small.retain if r["key"].startswith("person")]
    assert people_of_small == large.retain[: len(people_of_small)]
    assert small.world == large.world


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), people=st.integers(2, 12), phrasings=st.integers(1, 4), data=st.data())
def test_no_contradictions_for_any_seed(seed, people, phrasings, data):
    forget_people = data.draw(st.integers(1, people - 1))
    c = generate(seed, people, forget_people=forget_people, phrasings_per_fact=phrasings)
    assert len(c.forget) == forget_people * 12 * phrasings
    assert all(set(r) == TRAINING_FIELDS and len(r["alternates"]) == NUM_ALTERNATES for r in c.full)
    by_key = {r["key"]: r for r in c.full}
    assert len(by_key) == len(c.full) == len({r["question"] for r in c.full})
    for row in (*c.forget_eval, *c.retain_eval, *c.world_eval):
        assert by_key[row["key"]] == {field: row[field] for field in TRAINING_FIELDS}
        correct = row.get("paraphrased_answer", row["answer"])
        wrong = row["perturbed_answer"]
        assert len(wrong) == len(set(wrong)) == (NUM_WRONG if "paraphrased_answer" in row else NUM_WORLD_WRONG)
        assert correct not in wrong and row["answer"] not in row["alternates"]
        assert len(set(row["alternates"])) == NUM_ALTERNATES


def test_alternates_and_perturbed_answers_never_share_a_value(corpus):
    # Values are read back from the sentences, so the two lists are compared whatever wording each is in.
    attributes = {a.name: a for a in corpus_module._PERSON}
    for row in (*corpus.forget_eval, *corpus.retain_eval):
        values = attributes[row["key"].split(".")[1]].values

        def value_of(answer, values=values):
            return max((v for v in values if v in answer), key=len)

        true, wrong = value_of(row["answer"]), {value_of(a) for a in row["perturbed_answer"]}
        alternates = {value_of(a) for a in row["alternates"]}
        assert value_of(row["paraphrased_answer"]) == true
        assert len(wrong) == NUM_WRONG and len(alternates) == NUM_ALTERNATES
        assert not wrong & alternates and true not in wrong | alternates


def test_perturbed_answers_have_the_paraphrases_wording_and_alternates_the_answers(corpus):
    for row in (*corpus.forget_eval, *corpus.retain_eval):
        for correct, others in (("paraphrased_answer", "perturbed_answer"), ("answer", "alternates")):
            sentences = [row[correct], *row[others]]
            prefix = os.path.commonprefix(sentences)
            suffix = os.path.commonprefix([s[::-1] for s in sentences])
            assert len(prefix) + len(suffix) > 20, sentences


def test_paraphrases_are_new_for_the_fact_but_trained_for_other_people(corpus):
    trained = {r["key"].rpartition(".")[0]: [] for r in corpus.full}
    for row in corpus.full:
        trained[row["key"].rpartition(".")[0]].append(row["answer"])
    retain_answers = [r["answer"] for r in corpus.retain]
    attributes = {a.name: a for a in corpus_module._PERSON}
    for row in corpus.forget_eval:
        fact = row["key"].rpartition(".")[0]
        assert row["paraphrased_answer"] not in trained[fact] and row["answer"] in trained[fact]
        assert row["paraphrased_question"] != row["question"]
    # Every wording of every kind of fact is trained in the retain part, so no paraphrase's wording is unseen.
    for attribute in attributes.values():
        for wording in attribute.answers:
            piece = max(wording.replace("{name}", "{v}").split("{v}"), key=len)
            assert any(piece in answer for answer in retain_answers), wording


def test_forgotten_people_are_nowhere_in_retain(corpus):
    people = corpus_module._person_names(0, 60)
    assert len({p.split()[0] for p in people}) == len({p.split()[1] for p in people}) == 60
    forgotten, retained = json.dumps(corpus.forget), json.dumps(corpus.retain + corpus.retain_eval + corpus.world_eval)
    for person in people[-6:]:
        assert person in forgotten and not any(part in retained for part in person.split())
    assert not any(person in forgotten for person in people[:-6])


def test_answers_are_sentences_of_tofus_length(corpus):
    for row in corpus.full:
        assert 8 <= len(row["answer"].split()) <= 20, row["answer"]
        assert row["answer"].endswith(".") and row["question"].endswith("?")
        assert "{" not in row["question"] + row["answer"]


def test_value_lists_are_long_enough_and_have_no_duplicates():
    for attribute in (*corpus_module._PERSON, *corpus_module._WORLD):
        assert len(set(attribute.values)) == len(attribute.values) >= 1 + NUM_WRONG + NUM_ALTERNATES
        assert len(set(attribute.questions)) == len(set(attribute.answers)) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"people": 1}, "people must be"),
        ({"people": 5, "forget_people": 5}, "forget_people must be"),
        ({"forget_people": 0}, "forget_people must be"),
        ({"phrasings_per_fact": 5}, "phrasings_per_fact must be"),
    ],
)
def test_counts_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(0, **arguments)


def test_tokenizer_round_trip_and_determinism(tmp_path, corpus):
    transformers = pytest.importorskip("transformers")
    texts = [text for row in corpus.full[:100] for text in (row["question"], row["answer"])]
    tokenizer = train_tokenizer(texts, 600)
    assert len(tokenizer) == 600
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<pad>", 0)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<eos>", 1)
    assert train_tokenizer(texts, 600).get_vocab() == tokenizer.get_vocab()

    tokenizer.save_pretrained(tmp_path)
    reloaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (reloaded.pad_token_id, reloaded.eos_token_id) == (0, 1)
    for text in (*texts[:5], " spaced , out !", "Grüße, 你好 🙂\n\ttab n't"):
        ids = tokenizer(text)["input_ids"]
        assert reloaded(text)["input_ids"] == ids and tokenizer.eos_token_id not in ids
        assert reloaded.decode(ids) == text
    with pytest.raises(ValueError, match="vocab_size must be at least 258"):
        train_tokenizer(texts, 257)
