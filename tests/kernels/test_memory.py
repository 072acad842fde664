"""Nothing larger than max(workspace, float32 V x H, N x H) is allocated, forward or backward, and the sum stays
bounded."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import unlearn_kernels as uk
from tests.kernels.cases import make_case
from unlearn_kernels import backends

pytestmark = pytest.mark.usefixtures("unpoisoned")
WORKSPACE = 150_000


class LargestOutput(TorchDispatchMode):
    """The largest storage any operator returned."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.nbytes = max(self.nbytes, leaf.untyped_storage().nbytes())
        return out


def objective(logprobs, lengths, index):
    return logprobs.square() / lengths


def ref_of(case):
    return case.hidden.detach()[:, :16], case.weight.detach()[:, :16]


CALLS = {
    "token": lambda case, options: uk.token_logprobs(*case.inputs, **case.head, options=options).sum(),
    "sequence": lambda case, options: uk.sequence_logprobs(*case.packed, **case.head, options=options).sum(),
    "loss": lambda case, options: uk.sequence_loss(*case.packed, objective, **case.head, options=options).loss,
    "one group": lambda case, options: (
        uk.sequence_loss(*case.packed, objective, groups=[len(case.cu_seqlens) - 1], **case.head, options=options).loss
    ),
    "skip": lambda case, options: (
        uk.sequence_loss(*case.packed, objective, **case.head, options=uk.Options(options.workspace_bytes, 1e-3)).loss
    ),
    "kl": lambda case, options: uk.linear_kl(
        case.hidden, case.weight, *ref_of(case), **case.head, options=options
    ).sum(),
}


def large_case(dtype=torch.bfloat16, frozen=()):
    """N x V in bf16 is 1.3 MB, nine times the workspace."""
    return make_case(1200, 32, 550, dtype, parts=("lora",)).like(frozen=frozen)


def bound(case):
    hidden_itemsize = 4 if case.hidden.dtype == torch.float16 else case.hidden.dtype.itemsize
    return max(WORKSPACE, 4 * case.weight.numel(), hidden_itemsize * case.hidden.numel())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("frozen", [(), ("weight", "lora_a", "lora_b"), ("hidden",)])
def test_no_single_allocation_passes_the_bound(call, frozen, dtype):
    """The profiler sees every allocation, those inside the registered operators included."""
    case = large_case(dtype, frozen)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        CALLS[call](case, uk.Options(WORKSPACE)).backward()
    sizes = [e.nbytes() for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert len(sizes) > 100
    assert max(sizes) <= bound(case)


@pytest.mark.parametrize("call", CALLS)
def test_the_schedule_allocates_what_the_steps_write_into(call):
    """A dispatch mode does not look into operators; it sees E and the scratch all the same."""
    case = large_case()
    with LargestOutput() as largest:
        CALLS[call](case, uk.Options(WORKSPACE)).backward()
    assert WORKSPACE / 4 < largest.nbytes <= bound(case)


@pytest.mark.parametrize("call", ["token", "loss", "kl"])
def test_triton_steps_allocate_little(call):
    """The interpreter's arrays aside: what the steps allocate is rows of a few numbers, whatever N x V is."""
    pytest.importorskip("triton")
    case = make_case(70, 4, 200, torch.bfloat16, parts=("lora",))
    workspace = 6_900
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        CALLS[call](case, uk.Options(workspace, backend="triton")).backward()
    sizes = [e.nbytes() for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert 4 * workspace < 2 * 70 * 200 and max(sizes) <= workspace


@pytest.mark.parametrize("call", CALLS)
def test_the_sum_is_bounded_too(call):
    """Workspace, gradients (weight-shaped ones also in float32) and a few N x H rows; N x V is nowhere in it."""
    case = large_case()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        CALLS[call](case, uk.Options(WORKSPACE)).backward()
    live = peak = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    rows, weights = 2 * case.hidden.numel(), (4 + 2) * case.weight.numel()
    small = 40 * 8 * case.hidden.shape[0]
    assert peak <= 1.5 * WORKSPACE + 4 * rows + weights + small


@pytest.fixture(params=["torch", "triton"])
def named(request):
    """A backend by name; no step runs on fake tensors, so Triton's interpreter need not."""
    if request.param == "triton" and backends.load_triton():
        pytest.skip("triton cannot be imported")
    return request.param


@pytest.mark.parametrize("call", ["token", "sequence", "kl"])
def test_a_seven_billion_parameter_head_on_no_memory_at_all(call, named):
    """Fake tensors: N = 16384, H = 4096, V = 128256, whose logits are 4.2 GB, within 1 GiB and the gradients."""
    case = make_case(2, 4, 8, torch.bfloat16)
    with FakeTensorMode():
        case.hidden = torch.empty(16384, 4096, dtype=torch.bfloat16, requires_grad=True)
        case.weight = torch.empty(128256, 4096, dtype=torch.bfloat16, requires_grad=True)
        case.targets = torch.empty(16384, dtype=torch.int64)
        case.cu_seqlens = torch.empty(9, dtype=torch.int64)
        with pytest.MonkeyPatch.context() as patch, LargestOutput() as largest:
            patch.setattr("unlearn_kernels.checks.check_target_values", lambda targets, vocab: None)
            patch.setattr("unlearn_kernels.functions._boundaries", lambda hidden, cu_seqlens: [0, 16384])
            patch.setattr(backends, "_triton_refusal", lambda hidden: None)
            CALLS[call](case, uk.Options(1 << 30, backend=named)).backward()
    assert (1 << 29) < largest.nbytes <= 4 * 128256 * 4096
