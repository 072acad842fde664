"""LoRA through peft: adapters put into a model's linear layers, kept as peft keeps them, merged when asked.

The model stays the transformers model it was; its linear layers are wrapped in place and compute
W x + (alpha / r) B (A x). Only A [r, in] and B [out, r] are trained. B begins at zero, so the model with fresh adapters
is the base model to the last bit, which makes it its own reference. Adapters are float32 whatever the model's dtype:
they are small, and nothing is gained by rounding them.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from unlearn import quantized
from unlearn.config import TrainConfig

LoRA = tuple[Tensor, Tensor, float]
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
ALL_LINEAR = "all-linear"  # peft's word for every linear layer but the head
_NAME = "default"  # peft's name of an adapter that is alone
_PREFIX = "base_model.model."  # what peft's own wrapper puts before every name in a file
_BASE = "base quantized as"  # in the metadata of the weights' file, where no other reader minds it
# What peft's LoRA can be beside W + (alpha / r) B A; the head's kernel and the merge know of none of it.
_VARIANTS = (
    "use_dora", "modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters", "lora_bias",
    "alora_invocation_tokens", "use_bdlora", "arrow_config", "velora_config", "monteclora_config", "kasa_config",
    "rank_pattern", "alpha_pattern",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- in a model


def layers(model: nn.Module) -> dict[str, Any]:
    """The wrapped layers by name; empty for a model without adapters."""
    return {name: module for name, module in model.named_modules() if _is_wrapped(module)}


def _is_wrapped(module: nn.Module) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


def parts(layer: Any) -> tuple[nn.Module, LoRA | None]:
    """(the layer as it was, its adapter (A, B, s), None where it has none or it is switched off)."""
    if not _is_wrapped(layer):
        return layer, None
    adapter = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight, float(layer.scaling[_NAME])
    return layer.base_layer, None if layer.disable_adapters else adapter


def attach(model: nn.Module, config: TrainConfig) -> None:
    """Make `model` train adapters alone: new ones as the configuration says, or those that it was loaded with.

    Raises ValueError for a target that is no linear layer, for a rank that no target can have, for adapters of other
    settings than asked for, and for a merge that could not be done at the end.
    """
    if layers(model):
        _check_same(model, config)
    else:
        assert config.lora is not None
        targets = _resolve(model, config.lora_targets)
        highest = max(_highest_rank(model.get_submodule(name)) for name in targets)
        if config.lora > highest:
            raise ValueError(f"lora: {config.lora} is not accepted; no layer here has a rank above {highest}")
        described = _peft().LoraConfig(
            r=config.lora,
            lora_alpha=2 * config.lora if config.lora_alpha is None else config.lora_alpha,
            target_modules=_short(model, targets),
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
            base_model_name_or_path=os.path.abspath(config.model) if os.path.isdir(config.model) else config.model,
        )
        device = next(model.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(config.seed)
            _inject(model, described)
    if config.lora_merge:
        check_mergeable(model, "lora_merge")


def _inject(model: nn.Module, described: Any) -> None:
    functional = _peft().functional
    with warnings.catch_warnings():  # about tied heads and transposed layers, which are looked after here
        warnings.simplefilter("ignore")
        functional.inject_adapter_in_model(described, model, _NAME)
    functional.cast_adapter_dtype(model, _NAME)
    model.train(model.training)  # new modules are in training mode


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}


def _highest_rank(layer: Any) -> int:
    """A 4-bit matrix is stored as one column, and a Conv1D does not name its widths."""
    return min((layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else layer.weight.shape)


def _resolve(model: nn.Module, wanted: str | None) -> list[str]:
    """Full names of the linear layers that a comma-separated list of names means."""
    linear, head = _linear_layers(model), model.get_output_embeddings()
    found: set[str] = set()
    for target in (ALL_LINEAR if wanted is None else wanted).split(","):
        target = target.strip()
        if target == ALL_LINEAR:
            matches = {name for name, module in linear.items() if module is not head}
        else:
            matches = {name for name in linear if f".{name}".endswith(f".{target}")} if target else set()
        if not matches:
            names = sorted({name.rpartition(".")[2] for name in linear})
            raise ValueError(
                f"lora_targets: {target!r} is no linear layer of {type(model).__name__};"
                f" {ALL_LINEAR}, {', '.join(names)} are"
            )
        found |= matches
    return [name for name in linear if name in found]


def _short(model: nn.Module, targets: list[str]) -> list[str]:
    """The targets by the last parts of their names, as peft's files have them, unless that would mean more layers."""
    short = sorted({name.rpartition(".")[2] for name in targets})
    meant = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in short]
    return short if sorted(meant) == sorted(targets) else targets


def _check_same(model: nn.Module, config: TrainConfig) -> None:
    """The adapters of the model's folder go on being trained: their shape is theirs."""
    own = model.peft_config[_NAME]
    for name, there, asked in (("lora", own.r, config.lora), ("lora_alpha", own.lora_alpha, config.lora_alpha)):
        if asked is not None and asked != there:
            raise ValueError(f"{name}: {asked}, but the adapter in {config.model} has {there}; they have to agree")
    if config.lora_targets is not None:
        raise ValueError(f"lora_targets: given, but the adapter in {config.model} has its own")


def settings(model: nn.Module) -> dict[str, Any] | None:
    """Rank, alpha and layers of a model's adapters; None where it has none."""
    wrapped = layers(model)
    if not wrapped:
        return None
    own = model.peft_config[_NAME]
    names = sorted({name.rpartition(".")[2] for name in wrapped})
    return {"r": own.r, "alpha": own.lora_alpha, "targets": names, "layers": len(wrapped)}


def line(model: nn.Module) -> str:
    found = settings(model)
    assert found is not None
    trained, whole = num_parameters(model)
    where = f"{found['layers']} layers ({', '.join(found['targets'])})"
    share = f"{trained:,} of {whole:,} parameters are trained"
    return f"LoRA of rank {found['r']}, alpha {found['alpha']} on {where}: {share}"


def num_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, all) of a model, with adapters or without."""
    sizes = [(quantized.num_weights(p), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def state(model: nn.Module) -> dict[str, Tensor]:
    """What a run with adapters changes, by name: A and B of each wrapped layer."""
    return {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}


def load_state(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    own = state(model)
    if {name: tensor.shape for name, tensor in own.items()} != {name: t.shape for name, t in tensors.items()}:
        raise ValueError(f"adapters: {len(tensors)} tensors for {len(own)} of other names or shapes")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def is_fresh(model: nn.Module) -> bool:
    """Whether the adapters change nothing: every B is zero, as it is before the first step."""
    return not any(bool(layer.lora_B[_NAME].weight.any()) for layer in layers(model).values())


@contextlib.contextmanager
def as_reference(model: nn.Module) -> Iterator[None]:
    """The model as it is before any step: fresh adapters off; adapters that came with the model stay on.

    A fresh adapter of the head stays in its place: it adds zeros, and the head's kernel is the policy's to the bit.
    """
    head = model.get_output_embeddings()
    switched = [layer for layer in layers(model).values() if layer is not head] if is_fresh(model) else []
    if not switched:
        yield
        return
    # The hidden states want a gradient as the policy's do: without one the head would take another schedule.
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    for layer in switched:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        hook.remove()
        for layer in switched:
            layer.enable_adapters(True)


def function_state(model: nn.Module) -> dict[str, Tensor]:
    """The state that decides what the model computes, under the names it has without adapters.

    Fresh adapters are not part of it: a reference computed without them is theirs too.
    """
    tensors = model.state_dict()
    if not layers(model):
        return tensors
    fresh = is_fresh(model)
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in tensors.items()
        if not (fresh and ".lora_" in name)
    }


def merge(model: nn.Module) -> float:
    """Add the adapters to the weights they stand beside and take the wrappers away; every weight may be trained again.

    Returns the share of the update that rounding to the weights' dtype changed, |rounding error| / |update|, 0 for a
    model without adapters: bf16 weights of size 0.02 are 1.2e-4 apart and lose most of a small update.
    """
    check_mergeable(model, "model")
    update = error = 0.0
    for layer in layers(model).values():
        with torch.no_grad():
            weight, delta = layer.base_layer.weight, layer.get_delta_weight(_NAME)
            wanted = weight.to(delta.dtype) + delta
            weight.copy_(wanted)
            update += float(delta.square().sum(dtype=torch.float64))
            error += float((weight.to(delta.dtype) - wanted).square().sum(dtype=torch.float64))
    strip(model)
    return (error / update) ** 0.5 if update else 0.0


def strip(model: nn.Module) -> None:
    """Take the adapters out as if they had never been there; every weight may be trained."""
    for name, layer in layers(model).items():
        model.set_submodule(name, layer.base_layer)
    if hasattr(model, "peft_config"):
        del model.peft_config
    model.requires_grad_(True)


def merge_line(lost: float, dtype: str) -> str:
    return f"adapters merged into {dtype} weights: rounding changed {lost:.1%} of their update"


def check_mergeable(model: nn.Module, argument: str) -> None:
    """Raises ValueError naming `argument` where merge() would change the input embedding too, or a 4-bit matrix."""
    if quantized.layers(model):
        raise ValueError(f"{argument}: adapters are not merged into 4-bit matrices, whose rounding would swallow them")
    head = model.get_output_embeddings()
    if _is_wrapped(head) and head.base_layer.weight is model.get_input_embeddings().weight:
        remedy = "leave the head out of --lora-targets" if argument == "lora_merge" else "--lora RANK trains it further"
        raise ValueError(
            f"{argument}: the head's adapter cannot be merged: {type(model).__name__} shares that weight with its"
            f" input embedding; {remedy}"
        )


# -------------------------------------------------------------------------------------------------------- in a folder


def is_folder(name: str) -> bool:
    return (Path(name) / CONFIG_FILE).is_file()


def base_of(name: str) -> str:
    """The model that the adapter in folder `name` belongs to; `name` itself where it holds no adapter."""
    if not is_folder(name):
        return name
    base = str(_read(name)["base_model_name_or_path"])
    if is_folder(base):
        raise ValueError(f"model: the adapter in {name!r} has the adapter in {base!r} as its base; a model is accepted")
    if not Path(base).exists() and (base.startswith((".", "/", "~")) or base.count("/") > 1):
        raise ValueError(
            f"model: the adapter in {name!r} belongs to {base!r}, which is not there;"
            f" base_model_name_or_path in its {CONFIG_FILE} names it"
        )
    return base


def trained_on(folder: str) -> str | None:
    """How the base was quantized under which the adapter of a folder was trained; None where it was not, or where the
    file does not say."""
    with contextlib.suppress(OSError, SafetensorError), safe_open(Path(folder) / WEIGHTS_FILE, framework="pt") as file:
        return (file.metadata() or {}).get(_BASE)
    return None


def _read(folder: str) -> dict[str, Any]:
    """adapter_config.json of a plain LoRA adapter. Raises ValueError for what is none."""
    path = Path(folder) / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        kind, base = values.get("peft_type"), values.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"model: {path} is not an adapter's configuration ({error})") from None
    if kind != "LORA":
        raise ValueError(f"model: the adapter in {folder!r} is of type {kind}; LORA is accepted")
    if not isinstance(base, str) or not base:
        raise ValueError(f"model: base_model_name_or_path in {path} is {base!r}; a folder or a name on the hub is")
    found = [name for name in _VARIANTS if values.get(name)]
    if values.get("bias", "none") != "none":
        found.append("bias")
    if values.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"):
        found.append(f"init_lora_weights {values['init_lora_weights']}")  # others change the base too
    if found:
        raise ValueError(f"model: the adapter in {folder!r} uses {', '.join(found)}; plain LoRA is accepted")
    return values


def load(model: nn.Module, folder: str) -> None:
    """Put the adapter of a folder into its base model, ready to be trained on. Raises ValueError where it is another's.

    Reads safetensors alone. A base of the same shape and other weights cannot be told apart.
    """
    path = Path(folder) / WEIGHTS_FILE
    try:
        stored = {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"model: {path} cannot be read ({error})") from None
    describe(model, folder)
    functional = _peft().functional
    expected = functional.get_peft_model_state_dict(model, save_embedding_layers=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    for name, tensor in expected.items():
        if shapes.pop(name, None) != tuple(tensor.shape):
            found = tuple(stored[name].shape) if name in stored else "missing"
            raise ValueError(
                f"model: the adapter in {folder!r} is of another base: {name} is {found}, not {tuple(tensor.shape)}"
            )
    if shapes:
        raise ValueError(f"model: the adapter in {folder!r} is of another base: nothing takes {next(iter(shapes))}")
    functional.set_peft_model_state_dict(model, stored, _NAME)


def describe(model: nn.Module, folder: str) -> None:
    """Put new adapters of the kind that a folder holds into its base model; load() does that and fills them."""
    _read(folder)
    peft = _peft()
    try:
        described = peft.PeftConfig.from_pretrained(folder)
        described.inference_mode = False
        _inject(model, described)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"model: the adapter in {folder!r} does not fit its base ({error})") from None


def save(model: nn.Module, folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors, as peft and transformers load them."""
    tensors = _peft().functional.get_peft_model_state_dict(model, save_embedding_layers=False)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}
    base = quantized.described(model)
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt", **({} if base is None else {_BASE: base})})
    described = copy.copy(model.peft_config[_NAME])
    described.inference_mode = True  # as peft writes it: who loads the folder decides whether to train it
    described.save_pretrained(str(folder))


def _peft() -> Any:
    quantized.import_quietly()  # peft imports it too, whatever it is asked for
    try:
        import peft
        import peft.functional
    except ImportError as error:
        raise ValueError(f"lora: the package peft is needed ({error}); pip install 'unlearn[lora]'") from None
    return peft
