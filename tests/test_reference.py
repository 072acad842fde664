"""The reference cache: the same bits back, or a refusal that says what differs."""

import dataclasses
import os
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken

from tests.families import VOCAB, family
from tests.tiny import CHATML_TEMPLATE, tiny_llama, tiny_tokenizer
from unlearn import reference
from unlearn.data import Item, Role, Sequence, collate
from unlearn.model import head_of, hidden_states, load_model, prepare
from unlearn.reference import HIDDEN_FILE, LOGPROB_FILE, ReferenceHidden, load_or_compute, score, tolerance
from unlearn_kernels import linear_kl

BUDGET = {"max_tokens": 40}


def sequences_of(count=6, seed=1):
    rng = random.Random(seed)
    made = []
    for number in range(count):
        ids = tuple(rng.randrange(2, VOCAB) for _ in range(rng.randint(4, 16)))
        made.append(Sequence(f"s{number}", ids, rng.randint(1, len(ids) - 1)))
    return made


def model_of(**config):
    return tiny_llama(vocab=VOCAB, **config)


def table(folder, model=None, tokenizer=None, sequences=None):
    return load_or_compute(
        model or model_of(), tokenizer or tiny_tokenizer(), sequences or sequences_of(), folder, **BUDGET
    )


def states(folder, model=None, tokenizer=None, sequences=None):
    return ReferenceHidden.load_or_compute(
        model or model_of(), tokenizer or tiny_tokenizer(), sequences or sequences_of(), folder, **BUDGET
    )


EITHER = pytest.mark.parametrize("function", [table, states])


def refused(function, *args, **kwargs):
    with pytest.raises(ValueError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert message.startswith("reference_cache: ") and message.endswith("delete it or give another --reference-cache")
    assert "\n" not in message and len(message) < 400
    return message


# ------------------------------------------------------------------------------------------------------------- scoring


def test_score_keeps_the_order_and_counts_progress():
    model, sequences, done = model_of(), sequences_of(9), []
    together = score(model, sequences, max_tokens=30, progress=done.append)
    assert sum(done) == 9 and len(done) > 2
    for sequence, value in zip(sequences, together, strict=True):
        assert value == pytest.approx(score(model, [sequence], max_tokens=30)[0], abs=1e-5)
    assert score(model, [], max_tokens=30) == []


def test_equal_sequences_are_scored_once():
    a, b = sequences_of(2)
    again = dataclasses.replace(a, key="another row")
    assert reference.unique([a, b, again, a]) == [a, b]


def test_tolerance_grows_with_the_root_of_the_length():
    values = tolerance([1, 4, 100], torch.float32)
    torch.testing.assert_close(values / values[0], torch.tensor([1.0, 2.0, 10.0], dtype=torch.float64))
    assert (tolerance([9], torch.bfloat16) > tolerance([9], torch.float32)).all()


# --------------------------------------------------------------------------------------------------------------- cache


def test_computed_then_loaded_gives_the_same_bits(tmp_path):
    computed = table(tmp_path / "deep" / "folder")
    loaded = table(tmp_path / "deep" / "folder")
    assert (computed.origin, loaded.origin) == ("computed", "loaded")
    assert computed.logprobs == loaded.logprobs
    assert [p.name for p in (tmp_path / "deep" / "folder").iterdir()] == [LOGPROB_FILE]


def test_states_computed_then_loaded_give_the_same_bits(tmp_path):
    sequences = sequences_of()
    computed, loaded = states(tmp_path), states(tmp_path)
    assert torch.equal(computed.rows(sequences), loaded.rows(sequences))
    assert torch.equal(computed.weight, loaded.weight)
    disk, resident = loaded.cost()
    assert disk == (tmp_path / HIDDEN_FILE).stat().st_size and resident == VOCAB * 32 * 4


@EITHER
def test_another_order_or_a_part_of_the_sequences_is_served(tmp_path, function):
    function(tmp_path)
    part = sequences_of()[4:1:-1]
    found = function(tmp_path, sequences=part)
    if function is states:
        fresh = states(tmp_path / "fresh", sequences=part)
        torch.testing.assert_close(found.rows(part), fresh.rows(part), rtol=1e-5, atol=1e-5)
        backwards = found.rows(part[::-1])
        assert torch.equal(backwards[: part[-1].num_answer_tokens], found.rows(part[-1:]))


@EITHER
def test_missing_sequences_are_refused(tmp_path, function):
    function(tmp_path)
    assert "another data (3 of 9 sequences are not in it)" in refused(function, tmp_path, sequences=sequences_of(9))
    # the same tokens with another label span are other data
    own = sequences_of()[0]
    moved = dataclasses.replace(own, answer_start=own.answer_start % (len(own.input_ids) - 1) + 1)
    assert "1 of 1 sequences" in refused(function, tmp_path, sequences=[moved])


@EITHER
def test_another_model_is_refused(tmp_path, function):
    function(tmp_path)
    changed = model_of()
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    assert "of another model (stored" in refused(function, tmp_path, changed)
    turned = model_of(rope_parameters={"rope_type": "default", "rope_theta": 5e4})
    assert "of another model configuration (stored" in refused(function, tmp_path, turned)
    assert "of another model (stored" in refused(function, tmp_path, model_of(dtype=torch.bfloat16))


def test_another_dtype_is_named(tmp_path):
    """Weights that are equal as numbers: only the line of the dtype differs from the model's."""
    own = reference.identity(model_of(), tiny_tokenizer())
    path = tmp_path / LOGPROB_FILE
    reference.write(path, {"k": -1.0}, own)
    assert reference.read(path, own) == {"k": -1.0}
    for name in own:
        message = refused(reference.read, path, own | {name: "other"})
        assert f"of another {name} (stored {own[name]}, now other)" in message


@EITHER
def test_another_tokenizer_or_template_is_refused(tmp_path, function):
    function(tmp_path)
    added = tiny_tokenizer()
    added.add_tokens([AddedToken("<new>")])
    assert "of another tokenizer (stored" in refused(function, tmp_path, tokenizer=added)
    templated = tiny_tokenizer()
    templated.chat_template = CHATML_TEMPLATE
    assert "of another chat template (stored" in refused(function, tmp_path, tokenizer=templated)


def test_padding_for_a_generation_does_not_change_the_tokenizer():
    tokenizer = tiny_tokenizer()
    before = reference.identity(model_of(), tokenizer)
    tokenizer(["a", "a longer one"], padding=True, truncation=True, max_length=3)
    assert reference.identity(model_of(), tokenizer) == before


def test_the_attention_in_use_does_not_change_the_identity(tmp_path):
    """A model from a folder and the same model in memory are one."""
    model = model_of()
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype="float32", device="cpu")
    assert reference.identity(loaded, tiny_tokenizer()) == reference.identity(model, tiny_tokenizer())


# -------------------------------------------------------------------------------------------------------------- damage


@EITHER
@pytest.mark.parametrize("size", [0, 5, 300, -8])
def test_a_truncated_file_is_refused(tmp_path, function, size):
    function(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:size])
    assert "is damaged (" in refused(function, tmp_path)


@EITHER
def test_a_file_of_another_kind_is_refused(tmp_path, function):
    path = tmp_path / (LOGPROB_FILE if function is table else HIDDEN_FILE)
    path.write_bytes(b"not a safetensors file, whatever its name says")
    assert "is damaged (" in refused(function, tmp_path)
    save_file({"something": torch.zeros(2)}, path)
    assert "is damaged (" in refused(function, tmp_path)


def test_a_changed_value_is_refused(tmp_path):
    table(tmp_path)
    path = tmp_path / LOGPROB_FILE
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    assert "is damaged (its values are not those that were written)" in refused(table, tmp_path)


def test_states_that_do_not_fit_their_keys_are_refused(tmp_path):
    states(tmp_path)
    path = tmp_path / HIDDEN_FILE
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    hidden = load_file(path)["hidden"]
    save_file({"hidden": hidden[:-1].contiguous()}, path, metadata)
    assert "is damaged (" in refused(states, tmp_path)


@EITHER
@pytest.mark.parametrize("where", ["replace", "fsync"])
def test_an_interrupted_write_leaves_nothing(tmp_path, function, where, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, where, interrupt)
        with pytest.raises(KeyboardInterrupt):
            function(tmp_path)
    assert list(tmp_path.iterdir()) == []
    function(tmp_path)


# ---------------------------------------------------------------------------------------------------- states for KL


@pytest.mark.parametrize("name", ["llama", "llama-tied", "phi", "gemma2", "cohere"])
def test_states_are_the_models_and_kl_to_itself_is_zero(tmp_path, name):
    """phi has a bias on its head: without it the reference would be another distribution."""
    model, sequences = prepare(family(name)), sequences_of()
    found = states(tmp_path, model)
    chosen = [sequences[4], sequences[0], sequences[2]]
    batch = collate([Item(s, Role.RETAIN) for s in chosen])
    head = head_of(model)
    with torch.no_grad():
        hidden = hidden_states(model, batch)
        rows = found.rows(chosen)
        torch.testing.assert_close(rows[:, :32], hidden, rtol=1e-5, atol=1e-5)
        kl = linear_kl(hidden, head.weight, rows, found.weight, **head.kwargs())
        assert kl.abs().max() < 1e-5
        moved = linear_kl(hidden + 0.1, head.weight, rows, found.weight, **head.kwargs())
        assert moved.max() > 1e-4
        if name == "phi":
            without = linear_kl(hidden, head.weight, hidden, head.weight, **head.kwargs())
            assert without.max() > 1e-4


def test_states_do_not_follow_the_model(tmp_path):
    model, sequences = prepare(family("llama-tied")), sequences_of()
    found = states(tmp_path, model)
    weight, rows = found.weight.clone(), found.rows(sequences).clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    assert torch.equal(found.weight, weight) and torch.equal(found.rows(sequences), rows)
    assert not found.weight.requires_grad and not rows.requires_grad


def test_states_of_an_unknown_sequence_are_never_made_up(tmp_path):
    found = states(tmp_path)
    with pytest.raises(KeyError):
        found.rows(sequences_of(9)[7:])
