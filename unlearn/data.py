"""From rows of text to packed batches: reading, templates, tokens, and the only place where labels are shifted.

A row becomes one Sequence: token ids and the index of the first answer token. The answer begins where its characters
begin in the rendered text; the token that holds the first of them is the first label, so nothing assumes that the
prompt tokenised alone is a prefix of the joint tokenisation (with many tokenizers it is not).

A PackedBatch holds several sequences end to end, without padding. The last token of a sequence predicts nothing and is
not fed; `targets[n]` is the token that position `answer_index[n]` predicts: this is the label shift.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import torch
from torch import Tensor

# Stands for the answer while a chat template is rendered: templates strip white space, none strips this.
_ANSWER_MARK = "\u2402ANSWER\u2403"
# No chat template: the question and the answer in plain words. The answer brings its own leading space, so that the
# prompt ends in a token that a generation can start from.
PLAIN_TEMPLATE = "Question: {question}\nAnswer: {answer}"
# Some chat templates print today's date (Llama 3.1 and later): the same row would be other tokens tomorrow, and no
# stored reference would fit. They get the date that Llama 3's has for want of a clock, whatever format they ask for.
_FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
TOFU_REPOSITORY = "locuslab/TOFU"


class Role(IntEnum):
    """What a sequence is for. CHOSEN and REJECTED come as consecutive pairs."""

    FORGET = 0
    RETAIN = 1
    CHOSEN = 2
    REJECTED = 3


@dataclass(frozen=True)
class Row:
    """One example: the turns before the answer (role, text), or raw text when `raw`, and the answer.

    `alternates` are other answers to the same prompt; `fields` keeps every other column of the source row.
    """

    key: str
    turns: tuple[tuple[str, str], ...]
    answer: str
    raw: bool = False
    alternates: tuple[str, ...] = ()
    fields: dict[str, Any] | None = None

    def with_answer(self, answer: str, suffix: str) -> Row:
        return replace(self, answer=answer, key=f"{self.key}{suffix}")


@dataclass(frozen=True)
class Sequence:
    """Token ids of prompt and answer; ids from `answer_start` on are the labels. `key` names the row it came from."""

    key: str
    input_ids: tuple[int, ...]
    answer_start: int

    @property
    def num_tokens(self) -> int:
        """Tokens fed to the model."""
        return len(self.input_ids) - 1

    @property
    def num_answer_tokens(self) -> int:
        return len(self.input_ids) - self.answer_start

    @cached_property
    def content_key(self) -> str:
        """Names the ids and the label span, so that equal sequences share one reference log-likelihood."""
        text = f"{self.answer_start}:" + ",".join(map(str, self.input_ids))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Item(NamedTuple):
    """A sequence with its part in the loss and its reference log-likelihood (nats; 0 where the method has none)."""

    sequence: Sequence
    role: Role
    ref_logprob: float = 0.0


@dataclass(frozen=True)
class PackedBatch:
    """B sequences of T fed tokens and N answer tokens, end to end.

    input_ids, position_ids [T]; cu_seqlens [B+1] int32 (attention); answer_index, targets [N]; cu_answers [B+1] int64;
    role [B] int64; ref_logprob [B] float64. On the host, one entry per sequence: its fed and its answer tokens, its
    role and its key.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    answer_index: Tensor
    targets: Tensor
    cu_answers: Tensor
    role: Tensor
    ref_logprob: Tensor
    lengths: tuple[int, ...]
    answer_lengths: tuple[int, ...]
    roles: tuple[Role, ...]
    keys: tuple[str, ...]

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device | str) -> PackedBatch:
        tensors = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)


# ---------------------------------------------------------------------------------------------------------- reading


def load_rows(source: str, *, role: str) -> list[Row]:
    """Rows of a JSON-lines file, or of TOFU by name as `tofu:SPLIT`. `role` names the option in error messages.

    A row has question + answer, prompt + completion (raw text, no template), or messages ending with the assistant's.
    Raises ValueError with file, line and reason for the first row that cannot be used; nothing is dropped.
    """
    if source.startswith("tofu:"):
        found = [(one, f"{source} row {i}") for i, one in enumerate(_tofu_rows(source.removeprefix("tofu:"), role))]
        name = source
    else:
        path = Path(source)
        if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
            raise ValueError(f"{role}: no file {source!r}; a JSON-lines file or tofu:SPLIT is accepted")
        found, name = read_json_lines(path), path.stem
    if not found:
        raise ValueError(f"{role}: {source} holds no rows")
    return _rows(found, name)


def rows_from(fields: Iterable[dict[str, Any]], name: str) -> list[Row]:
    """Rows of dictionaries that are in memory already; `name` stands for the file in messages."""
    return _rows([(one, f"{name} row {i}") for i, one in enumerate(fields)], name)


def _rows(found: Iterable[tuple[dict[str, Any], str]], name: str) -> list[Row]:
    """Rows whose keys are unique: a key names its row in messages and in the saved batch of a failed step."""
    rows: list[Row] = []
    seen: dict[str, str] = {}
    for index, (fields, where) in enumerate(found):
        row = _row(fields, f"{name}:{index}", where)
        if row.key in seen:
            raise ValueError(f"{where}: key {row.key!r} is taken by {seen[row.key]}")
        seen[row.key] = where
        rows.append(row)
    return rows


def read_lines(path: Path) -> list[tuple[str, str]]:
    """The lines of a text file, each after its 'file:line' for messages. Raises ValueError where it is not UTF-8."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8 text ({error.reason} at byte {error.start} of the file)") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    return [(f"{path}:{number}", line) for number, line in enumerate(lines, 1)]


def read_json_lines(path: Path) -> list[tuple[dict[str, Any], str]]:
    """The objects of a JSON-lines file, each with 'file:line' for messages. Blank lines are allowed."""
    rows = []
    for where, line in read_lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: not JSON: {error.msg} at column {error.colno}; one object per line is accepted"
            ) from None
        except (ValueError, RecursionError) as error:  # a number of 5000 digits, lists without end
            raise ValueError(f"{where}: not JSON that can be read: {error}") from None
        if not isinstance(value, dict):
            raise ValueError(f"{where}: a JSON object is accepted, this is a {type(value).__name__}")
        rows.append((value, where))
    return rows


def _tofu_rows(split: str, role: str) -> list[dict[str, Any]]:
    import datasets

    try:
        return list(datasets.load_dataset(TOFU_REPOSITORY, split, split="train"))
    except Exception as error:  # the hub's client raises many kinds; the user needs one line and the way out
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{role}: could not load TOFU's {split!r} by name ({reason});"
            f" a local file such as DIR/{split}.json works too"
        ) from None


def _row(fields: dict[str, Any], default_key: str, where: str) -> Row:
    key = fields.get("key", default_key)
    if not isinstance(key, str | int) or isinstance(key, bool):
        raise ValueError(f"{where}: key is a {type(key).__name__}; a string or a whole number is accepted")
    key = str(key)
    alternates = _alternates(fields, where)
    if "messages" in fields:
        turns, answer = _messages(fields["messages"], where)
        return Row(key, turns, answer, alternates=alternates, fields=fields)
    for prompt_name, answer_name, raw in (("question", "answer", False), ("prompt", "completion", True)):
        if prompt_name in fields:
            prompt = _text(fields, prompt_name, where)
            answer = _text(fields, answer_name, where)
            if not answer.strip():
                raise ValueError(f"{where}: {answer_name} is empty")
            return Row(key, (("user", prompt),), answer, raw=raw, alternates=alternates, fields=fields)
    raise ValueError(
        f"{where}: question + answer, prompt + completion or messages are accepted; this row has "
        + (", ".join(fields) or "no fields")
    )


def _text(fields: dict[str, Any], name: str, where: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        found = "missing" if name not in fields else f"a {type(value).__name__}"
        raise ValueError(f"{where}: {name} is {found}; a string is accepted")
    return _encodable(value, name, where)


def _encodable(text: str, name: str, where: str) -> str:
    """JSON can escape half of a surrogate pair, which is no character and which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {name} has half of a surrogate pair at character {error.start}") from None
    return text


def _alternates(fields: dict[str, Any], where: str) -> tuple[str, ...]:
    """`alternates` (list), or the `alternate` / `sub_answer` that other unlearning codes write (one per row)."""
    value = fields.get("alternates")
    if value is None:
        value = [fields[name] for name in ("alternate", "sub_answer") if name in fields]
    if not isinstance(value, list) or not all(isinstance(item, str) and item.strip() for item in value):
        raise ValueError(f"{where}: alternates is not a list of non-empty strings")
    return tuple(_encodable(item, "alternates", where) for item in value)


def _messages(messages: Any, where: str) -> tuple[tuple[tuple[str, str], ...], str]:
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError(f"{where}: messages is not a list of two or more")
    turns = []
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f"{where}: each message needs a role and a content string")
        turns.append((message["role"], _encodable(message["content"], "a message", where)))
    if turns[-1][0] != "assistant":
        raise ValueError(f"{where}: the last message is from {turns[-1][0]!r}; it has to be the assistant's")
    if not turns[-1][1].strip():
        raise ValueError(f"{where}: the assistant's last message is empty")
    return tuple(turns[:-1]), turns[-1][1]


# --------------------------------------------------------------------------------------------------------- encoding


def render(row: Row, tokenizer: Any) -> tuple[str, str, str, bool]:
    """(prefix, answer, suffix, whether the tokenizer adds its special tokens): the text of a row around its answer.

    Raw rows are joined as they are; others go through the tokenizer's chat template, else PLAIN_TEMPLATE.
    """
    if row.raw:
        return row.turns[0][1], row.answer, "", True
    if getattr(tokenizer, "chat_template", None):
        return (*_render_chat(row, tokenizer), False)
    # Several turns without a chat template: each earlier answer follows its question.
    head, _ = PLAIN_TEMPLATE.split("{answer}")
    text = ""
    for role, content in row.turns:
        if role == "assistant":
            text += " " + content.strip() + "\n"
        elif role == "system":
            text += content.strip() + "\n"
        else:
            text += head.format(question=content.strip()).rstrip()
    return text, " " + row.answer.strip(), "", True


def _render_chat(row: Row, tokenizer: Any) -> tuple[str, str, str]:
    """(prefix, answer, suffix) through the tokenizer's chat template, which strips the answer or would if it could."""
    turns = [{"role": role, "content": text} for role, text in (*row.turns, ("assistant", _ANSWER_MARK))]
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = _FIXED_DATE + template
    try:
        text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(f"{row.key}: the chat template refuses this row ({error})") from None
    prefix, *rest = text.split(_ANSWER_MARK)
    if len(rest) != 1:
        raise ValueError(f"{row.key}: the chat template prints the assistant's message {len(rest)} times, not once")
    return prefix, row.answer.strip(), rest[0]


def encode(row: Row, tokenizer: Any, *, max_length: int | None) -> Sequence:
    """Token ids of a row and the index of its first answer token; ends with the end-of-turn or end-of-text token.

    Where nothing precedes the answer (an empty prompt and a tokenizer without a begin-of-text token), its first token
    is no label. Raises ValueError naming the row when it is longer than max_length or has no answer token.
    """
    prefix, answer, suffix, add_special = render(row, tokenizer)
    text = prefix + answer + suffix
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, add_special_tokens=add_special, return_offsets_mapping=True)
        ids, spans = list(encoded["input_ids"]), encoded["offset_mapping"]
        first, last = len(prefix), len(prefix) + len(answer)
        # tokens that the tokenizer adds itself end at character 0
        start = max(1, next((i for i, (_, end) in enumerate(spans) if end > first), len(ids)))
        stop = next((i for i in range(start, len(ids)) if not first < spans[i][1] <= last), len(ids))
        # a token that begins in the answer and ends in what the template writes after it is still the answer's
        has_label = start < len(ids) and spans[start][0] < last and spans[start][1] > first
    else:
        # No character offsets: the prompt ends where its own tokenisation and the joint one part ways. So the answer.
        ids = list(tokenizer(text, add_special_tokens=add_special)["input_ids"])
        start = max(1, _common_prefix(ids, tokenizer(prefix, add_special_tokens=add_special)["input_ids"]))
        stop = _common_prefix(ids, tokenizer(prefix + answer, add_special_tokens=add_special)["input_ids"])
        if stop == len(ids) and ids[-1] == tokenizer.eos_token_id:
            stop -= 1  # added by the tokenizer
        has_label = start < stop
    if not has_label:
        raise ValueError(f"{row.key}: the answer has no token of its own")
    ids = ids[:stop] + _end_of_answer(ids[stop:], tokenizer)
    if max_length is not None and len(ids) > max_length:
        raise ValueError(f"{row.key}: {len(ids)} tokens, more than max_length {max_length}; shorten or split the row")
    return Sequence(row.key, tuple(ids), start)


def _common_prefix(ids: list[int], other: list[int]) -> int:
    """How many tokens two tokenisations have in common at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), min(len(ids), len(other)))


def _end_of_answer(tail: list[int], tokenizer: Any) -> list[int]:
    """What follows the answer up to its end-of-turn token, or the end-of-text token where the template has none."""
    if tail:
        special = special_ids(tokenizer)
        for index, token in enumerate(tail):
            if token in special:
                return tail[: index + 1]
    return tail + ([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])


def special_ids(tokenizer: Any) -> set[int]:
    """All special tokens; all_special_ids lacks those that only the vocabulary marks so (Phi-3's <|end|>)."""
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)


def encode_rows(rows: Iterable[Row], tokenizer: Any, *, max_length: int | None) -> list[Sequence]:
    return [encode(row, tokenizer, max_length=max_length) for row in rows]


# ---------------------------------------------------------------------------------------------------------- packing


def pack(groups: Seq[Seq[Item]], max_tokens: int) -> list[list[Seq[Item]]]:
    """Consecutive groups into packs of at most max_tokens fed tokens; a group is never split.

    A group longer than the budget gets a pack of its own: a document has one log-likelihood and cannot be cut.
    """
    packs: list[list[Seq[Item]]] = []
    room = 0
    for group in groups:
        size = sum(item.sequence.num_tokens for item in group)
        if not packs or size > room:
            packs.append([])
            room = max_tokens
        packs[-1].append(group)
        room -= size
    return packs


def collate(items: Seq[Item]) -> PackedBatch:
    """One packed batch of these sequences, in this order, on the CPU."""
    if not items:
        raise ValueError("items: empty; a batch has one sequence or more")
    lengths = [item.sequence.num_tokens for item in items]
    answers = [item.sequence.num_answer_tokens for item in items]
    num_tokens, num_answers = torch.tensor(lengths), torch.tensor(answers)
    cu_seqlens, cu_answers = torch.tensor([0, *lengths]).cumsum(0), torch.tensor([0, *answers]).cumsum(0)
    positions = torch.arange(sum(lengths)) - cu_seqlens[:-1].repeat_interleave(num_tokens)
    # the answer's tokens are predicted by the last positions of its sequence
    answer_index = torch.arange(sum(answers)) + (cu_seqlens - cu_answers)[1:].repeat_interleave(num_answers)
    return PackedBatch(
        input_ids=torch.tensor([token for item in items for token in item.sequence.input_ids[:-1]]),
        position_ids=positions,
        cu_seqlens=cu_seqlens.int(),
        answer_index=answer_index,
        targets=torch.tensor(
            [token for item in items for token in item.sequence.input_ids[item.sequence.answer_start :]]
        ),
        cu_answers=cu_answers,
        role=torch.tensor([int(item.role) for item in items]),
        ref_logprob=torch.tensor([item.ref_logprob for item in items], dtype=torch.float64),
        lengths=tuple(lengths),
        answer_lengths=tuple(answers),
        roles=tuple(item.role for item in items),
        keys=tuple(item.sequence.key for item in items),
    )
