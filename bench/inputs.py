"""Inputs of the benchmarks, and what is true of them in float64.

N rows, H hidden, V vocabulary, S rows whose truth is known. Hidden states are peaked: half of the targets are aligned
with theirs, by some 15 nats. Sequences have 64 tokens. The float64 truth never holds N x V numbers: rows and vocabulary
are walked in blocks, and errors are taken on a sample of whole sequences (NPO's weight of a row needs its sequence).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

BETA = 0.1
SEQUENCE = 64
IGNORE = -100
# float64 numbers in one block of logits: 512 MiB
_BLOCK = 1 << 26

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    """Peaked inputs: half of the targets are aligned with their hidden state, some by 30 nats."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    ref: Tensor

    @staticmethod
    def make(shape: Shape, dtype: torch.dtype, device: torch.device | str = "cpu") -> Case:
        num_tokens, width, vocab = shape
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        weight = normal(vocab, width).mul_(width**-0.5)
        targets = torch.randint(vocab, (num_tokens,), generator=generator, device=device)
        hidden = normal(num_tokens, width).mul_(2)
        aligned = torch.arange(num_tokens, device=device) % 2 == 0
        hidden[aligned] += 15 * weight[targets[aligned]] / weight[targets[aligned]].norm(dim=1, keepdim=True) ** 2
        length = min(SEQUENCE, num_tokens)
        cu_seqlens = torch.arange(0, num_tokens + 1, length, device=device)
        ref = torch.randn(len(cu_seqlens) - 1, generator=generator, dtype=torch.float64, device=device) - length * 5
        return Case(hidden.to(dtype), weight.to(dtype), targets, cu_seqlens, ref)

    @property
    def shape(self) -> Shape:
        return (*self.hidden.shape, self.weight.shape[0])

    @property
    def length(self) -> int:
        """Tokens of each sequence; all are equal."""
        return self.hidden.shape[0] // (len(self.cu_seqlens) - 1)

    def unsaturated(self) -> Case:
        """With reference log-likelihoods near its own, where NPO weighs every sequence alike."""
        num_sequences = len(self.cu_seqlens) - 1
        sequence = torch.arange(num_sequences, device=self.ref.device).repeat_interleave(self.length)
        return replace(self, ref=_likely(self.hidden, self.weight, self.targets, sequence, num_sequences))

    def ask(self, *, hidden: bool, weight: bool) -> Case:
        """The same tensors, asking for these gradients and holding none."""
        self.hidden.requires_grad_(hidden).grad = None
        self.weight.requires_grad_(weight).grad = None
        return self


@dataclass(frozen=True)
class Padded:
    """A batch as trainers hold it: hidden states [B, T, H] of all positions, labels [B, T] with -100."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    ref: Tensor

    @staticmethod
    def make(batch: int, length: int, width: int, vocab: int, share: float, dtype: torch.dtype, device: str) -> Padded:
        """The last `share` of a row's positions before its padding carry labels; rows differ in length by a factor of
        two."""
        case = Case.make((batch * length, width, vocab), dtype, device)
        labels = case.targets.reshape(batch, length).roll(1, 1)
        fill = torch.linspace(0.5, 1.0, batch, device=device)
        ends = (fill * length).long()
        counts = (share * length * fill / fill.mean()).round().long().clamp(1, length // 2)
        place = torch.arange(length, device=device)
        labelled = (place < ends[:, None]) & (place >= (ends - counts)[:, None])
        labels = torch.where(labelled, labels, IGNORE)
        place = (labels[:, 1:] != IGNORE).nonzero()
        hidden, targets = case.hidden.reshape(batch, length, width), labels[:, 1:][tuple(place.T)]
        ref = _likely(hidden[:, :-1][tuple(place.T)], case.weight, targets, place[:, 0], batch)
        return Padded(hidden, case.weight, labels, ref)

    @property
    def num_labels(self) -> int:
        return int((self.labels[:, 1:] != IGNORE).sum())

    def ask(self, *, hidden: bool, weight: bool) -> Padded:
        self.hidden.requires_grad_(hidden).grad = None
        self.weight.requires_grad_(weight).grad = None
        return self


@torch.no_grad()
def _likely(hidden: Tensor, weight: Tensor, targets: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
    """Sequence log-likelihoods [B] of these rows in the inputs' precision, five nats off. A constant of the problem: it
    need not be exact, only the same for all."""
    generator = torch.Generator(hidden.device).manual_seed(1)
    ref = 5 * torch.randn(num_sequences, generator=generator, dtype=torch.float64, device=hidden.device)
    for rows, labels, owner in zip(hidden.split(1024), targets.split(1024), sequence.split(1024), strict=True):
        logprob = (rows @ weight.T).float().log_softmax(-1).gather(1, labels[:, None])[:, 0]
        ref.index_add_(0, owner, logprob.double())
    return ref


def npo(logprob_B: Tensor, ref_B: Tensor) -> Tensor:
    """Mean over sequences of -(2/beta) log sigmoid(-beta (logprob - ref)), for the providers without a loss of their
    own."""
    return (-2 / BETA * torch.nn.functional.logsigmoid(-BETA * (logprob_B - ref_B))).mean()


@dataclass(frozen=True)
class Truth:
    """float64 values of a case's sampled rows, and of some rows of the weight's gradient where they were asked for.

    Gradients are the NPO loss's; slope_S is its dloss/dlogprob. dweight_CH is known at vocabulary entries `columns`.
    """

    rows: Tensor
    logprob_S: Tensor
    logsumexp_S: Tensor
    slope_S: Tensor
    dhidden_SH: Tensor
    columns: Tensor | None = None
    dweight_CH: Tensor | None = None


@torch.no_grad()
def truth_of(case: Case, *, num_rows: int = 512, num_columns: int = 0) -> Truth:
    """num_columns > 0 also walks all N rows, for the weight's gradient at that many vocabulary entries."""
    length, num_sequences, vocab = case.length, len(case.cu_seqlens) - 1, len(case.weight)
    device = case.hidden.device
    picked = max(1, min(num_sequences, num_rows // length))
    chosen = torch.linspace(0, num_sequences - 1, picked, device=device).long()
    rows = (chosen[:, None] * length + torch.arange(length, device=device)).flatten()
    hidden, targets = case.hidden[rows], case.targets[rows]
    logprob, lse = _logprobs(hidden, case.weight, targets)
    sequence = torch.arange(picked, device=device).repeat_interleave(length)
    slope = npo_slope(logprob, case.ref[chosen], sequence) * picked / num_sequences
    truth = Truth(rows, logprob, lse, slope, slope[:, None] * _dlogprob(hidden, case.weight, targets, lse))
    if not num_columns:
        return truth
    logprob, lse = _logprobs(case.hidden, case.weight, case.targets)
    sequence = torch.arange(num_sequences, device=device).repeat_interleave(length)
    slope = npo_slope(logprob, case.ref, sequence)
    # Half of them targets, whose gradient has the large term; the others spread over the vocabulary.
    spread = torch.linspace(0, vocab - 1, num_columns // 2, device=device).long()
    columns = torch.cat([case.targets[: num_columns - len(spread)], spread]).unique()
    return replace(truth, columns=columns, dweight_CH=_dweight(case, columns, lse, slope))


@torch.no_grad()
def padded_truth(batch: Padded) -> Tensor:
    """The NPO loss's gradient in all hidden states [B, T, H], float64; zero where no label is."""
    labels = batch.labels[:, 1:]
    place = (labels != IGNORE).nonzero()
    hidden, targets = batch.hidden[:, :-1][place[:, 0], place[:, 1]], labels[place[:, 0], place[:, 1]]
    logprob, lse = _logprobs(hidden, batch.weight, targets)
    slope = npo_slope(logprob, batch.ref, place[:, 0])
    out = torch.zeros(batch.hidden.shape, dtype=torch.float64, device=hidden.device)
    out[place[:, 0], place[:, 1]] = slope[:, None] * _dlogprob(hidden, batch.weight, targets, lse)
    return out


def npo_slope(logprob: Tensor, ref_B: Tensor, sequence: Tensor) -> Tensor:
    """dNPO / dlogprob of each row, 2 sigmoid(beta (logprob_b - ref_b)) / B; sequence names each row's b."""
    ratio = torch.zeros_like(ref_B).index_add(0, sequence, logprob) - ref_B
    return (2 * torch.sigmoid(BETA * ratio) / len(ref_B))[sequence]


def _logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(log p of the target, logsumexp) of each row, float64."""
    vocab_block = max(1, _BLOCK // weight.shape[1])
    row_block = max(1, _BLOCK // vocab_block)
    logprobs, normalisers = [], []
    for rows, labels in zip(hidden.split(row_block), targets.split(row_block), strict=True):
        rows = rows.double()
        lse = torch.full((len(rows),), -math.inf, dtype=torch.float64, device=hidden.device)
        for block in weight.split(vocab_block):
            lse = torch.logaddexp(lse, (rows @ block.double().T).logsumexp(1))
        logprobs.append((rows * weight[labels].double()).sum(1) - lse)
        normalisers.append(lse)
    return torch.cat(logprobs), torch.cat(normalisers)


def _dlogprob(hidden: Tensor, weight: Tensor, targets: Tensor, lse: Tensor) -> Tensor:
    """W[y] - sum_v p_v W_v per row, in blocks of the vocabulary."""
    hidden, out = hidden.double(), weight[targets].double()
    for block in weight.split(max(1, _BLOCK // max(weight.shape[1], len(hidden)))):
        block = block.double()
        out -= torch.exp(hidden @ block.T - lse[:, None]) @ block
    return out


def matrix_core_error(width: int, logsumexp: Tensor) -> float:
    """rms nats that the matrix cores' sums may put between these rows' log-likelihoods and float64: what a right answer
    may be off, and no aim.

    The cores add 16 products at a time to a float32 sum and cut off what does not fit, always toward zero, so that the
    errors are a bias and do not average out. Each of the width / 16 steps cuts half a unit in the last place, 2**-24 of
    the sum, on average, and as much again where the products are aligned before they are added; the sum grows from 0 to
    z, half of it on average. dlogsumexp = sum_v p_v dz_v, and sum_v p_v z_v is logsumexp less the entropy.
    """
    return width / 16 * 2.0**-24 * float(logsumexp.double().square().mean().sqrt())


def _dweight(case: Case, columns: Tensor, lse: Tensor, slope: Tensor) -> Tensor:
    """sum_t slope_t ([y_t = v] - p_tv) h_t for the vocabulary entries v in columns."""
    weight = case.weight[columns].double()
    out = torch.zeros_like(weight)
    size = max(1, _BLOCK // max(weight.shape))
    for start in range(0, len(lse), size):
        part = slice(start, start + size)
        hidden = case.hidden[part].double()
        gradient = (case.targets[part, None] == columns).double() - torch.exp(hidden @ weight.T - lse[part, None])
        out += (slope[part, None] * gradient).T @ hidden
    return out


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth|; NaN where the value has one."""
    truth = truth.double()
    return float((value.detach().double() - truth).norm() / truth.norm().clamp_min(1e-300))
