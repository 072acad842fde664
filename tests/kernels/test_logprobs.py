"""Token and sequence log-probabilities against float64: shapes, dtypes, heads, and both ends of the range."""

import pytest
import torch

import unlearn_kernels as uk
from tests.kernels.cases import TORCH_ONLY, assert_as_good_as_torch, device, make_case, too_slow_interpreted
from unlearn_kernels import reference

pytestmark = pytest.mark.usefixtures("backend")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Each bound is absolute, rms, in nats: the accumulator's rounding of logits of a few tens.
RMS = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}


def rms_error(case, **options):
    with torch.no_grad():
        value = uk.token_logprobs(*case.inputs, **case.head, options=uk.Options(**options))
        truth = case.like(torch.float64)
        truth = reference.token_logprobs(*truth.inputs, **truth.head)
    return float((value.double() - truth).square().mean().sqrt())


@TORCH_ONLY
@pytest.mark.parametrize("num_rows", [511, 512, 513])
@pytest.mark.parametrize("vocab", [1023, 1024, 1025])
def test_around_the_tile(num_rows, vocab):
    assert rms_error(make_case(num_rows, 16, vocab)) <= RMS[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_rows", "width", "vocab"),
    [(37, 24, 257), (19, 33, 32000), (3, 17, 50257), (3, 17, 641), (1, 8, 5)],
)
def test_peaked_rows(dtype, num_rows, width, vocab):
    too_slow_interpreted(vocab > 1000, "641 columns are five of its tiles and one column")
    case = make_case(num_rows, width, vocab, dtype)
    assert rms_error(case) <= RMS[dtype]
    assert rms_error(case, workspace_bytes=1 << 18) <= RMS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "parts", [("bias",), ("scale",), ("softcap",), ("lora",), ("bias", "scale", "softcap", "lora")]
)
def test_every_part_of_the_head(dtype, parts):
    assert rms_error(make_case(dtype=dtype, parts=parts)) <= RMS[dtype]


@pytest.mark.parametrize("hidden_dtype", [torch.float16, torch.bfloat16])
def test_float32_weight_beside_16_bit_hidden(hidden_dtype):
    case = make_case(dtype=hidden_dtype, weight_dtype=torch.float32, parts=("bias", "lora"))
    assert rms_error(case) <= RMS[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_dtypes(dtype):
    case = make_case(dtype=dtype)
    assert uk.token_logprobs(*case.inputs).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert uk.sequence_logprobs(*case.packed).dtype == torch.float64
    assert uk.token_logprobs(*case.inputs).shape == case.targets.shape
    assert uk.sequence_logprobs(*case.packed).shape == (len(case.cu_seqlens) - 1,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_past_the_range_of_exp(dtype):
    case = make_case(dtype=dtype, logit_std=60.0, lead=0.0)
    with torch.no_grad():
        assert float(reference.logits(case.hidden, case.weight).abs().max()) > 150
        value = uk.token_logprobs(*case.inputs)
        truth = case.like(torch.float64)
        assert_as_good_as_torch(
            "logprob",
            value,
            reference.token_logprobs(*case.inputs),
            reference.token_logprobs(*truth.inputs),
            1e-12 if dtype == torch.float64 else 1e-6,
        )


def rows_with_lead(lead: float, dtype=torch.float32, num_rows=9, vocab=300):
    """Logits are hidden itself (weight is the identity), so the target's lead over all others is exact."""
    hidden = torch.zeros(num_rows, vocab, dtype=torch.float64)
    targets = torch.arange(num_rows) * 7 % vocab
    if lead > 0:
        hidden[torch.arange(num_rows), targets] = lead
    else:
        hidden[torch.arange(num_rows), (targets + 11) % vocab] = -lead
    return hidden.to(device(), dtype), torch.eye(vocab, dtype=dtype, device=device()), targets.to(device())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [24, 30, 40])
def test_memorised_targets_keep_relative_accuracy(dtype, lead):
    hidden, weight, targets = rows_with_lead(lead, dtype)
    value = uk.token_logprobs(hidden, weight, targets)
    truth = -torch.log1p(299 * torch.exp(torch.tensor(-float(lead), dtype=torch.float64)))
    torch.testing.assert_close(
        value.double(), truth.expand(9).to(device()), rtol=1e-5 if dtype != torch.float64 else 1e-12, atol=0.0
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [-60, -101, -104, -128, -140, -300])
def test_hopeless_targets(dtype, lead):
    hidden, weight, targets = rows_with_lead(lead, dtype)
    value = uk.token_logprobs(hidden, weight, targets)
    assert float((value.double() - lead).abs().max()) <= (1e-10 if dtype == torch.float64 else 1e-4)


def test_mixture_of_hopeless_and_ordinary_rows_in_every_chunking():
    hidden, weight, targets = rows_with_lead(-140.0, num_rows=40)
    hidden[::3] = torch.randn(14, 300, generator=torch.Generator().manual_seed(1)).to(device())
    truth = reference.token_logprobs(hidden.double(), weight.double(), targets)
    for workspace in (None, 200_000, 4096):
        value = uk.token_logprobs(hidden, weight, targets, options=uk.Options(workspace_bytes=workspace))
        assert float((value.double() - truth).abs().max()) <= 3e-5


def test_a_masked_vocabulary_entry_is_minus_infinity_in_the_bias():
    case = make_case(parts=("bias",))
    with torch.no_grad():
        case.bias[5] = -torch.inf
    case.targets[case.targets == 5] = 6
    truth = case.like(torch.float64)
    value = uk.token_logprobs(*case.inputs, **case.head)
    assert float((value - reference.token_logprobs(*truth.inputs, **truth.head)).detach().abs().max()) <= 2e-5


def test_sequence_sums_do_not_depend_on_the_neighbours():
    case = make_case(60)
    whole = uk.sequence_logprobs(*case.packed)
    for index in range(len(case.cu_seqlens) - 1):
        first, last = case.cu_seqlens[index : index + 2].tolist()
        only = torch.tensor([0, last - first], device=device())
        alone = uk.sequence_logprobs(case.hidden[first:last], case.weight, case.targets[first:last], only)
        assert abs(float(alone[0].detach() - whole[index].detach())) <= 1e-4


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_cu_seqlens_of_either_width(index_dtype):
    case = make_case()
    truth = case.like(torch.float64)
    value = uk.sequence_logprobs(*case.inputs, case.cu_seqlens.to(index_dtype))
    torch.testing.assert_close(value, reference.sequence_logprobs(*truth.packed), rtol=1e-6, atol=1e-5)


def test_same_bits_with_and_without_gradients_and_twice():
    case = make_case(40, 16, 1100, torch.bfloat16)
    with torch.no_grad():
        first = uk.token_logprobs(*case.inputs)
        again = uk.token_logprobs(*case.inputs)
    assert torch.equal(first, again)
    assert torch.equal(first, uk.token_logprobs(*case.inputs).detach())


def test_autocast_and_reduced_matmul_precision_change_nothing():
    case = make_case(dtype=torch.float32, parts=("lora",))
    plain = uk.token_logprobs(*case.inputs, **case.head)
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast(device().type, dtype=torch.bfloat16):
            assert torch.equal(plain, uk.token_logprobs(*case.inputs, **case.head))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(precision)
