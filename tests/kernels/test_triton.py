"""What only the Triton backend has: tiles and splits, two plans, rows redone on the device, strides and descriptors.

The interpreter's blocks are 16 rows, 128 columns in halves of 64, 16 of the hidden dimension, two tiles per split and
two row blocks per group; the shapes lie around them. Steps are called as the schedules call them.
"""

import itertools

import pytest
import torch

import unlearn_kernels as uk
from tests.kernels.cases import (
    TRITON_ONLY,
    assert_as_good_as_torch,
    check_gradients,
    device,
    make_case,
    relative_error,
    widest,
)
from tests.kernels.test_gradients import weighted, weighted_reference
from unlearn_kernels import backends, reference
from unlearn_kernels.problem import OFFSET, Problem

pytest.importorskip("triton")
from unlearn_kernels import triton_backend, triton_kernels, triton_tuning  # noqa: E402

pytestmark = [pytest.mark.usefixtures("backend"), TRITON_ONLY]
ALL_PARTS = ("bias", "scale", "softcap", "lora")
HALF_AND_SINGLE = (torch.float16, torch.float32)
SHAPES = [
    *((num_rows, 16, 129) for num_rows in (1, 15, 16, 17, 31, 32, 33, 65)),
    *((17, width, 130) for width in (15, 17, 31, 32, 33)),
    *((17, 24, vocab) for vocab in (1, 63, 64, 65, 127, 128, 255, 256, 257, 385)),
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_every_row(case, **options):
    with torch.no_grad():
        value = uk.token_logprobs(*case.inputs, **case.head, options=uk.Options(**options))
        truth = case.like(torch.float64)
        error = value.double() - reference.token_logprobs(*truth.inputs, **truth.head)
    assert float(error.abs().max()) <= 3e-5


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize(("num_rows", "width", "vocab"), SHAPES)
def test_fused_around_its_tiles(num_rows, width, vocab, dtype):
    case = make_case(num_rows, width, vocab, dtype)
    with triton_tuning.force("fused"):
        assert_every_row(case)
        check_gradients(case, weighted(), weighted_reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("num_rows", "width", "vocab", "parts", "workspace"),
    [(17, 24, 63, (), None), (17, 24, 64, ALL_PARTS, None), (18, 17, 65, ALL_PARTS, 2000), (6, 64, 385, (), 6000)],
)
def test_library_plan(num_rows, width, vocab, dtype, parts, workspace):
    case = make_case(num_rows, width, vocab, dtype, parts=parts)
    with triton_tuning.force("library"):
        assert_every_row(case)
        check_gradients(case, weighted(workspace), weighted_reference)


@pytest.mark.parametrize("name", ["fused", "library"])
def test_library_tiles_smaller_than_the_head(name, monkeypatch):
    """Two tiles of columns and three of rows: partial sums of both, the bias's and E's columns where they belong."""
    monkeypatch.setattr(triton_backend, "TILE_ELEMENTS", 1024 * 100)
    case = make_case(40, 24, 190, torch.float32, parts=("bias", "softcap", "lora"))
    with triton_tuning.force(name):
        assert_every_row(case, workspace_bytes=40_000)
        check_gradients(case, weighted(40_000), weighted_reference)


@pytest.mark.parametrize("rank", [1, 31, 32, 33, 40])
def test_ranks_around_the_block(rank):
    case = make_case(17, 24, 150)
    case.lora_a = (torch.randn(rank, 24, generator=generator()) / 24**0.5).to(device()).requires_grad_()
    case.lora_b = torch.randn(150, rank, generator=generator(1)).to(device()).requires_grad_()
    case.lora_scale = 0.5
    assert_every_row(case)
    check_gradients(case, weighted(), weighted_reference)


def test_many_splits_and_launches(monkeypatch):
    """Five tiles per split instead of two, and launches of 20 rows: 1 over a block."""
    monkeypatch.setattr(triton_backend, "MAX_SPLITS", 2)
    monkeypatch.setattr(triton_backend, "ROWS_PER_LAUNCH", 20)
    case = make_case(45, 16, 1100, torch.float16, parts=("bias",))
    assert_every_row(case)
    check_gradients(case, weighted(), weighted_reference)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_more_splits_than_the_finishers_add_at_once(dtype, monkeypatch):
    for name in ("_SPLIT_BLOCKS", "_PLANE_BLOCKS"):
        monkeypatch.setattr(triton_backend, name, {"BLOCK_S": 2, "BLOCK_T": 16})
    case = make_case(18, 8, 1300, dtype)
    assert_every_row(case)
    stats, truth = uk.token_stats(*case.inputs), case.like(torch.float64)
    for index, expected in enumerate(reference.token_stats(*truth.inputs)):
        torch.testing.assert_close(stats[index].double(), expected.detach().double(), rtol=1e-5, atol=3e-5)
    ref = case.hidden.detach().flip(0), case.weight.detach()
    value = uk.linear_kl(case.hidden.detach(), case.weight.detach(), *ref)
    truth = reference.linear_kl(case.hidden.double(), case.weight.double(), *(tensor.double() for tensor in ref))
    torch.testing.assert_close(value.double(), truth.detach(), rtol=1e-5, atol=1e-5)


# -- scratch


@pytest.fixture
def canaries(monkeypatch):
    """Every scratch is followed by numbers that no step may touch."""
    scratches = []

    def scratch(problem, num_rows):
        length = problem.scratch_elements(num_rows)
        whole = torch.full((length + 4096,), torch.nan, device=device())
        whole[length:] = 7.0
        scratches.append(whole[length:])
        return whole[:length]

    monkeypatch.setattr(Problem, "scratch", scratch)
    yield
    assert scratches and all(bool((tail == 7.0).all()) for tail in scratches), "a step wrote beyond its scratch"


def functions_of(case, options):
    ref = case.hidden.detach()[:, :3], case.weight.detach()[:, :3]
    if case.hidden.shape[0] < 100:
        yield uk.token_logprobs(*case.inputs, **case.head, options=options)
        yield uk.linear_kl(case.hidden, case.weight, *ref, **case.head, options=options)
    with torch.no_grad():
        yield uk.token_logprobs(*case.inputs, **case.head, options=options)
        yield uk.linear_kl(case.hidden, case.weight, *ref, **case.head, options=options)
        yield uk.token_stats(*case.inputs, **case.head, options=options).var_logprob


@pytest.mark.parametrize("plan", ["fused", "library"])
@pytest.mark.parametrize(
    ("num_rows", "width", "vocab", "workspace"), [(300, 4, 5, 1), (40, 64, 64, 1200), (2, 64, 385, 4000)]
)
def test_the_smallest_scratch_is_enough(num_rows, width, vocab, workspace, plan, canaries):
    case = make_case(num_rows, width, vocab, torch.float16 if vocab == 385 else torch.float32)
    truth = case.like(torch.float64)
    with triton_tuning.force(plan):
        values = [value.detach() for value in functions_of(case, uk.Options(workspace_bytes=workspace))]
    ref = case.hidden[:, :3].double(), case.weight[:, :3].double()
    logprobs, kl = reference.token_logprobs(*truth.inputs), reference.linear_kl(truth.hidden, truth.weight, *ref)
    expected = [logprobs, kl, logprobs, kl, reference.token_stats(*truth.inputs)[3]]
    for value, true in zip(values, expected[-len(values) :], strict=True):
        torch.testing.assert_close(value.double(), true.detach(), rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("plan", ["fused", "library"])
def test_gradients_stay_within_the_scratch(plan, canaries):
    case = make_case(20, 8, 140, torch.bfloat16, parts=ALL_PARTS)
    with triton_tuning.force(plan):
        check_gradients(case, weighted(6000), weighted_reference)


# -- rows that are redone


def mixed_rows(dtype, bad, num_rows=50, vocab=300):
    """bad rows are 140 nats behind some token, the others ordinary."""
    weight = torch.randn(vocab, 16, generator=generator(1))
    hidden = torch.randn(num_rows, 16, generator=generator(2))
    targets = torch.arange(num_rows) * 7 % vocab
    ahead = (targets + 11 + 90 * torch.arange(num_rows)) % vocab  # in every tile, never the target
    apart = weight[ahead] - weight[targets]
    hidden[bad] = (140.0 * apart / apart.square().sum(1, keepdim=True))[bad]
    return hidden.to(device(), dtype), weight.to(device(), dtype), targets.to(device())


BAD = {
    "none": [],
    "one": [18],
    "last": [49],
    "third": list(range(0, 50, 3)),
    "one block": list(range(16, 32)),
    "one more": list(range(9, 26)),
    "all": list(range(50)),
}


@pytest.mark.parametrize(
    ("bad", "dtype", "launch"),
    [
        *((bad, torch.float32, None) for bad in BAD),
        ("third", torch.float16, None),
        ("third", torch.float32, 20),
        ("all", torch.float16, 20),
    ],
)
def test_redone_rows_and_the_bits_of_the_others(bad, dtype, launch, monkeypatch):
    """With and without E. A redone row's offset is its maximum, and its E is exp(z - offset)."""
    if launch:
        monkeypatch.setattr(triton_backend, "ROWS_PER_LAUNCH", launch)
    hidden, weight, targets = mixed_rows(dtype, BAD[bad])
    steps = backends.BACKENDS["triton"].steps
    inputs = (hidden, weight, targets, None, None, None, 1.0, 0.0)
    z_y, sums = torch.empty(50, device=device()), torch.empty(50, device=device())
    e = torch.empty(50, 300, dtype=torch.float32 if dtype == torch.float32 else torch.bfloat16, device=device())
    scratch = torch.empty(4000, device=device())
    steps.target_logits(*inputs, z_y, scratch)
    offset = z_y + OFFSET
    steps.exp_sums(*inputs, offset, sums, e, scratch)
    redone = torch.zeros(50, dtype=torch.bool, device=device())
    redone[BAD[bad]] = True
    z = hidden.double() @ weight.double().T
    for with_e in (True, False):
        new_offset, new_sums, new_e = offset.clone(), sums.clone(), e.clone()
        steps.redo_rows(*inputs, new_offset, new_sums, new_e if with_e else None, scratch)
        assert torch.equal(new_offset[~redone], offset[~redone]) and torch.equal(new_sums[~redone], sums[~redone])
        assert torch.equal(new_e[~redone], e[~redone])
        torch.testing.assert_close(new_offset[redone].double(), z.amax(1)[redone], rtol=1e-6, atol=0)
        terms = torch.exp(z - new_offset[:, None].double())
        terms[torch.arange(50), targets] = 0.0
        torch.testing.assert_close(new_sums[redone].double(), terms.sum(1)[redone], rtol=1e-4, atol=0)
        if with_e and BAD[bad]:
            assert relative_error(new_e[redone], terms[redone]) <= (1e-4 if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("parts", [(), ALL_PARTS])
def test_gradients_of_redone_rows(parts):
    """Every part of the head reaches a redone row; a cap of 200 leaves it its 140 nats."""
    case = make_case(40, 24, 300, parts=parts, lead=0.0)
    if parts:
        case.scalars["softcap"] = 200.0
    with torch.no_grad():
        case.hidden[3::4] *= 40.0
    with torch.no_grad():
        value = uk.token_logprobs(*case.inputs, **case.head)
    assert int((value < -102.0).sum()) >= 5 and int((value > -60.0).sum()) >= 20
    check_gradients(case, weighted(), weighted_reference)


@pytest.mark.parametrize(("lead", "redone"), [(-101.5, False), (-103.5, True)])
def test_the_limit_between_good_and_redone(lead, redone):
    from tests.kernels.test_logprobs import rows_with_lead

    hidden, weight, targets = rows_with_lead(lead, num_rows=3, vocab=40)
    steps, scratch = backends.BACKENDS["triton"].steps, torch.empty(1000, device=device())
    inputs = (hidden, weight, targets, None, None, None, 1.0, 0.0)
    offset, sums = torch.full((3,), 40.0, device=device()), torch.empty(3, device=device())
    steps.exp_sums(*inputs, offset, sums, None, scratch)
    steps.redo_rows(*inputs, offset, sums, None, scratch)
    assert bool((offset == 40.0).all()) is not redone


# -- the same bits


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("parts", [(), ("bias", "softcap")])
def test_a_row_has_the_same_bits_in_any_batch_and_order(dtype, parts):
    case = make_case(50, 24, 300, dtype, parts=parts)
    with torch.no_grad(), triton_tuning.force("fused"):
        whole = uk.token_logprobs(*case.inputs, **case.head)
        order = torch.randperm(50, generator=generator(2)).to(device())
        shuffled = uk.token_logprobs(case.hidden[order], case.weight, case.targets[order], **case.head)
        assert torch.equal(shuffled, whole[order])
        for row in (0, 15, 16, 49):
            one = slice(row, row + 1)
            assert torch.equal(
                uk.token_logprobs(case.hidden[one], case.weight, case.targets[one], **case.head), whole[one]
            )
    with triton_tuning.force("fused"):
        chunked = uk.token_logprobs(*case.inputs, **case.head, options=uk.Options(workspace_bytes=12_000))
    assert torch.equal(chunked.detach(), whole)


# -- strides and descriptors


def strided(case, kind):
    """The case's hidden and weight, laid out otherwise."""
    hidden, weight = case.hidden.detach(), case.weight.detach()
    (num_rows, width), vocab = hidden.shape, weight.shape[0]
    if kind == "hidden of a batch without its last position":
        states = torch.empty(num_rows, 2, width + 8, dtype=hidden.dtype, device=device())
        states[:, 0, :width] = hidden
        return states[:, :-1].flatten(0, 1)[:, :width], weight
    if kind == "base not on 16 bytes":
        flat = torch.empty(num_rows * (width + 8) + 1, dtype=hidden.dtype, device=device())
        moved = flat[1:].view(num_rows, width + 8)[:, :width]
        return moved.copy_(hidden), weight
    if kind == "odd row stride":
        wide = torch.empty(vocab, width + 3, dtype=weight.dtype, device=device())
        wide[:, 1 : width + 1] = weight
        return hidden, wide[:, 1 : width + 1]
    if kind == "transposed":
        return hidden.T.contiguous().T, weight.T.contiguous().T
    if kind == "every other row":
        wide = torch.empty(2 * vocab, width, dtype=weight.dtype, device=device())
        wide[::2] = weight
        return hidden, wide[::2]
    raise AssertionError(kind)


KINDS = [
    "hidden of a batch without its last position",
    "base not on 16 bytes",
    "odd row stride",
    "transposed",
    "every other row",
]


@pytest.mark.parametrize(
    ("plan", "dtype"), [("fused", torch.float16), ("fused", torch.float32), ("library", torch.float32)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_strides(kind, plan, dtype):
    case = make_case(17, 24, 136, dtype)
    hidden, weight = strided(case, kind)
    assert torch.equal(hidden, case.hidden) and torch.equal(weight, case.weight)

    def run(*inputs):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        assert [leaf.stride() for leaf in leaves] == [tensor.stride() for tensor in inputs]
        value = uk.token_logprobs(*leaves, case.targets)
        stats = uk.token_stats(*(leaf.detach() for leaf in leaves), case.targets).var_logprob
        kl = uk.linear_kl(hidden.flip(0), case.weight.detach(), *(leaf.detach() for leaf in leaves))
        return value.detach(), stats, kl, *torch.autograd.grad((value * case.upstream).sum(), leaves)

    with triton_tuning.force(plan):
        for mine, expected in zip(run(hidden, weight), run(case.hidden, case.weight), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=2e-5)


def test_what_the_copy_engine_can_address():
    plain = torch.zeros(8, 16, dtype=torch.float16)
    assert triton_backend._describable(plain)
    assert triton_backend._describable(plain[:, :9]) and triton_backend._describable(plain[::2])
    assert not triton_backend._describable(plain[:, 1:])
    assert not triton_backend._describable(plain.T)
    assert not triton_backend._describable(torch.zeros(8, 17, dtype=torch.float16))
    assert not triton_backend._describable(plain[:1].expand(8, 16))


def test_strided_lora():
    case = make_case(20, 24, 150, parts=("lora",))
    wide = torch.empty(3, 150, device=device())
    case.lora_b = wide.copy_(case.lora_b.detach().T).T.requires_grad_()
    case.lora_a = torch.empty(24, 3, device=device()).copy_(case.lora_a.detach().T).T.requires_grad_()
    check_gradients(case, weighted(), weighted_reference)


# -- the gradient steps


def gradient_inputs(num_rows, width, vocab, dtype, targets):
    draw = generator(4)
    rows = torch.randn(num_rows, width, generator=draw).to(device(), dtype)
    coeff, e_coeff = (torch.randn(num_rows, generator=draw).to(device()) for _ in range(2))
    e_dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16
    e = torch.rand(num_rows, vocab, generator=draw).to(device(), e_dtype)
    return rows, coeff, e_coeff, e, torch.tensor(targets, device=device())


# Labels of 16, 17, 1, 33 and 2 rows, the last of the vocabulary among them: sorted, some begin and end on a block.
LABELS = [3] * 16 + [0] * 17 + [7] + [19] * 33 + [12] * 2


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("out_dtype", [torch.float32, None])
@pytest.mark.parametrize("width", [1, 24])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_col_grad(dtype, width, out_dtype, accumulate):
    order = torch.randperm(len(LABELS), generator=generator(5)).tolist()
    rows, coeff, e_coeff, e, targets = gradient_inputs(len(LABELS), width, 20, dtype, [LABELS[i] for i in order])
    before = torch.randn(20, width, generator=generator(6)).to(device(), out_dtype or dtype)
    for with_targets in (True, False):
        out = before.clone() if accumulate else torch.empty_like(before)
        given = (targets, coeff) if with_targets else (None, None)
        scratch = torch.empty(4000, device=device())
        backends.BACKENDS["triton"].steps.col_grad(e, rows, *given, e_coeff, accumulate, out, scratch)
        truth = -e.double().T @ (e_coeff[:, None].double() * rows.double())
        if with_targets:
            truth.index_add_(0, targets, coeff[:, None].double() * rows.double())
        if accumulate:
            truth += before.double()
        small = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}[out.dtype]
        operand = 2e-3 if device().type == "cuda" and dtype != torch.float32 else 0.0  # rounded for its matrix cores
        assert relative_error(out, truth) <= small + operand


@pytest.mark.parametrize("width", [511, 513])
def test_a_repeated_label_in_wide_rows(width):
    rows, coeff, e_coeff, e, targets = gradient_inputs(40, width, 6, torch.float32, [5] * 33 + [0] * 7)
    out = torch.zeros(6, width, device=device())
    triton_backend.add_target_rows(out, rows, coeff, targets)
    truth = torch.zeros(6, width, dtype=torch.float64, device=device())
    truth.index_add_(0, targets, coeff[:, None].double() * rows.double())
    assert relative_error(out, truth) <= 1e-6
    assert torch.equal(out[1:5], torch.zeros(4, width, device=device()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_repeated_label_is_rounded_once(dtype):
    """300 equal updates of 1 onto 0: a 16-bit running sum in bf16 stops at 256."""
    out, ones = torch.zeros(3, 4, dtype=dtype, device=device()), torch.ones(300, 4, dtype=dtype, device=device())
    triton_backend.add_target_rows(out, ones, ones[:, 0].float(), torch.full((300,), 1, device=device()))
    assert out[1].tolist() == [300.0] * 4 and not out[::2].any()


@pytest.mark.parametrize("width", [1, 24, 2049])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_row_grad(dtype, width):
    _, coeff, e_coeff, e, targets = gradient_inputs(9, 1, 20, dtype, list(range(0, 18, 2)))
    matrix = torch.randn(20, width, generator=generator(7)).to(device(), dtype)
    product = e.double() @ matrix.double()
    for given in ((targets, coeff), (None, None)):
        # rows of a wider tensor, as a gradient that is a slice
        out = torch.zeros(9, width + 2, dtype=dtype, device=device())
        scratch = torch.empty(8 * width + 4000, device=device())
        backends.BACKENDS["triton"].steps.row_grad(e, matrix, *given, e_coeff, False, out[:, :width], scratch)
        truth = -e_coeff[:, None].double() * product
        if given[0] is not None:
            truth += coeff[:, None].double() * matrix[targets].double()
        assert relative_error(out[:, :width], truth) <= (1e-6 if dtype == torch.float32 else 4e-3)
        assert not out[:, width:].any()


# -- targets out of range: on a GPU nobody looked at them


@pytest.mark.parametrize("bad", [-1, 257, 1 << 40, -(1 << 40)])
def test_a_target_out_of_range_is_nan_in_its_row_only(bad, monkeypatch):
    monkeypatch.setattr("unlearn_kernels.checks.check_target_values", lambda targets, vocab: None)
    monkeypatch.setattr("unlearn_kernels.deferred.check_earlier_targets", lambda targets, vocab: None)
    case = make_case(20, 24, 257)
    good = uk.token_logprobs(*case.inputs)
    (good_grad,) = torch.autograd.grad(good.sum(), case.hidden)
    others = torch.arange(20, device=device()) != 5
    case.targets[5] = bad
    value = uk.token_logprobs(*case.inputs)
    (grad,) = torch.autograd.grad(value.sum(), case.hidden)
    stats = uk.token_stats(*case.inputs)
    assert bool(value[5].isnan()) and torch.equal(value[others], good[others])
    assert bool(grad[5].isnan().all()) and torch.equal(grad[others], good_grad[others])
    assert bool(stats.logprobs[5].isnan()) and bool(stats.mean_logprob[5].isnan())
    for column in (stats.logprobs, stats.mean_logprob, stats.var_logprob):
        assert bool(column[others].isfinite().all())


@pytest.mark.parametrize("plan", ["fused", "library"])
@pytest.mark.parametrize("bad", [(1 << 32) + 5, 5 - (1 << 32), 1 << 31, 257, -(1 << 63)])
def test_a_target_past_32_bits_is_no_column(bad, plan, monkeypatch):
    """Narrowed carelessly it would name column 5: that one would be missing from its row's sum and from E."""
    monkeypatch.setattr(triton_backend, "TILE_ELEMENTS", 1024 * 100)
    case = make_case(3, 24, 257, lead=0.0)
    results = []
    for target in (bad, -1):
        targets = torch.tensor([5, target, 256], device=device())
        scratch = torch.empty(20_000, device=device())
        offset, sums = torch.full((3,), 10.0, device=device()), torch.empty(3, device=device())
        e = torch.empty(3, 257, device=device())
        with torch.no_grad(), triton_tuning.force(plan):
            inputs = (case.hidden.detach(), case.weight.detach(), targets, None, None, None, 1.0, 0.0)
            backends.BACKENDS["triton"].steps.exp_sums(*inputs, offset, sums, e, scratch)
        results.append((sums, e))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert (results[0][1] == 0.0).nonzero().tolist() == [[0, 5], [2, 256]]


# -- float64 scalars: log(1 + x) and exp(x) - 1


def finish(z_y, offset, sums, scale=1.0, softcap=0.0):
    tensors = [torch.tensor(column, device=device()) for column in (z_y, offset, sums)]
    out = [torch.empty(len(z_y), dtype=dtype, device=device()) for dtype in (torch.float64, *[torch.float32] * 2)]
    backends.BACKENDS["triton"].steps.finish_rows(*tensors, scale, softcap, *out)
    theirs = [torch.empty_like(tensor) for tensor in out]
    backends.BACKENDS["torch"].steps.finish_rows(*tensors, scale, softcap, *theirs)
    return zip(out, theirs, strict=True)


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (0.7, 15.0)])
def test_finish_rows_at_every_size_of_the_sum(scale, softcap):
    """S from 1e-38 to 1e27 beside e_y = exp(-40), 4e-18: log p from -1e-20 to -102 nats."""
    sums = [10.0**exponent for exponent in range(-38, 28)] + [0.0]
    z_y = [0.25 * (index % 7) for index in range(len(sums))]
    for mine, theirs in finish(z_y, [z + 40.0 for z in z_y], sums, scale, softcap):
        torch.testing.assert_close(mine, theirs, rtol=1e-12 if mine.dtype == torch.float64 else 1e-6, atol=0.0)


# -- sums of segments


def test_segment_sums_around_the_block(monkeypatch):
    lengths = [1, 1023, 1024, 1025, 2]
    values = torch.randn(sum(lengths), generator=generator(8), dtype=torch.float64).to(device())
    for dtype in (torch.int32, torch.int64):
        boundaries = torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype, device=device())
        out = torch.empty(5, dtype=torch.float64, device=device())
        backends.BACKENDS["triton"].steps.segment_sums(values, boundaries, out)
        truth = torch.stack([part.sum() for part in values.split(lengths)])
        torch.testing.assert_close(out, truth, rtol=1e-12, atol=1e-12)


# -- whole distributions, in one pass


def kl_both(hidden, weight, ref_hidden, ref_weight, **head):
    tensors = [tensor.detach() for tensor in (hidden, weight, ref_hidden, ref_weight)]
    head = {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in head.items()}
    double = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in head.items()}
    value = uk.linear_kl(*tensors, **head)
    return value.double(), reference.linear_kl(*(tensor.double() for tensor in tensors), **double)


@pytest.mark.parametrize("dtype", [torch.bfloat16, *HALF_AND_SINGLE])
@pytest.mark.parametrize(("num_rows", "vocab", "ref_width"), [(17, 129, 15), (33, 300, 16), (50, 600, 17)])
def test_kl_without_gradients(num_rows, vocab, ref_width, dtype):
    case = make_case(num_rows, 24, vocab, dtype, parts=("bias", "scale", "softcap"))
    ref = make_case(num_rows, ref_width, vocab, dtype, seed=5)
    value, truth = kl_both(case.hidden, case.weight, ref.hidden, ref.weight, **case.head)
    torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-5)


def test_kl_without_gradients_with_lora():
    case, ref = make_case(20, 24, 300, parts=("lora",)), make_case(20, 24, 300, seed=5)
    truth = case.like(torch.float64)
    with torch.no_grad():
        value = uk.linear_kl(case.hidden, case.weight, ref.hidden, ref.weight, **case.head)
        expected = reference.linear_kl(
            truth.hidden, truth.weight, ref.hidden.double(), ref.weight.double(), **truth.head
        )
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocab", [100, 600])
def test_kl_without_gradients_of_equal_and_nearby_models(vocab):
    case = make_case(20, 24, vocab)
    value, _ = kl_both(case.hidden, case.weight, case.hidden, case.weight)
    assert torch.equal(value, torch.zeros_like(value))
    value, truth = kl_both(case.hidden * 1.001, case.weight, case.hidden, case.weight)
    assert float(truth.max()) < 1e-4 and bool((value >= 0).all())
    # the normalisers lie 0.012 apart, known to 5e-7 each
    torch.testing.assert_close(value, truth, rtol=0.01, atol=6e-9)


@pytest.mark.parametrize("shift", [0.3, 0.6, 30.0])
def test_kl_without_gradients_does_not_see_a_common_shift(shift):
    """The two normalisers lie `shift` apart and the distributions 1e-3: the two forms of the sum take over from each
    other at 0.5."""
    case = make_case(20, 24, 300, parts=("bias",))
    with torch.no_grad():
        case.bias.fill_(shift)
    value, truth = kl_both(case.hidden * 1.01, case.weight, case.hidden, case.weight, bias=case.bias)
    torch.testing.assert_close(value, truth, rtol=0.01, atol=3e-6 * (1 + shift))


def test_kl_without_gradients_of_models_far_apart():
    """Rows peaked on different tokens in different splits, and one nearly flat."""
    case, ref = make_case(20, 24, 600, logit_std=60.0), make_case(20, 24, 600, logit_std=60.0, seed=5)
    with torch.no_grad():
        case.hidden[3] *= 1e-3
        ref.hidden[4] *= 1e-3
    value, truth = kl_both(case.hidden, case.weight, ref.hidden, ref.weight)
    assert float(truth.max()) > 100
    torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("masked", [slice(0, 300), slice(130, 600), slice(256, 512), slice(0, 599)])
def test_token_stats_with_whole_splits_ruled_out(masked):
    case = make_case(20, 24, 600, parts=("bias",))
    with torch.no_grad():
        case.bias[masked] = -torch.inf
    keep = case.bias.detach() > -torch.inf
    kept = keep.nonzero()[:, 0]
    places = torch.arange(20, device=device()) % kept.numel()
    case.targets = kept[places]
    stats = uk.token_stats(*case.inputs, **case.head)
    expected = reference.token_stats(
        case.hidden.detach().double(),
        case.weight.detach()[keep].double(),
        places,
        bias=case.bias.detach()[keep].double(),
    )
    assert torch.equal(stats.is_argmax, expected[1])
    for index in (0, 2, 3):
        torch.testing.assert_close(stats[index].double(), expected[index], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("tied", [(5, 9), (5, 130), (5, 300), (257, 599), (0, 599)])
def test_the_lowest_index_wins_a_tie_in_tile_split_and_batch(tied):
    hidden, weight = torch.ones(20, 2, device=device()), torch.zeros(600, 2, device=device())
    weight[list(tied)] = 1.0
    targets = torch.tensor([tied[0], tied[1], 3, 4] * 5, device=device())
    assert uk.token_stats(hidden, weight, targets).is_argmax.tolist() == [True, False, False, False] * 5


def test_token_stats_where_splits_differ_by_hundreds_of_nats():
    """Means of splits far apart: the distance of the means, and masses that vanish beside others."""
    case = make_case(20, 24, 600, parts=("bias",), logit_std=1.0, lead=0.0)
    with torch.no_grad():
        case.bias[:256] -= 30.0
        case.bias[256:512] += 5.0
        case.bias[512:] -= 300.0
    truth = case.like(torch.float64)
    stats, expected = uk.token_stats(*case.inputs, **case.head), reference.token_stats(*truth.inputs, **truth.head)
    plain = reference.token_stats(*case.inputs, **case.head)
    for index, name in ((0, "logprobs"), (2, "mean_logprob"), (3, "var_logprob")):
        assert_as_good_as_torch(name, stats[index], plain[index], expected[index], 3e-6)


def test_every_kernel_is_a_kernel():
    """On a machine without CUDA they are interpreted, with it compiled."""
    kinds = {type(kernel).__name__ for name, kernel in vars(triton_kernels).items() if name.endswith("_kernel")}
    assert kinds == ({"JITFunction"} if device().type == "cuda" else {"InterpretedFunction"})
    assert widest() == torch.float32


# -- faults that mutants.py showed no other test to see


def test_logits_far_beyond_the_softcap():
    """exp(2 x) of the usual tanh is infinite from x = 44 on."""
    hidden = (1000.0 * torch.randn(17, 130, generator=generator())).to(device())
    weight, targets = torch.eye(130, device=device()), torch.arange(17, device=device())
    value = uk.token_logprobs(hidden, weight, targets, softcap=15.0)
    truth = reference.token_logprobs(hidden.double(), weight.double(), targets, softcap=15.0)
    assert float((value.double() - truth).abs().max()) <= 3e-5


@pytest.mark.parametrize("softcap", [15.0, 200.0, 1e4, 1e6])
def test_logits_far_below_the_softcap(softcap):
    """1 - exp(-2 x) would cancel: an error of 3e-8 softcap in every logit."""
    case = make_case(17, 24, 130)
    with torch.no_grad():
        value = uk.token_logprobs(*case.inputs, softcap=softcap)
        truth = reference.token_logprobs(*case.like(torch.float64).inputs, softcap=softcap)
    assert float((value.double() - truth).abs().max()) <= 5e-6


def test_every_part_of_the_head_in_every_launch(monkeypatch):
    """Ordinary and redone rows in launches of 10."""
    monkeypatch.setattr(triton_backend, "ROWS_PER_LAUNCH", 10)
    case = make_case(24, 16, 140, parts=ALL_PARTS, lead=0.0)
    case.scalars["softcap"] = 200.0
    with torch.no_grad():
        case.hidden[3::4] *= 40.0
        value = uk.token_logprobs(*case.inputs, **case.head)
    assert [int((half < -102.0).sum()) > 0 for half in value.split(10)] == [True] * 3
    check_gradients(case, weighted(), weighted_reference)


@pytest.mark.parametrize(
    ("plan", "dtype"), [("fused", torch.float16), ("fused", torch.float32), ("library", torch.float32)]
)
def test_rows_of_e_further_apart_than_the_vocabulary(plan, dtype):
    """E as a slice of a wider tensor, whose other columns are left alone. Every third row is redone, and the library's
    tiles have 25 rows and 17 columns."""
    hidden, weight, targets = mixed_rows(dtype, BAD["third"], vocab=130)
    inputs = (hidden, weight, targets, None, None, None, 1.0, 0.0)
    steps, scratch = backends.BACKENDS["triton"].steps, torch.empty(700, device=device())
    offset, sums = torch.empty(50, device=device()), torch.empty(50, device=device())
    wide = torch.full((50, 160), 7.0, dtype=dtype if dtype == torch.float32 else torch.bfloat16, device=device())
    steps.target_logits(*inputs, offset, scratch)
    offset += OFFSET
    with triton_tuning.force(plan):
        steps.exp_sums(*inputs, offset, sums, wide[:, :130], scratch)
    steps.redo_rows(*inputs, offset, sums, wide[:, :130], scratch)
    terms = torch.exp(hidden.double() @ weight.double().T - offset[:, None].double())
    terms[torch.arange(50), targets] = 0.0
    errors = (wide[:, :130].double() - terms).norm(dim=1) / terms.norm(dim=1)
    assert float(errors.max()) <= (1e-4 if dtype == torch.float32 else 4e-3)
    assert bool((wide[:, 130:] == 7.0).all())


def test_redoing_every_row_stays_within_the_scratch():
    hidden, weight, targets = mixed_rows(torch.float32, BAD["all"])
    offset, sums = torch.full((50,), -100.0, device=device()), torch.full((50,), torch.inf, device=device())
    scratch = torch.full((68 + 4096,), 7.0, device=device())
    inputs = (hidden, weight, targets, None, None, None, 1.0, 0.0)
    backends.BACKENDS["triton"].steps.redo_rows(*inputs, offset, sums, None, scratch[:68])
    assert bool((scratch[68:] == 7.0).all()), "redo_rows wrote beyond its scratch"
    torch.testing.assert_close(offset.double(), (hidden.double() @ weight.double().T).amax(1), rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_a_nan_reaches_every_row_that_it_should():
    """In a row of hidden that row, in the bias all of them."""
    case, ref = make_case(20, 24, 300, parts=("bias",)), make_case(20, 24, 300, seed=5)
    for place, rows in ((case.hidden, [5]), (case.bias, list(range(20)))):
        with torch.no_grad():
            place[5 if place is case.hidden else 280] = torch.nan
            stats = uk.token_stats(*case.inputs, **case.head)
            kl = uk.linear_kl(case.hidden, case.weight, ref.hidden, ref.weight, **case.head)
            value = uk.token_logprobs(*case.inputs, **case.head)
        for column in (value, kl, stats.logprobs, stats.mean_logprob, stats.var_logprob):
            assert column.isnan().nonzero()[:, 0].tolist() == rows


@pytest.mark.parametrize(("width", "ref_width"), [(16, 17), (17, 16)])
def test_kl_without_gradients_of_an_even_and_an_odd_width(width, ref_width):
    case, ref = make_case(5, width, 60), make_case(5, ref_width, 60, seed=5)
    value, truth = kl_both(case.hidden, case.weight, ref.hidden, ref.weight)
    torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-5)


def test_row_grad_in_blocks_of_rows():
    _, coeff, e_coeff, e, targets = gradient_inputs(20, 1, 30, torch.float32, list(range(5, 25)))
    matrix = torch.randn(30, 24, generator=generator(7)).to(device())
    out = torch.empty(20, 24, device=device())
    scratch = torch.empty(24 * 8, device=device())
    backends.BACKENDS["triton"].steps.row_grad(e, matrix, targets, coeff, e_coeff, False, out, scratch)
    truth = coeff[:, None].double() * matrix[targets].double()
    truth -= e_coeff[:, None].double() * (e.double() @ matrix.double())
    assert relative_error(out, truth) <= 1e-6
    backends.BACKENDS["triton"].steps.row_grad(e, matrix, targets, coeff, e_coeff, True, out, scratch)
    assert relative_error(out, 2 * truth) <= 1e-6


def test_token_stats_of_a_memorised_row_below_the_last_bit_of_1():
    """1 + exp(-40) is 1 in float64."""
    hidden = torch.zeros(1, 300, device=device())
    hidden[0, 3] = 40.0
    value = uk.token_stats(hidden, torch.eye(300, device=device()), torch.tensor([3], device=device())).logprobs
    truth = -299 * torch.exp(torch.tensor([-40.0], dtype=torch.float64, device=device()))
    torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=0)


def test_the_gradient_of_kl_does_not_see_how_far_the_logits_lie_from_0():
    """Logits around 4096 and the reference's around -4096, all exact in float32; their differences are not."""
    draw = generator(3)
    weight = torch.randint(-256, 257, (70, 2), generator=draw) / 64.0
    weight[:, 0] = 1.0
    hidden, ref_hidden = (torch.randint(-8, 9, (10, 2), generator=draw) / 32.0 for _ in range(2))
    hidden[:, 0], ref_hidden[:, 0] = 4096.0, -4096.0
    hidden, weight, ref_hidden = (tensor.to(device()) for tensor in (hidden, weight, ref_hidden))

    def run(function, dtype):
        leaf = hidden.to(dtype, copy=True).requires_grad_()
        value = function(leaf, weight.to(dtype), ref_hidden.to(dtype), weight.to(dtype))
        return value.detach().double(), *(grad.double() for grad in torch.autograd.grad(value.sum(), leaf))

    for mine, truth in zip(run(uk.linear_kl, torch.float32), run(reference.linear_kl, torch.float64), strict=True):
        assert float((mine - truth).abs().max()) <= 2e-6
