"""Files that are replaced whole or not at all, folders that one run holds at a time, and errors that name the file."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing is held
    fcntl = None  # type: ignore[assignment]


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well: nobody sees half a file."""
    path = Path(path)
    with naming(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        try:
            yield Path(name)
            # mkstemp files are private; a report is as readable as any other file the user creates.
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(name, 0o666 & ~umask)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """What goes wrong while `path` is written becomes an OSError that names it.

    The system's own errors of a write name no file, and torch and safetensors raise RuntimeError and SafetensorError.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError | SafetensorError):
            cause = cause.__context__  # torch complains of its archive and leaves the reason behind
        if cause is None or getattr(cause, "filename", None) is not None:
            raise
        number = cause.errno if isinstance(cause, OSError) else _os_error(str(cause))
        reason = str(cause) if number is None else os.strerror(number)
        raise OSError(number or errno.EIO, reason, os.fspath(path)) from None


def _os_error(message: str) -> int | None:
    """The number in Rust's "No space left on device (os error 28)"."""
    found = re.search(r"\(os error (\d+)\)", message)
    return int(found[1]) if found else None


def check_writable(name: str, folder: Path) -> None:
    """Creates `folder` and, for a moment, a file in it, before hours of work want to write there.

    Raises ValueError naming the option `name`, the folder and the reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{name}: {folder} cannot be written ({error.strerror})") from None


@contextmanager
def holding(path: Path, name: str) -> Iterator[None]:
    """Holds the file `path`, created where it is missing, against every other process that asks for it here.

    The kernel lets go when the process ends, however it ends: a killed run leaves nothing in the way of its resume. A
    file that is empty at the end is removed. Where the file system knows no such lock, nothing is held.
    Raises ValueError naming the option `name` and the path if another process holds it.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(
                f"{name}: another process is at work on it (it holds {path}); wait for its end, or name another {name}"
            ) from None
        except OSError:
            pass
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)  # the holder before us removed it between our opening and our lock
    try:
        yield
    finally:
        if os.fstat(descriptor).st_size == 0:
            path.unlink(missing_ok=True)
        os.close(descriptor)
