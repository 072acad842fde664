"""Log-likelihoods and losses of sequences straight from hidden states, without N x V logits."""

from .functions import (
    Packed,
    SequenceLoss,
    TokenStats,
    linear_kl,
    npo_loss,
    pack_labels,
    sequence_logprobs,
    sequence_loss,
    simnpo_loss,
    token_logprobs,
    token_stats,
)
from .native import release_memory
from .options import Options

__all__ = [
    "Options",
    "Packed",
    "SequenceLoss",
    "TokenStats",
    "linear_kl",
    "npo_loss",
    "pack_labels",
    "release_memory",
    "sequence_logprobs",
    "sequence_loss",
    "simnpo_loss",
    "token_logprobs",
    "token_stats",
]
