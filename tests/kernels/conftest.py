"""Kernel tests see NaN wherever memory was allocated and not written."""

import pytest
import torch


def _poisoned(allocate):
    def allocate_nan(*args, **kwargs):
        out = allocate(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() and not out.is_meta else out

    return allocate_nan


@pytest.fixture(autouse=True)
def poisoned_memory(request, monkeypatch):
    """torch.empty and its relatives return NaN. Not under torch.compile and fake tensors, where nothing may be
    patched."""
    if "unpoisoned" not in request.fixturenames:
        monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
        monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
        monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


@pytest.fixture
def unpoisoned():
    """Asks for plain torch.empty."""
