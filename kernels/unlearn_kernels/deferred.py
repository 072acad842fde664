"""Targets on CUDA are range-checked without stopping the host: the answer of one call is read by a later one."""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_PENDING = 64
_pending: list[tuple[torch.cuda.Event, Tensor, int]] = []


def check_earlier_targets(targets: Tensor, vocab: int) -> None:
    """Raises for an earlier call whose answer has arrived, and asks the question about these targets.

    The rows concerned are NaN in the call that had them. Nothing is asked while a program is traced or captured.
    """
    if not targets.is_cuda or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return
    while _pending and (_pending[0][0].query() or len(_pending) > _MAX_PENDING):
        event, extremes, earlier_vocab = _pending.pop(0)
        event.synchronize()
        lowest, highest = extremes.tolist()
        if lowest < 0 or highest >= earlier_vocab:
            raise ValueError(
                f"targets of an earlier call range from {lowest} to {highest}; accepted: 0 to {earlier_vocab - 1}. "
                "The rows concerned were NaN in that call"
            )
    extremes = torch.empty(2, dtype=torch.int64, pin_memory=True)
    extremes.copy_(torch.stack(targets.aminmax()), non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(targets.device))
    _pending.append((event, extremes, vocab))
