"""liger-kernel's RMSNorm, rotation and SwiGLU in a model's layers, for as long as a context lasts.

They keep less for the backward than transformers' own (no float32 copies) and are written for layers that run whole;
tiled layers (unlearn.tiled) gain nothing by them. liger-kernel replaces names in transformers' modeling module, which
reach every model of that family in the process, and methods of the instances. Both are put back at the end. Its fused
losses stay off: the head is unlearn_kernels'.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

# With silu and norms like Llama's; liger-kernel knows more, which nobody has compared here.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")


@contextlib.contextmanager
def liger_layers(model: nn.Module) -> Iterator[None]:
    """`model` runs liger-kernel's norms, rotation and MLP until the context ends.

    Raises ValueError in one line where liger-kernel is missing, the model is of another family or not on a GPU.
    """
    apply = _applier(model)
    places = [sys.modules[type(model).__module__], *model.modules()]
    before = [dict(vars(place)) for place in places]
    changed: list[tuple[dict[str, Any], str, Any]] = []
    try:
        try:
            apply(
                model=model,
                rope=True,
                rms_norm=True,
                swiglu=True,
                cross_entropy=False,
                fused_linear_cross_entropy=False,
            )
        finally:  # what it changed and nothing else: a run sets attributes of its own meanwhile
            for place, was in zip(places, before, strict=True):
                now = vars(place)
                names = [name for name in now if was.get(name, _ABSENT) is not now[name]]
                changed += [(now, name, was.get(name, _ABSENT)) for name in names]
        yield
    finally:
        for now, name, value in changed:
            if value is _ABSENT:
                now.pop(name, None)
            else:
                now[name] = value


_ABSENT = object()


def _applier(model: nn.Module) -> Callable[..., None]:
    config: Any = model.config
    kind = config.model_type
    if kind not in FAMILIES or not type(model).__module__.startswith("transformers.models."):
        name = type(model).__name__
        raise ValueError(f"liger_kernels: {name} is of type {kind!r}; {', '.join(FAMILIES)} are accepted")
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"liger_kernels: the MLP's activation is {config.hidden_act!r}; silu is accepted")
    device = next(model.parameters()).device.type
    # meta: a dry run's, which may stand for a GPU that is not here
    if device not in ("cuda", "meta") and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"liger_kernels: the model is on {device!r}; liger-kernel's kernels run on a GPU")
    try:
        import liger_kernel.transformers as liger
    except ImportError as error:
        raise ValueError(f"liger_kernels: needs liger-kernel ({error}); install it, or leave the option out") from None
    return getattr(liger, f"apply_liger_kernel_to_{kind}")
