"""MUSE's metrics: what a model still recites (VerbMem), still knows (KnowMem) and still gives away (PrivLeak).

Shi et al. 2024 (arXiv:2407.06460); where the paper leaves room, what its code muse_bench does:

- VerbMem: a prompt of the forget text, 128 greedy tokens after it, ROUGE-L F1 without stemming against the true
  continuation, whose first 128 tokens count. muse_bench tokenises a continuation that is a text of its own with the
  tokenizer's special tokens, so that a begin-of-text token is one of the 128.
- KnowMem: answered questions, then the question; 32 greedy tokens, cut at an empty line or at the next question;
  ROUGE-L F1 without stemming against the answer. Once for the forget set, once for the retain set.
- PrivLeak: metrics.privleak of the AUCs by the lowest 40 % of token log-probabilities, forget set against holdout.

The paper speaks of ROUGE-L and its code takes F1 for both; the recall stands beside it. All are shares of 1 here, and
times 100 in MUSE's tables; PrivLeak is in percent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from unlearn import metrics
from unlearn.data import PLAIN_TEMPLATE, Row, windows
from unlearn.evaluate import EvalSet, membership_auc, num_scored, score_sets
from unlearn.generate import generate
from unlearn.scoring import Progress

VERBMEM_TOKENS = 128
KNOWMEM_TOKENS = 32
KNOWMEM_ENDS = ("\n\n", "\nQuestion", "Question:")
# AUC of min-k between forget and holdout under MUSE's retrained models (Llama-2-7B for news, ICLM-7B for books), from
# muse_bench's constants; as metrics.auc has it, which is one minus theirs
GOLD_AUC = {"news": 1 - 0.4772, "books": 1 - 0.5393}
# where the hub's data sets have what each metric asks for
HUB_SETS = {
    "verbmem": "verbmem/forget",
    "forget_qa": "knowmem/forget_qa",
    "forget_shots": "knowmem/forget_qa_icl",
    "retain_qa": "knowmem/retain_qa",
    "retain_shots": "knowmem/retain_qa_icl",
    "forget": "privleak/forget",
    "holdout": "privleak/holdout",
}


class Prompt(NamedTuple):
    """Token ids to generate from, and the text that should or should not come."""

    key: str
    ids: tuple[int, ...]
    truth: str


@dataclass(frozen=True)
class MuseSets:
    """What there is to measure with; an empty part leaves its metrics out. privleak: the forget and the holdout set."""

    verbmem: tuple[Prompt, ...] = ()
    forget_qa: tuple[Prompt, ...] = ()
    retain_qa: tuple[Prompt, ...] = ()
    privleak: tuple[EvalSet, ...] = ()

    @property
    def num_pieces(self) -> int:
        """What the progress of evaluate_muse counts to: generated texts and scored sequences."""
        generated = len(self.verbmem) + len(self.forget_qa) + len(self.retain_qa)
        return generated + num_scored(self.privleak)


def verbmem_prompts(
    rows: Iterable[Row], tokenizer: Any, *, prompt_tokens: int, window: int | None = None
) -> tuple[Prompt, ...]:
    """Prompts of prompt + completion rows, or of documents (each window of one, where `window` cuts them).

    A document's prompt is its first prompt_tokens tokens, or the first half of one that is shorter than twice as many,
    after the begin-of-text token where the tokenizer has one; what follows is the truth. Raises ValueError for a row
    that is a question.
    """
    prompts = []
    for row in windows(rows, tokenizer, size=window):
        if row.document:
            (whole,) = (row,) if row.ids else windows([row], tokenizer, size=None)
            lead = int(tokenizer.bos_token_id is not None)
            cut = lead + min(prompt_tokens, (len(whole.ids) - lead) // 2)
            ids, truth = whole.ids[:cut], whole.ids[cut : cut + VERBMEM_TOKENS]
        elif row.raw:
            ids = tuple(tokenizer(row.turns[0][1])["input_ids"])
            truth = tuple(tokenizer(row.answer)["input_ids"][:VERBMEM_TOKENS])
        else:
            raise ValueError(f"verbmem: {row.key} is a question; documents and prompt + completion rows are accepted")
        if not ids:
            raise ValueError(f"verbmem: the prompt of {row.key} has no token")
        prompts.append(Prompt(row.key, ids, _clean(tokenizer.decode(truth, skip_special_tokens=True), tokenizer)))
    return tuple(prompts)


def knowmem_prompts(rows: Iterable[Row], shots: Iterable[Row], tokenizer: Any) -> tuple[Prompt, ...]:
    """Prompts of question + answer rows, each after the answered questions of `shots`, in plain words, no template.

    Raises ValueError for a row that is anything else.
    """
    head = "".join(PLAIN_TEMPLATE.format(question=_question(row), answer=row.answer) + "\n\n" for row in shots)
    prompts = []
    for row in rows:
        text = head + PLAIN_TEMPLATE.format(question=_question(row), answer="")
        prompts.append(Prompt(row.key, tuple(tokenizer(text)["input_ids"]), row.answer))
    return tuple(prompts)


def _question(row: Row) -> str:
    if row.raw or len(row.turns) != 1:
        raise ValueError(f"knowmem: {row.key} is no question with an answer; question + answer rows are accepted")
    return row.turns[0][1]


def check_lengths(sets: MuseSets, max_length: int | None) -> None:
    """Raises ValueError naming the prompt that leaves no room for what is generated after it."""
    for prompts, new in ((sets.verbmem, VERBMEM_TOKENS), (sets.forget_qa + sets.retain_qa, KNOWMEM_TOKENS)):
        for prompt in prompts:
            if max_length is not None and len(prompt.ids) + new > max_length:
                raise ValueError(
                    f"{prompt.key}: a prompt of {len(prompt.ids)} tokens and {new} new ones are more than the"
                    f" model's {max_length} positions"
                )


def evaluate_muse(
    model: nn.Module,
    tokenizer: Any,
    sets: MuseSets,
    *,
    gold_min_k_auc: float | None,
    max_tokens: int,
    batch_size: int,
    progress: Progress | None = None,
) -> dict[str, float]:
    """verbmem_f, knowmem_f, knowmem_r with their recalls, the AUC of min-k and, with the gold model's, PrivLeak."""
    values: dict[str, float] = {}
    for name, prompts, new, ends in (
        ("verbmem_f", sets.verbmem, VERBMEM_TOKENS, ()),
        ("knowmem_f", sets.forget_qa, KNOWMEM_TOKENS, KNOWMEM_ENDS),
        ("knowmem_r", sets.retain_qa, KNOWMEM_TOKENS, KNOWMEM_ENDS),
    ):
        if not prompts:
            continue
        texts = generate(
            model, tokenizer, [prompt.ids for prompt in prompts], max_new_tokens=new, batch_size=batch_size,
            strip=False, progress=progress,
        )  # fmt: skip
        generated = [_before(_clean(text, tokenizer), ends) for text in texts]
        rouge = metrics.rouge_l(generated, [prompt.truth for prompt in prompts], use_stemmer=False)
        values |= {name: float(rouge.f1.mean()), f"{name}_recall": float(rouge.recall.mean())}
    if sets.privleak:
        scores = score_sets(model, sets.privleak, max_tokens=max_tokens, progress=progress)
        own = membership_auc("min_k", scores["forget"], scores["holdout"])
        values["mia_min_k_auc"] = own
        if gold_min_k_auc is not None:
            values["privleak"] = metrics.privleak(own, gold_min_k_auc)
    return values


def sources(data: str | None, given: Mapping[str, str | None]) -> dict[str, str]:
    """Where each set comes from: what is given, then the data set `data` (muse:news, muse:books) of the hub."""
    found = {name: source for name, source in given.items() if source is not None}
    if data is not None:
        corpus = data.removeprefix("muse:")
        if corpus not in GOLD_AUC or corpus == data:
            raise ValueError(f"data: {data!r} is not accepted; muse:news and muse:books are")
        found = {name: f"{data}/{place}" for name, place in HUB_SETS.items()} | found
    elif "forget" in found:
        found.setdefault("verbmem", found["forget"])
    return found


def _before(text: str, ends: Iterable[str]) -> str:
    for end in ends:
        text = text.partition(end)[0]
    return text


def _clean(text: str, tokenizer: Any) -> str:
    """muse_bench decodes with clean_up_tokenization_spaces, which today's tokenizers leave out unless asked here."""
    return tokenizer.clean_up_tokenization(text)
