"""The schedule by slices of the vocabulary: a part of E kept, the rest computed again. Any backend can serve it; those
whose products are cheap ask for it, so the tests ask in their place."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import unlearn_kernels as uk
from tests.kernels.cases import DIFFERENTIABLE, check_gradients, make_case, relative_error, widest
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
    tokens(0.3)(make_case(ROWS, 32, VOCAB, torch.bfloat16)).backward()
    assert slices == [32, 32, 32, 32, 32, 32, 32, None, 32, 32, 13]


@pytest.mark.parametrize("rows", [24, 32])
def test_all_of_e_is_kept_where_the_gradient_is_as_large(rows, slices):
    case = make_case(rows, 32, VOCAB, torch.bfloat16)
    options = uk.Options(workspace_bytes=int(0.3 * VOCAB * rows * 2 / 0.75))
    (uk.token_logprobs(*case.inputs, **case.head, options=options).double() * case.upstream).sum().backward()
    assert len(slices) > 2 and None not in slices and sum(slices) == VOCAB


def test_e_waits_in_the_memory_of_the_gradient(places):
    """And the gradient that is returned is that memory, not a copy."""
    case = make_case(ROWS, 32, VOCAB, torch.bfloat16)
    value = tokens(0.3)(case)
    kept = places[: places.index(None)]
    value.backward()
    grad = case.weight.grad
    first, last = grad.data_ptr(), grad.data_ptr() + grad.nbytes
    assert [first <= place < last for place in kept] == [True] * (len(kept) - 1) + [False] and len(kept) > 2
    assert kept[-1] == places[-1]  # what is computed again takes the workspace's


def shapes():
    """Rows, width, vocabulary and columns of a slice, tight in each way."""
    for rows, width in ((1, 1), (3, 8), (7, 8), (8, 8), (9, 8), (40, 8), (200, 8)):
        for vocab, size in ((97, 32), (97, 96), (131, 32), (64, 32), (300, 32), (300, 96), (1000, 288)):
            yield rows, width, vocab, size


def test_no_slice_is_written_over_before_it_is_used(monkeypatch):
    for rows, width, vocab, size in shapes():
        monkeypatch.setattr(columns, "_that_fit", lambda problem, *others, size=size: size)
        case = make_case(rows, width, vocab, torch.float32)
        options = uk.Options(workspace_bytes=int(0.5 * vocab * rows * 4))
        value = (uk.token_logprobs(*case.inputs, **case.head, options=options).double() * case.upstream).sum()
        value.backward()
        mine, case = case.weight.grad, make_case(rows, width, vocab, torch.float32)
        tokens_reference(case).backward()
        torch.testing.assert_close(mine, case.weight.grad, rtol=1e-4, atol=1e-5, msg=str((rows, width, vocab, size)))


@pytest.mark.parametrize("vocab", [301, 280])
def test_e_never_takes_more_than_fits_the_workspace(vocab, slices, places, monkeypatch):
    monkeypatch.setattr(columns, "_that_fit", lambda problem: 155)
    case = make_case(ROWS, 32, vocab, torch.bfloat16)
    tokens(0.3)(case).backward()
    grad = case.weight.grad
    beyond = [
        (place, width)
        for place, width in zip(places, slices, strict=True)
        if place is not None and not grad.data_ptr() <= place < grad.data_ptr() + grad.nbytes
    ]
    assert len(beyond) > 1 and len({place for place, _ in beyond}) == 1 and max(width for _, width in beyond) <= 155


def with_a_row_out_of_range(dtype):
    case = make_case(ROWS, 32, VOCAB, dtype)
    with torch.no_grad():
        case.hidden[3] = -70 * case.weight[case.targets[3]] / case.weight[case.targets[3]].square().sum()
        case.hidden[3] += 70 * case.weight[7] / case.weight[7].square().sum()
    assert reference.token_logprobs(*case.inputs)[3] < -120
    return case


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_out_of_range_discard_what_was_kept(dtype, slices):
    """Their E belongs to an offset that they no longer have."""
    case = with_a_row_out_of_range(dtype)
    check_gradients(case, tokens(0.6), tokens_reference)
    slices.clear()
    tokens(0.6)(case).backward()
    assert sum(slices[slices.index(None) + 1 :]) == VOCAB


def test_a_retained_graph_gives_the_same_gradients_twice():
    case = make_case(ROWS, 32, VOCAB, widest(), parts=ALL_PARTS)
    value, leaves = tokens(0.6)(case), list(case.leaves().values())
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    second = torch.autograd.grad(value, leaves)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other) and one.data_ptr() != other.data_ptr()


@pytest.mark.usefixtures("unpoisoned")
@pytest.mark.parametrize(("frozen", "own"), [((), False), ((), True), (("weight",), True)])
def test_a_full_graph(frozen, own, backend, monkeypatch):
    """Whether the backend is told to prefer this or says so itself."""
    if own:
        prefers = backends.native_backend.prefers_columns
        monkeypatch.setitem(backends.BACKENDS, backend, replace(backends.BACKENDS[backend], prefers_columns=prefers))
    torch._dynamo.reset()
    case = make_case(ROWS, 32, VOCAB, torch.bfloat16).like(frozen=frozen)

    def run(hidden, weight):
        case.hidden, case.weight = hidden, weight
        return tokens(0.4)(case)

    inputs, leaves = (case.hidden, case.weight), list(case.leaves().values())
    plain = torch.autograd.grad(run(*inputs), leaves)
    compiled = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs), leaves)
    for mine, expected in zip(compiled, plain, strict=True):
        assert relative_error(mine, expected) <= 5e-3


# ------------------------------------------------------------------------------------------------------- hidden alone

HIDDEN_ALONE = ("weight", "bias", "lora_a", "lora_b")


def streamed(monkeypatch, rows, count):
    """Chunks of so many rows, slices of so many columns."""
    monkeypatch.setattr(columns.StreamedChunks, "most", staticmethod(lambda problem: min(rows, problem.num_rows)))
    monkeypatch.setattr(columns, "_that_fit", lambda problem, *others: count)


@pytest.mark.parametrize("rows, count", [(ROWS, 96), (ROWS, 300), (17, 160), (4, 160)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel, true", [(tokens, tokens_reference), (losses, losses_reference)])
def test_hidden_alone_takes_each_slice_once(dtype, kernel, true, rows, count, slices, monkeypatch):
    """But where a sequence is longer than a chunk: its values come first."""
    streamed(monkeypatch, rows, count)
    case = make_case(ROWS, 32, VOCAB, dtype, parts=ALL_PARTS)
    check_gradients(case, kernel(0.5), true, frozen=HIDDEN_ALONE)
    slices.clear()
    kernel(0.5)(case.like(frozen=HIDDEN_ALONE)).backward()
    values, used = slices.count(None), [width for width in slices if width is not None]
    assert sum(used) % VOCAB == 0 and max(used) < VOCAB and (rows < ROWS or sum(used) == VOCAB)
    assert (values > 0) == (kernel is losses and rows == 4)


@pytest.mark.parametrize("count", [96, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_hidden_alone_with_rows_out_of_range(dtype, count, slices, monkeypatch):
    streamed(monkeypatch, 30, count)
    case = with_a_row_out_of_range(dtype)
    with torch.no_grad():
        for row in (0, 17, 38):
            case.hidden[row], case.targets[row] = case.hidden[3].clone(), case.targets[3]
    check_gradients(case, tokens(0.5), tokens_reference, frozen=HIDDEN_ALONE)
    assert VOCAB in slices  # their E once more, whole


def test_not_a_number_stays_in_its_row(monkeypatch):
    streamed(monkeypatch, ROWS, 96)
    case = make_case(ROWS, 32, VOCAB, torch.bfloat16).like(frozen=HIDDEN_ALONE)
    with torch.no_grad():
        case.hidden[5, 2] = float("nan")
    tokens(0.5)(case).backward()
    finite = case.hidden.grad.isfinite().all(1)
    assert not finite[5] and finite.sum() == ROWS - 1


@pytest.mark.parametrize(
    "frozen, workspace, expected",
    [
        (HIDDEN_ALONE, 48 << 10, 40),
        (HIDDEN_ALONE, 16 << 10, 32),  # a quarter of it are the sums of 32 rows of 32
        (HIDDEN_ALONE, 256, None),  # no row's
        (("hidden",), 16 << 10, None),
        ((), 16 << 10, None),
    ],
)
def test_where_hidden_alone_is_streamed(frozen, workspace, expected, monkeypatch):
    """Chunks of rows serve the rest."""
    sizes = []
    init = columns.StreamedChunks.__init__
    monkeypatch.setattr(
        columns.StreamedChunks, "__init__", lambda self, *args: sizes.append(args[1]) or init(self, *args)
    )
    monkeypatch.setattr(columns, "applies", lambda problem: False)
    case = make_case(ROWS, 32, VOCAB, torch.float32).like(frozen=frozen)
    options = uk.Options(workspace_bytes=workspace)
    uk.sequence_loss(*case.packed, squares, options=options).loss.backward()
    assert sizes == ([] if expected is None else [expected])


def test_a_slice_is_an_odd_number_of_lines():
    for count in (1, 31, 32, 33, 64, 95, 96, 1000, 128256):
        size = columns._odd_lines(count)
        assert 1 <= size <= count and (size == count or size // 32 % 2 == 1 and size % 32 == 0) and size + 64 > count
