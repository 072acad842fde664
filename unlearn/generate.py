"""Answers generated in batches with a key-value cache: greedy ones, and several sampled ones for a prompt."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from unlearn.model import generating
from unlearn.scoring import Progress


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: list[tuple[int, ...]],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop: Iterable[int] = (),
    strip: bool = True,
    progress: Progress | None = None,
) -> list[str]:
    """Greedy answers to tokenised prompts, batched with a key-value cache, in the order given.

    Sorted by length so that little is padded; padding stands on the left and is masked. An answer ends at any of
    `stop`, the tokenizer's end-of-text token and what the model's own generation settings name; their other advice
    (sampling, penalties) is not taken. strip: without the white space around them.
    """
    ends = set(stop) | _end_tokens(model, tokenizer)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    with generating(model), _plain_generation(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            answers = _complete(
                model, tokenizer, [prompts[i] for i in chosen], ends, max_new_tokens=max_new_tokens, do_sample=False
            )
            for i, text in zip(chosen, answers, strict=True):
                texts[i] = text.strip() if strip else text
            if progress is not None:
                progress(len(chosen))
    return texts


@torch.no_grad()
def sample(
    model: nn.Module,
    tokenizer: Any,
    prompts: list[tuple[int, ...]],
    *,
    count: int,
    temperature: float,
    seed: int,
    max_new_tokens: int,
    stop: Iterable[int] = (),
) -> list[list[str]]:
    """`count` answers to each of these prompts, one batch, drawn from the whole distribution at a temperature; the same
    for the same seed and prompts. The caller's random state is left as it was."""
    device = next(model.parameters()).device
    ends = set(stop) | _end_tokens(model, tokenizer)
    with generating(model), _plain_generation(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        texts = _complete(
            model, tokenizer, prompts, ends, max_new_tokens=max_new_tokens, do_sample=True, temperature=temperature,
            top_k=0, top_p=1.0, num_return_sequences=count,
        )  # fmt: skip
    texts = [text.strip() for text in texts]
    return [texts[first : first + count] for first in range(0, len(texts), count)]


def _complete(
    model: nn.Module, tokenizer: Any, prompts: list[tuple[int, ...]], ends: set[int], **options: Any
) -> list[str]:
    """One call of the model's generate; padding stands on the left and is masked."""
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise ValueError("tokenizer: has neither a padding nor an end-of-text token, and generation needs one")
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for place, prompt in enumerate(prompts):
        ids[place, longest - len(prompt) :] = torch.tensor(prompt)
        mask[place, longest - len(prompt) :] = 1
    out = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        pad_token_id=pad,
        eos_token_id=sorted(ends) or None,
        **options,
    )
    return [tokenizer.decode(row[longest:], skip_special_tokens=True) for row in out]


def _end_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """Chat models end a turn with a token of their own, which is not always the tokenizer's end of text."""
    named = getattr(model.generation_config, "eos_token_id", None)
    named = named if isinstance(named, (list, tuple)) else [named]
    return {int(token) for token in (*named, tokenizer.eos_token_id) if token is not None}


@contextlib.contextmanager
def _plain_generation(model: nn.Module) -> Iterator[None]:
    """generate() fills every setting it is not given from the model's; a repetition penalty would not be greedy."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
