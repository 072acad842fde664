"""The two built-in objectives: losses of whole sequences from their log-likelihoods, written once for every path."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]


def npo(ref_logprob_B: Tensor, *, beta: float) -> Objective:
    """Negative preference optimization, -(2/beta) log sigmoid(-beta (logprob - ref_logprob)), over B: its sum is the
    mean.

    ref_logprob_B: [B] float64, nats, of the same sequences under the frozen reference. Zhang et al. 2024,
    arXiv:2404.05868, eq. 3. As beta -> 0 its gradient tends to gradient ascent's.
    """

    def objective(logprob_b: Tensor, length_b: Tensor, index_b: Tensor) -> Tensor:
        # logsigmoid and not softplus: torch's softplus returns its argument above 20, an error of 2e-9.
        log_ratio_b = logprob_b - ref_logprob_B[index_b]
        return F.logsigmoid(-beta * log_ratio_b) * (-2.0 / (beta * ref_logprob_B.shape[0]))

    return objective


def simnpo(num_sequences: int, *, beta: float, gamma: float) -> Objective:
    """SimNPO, -(2/beta) log sigmoid(-(beta/length) logprob - gamma), over B: its sum is the mean.

    gamma is the paper's margin, outside beta. Fan et al. 2024, arXiv:2410.07163, eq. 4.
    """

    def objective(logprob_b: Tensor, length_b: Tensor, index_b: Tensor) -> Tensor:
        return F.logsigmoid(-beta * logprob_b / length_b - gamma) * (-2.0 / (beta * num_sequences))

    return objective
