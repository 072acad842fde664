"""Kernel tests run once per backend, and see NaN wherever memory was allocated and not written."""

import importlib

import numpy
import pytest
import torch

from tests.kernels import cases
from unlearn_kernels import backends, native

ON_CUDA = torch.cuda.is_available()


def pytest_configure(config):
    # what a GPU does in silence numpy remarks upon: exp of a hopeless row, -inf - -inf in a branch not taken
    remarks = "ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning:triton.runtime.interpreter"
    config.addinivalue_line("filterwarnings", remarks)


def _nearest_bf16(convert):
    """Triton 3.9's interpreter cuts float32 off to bf16; a GPU rounds to nearest, and so does this."""

    def convert_float(data, from_type, to_type, rounding):
        if (str(from_type), str(to_type)) != ("fp32", "bf16"):
            return convert(data, from_type, to_type, rounding)
        rounded = torch.from_numpy(numpy.array(data, ndmin=1)).bfloat16().view(torch.int16)
        return rounded.numpy().view(numpy.uint16).reshape(data.shape)

    return convert_float


@pytest.fixture(params=["torch", "native", "triton", *(["torch on cuda"] if ON_CUDA else [])])
def backend(request, monkeypatch):
    """The backend that serves wherever a test forces none. With CUDA `cases.device()` is the GPU for triton, compiled
    there; without, triton is interpreted on CPU tensors."""
    name = request.param.split()[0]
    if name == "triton" and (reason := backends.load_triton()):
        pytest.skip(f"triton cannot be imported: {reason}")
    if name == "native" and not native.load():
        pytest.skip("the native library is not built (tests/test_native.py)")
    on_cuda = ON_CUDA and request.param not in ("torch", "native")
    monkeypatch.setattr(cases, "_device", torch.device("cuda" if on_cuda else "cpu"))
    monkeypatch.setattr(cases, "_backend", name)
    monkeypatch.setenv("UNLEARN_KERNELS_AUTOTUNE", "0")
    if name == "triton" and not on_cuda:
        if request.node.callspec.params.get("workspace") == "rows":
            pytest.skip("a few rows at a time: minutes under the interpreter; test_triton.py has small ones")
        interpreter = importlib.import_module("triton.runtime.interpreter")
        monkeypatch.setattr(interpreter, "_convert_float", _nearest_bf16(interpreter._convert_float))
    choose = backends.choose

    def choose_this(hidden, weight, forced):
        if forced is None and name != "torch" and hidden.dtype == torch.float64:
            pytest.skip(f"the {name} backend refuses float64 (test_refusals.py, test_triton_refusals.py)")
        return choose(hidden, weight, forced or name)

    monkeypatch.setattr(backends, "choose", choose_this)
    return name


def _poisoned(allocate):
    def allocate_nan(*args, **kwargs):
        out = allocate(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() and not out.is_meta else out

    return allocate_nan


@pytest.fixture(autouse=True)
def poisoned_memory(request, monkeypatch):
    """torch.empty and its relatives return NaN. Not under torch.compile and fake tensors, where nothing may be
    patched."""
    if "unpoisoned" not in request.fixturenames:
        monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
        monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
        monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


@pytest.fixture
def unpoisoned():
    """Asks for plain torch.empty."""
