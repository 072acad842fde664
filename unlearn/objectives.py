"""Unlearning objectives as pure functions from sequence log-likelihoods to one loss per sequence.

logprob [B] is the summed natural-log likelihood of each answer, in practice float64; length [B] its number of answer
tokens. Every function returns the losses [B], not reduced: the caller normalises over the whole optimizer step, so that
splitting a step into micro-batches changes nothing. Minimising is always the direction of training: `ga` is +logprob.

The factor 2/beta makes the family comparable: at logprob == ref_logprob NPO's gradient with respect to logprob is
exactly 1, that of gradient ascent, whatever beta is.

Values are not checked, only shapes and scalars: reading a CUDA tensor here would stop the stream once per chunk.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def ga(logprob: Tensor) -> Tensor:
    """Gradient ascent on the negative log-likelihood: the loss is logprob itself, unbounded below.

    logprob: [B]. Returns [B]. TOFU (arXiv:2401.06121) divides the sum by the step's answer tokens.
    Jang et al. 2022, arXiv:2210.01504.
    """
    return logprob


def nll(logprob: Tensor) -> Tensor:
    """Negative log-likelihood, -logprob: the retain term, or the answer to be learned in its place.

    logprob: [B]. Returns [B], nats per sequence; divide the sum by the step's answer tokens for the usual token mean.
    """
    return -logprob


def npo(logprob: Tensor, ref_logprob: Tensor, *, beta: float) -> Tensor:
    """Negative preference optimization, -(2/beta) log sigmoid(-beta (logprob - ref_logprob)), per sequence.

    logprob, ref_logprob: [B], summed. Returns [B]. Its gradient is gradient ascent's times
    W = 2 pi^beta / (pi^beta + pi_ref^beta), in (0, 2): 1 at the reference, at most 1 wherever the answer is no more
    likely than there, and 1 everywhere as beta -> 0.
    Zhang et al. 2024, arXiv:2404.05868, eq. 3.

    Raises ValueError if beta is not positive or the shapes differ.
    """
    _check_positive(beta=beta)
    _check_shapes(logprob=logprob, ref_logprob=ref_logprob)
    return (-2.0 / beta) * logsigmoid(-beta * (logprob - ref_logprob))


def simnpo(logprob: Tensor, length: Tensor, *, beta: float, gamma: float) -> Tensor:
    """Reference-free NPO on the mean token, -(2/beta) log sigmoid(-(beta/length) logprob - gamma), per sequence.

    logprob, length: [B]. Returns [B]. gamma is the paper's margin, outside beta; codes that write
    sigmoid(beta (-logprob/length - delta)) have gamma = beta delta. Fan et al. 2024, arXiv:2410.07163, eq. 4.

    Raises ValueError if beta is not positive, gamma is not finite or the shapes differ.
    """
    _check_positive(beta=beta)
    _check_finite(gamma=gamma)
    _check_shapes(logprob=logprob, length=length)
    return (-2.0 / beta) * logsigmoid(-beta * (logprob / length) - gamma)


def dpo(
    chosen_logprob: Tensor, rejected_logprob: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float
) -> Tensor:
    """-(2/beta) log sigmoid(beta [(chosen - ref_chosen) - (rejected - ref_rejected)]), per pair.

    All four: [B], summed; rejected is the answer to forget. IdkDPO with a refusal as chosen, AltPO (arXiv:2409.13474)
    with an alternative answer. Returns [B]. Rafailov et al. 2023, arXiv:2305.18290, times the 2/beta of NPO's code (its
    paper writes 1/beta), so that it is NPO where the chosen answer stays at its reference.

    Raises ValueError if beta is not positive or the shapes differ.
    """
    _check_positive(beta=beta)
    _check_shapes(
        chosen_logprob=chosen_logprob,
        rejected_logprob=rejected_logprob,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
    )
    margin = (chosen_logprob - ref_chosen) - (rejected_logprob - ref_rejected)
    return (-2.0 / beta) * logsigmoid(beta * margin)


def kto_sigmoid(logprob: Tensor, ref_logprob: Tensor, baseline: Tensor, *, beta: float) -> Tensor:
    """KTO's undesirable branch, 1 - (2/beta) sigmoid(baseline - beta (logprob - ref_logprob)), per sequence.

    logprob, ref_logprob: [B]; baseline: [] or [B], a constant (detached): the mean of logprob - ref_logprob over the
    step's refusals. Returns [B], in [1 - 2/beta, 1]. This is the form of NPO's code (arXiv:2404.05868), which does not
    multiply the baseline by beta; Ethayarajh et al. 2024, arXiv:2402.01306, does, and has no 2/beta.

    Raises ValueError if beta is not positive or the shapes differ.
    """
    margin = _kto_margin(logprob, ref_logprob, baseline, beta)
    return 1.0 - (2.0 / beta) * torch.sigmoid(margin)


def kto_logsigmoid(logprob: Tensor, ref_logprob: Tensor, baseline: Tensor, *, beta: float) -> Tensor:
    """1 - (2/beta) log sigmoid(baseline - beta (logprob - ref_logprob)), per sequence: `kto_sigmoid` with the log.

    Shapes, baseline, errors and source as in kto_sigmoid. With baseline 0 it is 1 + npo.
    """
    margin = _kto_margin(logprob, ref_logprob, baseline, beta)
    return 1.0 - (2.0 / beta) * logsigmoid(margin)


def simpo(
    chosen_logprob: Tensor,
    rejected_logprob: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    *,
    beta: float,
    gamma: float,
) -> Tensor:
    """-log sigmoid(beta (chosen_logprob/chosen_length - rejected_logprob/rejected_length) - gamma), per pair.

    All four tensors: [B]. Returns [B], unscaled as in the paper (no 2/beta). Meng et al. 2024, arXiv:2405.14734, eq. 6.

    Raises ValueError if beta is not positive, gamma is not finite or the shapes differ.
    """
    _check_positive(beta=beta)
    _check_finite(gamma=gamma)
    _check_shapes(
        chosen_logprob=chosen_logprob,
        rejected_logprob=rejected_logprob,
        chosen_length=chosen_length,
        rejected_length=rejected_length,
    )
    margin = chosen_logprob / chosen_length - rejected_logprob / rejected_length
    return -logsigmoid(beta * margin - gamma)


def wga_weights(token_logprob: Tensor, *, beta: float) -> Tensor:
    """Weighted gradient ascent's token weights, p^beta with p = exp(token_logprob), detached.

    token_logprob: any shape; returns the same shape and dtype, in [0, 1]. The loss is the step's token mean of
    weight * token_logprob; beta = 0 is plain GA. Wang et al. 2025, arXiv:2502.19301.

    Raises ValueError if beta is negative.
    """
    _check_not_negative(beta=beta)
    return torch.exp(beta * _at_most_zero(token_logprob))


def satimp_weights(token_logprob: Tensor, *, beta1: float, beta2: float) -> Tensor:
    """SatImp's token weights, p^beta1 (1 - p)^beta2 with p = exp(token_logprob), detached.

    token_logprob: any shape; returns the same shape and dtype, in [0, 1], 0 where p = 1 and beta2 > 0. Used like
    wga_weights, which is beta2 = 0. Yang et al. 2025, arXiv:2505.11953.

    Raises ValueError if beta1 or beta2 is negative.
    """
    _check_not_negative(beta1=beta1, beta2=beta2)
    logprob = _at_most_zero(token_logprob)
    # expm1: 1 - exp(logprob) has no digits left for a memorised token, which is where unlearning starts
    return torch.exp(beta1 * logprob) * (-torch.expm1(logprob)) ** beta2


def _kto_margin(logprob: Tensor, ref_logprob: Tensor, baseline: Tensor, beta: float) -> Tensor:
    _check_positive(beta=beta)
    _check_shapes(logprob=logprob, ref_logprob=ref_logprob)
    if baseline.dim() != 0:
        _check_shapes(logprob=logprob, baseline=baseline)
    return baseline.detach() - beta * (logprob - ref_logprob)


def _at_most_zero(token_logprob: Tensor) -> Tensor:
    # a computed log-probability may round to just above 0, and a negative 1 - p raised to a fraction is NaN
    return token_logprob.detach().clamp(max=0.0)


def _check_positive(**scalars: float) -> None:
    for name, value in scalars.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite, got {value}")


def _check_not_negative(**scalars: float) -> None:
    for name, value in scalars.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and not negative, got {value}")


def _check_finite(**scalars: float) -> None:
    for name, value in scalars.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")


def _check_shapes(**tensors: Tensor) -> None:
    """Raises ValueError unless all shapes are equal: [B, 1] against [B] would silently make B x B losses."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"shapes must be equal, got {shapes}")
