"""What the Triton backend does, recorded without a GPU: every kernel launch, every library product, every live byte.

The public functions run on fake tensors (shapes and no memory) that say they are on CUDA; the step functions are the
real ones, and Triton's JITFunction.run is replaced by one that writes down what it was given. So a launch here has the
grid, the signature, the divisibility of its arguments, the constants, the warps and the stages of the launch a GPU
would see, and `Launch.compile` compiles exactly that. bench.compile_report compiles them, bench.schedule_costs counts.

TRITON_INTERPRET must not be set in the process: triton reads it when the kernels are defined.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from unlearn.memory import LiveStorages
from unlearn_kernels import backends, checks, deferred, functions, options, triton_backend, triton_tuning

# target: the family of configurations it is served with
FAMILIES = {
    "sm_80": "sm_80",
    "sm_86": "safe",
    "sm_89": "safe",
    "sm_90": "sm_90",
    "sm_100": "sm_100",
    "gfx942": "gfx942",
}
MULTIPROCESSORS = 132
_run_on_device = JITFunction.run


def gpu_target(name: str) -> GPUTarget:
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64)


class NoDevice:
    """A Triton driver whose device number n is the n-th of FAMILIES: nothing can be launched on it."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return list(FAMILIES).index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return gpu_target(self.target)


@dataclass(frozen=True)
class Pointer:
    """Stands for a tensor in a recorded launch, and keeps none alive."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


@dataclass
class Launch:
    kernel: Any
    target: str
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(zip(self.kernel.arg_names, self.args, strict=False)) | self.kwargs

    def key(self) -> str:
        """Equal for launches that run the same binary."""
        with on_target(self.target) as device:
            *_, binder = self.kernel.device_caches[device.get_current_device()]
            _, specialization, given = binder(*self.args, **self.kwargs, debug=False)
        return f"{self.name} {self.target} {specialization} {given}"

    def compile(self) -> Any:
        with on_target(self.target):
            return _run_on_device(self.kernel, *self.args, grid=self.grid, warmup=True, **self.kwargs)

    def ttir(self) -> str:
        """Triton's IR of this launch, functions inlined: a tenth of a compilation's time."""
        self.key()  # the first use on a device sets the kernel's compiler
        with mock.patch.object(self.kernel, "compile", _lower):
            try:
                self.compile()
            except _Lowered as found:
                return str(found)
        raise AssertionError(f"{self.name}: compiled before in this process, so that nothing was lowered")


class _Lowered(Exception):
    """Carries the IR out of triton's run, which would store and load a binary next."""


def _lower(source: Any, target: GPUTarget, options: dict[str, Any]) -> None:
    """triton.compile's first stage."""
    backend, context = make_backend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    parsed = backend.parse_options(dict(options) | source.parse_options())
    codegen = backend.get_codegen_implementation(parsed)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, parsed, source.language)
    module = source.make_ir(target, parsed, codegen, backend.get_module_map(), context)
    raise _Lowered(str(stages["ttir"](module, {})))


@contextlib.contextmanager
def on_target(name: str) -> Iterator[NoDevice]:
    device = NoDevice(name)
    triton.runtime.driver.set_active(device)
    yield device


@dataclass
class Product:
    """A library matrix product: 2MNK FLOP, and which bytes of E it read."""

    flops: int
    e_bytes: int


@dataclass
class Recording:
    launches: list[Launch] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)

    def distinct(self) -> list[Launch]:
        """One launch for each binary."""
        return list({launch.key(): launch for launch in self.launches}.values())


class _Watch(LiveStorages):
    """Library products, and which storages are alive at the moment when they take the most memory."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.exponentials: set[int] = set()
        super().__init__()

    def forget_dead(self) -> None:
        super().forget_dead()
        self.exponentials &= set(self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            x, y = args[:2] if name == "mm" else args[1:3]
            read = [t.numel() * t.itemsize for t in (x, y) if t.untyped_storage()._cdata in self.exponentials]
            self.recording.products.append(Product(2 * x.shape[0] * x.shape[1] * y.shape[1], sum(read)))
        return out


def _stand_in(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Pointer(value.dtype, value.data_ptr())
    if isinstance(value, TensorDescriptor):
        return TensorDescriptor(_stand_in(value.base), value.shape, value.strides, value.block_shape)
    return value


def _plain_steps() -> backends.Backend:
    """The Triton backend with its functions in place of the operators, whose fake implementation does nothing."""

    def without_grad(step: Callable[..., None]) -> Callable[..., None]:
        return torch.no_grad()(step)

    steps = SimpleNamespace(**{name: without_grad(getattr(triton_backend, name)) for name in backends.STEPS})
    return backends.Backend("triton", steps, triton_backend.scratch_elements, triton_backend.kl_scratch_elements)


@contextlib.contextmanager
def recording(target: str, boundaries: list[int] | None = None) -> Iterator[tuple[Recording, _Watch]]:
    """Inside: fake tensors, made by torch.empty, that the Triton backend takes for CUDA ones on target."""
    assert not triton_tuning.interpreted(), "TRITON_INTERPRET is set: there is nothing to compile"
    record = Recording()
    watch = _Watch(record)

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        e = given.get("g_ptr", given.get("e", given.get("e_ptr")))
        if e is not None and given.get("STORE_E", True):
            e = e.base if isinstance(e, TensorDescriptor) else e
            watch.exponentials.add(e.untyped_storage()._cdata)
        args, kwargs = tuple(map(_stand_in, args)), {name: _stand_in(value) for name, value in kwargs.items()}
        record.launches.append(Launch(kernel, target, tuple(grid), args, kwargs))

    if reason := backends.load_triton():
        raise RuntimeError(reason)
    is_amd = gpu_target(target).backend == "hip"
    with contextlib.ExitStack() as stack:
        for patch in (
            mock.patch.object(JITFunction, "run", note),
            mock.patch.object(FakeTensor, "is_cuda", property(lambda self: True), create=True),
            mock.patch.object(FakeTensor, "data_ptr", lambda self: self.storage_offset() * self.itemsize, create=True),
            mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
            mock.patch.object(torch.version, "hip", "7.0" if is_amd else None),
            mock.patch.object(triton_backend, "_device", lambda tensor: contextlib.nullcontext()),
            mock.patch.object(triton_backend, "_programs", lambda device: 2 * MULTIPROCESSORS),
            mock.patch.object(triton_tuning, "family", lambda device: FAMILIES[target]),
            mock.patch.dict(backends.BACKENDS, {"triton": _plain_steps()}),
            mock.patch.dict(options.DEFAULT_WORKSPACE_BYTES, {"cpu": options.DEFAULT_WORKSPACE_BYTES["cuda"]}),
            mock.patch.dict(os.environ, {"UNLEARN_KERNELS_AUTOTUNE": "0"}),
            mock.patch.object(deferred, "check_earlier_targets", lambda targets, vocab: None),
            mock.patch.object(checks, "check_target_values", lambda targets, vocab: None),
            mock.patch.object(functions, "_boundaries", lambda hidden, cu: boundaries or [0, hidden.shape[0]]),
            FakeTensorMode(),
            watch,
        ):
            stack.enter_context(patch)
        yield record, watch
