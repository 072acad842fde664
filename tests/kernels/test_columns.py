"""The schedule by slices of the vocabulary: a part of E kept, the rest computed again. Any backend can serve it; those
whose products are cheap ask for it, so the tests ask in their place."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import unlearn_kernels as uk
from tests.kernels.cases import DIFFERENTIABLE, check_gradients, make_case, widest
from unlearn_kernels import backends, columns, reference

pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.parametrize("backend", ["torch", "native"], indirect=True),
]
ALL_PARTS = ("bias", "scale", "softcap", "lora")
ROWS, VOCAB = 40, 301


@pytest.fixture(autouse=True)
def small_slices(backend, monkeypatch):
    """Slices of 32 columns and no fewest."""
    eager = replace(backends.BACKENDS[backend], prefers_columns=lambda hidden, weight: True)
    monkeypatch.setitem(backends.BACKENDS, backend, eager)
    monkeypatch.setattr(columns, "_FEWEST", 32)
    monkeypatch.setattr(columns, "_SLICE_BYTES", 1)


@pytest.fixture
def slices(monkeypatch):
    """The widths of E that were asked of exp_sums, None for no E, in order."""
    return _record(monkeypatch, lambda e: None if e is None else e.shape[1])


@pytest.fixture
def places(monkeypatch):
    """Where in memory each E that was asked of exp_sums began."""
    return _record(monkeypatch, lambda e: None if e is None else e.data_ptr())


def _record(monkeypatch, what):
    seen = []
    for name, entry in list(backends.BACKENDS.items()):

        def recorded(*args, exp_sums=entry.steps.exp_sums):
            seen.append(what(args[10]))
            return exp_sums(*args)

        monkeypatch.setitem(backends.BACKENDS, name, replace(entry, steps=_With(entry.steps, exp_sums=recorded)))
    return seen


class _With:
    """Steps of a backend, some of them replaced."""

    def __init__(self, steps, **replaced):
        self._steps = steps
        self.__dict__.update(replaced)

    def __getattr__(self, name):
        return getattr(self._steps, name)


def workspace_of(case, share):
    """Of which, beside a quarter of scratch, this share of E's columns fits."""
    itemsize = 2 if case.weight.dtype == torch.bfloat16 else case.weight.dtype.itemsize
    return int(share * VOCAB * ROWS * itemsize / 0.75)


def tokens(share):
    def kernel(case):
        options = uk.Options(workspace_bytes=workspace_of(case, share))
        return (uk.token_logprobs(*case.inputs, **case.head, options=options).double() * case.upstream).sum()

    return kernel


def tokens_reference(case):
    return (reference.token_logprobs(*case.inputs, **case.head).double() * case.upstream).sum()


def squares(logprobs, lengths, index):
    return logprobs.square() / lengths


def losses(share):
    def kernel(case):
        options = uk.Options(workspace_bytes=workspace_of(case, share))
        return uk.sequence_loss(*case.packed, squares, **case.head, options=options).loss

    return kernel


def losses_reference(case):
    logprobs = reference.token_logprobs(*case.inputs, **case.head).double()
    sums = torch.segment_reduce(logprobs, "sum", offsets=case.cu_seqlens)
    return squares(sums, case.cu_seqlens.diff(), None).sum()


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel, true", [(tokens, tokens_reference), (losses, losses_reference)])
def test_every_part_of_the_head(dtype, kernel, true, share, slices):
    case = make_case(ROWS, 32, VOCAB, dtype, parts=ALL_PARTS)
    check_gradients(case, kernel(share), true)
    assert None in slices and len(slices) > 2  # E of no column and, again, of some


@pytest.mark.parametrize("frozen", DIFFERENTIABLE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_each_input_frozen_in_turn(dtype, frozen):
    case = make_case(ROWS, 32, VOCAB, dtype, parts=ALL_PARTS)
    check_gradients(case, tokens(0.6), tokens_reference, frozen=(frozen,))


def test_what_is_kept_is_not_computed_again(slices):
    case = make_case(ROWS, 32, VOCAB, torch.bfloat16)
    tokens(0.6)(case).backward()
    kept, rest, *again = slices
    assert kept >= 96 and kept % 32 == 0 and rest is None
    assert kept + sum(again) == VOCAB and len(again) > 1


@pytest.mark.parametrize("vocab", [301, 280])  # 280: what is not kept would fit one slice, but not what was kept
@pytest.mark.parametrize("slice_bytes", [1, 1 << 30])
def test_slices_take_the_memory_of_what_was_kept(slice_bytes, vocab, slices, places, monkeypatch):
    """So that E never takes more than what fits the workspace."""
    monkeypatch.setattr(columns, "_SLICE_BYTES", slice_bytes)
    monkeypatch.setattr(columns, "_that_fit", lambda problem: 155)
    tokens(0.3)(make_case(ROWS, 32, vocab, torch.bfloat16)).backward()
    assert slices[0] == 128 and slices[1] is None and max(slices[2:]) <= 128 and sum(slices[2:]) == vocab - 128
    assert len(slices) > 3 and set(places[2:]) == {places[0]}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_out_of_range_discard_what_was_kept(dtype, slices):
    """Their E belongs to an offset that they no longer have."""
    case = make_case(ROWS, 32, VOCAB, dtype)
    with torch.no_grad():
        case.hidden[3] = -70 * case.weight[case.targets[3]] / case.weight[case.targets[3]].square().sum()
        case.hidden[3] += 70 * case.weight[7] / case.weight[7].square().sum()
    check_gradients(case, tokens(0.6), tokens_reference)
    assert reference.token_logprobs(*case.inputs)[3] < -120
    slices.clear()
    tokens(0.6)(case).backward()
    kept, rest, *again = slices
    assert kept is not None and rest is None and sum(filter(None, again)) == VOCAB


def test_a_retained_graph_gives_the_same_gradients_twice():
    case = make_case(ROWS, 32, VOCAB, widest(), parts=ALL_PARTS)
    value, leaves = tokens(0.6)(case), list(case.leaves().values())
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    second = torch.autograd.grad(value, leaves)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("share, fits", [(0.95, True), (0.8, False)])
def test_hidden_alone_where_nearly_all_of_e_fits(share, fits, slices):
    case = make_case(ROWS, 32, VOCAB, torch.bfloat16)
    frozen = ("weight",)
    check_gradients(case, tokens(share), tokens_reference, frozen=frozen)
    assert (slices[0] == VOCAB) is not fits and (None in slices) is fits


def test_even_slices_cover_the_vocabulary():
    for count in (1, 31, 32, 33, 1000, 128256):
        for at_most in (32, 50, 1024, 200_000):
            size = columns._even(count, at_most)
            assert 1 <= size <= at_most and (size % 32 == 0 or size == min(count, at_most))
