"""The parts of a step's memory, in bytes: pure arithmetic (no torch) from a model's shape, its load and its measures.

As unlearn.train's loop allocates them. Peak memory is affine in the number of tokens and in the number of layers, so
every part is a coefficient; tests/test_plan.py counts the live storages of real transformers layers on the meta device
against them. What liger-kernel's layers save (--liger-kernels) is not counted.

Letters in formulas: T tokens of the pack, N its answer tokens, H hidden, Q = heads x head size, K = key heads x head
size, I intermediate, V vocabulary, L layers, b bytes of a weight or activation, f = 4 (float32).
"""

from __future__ import annotations

from unlearn.measures import FLOAT32, HOST_STATE_BYTES, STATE_BYTES, Load, Measures
from unlearn.shapes import Shape

# of a pack's token: input, position, place in its bucket, answer row and target, int64 each
_IDS_BYTES = 5 * 8
# Sequences share an attention call while padding adds at most a quarter (unlearn.attention.MAX_PADDING).
PADDED = 1.25
# weights that unlearn.optim updates at once
_SLICE = 1 << 24
# nf4: half a byte, and one scale for 64 weights, itself quantized to 8 bits in blocks of 256 (arXiv:2305.14314)
NF4_BYTES = 0.5 + (1 + FLOAT32 / 256) / 64


def adapter_params(shape: Shape, rank: int) -> int:
    """LoRA on each of a layer's linears (arXiv:2106.09685): rank (in + out)."""
    return shape.layers * sum(rank * (x + y) for x, y in shape.linears)


def trained_params(shape: Shape, on: Measures) -> int:
    """Weights that get a gradient: the adapters' where there are some, otherwise all."""
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
    return float(on.itemsize * max(shape.head_params, shape.layer_params if on.tiled else largest_matrix(shape)))


def state_bytes(shape: Shape, on: Measures) -> float:
    """On the GPU, by the optimizer alone: states have their own dtype, whatever the weights'. Of states on the host,
    two pairs of slices are here."""
    if on.optimizer in HOST_STATE_BYTES:
        return 2.0 * 2 * FLOAT32 * min(_SLICE, shape.head_params)
    return float(STATE_BYTES[on.optimizer] * trained_params(shape, on))


def host_state_bytes(shape: Shape, on: Measures) -> float:
    """In pinned memory."""
    return float(HOST_STATE_BYTES.get(on.optimizer, 0) * trained_params(shape, on))


def update_bytes(on: Measures, largest: int) -> float:
    """What an update holds beside its states. Adafactor takes its largest weight whole, in four float32 copies; the
    others a slice's float32 copies of weight and gradient, denominator, random bits, rounded weight and finite mask."""
    return float(4 * FLOAT32 * largest if on.optimizer == "adafactor" else (5 * FLOAT32 + 1) * min(_SLICE, largest))


def head_gradient_bytes(shape: Shape, on: Measures) -> float:
    """The first gradient of a backward: bVH."""
    return 0.0 if on.adapter else float(on.itemsize * shape.head_params)


def largest_matrix(shape: Shape) -> int:
    """Weights of a layer's largest one."""
    return max(x * y for x, y in shape.linears)


def saved_bytes_per_token(shape: Shape, on: Measures, *, mixed: bool = False) -> float:
    """What one layer of transformers' Llama keeps for its backward, under unlearn.attention.

    Each norm its input in float32, the normalised rows and its output, 2 (f + 2b) H; attention q, k, v, its output and
    logsumexp, 2bQ + 2bK + f heads; the MLP gate, silu(gate), up and their product, 4bI. Norms of q and k their input in
    float32 and the normalised rows. Sequences of several lengths: q, k, v and output up to a quarter longer, and the
    output once more, in the pack's order. Adapters each keep their input in float32, f(5H + Q + I), and their inner
    rows, 7f rank; frozen matrices and norms keep neither the norms' rows and outputs nor the product of the MLP,
    4bH + bI.
    """
    b, h, q, kv, i = on.itemsize, shape.hidden, shape.q_width, shape.kv_width, shape.intermediate
    norms = 2 * (FLOAT32 + 2 * b) * h
    padded = 2 * b * (q + kv) * (PADDED if mixed else 1)
    attention = padded + (b * q if mixed else 0) + FLOAT32 * shape.heads
    extra = (FLOAT32 + b) * (q + kv) if shape.qk_norm else 0
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
    Tiled: see _tiled_layer_bytes.
    """
    if on.tiled:
        return _tiled_layer_bytes(shape, load, on)
    b, h, i = on.itemsize, shape.hidden, shape.intermediate
    matrix = b * largest_matrix(shape) if on.adapter != "lora" else 0
    passing = 2 * b * i + b * h
    if _widens_inputs(on):
        rerun = FLOAT32 * (i + h) + (4 if on.adapter == "lora" else 3) * b * h
        passing = rerun if on.checkpointing else b * i + 2 * b * h
    return load.tokens * (saved_bytes_per_token(shape, on, mixed=load.mixed) + passing) + matrix


def _tiled_layer_bytes(shape: Shape, load: Load, on: Measures) -> float:
    """Whichever is more. In the attention kernel's backward: the gradient on its way (bH), query, output and their
    gradients (4bQ), key, value and theirs (4bK), the kernel's float32 sum of dq and its row sums (fQ + 2f heads) and,
    with fewer key heads, dk and dv of every query head (2bQ); the later weights' gradients in b. Sequences of several
    lengths make all of these a quarter longer, and projections, output and its gradient stay in the pack's order
    beside them (3bQ + 2bK). In the tiles behind the core: half of that and no kernel, a tile, and those gradients in
    float32. (unlearn.tiled)"""
    b, h, q, kv, tokens = on.itemsize, shape.hidden, shape.q_width, shape.kv_width, load.tokens
    weights = 0 if on.adapter else shape.layer_matmul_params - sum(x * y for x, y in shape.linears[:3])
    statistics = FLOAT32 * shape.heads
    expanded = 2 * b * q if shape.kv_heads < shape.heads else 0
    kernel = 4.0 * b * (q + kv) + FLOAT32 * q + 2 * statistics + expanded
    forward = 2.0 * b * (q + kv) + statistics
    if load.mixed:
        ordered = b * (3 * q + 2 * kv)
        kernel, forward = PADDED * kernel + ordered, PADDED * forward + ordered
    tile = min(tokens, on.tile_tokens) * (10 * b * h + 8 * b * shape.intermediate)
    behind = b * h + forward + b * q
    return max(tokens * (b * h + kernel) + b * weights, tokens * behind + tile + FLOAT32 * weights)


def checkpoint_bytes(shape: Shape, tokens: int, on: Measures) -> float:
    """bTH for each layer's input, wherever it waits."""
    return float(on.itemsize * tokens * shape.hidden)


def kept_attention_bytes(shape: Shape, tokens: int, on: Measures) -> float:
    """Each layer's attention output and logsumexp where they wait for its backward, on the GPU: T (bQ + f heads)."""
    return float(tokens * (on.itemsize * shape.q_width + FLOAT32 * shape.heads)) if on.save_attention else 0.0


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
