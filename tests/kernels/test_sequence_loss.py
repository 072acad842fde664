"""Losses of whole sequences: the objective's contract, chunks of whole groups, skipping, and the built-in
objectives."""

import math

import pytest
import torch

import unlearn_kernels as uk
from tests.kernels.cases import (
    SMALL,
    TORCH_ONLY,
    WORKSPACES,
    check_gradients,
    device,
    make_case,
    relative_error,
    too_slow_interpreted,
    widest,
)
from unlearn_kernels import reference

pytestmark = pytest.mark.usefixtures("backend")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ALL_PARTS = ("bias", "scale", "softcap", "lora")


def curved(logprobs, lengths, index):
    """Different slope for every sequence, both signs, exactly zero for the second."""
    weight = torch.tensor([1.0, 0.0, -0.5, 2.0], dtype=torch.float64, device=index.device)[index % 4]
    return weight * (logprobs / lengths).square() + weight * logprobs


def loss_of(objective, workspace=None, groups=None, **more):
    def kernel(case):
        options = uk.Options(workspace_bytes=workspace, **more)
        return uk.sequence_loss(*case.packed, objective, groups=groups, **case.head, options=options).loss

    return kernel


def reference_of(objective):
    return lambda case: reference.sequence_loss(*case.packed, objective, **case.head)


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("frozen", [(), ("weight",), ("hidden",)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype, frozen, workspace):
    too_slow_interpreted(bool(frozen) and dtype != torch.float32, "each side frozen in float32")
    case = make_case(37, 24, 257, dtype)
    check_gradients(case, loss_of(curved, WORKSPACES[workspace](case)), reference_of(curved), frozen=frozen)


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_part_of_the_head(dtype, workspace):
    too_slow_interpreted(workspace == "keep", "chunks, which also accumulate")
    case = make_case(37, 24, 257, dtype, parts=ALL_PARTS)
    check_gradients(case, loss_of(curved, WORKSPACES[workspace](case)), reference_of(curved))


@TORCH_ONLY
@pytest.mark.parametrize("share", [2, 3, 5, 9])
def test_every_chunking_gives_the_same_sequences(share):
    case = make_case(90, 12, 200, torch.float64)
    whole = uk.sequence_loss(*case.packed, curved)
    workspace = 90 * 200 * 8 // share
    parts = uk.sequence_loss(*case.packed, curved, options=uk.Options(workspace_bytes=workspace))
    torch.testing.assert_close(parts.logprobs, whole.logprobs, rtol=1e-12, atol=0)
    assert torch.equal(parts.active, whole.active)
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-12, atol=0)


class Recorder:
    """An objective that remembers how it was called."""

    def __init__(self):
        self.calls = []

    def __call__(self, logprobs, lengths, index):
        assert logprobs.dtype == torch.float64 and lengths.dtype == index.dtype == torch.int64
        self.calls.append((lengths.tolist(), index.tolist()))
        return logprobs * 1.0


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_the_objective_sees_whole_groups_in_order_once(workspace):
    case = make_case(61, 24, 257)
    case.cu_seqlens = torch.tensor([0, 4, 9, 10, 30, 31, 40, 60, 61], device=device())
    groups, recorder = [2, 1, 3, 2], Recorder()
    uk.sequence_loss(
        *case.packed, recorder, groups=groups, options=uk.Options(workspace_bytes=WORKSPACES[workspace](case))
    )
    assert [i for _, index in recorder.calls for i in index] == list(range(8))
    assert [n for lengths, _ in recorder.calls for n in lengths] == case.cu_seqlens.diff().tolist()
    starts = {0, 2, 3, 6}
    assert all(index[0] in starts for _, index in recorder.calls), "a group was cut"
    assert len(recorder.calls) == {"keep": 1, "rows": 4}.get(workspace, len(recorder.calls))
    assert workspace != "chunks" or 1 < len(recorder.calls) <= 4


def test_without_gradients_the_objective_is_called_once_for_all():
    case, recorder = make_case(), Recorder()
    with torch.no_grad():
        result = uk.sequence_loss(*case.packed, recorder, options=uk.Options(workspace_bytes=4096))
    assert len(recorder.calls) == 1 and not result.loss.requires_grad
    torch.testing.assert_close(result.logprobs, uk.sequence_logprobs(*case.packed).detach(), rtol=1e-6, atol=1e-5)


def pairs(logprobs, lengths, index):
    """A chosen/rejected preference: the margin of each pair."""
    chosen, rejected = logprobs[0::2], logprobs[1::2]
    loss = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected))
    return torch.stack([loss, torch.zeros_like(loss)], 1).flatten()


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_pairs(workspace):
    case = make_case(60, 16, 257, widest())
    case.cu_seqlens = torch.tensor([0, 5, 11, 20, 29, 41, 60], device=device())
    kernel = loss_of(pairs, WORKSPACES[workspace](case), groups=[2, 2, 2])
    check_gradients(case, kernel, reference_of(pairs))


@TORCH_ONLY
def test_groups_may_be_a_tensor():
    case = make_case(60, 16, 257, torch.float64)
    case.cu_seqlens = torch.tensor([0, 5, 11, 20, 60])
    assert uk.sequence_loss(*case.packed, pairs, groups=torch.tensor([2, 2])).loss.ndim == 0


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("frozen", [(), ("weight",)])
def test_a_retained_graph_gives_the_same_gradients_twice(workspace, frozen):
    case = make_case(20, dtype=torch.bfloat16, parts=("lora",)).like(frozen=frozen)
    loss = loss_of(curved, WORKSPACES[workspace](case))(case)
    leaves = list(case.leaves().values())
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    copies = [grad.clone() for grad in first]
    torch.autograd.grad(loss * 3.0, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    for grad, copy, repeat in zip(first, copies, again, strict=True):
        assert torch.equal(grad, copy) and torch.equal(grad, repeat)


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_the_upstream_scale_reaches_every_gradient(workspace):
    case = make_case(20, dtype=widest(), parts=ALL_PARTS)
    kernel = loss_of(curved, WORKSPACES[workspace](case))
    check_gradients(case, lambda case: -2.5 * kernel(case), lambda case: -2.5 * reference_of(curved)(case))


@TORCH_ONLY
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_double_backward_is_refused(workspace):
    case = make_case()
    loss = loss_of(curved, WORKSPACES[workspace](case))(case)
    (grad,) = torch.autograd.grad(loss, case.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not available"):
        grad.sum().backward()


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_float16_gradients_survive_a_loss_scale(workspace):
    """Gradients near 1e-9 are zero in float16; scaled by 65536 they are not."""
    case = make_case(37, 24, 257, torch.float16)
    tiny = lambda logprobs, lengths, index: 1e-7 * logprobs  # noqa: E731
    kernel = loss_of(tiny, WORKSPACES[workspace](case))
    (mine,) = torch.autograd.grad(kernel(case) * 65536.0, case.hidden)
    truth = case.like(torch.float64)
    (true,) = torch.autograd.grad(reference_of(tiny)(truth) * 65536.0, truth.hidden)
    assert relative_error(mine, true) <= 0.01


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_constants_have_zero_gradients(workspace):
    case = make_case()
    constant = lambda logprobs, lengths, index: torch.ones_like(logprobs)  # noqa: E731
    options = uk.Options(workspace_bytes=WORKSPACES[workspace](case))
    result = uk.sequence_loss(*case.packed, constant, options=options)
    assert float(result.loss.detach()) == len(case.cu_seqlens) - 1 and not result.active.any()
    for grad in torch.autograd.grad(result.loss, (case.hidden, case.weight)):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_tensors_the_objective_captures_get_no_gradient():
    case = make_case()
    scale = torch.ones((), dtype=torch.float64, device=device(), requires_grad=True)
    result = uk.sequence_loss(*case.packed, lambda logprobs, lengths, index: scale * logprobs)
    result.loss.backward()
    assert scale.grad is None and case.hidden.grad is not None
    assert not result.logprobs.requires_grad


# -- skipping
# -----------------------------------------------------------------------------------------------------------


EXPONENTS = torch.tensor([3, 0, 4, 2, 1])


def graded(logprobs, lengths, index):
    """|slope| x length is 10^-exponent: the shares of the largest, in an order that is not the batch's."""
    return logprobs / lengths * 10.0 ** -EXPONENTS.to(index.device)[index].double()


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize(("skip_below", "num_active"), [(0.0, 5), (1e-9, 5), (8e-3, 3), (0.5, 1)])
def test_skipping_leaves_out_exactly_the_small_ones(workspace, skip_below, num_active):
    too_slow_interpreted(skip_below != 8e-3, "8e-3, which leaves out two of five")
    case = make_case(60, 16, 257, widest(), parts=("bias", "lora"))
    case.cu_seqlens = torch.tensor([0, 5, 11, 20, 41, 60], device=device())
    bound = 10 * SMALL[widest()]
    options = uk.Options(workspace_bytes=WORKSPACES[workspace](case), skip_below=skip_below)
    result = uk.sequence_loss(*case.packed, graded, **case.head, options=options)
    assert result.active.tolist() == (num_active > EXPONENTS).tolist()
    kept = result.active.double()
    mine = torch.autograd.grad(result.loss, list(case.leaves().values()))
    truth = case.like(torch.float64)
    only_active = lambda logprobs, lengths, index: graded(logprobs, lengths, index) * kept  # noqa: E731
    true = torch.autograd.grad(reference_of(only_active)(truth), list(truth.leaves().values()))
    for name, grad, expected in zip(case.leaves(), mine, true, strict=True):
        assert relative_error(grad, expected) <= bound, name
    torch.testing.assert_close(result.loss, reference_of(graded)(truth), rtol=bound, atol=0)


def test_a_sequence_without_weight_is_inactive():
    case = make_case(61)
    assert uk.sequence_loss(*case.packed, curved).active[1].item() is False


# -- objectives
# -----------------------------------------------------------------------------------------------------------


@TORCH_ONLY
def test_npo_tends_to_gradient_ascent_as_beta_falls():
    case = make_case(60, 16, 257, torch.float64)
    num_sequences = len(case.cu_seqlens) - 1
    ref = uk.sequence_logprobs(*case.packed).detach() + 3.0
    npo = torch.autograd.grad(uk.npo_loss(*case.packed, ref, beta=1e-7), case.hidden)[0]
    ascent = torch.autograd.grad(uk.sequence_logprobs(*case.packed).sum() / num_sequences, case.hidden)[0]
    assert relative_error(npo, ascent) <= 1e-5


@TORCH_ONLY
def test_npo_where_policy_and_reference_agree():
    """-(2/beta) log sigmoid(0) = (2 / beta) log 2, and the weight of every sequence is 1 / B."""
    case = make_case(60, 16, 257, torch.float64)
    ref = uk.sequence_logprobs(*case.packed).detach()
    loss = uk.npo_loss(*case.packed, ref, beta=0.1)
    assert math.isclose(float(loss.detach()), 20 * math.log(2), rel_tol=1e-12)
    loss.backward()
    (ascent,) = torch.autograd.grad(uk.sequence_logprobs(*case.packed).sum() / len(ref), case.hidden)
    assert relative_error(case.hidden.grad, ascent) <= 1e-12


@TORCH_ONLY
def test_npo_saturates_where_the_policy_has_forgotten():
    case = make_case(60, 16, 257, torch.float64)
    far = uk.sequence_logprobs(*case.packed).detach() + 4000.0
    loss = uk.npo_loss(*case.packed, far, beta=0.1)
    (grad,) = torch.autograd.grad(loss, case.hidden)
    assert 0.0 <= float(loss.detach()) < 1e-100 and float(grad.abs().max()) < 1e-100


@TORCH_ONLY
def test_npo_is_linear_where_the_policy_remembers():
    case = make_case(60, 16, 257, torch.float64)
    logprobs = uk.sequence_logprobs(*case.packed).detach()
    loss = uk.npo_loss(*case.packed, logprobs - 5000.0, beta=0.1)
    assert math.isclose(float(loss.detach()), 2 * 5000.0, rel_tol=1e-12)


@TORCH_ONLY
def test_simnpo_is_npo_of_the_mean_with_a_margin():
    """One sequence: SimNPO(beta, gamma) is NPO with beta/length against a reference of -gamma length / beta, over
    length."""
    case = make_case(12, 16, 257, torch.float64)
    case.cu_seqlens = torch.tensor([0, 12])
    beta, gamma = 2.5, 0.3
    simnpo = uk.simnpo_loss(*case.packed, beta=beta, gamma=gamma)
    ref = torch.tensor([-gamma * 12 / beta], dtype=torch.float64)
    npo = uk.npo_loss(*case.packed, ref, beta=beta / 12) / 12
    torch.testing.assert_close(simnpo, npo, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_built_in_losses_are_sequence_losses(dtype, workspace):
    """Against the same objectives on the reference's log-likelihoods."""
    from unlearn_kernels import objectives

    too_slow_interpreted(dtype != torch.bfloat16, "bf16")
    case = make_case(37, 24, 257, dtype)
    num_sequences = len(case.cu_seqlens) - 1
    ref = torch.linspace(-30, 0, num_sequences, dtype=torch.float64, device=device())
    options = uk.Options(workspace_bytes=WORKSPACES[workspace](case))
    check_gradients(
        case,
        lambda case: uk.npo_loss(*case.packed, ref, beta=0.1, options=options),
        reference_of(objectives.npo(ref, beta=0.1)),
    )
    check_gradients(
        case,
        lambda case: uk.simnpo_loss(*case.packed, beta=2.5, gamma=0.2, options=options),
        reference_of(objectives.simnpo(num_sequences, beta=2.5, gamma=0.2)),
    )
