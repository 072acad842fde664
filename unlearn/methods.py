"""The methods by name: what each asks of the data, and its loss of a packed batch.

A step's loss is forget_weight * forget + retain_weight * retain. Sequence losses are means over the forget sequences
(or pairs) of the whole optimizer step, NLL terms are means over its tokens; both denominators come in StepTotals, so
that splitting a step into micro-batches changes nothing beyond rounding. All sequences of a micro-batch, whatever their
role, go through one call of unlearn_kernels.sequence_loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from unlearn import objectives
from unlearn.config import TrainConfig
from unlearn.data import PackedBatch, Role
from unlearn.model import Head
from unlearn_kernels import Options, linear_kl, sequence_loss, token_logprobs


class Scores(NamedTuple):
    """Log-likelihoods of b sequences in nats, their lengths in tokens and their reference log-likelihoods, each [b]."""

    logprob: Tensor
    length: Tensor
    ref: Tensor


@dataclass(frozen=True)
class StepTotals:
    """Counts over one whole optimizer step, and the constant that KTO measures against."""

    num_forget: int  # sequences, or pairs
    num_forget_tokens: int
    num_retain_tokens: int
    baseline: float = 0.0  # mean of logprob - ref over the step's refusals


@dataclass(frozen=True)
class Method:
    """One way to forget.

    pairs: where the preferred answer of a (chosen, rejected) pair comes from; None for methods without pairs.
    per_token: the forget term is divided by tokens, not by sequences.
    single / paired / token_weights: exactly one is set, the loss of a sequence, of a pair, or the weight of a token.
    """

    summary: str
    parameters: tuple[str, ...] = ()
    reference: bool = False
    pairs: Literal["alternates", "refusals"] | None = None
    baseline: bool = False
    per_token: bool = False
    single: Callable[[Scores, TrainConfig, StepTotals], Tensor] | None = None
    paired: Callable[[Scores, Scores, TrainConfig], Tensor] | None = None
    token_weights: Callable[[Tensor, TrainConfig], Tensor] | None = None


def _beta(config: TrainConfig) -> float:
    assert config.beta is not None  # check_config
    return config.beta


def _dpo(chosen: Scores, rejected: Scores, config: TrainConfig) -> Tensor:
    return objectives.dpo(chosen.logprob, rejected.logprob, chosen.ref, rejected.ref, beta=_beta(config))


def _simpo(chosen: Scores, rejected: Scores, config: TrainConfig) -> Tensor:
    return objectives.simpo(
        chosen.logprob, rejected.logprob, chosen.length, rejected.length, beta=_beta(config), gamma=config.gamma or 0.0
    )


def _kto(formula: Callable[..., Tensor]) -> Callable[[Scores, TrainConfig, StepTotals], Tensor]:
    def loss(s: Scores, config: TrainConfig, totals: StepTotals) -> Tensor:
        return formula(s.logprob, s.ref, s.logprob.new_full((), totals.baseline), beta=_beta(config))

    return loss


METHODS: dict[str, Method] = {
    "finetune": Method("plain training on the --retain rows; no forget term"),
    "ga": Method(
        "gradient ascent on the forget rows' token-mean NLL; with --retain-term it is GradDiff",
        per_token=True,
        single=lambda s, c, t: objectives.ga(s.logprob),
    ),
    "npo": Method(
        "negative preference optimization (Zhang et al. 2024)",
        ("beta",),
        reference=True,
        single=lambda s, c, t: objectives.npo(s.logprob, s.ref, beta=_beta(c)),
    ),
    "simnpo": Method(
        "NPO without a reference, on the mean log-probability (Fan et al. 2024)",
        ("beta", "gamma"),
        single=lambda s, c, t: objectives.simnpo(s.logprob, s.length, beta=_beta(c), gamma=c.gamma or 0.0),
    ),
    "altpo": Method(
        "DPO towards alternate answers (Mekala et al. 2024)", ("beta",), reference=True, pairs="alternates", paired=_dpo
    ),
    "idkdpo": Method("DPO towards refusals", ("beta",), reference=True, pairs="refusals", paired=_dpo),
    "simpo": Method(
        "SimPO towards alternate answers (Meng et al. 2024)", ("beta", "gamma"), pairs="alternates", paired=_simpo
    ),
    "kto": Method(
        "KTO's undesirable branch, sigmoid form, against refusals (NPO's code)",
        ("beta",),
        reference=True,
        baseline=True,
        single=_kto(objectives.kto_sigmoid),
    ),
    "kto-log": Method(
        "the same with log sigmoid", ("beta",), reference=True, baseline=True, single=_kto(objectives.kto_logsigmoid)
    ),
    "wga": Method(
        "gradient ascent with each token weighted by its probability to the power beta",
        ("beta",),
        per_token=True,
        token_weights=lambda logprob, c: objectives.wga_weights(logprob, beta=_beta(c)),
    ),
    "satimp": Method(
        "gradient ascent with token weights p^beta (1 - p)^beta2",
        ("beta", "beta2"),
        per_token=True,
        token_weights=lambda logprob, c: objectives.satimp_weights(logprob, beta1=_beta(c), beta2=c.beta2 or 0.0),
    ),
}


def check_config(config: TrainConfig) -> Method:
    """The method a configuration names. Raises ValueError for an unknown one or a missing or needless parameter."""
    if config.method not in METHODS:
        raise ValueError(f"method: {config.method!r} is not accepted; {', '.join(METHODS)} are")
    method = METHODS[config.method]
    for name in ("beta", "beta2", "gamma"):
        value = getattr(config, name)
        if value is None and name in method.parameters:
            raise ValueError(f"{name}: missing, and {config.method} needs it")
        if value is not None and name not in method.parameters:
            raise ValueError(f"{name}: given, but {config.method} has no {name}")
    if config.beta is not None and not config.beta > 0:
        raise ValueError(f"beta: {config.beta} is not accepted; a number above 0 is")
    if config.beta2 is not None and not config.beta2 >= 0:
        raise ValueError(f"beta2: {config.beta2} is not accepted; a number of 0 or more is")
    if method.token_weights is not None and config.retain_term == "kl":
        raise ValueError(f"retain_term: kl is not accepted with {config.method}; none and nll are")
    needs_answers = method.pairs is not None or method.baseline
    if needs_answers and config.alternates is None and method.pairs != "alternates":
        raise ValueError(f"alternates: missing, and {config.method} needs a file of refusals")
    if not needs_answers and config.alternates is not None:
        raise ValueError(f"alternates: given, but {config.method} does not use them")
    if config.method == "finetune":
        if config.retain is None or config.forget is not None:
            raise ValueError("finetune: trains on --retain rows alone; give --retain and no --forget")
        if config.retain_term == "kl":
            raise ValueError("retain_term: kl is not accepted with finetune, whose model it would hold where it is")
    elif config.forget is None:
        raise ValueError(f"forget: missing, and {config.method} needs rows to forget")
    return method


class BatchLoss(NamedTuple):
    """loss: scalar, this micro-batch's share of the step's; logprobs [B] detached, nats; active [B] bool; kl: the
    retain KL summed over its rows, detached, None where the method has none."""

    loss: Tensor
    logprobs: Tensor
    active: Tensor
    kl: Tensor | None = None


def batch_loss(
    hidden: Tensor,
    head: Head,
    batch: PackedBatch,
    config: TrainConfig,
    totals: StepTotals,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
) -> BatchLoss:
    """The loss of one micro-batch from its hidden states [N, H].

    ref_hidden [M, H], ref_weight [V, H]: the reference's hidden states at the batch's M retain answer positions and its
    head, for retain_term kl; the retain sequences then stand last in the batch.
    """
    method = METHODS[config.method]
    if method.token_weights is not None:
        return _token_loss(hidden, head, batch, config, totals, method.token_weights)
    num_sequences, kl_loss, kl_sum = batch.num_sequences, None, None
    if config.retain_term == "kl":
        num_sequences = sum(role != Role.RETAIN for role in batch.roles)
        assert Role.RETAIN not in batch.roles[:num_sequences], "retain sequences stand last"
        num_rows = sum(batch.answer_lengths[:num_sequences])
        if num_sequences < batch.num_sequences:
            assert ref_hidden is not None and ref_weight is not None
            kl = linear_kl(hidden[num_rows:], head.weight, ref_hidden, ref_weight, **head.kwargs())
            kl_loss = kl.sum(dtype=torch.float64) * (config.retain_weight / totals.num_retain_tokens)
            kl_sum = kl.detach().sum(dtype=torch.float64)
        if num_sequences == 0:
            assert kl_loss is not None and kl_sum is not None
            unknown = torch.full((batch.num_sequences,), float("nan"), dtype=torch.float64, device=hidden.device)
            return BatchLoss(kl_loss, unknown, torch.ones_like(unknown, dtype=torch.bool), kl_sum)
        hidden, targets = hidden[:num_rows], batch.targets[:num_rows]
    else:
        targets = batch.targets
    sizes: list[int] = []
    for role in batch.roles[:num_sequences]:
        if role == Role.REJECTED:
            sizes[-1] += 1
        else:
            sizes.append(1)
    result = sequence_loss(
        hidden,
        head.weight,
        targets,
        batch.cu_answers[: num_sequences + 1],
        step_objective(batch, config, totals),
        groups=sizes,
        options=Options(skip_below=config.skip_below),
        **head.kwargs(),
    )
    if kl_loss is None:
        return BatchLoss(result.loss, result.logprobs, result.active)
    missing = batch.num_sequences - num_sequences
    logprobs = torch.cat([result.logprobs, result.logprobs.new_full((missing,), float("nan"))])
    active = torch.cat([result.active, result.active.new_ones(missing)])
    return BatchLoss(result.loss + kl_loss, logprobs, active, kl_sum)


def step_objective(
    batch: PackedBatch, config: TrainConfig, totals: StepTotals
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The objective that unlearn_kernels.sequence_loss calls: each sequence's share of the step's loss.

    Pairs stand next to each other: a chosen sequence's partner is its right neighbour, and the pair's loss is booked on
    the chosen one. Roles are told apart by torch.where, never by boolean indexing, which would wait for the device.
    """
    method = METHODS[config.method]
    forget_scale = config.forget_weight / max(1, totals.num_forget_tokens if method.per_token else totals.num_forget)
    retain_scale = config.retain_weight / max(1, totals.num_retain_tokens)

    def objective(logprobs: Tensor, lengths: Tensor, index: Tensor) -> Tensor:
        role = batch.role[index]
        scores = Scores(logprobs, lengths, batch.ref_logprob[index])
        loss = torch.where(role == Role.RETAIN, retain_scale * objectives.nll(logprobs), 0.0)
        if method.single is not None:
            loss = torch.where(role == Role.FORGET, forget_scale * method.single(scores, config, totals), loss)
        elif method.paired is not None:
            right = Scores(*(torch.roll(vector, -1) for vector in scores))
            loss = torch.where(role == Role.CHOSEN, forget_scale * method.paired(scores, right, config), loss)
        return loss

    return objective


def _token_loss(
    hidden: Tensor,
    head: Head,
    batch: PackedBatch,
    config: TrainConfig,
    totals: StepTotals,
    token_weights: Callable[[Tensor, TrainConfig], Tensor],
) -> BatchLoss:
    """Token-level methods: every label token of a forget row ascends with a weight of its own, held constant."""
    logprob = token_logprobs(hidden, head.weight, batch.targets, **head.kwargs())
    # output_size: known on the host, so that nothing waits for the device
    sequence = torch.arange(batch.num_sequences, device=hidden.device).repeat_interleave(
        batch.cu_answers.diff(), output_size=len(batch.targets)
    )
    is_retain = (batch.role == Role.RETAIN)[sequence]
    forget = token_weights(logprob.detach(), config) * (config.forget_weight / max(1, totals.num_forget_tokens))
    weight = torch.where(is_retain, -config.retain_weight / max(1, totals.num_retain_tokens), forget)
    loss = (weight * logprob).sum(dtype=torch.float64)
    logprobs = torch.zeros(batch.num_sequences, dtype=torch.float64, device=hidden.device)
    logprobs.index_add_(0, sequence, logprob.detach().double())
    return BatchLoss(loss, logprobs, torch.ones_like(logprobs, dtype=torch.bool))
