"""Random shapes, dtypes, heads, workspaces and lengths against the definitions in float64; the same examples every
run."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import unlearn_kernels as uk
from tests.kernels.cases import TRITON_ONLY, check_gradients, make_case
from unlearn_kernels import reference

pytest.importorskip("triton")
from unlearn_kernels import triton_tuning  # noqa: E402

pytestmark = [pytest.mark.usefixtures("backend"), TRITON_ONLY]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
deterministic = settings(
    max_examples=16,
    derandomize=True,
    deadline=None,
    database=None,
    # the fixtures only choose the backend: nothing in them changes from example to example
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
heads = st.lists(st.sampled_from(["bias", "scale", "softcap", "lora"]), unique=True).map(tuple)
frozen = st.sampled_from([(), ("hidden",), ("weight",), ("weight", "bias", "lora_a", "lora_b")])


@st.composite
def cases(draw, most_rows=24):
    dtype = draw(st.sampled_from(DTYPES))
    wide = dtype != torch.float32 and draw(st.booleans())
    return make_case(
        draw(st.integers(1, most_rows)),
        draw(st.integers(1, 40)),
        draw(st.integers(2, 300)),
        dtype,
        weight_dtype=torch.float32 if wide else None,
        parts=draw(heads),
        logit_std=draw(st.sampled_from([0.1, 4.0, 30.0])),
        lead=draw(st.sampled_from([-60.0, 0.0, 12.0, 40.0])),
        seed=draw(st.integers(0, 99)),
    )


workspaces = st.sampled_from([None, 1 << 14, 1 << 12])
plans = st.sampled_from(["fused", "library"])


def small(case):
    # exp2(x log2 e) rounds by up to 87 x 2**-24 beside the dtype's own
    return {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 4e-3}[case.hidden.dtype]


@deterministic
@given(case=cases(), workspace=workspaces, plan=plans, frozen=frozen)
def test_log_probabilities(case, workspace, plan, frozen):
    options = uk.Options(workspace_bytes=workspace)

    def kernel(case):
        return (uk.token_logprobs(*case.inputs, **case.head, options=options).double() * case.upstream).sum()

    def truth(case):
        return (reference.token_logprobs(*case.inputs, **case.head).double() * case.upstream).sum()

    with triton_tuning.force(plan):
        check_gradients(case, kernel, truth, frozen=frozen, small=small(case))
        with torch.no_grad():
            value = uk.token_logprobs(*case.inputs, **case.head, options=options).double()
            exact = case.like(torch.float64)
            error = (value - reference.token_logprobs(*exact.inputs, **exact.head)).square().mean().sqrt()
    assert float(error) <= 3e-5


@deterministic
@given(case=cases(), workspace=workspaces)
def test_losses(case, workspace):
    options = uk.Options(workspace_bytes=workspace)

    def objective(logprobs, lengths, index):
        return torch.nn.functional.logsigmoid(logprobs / lengths + 3.0) * torch.where(index % 3 == 1, -0.5, 1.0)

    check_gradients(
        case,
        lambda case: uk.sequence_loss(*case.packed, objective, **case.head, options=options).loss,
        lambda case: reference.sequence_loss(*case.packed, objective, **case.head),
        small=small(case),
    )


@deterministic
@given(case=cases(), workspace=workspaces, ref_width=st.integers(1, 33))
def test_distributions(case, workspace, ref_width):
    options = uk.Options(workspace_bytes=workspace)
    num_rows, vocab = case.hidden.shape[0], case.weight.shape[0]
    other = make_case(num_rows, ref_width, vocab, case.hidden.dtype, weight_dtype=case.weight.dtype, seed=100)
    exact = case.like(torch.float64)
    with torch.no_grad():
        kl = uk.linear_kl(case.hidden, case.weight, other.hidden, other.weight, **case.head, options=options)
        ref = other.hidden.double(), other.weight.double()
        true_kl = reference.linear_kl(exact.hidden, exact.weight, *ref, **exact.head)
        stats = uk.token_stats(*case.inputs, **case.head, options=options)
        true_stats = reference.token_stats(*exact.inputs, **exact.head)
    torch.testing.assert_close(kl.double(), true_kl, rtol=2e-5, atol=3e-5)
    for mine, true in zip(stats, true_stats, strict=True):
        torch.testing.assert_close(mine.double(), true.double(), rtol=2e-5, atol=6e-5)
