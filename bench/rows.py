"""A measurement is a row: what was measured, and everything needed to place the number. One JSON object a line.

Imports torch alone: on a bare GPU machine the rest is looked at only where it is needed.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
ROOT = RESULTS.parent.parent.resolve()
# What decides a measurement's outcome; its digest places a row where there is no git.
_SOURCES = ("kernels/unlearn_kernels", "unlearn", "bench", "tests/kernels")


def environment() -> dict[str, Any]:
    """Commit (and whether the tree differs from it), imported tree, versions, device and command of this process.

    Without git the commit is $UNLEARN_COMMIT, or unknown, and so is whether the tree differs. Paths are relative to the
    repository, so that a row says which tree ran and not whose machine it was.
    """
    commit = _git("rev-parse", "--short=12", "HEAD")
    return {
        "commit": commit or os.environ.get("UNLEARN_COMMIT"),
        "dirty": None if commit is None else bool(_git("status", "--porcelain", "--untracked-files=no")),
        "imported": [os.path.relpath(_origin(name), ROOT) for name in ("unlearn", "unlearn_kernels")],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version_of("transformers"),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "command": " ".join(["python -m", "bench." + Path(sys.argv[0]).stem, *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
    }


def device_name(device: torch.device | None = None) -> str:
    """The GPU's name where there is one and `device` is not a CPU, else the processor's."""
    if (device is None or device.type == "cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    from unlearn.runfiles import cpu_name

    return cpu_name()


def version_of(distribution: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(distribution)
    return None


def source_digest() -> str:
    """Names the Python files that a measurement runs, committed or not."""
    digest = hashlib.blake2b(digest_size=8)
    for folder in _SOURCES:
        for path in sorted((ROOT / folder).glob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _origin(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return spec.origin


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def write(name: str, rows: Iterable[dict[str, Any]]) -> Path:
    """Replace bench/results/NAME.jsonl by these rows, whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.jsonl"
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(temporary, path)
    return path


def read(name: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The rows of FOLDER/NAME.jsonl; none where it does not exist."""
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class RowFile:
    """FOLDER/NAME.jsonl begun anew; each row is on its way to the disk when write returns, so a kill costs none.

    The last row has case "end": a file without one is of a part that was cut off. Closes as a context manager.
    """

    def __init__(self, folder: Path, name: str, shared: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.shared, self.start, self.failed, self.left_out = shared, time.monotonic(), 0, 0
        # One write call per line and O_APPEND: a killed process leaves whole lines.
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        self._descriptor = os.open(folder / f"{name}.jsonl", flags, 0o644)

    def write(self, row: dict[str, Any], *, failed: bool = False) -> None:
        self.failed += failed
        self.left_out += row.get("case") == "left_out"
        line = json.dumps(_finite(row | self.shared), allow_nan=False) + "\n"
        os.write(self._descriptor, line.encode())

    def __enter__(self) -> RowFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None:
            self.write({"case": "error", "message": first_line(error)}, failed=True)
        seconds = round(time.monotonic() - self.start, 1)
        self.write({"case": "end", "failed": self.failed, "left_out": self.left_out, "seconds": seconds})
        os.fsync(self._descriptor)
        os.close(self._descriptor)


def first_line(error: BaseException) -> str:
    """What a row keeps of an exception: its type and the first line of its message."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300]


def _finite(value: Any) -> Any:
    """NaN and infinities are not JSON: they become strings that a reader can see."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
