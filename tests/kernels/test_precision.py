"""Products keep their precision whatever torch was told elsewhere in the process, and torch is left as it was told.

The older switch is torch.set_float32_matmul_precision, the newer ones (torch 2.9) are the fp32_precision attributes of
torch.backends. A process that used the newer ones cannot read the older: torch raises.
"""

import itertools
import threading

import pytest
import torch

import unlearn_kernels as uk
from tests.kernels.cases import TORCH_ONLY, make_case
from unlearn_kernels import tiles

LEVELS = (("generic", "all"), ("cuda", "all"), ("cuda", "matmul"), ("mkldnn", "all"), ("mkldnn", "matmul"))
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter

# How a process may have asked for less, by what it would call.
OLD = {name: lambda name=name: torch.set_float32_matmul_precision(name) for name in ("high", "medium")}
OLD["allow_tf32"] = lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True)
NEW = {
    f"{backend}.{op} {value}": lambda *args, level=(backend, op, value): put(*level)
    for (backend, op), value in itertools.product(LEVELS, ("tf32", "bf16", "ieee"))
    if (backend, value) != ("cuda", "bf16")
}
STATES = {**OLD, **NEW}
STATES["generic tf32, cuda ieee"] = lambda: (put("generic", "all", "tf32"), put("cuda", "matmul", "ieee"))
STATES["generic ieee, mkldnn bf16"] = lambda: (put("generic", "all", "ieee"), put("mkldnn", "all", "bf16"))
STATES["generic bf16, both bf16"] = lambda: (put("generic", "all", "bf16"), put("mkldnn", "matmul", "bf16"))
STATES["medium, then generic tf32"] = lambda: (OLD["medium"](), put("generic", "all", "tf32"))


@pytest.fixture(autouse=True)
def as_in_a_new_process():
    yield
    torch.set_float32_matmul_precision("highest")
    for level in LEVELS:
        put(*level, "none")


def told() -> list[str]:
    """What was set at each level, and what holds: all values as the parents change."""
    seen = [get(*level) for level in LEVELS]
    generic = get("generic", "all")
    for value in ("none", "ieee", "tf32"):
        put("generic", "all", value)
        seen += [get(*level) for level in LEVELS]
    put("generic", "all", generic)
    try:
        return [*seen, torch.get_float32_matmul_precision()]
    except RuntimeError:
        return [*seen, "raises"]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_exact_inside_and_as_before_outside(state, device):
    STATES[state]()
    before = told()
    backend = "cuda" if device == CUDA else "mkldnn"
    with tiles.exact_products(device):
        assert get(backend, "matmul") in ("ieee", "none")
        with tiles.exact_products(device):
            assert get(backend, "matmul") in ("ieee", "none")
        assert get(backend, "matmul") in ("ieee", "none")
    assert told() == before


def test_restored_where_the_work_raises():
    NEW["generic.all tf32"]()
    before = told()
    with pytest.raises(MemoryError), tiles.exact_products(CUDA):
        raise MemoryError
    assert told() == before


def test_some_states_cannot_be_read_by_the_older_switch():
    """Else the tests above would show nothing."""
    NEW["cuda.matmul tf32"]()
    with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
        torch.get_float32_matmul_precision()


def test_16_bit_sums_of_16_bit_products_on_cuda():
    settings = torch.backends.cuda.matmul
    before = {name: getattr(settings, name) for name in tiles._REDUCED}
    assert before["allow_bf16_reduced_precision_reduction"] and not before["allow_fp16_accumulation"]
    try:
        settings.allow_fp16_accumulation = True
        settings.allow_fp16_reduced_precision_reduction = False
        given = {name: getattr(settings, name) for name in tiles._REDUCED}
        with tiles.exact_products(CUDA):
            assert not any(getattr(settings, name) for name in tiles._REDUCED)
        assert {name: getattr(settings, name) for name in tiles._REDUCED} == given
    finally:
        for name, value in before.items():
            setattr(settings, name, value)


def test_a_thread_that_leaves_first_takes_no_precision_from_the_other():
    OLD["medium"]()
    entered, left = threading.Event(), threading.Event()

    def other():
        with tiles.exact_products(CPU):
            entered.set()
            left.wait(10)

    with tiles.exact_products(CPU):
        thread = threading.Thread(target=other)
        thread.start()
        assert entered.wait(10)
    assert get("mkldnn", "matmul") == "ieee"
    left.set()
    thread.join()
    assert get("mkldnn", "matmul") == "bf16" and torch.get_float32_matmul_precision() == "medium"


def test_a_torch_without_the_newer_switches(monkeypatch):
    monkeypatch.setattr(tiles, "_precision", None)
    OLD["high"]()
    with tiles.exact_products(CPU):
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "high"


@TORCH_ONLY
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("state", ["high", "medium", "generic.all tf32", "generic.all bf16", "mkldnn.matmul bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_keep_their_bits(state, dtype):
    """Of sizes that the CPU's bf16 products would serve."""
    case = make_case(96, 64, 512, dtype, parts=("lora",))

    def results():
        one = case.like()
        value = uk.token_logprobs(*one.inputs, **one.head)
        return [value.detach(), *torch.autograd.grad((value * case.upstream).sum(), list(one.leaves().values()))]

    plain = results()
    STATES[state]()
    assert all(map(torch.equal, plain, results()))
