"""A measurement is a row: what was measured, and everything needed to place the number. One JSON object a line."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from unlearn.runfiles import cpu_name

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Commit (and whether the tree differs from it), imported tree, versions, device and command of this process.

    Paths are relative to the repository, so that a row says which tree ran and not whose machine it was.
    """
    import transformers

    import unlearn
    import unlearn_kernels

    root = RESULTS.parent.parent.resolve()
    return {
        "commit": _git(root, "rev-parse", "--short=12", "HEAD"),
        "dirty": bool(_git(root, "status", "--porcelain", "--untracked-files=no")),
        "imported": [os.path.relpath(str(module.__file__), root) for module in (unlearn, unlearn_kernels)],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "threads": torch.get_num_threads(),
        "command": " ".join(["python -m", "bench." + Path(sys.argv[0]).stem, *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
    }


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30)
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


def read(name: str) -> list[dict[str, Any]]:
    """The rows of bench/results/NAME.jsonl; none where it does not exist."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
