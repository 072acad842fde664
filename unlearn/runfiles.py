"""The files of a run: metrics.jsonl, checkpoints, the saved model, and where its numbers come from.

OUTPUT/metrics.jsonl     a header line (configuration, provenance), then a line per optimizer step
OUTPUT/checkpoints/      unlearn.checkpoint's numbered folders: weights (adapters alone where these are what is
                         trained), optimizer, step and length of metrics.jsonl
OUTPUT/model/            the final model as transformers loads it, or its adapter as peft does
OUTPUT/lock              held while a run is at work, see alone_in
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pickle
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_model as save_weights
from torch import nn

from unlearn import __version__, adapters, checkpoint, quantized
from unlearn.batches import Step
from unlearn.config import TrainConfig, coerce
from unlearn.engage import OFF, is_open
from unlearn.files import holding, naming
from unlearn.memory import is_out_of_memory

METRICS_FILE, MODEL_FOLDER, CHECKPOINT_FOLDER, LOCK_FILE = "metrics.jsonl", "model", "checkpoints", "lock"
_WEIGHTS, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.pt", "state.json"
# Settings that a resumed run may change: none of them reaches the weights.
_FREE_SETTINGS = (
    "output", "save_every", "reference_cache", "offload_checkpoints", "save_attention", "gpu_memory", "host_memory",
)  # fmt: skip
# What decides the last bit of a result on the same data and settings.
_BITWISE = ("torch", "transformers", "device", "threads", "quantization")


def to_json(row: dict[str, Any]) -> str:
    """One line. NaN is not JSON: a non-finite number becomes the string that a reader can see."""
    clean = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(clean, allow_nan=False)


class MetricsFile:
    """metrics.jsonl, open for appending; every line is flushed as it is written. Closes as a context manager.

    new: its header has just been written. Input that is refused before the first step leaves no file behind then, or
    the mended command would be told that the folder holds a run.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.new = path, False
        self._file = path.open("ab")

    def write(self, row: dict[str, Any]) -> None:
        self.new = False
        with naming(self.path):
            self._file.write(to_json(row).encode() + b"\n")
            self._file.flush()

    def sync(self) -> int:
        """Bytes safely on disk."""
        with naming(self.path):
            os.fsync(self._file.fileno())
            return self._file.tell()

    def cut(self, num_bytes: int) -> None:
        self._file.close()
        checkpoint.truncate_lines(self.path, num_bytes)
        self._file = self.path.open("ab")

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self.sync()
        finally:
            with contextlib.suppress(OSError) if kind is not None else naming(self.path):
                self._file.close()  # writes again what a full disk refused
            if self.new and kind is not None and issubclass(kind, ValueError):
                self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def alone_in(output: Path) -> Iterator[None]:
    """Holds the folder of a run, created where it is missing, against other runs; one that stays empty is removed.

    Raises ValueError for a folder that another run holds or that cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            if not output.exists():
                output.mkdir(parents=True)
                stack.callback(_remove_if_empty, output)
            stack.enter_context(holding(output / LOCK_FILE, "output"))
        except OSError as error:
            raise ValueError(f"output: {output} cannot be written ({error.strerror})") from None
        yield


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def open_output(output: Path, header: dict[str, Any], *, resume: bool, say: Callable[[str], None]) -> MetricsFile:
    """Begin metrics.jsonl with `header`, or open the run to resume after comparing it with `header`.

    Raises ValueError for a folder that is in use or cannot be written, and for a run of other settings or rows.
    """
    path = output / METRICS_FILE
    try:
        output.mkdir(parents=True, exist_ok=True)
        has_checkpoint = _latest(output) is not None
        first_line = b""
        if path.exists():
            with path.open("rb") as file:
                first_line = file.readline()
        if (first_line or has_checkpoint) and not resume:
            raise ValueError(f"output: {output} already holds a run; --resume continues it, or name another folder")
        if first_line.endswith(b"\n"):
            _check_same_run(first_line, header, path, say)
            return MetricsFile(path)
        if has_checkpoint:
            raise ValueError(f"resume: {output} has checkpoints and no {METRICS_FILE}; name another folder")
        path.unlink(missing_ok=True)  # a kill cut the header short: nothing had been done
        if resume:
            say(f"nothing to resume in {output}: starting")
        metrics = MetricsFile(path)
        try:
            metrics.write(header)
        except OSError:
            path.unlink()  # half a header would pass for a run
            raise
        metrics.new = True
        return metrics
    except OSError as error:
        raise ValueError(f"output: {output} cannot be written ({error.strerror})") from None


def is_finished(output: Path, config: dict[str, Any]) -> bool:
    """Whether the run in `output` did its last step and saved its model. Raises ValueError for other settings."""
    path = output / METRICS_FILE
    if not path.exists() or not (output / MODEL_FOLDER).is_dir():
        return False
    lines = path.read_bytes().splitlines()
    try:
        header = json.loads(lines[0])
        finished = bool(header["num_steps"] == json.loads(lines[-1])["step"])
        stored = dict(header["config"])
    except (ValueError, KeyError, IndexError, TypeError):
        return False  # resuming says what is wrong with it
    if finished:
        _check_same_settings(stored, config)
    return finished


def tidy(output: Path) -> None:
    """Removes what a kill in a finished run's last moment left. Raises ValueError while another process holds it."""
    with alone_in(output):
        checkpoint.remove_strays(output / CHECKPOINT_FOLDER)


def _latest(output: Path) -> Path | None:
    try:
        return checkpoint.latest(output / CHECKPOINT_FOLDER)
    except FileNotFoundError as error:  # its pointer names a folder that is gone
        raise ValueError(f"output: {error}") from None


def _check_same_run(line: bytes, now: dict[str, Any], path: Path, say: Callable[[str], None]) -> None:
    """Resuming under other settings or on other rows would give neither run's result."""
    try:
        stored = json.loads(line)
        config, provenance, data = stored["config"], stored["provenance"], stored["data"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"output: the first line of {path} is not a run's header; name another folder") from None
    _check_same_settings(config, now["config"])
    if data != now["data"]:
        raise ValueError("resume: the rows or their tokens are not those that the run began with")
    for name in _BITWISE:
        if provenance.get(name) != now["provenance"][name]:
            was, is_now = provenance.get(name), now["provenance"][name]
            say(f"resuming with {name} {is_now}, begun with {was}: the last bits may differ")


def as_begun(config: TrainConfig) -> TrainConfig:
    """`config` with the measures that it leaves open as the run in its output has them, whatever memory is free now.

    Raises ValueError where one that it names is another. A folder without a run is for open_output to judge.
    """
    try:
        with (Path(config.output) / METRICS_FILE).open("rb") as file:
            stored = dict(json.loads(file.readline())["config"])
        was = {name: coerce(name, _stood_at(stored, name)) for name in (*OFF, "optimizer", "optimizer_in_backward")}
    except (OSError, ValueError, KeyError, TypeError):
        return config
    left = [name for name in (*OFF, "optimizer") if is_open(config, name)]
    _check_same_settings(stored, {name: getattr(config, name) for name in OFF if name not in left})
    if "optimizer" in left and not config.optimizer_in_backward:
        left.append("optimizer_in_backward")
    return dataclasses.replace(config, **{name: was[name] for name in left})


def _stood_at(stored: dict[str, Any], name: str) -> Any:
    """A setting of a stored run. One that its version did not have stood at what is now its default, and a measure that
    could not be left open yet was off."""
    value = stored.get(name, getattr(TrainConfig, name, None))
    return OFF.get(name) if value is None else value


def _check_same_settings(stored: dict[str, Any], now: dict[str, Any]) -> None:
    for name, value in now.items():
        was = _stood_at(stored, name)
        if name not in _FREE_SETTINGS and was != value:
            raise ValueError(f"resume: {name} was {was!r} and is now {value!r}; they have to agree")


def save_checkpoint(
    output: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, metrics: MetricsFile
) -> None:
    """Raises OSError naming the file that could not be written, and leaves the checkpoint before as the latest."""

    def write(folder: Path) -> None:
        if trained := adapters.state(model):
            with naming(folder / adapters.WEIGHTS_FILE):
                save_file(trained, folder / adapters.WEIGHTS_FILE)
        else:
            with naming(folder / _WEIGHTS):
                save_weights(model, str(folder / _WEIGHTS))
        _save_optimizer(optimizer.state_dict(), folder / _OPTIMIZER)
        state = {"step": step, "metrics_bytes": metrics.sync()}
        with naming(folder / _STATE):
            (folder / _STATE).write_text(json.dumps(state))

    checkpoint.save(output / CHECKPOINT_FOLDER, step, write)


def _save_optimizer(state: dict[str, Any], path: Path) -> None:
    """torch.save by name: into a file of ours, a Ctrl-C would end in an abort of the process."""
    try:
        torch.save(state, path)
    except RuntimeError:  # "unexpected pos": torch's writer forgets why a write failed; the next write says it
        with naming(path), path.open("ab") as file:
            file.write(bytes(1 << 20))
        raise


def load_checkpoint(output: Path, model: nn.Module, optimizer: torch.optim.Optimizer, metrics: MetricsFile) -> int:
    """Steps done at the newest checkpoint, with model, optimizer and metrics set back to it; 0 where there is none.

    Raises ValueError naming a checkpoint that is damaged; metrics.jsonl is then as it was.
    """
    folder = _latest(output)
    if folder is None:
        with metrics.path.open("rb") as file:
            metrics.cut(len(file.readline()))
        return 0
    try:
        state = json.loads((folder / _STATE).read_text())
        step, num_bytes = int(state["step"]), int(state["metrics_bytes"])
        if step != checkpoint.step_of(folder):
            raise ValueError(f"{_STATE} is of step {step}")
        if adapters.layers(model):
            adapters.load_state(model, load_file(folder / adapters.WEIGHTS_FILE))
        else:
            load_weights(model, folder / _WEIGHTS)
        # Through the CPU: the file may come from another GPU, and the optimizer moves its states to its weights.
        # weights_only: a checkpoint may come from a stranger, and a pickle runs what it names.
        optimizer.load_state_dict(torch.load(folder / _OPTIMIZER, weights_only=True, map_location="cpu"))
        metrics.cut(num_bytes)
    except (OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, pickle.PickleError) as e:
        if is_out_of_memory(e):
            raise
        raise ValueError(
            f"resume: the checkpoint {folder} is damaged ({type(e).__name__}: {e}); name another --output, or delete "
            f"{folder.parent} to start over"
        ) from None
    return step


def save_pretrained(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """The model, or its adapters alone, and the tokenizer: on disk before they replace what `folder` held.

    A kill between the two renames leaves the earlier model beside it as .NAME.old; the run's resume writes it anew.
    """
    temporary, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed here
    try:
        with naming(folder):
            if adapters.layers(model):
                adapters.save(model, temporary)
            else:
                model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        checkpoint.fsync_tree(temporary)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        try:
            os.replace(temporary, folder)
        except BaseException:  # Ctrl-C too
            if old.exists():
                os.replace(old, folder)
            raise
        checkpoint.fsync_dir(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_broken_step(output: Path, step: Step, row: dict[str, Any]) -> Path:
    """The metrics and the sequences of a step whose loss or gradient was not finite, for a person to look into."""
    path = output / f"non-finite-step-{step.index + 1:06d}.json"
    batch = [
        {"key": s.key, "role": role.name, "input_ids": s.input_ids, "answer_start": s.answer_start}
        for group in step.groups
        for s, role in group
    ]
    with naming(path):
        path.write_text(f'{{"metrics": {to_json(row)}, "batch": {json.dumps(batch)}}}\n')
    return path


def provenance(model: nn.Module) -> dict[str, Any]:
    """What a reader needs to place a number: versions, device, threads, the commit and the imported path."""
    import transformers

    device = next(model.parameters()).device
    trained, whole = adapters.num_parameters(model)
    here = Path(__file__).resolve().parent
    return {
        "unlearn": __version__,
        "commit": _commit(here.parent),
        "imported_from": str(here),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "parameters": whole,
        "trained_parameters": trained,
        "lora": adapters.settings(model),
        "quantization": quantized.described(model),
        "command": " ".join(sys.argv),
    }


def cpu_name() -> str:
    """The processor's name with the instruction sets that matter here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = set(fields.get("flags", "").split()) & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}
    return f"{fields.get('model name', platform.machine())} ({', '.join(sorted(flags))})"


def _commit(root: Path) -> str | None:
    """The commit of the checkout at `root`; None for an installed copy, which may lie in a stranger's repository."""
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None
