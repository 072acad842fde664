"""Numbered checkpoint folders that are either whole or absent, whatever moment the process or the machine dies at.

    root/step-00000012/   a complete checkpoint, on disk before it got this name
    root/latest           text: the name of the folder to resume from, replaced atomically
    root/tmp-*            being written or being deleted; left behind by a kill, removed by the next save

One process writes to a root at a time. POSIX file systems: rename is atomic, and a folder can be fsynced.
"""

import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

_STEP_FOLDER = re.compile(r"step-(\d{8,})")
_POINTER = "latest"


def save(root: Path, step: int, write: Callable[[Path], None], *, keep: int = 1) -> Path:
    """Runs write(folder) on a new empty folder, makes it the latest checkpoint of `step`, and returns its final path.

    keep: how many of the newest checkpoints stay, this one included; older ones are deleted after the switch.
    If `write` or the disk fails, the exception passes through, the unfinished folder is removed and the old checkpoint
    stays the latest.

    Raises ValueError if keep < 1, or if the root's latest checkpoint is at `step` or beyond: a fresh run in the folder
    of an older one would delete what it holds.
    """
    if keep < 1 or step < 0:
        raise ValueError(f"keep must be at least 1 and step at least 0, got {keep=} {step=}")
    current = latest(root)
    if current is not None and step_of(current) >= step:
        raise ValueError(f"{current} is already the latest checkpoint, cannot save step {step} after it")
    root.mkdir(parents=True, exist_ok=True)
    remove_strays(root)
    folder = root / f"step-{step:08d}"
    unfinished, pointer = root / f"tmp-{folder.name}", root / f"tmp-{_POINTER}"
    if folder.exists():  # complete, but a kill came before the pointer named it
        _delete(folder)
    try:
        unfinished.mkdir()
        write(unfinished)
        fsync_tree(unfinished)
        # everything that takes space comes before the first rename
        pointer.write_text(folder.name + "\n")
        _fsync(pointer)
        os.rename(unfinished, folder)
        fsync_dir(root)  # the folder's name must be on disk before a pointer to it
        os.replace(pointer, root / _POINTER)
        fsync_dir(root)
    except BaseException:
        remove_strays(root)
        raise
    _prune(root, step, keep)
    return folder


def latest(root: Path) -> Path | None:
    """The folder to resume from, or None where no checkpoint was completed.

    Raises FileNotFoundError if the pointer file names a folder that is not there: something else deleted it, and
    starting over silently would throw the run away.
    """
    try:
        name = (root / _POINTER).read_text(errors="replace").strip()
    except FileNotFoundError:
        return None
    folder = root / name
    # a link would lead out of the root, and could not be deleted as the folder that it seems to be
    if not _STEP_FOLDER.fullmatch(name) or not folder.is_dir() or folder.is_symlink():
        present = sorted(f.name for f in _step_folders(root)) or "none"
        raise FileNotFoundError(
            f"{root / _POINTER} names {name!r}, which is not a checkpoint folder there (present: {present}); "
            f"write the name of a good one into the file, or delete the file to start over"
        )
    return folder


def truncate_lines(path: Path, num_bytes: int) -> None:
    """Cuts a file of lines back to its first num_bytes bytes, the size it had at a checkpoint, and syncs it.

    A missing file is one of size 0. Raises ValueError if the file is shorter than that, or if the cut is not the end of
    a line: then it is not the file that the checkpoint was taken with.
    """
    size = path.stat().st_size if path.exists() else 0
    if not 0 <= num_bytes <= size:
        raise ValueError(f"{path} has {size} bytes, cannot cut it back to {num_bytes}")
    if size == 0:
        return
    with path.open("r+b") as file:
        if num_bytes > 0:
            file.seek(num_bytes - 1)
            if file.read(1) != b"\n":
                raise ValueError(f"{path}: byte {num_bytes} is not the end of a line")
        file.truncate(num_bytes)
        os.fsync(file.fileno())


def fsync_dir(path: Path) -> None:
    """Waits until the names in a folder (creations, renames) are on disk."""
    _fsync(path, os.O_DIRECTORY)


def _fsync(path: Path, flags: int = 0) -> None:
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            _fsync(Path(folder, name))
        fsync_dir(Path(folder))


def _step_folders(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if _STEP_FOLDER.fullmatch(path.name)]


def step_of(folder: Path) -> int:
    """The step that a checkpoint folder's name says."""
    return int(folder.name.removeprefix("step-"))


def _prune(root: Path, step: int, keep: int) -> None:
    """Deletes all numbered folders but the newest `keep` up to `step`; one beyond it was never pointed to."""
    candidates = [folder for folder in _step_folders(root) if step_of(folder) <= step]
    kept = sorted(candidates, key=step_of)[-keep:]
    for folder in _step_folders(root):
        if folder not in kept:
            try:
                _delete(folder)
            except OSError as error:  # the new checkpoint is safe: an old one that stays must not end the run
                warnings.warn(f"could not delete the old checkpoint {folder}: {error}", stacklevel=3)


def _delete(folder: Path) -> None:
    """Takes the name away first, so that a kill half-way leaves no numbered folder with files missing."""
    doomed = folder.with_name(f"tmp-delete-{folder.name}")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def remove_strays(root: Path) -> None:
    """What a kill left half-written or half-deleted."""
    for path in root.glob("tmp-*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
