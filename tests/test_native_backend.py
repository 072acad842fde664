"""What the native backend does beside its steps: the memory that it keeps, threads, instruction sets, large targets."""

import gc
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import unlearn_kernels as uk
from tests.kernels.cases import make_case
from unlearn_kernels import native

MIB = 1 << 20


@pytest.fixture(autouse=True)
def ops():
    if not native.load():
        reason = "the native library is not built: install with a C++ compiler (make test does)"
        if os.environ.get("UNLEARN_REQUIRE_NATIVE") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    gc.collect()
    uk.release_memory()
    yield torch.ops.unlearn_native
    uk.release_memory()


def test_memory_comes_back(ops):
    one = ops.pooled_empty([40, MIB], torch.uint8)
    assert one.shape == (40, MIB) and one.dtype == torch.uint8 and one.data_ptr() % 64 == 0
    address = one.data_ptr()
    view = one[3]
    del one
    assert uk.release_memory() == 0, "a view keeps its memory"
    del view
    other = ops.pooled_empty([30, MIB // 2], torch.bfloat16)
    assert other.data_ptr() == address
    other.fill_(2.0)
    much_smaller = ops.pooled_empty([MIB], torch.uint8)
    assert much_smaller.data_ptr() != address
    del other
    assert uk.release_memory() == 40 * MIB
    assert uk.release_memory() == 0
    del much_smaller
    assert uk.release_memory() == MIB


def test_no_more_is_kept_than_was_in_use_at_a_time(ops):
    for size in (40, 100, 30, 250, 90):
        del_me = ops.pooled_empty([size * MIB], torch.uint8)
        del del_me
    assert uk.release_memory() <= 250 * MIB
    both = [ops.pooled_empty([size * MIB], torch.uint8) for size in (60, 50)]
    del both
    assert uk.release_memory() == 110 * MIB


def test_a_profiler_sees_what_is_in_use(ops):
    kept = ops.pooled_empty([64 * MIB], torch.uint8)
    del kept
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        again = ops.pooled_empty([64 * MIB], torch.uint8)
        del again
    sizes = [event.nbytes() for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert sizes == [64 * MIB, -64 * MIB]


def test_many_threads_take_and_give(ops):
    failures = []

    def work(mark):
        for step in range(50):
            mine = ops.pooled_empty([1 + step % 7, 1 << 16], torch.int32)
            mine.fill_(mark)
            if not bool((mine == mark).all()):
                failures.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_negative_size_is_refused(ops):
    with pytest.raises(RuntimeError, match=r"size is \[3, -1\]; accepted: no negative numbers"):
        ops.pooled_empty([3, -1], torch.float32)
    assert ops.pooled_empty([0, 5], torch.float32).shape == (0, 5)


def test_a_training_step_finds_its_memory_again(ops):
    """E and the head's gradient, which the optimizer drops between steps."""
    case = make_case(256, 512, 40000, torch.bfloat16)
    addresses = []
    for _ in range(3):
        case.weight.grad = case.hidden.grad = None
        uk.token_logprobs(*case.inputs).sum().backward()
        addresses.append(case.weight.grad.data_ptr())
    assert addresses[1] == addresses[2]
    case.weight.grad = None
    nbytes = case.weight.numel() * case.weight.itemsize
    assert nbytes <= uk.release_memory() <= nbytes + (256 << 20)


def test_gradients_survive_later_steps_and_the_release(ops):
    case = make_case(64, 512, 40000, torch.bfloat16)
    uk.token_logprobs(*case.inputs).sum().backward()
    first, copy = case.weight.grad, case.weight.grad.clone()
    case.weight.grad = None
    (2 * uk.token_logprobs(*case.inputs)).sum().backward()
    uk.release_memory()
    assert torch.equal(first, copy) and not torch.equal(first, case.weight.grad)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_thread_counts_differ_by_rounding_and_repeat_to_the_bit(threads):
    case = make_case(100, 96, 1500, torch.bfloat16)
    before = torch.get_num_threads()

    def run(count):
        torch.set_num_threads(count)
        fresh = case.like()
        value = uk.token_logprobs(*fresh.inputs)
        (value.double() * fresh.upstream).sum().backward()
        return value.detach(), fresh.hidden.grad, fresh.weight.grad

    try:
        one, many, again = run(1), run(threads), run(threads)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(many, again, strict=True))
    for mine, other in zip(many, one, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-2 if mine.dtype == torch.bfloat16 else 2e-6, atol=1e-5)


def test_a_target_beyond_32_bits_is_no_column(ops):
    """2**32 + 1 is not column 1."""
    case = make_case(40, 64, 300, torch.bfloat16)
    scratch, offset = torch.empty(4 << 20), torch.full((40,), 30.0)
    results = []
    for target in (-1, 2**32 + 1, -(2**32) + 1, 2**63 - 1):
        sums = torch.empty(40)
        targets = torch.full((40,), target)
        inputs = (case.hidden.detach(), case.weight.detach(), targets, None, None, None, 1.0, 0.0)
        if not ops.exp_sums(*inputs, offset, sums, None, scratch):
            pytest.skip("no bf16 tile products here")
        results.append(sums)
    assert all(torch.equal(results[0], sums) for sums in results)


def test_what_the_operators_say_they_write(ops):
    """Their schemas' annotations, by which functionalization and autograd go."""
    case = make_case(20, 64, 300, torch.bfloat16)
    hidden, weight, targets = (tensor.detach() for tensor in case.inputs)
    e, sums, scratch = torch.zeros(20, 300, dtype=torch.bfloat16), torch.empty(20), torch.empty(1 << 21)
    offset, coeff, head = torch.full((20,), 30.0), torch.rand(20), (None, None, None, 1.0, 0.0)
    z, other = torch.randn(20, 300), torch.randn(20, 300)
    calls = {
        "exp_sums": (hidden, weight, targets, *head, offset, sums, e, scratch),
        "row_grad": (e, weight, targets, coeff, coeff, False, torch.empty(20, 64), scratch),
        "col_grad": (e, hidden, targets, coeff, coeff, False, torch.empty(300, 64), scratch),
        "exp_rows": (z.clone(), targets, None, 1.0, 0.0, offset, 0, torch.zeros(20, dtype=torch.float64)),
        "token_stats": (hidden, weight, targets, *head, torch.empty(5, 20, dtype=torch.float64), scratch),
        "logits": (hidden, weight, *head, torch.empty(20, 300), scratch),
        "kl_rows": (z, other, 0.0, torch.empty(20), None),
    }
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(ops, name).default, arguments, test_utils="test_schema")


def test_no_library_yet_is_no_error():
    code = "import unlearn_kernels; print(unlearn_kernels.release_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "0\n" and done.stderr == ""
