"""Published hyper-parameters, each with its source; the only place where a scientific value has a preset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_NPO_CODE = "Zhang et al. 2024 (arXiv:2404.05868) and its code, TOFU: batch 32, warm-up of one epoch, linear decay"
_SIMNPO = "Fan et al. 2024 (arXiv:2410.07163), TOFU with Llama-2-7b-chat"


@dataclass(frozen=True)
class Recipe:
    source: str
    values: Mapping[str, Any]


def _tofu(**values: Any) -> dict[str, Any]:
    """What the TOFU recipes share: 10 epochs of 32 rows at 1e-5, weight decay 0.01, seed 0."""
    shared = dict(lr=1e-5, epochs=10, batch_size=32, weight_decay=0.01, warmup_epochs=1.0, seed=0, retain_term="nll")
    return shared | values


RECIPES: dict[str, Recipe] = {
    "tofu-ga": Recipe(_NPO_CODE, _tofu(method="ga", retain_term="none")),
    "tofu-graddiff": Recipe(_NPO_CODE, _tofu(method="ga")),
    "tofu-npo": Recipe(_NPO_CODE, _tofu(method="npo", beta=0.1, retain_term="none")),
    "tofu-npo-rt": Recipe(_NPO_CODE, _tofu(method="npo", beta=0.1)),
    "tofu-npo-kl": Recipe(_NPO_CODE, _tofu(method="npo", beta=0.1, retain_term="kl")),
    "tofu-idkdpo": Recipe(_NPO_CODE, _tofu(method="idkdpo", beta=0.1)),
    "tofu-simnpo-forget05": Recipe(_SIMNPO, _tofu(method="simnpo", beta=2.5, gamma=0.0, forget_weight=0.1375)),
    "tofu-simnpo-forget10": Recipe(_SIMNPO, _tofu(method="simnpo", beta=4.5, gamma=0.0, forget_weight=0.125)),
    "tofu-altpo": Recipe(
        "Mekala et al. 2024 (arXiv:2409.13474) and its code: five alternates per row, two epochs of batch 35",
        _tofu(method="altpo", beta=0.1, lr=5e-5, epochs=2, batch_size=35),
    ),
    "tofu-finetune": Recipe(
        "Maini et al. 2024 (arXiv:2401.06121), Llama-2-7b-chat: five epochs of 32 rows at 1e-5",
        dict(method="finetune", lr=1e-5, epochs=5, batch_size=32, weight_decay=0.01, warmup_epochs=1.0, seed=0),
    ),
}
