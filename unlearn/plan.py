"""The memory plan: what a step holds at each of its moments, before it runs, from a model's shape alone.

Pure arithmetic (no torch): bytes of weights, gradients, optimizer states, checkpoints, one layer's working set and the
head, as unlearn.train's loop allocates them, and the measures that make a context fit. Peak memory is affine in the
number of tokens and in the number of layers, so every part is a coefficient; tests/test_plan.py counts the live
storages of real transformers layers on the meta device against them.

Four moments compete for the peak, and which one wins depends on the length:

    head            every layer's checkpoint, the head's workspace and float32 gradient
    top layer       every checkpoint, and the working set of the last layer, recomputed
    bottom layer    all gradients, and the working set of the first layer
    update          all gradients, the optimizer's float32 slices

Letters in formulas: T tokens of the pack, N its answer tokens, H hidden, Q = heads x head size, K = key heads x head
size, I intermediate, V vocabulary, L layers, b bytes of a weight or activation, f = 4 (float32).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

GIB = 1 << 30
FLOAT32 = 4
# of a pack's token: input, position, place in its bucket, answer row and target, int64 each
_IDS_BYTES = 5 * 8
# CUDA's context and libraries, which torch does not count
CONTEXT_BYTES = 1 * GIB
# Whole processes of published long-context runs held 1.1 to 1.35 times what counting tensors gives: fragmentation and
# library workspaces. A quarter more is planned for what is allocated and freed within a step.
ALLOWANCE = 0.25
# weights that unlearn.optim updates at once
_SLICE = 1 << 24


# ---------------------------------------------------------------------------------------------------------------- shape


@dataclass(frozen=True)
class Shape:
    """A dense decoder of Llama's kind: two norms, grouped attention, a gated MLP. source: where this is from."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    head_dim: int
    tied: bool = False  # the head is the embedding
    qkv_bias: bool = False
    qk_norm: bool = False
    source: str = ""

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of a layer's seven matrices: q, k, v, o, gate, up, down."""
        h, q, kv, i = self.hidden, self.q_width, self.kv_width, self.intermediate
        return (h, q), (h, kv), (h, kv), (q, h), (h, i), (h, i), (i, h)

    @property
    def layer_matmul_params(self) -> int:
        return sum(x * y for x, y in self.linears)

    @property
    def layer_params(self) -> int:
        biases = self.q_width + 2 * self.kv_width if self.qkv_bias else 0
        return self.layer_matmul_params + 2 * self.hidden + biases + (2 * self.head_dim if self.qk_norm else 0)

    @property
    def head_params(self) -> int:
        return self.vocab * self.hidden

    @property
    def params(self) -> int:
        tables = 1 if self.tied else 2
        return self.layers * self.layer_params + tables * self.head_params + self.hidden


def _known(
    name: str, repository: str, sizes: tuple[int, ...], *, head_dim: int | None = None, tied: bool = False,
    qkv_bias: bool = False, qk_norm: bool = False,
) -> Shape:  # fmt: skip
    """sizes: hidden, intermediate, layers, heads, key heads, vocabulary."""
    hidden, intermediate, layers, heads, kv_heads, vocab = sizes
    width, source = head_dim or hidden // heads, f"config.json of {repository}"
    return Shape(
        name, hidden, intermediate, layers, heads, kv_heads, vocab, width, tied, qkv_bias, qk_norm, source
    )  # fmt: skip


SHAPES = {
    shape.name: shape
    for shape in (
        _known("llama-2-7b", "meta-llama/Llama-2-7b-hf", (4096, 11008, 32, 32, 32, 32000)),
        _known("llama-2-13b", "meta-llama/Llama-2-13b-hf", (5120, 13824, 40, 40, 40, 32000)),
        _known("llama-3.1-8b", "meta-llama/Llama-3.1-8B", (4096, 14336, 32, 32, 8, 128256)),
        _known("llama-3.2-1b", "meta-llama/Llama-3.2-1B", (2048, 8192, 16, 32, 8, 128256), tied=True),
        _known("llama-3.2-3b", "meta-llama/Llama-3.2-3B", (3072, 8192, 28, 24, 8, 128256), tied=True),
        _known("mistral-7b", "mistralai/Mistral-7B-v0.1", (4096, 14336, 32, 32, 8, 32000)),
        _known("zephyr-7b", "HuggingFaceH4/zephyr-7b-beta", (4096, 14336, 32, 32, 8, 32000)),
        _known("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B", (1536, 8960, 28, 12, 2, 151936), tied=True, qkv_bias=True),
        _known("qwen2.5-7b", "Qwen/Qwen2.5-7B", (3584, 18944, 28, 28, 4, 152064), qkv_bias=True),
        _known("qwen3-8b", "Qwen/Qwen3-8B", (4096, 12288, 36, 32, 8, 151936), qk_norm=True, head_dim=128),
    )
}
# What transformers calls the layers that the formulas below count.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def shape_of_config(config: Any, name: str) -> Shape:
    """The shape in a transformers configuration. Raises ValueError for a model whose layers are of another kind."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    kind = getattr(config, "model_type", None)
    if kind not in MODEL_TYPES:
        raise ValueError(f"model: {name} is of type {kind!r}; plans exist for {', '.join(MODEL_TYPES)}")
    heads = config.num_attention_heads
    return Shape(
        name=name,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        vocab=config.vocab_size,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        tied=bool(config.tie_word_embeddings),
        qkv_bias=kind == "qwen2" or bool(getattr(config, "attention_bias", False)),
        qk_norm=kind == "qwen3",
        source="its configuration",
    )


# ------------------------------------------------------------------------------------------------------------- measures


@dataclass(frozen=True)
class Measure:
    """available: `unlearn train` can do it. What it cannot is planned only where the reader is told so."""

    summary: str
    available: bool


MEASURES = {
    "checkpointing": Measure("each layer recomputed in the backward (--gradient-checkpointing)", True),
    "tiled layers": Measure("everything but the attention in tiles of tokens (--tile-tokens)", True),
    "checkpoints on host": Measure("layers' inputs wait in pinned host memory (--offload-checkpoints)", True),
    "adamw": Measure("AdamW, float32 states, bf16 weights rounded stochastically", True),
    "adamw-bf16": Measure("the same with bf16 states (unlearn.optim has them, no option yet)", False),
    "adamw8bit": Measure("8-bit states in blocks of 256 (--optimizer adamw8bit)", True),
    "adafactor": Measure("row and column sums for states (--optimizer adafactor); planned only where asked for", True),
    "step in backward": Measure("a weight is stepped once its gradient is there (--optimizer-in-backward)", True),
    "lora": Measure("float32 adapters of rank R on every linear layer; the model frozen (--lora R)", True),
    "qlora": Measure("the same; the layers' matrices in 4 bits (--lora R --lora-4bit)", True),
}
# Bytes of optimizer states per trained weight; 8 bits: two states of one byte and a float32 scale for each 256.
STATE_BYTES = {"adamw": 2 * FLOAT32, "adamw-bf16": 2 * 2, "adamw8bit": 2 * (1 + FLOAT32 / 256), "adafactor": 0}
IN_BACKWARD = "-in-backward"
# nf4: half a byte, and one scale for 64 weights, itself quantized to 8 bits in blocks of 256 (arXiv:2305.14314)
NF4_BYTES = 0.5 + (1 + FLOAT32 / 256) / 64


@dataclass(frozen=True)
class Measures:
    """What is switched on. host_layers: how many layers' checkpoints wait on the host; adapter: None, lora or qlora of
    rank `rank`; itemsize: bytes of a weight and an activation."""

    checkpointing: bool = False
    tiled: bool = False
    host_layers: int = 0
    optimizer: str = "adamw"
    in_backward: bool = False
    adapter: str | None = None
    rank: int = 0
    itemsize: int = 2
    tile_tokens: int = 4096

    def names(self) -> tuple[str, ...]:
        """The keys of MEASURES that are on."""
        on = {"checkpointing": self.checkpointing, "tiled layers": self.tiled, "checkpoints on host": self.host_layers}
        return (
            *(name for name, switched in on.items() if switched),
            self.optimizer,
            *(["step in backward"] if self.in_backward else []),
            *([self.adapter] if self.adapter else []),
        )

    def not_built(self) -> tuple[str, ...]:
        return tuple(name for name in self.names() if not MEASURES[name].available)


@dataclass(frozen=True)
class Load:
    """What one optimizer step feeds: the fed tokens of each sequence of its largest pack, how many packs (micro-batches
    whose gradients add up), the pack's answer tokens (None: every token), and whether KL keeps a reference head."""

    lengths: tuple[int, ...]
    packs: int = 1
    answers: int | None = None
    reference_head: bool = False

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def mixed(self) -> bool:
        """Sequences of several lengths, which packed attention gathers by length and pads."""
        return len(set(self.lengths)) > 1

    @property
    def rows(self) -> int:
        return self.tokens if self.answers is None else self.answers

    def in_one_pack(self) -> Load:
        """An optimizer that steps in the backward has to see the whole step in one."""
        answers = None if self.answers is None else self.answers * self.packs
        return replace(self, lengths=self.lengths * self.packs, packs=1, answers=answers)


# -------------------------------------------------------------------------------------------------- the parts, in bytes


def adapter_params(shape: Shape, rank: int) -> int:
    """LoRA on each of a layer's linears (arXiv:2106.09685): rank (in + out)."""
    return shape.layers * sum(rank * (x + y) for x, y in shape.linears)


def trained_params(shape: Shape, on: Measures) -> int:
    return adapter_params(shape, on.rank) if on.adapter else shape.params


def weight_bytes(shape: Shape, on: Measures) -> float:
    """b per weight; under qlora the layers' matrices in 4 bits. Adapters are float32."""
    total = float(on.itemsize * shape.params)
    if on.adapter == "qlora":
        total -= (on.itemsize - NF4_BYTES) * shape.layers * shape.layer_matmul_params
    return total + (FLOAT32 * adapter_params(shape, on.rank) if on.adapter else 0)


def gradient_bytes(shape: Shape, on: Measures) -> float:
    """b per trained weight; stepped in the backward, those of the largest single piece: the head, or a tiled layer,
    whose gradients come together."""
    if on.adapter:
        return float(FLOAT32 * trained_params(shape, on))
    if not on.in_backward:
        return float(on.itemsize * trained_params(shape, on))
    return float(on.itemsize * max(shape.head_params, shape.layer_params if on.tiled else _largest_matrix(shape)))


def state_bytes(shape: Shape, on: Measures) -> float:
    """float32 weights keep float32 states."""
    per_weight = 2 * FLOAT32 if on.itemsize == FLOAT32 else STATE_BYTES[on.optimizer]
    return per_weight * trained_params(shape, on)


def update_bytes(on: Measures, largest: int) -> float:
    """What an update holds beside its states. Adafactor takes its largest weight whole, in four float32 copies; the
    others a slice's float32 copies of weight and gradient, denominator, random bits, rounded weight and finite mask."""
    return float(4 * FLOAT32 * largest if on.optimizer == "adafactor" else (5 * FLOAT32 + 1) * min(_SLICE, largest))


def head_gradient_bytes(shape: Shape, on: Measures) -> float:
    return 0.0 if on.adapter else float(on.itemsize * shape.head_params)


def _largest_matrix(shape: Shape) -> int:
    return max(x * y for x, y in shape.linears)


def saved_bytes_per_token(shape: Shape, on: Measures, *, mixed: bool = False) -> float:
    """What one layer of transformers' Llama keeps for its backward, under unlearn.attention.

    Each norm its input in float32, the normalised rows and its output, 2 (f + 2b) H; attention q, k and v at all heads
    (packed attention repeats the key heads), its output and logsumexp, 4bQ + f heads; the MLP gate, silu(gate), up and
    their product, 4bI. Norms of q and k their input in float32 and the normalised rows. Sequences of several lengths:
    q, k, v and output up to a quarter longer, and the output once more, in the pack's order. Adapters each keep their
    input in float32, f(5H + Q + I), and their inner rows, 7f rank; frozen matrices and norms keep neither the norms'
    rows and outputs nor the product of the MLP, 4bH + bI.
    """
    b, h, q, i = on.itemsize, shape.hidden, shape.q_width, shape.intermediate
    norms = 2 * (FLOAT32 + 2 * b) * h
    attention = (6 if mixed else 4) * b * q + FLOAT32 * shape.heads
    extra = (FLOAT32 + b) * (q + shape.kv_width) if shape.qk_norm else 0
    saved = norms + attention + extra + 4 * b * i
    if _widens_inputs(on):
        saved += FLOAT32 * (5 * h + q + i + 7 * on.rank) - 4 * b * h - b * i
    return saved


def _widens_inputs(on: Measures) -> bool:
    """Adapters are float32 and compute in it."""
    return on.adapter is not None and on.itemsize < FLOAT32


def layer_bytes(shape: Shape, load: Load, on: Measures) -> float:
    """The working set of one layer's backward, beside its checkpoint.

    Whole layer: what it saved, at the product of silu(gate) and up, whose gradient is the widest: the product is gone
    (-bI); its gradient and both factors' are there (3bI), the residual's (bH) and one matrix's gradient. With adapters
    pass bI + 2bH, and under qlora a widened matrix; recomputed, more is there in that second forward, at the
    up-projection: no product in float32 yet (-fI), what its adapter adds, before and after its scale (2fI), rows of
    the residual and the norm (fH + 4bH; a bH less under qlora, whose layers of peft copy otherwise).
    Tiled: see _tiled_layer_bytes; sequences of several lengths add gathered copies and their gradients, 6bQ.
    """
    if on.tiled:
        return _tiled_layer_bytes(shape, load.tokens, on) + (6 * on.itemsize * shape.q_width * load.tokens) * load.mixed
    b = on.itemsize
    h, i = shape.hidden, shape.intermediate
    matrix = b * _largest_matrix(shape) if on.adapter != "lora" else 0
    passing = 2 * b * i + b * h
    if _widens_inputs(on):
        rerun = FLOAT32 * (i + h) + (4 if on.adapter == "lora" else 3) * b * h
        passing = rerun if on.checkpointing else b * i + 2 * b * h
    return load.tokens * (saved_bytes_per_token(shape, on, mixed=load.mixed) + passing) + matrix


def _tiled_layer_bytes(shape: Shape, tokens: int, on: Measures) -> float:
    """Whichever is more. In the attention kernel's backward: the gradient on its way (bH), query, output and their
    gradients (4bQ), key, value and theirs (4bK; with fewer key heads 2bK and, repeated for the core, 4bQ), the kernel's
    float32 sum of dq and its row sums (fQ + 2f heads); the later weights' gradients in b. In the tiles behind the core:
    half of that and no kernel, a tile, and those gradients in float32. (unlearn.tiled)"""
    b, h, q, kv = on.itemsize, shape.hidden, shape.q_width, shape.kv_width
    weights = 0 if on.adapter else shape.layer_matmul_params - sum(x * y for x, y in shape.linears[:3])
    fewer = shape.kv_heads < shape.heads
    statistics = FLOAT32 * shape.heads
    core = b * h + 4 * b * q + (2 * b * kv + 4 * b * q if fewer else 4 * b * kv) + FLOAT32 * q + 2 * statistics
    behind = b * h + 3 * b * q + 2 * b * kv + (2 * b * q if fewer else 0) + statistics
    tile = min(tokens, on.tile_tokens) * (10 * b * h + 8 * b * shape.intermediate)
    return max(tokens * core + b * weights, tokens * behind + tile + FLOAT32 * weights)


def checkpoint_bytes(shape: Shape, tokens: int, on: Measures) -> float:
    """bTH for each layer's input, wherever it waits."""
    return float(on.itemsize * tokens * shape.hidden)


def resident_checkpoints(shape: Shape, on: Measures) -> dict[str, int]:
    """How many layers' inputs are on the GPU at each moment. The first layers' are on the host; in the backward one is
    on its way back while another is at work."""
    kept = shape.layers - on.host_layers
    top = max(kept, min(2, shape.layers)) if on.host_layers else kept
    return {"head": kept, "top layer": top, "bottom layer": 1}


def head_bytes(shape: Shape, load: Load, on: Measures, workspace: int) -> float:
    """The last norm and the head, the largest of three instants (kernels/README.md, `sequence_loss` beyond the
    workspace).

    In its forward: the norm's saved (f + b)TH, the answer rows and their gradient 2bNH, the head's gradient in float32
    fVH, and the workspace. In its backward: the rows' scaled gradient and the head's in b instead of the workspace. In
    the norm's backward: six float32 rows, 6fTH, and the head's gradient. Tiled, the norm saves its input and makes its
    rows anew: bTH in place of (f + b)TH, 3bTH in place of 6fTH.
    """
    b, h, tokens, rows = on.itemsize, shape.hidden, load.tokens, load.rows
    logits = rows * shape.vocab * b
    trained = 0 if on.adapter else shape.head_params
    kept = logits * 4 / 3 <= workspace  # a quarter of the workspace is scratch
    float32_gradient = 0 if kept else FLOAT32 * trained
    work = min(workspace, logits * 4 / 3)
    saved = (b if on.tiled else FLOAT32 + b) * tokens * h + 2 * b * rows * h
    forward = saved + float32_gradient + work
    backward = saved + b * rows * h + float32_gradient + b * trained + (work if kept else 0)
    norm = (3 * b if on.tiled else 6 * FLOAT32) * tokens * h + b * trained
    return max(forward, backward, norm)


def batch_bytes(shape: Shape, tokens: int, on: Measures) -> float:
    """Ids, and the rotary cosines and sines, one pair for all layers: T (40 + 2b head size)."""
    return float(tokens * (_IDS_BYTES + 2 * on.itemsize * shape.head_dim))


# --------------------------------------------------------------------------------------------------------------- budget


@dataclass(frozen=True)
class Rates:
    """What a GPU is taken to sustain: TFLOP/s of linear layers and of attention, forward and backward; TB/s of its
    memory and GB/s to the host."""

    name: str
    linear: float
    attention_forward: float
    attention_backward: float
    memory: float
    host: float
    source: str


_SHARE = "0.55 of the data sheet's dense bf16 rate"
RATES = {
    rates.name: rates
    for rates in (
        Rates("rtx4090", 91, 91, 91, 1.0, 25, f"{_SHARE}, 165 TFLOP/s"),
        Rates("l40s", 199, 199, 199, 0.86, 25, f"{_SHARE}, 362 TFLOP/s"),
        Rates("h100", 600, 360, 310, 3.35, 50, "published bf16 training runs and FlashAttention-2 charts, SXM"),
        Rates("h200", 600, 360, 310, 4.8, 50, "as h100, with the H200's memory"),
    )
}


def rates_for(gpu_bytes: float) -> Rates:
    """The usual card of that size."""
    for largest, name in ((30, "rtx4090"), (60, "l40s"), (100, "h100")):
        if gpu_bytes < largest * GIB:
            return RATES[name]
    return RATES["h200"]


@dataclass(frozen=True)
class Budget:
    """gpu, host: bytes (None: not limited); workspace: of the head, unlearn_kernels' default."""

    gpu: float | None
    host: float | None = None
    workspace: int = 1 * GIB
    rates: Rates = RATES["h200"]


def step_seconds(shape: Shape, load: Load, on: Measures, rates: Rates) -> float:
    """Predicted seconds of an optimizer step: FLOP over rates, nothing overlapped, attention with its causal half.

    A token through P weights costs 2P; gradients 4P more (2P where weights are frozen), recomputing 2P, tiles 2P of
    q, k, v again. Attention costs 2 T^2 Q forward, 2.5 times that backward. The head takes 4 of 2NHV, 3 frozen: a
    document longer than the workspace computes E twice. AdamW's unfused passes move 150 bytes a weight.
    """
    frozen = on.adapter is not None
    weights = shape.layer_matmul_params * shape.layers
    units = (2 if frozen else 3) + on.checkpointing
    linear = 2.0 * units * weights * load.tokens
    if on.tiled:
        linear += 2.0 * shape.layers * sum(x * y for x, y in shape.linears[:3]) * load.tokens
    linear += (3 if frozen else 4) * 2.0 * load.rows * shape.head_params
    scores = sum(2.0 * length**2 * shape.q_width * shape.layers for length in load.lengths)
    attention = scores * ((1 + on.checkpointing) / rates.attention_forward + 2.5 / rates.attention_backward)
    moved = 2 * on.host_layers * checkpoint_bytes(shape, load.tokens, on) / (rates.host * 1e9)
    pack = (linear / rates.linear + attention) / 1e12 + moved
    return load.packs * pack + 150 * trained_params(shape, on) / (rates.memory * 1e12)


# ----------------------------------------------------------------------------------------------------------------- plan

PARTS = ("weights", "optimizer", "gradients", "checkpoints", "layer", "head", "update", "batch")
MOMENTS = ("head", "top layer", "bottom layer", "update")


@dataclass(frozen=True)
class Plan:
    """moments: name -> part -> bytes on the GPU. Bytes everywhere; seconds per optimizer step."""

    shape: Shape
    load: Load
    on: Measures
    budget: Budget
    moments: dict[str, dict[str, float]]
    host: float
    seconds: float

    def moment_total(self, moment: str) -> float:
        return sum(self.moments[moment].values())

    @property
    def peak_moment(self) -> str:
        return max(MOMENTS, key=self.moment_total)

    @property
    def total(self) -> float:
        """What torch.cuda.max_memory_allocated should read."""
        return self.moment_total(self.peak_moment)

    @property
    def reserve(self) -> float:
        """On top, so that it runs: CUDA's context, and an allowance on what comes and goes within a step."""
        passing = max(sum(parts.get(name, 0.0) for name in ("layer", "head")) for parts in self.moments.values())
        return CONTEXT_BYTES + ALLOWANCE * passing

    @property
    def headroom(self) -> float:
        """Negative where it does not fit."""
        return math.inf if self.budget.gpu is None else self.budget.gpu - self.total - self.reserve

    @property
    def fits(self) -> bool:
        return self.headroom >= 0 and (self.budget.host is None or self.host <= self.budget.host)

    def part(self, name: str) -> float:
        """The most that a part takes at any moment."""
        return max(parts.get(name, 0.0) for parts in self.moments.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, sizes in bytes."""
        return {
            "model": asdict(self.shape) | {"params": self.shape.params},
            "tokens": self.load.tokens,
            "lengths": list(self.load.lengths),
            "packs": self.load.packs,
            "measures": asdict(self.on) | {"names": self.on.names(), "not_built": self.on.not_built()},
            "moments": self.moments,
            "peak_moment": self.peak_moment,
            "parts": {name: self.part(name) for name in PARTS} | {"checkpoints_host": self.host},
            "total": self.total,
            "reserve": self.reserve,
            "gpu": self.budget.gpu,
            "host_limit": self.budget.host,
            "headroom": None if self.budget.gpu is None else self.headroom,
            "fits": self.fits,
            "seconds_per_step": self.seconds,
            "rates": asdict(self.budget.rates),
        }


def make(shape: Shape, load: Load, on: Measures, budget: Budget) -> Plan:
    """The plan with exactly these measures, whether it fits or not."""
    if on.in_backward:
        load = load.in_one_pack()
    tokens = load.tokens
    all_gradients, head_gradient = gradient_bytes(shape, on), head_gradient_bytes(shape, on)
    added_up = load.packs > 1 or on.in_backward  # gradients wait for the packs to come, or never do
    one, layer = checkpoint_bytes(shape, tokens, on), layer_bytes(shape, load, on)
    waiting = {moment: count * one for moment, count in resident_checkpoints(shape, on).items()}
    if not on.checkpointing:  # what every layer saved, but the one at work
        saved = tokens * saved_bytes_per_token(shape, on, mixed=load.mixed)
        waiting = {"head": shape.layers * saved, "top layer": (shape.layers - 1) * saved, "bottom layer": 0.0}
    table = 0.0 if shape.tied or on.adapter else float(on.itemsize * shape.head_params)
    reference = on.itemsize * shape.head_params if load.reference_head else 0
    always = {
        "weights": weight_bytes(shape, on) + reference,
        "optimizer": state_bytes(shape, on),
        "batch": batch_bytes(shape, tokens, on),
    }
    moments = {
        "head": {
            "gradients": all_gradients if added_up else 0.0,
            "checkpoints": waiting["head"],
            "head": head_bytes(shape, load, on, budget.workspace),
        },
        "top layer": {
            "gradients": all_gradients if added_up else head_gradient,
            "checkpoints": waiting["top layer"],
            "layer": layer,
        },
        # the embedding's gradient is the last to come
        "bottom layer": {
            "gradients": all_gradients if added_up else all_gradients - table,
            "checkpoints": waiting["bottom layer"],
            "layer": layer,
        },
        "update": {"gradients": all_gradients, "update": update_bytes(on, shape.head_params)},
    }
    if on.in_backward:
        moments["head"]["update"] = moments["update"]["update"]
        for moment in ("top layer", "bottom layer"):
            moments[moment]["update"] = update_bytes(on, _largest_matrix(shape))
    moments = {name: always | parts for name, parts in moments.items()}
    return Plan(shape, load, on, budget, moments, on.host_layers * one, step_seconds(shape, load, on, budget.rates))


def ladder(shape: Shape, load: Load, on: Measures, budget: Budget, *, optimizers: tuple[str, ...]) -> Iterator[Plan]:
    """Plans in the order in which measures are engaged: recompute, tile, send checkpoints to the host (as few layers as
    will do), then the next optimizer."""
    for optimizer in optimizers:
        name = optimizer.removesuffix(IN_BACKWARD)
        start = replace(on, optimizer=name, in_backward=name != optimizer)
        if not start.checkpointing:
            yield make(shape, load, start, budget)
        yield make(shape, load, replace(start, checkpointing=True), budget)
        tiled = replace(start, checkpointing=True, tiled=True)
        yield make(shape, load, tiled, budget)
        yield _fewest_on_host(shape, load, tiled, budget)


def _fewest_on_host(shape: Shape, load: Load, on: Measures, budget: Budget) -> Plan:
    """Bisection: the GPU's part falls with every layer sent away."""
    low, high = 1, shape.layers
    while low < high:
        middle = (low + high) // 2
        enough = make(shape, load, replace(on, host_layers=middle), budget).headroom >= 0
        low, high = (low, middle) if enough else (middle + 1, high)
    return make(shape, load, replace(on, host_layers=low), budget)


@dataclass(frozen=True)
class Wanted:
    """optimizer: one of STATE_BYTES, with IN_BACKWARD behind it or not; None to go through OPTIMIZERS by need.
    adapter: None, lora or qlora, only where asked for; built_only: leave out what `unlearn train` cannot do."""

    optimizer: str | None = None
    adapter: str | None = None
    rank: int = 16
    itemsize: int = 2
    built_only: bool = False


OPTIMIZERS = ("adamw", "adamw8bit", "adamw8bit" + IN_BACKWARD)


def choose(shape: Shape, load: Load, budget: Budget, wanted: Wanted) -> Plan:
    """The first plan of the ladder that fits; where none does, the one that lacks least."""
    on = Measures(adapter=wanted.adapter, rank=wanted.rank if wanted.adapter else 0, itemsize=wanted.itemsize)
    optimizers = (wanted.optimizer,) if wanted.optimizer else OPTIMIZERS[:1] if wanted.adapter else OPTIMIZERS
    plans = []
    for plan in ladder(shape, load, on, budget, optimizers=optimizers):
        if wanted.built_only and plan.on.not_built():
            continue
        if plan.fits:
            return plan
        plans.append(plan)
    if not plans:  # what was asked for is itself not built
        return choose(shape, load, budget, replace(wanted, built_only=False))
    # a plan that only the host's memory stops is nearer than one that the GPU's does
    return max(plans, key=lambda plan: min(plan.headroom, (budget.host or math.inf) - plan.host))


STEP, MOST = 1024, 1 << 24


def longest_context(shape: Shape, load: Callable[[int], Load], budget: Budget, wanted: Wanted) -> int:
    """The longest context, in whole thousands (1024), that fits; 0 where none does. load(context) is its step."""
    if budget.gpu is None:
        raise ValueError("gpu-memory: missing, and the longest context depends on it")

    def fits(context: int) -> bool:
        plan = choose(shape, load(context), budget, wanted)
        return plan.fits and not (wanted.built_only and plan.on.not_built())

    low, high = 0, MOST // STEP
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * STEP) else (low, middle - 1)
    return low * STEP


def remedies(plan: Plan, load: Callable[[int], Load], wanted: Wanted) -> list[str]:
    """What would make a plan fit that does not, one sentence each."""
    shape, budget, context = plan.shape, plan.budget, plan.load.lengths[0]
    found = []
    if wanted.built_only:
        full = replace(wanted, built_only=False)
        other = choose(shape, load(context), budget, full)
        if other.fits:
            found.append(f"{', '.join(other.on.not_built())} (not built yet)")
    for adapter in ("lora", "qlora"):
        if wanted.adapter not in (adapter, "qlora"):
            other = choose(shape, load(context), budget, replace(wanted, adapter=adapter, optimizer=None))
            if other.fits:
                built = "" if not other.on.not_built() else f" ({', '.join(other.on.not_built())}: not built yet)"
                found.append(f"{adapter} of rank {wanted.rank}{built}")
                break
    if wanted.optimizer is None and wanted.adapter is None:
        other = choose(shape, load(context), budget, replace(wanted, optimizer="adafactor" + IN_BACKWARD))
        if other.fits:
            found.append(f"--optimizer adafactor{IN_BACKWARD} ({', '.join(other.on.not_built())}: not built yet)")
    longest = longest_context(shape, load, budget, wanted)
    if longest:
        found.append(f"a context of at most {longest} tokens")
    if budget.host is not None and plan.host > budget.host:
        found.append(f"{plan.host / GIB:.0f} GiB of host memory")
    unlimited = choose(shape, load(context), replace(budget, gpu=0.0), wanted)
    found.append(f"a GPU of {math.ceil((unlimited.total + unlimited.reserve) / GIB)} GiB")
    return found


# ----------------------------------------------------------------------------------------------------------- saturation


def npo_weight(*, beta: float, tokens: int, drift: float) -> float:
    """NPO's gradient weight 2 sigmoid(-beta |delta|), delta = tokens x drift per token in nats (arXiv:2404.05868)."""
    return 2 / (1 + math.exp(min(700.0, beta * tokens * drift)))


def saturation(*, beta: float, tokens: int, drift: float) -> str | None:
    """A warning where NPO's weight is nearly gone after two steps that each move a token's log-probability by `drift`
    nats; None below that."""
    first, second = (npo_weight(beta=beta, tokens=tokens, drift=steps * drift) for steps in (1, 2))
    if second > 0.1:
        return None
    return (
        f"NPO's weight saturates: {tokens} tokens that drift by {drift:g} nats each are {tokens * drift:.0f} nats, and "
        f"at beta {beta:g} the gradient's weight 2 sigmoid(-beta |delta|) falls from 1 to {first:.2g} after one step "
        f"and {second:.2g} after two; SimNPO, or a mean over tokens in place of the sum, does not depend on the length"
    )
