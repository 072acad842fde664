"""One tiny random model per family of architectures, for what has to hold in all of them."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

VOCAB = 97
_SHARED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "initializer_range": 0.2,
}
_GQA = _SHARED | {"num_key_value_heads": 2}
_GEMMA = _GQA | {"head_dim": 8}
WINDOW = 7


def _of(config: type, model: type, values: dict[str, Any], **more: Any) -> Callable[..., Any]:
    return lambda **changes: model(config(**(values | more | changes)))


FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": _of(tf.LlamaConfig, tf.LlamaForCausalLM, _GQA),
    "llama-tied": _of(tf.LlamaConfig, tf.LlamaForCausalLM, _GQA, tie_word_embeddings=True),
    "qwen3": _of(tf.Qwen3Config, tf.Qwen3ForCausalLM, _GQA, head_dim=8),
    "qwen2-windows": _of(
        tf.Qwen2Config, tf.Qwen2ForCausalLM, _GQA, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "mistral": _of(tf.MistralConfig, tf.MistralForCausalLM, _GQA, sliding_window=WINDOW),
    "gemma": _of(tf.GemmaConfig, tf.GemmaForCausalLM, _GEMMA | {"num_key_value_heads": 1}),
    "gemma2": _of(
        tf.Gemma2Config,
        tf.Gemma2ForCausalLM,
        _GEMMA,
        sliding_window=WINDOW,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
        query_pre_attn_scalar=24,
    ),
    "gemma3": _of(
        tf.Gemma3TextConfig,
        tf.Gemma3ForCausalLM,
        _GEMMA,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=24,
    ),
    "gpt-neox": _of(tf.GPTNeoXConfig, tf.GPTNeoXForCausalLM, _SHARED, hidden_dropout=0.0, attention_dropout=0.0),
    "gpt2": _of(
        tf.GPT2Config,
        tf.GPT2LMHeadModel,
        {k: v for k, v in _SHARED.items() if k not in ("hidden_size", "intermediate_size")},
        n_embd=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    "phi": _of(tf.PhiConfig, tf.PhiForCausalLM, _GQA),  # its head has a bias
    "cohere": _of(tf.CohereConfig, tf.CohereForCausalLM, _GQA, logit_scale=0.3),
    "granite": _of(tf.GraniteConfig, tf.GraniteForCausalLM, _GQA, logits_scaling=4.0, attention_multiplier=0.2),
}


def family(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, vocab: int = VOCAB) -> Any:
    """An unprepared model of this family, all of its weights random: no bias and no norm that would hide a mistake."""
    torch.manual_seed(seed)
    model = FAMILIES[name](vocab_size=vocab).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model
