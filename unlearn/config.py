"""What a run is: one frozen dataclass, read from a TOML file, a recipe and the command line, in that order of strength.

Values that decide the science (learning rate, epochs, batch, beta, seed) have no default: a recipe supplies them with
its source, or the user does. Checks that need no model live here, so that a typing error costs no loading time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unlearn.measures import GIB
from unlearn.recipes import RECIPES
from unlearn.sources import parse_fields

RETAIN_TERMS = ("none", "nll", "kl")
# What float32 can divide by and multiply with: beyond, a run would end in its first step.
_SMALLEST, _LARGEST = 1e-30, 1e30
BY_NEED = "auto"
OPTIMIZERS = ("adamw", "adamw-offload", "adamw-bf16", "adamw8bit", "adafactor", BY_NEED)
DTYPES = ("float32", "bfloat16")  # float16 weights would need a loss scale
_SIZES = {"": GIB, "GIB": GIB, "G": GIB, "GB": 10**9, "MIB": 1 << 20, "MB": 10**6, "TIB": 1 << 40}


def option(help_text: str, **kwargs: Any) -> Any:
    """A dataclass field that carries its own --help line."""
    return field(metadata={"help": help_text}, **kwargs)


@dataclass(frozen=True)
class TrainConfig:
    """One unlearning run. Every field is a command-line option and a key of the configuration file."""

    model: str = option("model to change: a folder (of a model or a LoRA adapter), or a name on the model hub")
    output: str = option("folder for checkpoints, metrics.jsonl and the final model")
    method: str = option("loss on the forget rows (see `unlearn train --list-methods`)")
    lr: float = option("peak learning rate")
    epochs: int = option("passes over the forget rows")
    batch_size: int = option("forget rows (or chosen/rejected pairs) per optimizer step")
    seed: int = option("seed of the data order, the retain draw, stochastic rounding and new adapters")
    forget: str | None = option(
        "rows to forget: a file (JSON lines, JSON, CSV, Parquet, .txt), a folder of .txt files, tofu:SPLIT or "
        "muse:CORPUS/SUBSET/SPLIT",
        default=None,
    )
    retain: str | None = option("rows to keep, from any of these", default=None)
    fields: str | None = option(
        "your own column names: question=COLUMN,answer=COLUMN or text=COLUMN,...; forget.text=COLUMN of one set alone",
        default=None,
    )
    window: int | None = option(
        "cut documents (.txt files, the text column) into windows of this many tokens (default: each is one window)",
        default=None,
    )
    alternates: str | None = option(
        "file of answers to prefer: the forget rows with `alternates` (altpo, simpo), or refusals, one a line or rows "
        "with `answer` (idkdpo, kto, kto-log)",
        default=None,
    )
    retain_term: str = option("loss on the retain rows: none, nll or kl", default="none")
    forget_weight: float = option("factor of the forget term", default=1.0)
    retain_weight: float = option("factor of the retain term", default=1.0)
    retain_per_forget: int = option("retain rows drawn for each forget row", default=1)
    beta: float | None = option("beta of npo, simnpo, altpo, idkdpo, kto, simpo, wga, satimp", default=None)
    beta2: float | None = option("second exponent of satimp", default=None)
    gamma: float | None = option(
        "margin of simnpo and simpo, outside beta (beta times open-unlearning's delta)", default=None
    )
    weight_decay: float = option("decoupled weight decay", default=0.01)
    warmup_epochs: float = option("epochs of linear warm-up; the rate then falls linearly to zero", default=1.0)
    max_grad_norm: float | None = option("clip the whole step's gradient to this norm", default=None)
    max_tokens: int = option("token budget of one packed forward and backward", default=4096)
    max_length: int | None = option("refuse longer sequences (default: what the model's positions allow)", default=None)
    skip_below: float = option(
        "leave out sequences whose gradient weight is below this share of their pack's largest", default=0.0
    )
    dtype: str = option("weights and activations: float32, or bfloat16 with stochastic rounding", default="bfloat16")
    device: str = option("cpu, cuda, cuda:1, ...; auto takes the GPU if there is one", default="auto")
    lora: int | None = option("train LoRA adapters of this rank and leave the model's weights alone", default=None)
    lora_alpha: int | None = option(
        "alpha of the adapters, which count alpha / rank times (default: 2 rank)", default=None
    )
    lora_targets: str | None = option(
        "linear layers that get an adapter, comma-separated (default: all-linear, which is all but the head)",
        default=None,
    )
    lora_4bit: bool = option(
        "QLoRA: under the adapters, hold the layers' matrices in 4 bits (nf4, double quantization, by bitsandbytes)",
        default=False,
    )
    lora_merge: bool = option("save the whole model with its adapters merged in, not the adapters", default=False)
    optimizer: str = option(
        "adamw, adamw-offload (the same with its states in host memory, GPU), adamw-bf16 (bf16 states), adamw8bit "
        "(torchao: 8-bit states), adafactor (nearly no states; lr is relative to a weight's size), or auto: by need "
        "adamw, adamw8bit or adamw-offload, then the last two inside the backward",
        default="adamw",
    )
    optimizer_in_backward: bool = option(
        "step each weight inside the backward and free its gradient: one micro-batch per step, no clipping",
        default=False,
    )
    gradient_checkpointing: bool | None = option(
        "recompute activations in the backward (default: by need, where there is a GPU or gpu_memory)", default=None
    )
    liger_kernels: bool = option(
        "liger-kernel's RMSNorm, rotation and SwiGLU in layers that are not tiled (GPU; llama, mistral, qwen2, qwen3, "
        "phi3)",
        default=False,
    )
    tile_tokens: int | None = option(
        "run decoder layers on this many tokens at a time, all but the attention, and recompute them (0: off; default: "
        "by need)",
        default=None,
    )
    save_attention: bool | None = option("with tile_tokens: keep attention outputs, recompute the rest", default=None)
    offload_checkpoints: str | None = option(
        "layers whose recomputation starts from inputs kept in host memory: a number, all, or auto, by need (the "
        "default)",
        default=None,
    )
    gpu_memory: str | None = option(
        "memory that measures left open have to make the run fit, such as 24, 80GB or 141GiB (default: the GPU's that "
        "no one else holds; on a CPU none, and then nothing is engaged)",
        default=None,
    )
    host_memory: str | None = option(
        "the same of the host, for layers' inputs and optimizer states (default: on a GPU four fifths of the "
        "machine's, otherwise not limited)",
        default=None,
    )
    save_every: int = option("optimizer steps between checkpoints (0: none before the end)", default=0)
    on_non_finite: str = option("stop or skip: what a NaN or inf loss or gradient does", default="stop")
    reference_cache: str | None = option(
        "folder for reference log-likelihoods (default: OUTPUT/reference)", default=None
    )
    trust_remote_code: bool = option("run the Python code that comes with the model", default=False)
    recipe: str | None = option("published settings to start from: " + ", ".join(RECIPES), default=None)

    def __post_init__(self) -> None:
        for name, (plain, _) in field_types().items():
            value = getattr(self, name)
            if plain is str and value == "":
                raise ValueError(f"{name}: an empty string is not accepted")
            if plain is str and value is not None and "\0" in value:
                raise ValueError(f"{name}: {value!r} is not accepted; a text without NUL is")
            if plain is int and value is not None and abs(value) >= 2**63:
                raise ValueError(f"{name}: {value!r:.40} is not accepted; a number of 64 bits is")
            if plain is float and value is not None and not math.isfinite(value):
                raise ValueError(f"{name}: {value} is not accepted; a finite number is")
            if plain is float and value and not _SMALLEST <= abs(value) <= _LARGEST:
                raise ValueError(f"{name}: {value} is not accepted; 0 and magnitudes of {_SMALLEST} to {_LARGEST} are")
        for name in (
            "lr", "epochs", "batch_size", "max_tokens", "retain_per_forget", "max_grad_norm", "max_length", "lora",
            "lora_alpha",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: {value} is not accepted; a number above 0 is")
        for name in ("weight_decay", "warmup_epochs", "forget_weight", "retain_weight", "save_every", "skip_below"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: {getattr(self, name)} is not accepted; a number of 0 or more is")
        if not 0 <= self.seed < 2**63:  # what torch's generators take
            raise ValueError(f"seed: {self.seed} is not accepted; 0 to 2**63 - 1 are")
        if self.skip_below >= 1:
            raise ValueError(f"skip_below: {self.skip_below} is not accepted; a share below 1 is")
        if self.window is not None and self.window < 2:  # the first token of a window is no label
            raise ValueError(f"window: {self.window} is not accepted; a number of 2 or more is")
        parse_fields(self.fields)
        _one_of("retain_term", self.retain_term, RETAIN_TERMS)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        for name in ("gpu_memory", "host_memory"):
            if (size := getattr(self, name)) is not None:
                parse_size(name, size)
        _one_of("on_non_finite", self.on_non_finite, ("stop", "skip"))
        for name in ("lora_alpha", "lora_targets", "lora_4bit", "lora_merge"):
            if self.lora is None and getattr(self, name):
                raise ValueError(f"{name}: given, but without lora (a rank) nothing would read it")
        if self.lora_4bit and self.lora_merge:
            raise ValueError(
                f"lora_merge: not accepted with lora_4bit; the run holds no {self.dtype} matrices to merge into, and"
                " rounded to 4 bits again most of the update would be lost. The adapter goes with the unquantized base"
                " wherever a model does"
            )
        self._check_long_context()
        if self.retain_term != "none" and self.retain is None:
            raise ValueError(f"retain: missing, and retain_term {self.retain_term} needs rows to keep")
        if self.retain is not None and self.retain_term == "none" and self.method != "finetune":
            raise ValueError("retain: given, but with retain_term none nothing would read it; nll and kl do")

    def _check_long_context(self) -> None:
        if self.tile_tokens is not None and self.tile_tokens < 0:
            raise ValueError(f"tile_tokens: {self.tile_tokens} is not accepted; a number of 0 or more is")
        if self.save_attention and not self.tile_tokens:
            raise ValueError("save_attention: given, but without tile_tokens nothing would read it")
        if self.liger_kernels and self.tile_tokens:
            raise ValueError(
                f"liger_kernels: not accepted with tile_tokens {self.tile_tokens}; a tiled layer keeps nothing that"
                " they would save"
            )
        wanted = self.offload_checkpoints
        if wanted not in (None, BY_NEED):
            if wanted != "all" and not (wanted.isascii() and wanted.isdigit()):
                raise ValueError(f"offload_checkpoints: {wanted!r} is not accepted; a number of layers, all, auto are")
            if wanted.strip("0") and self.gradient_checkpointing is False and not self.tile_tokens:
                raise ValueError(
                    f"offload_checkpoints: {wanted} given, but with gradient_checkpointing off and without tile_tokens"
                    " no layer is recomputed from its input"
                )
        if self.optimizer_in_backward and self.max_grad_norm is not None:
            raise ValueError(
                f"optimizer_in_backward: not accepted with max_grad_norm {self.max_grad_norm}; the whole gradient,"
                " whose norm that is, never exists"
            )
        if self.optimizer_in_backward and self.on_non_finite == "skip":
            raise ValueError(
                "optimizer_in_backward: not accepted with on_non_finite skip; weights have moved by the time that a"
                " gradient is seen to be broken"
            )

    @property
    def reference_dir(self) -> Path:
        return Path(self.reference_cache) if self.reference_cache else Path(self.output) / "reference"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def parse_size(name: str, text: str) -> float:
    """Bytes of a size such as 24 (GiB), 80GB (10**9 bytes) or 141GiB. Raises ValueError that begins with `name`."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) ?([A-Za-z]*)", text, re.ASCII)
    unit = _SIZES.get(found[2].upper()) if found else None
    if found is None or unit is None or not float(found[1]) > 0:
        raise ValueError(f"{name}: {text!r} is not accepted; a size such as 24, 80GB or 141GiB is")
    return float(found[1]) * unit


def _one_of(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name}: {value!r} is not accepted; {', '.join(accepted)} are")


@functools.cache
def field_types() -> dict[str, tuple[type, bool]]:
    """Name of each field -> (its plain type, whether None is allowed)."""
    result = {}
    for name, hint in typing.get_type_hints(TrainConfig).items():
        if isinstance(hint, types.UnionType):
            plain = next(arm for arm in hint.__args__ if arm is not type(None))
            result[name] = (plain, True)
        else:
            result[name] = (hint, False)
    return result


def coerce(name: str, value: Any) -> Any:
    """`value` as the type that field `name` has. Raises ValueError naming field, value and type."""
    if name not in field_types():
        raise ValueError(f"{name}: no such setting; known are {', '.join(field_types())}")
    plain, optional = field_types()[name]
    if value is None and optional:
        return None
    accepted = (int, float) if plain is float else plain
    if isinstance(value, bool) and plain is not bool or not isinstance(value, accepted):
        raise ValueError(f"{name}: {value!r} is not accepted; a value of type {plain.__name__} is")
    try:
        return plain(value)
    except OverflowError:  # an integer beyond float's range
        raise ValueError(f"{name}: {value!r:.40}... is not accepted; a finite number is") from None


def read_file(path: str | Path) -> dict[str, Any]:
    """The keys of a TOML configuration file. Raises ValueError naming the file and the unknown key."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"config: no file {path}") from None
    except OSError as error:
        raise ValueError(f"config: {path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, a number of 5000 digits, lists without end
        raise ValueError(f"config: {path} is not a TOML file: {error}") from None
    known = field_types()
    for name in values:
        if name not in known:
            raise ValueError(f"config: {path} has the unknown key {name!r}; known are {', '.join(known)}")
    return values


def build(*, recipe: str | None, file_values: Mapping[str, Any], overrides: Mapping[str, Any]) -> TrainConfig:
    """Recipe, then file, then command line: the later wins. Raises ValueError naming what is missing or wrong."""
    given = {key: coerce(key, value) for key, value in (dict(file_values) | dict(overrides)).items()}
    name = recipe if given.get("recipe") is None else given["recipe"]
    if name is not None and name not in RECIPES:
        raise ValueError(f"recipe: {name!r} is not accepted; {', '.join(RECIPES)} are")
    values: dict[str, Any] = dict(RECIPES[name].values) if name is not None else {}
    values |= given | {"recipe": name}
    required = [
        f.name
        for f in dataclasses.fields(TrainConfig)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [key for key in required if values.get(key) is None]
    if missing:
        options = ", ".join("--" + key.replace("_", "-") for key in missing)
        raise ValueError(f"missing: {options} (give them, or a --recipe that does)")
    return TrainConfig(**values)
