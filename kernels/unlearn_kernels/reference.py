"""The definitions in plain torch with full logits: the truth (in float64) and the yardstick (in the inputs' dtype) of
tests.

Nothing here is chunked, offset or fused, and autograd does all the differentiation. N x V logits are materialised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LoRA = tuple[Tensor, Tensor, float]


def logits(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    *,
    bias: Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    lora: LoRA | None = None,  # A [r, H], B [V, r], s
) -> Tensor:
    """softcap(logit_scale (hidden W^T + bias + s (hidden A^T) B^T)), [N, V]; softcap(x) = cap tanh(x / cap)."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    z_NV = hidden @ weight.T
    if bias is not None:
        z_NV = z_NV + bias
    if lora is not None:
        lora_a, lora_b, lora_scale = lora
        z_NV = z_NV + lora_scale * (hidden @ lora_a.to(dtype).T) @ lora_b.to(dtype).T
    z_NV = logit_scale * z_NV
    return z_NV if softcap is None else softcap * torch.tanh(z_NV / softcap)


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, **head: Any) -> Tensor:
    """z_t[y_t] - logsumexp_v z_t[v], nats, [N]."""
    return torch.log_softmax(logits(hidden, weight, **head), dim=-1).gather(1, targets[:, None])[:, 0]


def sequence_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, cu_seqlens: Tensor, **head: Any) -> Tensor:
    """Sums of token_logprobs over rows cu_seqlens[b]:cu_seqlens[b + 1], float64 [B]."""
    logprob_N = token_logprobs(hidden, weight, targets, **head).double()
    return torch.stack([part.sum() for part in logprob_N.split(cu_seqlens.diff().tolist())])


def sequence_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, cu_seqlens: Tensor, objective: Callable, **head: Any
) -> Tensor:
    """objective's losses of all sequences at once, summed."""
    logprob_B = sequence_logprobs(hidden, weight, targets, cu_seqlens, **head)
    index_B = torch.arange(logprob_B.shape[0], device=logprob_B.device)
    return objective(logprob_B, cu_seqlens.diff().long(), index_B).sum()


def token_stats(hidden: Tensor, weight: Tensor, targets: Tensor, **head: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log p_y, y is the lowest-indexed argmax, E_p[log p], Var_p[log p]), each [N]."""
    logprob_NV = torch.log_softmax(logits(hidden, weight, **head), dim=-1)
    p_NV = logprob_NV.exp()
    mean_N = (p_NV * logprob_NV).sum(-1)
    var_N = (p_NV * (logprob_NV - mean_N[:, None]) ** 2).sum(-1)
    return logprob_NV.gather(1, targets[:, None])[:, 0], logprob_NV.argmax(-1) == targets, mean_N, var_N


def linear_kl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, **head: Any) -> Tensor:
    """sum_v q_v (log q_v - log p_v), q the reference, p the policy; [N]. The reference has no bias and no LoRA."""
    shared = {name: head[name] for name in ("logit_scale", "softcap") if name in head}
    with torch.no_grad():
        log_q_NV = torch.log_softmax(logits(ref_hidden, ref_weight, **shared), dim=-1)
    log_p_NV = torch.log_softmax(logits(hidden, weight, **head), dim=-1)
    return (log_q_NV.exp() * (log_q_NV - log_p_NV)).sum(-1)
