"""Alternate answers to the forget questions, sampled from the model that is to forget: what AltPO prefers.

Mekala et al. 2024 (arXiv:2409.13474): the model is shown a question with its answer and asked for another answer with
other facts, at temperature 1, several times. The wording of the request is this project's own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from unlearn.data import Row, Sequence, encode, rows_from, special_ids
from unlearn.files import holding, naming
from unlearn.generate import sample
from unlearn.model import check_ids
from unlearn.scoring import Progress

REQUEST = (
    "Here is a question with its answer.\n\nQuestion: {question}\nAnswer: {answer}\n\n"
    "Write one other answer to this question. Keep the form and about the length, and replace the facts by different "
    "ones that are just as plausible. Reply with the new answer alone."
)
# A base model goes on with a next example; what stands before it is the answer.
ENDINGS = ("\nQuestion:", "Question:", "\nAnswer:", "\n\n")
# An answer may come out empty; it is drawn again with other seeds this often.
ATTEMPTS = 8


def request(row: Row, tokenizer: Any, *, max_length: int | None) -> Sequence:
    """The prompt that asks for an alternate to a row's answer, with some answer behind it."""
    text = REQUEST.format(question=row.turns[-1][1].strip(), answer=row.answer.strip())
    return encode(Row(row.key, (("user", text),), row.answer), tokenizer, max_length=max_length)


def write_alternates(
    model: nn.Module,
    tokenizer: Any,
    rows: list[Row],
    path: Path,
    *,
    count: int,
    temperature: float,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    max_length: int | None = None,
    progress: Progress | None = None,
) -> int:
    """Add a JSON line per row to `path`: its fields and `alternates`, a list of `count` strings. Returns how many rows
    were there already.

    Rows go in batches, each seeded by (seed, its first row) and written when it is complete, so that a run that was
    killed goes on with the same answers. Raises ValueError for a file of other rows or in another process's hands, and
    for a row to which the model says nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with holding(path, "output"):
        done = _finished(path, rows, count, batch_size)
        if progress is not None and done:
            progress(done)
        for first, batch in _batches(rows, done, batch_size):
            asked = [request(row, tokenizer, max_length=max_length) for row in batch]
            check_ids(model, asked)
            found = _sampled(model, tokenizer, asked, count, first, seed, temperature, max_new_tokens)
            lines = [_line(row, texts) for row, texts in zip(batch, found, strict=True)]
            with naming(path), path.open("a", encoding="utf-8") as file:
                file.write("".join(lines))
                file.flush()
                os.fsync(file.fileno())
            if progress is not None:
                progress(len(batch))
    return done


def _line(row: Row, texts: list[str]) -> str:
    return json.dumps({**(row.fields or {}), "alternates": texts}, ensure_ascii=False) + "\n"


def _batches(rows: list[Row], done: int, batch_size: int) -> Iterator[tuple[int, list[Row]]]:
    for first in range(done, len(rows), batch_size):
        yield first, rows[first : first + batch_size]


def _sampled(
    model: nn.Module,
    tokenizer: Any,
    asked: list[Sequence],
    count: int,
    first: int,
    seed: int,
    temperature: float,
    max_new_tokens: int,
) -> list[list[str]]:
    prompts = [sequence.input_ids[: sequence.answer_start] for sequence in asked]
    stop = {sequence.input_ids[-1] for sequence in asked} & special_ids(tokenizer)
    found: list[list[str]] = [[] for _ in asked]
    for attempt in range(ATTEMPTS):
        wanting = [i for i, texts in enumerate(found) if len(texts) < count]
        if not wanting:
            break
        drawn = sample(
            model, tokenizer, [prompts[i] for i in wanting], count=count, temperature=temperature,
            seed=_seed(seed, first, attempt), max_new_tokens=max_new_tokens, stop=stop,
        )  # fmt: skip
        for i, texts in zip(wanting, drawn, strict=True):
            found[i] = (found[i] + [cut for text in texts if (cut := _cut(text))])[:count]
    for sequence, texts in zip(asked, found, strict=True):
        if len(texts) < count:
            raise ValueError(f"{sequence.key}: the model gave {len(texts)} answers with text in {ATTEMPTS} attempts")
    return found


def _seed(*numbers: int) -> int:
    digest = hashlib.blake2b(":".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _cut(text: str) -> str:
    for ending in ENDINGS:
        text = text.strip().partition(ending)[0]
    return text.strip()


def _finished(path: Path, rows: list[Row], count: int, batch_size: int) -> int:
    """How many rows of whole batches the file has; what follows them, a line cut off in the middle, is removed."""
    data = path.read_bytes()
    lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
    rest = data[sum(map(len, lines)) :]
    own = _line(rows[len(lines)], []).partition('"alternates"')[0].encode() if len(lines) < len(rows) else b""
    if rest and (not own or rest[: len(own)] != own[: len(rest)]):  # of a stranger's file nothing is removed
        raise ValueError(f"output: {path} line {len(lines) + 1} is of another file; give another --output")
    for number, line in enumerate(lines):
        try:
            fields = json.loads(line)
            stored = rows_from([fields], "alternates")[0]
        except (ValueError, TypeError) as error:
            raise ValueError(f"output: {path} line {number + 1} is no row with alternates ({error})") from None
        same = number < len(rows) and (stored.turns, stored.answer) == (rows[number].turns, rows[number].answer)
        if not same or len(stored.alternates) != count:
            raise ValueError(f"output: {path} line {number + 1} is of another file or --count; give another --output")
    done = len(lines) if len(lines) == len(rows) else len(lines) // batch_size * batch_size
    whole = sum(map(len, lines[:done]))
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
    return done
