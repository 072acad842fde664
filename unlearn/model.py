"""The model as the loop sees it: hidden states at the answer positions, and the head that turns them into logits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from unlearn import adapters, quantized
from unlearn.attention import ATTENTION, Segments
from unlearn.data import Item, PackedBatch, Role, Sequence, collate
from unlearn_kernels.reference import logits

# How each configuration names the factor on its logits; the packaged checks refuse a model whose head is otherwise.
_LOGIT_MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
_LOGIT_DIVISORS = ("logits_scaling",)


@dataclass(frozen=True)
class Head:
    """logits = softcap(logit_scale * (hidden weight^T + bias + s (hidden A^T) B^T)).

    weight [V, H], bias [V] or None, lora (A [r, H], B [V, r], s) or None.
    """

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    lora: adapters.LoRA | None = None

    def kwargs(self) -> dict[str, Any]:
        """The **head arguments of unlearn_kernels' functions."""
        described = {"bias": self.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}
        return described if self.lora is None else {**described, "lora": self.lora}


def resolve_device(name: str) -> torch.device:
    """The device called `name`; auto is the GPU where there is one. Raises ValueError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError("it holds no values")
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {name!r} is not available here ({_first_line(error)})") from None
    return device


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model; of its base for an adapter that comes without one."""
    from transformers import AutoTokenizer

    if not any((Path(name) / file).exists() for file in ("tokenizer.json", "tokenizer_config.json")):
        name = adapters.base_of(name)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"model: no tokenizer in {name!r} ({_first_line(error)})") from None


def load_model(
    name: str,
    *,
    dtype: str | torch.dtype,
    device: torch.device | str,
    trust_remote_code: bool = False,
    in_4bit: bool = False,
) -> nn.Module:
    """A causal language model with packed attention, in evaluation mode (no dropout), its head checked.

    name: a model's folder or name, or the folder of a LoRA adapter, which is put into the base that it names. in_4bit:
    with its layers' matrices as unlearn.quantized holds them, each quantized as it is read. Loads safetensors alone.
    Raises ValueError when the model is not there or its head is not understood.
    """
    base = adapters.base_of(name)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    model = _load_whole(base, dtype, trust_remote_code, quantized.loading_options(device, dtype) if in_4bit else {})
    if in_4bit:
        quantized.settle(model, dtype)
    if base != name:
        adapters.load(model, name)
    return prepare(model if in_4bit else model.to(device))


def _load_whole(name: str, dtype: torch.dtype, trust_remote_code: bool, options: dict[str, Any]) -> nn.Module:
    from transformers import AutoModelForCausalLM

    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"model: no folder {name!r}")
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            attn_implementation=ATTENTION,
            output_loading_info=True,
            **options,
        )
    except torch.OutOfMemoryError:  # the caller's to tell
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ValueError(f"model: could not load {name!r} ({_first_line(error)})") from None
    if quantized.layers(model) and not options:
        raise ValueError(
            f"model: {name!r} holds its matrices in 4 bits; accepted is an unquantized model, or this one with"
            " --load-in-4bit, in training with --lora and --lora-4bit"
        )
    missing = sorted(found["missing_keys"])
    if missing:  # transformers fills them with random numbers and a warning
        raise ValueError(f"model: {name!r} lacks weights of {type(model).__name__}: {', '.join(missing[:3])}")
    if adapters.layers(model):  # transformers fetches the base of an adapter on the hub by itself
        raise ValueError(f"model: {name!r} is an adapter on the model hub; download it and give its folder")
    return model


def load_skeleton(name: str, *, dtype: str, trust_remote_code: bool = False) -> nn.Module:
    """The model that a configuration describes, on the meta device: parameters without values.

    name: as load_model takes it. Raises ValueError where there is no configuration that makes a model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    base = adapters.base_of(name)
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ValueError(f"model: no configuration of a model in {base!r} ({_first_line(error)})") from None
    if base != name:
        adapters.describe(model, name)
    return model


def prepare(model: nn.Module) -> nn.Module:
    """Switch a transformers model to packed attention and evaluation mode, and check its head."""
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(f"model: {type(model).__name__} does not let its attention be replaced; it is not supported")
    model.set_attn_implementation(ATTENTION)
    model.eval()
    check_head(model)
    return model


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def head_of(model: nn.Module) -> Head:
    """The output head of a transformers causal language model."""
    wrapped = model.get_output_embeddings()
    if wrapped is None:
        raise ValueError(f"model: {type(model).__name__} has no output head")
    layer, lora = adapters.parts(wrapped)
    config = model.config.get_text_config()
    scale = 1.0
    for name in _LOGIT_MULTIPLIERS:
        scale *= getattr(config, name, None) or 1.0
    for name in _LOGIT_DIVISORS:
        scale /= getattr(config, name, None) or 1.0
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, getattr(layer, "bias", None), scale, softcap, lora)


def hidden_states(model: nn.Module, batch: PackedBatch) -> Tensor:
    """[N, H]: the last hidden states at the positions that predict an answer token. Nothing else reaches the head."""
    backbone = model.base_model
    output = backbone(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        segments=Segments.plan(batch.lengths, batch.input_ids.device),
    )
    return output.last_hidden_state[0].index_select(0, batch.answer_index)


def check_ids(model: nn.Module, sequences: Iterable[Sequence]) -> None:
    """Refuses tokens beyond the model's embedding or head: on a GPU they would end in a device assert.

    Raises ValueError naming the first sequence that has one.
    """
    rows = min(len(model.get_input_embeddings().weight), len(head_of(model).weight))
    for sequence in sequences:
        largest = max(sequence.input_ids)
        if largest >= rows:
            raise ValueError(
                f"model: {sequence.key} has the token {largest}, and the model knows 0 to {rows - 1}; its tokenizer is "
                "of another model"
            )


@contextlib.contextmanager
def generating(model: nn.Module) -> Iterator[None]:
    """Padded batches with a key-value cache: transformers' own attention inside, packed attention again after."""
    # transformers' SDPA refuses the softcap inside Gemma 2's attention
    softcapped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    model.set_attn_implementation("eager" if softcapped else "sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(ATTENTION)


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Compare our logits of two short packed sequences with the model's own, one by one.

    Catches a head with a factor this code does not know, and a model whose attention ignores the packing. Raises
    ValueError with the difference.
    """
    vocab = model.get_input_embeddings().weight.shape[0]
    ids = [tuple((7 * i + 3 * s) % vocab for i in range(6 + s)) for s in (0, 1)]
    device = next(model.parameters()).device
    batch = collate([Item(Sequence(str(s), row, 1), Role.FORGET) for s, row in enumerate(ids)]).to(device)
    head, dtype = head_of(model), next(model.parameters()).dtype
    found = logits(hidden_states(model, batch), head.weight, **head.kwargs()).float()
    with generating(model):
        own = [model(input_ids=torch.tensor([row[:-1]], device=device)).logits[0].float() for row in ids]
    expected = torch.cat(own)
    if not bool(expected.isfinite().all()):
        raise ValueError(f"model: the logits of this {type(model).__name__} are not finite; its weights are broken")
    # The whole table's error against its size, so that the measure does not depend on how large logits are. bf16 loses
    # a per cent or two over a deep model; a factor that is not known here is further off.
    error = ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()
    if not error <= (1e-3 if dtype in (torch.float32, torch.float64) else 0.05):
        raise ValueError(
            f"model: {type(model).__name__}'s logits differ from its head applied to its hidden states by {error:.2g}"
            " of their size; this architecture is not supported"
        )


def max_positions(name: str, *, trust_remote_code: bool = False) -> int | None:
    """The longest sequence that a model's configuration allows, None where it names none."""
    config = load_config(name, trust_remote_code=trust_remote_code)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_config(name: str, *, trust_remote_code: bool = False) -> Any:
    """The configuration in a folder, in a config.json, or on the model hub."""
    from transformers import AutoConfig

    name = adapters.base_of(name)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"model: no configuration in {name!r} ({_first_line(error)})") from None
