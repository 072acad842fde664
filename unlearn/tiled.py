"""Decoder layers that run tile by tile over the tokens, so that a long context costs its attention and little else.

Everything in a layer but the attention core treats each token alone: norms, projections, rotation, MLP. Here these run
on `tile_tokens` tokens at a time, through the layer's own submodules; the core runs on the whole pack, through
unlearn.attention. One autograd.Function per layer takes the layer's weights as explicit inputs. Its backward
recomputes, asks torch.autograd.grad for each tile's gradients, adds weight gradients up in float32 and returns each of
them once: a weight's hooks fire once per backward, with the whole gradient. (A Function per tile, as tiled MLPs have
it, fires them once per tile with a part; an optimizer in the backward then takes as many wrong steps.)

What a layer holds, in u = 2*N*H bytes (one bf16 tensor of N tokens and width H). a = heads*head_dim/H, g the same for
the key heads (Llama-3.1-8B: a = 1, g = 1/4), T = tile_tokens, W the bytes of its trainable weights in bf16:

    forward to backward   1 u, the layer's input: this is the checkpoint, and where it waits is unlearn.offload's
                          choice. save_attention: a u and 4*N*heads bytes more (output and logsumexp), on the device;
                          the backward then runs no second attention forward. A frozen weight: nothing
    all layers together   1 u, the final norm's input, and N*head_dim*4 bytes, the rotation's cosines and sines
    forward, at its peak  (2 + 2a + 2g) u: the embeddings, which transformers' own loop holds; input, query, key, value,
                          attention output
    backward, at its peak (2 + 4a + 4g) u while the core is differentiated: the input; the incoming gradient, over which
                          the outgoing one is written; query, key, value, output and the four gradients. Beside it the
                          attention kernel's own workspace, and W: gradients of the weights behind the core
    that workspace        of flash attention: N*heads*head_dim*4 bytes, dq in float32; with fewer key heads than query
                          heads (a > g) 2a u more, dk and dv of every query head
    keys repeated         where no kernel takes fewer key heads (unlearn.attention): (2 + 4a + 2g) u forward and
                          (2 + 8a + 2g) u backward, without those 2a u of workspace
    a tile beside it      T * (20 H + 16 I) bytes or so for an MLP of width I; 2 W in the backward (float32 sums)
    an offloaded input    1 u for the copy under way
    several sequences     of different lengths: the core works on gathered copies, a quarter longer at most, beside
                          which query, key, value, output and its gradient stay: (3a + 2g) u and a quarter of the core's
                          own

Llama-3.1-8B, one sequence: 4.5 u forward, 7 u backward; Llama-2-7B (a = g = 1): 6 u and 10 u. Counted on a CPU.
Nothing of this depends on the number of layers but the checkpoints.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from unlearn.attention import Projected, Segments, packed_attention
from unlearn.offload import CheckpointStore

Tensors = tuple[Tensor, ...]


def _pre_norm(layer: Any, x: Tensor, attended: Tensor) -> Tensor:
    """What follows the attention core in Llama's layer."""
    h = x + layer.self_attn.o_proj(attended)
    return h + layer.mlp(layer.post_attention_layernorm(h))


def _sandwich_norm(layer: Any, x: Tensor, attended: Tensor) -> Tensor:
    """The same where the outputs are normalized too (Gemma 2 and 3)."""
    h = x + layer.post_attention_layernorm(layer.self_attn.o_proj(attended))
    return h + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(h)))


_AFTER_ATTENTION: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "LlamaDecoderLayer": _pre_norm,
    "MistralDecoderLayer": _pre_norm,
    "Qwen2DecoderLayer": _pre_norm,
    "Qwen3DecoderLayer": _pre_norm,
    "Phi3DecoderLayer": _pre_norm,
    "GemmaDecoderLayer": _pre_norm,
    "Gemma2DecoderLayer": _sandwich_norm,
    "Gemma3DecoderLayer": _sandwich_norm,
}


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers can checkpoint, first to last. Raises ValueError for a model without any."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"model: {type(model).__name__} has no decoder layers that could be recomputed")
    return layers


def not_understood(layers: list[nn.Module]) -> str | None:
    """The class of the first layer that cannot be tiled."""
    for kind in map(type, layers):
        if kind.__name__ not in _AFTER_ATTENTION or not kind.__module__.startswith("transformers.models."):
            return kind.__name__
    return None


@contextlib.contextmanager
def tiled(
    model: nn.Module, tile_tokens: int, *, store: CheckpointStore | None = None, save_attention: bool = False
) -> Iterator[None]:
    """Packed forwards of `model` run in tiles until the context ends; whatever else calls its layers finds them plain.

    Only the instances' `forward` is replaced: weights, state_dict and saved files know nothing of it.
    Raises ValueError naming the class of a layer that is not understood.
    """
    layers = decoder_layers(model)
    if tile_tokens < 1:
        raise ValueError(f"tile_tokens: {tile_tokens} is not accepted; a number of tokens above 0 is")
    if (name := not_understood(layers)) is not None:
        raise ValueError(f"tile_tokens: {name} is not supported; {', '.join(_AFTER_ATTENTION)} are")
    store = store or CheckpointStore(len(layers), 0)
    norm = _final_norm(model, layers)
    before = [(module, vars(module).get("forward")) for module in (*layers, norm) if module is not None]
    for index, layer in enumerate(layers):
        layer.forward = TiledLayer(layer, index, tile_tokens, store, save_attention).forward
    if norm is not None:
        norm.forward = TiledNorm(norm, tile_tokens).forward
    try:
        yield
    finally:
        for module, own in before:
            if own is None:
                del module.forward  # the class's own is seen again
            else:
                module.forward = own
        store.close()


def _final_norm(model: nn.Module, layers: list[nn.Module]) -> nn.Module | None:
    for module in model.modules():
        children = getattr(module, "layers", None)
        if isinstance(children, nn.ModuleList) and len(children) and children[0] is layers[0]:
            return getattr(module, "norm", None)
    return None


@dataclass(frozen=True)
class _Call:
    """The arguments of one forward that are no weights. rotation: cosines and sines [1, N, D];
    needs_grad: a backward may follow."""

    segments: Segments
    rotation: tuple[Tensor, Tensor]
    needs_grad: bool


class _Stage(nn.Module):
    """Calls function(module, ...) with other tensors in the place of the module's weights."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self.module, *args)


@dataclass
class _Gradients:
    """Gradients of a module's weights, added up over tiles in float32 and handed out once in the weights' dtype.

    The module runs on detached aliases of the weights that are trained: what a tile adds must not reach their own
    hooks. Frozen ones stay the module's own: a 4-bit matrix detached would have lost what widens it.
    """

    module: nn.Module
    weights: Tensors  # in the order of named_parameters
    sums: dict[str, Tensor] = field(default_factory=dict)
    settled: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._names = [f"module.{name}" for name, _ in self.module.named_parameters()]
        pairs = zip(self._names, self.weights, strict=True)
        self._trained = {name: _leaf(weight) for name, weight in pairs if weight.requires_grad}
        self._stage = _Stage(self.module)

    def tile(self, function: Callable[..., Any], inputs: Sequence[Tensor], *args: Any, upstream: Tensors) -> Tensors:
        """Gradients of function(module, *inputs, *args) for those inputs that require one; the weights' are added to
        the sums. upstream: the gradient of each output."""
        with torch.enable_grad():
            outputs = torch.func.functional_call(self._stage, self._trained, (function, *inputs, *args))
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        # with frozen projections below the first layer not every output depends on anything that is trained
        reached = [(out, grad) for out, grad in zip(outputs, upstream, strict=True) if out.requires_grad]
        if not reached:
            return ()
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        leaves = [*wanted, *self._trained.values()]
        found = torch.autograd.grad([out for out, _ in reached], leaves, [g for _, g in reached], allow_unused=True)
        for (name, alias), grad in zip(self._trained.items(), found[len(wanted) :], strict=True):
            if grad is None:
                continue
            if name in self.sums:
                self.sums[name].add_(grad)
            else:
                self.sums[name] = grad.to(torch.promote_types(alias.dtype, torch.float32))
        return found[: len(wanted)]

    def settle(self) -> None:
        """The sums so far are complete: round them, so that their float32 memory goes to the next stage."""
        for name in list(self.sums):
            total = self.sums.pop(name).to(self._trained[name].dtype)
            self.settled[name] = self.settled[name] + total if name in self.settled else total

    def result(self) -> list[Tensor | None]:
        return [self.settled.get(name) for name in self._names]


class TiledLayer:
    """Stands in for one decoder layer's forward. A bound method of this object is what a deep copy of the model
    copies too; a closure would go on running the original's weights."""

    def __init__(
        self, layer: nn.Module, index: int, tile_tokens: int, store: CheckpointStore, save_attention: bool
    ) -> None:
        self.layer, self.index, self.tile_tokens = layer, index, tile_tokens
        self.store, self.save_attention = store, save_attention

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        segments = kwargs.get("segments")
        if segments is None or args:  # generation, with its masks and caches
            return type(self.layer).forward(self.layer, hidden_states, *args, **kwargs)
        for module in self.layer.modules():
            if isinstance(module, nn.Dropout) and module.p > 0 and module.training:
                raise ValueError(f"tile_tokens: dropout {module.p} is not accepted (no tile could repeat it); 0 is")
        weights = tuple(self.layer.parameters())
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (hidden_states, *weights))
        call = _Call(segments, kwargs["position_embeddings"], needs_grad)
        return _LayerFunction.apply(self, call, hidden_states, *weights)

    def spans(self, num_tokens: int) -> Iterator[slice]:
        for start in range(0, num_tokens, self.tile_tokens):
            yield slice(start, min(start + self.tile_tokens, num_tokens))

    @staticmethod
    def project(layer: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """Query, key and value [1, heads, t, D] of a tile's tokens, and how the layer wants the core to be run."""
        try:
            layer.self_attn(
                hidden_states=layer.input_layernorm(x),
                position_embeddings=(cos, sin),
                attention_mask=None,
                project_only=True,
            )
        except Projected as found:
            return found.projected
        raise ValueError(
            f"tile_tokens: {type(layer).__name__} does not run packed attention; call unlearn.model.prepare"
        )

    @staticmethod
    def finish(layer: Any, x: Tensor, attended: Tensor) -> Tensor:
        return _AFTER_ATTENTION[type(layer).__name__](layer, x, attended.flatten(2))

    def project_all(self, x: Tensor, call: _Call) -> tuple[list[Tensor], dict[str, Any]]:
        """Query, key and value of all tokens, without a graph, and the core's options."""
        whole: list[Tensor] = []
        options: dict[str, Any] = {}
        for rows in self.spans(x.shape[1]):
            *parts, options = self.project(self.layer, x[:, rows], *(t[:, rows] for t in call.rotation))
            if not whole:
                # tokens outermost, as the core reads them where nothing has to be gathered
                whole = [part.new_empty(x.shape[1], part.shape[1], part.shape[3]) for part in parts]
            for buffer, part in zip(whole, parts, strict=True):
                buffer[rows] = part[0].transpose(0, 1)
        return [buffer.transpose(0, 1).unsqueeze(0) for buffer in whole], options

    def attend(self, projected: Sequence[Tensor], call: _Call, options: dict[str, Any]) -> Tensor:
        """[1, N, heads, D]"""
        if options["dropout"]:
            raise ValueError(f"tile_tokens: dropout {options['dropout']} in the attention is not accepted; 0 is")
        query, key, value = projected
        return packed_attention(self.layer.self_attn, query, key, value, None, segments=call.segments, **options)[0]


class _LayerFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tiles: TiledLayer, call: _Call, x: Tensor, *weights: Tensor) -> Tensor:
        projected, options = tiles.project_all(x, call)
        ctx.recall = contextlib.nullcontext()
        if call.needs_grad and tiles.save_attention:
            saving, ctx.recall = create_selective_checkpoint_contexts(_save_attention)
            # with gradients, as in the backward: which kernel runs depends on it
            with torch.enable_grad(), saving:
                attended = tiles.attend([t.detach().requires_grad_() for t in projected], call, options).detach()
        else:
            attended = tiles.attend(projected, call, options)
        del projected
        y = torch.empty_like(x)
        for rows in tiles.spans(x.shape[1]):
            y[:, rows] = tiles.finish(tiles.layer, x[:, rows], attended[:, rows])
        if call.needs_grad:
            ctx.tiles, ctx.call, ctx.device = tiles, call, x.device
            ctx.ticket = tiles.store.put(tiles.index, x)
            ctx.save_for_backward(None if ctx.ticket.offloaded else x, *weights)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        tiles, call = ctx.tiles, ctx.call
        kept, *weights = ctx.saved_tensors
        x = tiles.store.restore(ctx.ticket, kept, ctx.device)
        needs_dx = ctx.needs_input_grad[2]
        grads = _Gradients(tiles.layer, tuple(weights))

        projected, options = tiles.project_all(x, call)
        projected = [t.requires_grad_() for t in projected]
        with torch.enable_grad(), ctx.recall:
            attended = tiles.attend(projected, call, options)
        dx = _outgoing(dy)
        dattended = torch.empty_like(attended)
        for rows in tiles.spans(x.shape[1]):
            inputs = _leaf(x[:, rows], needs_dx), _leaf(attended[:, rows])
            found = grads.tile(tiles.finish, inputs, upstream=(dy[:, rows],))
            dattended[:, rows] = found[-1]
            if needs_dx:
                dx[:, rows] = found[0]
        grads.settle()
        dprojected = torch.autograd.grad(attended, projected, dattended)
        del attended, dattended, projected
        for rows in tiles.spans(x.shape[1]):
            rotation = (t[:, rows] for t in call.rotation)
            upstream = tuple(t[:, :, rows] for t in dprojected)
            found = grads.tile(_project, (_leaf(x[:, rows], needs_dx),), *rotation, upstream=upstream)
            if needs_dx:
                dx[:, rows] += found[0]
        grads.settle()
        dx.may_be_overwritten = True
        return None, None, dx if needs_dx else None, *grads.result()


def _project(layer: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensors:
    return TiledLayer.project(layer, x, cos, sin)[:3]


def _leaf(tensor: Tensor, requires_grad: bool = True) -> Tensor:
    return tensor.detach().requires_grad_(requires_grad)


def _outgoing(dy: Tensor) -> Tensor:
    """Where the input's gradient goes: over the output's, if that came from here and nobody else can hold it."""
    return dy if getattr(dy, "may_be_overwritten", False) else torch.empty_like(dy)


def _save_attention(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Of all that the core runs, keep what the attention kernels return: the output and the logsumexp."""
    kernel = "scaled_dot_product" in operator.__name__
    return CheckpointPolicy.MUST_SAVE if kernel else CheckpointPolicy.MUST_RECOMPUTE


class TiledNorm:
    """Stands in for the final norm, whose float32 copies of all tokens would be as large as a layer's working set."""

    def __init__(self, norm: nn.Module, tile_tokens: int) -> None:
        self.norm, self.tile_tokens = norm, tile_tokens

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.dim() != 3 or hidden_states.shape[1] <= self.tile_tokens:
            return type(self.norm).forward(self.norm, hidden_states)
        return _NormFunction.apply(self, hidden_states, *self.norm.parameters())

    @staticmethod
    def run(norm: nn.Module, x: Tensor) -> Tensor:
        return type(norm).forward(norm, x)


class _NormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tiles: TiledNorm, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.tiles = tiles
        ctx.save_for_backward(x, *weights)
        return torch.cat([tiles.run(tiles.norm, part) for part in x.split(tiles.tile_tokens, 1)], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        grads = _Gradients(ctx.tiles.norm, tuple(weights))
        dx = torch.empty_like(dy)
        parts = (tensor.split(ctx.tiles.tile_tokens, 1) for tensor in (x, dy, dx))
        for x_part, dy_part, dx_part in zip(*parts, strict=True):
            (found,) = grads.tile(ctx.tiles.run, (_leaf(x_part),), upstream=(dy_part,))
            dx_part.copy_(found)
        grads.settle()
        dx.may_be_overwritten = True
        return None, dx, *grads.result()
