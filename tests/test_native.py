"""The native operators against float64: sizes around the vector width, dtypes, strides, errors, threads."""

import os
import threading
from pathlib import Path

import pytest
import torch

import unlearn_kernels

DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]


@pytest.fixture(scope="module")
def target_dot():
    files = [file for folder in unlearn_kernels.__path__ for file in sorted(Path(folder).glob("_native*.so"))]
    if not files:
        reason = "the native library is not built: install with a C++ compiler (make test does)"
        # set where a compiler is known to be there, so that a broken build cannot hide behind a skip
        if os.environ.get("UNLEARN_REQUIRE_NATIVE") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    torch.ops.load_library(str(files[0]))
    return torch.ops.unlearn_native.target_dot


def case(num_tokens, hidden_size, vocab_size=11, dtype=torch.float32, weight_dtype=None, scale=1.0):
    generator = torch.Generator().manual_seed(num_tokens * 1000 + hidden_size)
    hidden = (scale * torch.randn(num_tokens, hidden_size, generator=generator)).to(dtype)
    weight = torch.randn(vocab_size, hidden_size, generator=generator).to(weight_dtype or dtype)
    targets = torch.randint(vocab_size, (num_tokens,), generator=generator)
    return hidden, weight, targets


def assert_exact_enough(result, hidden, weight, targets):
    """Within float32 summation's worst case of the float64 value, (H + 1) eps sum |h w|; written so that NaN fails."""
    products = hidden.double() * weight.double()[targets]
    bound = (hidden.shape[1] + 1) * torch.finfo(torch.float32).eps * products.abs().sum(1) + 1e-37
    assert result.dtype == torch.float32
    assert ((result.double() - products.sum(1)).abs() <= bound).all()


@pytest.mark.parametrize("hidden_size", [1, 3, 4, 15, 16, 17, 31, 32, 33, 100, 1024, 1031])
@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
def test_sizes_around_the_vector_width(target_dot, hidden_size, dtype, weight_dtype):
    hidden, weight, targets = case(7, hidden_size, dtype=dtype, weight_dtype=weight_dtype)
    assert_exact_enough(target_dot(hidden, weight, targets), hidden, weight, targets)


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 33, 1000])
def test_token_counts_and_repeated_targets(target_dot, num_tokens):
    hidden, weight, targets = case(num_tokens, 65, vocab_size=3)
    assert_exact_enough(target_dot(hidden, weight, targets), hidden, weight, targets)


def test_empty_width_is_zero(target_dot):
    hidden, weight, targets = case(5, 0)
    assert torch.equal(target_dot(hidden, weight, targets), torch.zeros(5))


@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
def test_row_strides_and_misaligned_rows(target_dot, dtype, weight_dtype):
    """Rows at answer positions are views: every other row, and a start that is aligned to nothing."""
    hidden, weight, targets = case(20, 40, dtype=dtype, weight_dtype=weight_dtype)
    hidden, weight, targets = hidden[::2, 1:36], weight[::3, 3:38], targets[::2] % 4
    assert_exact_enough(target_dot(hidden, weight, targets), hidden, weight, targets)


def test_large_values_accumulate_in_float32(target_dot):
    """float16 products and sums pass 65504, bf16 sums would stop growing at 256."""
    hidden, weight, targets = case(3, 4096, dtype=torch.float16, scale=300.0)
    assert_exact_enough(target_dot(hidden, weight, targets), hidden, weight, targets)
    ones = torch.ones(2, 4096, dtype=torch.bfloat16)
    assert target_dot(ones, ones, torch.tensor([0, 1])).tolist() == [4096.0, 4096.0]


@pytest.mark.parametrize("position", [0, 15, 16, 36])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_reach_their_row_and_no_other(target_dot, value, position):
    hidden, weight, targets = case(4, 37, dtype=torch.bfloat16)
    hidden[2, position] = value
    weight = weight.abs() + 0.5
    result = target_dot(hidden, weight, targets)
    assert torch.equal(result[2].isnan(), torch.tensor(value != value))
    assert not result[2].isfinite()
    assert result[[0, 1, 3]].isfinite().all()


def test_zero_times_infinity_is_nan(target_dot):
    hidden = torch.zeros(1, 20)
    weight = torch.full((1, 20), float("inf"))
    assert target_dot(hidden, weight, torch.tensor([0])).isnan().all()


@pytest.mark.parametrize("target", [-1, 11, -(2**63), 2**63 - 1])
def test_a_target_outside_the_vocabulary_raises(target_dot, target):
    hidden, weight, targets = case(5, 16)
    targets[3] = target
    with pytest.raises(ValueError, match=rf"targets must be in \[0, 11\), got targets\[3\] = {target}"):
        target_dot(hidden, weight, targets)


def test_refusals_name_the_argument(target_dot):
    hidden, weight, targets = case(5, 16)
    for arguments, message in (
        ((hidden[0], weight, targets), r"hidden must be \[N, H\], got \[16\]"),
        ((hidden, weight[0], targets), r"weight must be \[V, H\]"),
        ((hidden, weight, targets[None]), r"targets must be \[N\]"),
        ((hidden[:, 1:], weight, targets), r"same width H, got \[5, 15\] and \[11, 16\]"),
        ((hidden[1:], weight, targets), "same length N"),
        ((hidden, weight, targets.int()), "targets must be int64"),
        ((hidden.t().contiguous().t(), weight, targets), "rows of hidden must be contiguous"),
        ((hidden, weight.t().contiguous().t(), targets), "rows of weight must be contiguous"),
        ((hidden.double(), weight.double(), targets), "got Double and Double"),
        ((hidden, weight.bfloat16(), targets), "got Float and BFloat16"),
        ((hidden.half(), weight.bfloat16(), targets), "got Half and BFloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            target_dot(*arguments)


def test_threads_do_not_change_a_bit(target_dot):
    """Each row is summed by one thread, so the number of threads cannot matter."""
    hidden, weight, targets = case(5000, 257)
    one = target_dot(hidden, weight, targets)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        four = target_dot(hidden, weight, targets)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, four)


def test_concurrent_calls(target_dot):
    hidden, weight, targets = case(500, 129)
    expected = target_dot(hidden, weight, targets)
    results = [None] * 4

    def call(i):
        results[i] = target_dot(hidden, weight, targets)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, expected) for result in results)


def test_meta_tensors_give_shape_and_dtype(target_dot):
    hidden, weight, targets = (t.to("meta") for t in case(5, 16, dtype=torch.bfloat16))
    result = target_dot(hidden, weight, targets)
    assert (result.shape, result.dtype, result.device.type) == ((5,), torch.float32, "meta")


def test_opcheck(target_dot):
    torch.library.opcheck(target_dot, case(5, 16), test_utils=("test_schema", "test_faketensor"))
