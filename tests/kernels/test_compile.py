"""torch.compile sees the schedules and opaque steps: no graph break, the same numbers, and values are still checked."""

import pytest
import torch

import unlearn_kernels as uk
from tests.kernels.cases import make_case, relative_error
from unlearn_kernels import backends

pytestmark = pytest.mark.usefixtures("unpoisoned")

CALLS = {
    "token": lambda case, **more: uk.token_logprobs(*case.inputs, **case.head, **more).sum(),
    "sequence": lambda case, **more: uk.sequence_logprobs(*case.packed, **case.head, **more).square().sum(),
    "npo": lambda case, **more: uk.npo_loss(
        *case.packed,
        torch.full((len(case.cu_seqlens) - 1,), -20.0, device=case.hidden.device),
        beta=0.1,
        **case.head,
        **more,
    ),
    "simnpo": lambda case, **more: uk.simnpo_loss(*case.packed, beta=2.5, gamma=0.1, **case.head, **more),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("frozen", "workspace"), [((), None), ((), 8192), (("weight",), 8192)])
def test_full_graph(call, frozen, workspace):
    torch._dynamo.reset()
    case = make_case(20, 8, 60).like(frozen=frozen)
    options = uk.Options(workspace_bytes=workspace)

    def run(hidden, weight):
        case.hidden, case.weight = hidden, weight
        return CALLS[call](case, options=options)

    inputs = (case.hidden, case.weight)
    leaves = list(case.leaves().values())
    plain = torch.autograd.grad(run(*inputs), leaves)
    compiled = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs), leaves)
    for mine, expected in zip(compiled, plain, strict=True):
        assert relative_error(mine, expected) <= 2e-6


@pytest.mark.skipif(bool(backends.load_triton()), reason="triton cannot be imported")
@pytest.mark.parametrize(("call", "workspace"), [("token", None), ("token", 8192), ("npo", None)])
def test_full_graph_of_the_triton_backend(call, workspace):
    """Traced like any other; the opaque steps run interpreted, or compiled on a GPU."""
    torch._dynamo.reset()
    case = make_case(20, 8, 60)
    if torch.cuda.is_available():
        for name in ("hidden", "weight", "targets", "cu_seqlens"):
            tensor = getattr(case, name).detach().cuda()
            setattr(case, name, tensor.requires_grad_(tensor.is_floating_point()))
    options = uk.Options(workspace_bytes=workspace, backend="triton")

    def run(hidden, weight):
        case.hidden, case.weight = hidden, weight
        return CALLS[call](case, options=options)

    inputs = (case.hidden, case.weight)
    plain = torch.autograd.grad(run(*inputs), inputs)
    compiled = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for mine, expected in zip(compiled, plain, strict=True):
        assert relative_error(mine, expected) <= 2e-6


def test_full_graph_with_every_part_of_the_head():
    torch._dynamo.reset()
    case = make_case(20, 8, 60, parts=("bias", "scale", "softcap", "lora"))

    def run(hidden, weight, bias, lora_a, lora_b):
        value = uk.token_logprobs(
            hidden, weight, case.targets, bias=bias, lora=(lora_a, lora_b, 0.5), logit_scale=0.7, softcap=15.0
        )
        return value.square().sum()

    leaves = list(case.leaves().values())
    plain = torch.autograd.grad(run(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for mine, expected in zip(compiled, plain, strict=True):
        assert relative_error(mine, expected) <= 2e-6


def test_values_are_checked_where_a_traced_program_runs():
    torch._dynamo.reset()
    case = make_case(20, 8, 60)
    tokens = torch.compile(uk.token_logprobs, fullgraph=True, backend="aot_eager")
    sequences = torch.compile(uk.sequence_logprobs, fullgraph=True, backend="aot_eager")
    bad = case.targets.clone()
    bad[4] = 60
    with pytest.raises(ValueError, match=r"targets\[4\] is 60"):
        tokens(case.hidden, case.weight, bad)
    with pytest.raises(ValueError, match="strictly rising"):
        sequences(*case.inputs, torch.tensor([0, 5, 5, 20]))


def test_every_step_is_an_operator_with_a_fake_implementation():
    for backend in backends.BACKENDS.values():
        assert set(vars(backend.steps)) == set(backends.STEPS)
        for step, operator in vars(backend.steps).items():
            assert operator.namespace == "unlearn_kernels" and operator._opname == f"{backend.name}_{step}"
