"""Cost of an evaluation's likelihood metrics: `python -m bench.evaluation --out DIR`.

One model, rows shaped like TOFU's (an answer, a paraphrase, five wrong answers; holdout rows with an answer alone), and
three ways to probability, truth ratio, exact memorization, extraction strength and membership inference by loss,
zlib, min-k and min-k++:

- unlearn: each distinct answer once, packed, only answer positions at the head, no logits (unlearn.evaluate);
- one padded forward: each answer once, in batches padded to their longest, float32 log-softmax of all positions;
- a padded forward per metric: the same, and every metric does its own, as the public codes' evaluators do. They run
  min-k++ twice; here it is run once.

The results have to agree before anything is timed: in float32 every metric, in bfloat16, whose rounding moves an argmax
or an order of near ties, the likelihoods. Costs are in rows (a forget row with all its answers, or a holdout row) per
second, and in units: the time over that of one torch.mm of N x H x V, N the tokens of all distinct answers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bench.measure import Fields, has_speed, outcome, speed
from bench.rows import RESULTS, RowFile, environment, first_line
from bench.timing import Interleaved, Stopwatch, Unit, peak_if_any, quartiles
from unlearn.data import Row, Sequence
from unlearn.evaluate import EvalRow, EvalSet, Evaluation, SetScores, score_sets, summarize
from unlearn.model import generating, prepare
from unlearn.scoring import TokenScores, unique

CPU = torch.device("cpu")
SIZE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
VOCAB, ROWS = 32000, 8
TINY_SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY_VOCAB, TINY_ROWS = 400, 3
WRONG, PROMPT = 5, 28
# TOFU's answers in Llama-2 tokens: 43 on average, 9 to 96
MEAN_LENGTH, SHORTEST, LONGEST = 43, 9, 96
CONTINUED = 12  # tokens of an answer that the model knows; one at a time is slow
MAX_TOKENS, BATCH = 16384, 32  # `unlearn eval`'s budget of a pack; the public codes' batch
# what answers need to be run for, besides paraphrased and wrong ones: a forward each
FORGET_PASSES = ("logprob", "is_argmax", "is_argmax", "logprob", "logprob", "logprob", "all")
HOLDOUT_PASSES = ("logprob", "logprob", "logprob", "all")
# Nats per token, and of every metric, by which two float32 computations of the same may differ; in bf16 logits alone
# are rounded by 2^-9 of their size.
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 0.05}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="at most this many per dtype, at least 2")
    parser.add_argument("--seconds", type=float, default=30.0, help="no new round of a dtype after this many")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of evaluation.jsonl")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: tries the script, measures nothing")
    args = parser.parse_args()
    shared = environment() | {"tiny": args.tiny}
    shared["command"] = shared["command"].replace(str(args.out), "DIR")  # where things lie here is nobody's business
    with RowFile(args.out, "evaluation", shared) as rows:
        for dtype in (torch.bfloat16, torch.float32):
            for row in measure(dtype, args):
                rows.write(row, failed=not has_speed(row))
                per_second = f"{row['rows_per_second']:.2f} rows/s, " if has_speed(row) else ""
                print(f"{row['dtype']:9} {row['provider']:30} {per_second}{outcome(row)}", flush=True)
    return 1 if rows.failed else 0


@dataclass(frozen=True)
class Way:
    """A way to the metrics; sequences: how many it feeds."""

    name: str
    run: Callable[[], Evaluation]
    sequences: int


def measure(dtype: torch.dtype, args: argparse.Namespace) -> Iterator[Fields]:
    """A row per way, interleaved."""
    size, vocab, count = (TINY_SIZE, TINY_VOCAB, TINY_ROWS) if args.tiny else (SIZE, VOCAB, ROWS)
    model = make_model(size, vocab)
    sets = make_sets(model, vocab, count)
    model = model.to(dtype)
    distinct = unique(sequence for group in sets for row in group.rows for sequence in row.sequences)
    num_tokens = sum(sequence.num_answer_tokens for sequence in distinct)
    per_metric = sum(len(passes(group)) * len(group.rows) for group in sets) + (WRONG + 1) * count
    ways = [
        Way("unlearn", lambda: summarize(score_sets(model, sets, max_tokens=MAX_TOKENS)), len(distinct)),
        Way("one padded forward", lambda: padded_evaluation(model, sets, repeated=False), len(distinct)),
        Way("a padded forward per metric", lambda: padded_evaluation(model, sets, repeated=True), per_metric),
    ]
    found = {way.name: attempt(way) for way in ways}
    timed = Interleaved(Stopwatch(CPU), warmups=0)  # the comparison was one
    hidden = torch.randn(num_tokens, size["hidden_size"], dtype=dtype)
    timed.add("unit", Unit(hidden, model.lm_head.weight))
    errors = {way.name: compared(found[way.name], found["unlearn"], dtype) for way in ways}
    for way in ways:
        if has_speed(errors[way.name]):
            timed.add(way.name, way.run)
    timed.rounds(args.seconds, least=2, most=args.rounds)
    unit_ms = quartiles(timed.times["unit"])[1]
    num_rows = sum(len(group.rows) for group in sets)
    for way in ways:
        row = {
            "case": "evaluation",
            "provider": way.name,
            "shape": {"N": num_tokens, "H": size["hidden_size"], "V": vocab, "layers": size["num_hidden_layers"]},
            "dtype": str(dtype).removeprefix("torch."),
            "rows": count,
            "sequences": way.sequences,
            **errors[way.name],
        }
        if way.name in timed.failed:
            row["failed"] = timed.failed[way.name]
        if has_speed(row):
            row |= speed(timed.times[way.name], unit_ms) | {"peak_mib": peak_if_any(way.run, CPU)}
            row["rows_per_second"] = 1e3 * num_rows / row["ms"]
        yield row


def attempt(way: Way) -> Evaluation | str:
    try:
        return way.run()
    except Exception as error:  # its row says what
        return first_line(error)


def compared(found: Evaluation | str, ours: Evaluation | str, dtype: torch.dtype) -> Fields:
    """How far the likelihoods and the metrics are from ours; `refused` where that is more than rounding."""
    if isinstance(found, str) or isinstance(ours, str):
        return {"failed": found if isinstance(found, str) else f"nothing to compare with: {ours}"}
    names = ("answer_nll", "correct_nll", "wrong_nll")
    pairs = [
        (getattr(found.sets[group], name), getattr(ours.sets[group], name)) for group in ours.sets for name in names
    ]
    # numpy's maximum of a NaN is NaN; Python's depends on the order
    nll = float(np.max([np.abs(theirs - own).max(initial=0) for theirs, own in pairs]))
    metric = float(np.max([abs(found.metrics[name] - value) for name, value in ours.metrics.items()]))
    fields: Fields = {"nll_difference": nll, "metric_difference": metric}
    worst = np.maximum(nll, metric) if dtype == torch.float32 else nll
    return fields if worst <= ALLOWED[dtype] else fields | {"refused": True}  # a NaN is refused too


# ------------------------------------------------------------------------------------------------------- model and rows


def make_model(size: dict[str, int], vocab: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, max_position_embeddings=256, pad_token_id=0, bos_token_id=None, eos_token_id=1,
        initializer_range=0.1, num_key_value_heads=size["num_attention_heads"], **size,
    )  # fmt: skip
    return prepare(LlamaForCausalLM(config))


def make_sets(model: Any, vocab: int, count: int) -> list[EvalSet]:
    """Random tokens in TOFU's lengths; every second forget answer ends as the model itself goes on, or nothing would be
    memorized."""
    random = np.random.default_rng(0)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(int(token) for token in random.integers(2, vocab, length))

    def length() -> int:
        return int(np.clip(random.normal(MEAN_LENGTH, 17), SHORTEST, LONGEST))

    def answer(prompt: tuple[int, ...], key: str, known: bool = False) -> Sequence:
        ids, size = prompt + tokens(SHORTEST), length()
        if known:
            size = SHORTEST + CONTINUED
            ids = continued(model, ids, CONTINUED)
        return Sequence(key, (*ids, *tokens(len(prompt) + size - len(ids)), 1), len(prompt))

    sets = []
    for name, wrong in (("forget", WRONG), ("holdout", 0)):
        rows = []
        for i in range(count):
            prompt, key = tokens(PROMPT), f"{name}:{i}"
            own = answer(prompt, key, known=name == "forget" and i % 2 == 0)
            other = answer(prompt, f"{key}#1") if wrong else own
            others = tuple(answer(prompt, f"{key}#{2 + k}") for k in range(wrong))
            text = " ".join(map(str, own.input_ids))
            rows.append(EvalRow(Row(key, (("user", "?"),), text), own, other, others))
        sets.append(EvalSet(name, "forget" if wrong else "holdout", tuple(rows)))
    return sets


@torch.no_grad()
def continued(model: Any, ids: tuple[int, ...], length: int) -> tuple[int, ...]:
    """These tokens and what the model says after them, greedily."""
    start = torch.tensor([ids])
    with generating(model):
        out = model.generate(
            input_ids=start, attention_mask=torch.ones_like(start), max_new_tokens=length, do_sample=False
        )
    return tuple(out[0].tolist())


# ------------------------------------------------------------------------------------------------------- the public way


def passes(group: EvalSet) -> tuple[str, ...]:
    return FORGET_PASSES if group.kind == "forget" else HOLDOUT_PASSES


@torch.no_grad()
def padded_evaluation(model: nn.Module, sets: list[EvalSet], *, repeated: bool) -> Evaluation:
    """The metrics from padded batches. repeated: a forward per metric; else one that gives everything."""
    scores = {}
    with generating(model):
        for group in sets:
            answers = [row.answer for row in group.rows]
            for wanted in passes(group) if repeated else ("all",):
                tokens = padded_tokens(model, answers, wanted)
            answer_nll, correct_nll = average_nll(tokens), None
            wrong_nll = np.zeros((len(answers), 0))
            if group.kind == "forget":
                correct_nll = average_nll(padded_tokens(model, [row.paraphrased for row in group.rows], "logprob"))
                wrong = [one for row in group.rows for one in row.wrong]
                wrong_nll = average_nll(padded_tokens(model, wrong, "logprob")).reshape(len(answers), WRONG)
            scores[group.name] = SetScores(
                answer_nll=answer_nll,
                correct_nll=answer_nll if correct_nll is None else correct_nll,
                wrong_nll=wrong_nll,
                kind=group.kind,
                tokens=tuple(tokens),
                answers=tuple(row.row.answer for row in group.rows),
            )
    return summarize(scores)


def average_nll(tokens: list[TokenScores]) -> np.ndarray:
    return np.array([-one.logprob.mean() for one in tokens])


def padded_tokens(model: nn.Module, sequences: list[Sequence], wanted: str) -> list[TokenScores]:
    """`wanted` ("logprob", "is_argmax" or "all") of each answer's tokens, from the logits of every position of padded
    batches in the order given; the other columns are zeros."""
    found = []
    for first in range(0, len(sequences), BATCH):
        batch = sequences[first : first + BATCH]
        longest = max(len(sequence.input_ids) for sequence in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, sequence in enumerate(batch):
            ids[place, : len(sequence.input_ids)] = torch.tensor(sequence.input_ids)
            mask[place, : len(sequence.input_ids)] = 1
        columns = columns_of(model(input_ids=ids, attention_mask=mask).logits[:, :-1], ids[:, 1:], wanted)
        for place, sequence in enumerate(batch):
            span = slice(sequence.answer_start - 1, len(sequence.input_ids) - 1)
            logprob, is_argmax, mean, variance = (column[place, span].double().numpy() for column in columns)
            found.append(TokenScores(logprob, is_argmax == 1, mean, variance))
    return found


def columns_of(logits: Tensor, targets: Tensor, wanted: str) -> list[Tensor]:
    """log p of the target, whether it is the argmax, mean and variance of log p: [B, T] each."""
    columns = [torch.zeros(targets.shape) for _ in range(4)]
    if wanted in ("is_argmax", "all"):
        columns[1] = (logits.argmax(-1) == targets).float()
    if wanted in ("logprob", "all"):
        logprobs = logits.float().log_softmax(-1)
        columns[0] = logprobs.gather(-1, targets[..., None])[..., 0]
        if wanted == "all":
            p = logprobs.exp()
            columns[2] = (p * logprobs).sum(-1)
            columns[3] = (p * logprobs.square()).sum(-1) - columns[2].square()
    return columns


if __name__ == "__main__":
    sys.exit(main())
