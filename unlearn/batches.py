"""What a step is made of: groups of sequences drawn from the training set, the same for the same seed and epoch.

Everything here is a function of (seed, epoch), so a resumed run draws what the uninterrupted one would have drawn
without storing any position but the step number.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from unlearn.config import TrainConfig
from unlearn.data import Item, Role, Row, Sequence, encode, encode_rows, load_rows, pack, windows
from unlearn.methods import METHODS, StepTotals
from unlearn.sources import TABLES, parse_fields, read, read_lines

# In a run: a list of so many takes gigabytes of the host's memory and minutes to make.
MAX_SEQUENCES = 2 * 10**7
Group = tuple[tuple[Sequence, Role], ...]


class Refusals:
    """The refusals to one forget row, encoded when they are drawn: a run uses one of a hundred per row and epoch."""

    def __init__(self, row: Row, texts: list[str], tokenizer: Any, max_length: int | None) -> None:
        self._row, self._texts, self._tokenizer, self._max_length = row, texts, tokenizer, max_length

    def draw(self, rng: random.Random) -> Sequence:
        number = rng.randrange(len(self._texts))
        row = self._row.with_answer(self._texts[number], f"#refusal{number}")
        return encode(row, self._tokenizer, max_length=self._max_length)


@dataclass(frozen=True)
class TrainingSet:
    """Encoded rows. forget: what is shuffled and walked through each epoch, one group per row or pair, refusals still
    open; retain: what is drawn from; refusals: every refusal to each forget row, for idkdpo and kto."""

    forget: tuple[Group, ...]
    retain: tuple[Sequence, ...]
    refusals: tuple[Refusals, ...] = ()


@dataclass(frozen=True)
class Step:
    """One optimizer step: its groups (forget first, retain after), its refusals for KTO, and its counts."""

    index: int
    epoch: int
    groups: tuple[Group, ...]
    refusals: tuple[Sequence, ...]
    totals: StepTotals = field(repr=False)

    def sequences(self) -> Iterator[Sequence]:
        for group in self.groups:
            for sequence, _ in group:
                yield sequence
        yield from self.refusals


def load_training_set(config: TrainConfig, tokenizer: Any, *, max_length: int | None) -> TrainingSet:
    """Read and encode the files a configuration names."""
    forget = load_rows(config.forget, role="forget", fields=config.fields) if config.forget else []
    retain = load_rows(config.retain, role="retain", fields=config.fields) if config.retain else []
    method = METHODS[config.method]
    refusals: list[str] = []
    if config.alternates is not None and method.pairs == "alternates":
        extra = load_rows(config.alternates, role="alternates", fields=config.fields)
        forget = _join_alternates(forget, extra, config.alternates)
    elif config.alternates is not None:
        refusals = _load_refusals(config.alternates, config.fields)
    return make_training_set(config, tokenizer, forget, retain, refusals, max_length=max_length)


def make_training_set(
    config: TrainConfig,
    tokenizer: Any,
    forget: list[Row],
    retain: list[Row],
    refusals: list[str],
    *,
    max_length: int | None,
) -> TrainingSet:
    """Encode rows into the groups that the configured method wants. Raises ValueError naming the row that cannot be."""
    method = METHODS[config.method]
    document = next((row for row in forget if row.document), None)
    if document is not None and (method.pairs or method.baseline):
        raise ValueError(
            f"forget: {document.key} is a document, and {config.method} prefers other answers to the same question;"
            " question + answer or prompt + completion rows have one"
        )
    forget, retain = (windows(rows, tokenizer, size=config.window) for rows in (forget, retain))
    retained = tuple(encode_rows(retain, tokenizer, max_length=max_length)) if _uses_retain(config) else ()
    if config.method == "finetune":
        return TrainingSet((), retained)
    answers = encode_rows(forget, tokenizer, max_length=max_length)
    if method.pairs == "alternates":
        groups: list[Group] = []
        for row, rejected in zip(forget, answers, strict=True):
            if not row.alternates:
                raise ValueError(f"{row.key}: no alternates, and {config.method} needs one or more per forget row")
            for number, text in enumerate(row.alternates):
                chosen = encode(row.with_answer(text, f"#alternate{number}"), tokenizer, max_length=max_length)
                groups.append(((chosen, Role.CHOSEN), (rejected, Role.REJECTED)))
        return TrainingSet(tuple(groups), retained)
    if method.pairs == "refusals" or method.baseline:
        if not refusals:
            raise ValueError(f"alternates: no refusals, and {config.method} needs one or more")
        texts = tuple(Refusals(row, refusals, tokenizer, max_length) for row in forget)
        role = Role.REJECTED if method.pairs else Role.FORGET
        return TrainingSet(tuple(((answer, role),) for answer in answers), retained, texts)
    return TrainingSet(tuple(((answer, Role.FORGET),) for answer in answers), retained)


def _uses_retain(config: TrainConfig) -> bool:
    return config.retain_term != "none" or config.method == "finetune"


def _join_alternates(forget: list[Row], extra: list[Row], source: str) -> list[Row]:
    """Give each forget row the alternates that `extra` lists for the same question."""
    by_prompt: dict[Any, list[str]] = {}
    for row in extra:
        by_prompt.setdefault(row.turns, []).extend(row.alternates)
    joined = []
    for row in forget:
        found = tuple(by_prompt.get(row.turns, ()))
        if not found:
            raise ValueError(f"alternates: {source} has none for row {row.key}")
        joined.append(replace(row, alternates=found))
    return joined


def _load_refusals(source: str, fields: str | None) -> list[str]:
    """One refusal a line of plain text, or a table's rows, each with `answer` (or alternates.answer of `fields`)."""
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"alternates: no file {source!r}")
    if path.suffix.lower() not in TABLES:
        return [line.strip() for _, line in read_lines(path) if line.strip()]
    column = parse_fields(fields).get("alternates", {}).get("answer", "answer")
    texts = []
    for row in read(source, role="alternates"):
        text = row.fields.get(column)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{row.where}: a refusal needs a string `{column}` that is not empty")
        texts.append(text)
    return texts


def num_steps_per_epoch(data: TrainingSet, config: TrainConfig) -> int:
    rows = len(data.retain) if config.method == "finetune" else len(data.forget)
    if rows == 0:
        raise ValueError(f"{'retain' if config.method == 'finetune' else 'forget'}: holds no rows")
    return -(-rows // config.batch_size)


@dataclass(frozen=True)
class Packing:
    """The micro-batches of a run's steps, as the training loop packs them. counts: of each step; tokens: of each
    micro-batch, in order; largest: the sequences of the first one that has most tokens."""

    counts: tuple[int, ...]
    tokens: tuple[int, ...]
    largest: tuple[Sequence, ...]


def packing_of(steps: list[Step], max_tokens: int) -> Packing:
    """Under a budget of max_tokens for one forward. Of the whole run, so once is enough."""
    counts, tokens = [], []
    largest: tuple[Sequence, ...] = ()
    most = -1
    for step in steps:
        packs = pack(with_reference(step.groups, {}), max_tokens)
        counts.append(len(packs))
        for packed in packs:
            sequences = tuple(item.sequence for group in packed for item in group)
            tokens.append(sum(sequence.num_tokens for sequence in sequences))
            if tokens[-1] > most:
                largest, most = sequences, tokens[-1]
    return Packing(tuple(counts), tuple(tokens), largest)


def all_steps(data: TrainingSet, config: TrainConfig) -> list[Step]:
    """The whole run's steps. Raises ValueError for more sequences than the memory of a host holds."""
    per_epoch = max(len(data.forget), len(data.retain) if config.method == "finetune" else 0)
    if _uses_retain(config) and config.method != "finetune":
        per_epoch *= 1 + config.retain_per_forget
    if config.epochs * per_epoch > MAX_SEQUENCES:
        raise ValueError(
            f"epochs: {config.epochs} of {per_epoch} sequences (retain_per_forget: {config.retain_per_forget}) are not "
            f"accepted; {MAX_SEQUENCES} sequences in all are"
        )
    return [step for epoch in range(config.epochs) for step in epoch_steps(data, config, epoch)]


def epoch_steps(data: TrainingSet, config: TrainConfig, epoch: int) -> list[Step]:
    """The steps of one epoch (0-based): forget rows in a fresh order, retain rows drawn, none twice before all once."""
    rng = random.Random(f"{config.seed}/{epoch}")
    finetune = config.method == "finetune"
    rows: list[Group] = [((s, Role.RETAIN),) for s in data.retain] if finetune else list(data.forget)
    if data.refusals:
        drawn = [refusals.draw(rng) for refusals in data.refusals]
    order = rng.sample(range(len(rows)), len(rows))
    draw = _draw_forever(data.retain, rng) if not finetune and _uses_retain(config) else None
    per_epoch = num_steps_per_epoch(data, config)
    steps = []
    for index in range(per_epoch):
        picked = order[index * config.batch_size : (index + 1) * config.batch_size]
        groups = [rows[i] for i in picked]
        refusals: tuple[Sequence, ...] = ()
        if data.refusals and METHODS[config.method].pairs:
            groups = [((drawn[i], Role.CHOSEN), *rows[i]) for i in picked]
        elif data.refusals:
            refusals = tuple(drawn[i] for i in picked)
        if draw is not None:
            groups += [((next(draw), Role.RETAIN),) for _ in range(len(picked) * config.retain_per_forget)]
        steps.append(Step(epoch * per_epoch + index, epoch, tuple(groups), refusals, _totals(groups)))
    return steps


def _draw_forever(retain: tuple[Sequence, ...], rng: random.Random) -> Iterator[Sequence]:
    if not retain:
        raise ValueError("retain: holds no rows")
    while True:
        yield from rng.sample(retain, len(retain))


def _totals(groups: list[Group]) -> StepTotals:
    members = [member for group in groups for member in group]
    return StepTotals(
        num_forget=sum(role in (Role.FORGET, Role.REJECTED) for _, role in members),
        num_forget_tokens=sum(s.num_answer_tokens for s, role in members if role == Role.FORGET),
        num_retain_tokens=sum(s.num_answer_tokens for s, role in members if role == Role.RETAIN),
    )


def with_reference(groups: tuple[Group, ...], table: dict[str, float]) -> list[list[Item]]:
    """Groups as items with their reference log-likelihoods; retain sequences and methods without one get 0."""
    return [
        [Item(s, role, table.get(s.content_key, 0.0) if role != Role.RETAIN else 0.0) for s, role in group]
        for group in groups
    ]
