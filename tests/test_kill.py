"""Killed at any moment and resumed, a run ends as if nothing had happened: SIGKILL and Ctrl-C from outside."""

import json
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.processes import OUTSIDE, Fork, contents, cpu_seconds, run_forked
from tests.test_alternates import arguments as alternates_arguments
from tests.test_cli import FORGET, RETAIN, options
from tests.test_train import same_tree
from tests.tiny import tiny_llama, tiny_tokenizer, write_rows
from unlearn import checkpoint, cli, runfiles

NUM_STEPS, SAVE_EVERY = 6, 2
METHODS = {
    "npo": {"epochs": 3, "retain_term": "nll", "dtype": "bfloat16"},
    "altpo": {"epochs": 2, "batch_size": 4, "retain_term": "kl", "max_grad_norm": 1.0, "max_tokens": 100},
}
SYNC_SECONDS = 0.01  # on a slow disk; a checkpoint syncs seven times
ALTERNATES = {"batch_size": 1, "max_new_tokens": 3}


@pytest.fixture(scope="module", autouse=True)
def cheap_runs():
    """Runs write where fsync costs nothing: a process that is killed loses nothing of what it gave to the system. And
    they start no git, whose answer none of them is compared by."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runfiles, "_commit", lambda root: None)
        if os.access("/dev/shm", os.W_OK):
            patch.setattr(tempfile, "tempdir", "/dev/shm")
        yield


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a model and rows, where finished runs come to lie. Read only."""
    folder = tmp_path_factory.mktemp("files")
    tiny_llama(num_hidden_layers=1).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    write_rows(folder / "forget.jsonl", [row | {"alternates": ["At sea.", "Nobody knows."]} for row in FORGET])
    write_rows(folder / "retain.jsonl", RETAIN)
    return folder


def train_arguments(files, output, method):
    changes = {"save_every": SAVE_EVERY, "retain": files / "retain.jsonl"} | METHODS[method]
    return ["train", *options(files, output, method=method, **changes)]


@pytest.fixture(scope="module", params=METHODS)
def whole(request, files):
    """(method, output of an uninterrupted run, its seconds of processor time)"""
    output = files / f"whole-{request.param}"
    assert cli.main(train_arguments(files, output, request.param)) == 0
    assert len(steps(output)) == NUM_STEPS
    seconds = cpu_seconds(train_arguments(files, files / f"timed-{request.param}", request.param))
    assert_same_run(files / f"timed-{request.param}", output)
    return request.param, output, seconds


def steps(output):
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()[1:]]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def assert_same_run(output, expected):
    """Weights, optimizer, metrics but for their times; and no file that the uninterrupted run does not have."""
    assert same_tree(*(load_file(path / "model" / "model.safetensors") for path in (output, expected)))
    assert steps(output) == steps(expected)
    last = [checkpoint.latest(path / "checkpoints") for path in (output, expected)]
    assert last[0].name == last[1].name
    assert same_tree(*(torch.load(path / "optimizer.pt", weights_only=True) for path in last))
    assert same_tree(*(load_file(path / "model.safetensors") for path in last))
    # a kill may leave the temporary file of a reference, in a folder that processes may share
    ours = {name for name in contents(output) if not name.startswith("reference/.")}
    assert ours == set(contents(expected))


def slow_disk():
    """To run a child under: what it writes is open to a kill for a while before it gets its name."""
    fsync = os.fsync

    def slow(descriptor):
        time.sleep(SYNC_SECONDS)
        fsync(descriptor)

    os.fsync = slow


def unfinished_checkpoint(output):
    return any((output / "checkpoints").glob("tmp-*"))


def test_killed_at_random_moments(files, whole, folder):
    """20 kills of the two methods: most after a random part of the run's work, some once a checkpoint is begun."""
    method, expected, seconds = whole
    rng, kills, mid_checkpoint = random.Random(method), 0, 0
    for attempt in range(60):
        output = folder / str(attempt)
        arguments = train_arguments(files, output, method)
        aimed = attempt % 3 == 2
        with Fork(arguments, slow_disk if aimed else None) as fork:
            if aimed:
                wanted = f"step-{rng.randrange(SAVE_EVERY, NUM_STEPS, SAVE_EVERY):08d}"
                fork.wait_until((output / "checkpoints" / f"tmp-{wanted}").exists)
                time.sleep(rng.uniform(0, 7 * SYNC_SECONDS))
            else:
                fork.wait_for_cpu(rng.uniform(0, seconds))
            fork.send(signal.SIGKILL)
            ended = fork.wait()
        if ended.status != -signal.SIGKILL:
            assert ended.status == 0, ended.err  # it was faster
            continue
        kills += 1
        mid_checkpoint += unfinished_checkpoint(output)
        resumed = run_forked([*arguments, "--resume"])
        assert resumed.status == 0, resumed.err
        assert_same_run(output, expected)
        shutil.rmtree(output)
        if kills == 10:
            break
    assert kills == 10
    assert mid_checkpoint >= 1


def test_interrupted_at_random_moments(files, whole, folder):
    """Ctrl-C in the middle, of one method at any moment and of the other while a checkpoint is written: 130 and one
    line; then as after a kill."""
    method, expected, seconds = whole
    rng = random.Random(f"ctrl-c {method}")
    for attempt in range(20):
        output = folder / str(attempt)
        arguments = train_arguments(files, output, method)
        with Fork(arguments, slow_disk if method == "altpo" else None) as fork:
            if method == "altpo":
                fork.wait_until(lambda output=output: unfinished_checkpoint(output))
            else:
                fork.wait_for_cpu(rng.uniform(0, seconds))
            fork.send(signal.SIGINT)
            ended = fork.wait()
        if ended.status in (0, OUTSIDE):  # it was faster, or had not yet begun
            continue
        assert ended.status == 130, ended.err
        assert ended.line.startswith("stopped by Ctrl-C; --resume goes on")
        assert not unfinished_checkpoint(output)  # a Ctrl-C tidies up, which a kill cannot
        resumed = run_forked([*arguments, "--resume"])
        assert resumed.status == 0, resumed.err
        assert_same_run(output, expected)
        return
    raise AssertionError("no Ctrl-C came in time")


@pytest.mark.parametrize("whole", ["altpo"], indirect=True)
def test_a_resumed_run_killed_again_and_again(files, whole, folder):
    """Each life takes the run a little further, none starts over for good."""
    method, expected, seconds = whole
    arguments, rng = train_arguments(files, folder / "out", method), random.Random(5)
    for _ in range(2):
        with Fork([*arguments, "--resume"]) as fork:
            fork.wait_for_cpu(rng.uniform(0.3, 1) * seconds)
            fork.send(signal.SIGKILL)
            assert fork.wait().status in (0, -signal.SIGKILL)
    assert run_forked([*arguments, "--resume"]).status == 0
    assert_same_run(folder / "out", expected)


def stored(cache):
    """The files of a reference cache: name -> (metadata, tensors)."""
    found = {}
    for path in sorted(cache.iterdir()):
        if not path.name.startswith("."):  # a kill leaves its temporary file
            with safe_open(path, framework="pt") as file:
                found[path.name] = (file.metadata(), load_file(path))
    return found


@pytest.mark.parametrize("whole", ["altpo"], indirect=True)
def test_reference_killed_and_run_again(files, whole, folder):
    """The cache is whole or absent, and the next command goes on to the same bytes."""
    method, expected, _ = whole
    cache, rng = folder / "cache", random.Random(7)
    arguments = ["reference", *train_arguments(files, folder / "out", method)[1:], "--reference-cache", str(cache)]
    seconds = cpu_seconds(arguments)
    want = stored(expected / "reference")
    assert stored(cache).keys() == want.keys() and same_tree(stored(cache), want)
    for attempt in range(3):
        shutil.rmtree(cache)
        with Fork(arguments, slow_disk) as fork:
            if attempt % 2:
                fork.wait_until(lambda: cache.exists() and any(cache.iterdir()))
            else:
                fork.wait_for_cpu(rng.uniform(0.2, 1) * seconds)
            fork.send(signal.SIGKILL)
            fork.wait()
        cache.mkdir(exist_ok=True)
        there = stored(cache)
        assert same_tree(there, {name: want[name] for name in there})
        assert run_forked(arguments).status == 0
        assert same_tree(stored(cache), want)


def test_alternates_killed_and_resumed(files, folder):
    whole, rng = folder / "whole.jsonl", random.Random(3)
    assert cli.main(["alternates", *alternates_arguments(files, whole, **ALTERNATES)]) == 0
    seconds = cpu_seconds(["alternates", *alternates_arguments(files, folder / "timed.jsonl", **ALTERNATES)])
    wanted, kills = whole.read_bytes(), 0
    for attempt in range(20):
        path = folder / f"{attempt}.jsonl"
        arguments = ["alternates", *alternates_arguments(files, path, **ALTERNATES)]
        with Fork(arguments) as fork:
            if attempt % 2:
                size = rng.randrange(1, len(wanted))
                fork.wait_until(lambda path=path, size=size: path.exists() and path.stat().st_size >= size)
            else:
                fork.wait_for_cpu(rng.uniform(0.3, 1) * seconds)
            fork.send(signal.SIGKILL)
            if fork.wait().status == 0:
                continue
        assert not path.exists() or wanted.startswith(path.read_bytes())
        ended = run_forked([*arguments, "--resume"])
        assert ended.status == 0, ended.err
        assert path.read_bytes() == wanted
        kills += 1
        if kills == 2:
            break
    assert kills == 2


def test_what_a_finished_run_left_goes(files, whole, folder, capsys):
    """Killed while it deleted an old checkpoint, or between its last line and the end of the process."""
    method, expected, _ = whole
    shutil.copytree(expected, folder / "out")
    (folder / "out" / "lock").touch()
    (folder / "out" / "checkpoints" / "tmp-delete-step-00000002").mkdir()
    assert cli.main([*train_arguments(files, folder / "out", method), "--resume"]) == 0
    assert "is finished" in capsys.readouterr().out
    assert_same_run(folder / "out", expected)
    assert not list((folder / "out" / "checkpoints").glob("tmp-*"))
