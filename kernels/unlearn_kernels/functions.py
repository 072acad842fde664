"""The public functions: check, describe the call in a Spec, hand over to the autograd functions.

hidden is [N, H], weight [V, H], targets [N] int64 in [0, V), cu_seqlens [B + 1] int32 or int64: sequence b owns rows
cu_seqlens[b]:cu_seqlens[b + 1], as in varlen flash attention. Logits are

    z = softcap(logit_scale (hidden W^T + bias + s (hidden A^T) B^T)),   softcap(x) = cap tanh(x / cap)

dtypes: hidden and weight both bfloat16, float16, float32 or float64, or a float32 weight beside a 16-bit hidden. Token
results are float32, sequence sums and losses float64, everything float64 for float64 inputs; gradients come back in the
inputs' dtypes.

Every function takes the head's keyword arguments:
    bias [V]; logit_scale; softcap; lora = (A [r, H], B [V, r], s); options (see Options)
and raises ValueError with the argument's name, its value and what is accepted, before anything is launched. On CUDA a
target out of range makes its row NaN and raises at a later call: checking at once would stop the host. A cu_seqlens on
CUDA costs one host synchronisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import autograd, backends, checks, deferred, objectives
from .objectives import Objective
from .options import Needs, Options, Spec, accumulation_dtype
from .problem import Problem

LoRA = tuple[Tensor, Tensor, float]
_DEFAULTS = Options()


class SequenceLoss(NamedTuple):
    """loss: scalar float64, the sum of the objective's losses. logprobs [B] float64, detached. active [B] bool: whose
    gradient was computed; False where dloss/dlogprob is exactly zero or below Options.skip_below."""

    loss: Tensor
    logprobs: Tensor
    active: Tensor


class TokenStats(NamedTuple):
    """Per row [N]: log p_y; whether y is the argmax (the lowest index among ties); E_p[log p] (minus the entropy);
    Var_p[log p]."""

    logprobs: Tensor
    is_argmax: Tensor
    mean_logprob: Tensor
    var_logprob: Tensor


class Packed(NamedTuple):
    """hidden [N, H], targets [N], cu_seqlens [B + 1] int64, kept [B] int64: the batch rows that had any label."""

    hidden: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    kept: Tensor


class _Head(NamedTuple):
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    spec: Spec


def _head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    lora: LoRA | None = None,
    options: Options = _DEFAULTS,
) -> _Head:
    """Checks everything but cu_seqlens and describes the call."""
    checks.check_hidden_weight(hidden, weight)
    checks.check_head(hidden, weight, bias, logit_scale, softcap, lora)
    checks.check_options(options)
    if targets is not None:
        checks.check_targets(targets, hidden, weight.shape[0])
        deferred.check_earlier_targets(targets, weight.shape[0])
    lora_a, lora_b, lora_scale = (None, None, 0.0) if lora is None else lora
    enabled = torch.is_grad_enabled()
    needs = Needs(*(enabled and x is not None and x.requires_grad for x in (hidden, weight, bias, lora_a, lora_b)))
    spec = Spec(
        logit_scale=float(logit_scale),
        softcap=0.0 if softcap is None else float(softcap),
        lora_scale=float(lora_scale),
        workspace_bytes=options.workspace(hidden.device),
        skip_below=options.skip_below,
        backend=backends.choose(hidden, weight, options.backend).name,
        needs=needs,
    )
    return _Head(bias, lora_a, lora_b, spec)


def _planless(hidden: Tensor, head: dict[str, Any]) -> bool:
    """Whether the host cannot know the sequences' lengths, while torch.compile traces or a CUDA graph is captured, or
    shall do without them."""
    return torch.compiler.is_compiling() or _capturing(hidden) or head.get("options", _DEFAULTS).capturable


def _capturing(hidden: Tensor) -> bool:
    return hidden.is_cuda and torch.cuda.is_current_stream_capturing()


def _boundaries(hidden: Tensor, cu_seqlens: Tensor) -> list[int]:
    checks.check_cu_seqlens(cu_seqlens, hidden)
    boundaries = cu_seqlens.tolist()
    checks.check_boundaries(boundaries, hidden.shape[0])
    return boundaries


def _row_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, head: _Head) -> Tensor:
    """float64 [N]."""
    if torch.compiler.is_compiling():
        targets = backends.checked_targets(targets, weight.shape[0])
    return autograd.RowValues.apply(hidden, weight, head.bias, head.lora_a, head.lora_b, targets, None, None, head.spec)


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, **head: Any) -> Tensor:
    """log p(targets_t | hidden_t) = z_t[y_t] - logsumexp_v z_t[v], nats, [N]; differentiable under any upstream
    gradient."""
    row_logprobs = _row_logprobs(hidden, weight, targets, _head(hidden, weight, targets, **head))
    return row_logprobs.to(accumulation_dtype(hidden.dtype))


def sequence_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, cu_seqlens: Tensor, **head: Any) -> Tensor:
    """Sums of the token log-probabilities of each sequence, nats, [B] float64; differentiable."""
    described = _head(hidden, weight, targets, **head)
    if _planless(hidden, head):
        checks.check_cu_seqlens(cu_seqlens, hidden)
        cu_seqlens = backends.checked_boundaries(cu_seqlens, hidden.shape[0])
    else:
        _boundaries(hidden, cu_seqlens)
    values = _row_logprobs(hidden, weight, targets, described)
    # one binary for either width: see sequence_loss
    return autograd.sequence_sums(values, cu_seqlens.long(), described.spec.backend)


def npo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    ref_logprobs: Tensor,  # [B], summed nats under the frozen reference; a constant
    *,
    beta: float,
    **head: Any,
) -> Tensor:
    """Mean over sequences of -(2/beta) log sigmoid(-beta (logprob - ref_logprob)), scalar float64. See
    objectives.npo."""
    checks.check_positive("beta", beta)
    checks.check_cu_seqlens(cu_seqlens, hidden)
    num_sequences = cu_seqlens.shape[0] - 1
    if not isinstance(ref_logprobs, Tensor) or tuple(ref_logprobs.shape) != (num_sequences,):
        given = tuple(ref_logprobs.shape) if isinstance(ref_logprobs, Tensor) else type(ref_logprobs).__name__
        checks.refuse("ref_logprobs.shape", given, f"[{num_sequences}], one per sequence")
    if not ref_logprobs.is_floating_point():
        checks.refuse("ref_logprobs.dtype", ref_logprobs.dtype, "a floating dtype, float64 preferred")
    checks.same_device("ref_logprobs", ref_logprobs, hidden)
    objective = objectives.npo(ref_logprobs.detach().double(), beta=beta)
    return _mean_loss(hidden, weight, targets, cu_seqlens, objective, head)


def simnpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    *,
    beta: float,
    gamma: float = 0.0,
    **head: Any,
) -> Tensor:
    """Mean over sequences of -(2/beta) log sigmoid(-(beta/length) logprob - gamma), scalar float64. See
    objectives.simnpo."""
    checks.check_positive("beta", beta)
    checks.check_finite("gamma", gamma)
    checks.check_cu_seqlens(cu_seqlens, hidden)
    objective = objectives.simnpo(cu_seqlens.shape[0] - 1, beta=beta, gamma=gamma)
    return _mean_loss(hidden, weight, targets, cu_seqlens, objective, head)


def _mean_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, cu_seqlens: Tensor, objective: Objective, head: dict[str, Any]
) -> Tensor:
    """sequence_loss, or the same objective on sequence_logprobs while torch.compile traces, a CUDA graph is captured or
    options.capturable asks for what a graph can capture.

    Such a program has no host lengths to plan whole-group chunks with, so beyond the workspace it recomputes (4 units).
    """
    if not _planless(hidden, head):
        return sequence_loss(hidden, weight, targets, cu_seqlens, objective, **head).loss
    if head.get("options", _DEFAULTS).skip_below > 0:
        accepted = "0 under torch.compile, graph capture and options.capturable"
        checks.refuse("options.skip_below", head["options"].skip_below, accepted)
    logprobs = sequence_logprobs(hidden, weight, targets, cu_seqlens, **head)
    index = torch.arange(logprobs.shape[0], device=logprobs.device)
    return objective(logprobs, cu_seqlens.diff().long(), index).sum()


def sequence_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    objective: Objective,
    *,
    groups: Sequence[int] | Tensor | None = None,
    **head: Any,
) -> SequenceLoss:
    """Sum of objective(logprobs, lengths, index) over the sequences, with gradients at 3 units whatever the batch's
    size.

    objective: maps the log-likelihoods [b] (float64) of some whole sequences, their lengths and their positions in the
    batch (int64, ascending) to their losses [b]. Called once per chunk of whole groups, so it must be pure and
    separable across groups; tensors it captures get no gradient. groups: sizes of runs of consecutive sequences that
    must reach it together (2 for a chosen/rejected pair); default all 1.
    """
    described = _head(hidden, weight, targets, **head)
    reason = "plans chunks of whole sequences from lengths on the host"
    instead = "npo_loss, simnpo_loss, or an objective on sequence_logprobs"
    if head.get("options", _DEFAULTS).capturable:
        checks.refuse("options.capturable", True, f"False for sequence_loss, which {reason}; or {instead}")
    if _capturing(hidden):
        raise ValueError(f"sequence_loss cannot be captured in a CUDA graph: it {reason}; accepted: {instead}")
    boundaries = _boundaries(hidden, cu_seqlens)
    plan = autograd.Plan(boundaries, checks.check_groups(groups, len(boundaries) - 1), cu_seqlens.long())
    if not callable(objective):
        checks.refuse("objective", objective, "a function (logprobs, lengths, index) -> losses")
    return SequenceLoss(
        *autograd.SequenceLoss.apply(
            hidden, weight, described.bias, described.lora_a, described.lora_b, targets, described.spec, objective, plan
        )
    )


@torch.no_grad()
def token_stats(hidden: Tensor, weight: Tensor, targets: Tensor, **head: Any) -> TokenStats:
    """Log-probability, argmax test, mean and variance of log p under p for each row, in one pass (1 unit), without
    gradients.

    is_argmax: torch.bool; among equal logits the lowest index is the argmax.
    """
    described = _head(hidden, weight, targets, **head)
    problem = Problem(
        hidden, weight, described.bias, described.lora_a, described.lora_b, targets, None, None, described.spec
    )
    stats = problem.token_stats()
    dtype = accumulation_dtype(hidden.dtype)
    return TokenStats(stats[0].to(dtype), stats[1] == 1, stats[2].to(dtype), stats[3].to(dtype))


def linear_kl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, **head: Any) -> Tensor:
    """KL(ref || policy) = sum_v q (log q - log p) per row, nats, [N]; differentiable in the policy's tensors.

    ref_hidden [N, H'], ref_weight [V, H'] are constants, of the same dtype rule as the policy's. logit_scale and
    softcap apply to both models; bias and lora to the policy alone.
    """
    described = _head(hidden, weight, None, **head)
    checks.check_hidden_weight(ref_hidden, ref_weight, "ref_hidden", "ref_weight")
    if ref_hidden.shape[0] != hidden.shape[0]:
        checks.refuse(
            "ref_hidden.shape", tuple(ref_hidden.shape), f"[{hidden.shape[0]}, H'], one row per row of hidden"
        )
    if ref_weight.shape[0] != weight.shape[0]:
        checks.refuse("ref_weight.shape", tuple(ref_weight.shape), f"[{weight.shape[0]}, H'], the policy's vocabulary")
    if accumulation_dtype(ref_hidden.dtype) != accumulation_dtype(hidden.dtype):
        checks.refuse("ref_hidden.dtype", ref_hidden.dtype, f"what goes with {hidden.dtype}: float64 with float64 only")
    checks.same_device("ref_hidden", ref_hidden, hidden)
    ref = (ref_hidden.detach(), ref_weight.detach())
    values = autograd.RowValues.apply(
        hidden, weight, described.bias, described.lora_a, described.lora_b, None, *ref, described.spec
    )
    return values.to(accumulation_dtype(hidden.dtype))


def pack_labels(hidden_states: Tensor, labels: Tensor) -> Packed:
    """Rows of hidden_states [B, T, H] that predict a label of labels [B, T], -100 ignored: the one place that shifts
    labels.

    hidden_states[:, t] predicts labels[:, t + 1]; labels[:, 0] predicts nothing from within the row and is not used. A
    batch row without any label after its first position is dropped, and `kept` lists the others. Where all are dropped,
    hidden is [0, H] (still connected to hidden_states), cu_seqlens is [0] and kept is empty: the functions above refuse
    such a batch, so a caller takes (packed.hidden.sum() * 0) as its loss. Costs one host synchronisation on CUDA.
    """
    if not isinstance(hidden_states, Tensor) or hidden_states.ndim != 3:
        checks.refuse("hidden_states.shape", getattr(hidden_states, "shape", type(hidden_states)), "[B, T, H]")
    if not isinstance(labels, Tensor) or tuple(labels.shape) != tuple(hidden_states.shape[:2]):
        checks.refuse("labels.shape", getattr(labels, "shape", type(labels)), f"{list(hidden_states.shape[:2])}")
    if labels.dtype != torch.int64:
        checks.refuse("labels.dtype", labels.dtype, "torch.int64, -100 where ignored")
    checks.same_device("labels", labels, hidden_states)
    shifted = labels[:, 1:]
    labelled = shifted != -100
    counts = labelled.sum(1)
    kept = counts.nonzero()[:, 0]
    cu_seqlens = torch.nn.functional.pad(counts[kept].cumsum(0), (1, 0))
    return Packed(hidden_states[:, :-1][labelled], shifted[labelled], cu_seqlens, kept)
