"""Options.capturable: the path of a CUDA graph, taken eagerly, gives what the ordinary one gives.

That a capture launches nothing which such a call has not launched is in test_triton_launches.py.
"""

import pytest
import torch

import unlearn_kernels as uk
from tests.kernels.cases import SMALL, WORKSPACES, device, make_case, relative_error, widest
from unlearn_kernels import functions

pytestmark = pytest.mark.usefixtures("backend")


def npo(case, options):
    ref = torch.full((len(case.cu_seqlens) - 1,), -20.0, device=device())
    return uk.npo_loss(*case.packed, ref, beta=0.1, **case.head, options=options)


CALLS = {
    "token_logprobs": lambda case, options: uk.token_logprobs(*case.inputs, **case.head, options=options).sum(),
    "sequence_logprobs": lambda case, options: (
        uk.sequence_logprobs(*case.packed, **case.head, options=options).square().sum()
    ),
    "npo_loss": npo,
    "simnpo_loss": lambda case, options: uk.simnpo_loss(
        *case.packed, beta=2.5, gamma=0.1, **case.head, options=options
    ),
}


def results(call, case, options):
    one = case.like()
    value = CALLS[call](one, options)
    return [value.detach(), *torch.autograd.grad(value, list(one.leaves().values()))]


@pytest.mark.parametrize("workspace", ["keep", "chunks"])
@pytest.mark.parametrize("call", CALLS)
def test_the_same_value_and_gradients(call, workspace):
    case = make_case(30, dtype=widest(), parts=("lora",))
    workspace_bytes = WORKSPACES[workspace](case)
    plain = results(call, case, uk.Options(workspace_bytes=workspace_bytes))
    mine = results(call, case, uk.Options(workspace_bytes=workspace_bytes, capturable=True))
    for one, other in zip(mine, plain, strict=True):
        assert relative_error(one, other) <= 2 * SMALL[widest()]


def test_losses_take_the_other_path(monkeypatch):
    case = make_case(20)

    def refuse(*args, **kwargs):
        raise AssertionError("sequence_loss plans on the host")

    monkeypatch.setattr(functions, "sequence_loss", refuse)
    npo(case, uk.Options(capturable=True))
    with pytest.raises(AssertionError, match="plans on the host"):
        npo(case, uk.Options())


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_sums_see_one_width_of_cu_seqlens(monkeypatch, index_dtype):
    """Else a capture could need a binary that its warm-up has not loaded."""
    case, seen = make_case(20), []
    sums = functions.autograd.sequence_sums

    def noted(values, boundaries, backend):
        seen.append(boundaries.dtype)
        return sums(values, boundaries, backend)

    monkeypatch.setattr(functions.autograd, "sequence_sums", noted)
    for capturable in (False, True):
        packed, options = (*case.inputs, case.cu_seqlens.to(index_dtype)), uk.Options(capturable=capturable)
        uk.sequence_logprobs(*packed, options=options)
        uk.simnpo_loss(*packed, beta=2.5, options=options)
    assert set(seen) == {torch.int64}


def test_what_cannot_be_captured_is_refused():
    case = make_case(20)
    with pytest.raises(ValueError, match="options.capturable is True; accepted: False for sequence_loss, .*npo"):
        uk.sequence_loss(*case.packed, lambda logprobs, *_: logprobs, options=uk.Options(capturable=True))
    with pytest.raises(ValueError, match="options.skip_below is 0.1; accepted: 0 under .*options.capturable"):
        npo(case, uk.Options(skip_below=0.1, capturable=True))


def test_cu_seqlens_are_checked_all_the_same():
    case = make_case(20)
    case.cu_seqlens = torch.tensor([0, 5, 5, 20], device=device())
    with pytest.raises(ValueError, match="strictly rising"):
        npo(case, uk.Options(capturable=True))
