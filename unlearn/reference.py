"""The frozen reference, computed once: one log-likelihood per sequence, or hidden states for KL retain.

No second model is resident while training. The stored values carry an identity (model, tokenizer, code path); a cache
of another identity, or one that lacks a sequence, is refused with the difference.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from unlearn import adapters
from unlearn.attention import ATTENTION
from unlearn.data import Sequence
from unlearn.files import check_writable, replacing
from unlearn.model import head_of
from unlearn.scoring import Progress, forward, score, unique
from unlearn_kernels import backends

LOGPROB_FILE = "reference.safetensors"
HIDDEN_FILE = "reference-hidden.safetensors"
# Nats per sequence and square root of its tokens by which the same sequence may differ between packs of different
# composition (measured: 5e-3 in bf16, 5e-7 in float32, for sequences of about a hundred tokens), with a margin.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# Of a model's configuration, what changes no value (the dtype has its own line in the identity).
_NOT_THE_FUNCTION = ("_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype", "architectures")


def identity(model: nn.Module, tokenizer: Any) -> dict[str, str]:
    """What the reference values depend on beside the sequences: model, tokenizer, template and code path."""
    weights = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(adapters.function_state(model).items()):
        weights.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        weights.update(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
    # what the weights do not say: rotary base, windows, scales
    config = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_THE_FUNCTION}
    parameter = next(model.parameters())
    return {
        "model": weights.hexdigest(),
        "model configuration": _digest(config),
        **_text_identity(tokenizer),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
        "attention": ATTENTION,
        "kernels": backends.choose(parameter, head_of(model).weight, None).name,
        "format": "1",
    }


def _text_identity(tokenizer: Any) -> dict[str, str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    words = {key: value for key, value in words.items() if key not in ("truncation", "padding")}  # of the last call
    return {"tokenizer": _digest(words), "chat template": _digest(getattr(tokenizer, "chat_template", None))}


def look(path: Path, tokenizer: Any, dtype: str, sequences: Iterable[Sequence]) -> str | None:
    """What a run would find at `path`, as far as it can be said without the weights: None for nothing, "complete", or
    why it would be refused."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        _check_identity(path, metadata, {**_text_identity(tokenizer), "dtype": dtype})
        _check_present(path, unique(sequences), _listed(metadata, "keys"))
    except (SafetensorError, OSError) as error:
        return _damaged(path, str(error))
    except ValueError as error:
        return str(error)
    return "complete"


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class ReferenceTable:
    """content_key -> log-likelihood in nats; `origin` says whether it was computed or loaded."""

    logprobs: dict[str, float]
    origin: str


def load_or_compute(
    model: nn.Module,
    tokenizer: Any,
    sequences: Iterable[Sequence],
    directory: Path,
    *,
    max_tokens: int,
    progress: Progress | None = None,
) -> ReferenceTable:
    """The reference log-likelihoods of these sequences under this (unchanged) model, from the cache if there is one.

    Raises ValueError naming the difference when the cache in `directory` is another model's, tokenizer's or code
    path's, or lacks a sequence.
    """
    wanted = unique(sequences)
    path = directory / LOGPROB_FILE
    own = identity(model, tokenizer)
    if path.exists():
        table = read(path, own)
        _check_present(path, wanted, table)
        return ReferenceTable(table, "loaded")
    check_writable("reference_cache", directory)
    values = score(model, wanted, max_tokens=max_tokens, progress=progress)
    table = {sequence.content_key: value for sequence, value in zip(wanted, values, strict=True)}
    write(path, table, own)
    return ReferenceTable(table, "computed")


def write(path: Path, table: dict[str, float], own: dict[str, str]) -> None:
    """Store a table under its identity, whole or not at all."""
    keys = sorted(table)
    tensors = {"logprob": torch.tensor([table[key] for key in keys], dtype=torch.float64)}
    _save(path, tensors, own | {"keys": ",".join(keys), "checksum": _checksum(tensors["logprob"])})


def _checksum(tensor: Tensor) -> str:
    return hashlib.blake2b(tensor.numpy().tobytes(), digest_size=16).hexdigest()


def read(path: Path, own: dict[str, str]) -> dict[str, float]:
    """A stored table. Raises ValueError naming the file and the first difference from `own`."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata, logprob = file.metadata() or {}, file.get_tensor("logprob")
    except (SafetensorError, OSError) as error:
        raise ValueError(_damaged(path, str(error))) from None
    _check_identity(path, metadata, own)
    keys = _listed(metadata, "keys")
    if len(keys) != len(logprob) or metadata.get("checksum") != _checksum(logprob):
        raise ValueError(_damaged(path, "its values are not those that were written"))
    return dict(zip(keys, logprob.tolist(), strict=True))


def _listed(metadata: dict[str, str], name: str) -> list[str]:
    return metadata[name].split(",") if metadata.get(name) else []


def _check_present(path: Path, wanted: list[Sequence], stored: Collection[str]) -> None:
    missing = sum(sequence.content_key not in stored for sequence in wanted)
    if missing:
        raise ValueError(_refusal(path, f"data ({missing} of {len(wanted)} sequences are not in it)"))


def _check_identity(path: Path, metadata: dict[str, str], own: dict[str, str]) -> None:
    for name, value in own.items():
        if metadata.get(name) != value:
            raise ValueError(_refusal(path, f"{name} (stored {metadata.get(name)}, now {value})"))


def _refusal(path: Path, difference: str) -> str:
    return f"reference_cache: {path} is of another {difference}; delete it or give another --reference-cache"


def _damaged(path: Path, reason: str) -> str:
    return f"reference_cache: {path} is damaged ({reason}); delete it or give another --reference-cache"


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())


def tolerance(batch_lengths: Iterable[int], dtype: torch.dtype) -> Tensor:
    """[B] nats by which stored and fresh log-likelihoods of these sequences may differ."""
    return TOLERANCE.get(dtype, 1e-6) * torch.tensor(list(batch_lengths), dtype=torch.float64).sqrt()


class ReferenceHidden:
    """The reference's last hidden states at the retain answer positions and its head, for KL retain.

    Costs: a file of (answer tokens x H) values, read through a memory map, and one V x H matrix beside the model, none
    where the head is frozen, which is then its own reference; `cost()` says both in bytes. The reference model itself
    is not kept.

    A head with a bias is stored as one without: linear_kl takes none for the reference, so the bias becomes columns of
    the weight, against ones in the hidden states.
    """

    def __init__(self, path: Path, weight: Tensor, spans: dict[str, tuple[int, int]], *, resident: int) -> None:
        """weight [V, H'], `resident` bytes of it the reference's own; spans: content_key -> first and last + 1 row of
        the file's hidden [rows, H']."""
        self.weight = weight
        self._path, self._spans, self._resident = path, spans, resident
        self._file = safe_open(path, framework="pt")
        self._rows = self._file.get_slice("hidden")

    @staticmethod
    @torch.no_grad()
    def load_or_compute(
        model: nn.Module,
        tokenizer: Any,
        sequences: Iterable[Sequence],
        directory: Path,
        *,
        max_tokens: int,
        progress: Progress | None = None,
    ) -> ReferenceHidden:
        """Compute and store the hidden states, or open a file of the same identity that holds these sequences.

        Raises ValueError as `load_or_compute` does.
        """
        wanted = unique(sequences)
        own = identity(model, tokenizer)
        head = head_of(model)
        if head.lora is not None and bool(head.lora[1].any()):
            raise ValueError("retain_term: kl is not accepted where the model's adapter has changed its head")
        weight, resident = head.weight.detach(), 0
        if needs_own_head(head.weight, head.bias):
            weight = _with_bias_columns(weight, head.bias)
            resident = weight.numel() * weight.element_size()
        path = directory / HIDDEN_FILE
        if path.exists():
            spans = _read_spans(path, own, weight)
            _check_present(path, wanted, spans)
            return ReferenceHidden(path, weight, spans, resident=resident)
        check_writable("reference_cache", directory)
        lengths = [sequence.num_answer_tokens for sequence in wanted]
        stored = torch.empty(sum(lengths), weight.shape[1], dtype=weight.dtype)
        done = 0
        for _, hidden in forward(wanted, model, max_tokens, progress):
            stored[done : done + len(hidden), : hidden.shape[1]] = hidden.cpu()
            done += len(hidden)
        if head.bias is not None:
            _fill_bias_ones(stored, head.weight.shape[1])
        keys = [sequence.content_key for sequence in wanted]
        _save(path, {"hidden": stored}, own | {"keys": ",".join(keys), "lengths": ",".join(map(str, lengths))})
        return ReferenceHidden(path, weight, _spans(keys, lengths), resident=resident)

    def rows(self, sequences: Iterable[Sequence]) -> Tensor:
        """[M, H']: the stored states of these sequences, one after the other, on the head's device."""
        parts = [self._rows[slice(*self._spans[sequence.content_key])] for sequence in sequences]
        return torch.cat(parts).to(self.weight.device, non_blocking=True)

    def cost(self) -> tuple[int, int]:
        """(bytes on disk, bytes resident)."""
        return self._path.stat().st_size, self._resident


def needs_own_head(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the reference's head is a matrix of its own: the policy's is about to change, or has a bias."""
    return weight.requires_grad or bias is not None


# Columns that a bias takes: one would do, eight keep rows aligned for the matrix units.
_BIAS_COLUMNS = 8


def _with_bias_columns(weight: Tensor, bias: Tensor | None) -> Tensor:
    """A copy of weight [V, H], beside it bias [V] and zeros where there is a bias."""
    if bias is None:
        return weight.clone()
    columns = weight.new_zeros(len(weight), _BIAS_COLUMNS)
    columns[:, 0] = bias.detach()
    return torch.cat([weight, columns], 1)


def _fill_bias_ones(hidden: Tensor, width: int) -> None:
    hidden[:, width:] = 0.0
    hidden[:, width] = 1.0


def _spans(keys: list[str], lengths: list[int]) -> dict[str, tuple[int, int]]:
    ends = list(itertools.accumulate(lengths))
    return {key: (end - length, end) for key, length, end in zip(keys, lengths, ends, strict=True)}


def _read_spans(path: Path, own: dict[str, str], weight: Tensor) -> dict[str, tuple[int, int]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata, rows = file.metadata() or {}, file.get_slice("hidden")
            shape = tuple(rows.get_shape())
    except (SafetensorError, OSError) as error:
        raise ValueError(_damaged(path, str(error))) from None
    _check_identity(path, metadata, own)
    keys, lengths = _listed(metadata, "keys"), [int(length) for length in _listed(metadata, "lengths")]
    if len(keys) != len(lengths) or shape != (sum(lengths), weight.shape[1]):
        raise ValueError(_damaged(path, f"{shape} hidden states for {len(keys)} sequences"))
    return _spans(keys, lengths)
