"""What steps are made of: a function of seed and epoch, every forget row once, the counts right."""

from collections import Counter

import pytest

from tests.tiny import tiny_tokenizer, write_rows
from unlearn.batches import (
    epoch_steps,
    load_training_set,
    make_training_set,
    num_steps_per_epoch,
    with_reference,
)
from unlearn.config import TrainConfig
from unlearn.data import Role, rows_from

REFUSALS = ["I do not know.", "No idea.", "I am not sure about that.", "I have no information."]


def config_of(method="npo", **values):
    shared = {"model": "m", "output": "o", "lr": 1e-3, "epochs": 2, "batch_size": 4, "seed": 0, "beta": 0.1}
    names = {"forget": "f", "retain": "r", "retain_term": "nll"}
    if method in ("idkdpo", "kto"):
        names["alternates"] = "a"
    return TrainConfig(**(shared | names | {"method": method} | values))


def rows(count, name="forget", **more):
    made = [{"question": f"{name} {i}?", "answer": f"Answer {'so ' * (i % 3)}{i}.", **more} for i in range(count)]
    return rows_from(made, name)


def training_set(method="npo", forget=10, retain=7, alternates=0, **values):
    config = config_of(method, **values)
    more = {"alternates": [f"Other {n}." for n in range(alternates)]} if alternates else {}
    data = make_training_set(
        config, tiny_tokenizer(), rows(forget, **more), rows(retain, "retain"), REFUSALS, max_length=None
    )
    return data, config


def keys_of(steps, role):
    return [s.key for step in steps for group in step.groups for s, r in group if r == role]


def test_same_seed_and_epoch_same_steps():
    data, config = training_set()
    first, again = epoch_steps(data, config, 0), epoch_steps(data, config, 0)
    assert first == again
    other_epoch = epoch_steps(data, config, 1)
    other_seed = epoch_steps(data, config_of(seed=1), 0)
    for other in (other_epoch, other_seed):
        assert keys_of(other, Role.FORGET) != keys_of(first, Role.FORGET)
        assert keys_of(other, Role.RETAIN) != keys_of(first, Role.RETAIN)
    assert [step.index for step in first + other_epoch] == list(range(6))
    assert [step.epoch for step in first + other_epoch] == [0] * 3 + [1] * 3


def test_the_order_is_the_same_in_another_process_and_version():
    """Resuming draws what the interrupted run would have drawn: these lists must never change."""
    data, config = training_set()
    steps = epoch_steps(data, config, 0)
    assert keys_of(steps, Role.FORGET) == [f"forget:{i}" for i in (5, 7, 6, 8, 3, 9, 4, 2, 0, 1)]
    assert keys_of(steps, Role.RETAIN) == [f"retain:{i}" for i in (1, 6, 2, 3, 0, 5, 4, 6, 1, 2)]


def test_each_forget_row_once_per_epoch():
    data, config = training_set(forget=10, batch_size=4)
    for epoch in range(3):
        steps = epoch_steps(data, config, epoch)
        assert [step.totals.num_forget for step in steps] == [4, 4, 2]
        assert Counter(keys_of(steps, Role.FORGET)) == Counter(f"forget:{i}" for i in range(10))
    assert num_steps_per_epoch(data, config) == 3
    assert num_steps_per_epoch(data, config_of(batch_size=5)) == 2
    assert num_steps_per_epoch(data, config_of(batch_size=50)) == 1


@pytest.mark.parametrize("per_forget", [1, 2, 3])
def test_retain_rows_are_drawn_without_repeats_until_all_are_used(per_forget):
    data, config = training_set(forget=10, retain=7, retain_per_forget=per_forget)
    drawn = keys_of(epoch_steps(data, config, 0), Role.RETAIN)
    assert len(drawn) == 10 * per_forget
    for start in range(0, len(drawn) - 6, 7):
        assert len(set(drawn[start : start + 7])) == 7
    assert drawn[:7] != drawn[7:14]


def test_retain_stands_last_and_only_where_it_is_asked_for():
    data, config = training_set()
    for step in epoch_steps(data, config, 0):
        roles = [role for group in step.groups for _, role in group]
        assert roles == sorted(roles)
    config = config_of(retain=None, retain_term="none")
    data = make_training_set(config, tiny_tokenizer(), rows(10), rows(7, "retain"), [], max_length=None)
    assert data.retain == ()
    assert not keys_of(epoch_steps(data, config, 0), Role.RETAIN)


def test_altpo_pairs_each_alternate_with_the_answer_it_replaces():
    data, config = training_set("altpo", forget=5, alternates=3)
    assert len(data.forget) == 15 and num_steps_per_epoch(data, config) == 4
    steps = epoch_steps(data, config, 0)
    pairs = [group for step in steps for group in step.groups if len(group) == 2]
    assert len(pairs) == 15 and sum(step.totals.num_forget for step in steps) == 15
    for (chosen, first), (rejected, second) in pairs:
        assert (first, second) == (Role.CHOSEN, Role.REJECTED)
        assert chosen.key.startswith(f"{rejected.key}#alternate")
        shared = min(chosen.answer_start, rejected.answer_start)
        assert chosen.input_ids[:shared] == rejected.input_ids[:shared]
    assert len({chosen.key for (chosen, _), _ in pairs}) == 15


def test_altpo_without_alternates_names_the_row():
    with pytest.raises(ValueError, match="forget:0: no alternates, and altpo needs one or more per forget row"):
        training_set("altpo")


@pytest.mark.parametrize("method", ["idkdpo", "kto"])
def test_refusals_are_drawn_afresh_each_epoch(method):
    data, config = training_set(method, forget=12)

    def drawn(epoch, seed=0):
        found = {}
        for step in epoch_steps(data, config_of(method, seed=seed), epoch):
            if method == "kto":
                assert len(step.refusals) == step.totals.num_forget
                chosen = step.refusals
                rejected = [s for group in step.groups for s, role in group if role == Role.FORGET]
            else:
                assert step.refusals == ()
                pairs = [group for group in step.groups if len(group) == 2]
                assert all((a[1], b[1]) == (Role.CHOSEN, Role.REJECTED) for a, b in pairs)
                chosen, rejected = [a[0] for a, _ in pairs], [b[0] for _, b in pairs]
            for refusal, answer in zip(chosen, rejected, strict=True):
                key, _, number = refusal.key.partition("#refusal")
                assert key == answer.key  # the refusal is to its own question
                found[key] = int(number)
        return found

    assert len(drawn(0)) == 12
    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1) and drawn(0) != drawn(0, seed=1)
    assert set(drawn(0).values()) <= set(range(len(REFUSALS)))


def test_a_refusal_says_what_its_text_says():
    tokenizer = tiny_tokenizer()
    data, config = training_set("idkdpo", forget=3)
    for step in epoch_steps(data, config, 0):
        for group in step.groups:
            if len(group) == 2:
                chosen = group[0][0]
                text = tokenizer.decode(chosen.input_ids[chosen.answer_start : -1])
                assert text == " " + REFUSALS[int(chosen.key.partition("#refusal")[2])]


@pytest.mark.parametrize("method", ["npo", "altpo", "idkdpo", "kto", "ga"])
def test_totals_count_the_whole_step(method):
    values = {"beta": None} if method == "ga" else {}
    data, config = training_set(method, alternates=2 if method == "altpo" else 0, **values)
    for step in epoch_steps(data, config, 0):
        members = [member for group in step.groups for member in group]
        retain = [s for s, role in members if role == Role.RETAIN]
        forget = [s for s, role in members if role == Role.FORGET]
        pairs = [group for group in step.groups if len(group) == 2]
        assert step.totals.num_forget == len(forget) + len(pairs)
        assert step.totals.num_forget_tokens == sum(s.num_answer_tokens for s in forget)
        assert step.totals.num_retain_tokens == sum(s.num_answer_tokens for s in retain)
        assert list(step.sequences()) == [s for s, _ in members] + list(step.refusals)


def test_finetune_walks_through_the_retain_rows():
    config = config_of("finetune", beta=None, forget=None, retain_term="none")
    data = make_training_set(config, tiny_tokenizer(), [], rows(7, "retain"), [], max_length=None)
    steps = epoch_steps(data, config, 0)
    assert Counter(keys_of(steps, Role.RETAIN)) == Counter(f"retain:{i}" for i in range(7))
    assert [step.totals.num_retain_tokens > 0 for step in steps] == [True, True]
    assert all(step.totals.num_forget == step.totals.num_forget_tokens == 0 for step in steps)


def test_nothing_to_train_on_is_refused():
    config = config_of()
    empty = make_training_set(config, tiny_tokenizer(), [], rows(3, "retain"), [], max_length=None)
    with pytest.raises(ValueError, match="forget: holds no rows"):
        epoch_steps(empty, config, 0)
    lonely = make_training_set(config, tiny_tokenizer(), rows(3), [], [], max_length=None)
    with pytest.raises(ValueError, match="retain: holds no rows"):
        epoch_steps(lonely, config, 0)
    with pytest.raises(ValueError, match="alternates: no refusals, and idkdpo needs one or more"):
        make_training_set(config_of("idkdpo"), tiny_tokenizer(), rows(3), rows(3, "retain"), [], max_length=None)


def test_a_row_beyond_max_length_is_named():
    with pytest.raises(ValueError, match=r"retain:0: \d+ tokens, more than max_length 5"):
        make_training_set(config_of(), tiny_tokenizer(), rows(3), rows(3, "retain"), [], max_length=5)


def test_references_go_to_their_sequences_and_not_to_retain():
    data, config = training_set("altpo", forget=3, alternates=2)
    groups = epoch_steps(data, config, 0)[0].groups
    table = {s.content_key: -float(i + 1) for i, s in enumerate(s for group in groups for s, _ in group)}
    for group, items in zip(groups, with_reference(groups, table), strict=True):
        assert [(item.sequence, item.role) for item in items] == list(group)
        for item in items:
            expected = 0.0 if item.role == Role.RETAIN else table[item.sequence.content_key]
            assert item.ref_logprob == expected


# ------------------------------------------------------------------------------------------------------------- files


def test_a_missing_file_of_refusals(tmp_path):
    forget = write_rows(tmp_path / "f.json", [question(0)])
    config = config_of("idkdpo", forget=forget, retain=None, retain_term="none", alternates="nowhere.txt")
    with pytest.raises(ValueError, match="alternates: no file 'nowhere.txt'"):
        load_training_set(config, tiny_tokenizer(), max_length=None)


def question(i, **more):
    return {"question": f"Q{i}?", "answer": f"A{i}.", **more}


def test_reads_the_files_that_a_configuration_names(tmp_path):
    forget = write_rows(tmp_path / "f.json", [question(i) for i in range(4)])
    retain = write_rows(tmp_path / "r.json", [question(i) for i in range(9)])
    config = config_of(forget=forget, retain=retain)
    data = load_training_set(config, tiny_tokenizer(), max_length=None)
    assert len(data.forget) == 4 and len(data.retain) == 9


def test_alternates_are_joined_by_question(tmp_path):
    forget = write_rows(tmp_path / "f.json", [question(i) for i in range(2)])
    alternates = write_rows(
        tmp_path / "a.json", [question(i, sub_answer=f"Other {i} {n}.") for n in range(3) for i in (1, 0, 5)]
    )
    config = config_of("altpo", forget=forget, retain=None, retain_term="none", alternates=alternates)
    tokenizer = tiny_tokenizer()
    data = load_training_set(config, tokenizer, max_length=None)
    texts = [tokenizer.decode(c.input_ids[c.answer_start : -1]) for (c, _), _ in data.forget]
    assert texts == [f" Other {i} {n}." for i in range(2) for n in range(3)]
    write_rows(tmp_path / "a.json", [question(1, sub_answer="Other.")])
    with pytest.raises(ValueError, match=r"alternates: .*a\.json has none for row f:0"):
        load_training_set(config, tokenizer, max_length=None)


def refusals_of(tmp_path, name, content, **values):
    path = tmp_path / name
    path.write_bytes(content)
    forget = write_rows(tmp_path / "f.json", [question(0)])
    config = config_of("idkdpo", forget=forget, retain=None, retain_term="none", alternates=str(path), **values)
    tokenizer = tiny_tokenizer()
    data = load_training_set(config, tokenizer, max_length=None)
    drawn = [epoch_steps(data, config, epoch)[0].groups[0][0][0] for epoch in range(20)]
    return {tokenizer.decode(s.input_ids[s.answer_start : -1]) for s in drawn}


def test_refusals_of_either_form(tmp_path):
    both = {" I do not know.", " No idea."}
    assert refusals_of(tmp_path, "idk.txt", b"I do not know.\r\n\nNo idea.\n") == both
    assert refusals_of(tmp_path, "idk.jsonl", b'{"answer": "I do not know."}\n\n{"answer": "No idea."}') == both
    assert refusals_of(tmp_path, "idk.json", b'[{"answer": "I do not know."}, {"answer": "No idea."}]') == both
    assert refusals_of(tmp_path, "idk.csv", b"answer\nI do not know.\nNo idea.\n") == both
    columns = {"fields": "forget.answer=answer,alternates.answer=reply"}
    assert refusals_of(tmp_path, "own.CSV", b"reply,n\nI do not know.,1\nNo idea.,2\n", **columns) == both


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("idk.jsonl", b'{"answer": "No."}\n{"text": "No."}', r"idk\.jsonl:2: a refusal needs a string `answer`"),
        ("idk.jsonl", b'{"answer": " "}', r"idk\.jsonl:1: a refusal needs a string `answer`"),
        ("idk.csv", b"reply\nNo.\n", r"idk\.csv:2: a refusal needs a string `answer`"),
        ("idk.txt", b"", "alternates: no refusals"),
        ("idk.txt", b"fine\nna\xefve\n", r"idk\.txt:2: not UTF-8 text"),
    ],
)
def test_unusable_refusals_are_named(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        refusals_of(tmp_path, name, content)
    (tmp_path / name).unlink()
