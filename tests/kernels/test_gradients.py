"""Gradients of log-probabilities in every schedule, against float64 and against torch in the same dtype."""

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
from tests.kernels.test_logprobs import rows_with_lead
from unlearn_kernels import reference

pytestmark = pytest.mark.usefixtures("backend")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ALL_PARTS = ("bias", "scale", "softcap", "lora")


def weighted(workspace=None):
    def kernel(case):
        options = uk.Options(workspace_bytes=workspace)
        return (uk.token_logprobs(*case.inputs, **case.head, options=options).double() * case.upstream).sum()

    return kernel


def weighted_reference(case):
    return (reference.token_logprobs(*case.inputs, **case.head).double() * case.upstream).sum()


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_trained_head(dtype, workspace):
    case = make_case(37, 24, 257, dtype)
    check_gradients(case, weighted(WORKSPACES[workspace](case)), weighted_reference)


@TORCH_ONLY
@pytest.mark.parametrize("num_rows", [511, 512, 513])
@pytest.mark.parametrize("vocab", [1023, 1024, 1025])
def test_around_the_tile(num_rows, vocab):
    case = make_case(num_rows, 16, vocab)
    check_gradients(case, weighted(), weighted_reference)
    check_gradients(case, weighted(1 << 20), weighted_reference, small=1e-5)


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("parts", [("bias",), ("scale",), ("softcap",), ("lora",), ALL_PARTS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_part_of_the_head(dtype, parts, workspace):
    too_slow_interpreted(workspace != "keep" and parts != ALL_PARTS, "chunks of all parts together")
    case = make_case(dtype=dtype, parts=parts)
    check_gradients(case, weighted(WORKSPACES[workspace](case)), weighted_reference)


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "lora_a", "lora_b", "all but hidden", "all but lora"])
def test_each_input_frozen_in_turn(frozen, workspace):
    too_slow_interpreted(workspace == "keep", "chunks, which also accumulate")
    case = make_case(20, dtype=widest(), parts=ALL_PARTS)
    names = {
        "all but hidden": ("weight", "bias", "lora_a", "lora_b"),
        "all but lora": ("hidden", "weight", "bias"),
    }.get(frozen, (frozen,))
    check_gradients(case, weighted(WORKSPACES[workspace](case)), weighted_reference, frozen=names)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_frozen_weight(dtype, workspace):
    case = make_case(37, 24, 257, dtype)
    check_gradients(case, weighted(WORKSPACES[workspace](case)), weighted_reference, frozen=("weight",))


def test_both_frozen_has_no_graph():
    case = make_case().like(frozen=("hidden", "weight"))
    assert not uk.token_logprobs(*case.inputs).requires_grad
    assert not uk.sequence_logprobs(*case.packed).requires_grad


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("hidden_dtype", [torch.float16, torch.bfloat16])
def test_float32_weight_beside_16_bit_hidden(hidden_dtype, workspace):
    case = make_case(dtype=hidden_dtype, weight_dtype=torch.float32, parts=("bias", "lora"))
    check_gradients(case, weighted(WORKSPACES[workspace](case)), weighted_reference)


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_sequences_under_any_upstream(workspace):
    case = make_case(50, 24, 257, torch.float32, parts=("bias",))
    generator = torch.Generator().manual_seed(3)
    upstream = torch.randn(len(case.cu_seqlens) - 1, generator=generator, dtype=torch.float64).to(device())
    upstream[1] = 0.0
    options = uk.Options(workspace_bytes=WORKSPACES[workspace](case))
    check_gradients(
        case,
        lambda case: (uk.sequence_logprobs(*case.packed, **case.head, options=options) * upstream).sum(),
        lambda case: (reference.sequence_logprobs(*case.packed, **case.head) * upstream).sum(),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lead", [30, 24, -60, -101, -104, -128, -140])
@pytest.mark.parametrize("workspace", [None, 4096])
def test_both_ends_of_the_range(dtype, lead, workspace, backend):
    """Memorised rows: 1 - exp(logprob) is 0 in float32 and the gradient is 1e-11, not 0. Hopeless rows: redone.

    Small hidden states and large weights make the logits, so that h / S is the first to leave float32's range.
    """
    hidden, weight, targets = rows_with_lead(lead, dtype, num_rows=5, vocab=40)
    options = uk.Options(workspace_bytes=workspace)

    def run(function, to, **more):
        leaves = [(hidden / 2**13).to(to).requires_grad_(), (weight * 2**13).to(to).requires_grad_()]
        return torch.autograd.grad(function(*leaves, targets, **more).sum(), leaves)

    (mine, mine_weight), (true, true_weight) = (
        run(uk.token_logprobs, dtype, options=options),
        run(reference.token_logprobs, torch.float64),
    )
    bound = 1e-6 if dtype == torch.float32 else 1e-9
    if backend == "triton":
        # a GPU's exp is exp2(x log2 e): the product rounds by up to |x| 2**-24, and x reaches -87
        bound += 87 * 2.0**-24
    if backend == "triton":
        # exp2 of a float32 argument: half an ulp of x log2(e) is |x| 2^-24 of the result, x = lead + 40 nats
        bound = max(bound, (abs(lead) + 40) * 2.0**-24)
    if lead > 0:
        # float64 autograd itself loses 1 - p to cancellation; the off-target entries, which sum to minus it, are exact.
        true[torch.arange(5, device=device()), targets] -= true.sum(1)
    else:
        assert relative_error(mine_weight, true_weight) <= bound
    assert relative_error(mine, true) <= bound


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("frozen", [(), ("weight",)])
def test_a_retained_graph_gives_the_same_gradients_twice(workspace, frozen):
    case = make_case(20, dtype=torch.bfloat16, parts=("lora",)).like(frozen=frozen)
    options = uk.Options(workspace_bytes=WORKSPACES[workspace](case))
    values = uk.token_logprobs(*case.inputs, **case.head, options=options)
    leaves = list(case.leaves().values())
    first = torch.autograd.grad(values, leaves, case.upstream.float(), retain_graph=True)
    copies = [grad.clone() for grad in first]
    doubled = torch.autograd.grad(values, leaves, 2 * case.upstream.float(), retain_graph=True)
    again = torch.autograd.grad(values, leaves, case.upstream.float())
    for grad, copy, twice, repeat in zip(first, copies, doubled, again, strict=True):
        assert torch.equal(grad, copy), "a later backward wrote into an earlier result"
        assert torch.equal(grad, repeat)
        torch.testing.assert_close(twice, 2 * grad, rtol=0.01, atol=1e-30)


@TORCH_ONLY
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_double_backward_is_refused(workspace):
    case = make_case()
    options = uk.Options(workspace_bytes=WORKSPACES[workspace](case))
    values = uk.token_logprobs(*case.inputs, options=options)
    (grad,) = torch.autograd.grad(values.sum(), case.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not available"):
        torch.autograd.grad(grad.square().sum(), case.weight)


@TORCH_ONLY
def test_create_graph_alone_is_no_error():
    case = make_case()
    values = uk.token_logprobs(*case.inputs)
    (grad,) = torch.autograd.grad(values.sum(), case.hidden, create_graph=True)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_non_contiguous_hidden_and_weight(workspace):
    case = make_case(40, 24, 257, widest())
    wide = torch.randn(2, 21, 24, generator=torch.Generator().manual_seed(5)).to(device(), widest())
    columns = case.weight.detach().T.contiguous().requires_grad_()

    def run(function, **options):
        states = wide.clone().requires_grad_()
        hidden = states[:, :-1].transpose(0, 1)[:, 1]  # rows 42 floats apart
        assert not hidden.is_contiguous() or hidden.storage_offset() > 0
        value = (function(hidden, columns.T, case.targets[:20], **options) * case.upstream[:20]).sum()
        return torch.autograd.grad(value, (states, columns))

    workspace_bytes = WORKSPACES[workspace](case)
    for mine, truth in zip(
        run(uk.token_logprobs, options=uk.Options(workspace_bytes=workspace_bytes)),
        run(reference.token_logprobs),
        strict=True,
    ):
        assert relative_error(mine, truth) <= SMALL[widest()]


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_tied_embeddings(workspace):
    case = make_case(40, 24, 257, widest())
    tokens = torch.randint(0, 257, (40,), generator=torch.Generator().manual_seed(7)).to(device())

    def run(function, **options):
        weight = case.weight.detach().clone().requires_grad_()
        value = (function(weight[tokens] * 3, weight, case.targets, **options) * case.upstream).sum()
        return torch.autograd.grad(value, weight)[0]

    options = uk.Options(workspace_bytes=WORKSPACES[workspace](case))
    assert relative_error(run(uk.token_logprobs, options=options), run(reference.token_logprobs)) <= SMALL[widest()]


@pytest.mark.parametrize("workspace", [None, 10_000, 1200])
def test_a_label_in_most_rows_loses_nothing_in_bf16(workspace):
    """330 equal updates: a bf16 accumulator stops growing at 256 of them. The bound is one rounding to bf16, not
    torch's error."""
    too_slow_interpreted(workspace == 1200, "chunks of a hundred rows")
    case = make_case(400, 8, 50, torch.bfloat16, lead=0.0, logit_std=1.0)
    case.targets[:330] = 13
    case.upstream = torch.ones(400, dtype=torch.float64, device=device())
    with torch.no_grad():
        case.hidden[:] = 1.0 + 0.01 * case.hidden
    truth = case.like(torch.float64)
    weighted(workspace)(case).backward()
    weighted_reference(truth).backward()
    assert relative_error(case.weight.grad[13], truth.weight.grad[13]) <= 2e-3
    assert relative_error(case.weight.grad, truth.weight.grad) <= 2e-3


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_same_bits_twice(workspace):
    case = make_case(40, 16, 400, torch.bfloat16, parts=ALL_PARTS)
    case.targets[::3] = 5
    results = []
    for _ in range(2):
        one = case.like()
        weighted(WORKSPACES[workspace](case))(one).backward()
        results.append([leaf.grad for leaf in one.leaves().values()])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_backward_on_another_thread():
    import threading

    case = make_case(dtype=widest())
    here, there = case.like(), case.like()
    weighted()(here).backward()
    value = weighted()(there)
    thread = threading.Thread(target=value.backward)
    thread.start()
    thread.join()
    assert torch.equal(here.weight.grad, there.weight.grad)
