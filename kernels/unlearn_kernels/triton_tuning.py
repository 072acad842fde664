"""Which tile sizes, or which of the two ways to form logits, serve a head on a device; measured once, kept on disk.

A plan is either a Config of the fused kernel or LIBRARY: logits of a tile by the library's matrix product into scratch,
then one pass over them. Which is faster depends on the device, H, V and the dtypes, not on N: plans are chosen without
N, so that a row's log-probability has the same bits in a batch of any size.

The first call on a head with enough rows to time (MIN_ROWS) measures the shipped candidates of its device and stores
the fastest under the cache folder ($UNLEARN_KERNELS_CACHE, else $XDG_CACHE_HOME or ~/.cache, /unlearn_kernels). Calls
before that, under CUDA graph capture and with UNLEARN_KERNELS_AUTOTUNE=0 take the first candidate.

Calls that write E (gradients) and calls that do not are measured apart, each at its first: E's stores cost some plans
more than others. So the log-probabilities of the two may differ in their last bits. A plan is measured again when the
kernels' source changes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
import triton
from torch import Tensor

MIN_ROWS = 1024
TIMED_RUNS = 5


@dataclass(frozen=True)
class Config:
    """Of exp_sums_kernel. tiles: vocabulary tiles per program. group_t: row blocks that share the weight's stream.

    tma: operands and E through tensor descriptors; halves, flatten: see the kernel.
    """

    block_t: int
    block_v: int
    block_k: int
    num_warps: int
    num_stages: int
    tiles: int = 2
    group_t: int = 16
    tma: bool = False
    halves: bool = False
    flatten: bool = False

    @property
    def name(self) -> str:
        flags = "".join(letter for letter, on in (("t", self.tma), ("h", self.halves), ("f", self.flatten)) if on)
        sizes = f"{self.block_t}x{self.block_v}x{self.block_k}"
        rest = f"w{self.num_warps}-s{self.num_stages}-v{self.tiles}-g{self.group_t}"
        return "-".join(part for part in (sizes, rest, flags) if part)


LIBRARY = "library"
Plan = Config | str  # str: LIBRARY

# The first of each list is what runs before anything was measured.
_16_BIT: dict[str, tuple[Plan, ...]] = {
    "sm_90": (
        Config(128, 256, 64, 8, 3, tma=True, halves=True),
        Config(128, 256, 64, 8, 4, tma=True, halves=True),
        Config(128, 256, 64, 8, 3, tma=True, halves=True, flatten=True),
        Config(256, 128, 64, 8, 4, tma=True, halves=True),
        # two programs per multiprocessor, one multiplying while the other takes exponentials: at most 113 KiB each
        Config(128, 128, 64, 8, 3, tiles=4, tma=True, halves=True),
        Config(64, 256, 64, 4, 2, tma=True, halves=True),
        LIBRARY,
    ),
    "sm_100": (
        Config(128, 128, 64, 4, 3, tiles=4, tma=True, halves=True),
        Config(256, 128, 64, 8, 3, tiles=4, tma=True, halves=True),  # 128 x 256 spills when it writes E
        Config(128, 128, 64, 4, 4, tiles=4, tma=True, halves=True),
        LIBRARY,
    ),
    "sm_80": (
        Config(128, 128, 32, 8, 4, tiles=4),
        Config(128, 128, 64, 8, 3, tiles=4),
        Config(64, 256, 32, 8, 3, tiles=2),
        Config(64, 128, 64, 4, 3, tiles=4),
        LIBRARY,
    ),
    "gfx942": (Config(128, 128, 64, 8, 2, tiles=4), Config(256, 128, 32, 8, 2, tiles=4), LIBRARY),
    # 99 KiB of shared memory and 64 Ki registers are everywhere else too
    "safe": (Config(128, 128, 32, 8, 3, tiles=4), Config(64, 128, 32, 4, 3, tiles=4), LIBRARY),
    # the interpreter: small tiles, so that small tests cross their edges
    "interpret": (Config(16, 128, 16, 1, 1, group_t=2, tma=True, halves=True),),
}
# float32 operands are multiplied on the ordinary cores, exactly; the library's product is hard to beat there
_32_BIT: dict[str, tuple[Plan, ...]] = {
    "safe": (LIBRARY, Config(64, 64, 16, 8, 2, tiles=8), Config(128, 64, 16, 8, 2, tiles=8)),
    "interpret": (Config(16, 128, 16, 1, 1, group_t=2),),
}
# a softcap's slope needs the logits beside the exponentials
_CAPPED: dict[str, tuple[Plan, ...]] = {
    "sm_90": (
        Config(128, 128, 64, 8, 3, tiles=4, tma=True, halves=True),
        Config(128, 128, 64, 8, 4, tiles=4, tma=True, halves=True),
        LIBRARY,
    ),
    "sm_100": (
        Config(128, 64, 64, 4, 4, tiles=8, tma=True, halves=True),
        Config(128, 64, 64, 4, 3, tiles=8, tma=True, halves=True),
        LIBRARY,
    ),
    "sm_80": (Config(64, 256, 32, 8, 3, tiles=2), Config(64, 128, 64, 8, 3, tiles=4), LIBRARY),
    "gfx942": (Config(128, 128, 64, 8, 2, tiles=4), LIBRARY),
    "safe": (Config(64, 128, 32, 8, 3, tiles=4), LIBRARY),
}
# LoRA's part has an accumulator of its own, and a tile half the size leaves it room
LORA_CONFIGS: dict[str, Config] = {
    "sm_90": Config(128, 64, 64, 8, 3, tiles=8, tma=True, halves=True),
    "sm_100": Config(128, 64, 64, 8, 3, tiles=8, tma=True, halves=True),
    "sm_80": Config(64, 128, 32, 8, 3, tiles=4),
    "gfx942": Config(64, 128, 32, 8, 2, tiles=4),
    "safe": Config(64, 64, 32, 8, 2, tiles=8),
    "interpret": Config(16, 128, 16, 1, 1, group_t=2),
}
# Rare rows, statistics and KL: pointers and one accumulator (two for KL) beside more epilogue
PLAIN_CONFIGS: dict[str, Config] = {
    "sm_90": Config(128, 64, 64, 8, 3, tiles=8),
    "sm_100": Config(128, 64, 64, 8, 3, tiles=8),
    "sm_80": Config(64, 128, 32, 8, 3, tiles=4),
    "gfx942": Config(128, 128, 32, 8, 2, tiles=4),
    "safe": Config(64, 128, 32, 8, 2, tiles=4),
    "interpret": Config(16, 128, 16, 1, 1),
}
KL_CONFIGS: dict[str, Config] = {
    "sm_90": Config(128, 64, 64, 8, 3, tiles=8),
    "sm_100": Config(128, 64, 64, 8, 3, tiles=8),
    "sm_80": Config(64, 128, 32, 8, 3, tiles=4),
    "gfx942": Config(64, 128, 32, 8, 2, tiles=4),
    "safe": Config(64, 128, 32, 8, 2, tiles=4),
    "interpret": Config(16, 128, 16, 1, 1),
}
FLOAT32_CONFIG = Config(64, 64, 16, 4, 2, tiles=8)
# Rows that do not come in 16-byte loads
UNALIGNED_CONFIG = Config(64, 64, 32, 8, 2, tiles=8)

# What bench/gpu.sh may force, by name; the names of a device's candidates are valid too.
PLANS = ("fused", LIBRARY)
_forced: list[str] = []


def interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def family(device: torch.device) -> str:
    """The key of the tables above for this device."""
    if interpreted() and device.type == "cpu":
        return "interpret"
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return "gfx942" if name in ("gfx942", "gfx950") else "safe"
    major, minor = torch.cuda.get_device_capability(device)
    return {(9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100", (8, 0): "sm_80"}.get((major, minor), "safe")


def candidates(
    device: torch.device,
    hidden: torch.dtype,
    weight: torch.dtype,
    *,
    lora: bool = False,
    capped: bool = False,
    aligned: bool = True,
) -> tuple[Plan, ...]:
    """lora, capped: what the epilogue holds besides a tile of logits, which leaves no registers for the large tiles.
    aligned: whether hidden's and the weight's rows come in 16-byte loads. The candidates do not depend on whether E is
    written; their measurement does."""
    name = family(device)
    if hidden != weight or hidden.itemsize != 2:
        return _32_BIT.get(name, _32_BIT["safe"])
    if name == "interpret" or not (lora or capped or not aligned):
        return _16_BIT[name]
    if not aligned:
        return LIBRARY, UNALIGNED_CONFIG
    return (LORA_CONFIGS[name], LIBRARY) if lora else _CAPPED[name]


@contextlib.contextmanager
def force(name: str) -> Iterator[None]:
    """Every call inside takes this plan: "fused" (the device's first Config), "library", or a candidate's name."""
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def plan_name(plan: Plan) -> str:
    return plan if isinstance(plan, str) else plan.name


def _named(name: str, plans: tuple[Plan, ...]) -> Plan:
    if name == LIBRARY:
        return LIBRARY
    for plan in plans:
        if plan_name(plan) == name or (name == "fused" and isinstance(plan, Config)):
            return plan
    raise ValueError(f"plan is {name!r}; accepted: fused, {', '.join(plan_name(plan) for plan in plans)}")


def choose(
    hidden: Tensor, weight: Tensor, run: Callable[[Plan], None], *, writes_e: bool = False, **traits: bool
) -> Plan:
    """The plan for this head, whose traits are those of `candidates`, with or without E; run(plan) does the work at
    hand and may be called to time it."""
    plans = candidates(hidden.device, hidden.dtype, weight.dtype, **traits)
    if _forced:
        return _named(_forced[-1], plans)
    if len(plans) == 1 or os.environ.get("UNLEARN_KERNELS_AUTOTUNE") == "0":
        return plans[0]
    described = sorted({"e": writes_e, **traits}.items())
    key = " ".join([_key(hidden, weight), *(f"{trait}={value}" for trait, value in described)])
    known = _known()
    if key in known:
        with contextlib.suppress(ValueError):  # a name that a newer version no longer ships
            return _named(known[key], plans)
    if hidden.shape[0] < MIN_ROWS or torch.cuda.is_current_stream_capturing():
        return plans[0]
    best = fastest(plans, lambda plan: time_on_device(lambda: run(plan)))
    _remember(key, plan_name(best))
    return best


def fastest(plans: tuple[Plan, ...], seconds: Callable[[Plan], float]) -> Plan:
    """The plan that takes the least time; one that the device refuses is left out. Raises if all are refused."""
    timed: list[tuple[float, int]] = []
    refusals: list[Exception] = []
    for place, plan in enumerate(plans):
        try:
            timed.append((seconds(plan), place))
        except Exception as error:  # noqa: BLE001  (out of shared memory, a compiler's refusal: many types)
            refusals.append(error)
    if not timed:
        raise RuntimeError(f"no plan of {', '.join(map(plan_name, plans))} runs on this device") from refusals[0]
    return plans[min(timed)[1]]


def time_on_device(run: Callable[[], None]) -> float:
    """Median seconds of one run on the current stream."""
    run()
    times = []
    for _ in range(TIMED_RUNS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def _key(hidden: Tensor, weight: Tensor) -> str:
    vocab, width = weight.shape
    dtypes = "/".join(str(x.dtype).removeprefix("torch.") for x in (hidden, weight))
    name = torch.cuda.get_device_name(hidden.device)
    versions = f"triton {triton.__version__}; torch {torch.__version__}; kernels {_source_digest()}"
    return f"{name}; {versions}; H {width} V {vocab} {dtypes}"


@functools.cache
def _source_digest() -> str:
    """Of what the plans run."""
    source = pathlib.Path(__file__).with_name("triton_kernels.py")
    return hashlib.blake2b(source.read_bytes(), digest_size=6).hexdigest()


def cache_file() -> pathlib.Path:
    folder = os.environ.get("UNLEARN_KERNELS_CACHE")
    if folder is None:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        folder = os.path.join(base, "unlearn_kernels")
    return pathlib.Path(folder).expanduser() / "plans.json"


_memory: dict[str, str] = {}


def _known() -> dict[str, str]:
    if not _memory:
        _memory.update(_stored() or {"": ""})  # read once
    return _memory


def _stored() -> dict[str, str]:
    """What the file holds; nothing where it is missing or broken, and then it is written anew."""
    try:
        stored = json.loads(cache_file().read_text())
        return {key: name for key, name in stored.items() if isinstance(name, str)}
    except (OSError, ValueError, AttributeError):
        return {}


def _remember(key: str, name: str) -> None:
    """Kept in this process, and on disk where the folder can be written, beside what other processes have put there
    since."""
    _known()[key] = name
    path = cache_file()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({**_stored(), key: name}, indent=1))
        os.replace(temporary, path)


def describe(plan: Plan) -> dict[str, object]:
    return {"plan": LIBRARY} if isinstance(plan, str) else {"plan": plan.name, **asdict(plan)}
