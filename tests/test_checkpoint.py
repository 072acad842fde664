"""Checkpoints under kills, full disks and misuse."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from unlearn import checkpoint

ROOT = Path(__file__).resolve().parents[1]


def writer(text):
    def write(folder):
        (folder / "weights.bin").write_text(text)
        (folder / "nested").mkdir()
        (folder / "nested" / "optimizer.bin").write_text(text)

    return write


def content(folder):
    return (folder / "weights.bin").read_text(), (folder / "nested" / "optimizer.bin").read_text()


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_save_and_latest(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    assert checkpoint.latest(root) is None
    folder = checkpoint.save(root, 12, writer("a"))
    assert folder == root / "step-00000012" == checkpoint.latest(root)
    assert content(folder) == ("a", "a")
    assert names(root) == ["latest", "step-00000012"]


def test_keeps_the_newest(tmp_path):
    for step in (1, 2, 10, 11):
        checkpoint.save(tmp_path, step, writer(str(step)), keep=2)
    assert names(tmp_path) == ["latest", "step-00000010", "step-00000011"]
    checkpoint.save(tmp_path, 12, writer("12"))
    assert names(tmp_path) == ["latest", "step-00000012"]


def test_step_numbers_beyond_eight_digits_sort_as_numbers(tmp_path):
    checkpoint.save(tmp_path, 99_999_999, writer("a"), keep=2)
    checkpoint.save(tmp_path, 100_000_000, writer("b"), keep=2)
    checkpoint.save(tmp_path, 100_000_001, writer("c"), keep=1)
    assert names(tmp_path) == ["latest", "step-100000001"]


def test_other_files_in_the_root_are_left_alone(tmp_path):
    (tmp_path / "step-notes.txt").write_text("mine")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    checkpoint.save(tmp_path, 1, writer("a"))
    checkpoint.save(tmp_path, 2, writer("b"))
    assert names(tmp_path) == ["latest", "metrics.jsonl", "step-00000002", "step-notes.txt"]


def assert_first_survives(root):
    assert checkpoint.latest(root) == root / "step-00000001"
    assert content(root / "step-00000001") == ("first", "first")
    assert names(root) == ["latest", "step-00000001"]


@pytest.mark.parametrize(
    "error", [RuntimeError("no"), OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_a_failing_write_leaves_the_old_checkpoint(tmp_path, error):
    checkpoint.save(tmp_path, 1, writer("first"))

    def write(folder):
        (folder / "weights.bin").write_text("half")
        raise error

    with pytest.raises(type(error)):
        checkpoint.save(tmp_path, 2, write)
    assert_first_survives(tmp_path)
    checkpoint.save(tmp_path, 2, writer("second"))
    assert content(checkpoint.latest(tmp_path)) == ("second", "second")


def test_a_disk_that_fills_up_at_fsync_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    """Delayed allocation: write() succeeds and the error comes with fsync."""
    checkpoint.save(tmp_path, 1, writer("first"))

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "fsync", full)
        checkpoint.save(tmp_path, 2, writer("second"))
    assert_first_survives(tmp_path)


def run_python(script, *arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], env=environment, **options)


def test_kill_during_write(tmp_path):
    checkpoint.save(tmp_path, 1, writer("first"))
    script = """
import sys, time
from pathlib import Path
from unlearn import checkpoint

def write(folder):
    (folder / "weights.bin").write_text("half")
    print("writing", flush=True)
    time.sleep(60)

checkpoint.save(Path(sys.argv[1]), 2, write)
"""
    process = run_python(script, tmp_path, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert "tmp-step-00000002" in names(tmp_path)  # the kill came in time
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000001"
    checkpoint.save(tmp_path, 2, writer("second"))
    assert names(tmp_path) == ["latest", "step-00000002"]
    assert content(tmp_path / "step-00000002") == ("second", "second")


KILL_BEFORE_CALL = """
import os, signal, sys
from pathlib import Path
from unlearn import checkpoint

root, victim = Path(sys.argv[1]), int(sys.argv[2])
calls = 0

def deadly(function):
    def wrapped(*args, **kwargs):
        global calls
        calls += 1
        if calls == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped

for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
    setattr(os, name, deadly(getattr(os, name)))

def write(folder):
    (folder / "weights.bin").write_text("second")
    (folder / "nested").mkdir()
    (folder / "nested" / "optimizer.bin").write_text("second")

checkpoint.save(root, 2, write)
"""


def test_kill_before_any_change_of_the_disk(tmp_path):
    """Whatever call the kill comes before, the latest checkpoint is whole, first or second, and the next save works."""
    seen = []
    for victim in range(1, 100):
        root = tmp_path / str(victim)
        checkpoint.save(root, 1, writer("first"))
        code = run_python(KILL_BEFORE_CALL, root, victim).wait()
        folder = checkpoint.latest(root)
        seen.append(content(folder)[0])
        assert content(folder) == {"step-00000001": ("first",) * 2, "step-00000002": ("second",) * 2}[folder.name]
        checkpoint.save(root, 3, writer("third"))
        assert names(root) == ["latest", "step-00000003"]
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert code == 0
    assert victim > 10
    assert seen == sorted(seen)  # once switched, never back
    assert set(seen) == {"first", "second"}


def test_everything_is_synced_before_it_is_named(tmp_path, monkeypatch):
    events = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def record(name, function):
        def wrapped(*args):
            path = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else str(args[1])
            events.append((name, os.path.relpath(path, tmp_path)))
            return function(*args)

        return wrapped

    for name, function in (("fsync", fsync), ("rename", rename), ("replace", replace)):
        monkeypatch.setattr(os, name, record(name, function))
    checkpoint.save(tmp_path, 1, writer("a"))
    assert sorted(events[:5]) == [
        ("fsync", "tmp-latest"),
        ("fsync", "tmp-step-00000001"),
        ("fsync", "tmp-step-00000001/nested"),
        ("fsync", "tmp-step-00000001/nested/optimizer.bin"),
        ("fsync", "tmp-step-00000001/weights.bin"),
    ]
    assert events[5:] == [("rename", "step-00000001"), ("fsync", "."), ("replace", "latest"), ("fsync", ".")]


def test_a_folder_completed_but_never_named_is_replaced(tmp_path):
    checkpoint.save(tmp_path, 1, writer("first"))
    orphan = tmp_path / "step-00000002"
    orphan.mkdir()
    (orphan / "left-over").write_text("x")
    folder = checkpoint.save(tmp_path, 2, writer("second"))
    assert sorted(path.name for path in folder.iterdir()) == ["nested", "weights.bin"]


def test_going_back_is_refused(tmp_path):
    checkpoint.save(tmp_path, 5, writer("five"))
    for step in (5, 4):
        with pytest.raises(ValueError, match=f"step-00000005 is already the latest .* cannot save step {step}"):
            checkpoint.save(tmp_path, step, writer("again"))
    assert content(checkpoint.latest(tmp_path)) == ("five", "five")
    with pytest.raises(ValueError, match="keep=0"):
        checkpoint.save(tmp_path, 6, writer("six"), keep=0)


@pytest.mark.parametrize("pointer", ["step-00000009\n", "", "../elsewhere\n"])
def test_a_pointer_to_nothing_is_an_error_not_a_fresh_start(tmp_path, pointer):
    checkpoint.save(tmp_path, 1, writer("first"))
    (tmp_path / "latest").write_text(pointer)
    with pytest.raises(FileNotFoundError, match=r"latest names .* \(present: \['step-00000001'\]\)"):
        checkpoint.latest(tmp_path)


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_end_the_run(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, writer("first"))

    def busy(path, **options):
        raise OSError(errno.EBUSY, "busy")

    monkeypatch.setattr("shutil.rmtree", busy)
    with pytest.warns(UserWarning, match=r"could not delete the old checkpoint .*step-00000001"):
        folder = checkpoint.save(tmp_path, 2, writer("second"))
    assert checkpoint.latest(tmp_path) == folder


def test_truncate_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    checkpoint.truncate_lines(path, 0)
    assert not path.exists()
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"ste')
    checkpoint.truncate_lines(path, 24)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    checkpoint.truncate_lines(path, 12)
    assert path.read_bytes() == b'{"step": 1}\n'
    with pytest.raises(ValueError, match="byte 11 is not the end of a line"):
        checkpoint.truncate_lines(path, 11)
    with pytest.raises(ValueError, match="has 12 bytes, cannot cut it back to 13"):
        checkpoint.truncate_lines(path, 13)
    checkpoint.truncate_lines(path, 0)
    assert path.read_bytes() == b""
