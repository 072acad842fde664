"""The sizes of models as arithmetic needs them: from a table of known ones or from a transformers configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
        """Of all query heads together; of the keys' and values' likewise: kv_width."""
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
        """Of the seven matrices; layer_params counts biases and norms too."""
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
        """Of the whole model, a tied head once."""
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
# What transformers calls the layers that unlearn.footprint counts.
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
