"""Log-likelihoods of many sequences under a model: each once, packed, no prompt or padding position at the head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unlearn.data import Item, PackedBatch, Role, Sequence, collate, pack
from unlearn.model import check_ids, head_of, hidden_states
from unlearn_kernels import sequence_logprobs, token_stats

Progress = Callable[[int], None]
T = TypeVar("T")


class TokenScores(NamedTuple):
    """Of one sequence's answer tokens [n]: log p in nats, whether the token is the model's first choice, and the mean
    and the variance of log p under p itself at its position."""

    logprob: NDArray[np.float64]
    is_argmax: NDArray[np.bool_]
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]

    def without_last(self) -> TokenScores:
        """Without the token that ends the answer, unless there is no other."""
        kept = slice(0, max(1, len(self.logprob) - 1))
        return TokenScores(self.logprob[kept], self.is_argmax[kept], self.mean[kept], self.variance[kept])


@torch.no_grad()
def score(
    model: nn.Module, sequences: list[Sequence], *, max_tokens: int, progress: Progress | None = None
) -> list[float]:
    """Log-likelihood of each sequence's answer in nats, in the order given. progress is called with the number of
    sequences done."""
    head = head_of(model)
    values: list[float] = []
    order = _by_length(sequences)
    for batch, hidden in forward([sequences[i] for i in order], model, max_tokens, progress):
        values += sequence_logprobs(hidden, head.weight, batch.targets, batch.cu_answers, **head.kwargs()).tolist()
    return _in_order(order, values)


@torch.no_grad()
def token_scores(
    model: nn.Module, sequences: list[Sequence], *, max_tokens: int, progress: Progress | None = None
) -> list[TokenScores]:
    """Everything about each answer's tokens that one forward gives, in the order given."""
    head = head_of(model)
    values: list[TokenScores] = []
    order = _by_length(sequences)
    for batch, hidden in forward([sequences[i] for i in order], model, max_tokens, progress):
        stats = token_stats(hidden, head.weight, batch.targets, **head.kwargs())
        columns = [column.cpu().numpy() for column in (tensor.double() for tensor in stats)]
        bounds = batch.cu_answers.tolist()
        for first, last in zip(bounds[:-1], bounds[1:], strict=True):
            logprob, is_argmax, mean, variance = (column[first:last] for column in columns)
            values.append(TokenScores(logprob, is_argmax == 1, mean, variance))
    return _in_order(order, values)


def _by_length(sequences: list[Sequence]) -> list[int]:
    """Sequences of about equal length share a pack's attention calls."""
    return sorted(range(len(sequences)), key=lambda i: sequences[i].num_tokens)


def _in_order(order: list[int], values: list[T]) -> list[T]:
    placed = dict(zip(order, values, strict=True))
    return [placed[i] for i in range(len(order))]


def forward(
    sequences: list[Sequence], model: nn.Module, max_tokens: int, progress: Progress | None
) -> Iterator[tuple[PackedBatch, Tensor]]:
    """Packs of these sequences, in order, with their hidden states [N, H]; runs under the caller's grad mode.

    Raises ValueError for a token that the model does not have.
    """
    check_ids(model, sequences)
    device = next(model.parameters()).device
    for packed in pack([[Item(sequence, Role.RETAIN)] for sequence in sequences], max_tokens):
        batch = collate([item for group in packed for item in group]).to(device)
        yield batch, hidden_states(model, batch)
        if progress is not None:
            progress(batch.num_sequences)


def unique(sequences: Iterable[Sequence]) -> list[Sequence]:
    """The first of each set of equal sequences: AltPO repeats each forget answer once per alternate."""
    return list({sequence.content_key: sequence for sequence in sequences}.values())
