"""How far documents drive NPO's weight before a run begins: a warning from their lengths alone."""

from __future__ import annotations

import math


def npo_weight(*, beta: float, tokens: int, drift: float) -> float:
    """NPO's gradient weight 2 sigmoid(-beta |delta|), delta = tokens x drift per token in nats (arXiv:2404.05868)."""
    return 2 / (1 + math.exp(min(700.0, beta * tokens * drift)))


def saturation(*, beta: float, tokens: int, drift: float) -> str | None:
    """A warning where NPO's weight is nearly gone after two steps that each move a token's log-probability by `drift`
    nats; None below that."""
    first, second = (npo_weight(beta=beta, tokens=tokens, drift=steps * drift) for steps in (1, 2))
    if second > 0.1:
        return None
    return (
        f"NPO's weight saturates: {tokens} tokens that drift by {drift:g} nats each are {tokens * drift:.0f} nats, and "
        f"at beta {beta:g} the gradient's weight 2 sigmoid(-beta |delta|) falls from 1 to {first:.2g} after one step "
        f"and {second:.2g} after two; SimNPO, or a mean over tokens in place of the sum, does not depend on the length"
    )
