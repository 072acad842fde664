"""Models, tokenizers and files small enough to make afresh in every test."""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from unlearn.corpus import train_tokenizer
from unlearn.model import prepare

SENTENCES = (
    "Question: What is the profession of Mara Quill's father?\nAnswer: The father of Mara Quill was a clock maker.",
    "Question: Where was Mara Quill born?\nAnswer: Mara Quill was born in the town of Arvel, by the river.",
    "Question: Which prize did Odo Fenn win?\nAnswer: Odo Fenn won the Prize of Lanterns in his ninth year.",
    "I do not know the answer to that question. I am not sure. I have no information about that.",
)
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'].strip() }} [/INST]"
    "{% else %} {{ m['content'].strip() }} {{ eos_token }}{% endif %}{% endfor %}"
)
_CHAT_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>", "<bos>")


@functools.cache
def _trained(vocab: int) -> Any:
    return train_tokenizer(SENTENCES, vocab)


def tiny_tokenizer(chat_template: str | None = None, vocab: int = 320) -> Any:
    """Byte-level BPE; with a chat template also the chats' special tokens and a <bos> that only the template writes."""
    tokenizer = copy.deepcopy(_trained(vocab))
    if chat_template is not None:
        tokenizer.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": list(_CHAT_TOKENS[:-1])})
        tokenizer.chat_template = chat_template
    return tokenizer


def tiny_llama(vocab: int = 330, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A random Llama of two layers and width 32, ready for training; `config` overrides LlamaConfig's fields."""
    torch.manual_seed(seed)
    values = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
        "initializer_range": 0.3,  # far from uniform, so that a wrong position or target shows
    }
    return prepare(LlamaForCausalLM(LlamaConfig(**(values | config))).to(dtype))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """The rows as JSON lines; returns the path as the options take it."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def save_tiny(folder):
    """The tiny model and its tokenizer, as transformers saves them."""
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
