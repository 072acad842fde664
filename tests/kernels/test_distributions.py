"""KL divergence from a reference, and statistics of the distribution, against float64."""

import pytest
import torch

import unlearn_kernels as uk
from tests.kernels.cases import (
    WORKSPACES,
    assert_as_good_as_torch,
    check_gradients,
    device,
    interpreted,
    make_case,
    too_slow_interpreted,
    widest,
)
from unlearn_kernels import reference

pytestmark = pytest.mark.usefixtures("backend")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ALL_PARTS = ("bias", "scale", "softcap", "lora")


def reference_model(case, width=10, seed=9):
    generator = torch.Generator().manual_seed(seed)
    num_rows, vocab = case.hidden.shape[0], case.weight.shape[0]
    hidden = 4 * torch.randn(num_rows, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator) / width**0.5
    return hidden.to(case.hidden), weight.to(case.weight)


def weighted_kl(ref, function, **options):
    def kernel(case):
        ref_pair = [tensor.to(case.hidden.dtype) for tensor in ref]
        return (function(case.hidden, case.weight, *ref_pair, **case.head, **options).double() * case.upstream).sum()

    return kernel


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("parts", [(), ALL_PARTS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_of_another_width(dtype, parts, workspace):
    too_slow_interpreted(workspace != "keep" and dtype != torch.float32, "chunks in float32")
    case = make_case(37, 24, 257, dtype, parts=parts)
    ref = reference_model(case)
    options = uk.Options(workspace_bytes=WORKSPACES[workspace](case))
    check_gradients(
        case,
        weighted_kl(ref, uk.linear_kl, options=options),
        weighted_kl(ref, reference.linear_kl),
        small=2e-3 if dtype.itemsize == 2 else None,
    )


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "lora_a", "lora_b"])
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_kl_with_each_input_frozen(frozen, workspace):
    too_slow_interpreted(workspace == "keep", "chunks, which also accumulate")
    case = make_case(20, 24, 257, widest(), parts=ALL_PARTS)
    ref = reference_model(case)
    options = uk.Options(workspace_bytes=WORKSPACES[workspace](case))
    kernel = weighted_kl(ref, uk.linear_kl, options=options)
    check_gradients(case, kernel, weighted_kl(ref, reference.linear_kl), frozen=(frozen,))


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_kl_with_a_frozen_head_and_beyond_the_tile(workspace):
    case = make_case(70, 12, 1500, torch.float32)
    ref = reference_model(case)
    options = uk.Options(workspace_bytes=WORKSPACES[workspace](case))
    kernel = weighted_kl(ref, uk.linear_kl, options=options)
    check_gradients(case, kernel, weighted_kl(ref, reference.linear_kl), frozen=("weight",), small=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_of_a_model_with_itself_is_exactly_zero(dtype):
    case = make_case(dtype=dtype, parts=("softcap", "scale"))
    value = uk.linear_kl(case.hidden, case.weight, case.hidden, case.weight, **case.head)
    assert torch.equal(value, torch.zeros_like(value))
    for grad in torch.autograd.grad(value.sum(), (case.hidden, case.weight)):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_kl_of_nearby_models_does_not_cancel():
    """A relative shift of 1e-3 makes a KL near 1e-6, the size of float32's error in one logit."""
    case = make_case(40, 24, 257, torch.float32)
    near = case.hidden.detach() * 1.001
    value = uk.linear_kl(near, case.weight.detach(), case.hidden.detach(), case.weight.detach())
    truth = reference.linear_kl(
        near.double(), case.weight.detach().double(), case.hidden.detach().double(), case.weight.detach().double()
    )
    assert float(truth.max()) < 1e-4 and bool((value >= 0).all())
    torch.testing.assert_close(value.double(), truth, rtol=0.01, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kl_of_models_hundreds_of_nats_apart(dtype):
    case = make_case(40, 24, 257, dtype, logit_std=100.0)
    ref = [100 * tensor for tensor in reference_model(case)]
    value = uk.linear_kl(case.hidden, case.weight, *ref)
    truth = reference.linear_kl(case.hidden.double(), case.weight.double(), ref[0].double(), ref[1].double())
    assert float(truth.detach().max()) > 500
    torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-3)
    (grad,) = torch.autograd.grad(value.sum(), case.hidden)
    assert torch.isfinite(grad).all()


def test_kl_has_no_gradient_for_the_reference():
    case = make_case()
    hidden, weight = (tensor.requires_grad_() for tensor in reference_model(case))
    uk.linear_kl(case.hidden, case.weight, hidden, weight).sum().backward()
    assert hidden.grad is None and weight.grad is None and case.weight.grad is not None


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("parts", [(), ALL_PARTS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_token_stats(dtype, parts, workspace):
    too_slow_interpreted(workspace != "keep" and dtype != torch.float32, "chunks in float32")
    case = make_case(37, 24, 300 if interpreted() else 1500, dtype, parts=parts, lead=25.0)
    truth = case.like(torch.float64)
    stats = uk.token_stats(*case.inputs, **case.head, options=uk.Options(workspace_bytes=WORKSPACES[workspace](case)))
    expected = reference.token_stats(*truth.inputs, **truth.head)
    plain = reference.token_stats(*case.inputs, **case.head)
    small = 1e-12 if dtype == torch.float64 else 3e-6
    for name, index in (("logprobs", 0), ("mean_logprob", 2), ("var_logprob", 3)):
        assert_as_good_as_torch(name, stats[index], plain[index], expected[index], small)
    assert stats.is_argmax.dtype == torch.bool and torch.equal(stats.is_argmax, expected[1])
    assert stats.is_argmax.any() and not stats.is_argmax.all()
    assert not any(tensor.requires_grad for tensor in stats)


def test_token_stats_agree_with_token_logprobs():
    case = make_case(37, 24, 300 if interpreted() else 1500, torch.bfloat16)
    stats = uk.token_stats(*case.inputs)
    torch.testing.assert_close(stats.logprobs, uk.token_logprobs(*case.inputs).detach(), rtol=1e-6, atol=1e-5)


def test_the_lowest_index_wins_a_tie():
    hidden = torch.ones(3, 2, device=device())
    weight = torch.zeros(1500, 2, device=device())
    weight[[7, 1300]] = 1.0
    targets = torch.tensor([7, 1300, 8], device=device())
    assert uk.token_stats(hidden, weight, targets).is_argmax.tolist() == [True, False, False]


def test_a_small_variance_far_from_the_mean_is_not_lost():
    """Nearly flat logits and one outlier above them, which holds 1e-4 of the mass: E[x^2] - E[x]^2 would cancel in
    float32."""
    vocab = 1500
    hidden = torch.full((4, 1), 1.0, device=device())
    weight = 1e-3 * torch.randn(vocab, 1, generator=torch.Generator().manual_seed(0)).to(device())
    weight[9] = -2.0
    targets = torch.tensor([0, 1, 9, 1499], device=device())
    stats = uk.token_stats(hidden, weight, targets)
    expected = reference.token_stats(hidden.double(), weight.double(), targets)
    torch.testing.assert_close(stats.var_logprob.double(), expected[3], rtol=1e-4, atol=0)


def test_token_stats_with_a_masked_vocabulary_entry():
    case = make_case(parts=("bias",))
    with torch.no_grad():
        case.bias[4] = -torch.inf
    case.targets[case.targets == 4] = 5
    stats = uk.token_stats(*case.inputs, **case.head)
    keep = torch.arange(257, device=device()) != 4
    targets = case.targets - (case.targets > 4).long()
    head = {"bias": case.bias.detach()[keep].double()}
    expected = reference.token_stats(case.hidden.double(), case.weight.detach()[keep].double(), targets, **head)
    torch.testing.assert_close(stats.mean_logprob.double(), expected[2].detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.var_logprob.double(), expected[3].detach(), rtol=1e-5, atol=1e-5)


def test_token_stats_of_a_memorised_row_keep_relative_accuracy():
    hidden = torch.zeros(1, 300, device=device())
    hidden[0, 3] = 30.0
    weight, targets = torch.eye(300, device=device()), torch.tensor([3], device=device())
    value = uk.token_stats(hidden, weight, targets).logprobs
    truth = -torch.log1p(299 * torch.exp(torch.tensor([-30.0], dtype=torch.float64, device=device())))
    torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=0)
