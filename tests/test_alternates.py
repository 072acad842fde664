"""Alternates sampled from a model: their file, its resumption, and the training that reads it."""

import json

import pytest
import torch

from tests.test_cli import FORGET, options, refused
from tests.tiny import LLAMA3_TEMPLATE, save_tiny, tiny_llama, tiny_tokenizer, write_rows
from unlearn import alternates, cli
from unlearn.data import rows_from
from unlearn.generate import sample

SETTINGS = {"count": 2, "temperature": 1.0, "max_new_tokens": 6, "batch_size": 2, "seed": 3}


def arguments(files, output, **changes):
    values = {"model": files / "model", "forget": files / "forget.jsonl", "output": output, "device": "cpu"}
    values |= {"dtype": "float32", "count": 2, "max_new_tokens": 6, "batch_size": 4} | changes
    return [text for name, v in values.items() for text in ("--" + name.replace("_", "-"), str(v))]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a model and rows to forget. Read only."""
    folder = tmp_path_factory.mktemp("files")
    save_tiny(folder / "model")
    write_rows(folder / "forget.jsonl", FORGET)
    return folder


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture
def rows():
    return rows_from(FORGET, "forget")


def test_from_the_command_line_to_training(files, tmp_path, capsys):
    path = tmp_path / "made" / "alternates.jsonl"
    assert cli.main(["alternates", *arguments(files, path)]) == 0
    assert capsys.readouterr().out == f"2 alternates to each of 6 rows: {path}\n"
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["question"] for row in written] == [row["question"] for row in FORGET]
    assert all(len(row["alternates"]) == 2 and all(text.strip() for text in row["alternates"]) for row in written)
    assert len({text for row in written for text in row["alternates"]}) > 6
    train = options(files, tmp_path / "out", method="altpo", alternates=path)
    assert cli.main(["train", *train]) == 0
    assert "8 steps" in capsys.readouterr().out  # two epochs of twelve pairs, three at a time


def test_the_request_shows_question_and_answer(rows):
    for tokenizer in (tiny_tokenizer(), tiny_tokenizer(LLAMA3_TEMPLATE)):
        asked = alternates.request(rows[0], tokenizer, max_length=None)
        text = tokenizer.decode(asked.input_ids[: asked.answer_start])
        assert FORGET[0]["question"] in text and FORGET[0]["answer"] in text


def test_killed_at_any_batch_the_file_ends_up_the_same(model, rows, tmp_path):
    tokenizer = tiny_tokenizer()
    whole = tmp_path / "whole.jsonl"
    alternates.write_alternates(model, tokenizer, rows, whole, **SETTINGS)
    lines = whole.read_bytes().splitlines(keepends=True)
    for kept, rest in ((0, b""), (0, lines[0][:30]), (1, b""), (2, b""), (3, lines[3][:-1]), (5, b'{"quest'), (6, b"")):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(b"".join(lines[:kept]) + rest)
        seen = []
        done = alternates.write_alternates(model, tokenizer, rows, path, **SETTINGS, progress=seen.append)
        assert path.read_bytes() == whole.read_bytes()
        assert done == kept // 2 * 2 and sum(seen) == len(rows)


STRANGERS = {
    "a text": lambda lines: b"notes of mine, and no end of a line",
    "rows of another file": lambda lines: lines[1],
    "rows of another count": lambda lines: lines[0].replace(b'"alternates": [', b'"alternates": ["one more", '),
    "our rows, then a text": lambda lines: b"".join(lines[:2]) + b"notes",
    "all of our rows, then a text": lambda lines: b"".join(lines) + b"notes",
    "all of our rows, then more": lambda lines: b"".join(lines) + lines[0],
    "the beginning of another row": lambda lines: lines[0] + lines[2][:25],
}


@pytest.mark.parametrize("name", STRANGERS)
def test_of_a_strangers_file_nothing_is_removed(model, rows, tmp_path, name):
    """What is cut off is a line of ours that a kill left half, and nothing else."""
    path = tmp_path / "out.jsonl"
    alternates.write_alternates(model, tiny_tokenizer(), rows[:4], path, **SETTINGS)
    content = STRANGERS[name](path.read_bytes().splitlines(keepends=True))
    path.write_bytes(content)
    with pytest.raises(ValueError, match="^output: .* line [1-5] is of another file"):
        alternates.write_alternates(model, tiny_tokenizer(), rows[:4], path, **SETTINGS)
    assert path.read_bytes() == content


def test_another_seed_gives_others(model, rows, tmp_path):
    texts = []
    for seed in (0, 1):
        path = tmp_path / f"{seed}.jsonl"
        alternates.write_alternates(model, tiny_tokenizer(), rows, path, **{**SETTINGS, "seed": seed})
        texts.append(path.read_text())
    assert texts[0] != texts[1]


def test_sampling_leaves_the_random_state_and_follows_its_seed(model):
    prompts = [(5, 6, 7), (8, 9)]
    options = {"count": 3, "temperature": 1.0, "max_new_tokens": 8}
    before = torch.random.get_rng_state()
    one = sample(model, tiny_tokenizer(), prompts, seed=1, **options)
    assert torch.equal(before, torch.random.get_rng_state())
    assert sample(model, tiny_tokenizer(), prompts, seed=1, **options) == one
    assert sample(model, tiny_tokenizer(), prompts, seed=2, **options) != one
    assert [len(texts) for texts in one] == [3, 3]
    cold = sample(model, tiny_tokenizer(), prompts, seed=1, **{**options, "temperature": 1e-4})
    assert all(len(set(texts)) == 1 for texts in cold)


def test_empty_answers_are_drawn_again_and_given_up_on(model, rows, tmp_path, monkeypatch):
    drawn = [[["", "one"], ["\n\nQuestion: x", " "]], [["two\n\nmore", "three"], ["four", "five Question: y"]]]
    calls = iter(drawn)
    monkeypatch.setattr(alternates, "sample", lambda *args, **kwargs: next(calls))
    path = tmp_path / "out.jsonl"
    alternates.write_alternates(model, tiny_tokenizer(), rows[:2], path, **SETTINGS)
    found = [json.loads(line)["alternates"] for line in path.read_text().splitlines()]
    assert found == [["one", "two"], ["four", "five"]]
    monkeypatch.setattr(alternates, "sample", lambda *args, **kwargs: [["", ""]])
    with pytest.raises(ValueError, match="^forget:0: the model gave 0 answers with text in 8 attempts"):
        alternates.write_alternates(model, tiny_tokenizer(), rows[:1], tmp_path / "none.jsonl", **SETTINGS)


def test_wrong_arguments(files, tmp_path, capsys):
    path = tmp_path / "there.jsonl"
    path.write_text("")
    assert "exists; --resume" in refused(capsys, ["alternates", *arguments(files, path)])
    assert "is a folder; a file is accepted" in refused(capsys, ["alternates", *arguments(files, tmp_path)])
    assert "temperature is 0.0" in refused(capsys, ["alternates", *arguments(files, tmp_path / "x", temperature=0)])
    path.write_text('{"question": "Who?", "answer": "I.", "alternates": ["a", "b"]}\n')
    message = refused(capsys, ["alternates", "--resume", *arguments(files, path)])
    assert "line 1 is of another file or --count" in message
    path.write_text("{}\n")
    assert "line 1 is no row" in refused(capsys, ["alternates", "--resume", *arguments(files, path)])
