"""Random models of published shapes, whole or a few layers of them, and what a step of one costs in FLOP."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from unlearn.shapes import SHAPES, Shape

# What the parts about long contexts measure; the small ones try their scripts.
MODELS = {"8b": SHAPES["llama-3.1-8b"], "7b": SHAPES["llama-2-7b"]}
TINY = {
    "8b": Shape("tiny-gqa", hidden=32, intermediate=48, layers=4, heads=4, kv_heads=2, vocab=131, head_dim=8),
    "7b": Shape("tiny-mha", hidden=32, intermediate=40, layers=4, heads=4, kv_heads=4, vocab=97, head_dim=8),
}
# Dense bf16 TFLOP/s on the data sheets, by a part of the device's name; the first that fits.
_PEAKS = {"H100 PCIe": 756, "H100 NVL": 835, "H200 NVL": 835, "H100": 989, "H200": 989, "A100": 312}


def shapes(tiny: bool) -> dict[str, Shape]:
    return TINY if tiny else MODELS


def with_layers(shape: Shape, layers: int) -> Shape:
    return dataclasses.replace(shape, layers=layers)


def random_model(shape: Shape, device: torch.device) -> nn.Module:
    """A Llama of this shape in bf16 (float32 on a CPU, whose bf16 attention is slow), ready for packed batches.

    Made without memory, then filled on the device: N(0, 0.02), norms of 1. Its head is not compared with its logits, as
    unlearn.model.prepare does: part train-d compares whole steps.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from unlearn.attention import ATTENTION

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=1 << 20,
        tie_word_embeddings=shape.tied,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    model.to_empty(device=device)
    model.tie_weights()
    backbone = model.model
    with torch.device(device):  # its table came back empty, and in `dtype`
        backbone.rotary_emb = type(backbone.rotary_emb)(config)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.fill_(1.0)
            else:
                weight.normal_(0.0, 0.02, generator=generator)
    model.set_attn_implementation(ATTENTION)
    return model.eval()


def random_ids(shape: Shape, num_tokens: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(2, shape.vocab, (num_tokens,), generator=generator).tolist())


def attention_flop(lengths: list[int], width: int) -> float:
    """One forward of one layer's causal core, scores and their product with the values: 2 n^2 Q for a sequence of n
    tokens and heads of width Q together. Its backward takes 2.5 times that in a kernel that stores no scores."""
    return sum(2.0 * n**2 * width for n in lengths)


def model_flop(shape: Shape, lengths: list[int]) -> float:
    """Forward and backward of every token, each labelled: 6 P a token for P weights in products, and three causal
    attention forwards a layer. Recomputation is not counted, nor the embedding, which is no product."""
    weights = shape.layers * shape.layer_matmul_params + shape.head_params
    return 6.0 * weights * sum(lengths) + 3 * shape.layers * attention_flop(lengths, shape.q_width)


def peak_tflops(device: torch.device) -> float | None:
    """Of the data sheet, dense bf16; None for a device that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((float(peak) for part, peak in _PEAKS.items() if part in name), None)


def tensor_bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
