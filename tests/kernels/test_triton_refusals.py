"""Options(backend="triton") where it cannot serve: one ValueError that says why; and the warning of a GPU without
triton."""

import importlib
import warnings

import pytest
import torch

import unlearn_kernels as uk
from tests.kernels.cases import make_case
from unlearn_kernels import backends

pytest.importorskip("triton")
FORCED = uk.Options(backend="triton")


def logprobs(dtype=torch.float32):
    case = make_case(6, 8, 20, dtype)
    return uk.token_logprobs(*case.inputs, options=FORCED)


def one_line(caught):
    message = str(caught.value)
    assert "\n" not in message and message.startswith("options.backend is 'triton'") and "accepted" in message
    return message


def test_float64():
    with pytest.raises(ValueError, match="serves no float64") as caught:
        logprobs(torch.float64)
    one_line(caught)


def test_cpu_tensors_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(backends, "_interpreted", lambda: False)
    with pytest.raises(ValueError, match="cpu tensors .*TRITON_INTERPRET=1") as caught:
        logprobs()
    one_line(caught)


@pytest.fixture
def without_triton(monkeypatch):
    """As if `import triton` failed, and nobody had asked yet."""
    real = importlib.import_module

    def missing(name, package=None):
        if name == ".triton_backend":
            raise ImportError("No module named 'triton'")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", missing)
    monkeypatch.setattr(backends, "BACKENDS", {"torch": backends.BACKENDS["torch"]})
    backends._load_triton.cache_clear()
    backends._warn_without_triton.cache_clear()
    # whoever comes next finds the operators registered already
    registered = backends.register
    monkeypatch.setattr(backends, "register", lambda name, module: None)
    yield
    monkeypatch.undo()
    assert backends.register is registered
    backends._load_triton.cache_clear()
    backends._warn_without_triton.cache_clear()
    monkeypatch.setattr(backends, "register", lambda name, module: None)
    if "triton" in backends.BACKENDS:
        backends.load_triton()


def test_triton_not_installed(without_triton):
    with pytest.raises(ValueError, match=r"\(No module named 'triton'\)") as caught:
        logprobs()
    one_line(caught)


class OnCuda:
    """As much of a CUDA tensor as choosing a backend looks at."""

    def __init__(self, dtype=torch.bfloat16):
        self.dtype, self.device, self.is_cuda = dtype, torch.device("cuda", 0), True


@pytest.fixture
def a_gpu(monkeypatch):
    def of_capability(*capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    of_capability(9, 0)
    return of_capability


def test_a_gpu_without_triton_gets_the_torch_backend_and_one_warning(without_triton, a_gpu):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names = {backends.choose(OnCuda(), OnCuda(), None).name for _ in range(3)}
    assert names == {"torch"} and len(caught) == 1
    message = str(caught[0].message)
    assert "No module named 'triton'" in message and "pip install triton" in message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_gpu_with_triton_gets_it_without_a_word(dtype, a_gpu):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(OnCuda(dtype), OnCuda(dtype), None).name == "triton"


def test_float64_on_a_gpu_goes_to_torch_without_a_word(a_gpu):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(OnCuda(torch.float64), OnCuda(torch.float64), None).name == "torch"


def test_an_old_gpu(a_gpu):
    a_gpu(7, 5)
    assert backends.choose(OnCuda(), OnCuda(), None).name == "torch"
    with pytest.raises(ValueError, match=r"compute capability \(7, 5\), below \(8, 0\)") as caught:
        backends.choose(OnCuda(), OnCuda(), "triton")
    one_line(caught)


def test_cpu_tensors_do_not_go_to_triton_even_under_the_interpreter():
    case = make_case(6, 8, 20)
    assert backends.choose(case.hidden, case.weight, None).name != "triton"


def test_an_unknown_backend_names_the_known_ones():
    with pytest.raises(ValueError, match="options.backend is 'cuda'; accepted: 'torch', 'native', 'triton' or None"):
        backends.choose(torch.zeros(1, 1), torch.zeros(1, 1), "cuda")
