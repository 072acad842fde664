"""What can go wrong, provoked through the command line: one line that names it, and nothing lost or half-written.

Full disks are a limit on the size of a file (a write beyond it fails with EFBIG) and, where one can be mounted, a tmpfs
that is full (ENOSPC).
"""

import ctypes
import errno
import fcntl
import json
import os
import pickle
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.processes import Fork, contents, largest_file, more_memory, run_forked
from tests.test_alternates import arguments as alternates_arguments
from tests.test_cli import FORGET, RETAIN, edit, eval_options, options, refused
from tests.tiny import save_tiny, tiny_llama, tiny_tokenizer, write_rows
from unlearn import cli, reference
from unlearn import files as own_files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a model, rows and `whole`, the output of a run of four steps. Read only."""
    folder = tmp_path_factory.mktemp("files")
    save_tiny(folder / "model")
    write_rows(folder / "forget.jsonl", FORGET)
    write_rows(folder / "retain.jsonl", RETAIN)
    assert cli.main(train(folder, folder / "whole")) == 0
    return folder


def train(files, output, **changes):
    return ["train", *options(files, output, **{"save_every": 1} | changes)]


def evaluate(files, **changes):
    return ["eval", *eval_options(files, **changes)]


def alternates(files, output, **changes):
    return ["alternates", *alternates_arguments(files, output, **changes)]


def ending(output):
    """What a run leaves, times aside: weights, optimizer and the rows of metrics."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()[1:]]
    optimizer = torch.load(output / "checkpoints" / "step-00000003" / "optimizer.pt", weights_only=True)
    return (
        {name: value.tolist() for name, value in load_file(output / "model" / "model.safetensors").items()},
        [(state["step"], state["exp_avg"].tolist()) for state in optimizer["state"].values()],
        [{name: value for name, value in row.items() if name != "seconds"} for row in rows],
    )


# --------------------------------------------------------------------------------------------------------- what is read


def test_a_tokenizer_with_more_tokens_than_the_model(files, tmp_path, capsys):
    model = tmp_path / "model"
    tiny_llama(vocab=260).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    output = tmp_path / "out"
    for arguments in (
        train(files, output, model=model),
        train(files, output, model=model, method="ga", beta=None),
        ["reference", *options(files, output, model=model)],
        evaluate(files, model=model),
        alternates(files, output / "alternates.jsonl", model=model),
    ):
        message = refused(capsys, arguments)
        assert message.startswith("model: forget:"), arguments
        assert message.endswith("has the token 319, and the model knows 0 to 259; its tokenizer is of another model")
        assert not output.exists() or not contents(output)


ROWS = {
    "not JSON": (b"{oops\n", "not JSON: "),
    "other columns": (b'{"title": "Who?", "body": "I."}\n', "are accepted; this row has title, body"),
    "a number too long": (b'{"key": ' + b"1" * 5000 + b"}\n", "integer string conversion"),
    "lists without end": (b"[" * 200_000 + b"\n", "nested too deeply"),
    "not UTF-8": (b'{"question": "\xff"}\n', "not UTF-8 text"),
    "half a character": (b'{"question": "\\ud800", "answer": "I."}\n', "half of a surrogate pair"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_broken_row_wherever_rows_are_read(files, tmp_path, capsys, name):
    line, reason = ROWS[name]
    path, output = tmp_path / "rows.jsonl", tmp_path / "out"
    path.write_bytes(json.dumps(FORGET[0] | {"alternates": ["No."]}).encode() + b"\n" + line)
    everywhere = [
        train(files, output, forget=path),
        train(files, output, retain=path, retain_term="nll"),
        train(files, output, method="altpo", alternates=path),
        ["reference", *options(files, output, forget=path)],
        evaluate(files, holdout=path),
        alternates(files, output, forget=path),
    ]
    # one reader serves them all, so that each kind of damage need not go through each command
    for arguments in everywhere if name == "not JSON" else everywhere[:1]:
        message = refused(capsys, arguments)
        assert message.startswith(f"{path}:2: ") and reason in message
        assert not output.exists()


def test_nothing_left_to_learn_changes_nothing(files, tmp_path):
    """No label counts: the loss is 0, its gradients are zeros and no NaN."""
    assert cli.main(train(files, tmp_path / "out", forget_weight=0, weight_decay=0)) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[1:]]
    assert [(row["loss"], row["grad_norm"]) for row in rows] == [(0.0, 0.0)] * 4
    before, after = (load_file(folder / "model" / "model.safetensors") for folder in (files, tmp_path / "out"))
    assert all(torch.equal(before[name], after[name]) for name in before)


# ------------------------------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize("kind", ["below a file", "there and closed"])
@pytest.mark.parametrize("command", ["train", "cache", "reference", "log", "alternates"])
def test_a_folder_that_cannot_be_written(files, tmp_path, capsys, monkeypatch, command, kind):
    """Said before the work: none of these computes a log-likelihood or an answer. /proc takes no file from anyone."""

    def worked(*args, **kwargs):
        raise AssertionError("too late")

    monkeypatch.setattr("unlearn.scoring.hidden_states", worked)
    monkeypatch.setattr("unlearn.train.hidden_states", worked)
    (tmp_path / "file").write_text("")
    there = tmp_path / "file" / "nothing" if kind == "below a file" else Path("/proc")
    option, arguments = {
        "train": ("output", train(files, there)),
        "cache": ("reference_cache", train(files, tmp_path / "out", reference_cache=there)),
        "reference": ("reference_cache", ["reference", *options(files, tmp_path / "out", reference_cache=there)]),
        "log": ("log", evaluate(files, log=there / "log.json")),
        "alternates": ("output", alternates(files, there / "alternates.jsonl")),
    }[command]
    message = refused(capsys, arguments)
    assert message.startswith(f"{option}: {there} cannot be written (")


def half(path):
    return path.stat().st_size // 2


# the limit of a file's size, the file that it stops
VICTIMS = {
    "the header": lambda whole: (200, "out cannot be written"),
    "a line of metrics": lambda whole: (len((whole / "metrics.jsonl").read_bytes()) - 20, "metrics.jsonl"),
    "the weights": lambda whole: (half(whole / "model" / "model.safetensors"), "model.safetensors"),
    "the optimizer": lambda whole: ((whole / "model" / "model.safetensors").stat().st_size + 9000, "optimizer.pt"),
}


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_file_that_cannot_grow(files, tmp_path, victim):
    output = tmp_path / "out"
    limit, name = VICTIMS[victim](files / "whole")
    # no checkpoint is in the way of the metrics
    arguments = train(files, output, save_every=0 if victim == "a line of metrics" else 1)
    ended = run_forked(arguments, largest_file(limit))
    assert ended.status == (2 if victim == "the header" else 1)
    assert name in ended.line and "File too large" in ended.line and str(output) in ended.line
    assert not (output / "model").exists() and not list(output.rglob("tmp-*")) and not list(output.rglob(".*"))
    again = train(files, output) if victim == "the header" else [*train(files, output), "--resume"]
    assert run_forked(again).status == 0
    assert ending(output) == ending(files / "whole")


def test_a_model_that_cannot_be_saved(files, tmp_path):
    """The last checkpoint stays, and its resume saves the model."""
    output = tmp_path / "out"
    arguments = train(files, output, save_every=3)
    with Fork(arguments) as fork:
        assert fork.wait_until((output / "checkpoints" / "latest").exists)
        fork.send(signal.SIGKILL)
        fork.wait()
    ended = run_forked([*arguments, "--resume"], largest_file(half(files / "model" / "model.safetensors")))
    assert ended.status == 1 and ended.line == f"{output / 'model'}: File too large"
    assert not (output / "model").exists() and not list(output.glob(".*"))
    assert run_forked([*arguments, "--resume"]).status == 0
    assert ending(output) == ending(files / "whole")


def test_other_files_that_cannot_grow(files, tmp_path):
    cache, log, made = tmp_path / "cache", tmp_path / "log.json", tmp_path / "alternates.jsonl"
    ended = run_forked(["reference", *options(files, tmp_path / "out", reference_cache=cache)], largest_file(300))
    assert ended.status == 1 and ended.line == f"{cache / 'reference.safetensors'}: File too large"
    assert list(cache.iterdir()) == []
    ended = run_forked([*evaluate(files, log=log), "--json"], largest_file(300))
    assert ended.status == 1 and ended.line == f"{log}: File too large"
    assert not list(tmp_path.glob("*log*"))
    # what was measured is printed all the same; the limit holds for this output, too
    assert ended.out.startswith("{")
    whole = tmp_path / "whole.jsonl"
    assert run_forked(alternates(files, whole, batch_size=1)).status == 0
    limit = half(whole)
    ended = run_forked(alternates(files, made, batch_size=1), largest_file(limit))
    assert ended.status == 1 and ended.line == f"{made}: File too large"
    assert whole.read_bytes().startswith(made.read_bytes())
    assert run_forked([*alternates(files, made, batch_size=1), "--resume"]).status == 0
    assert made.read_bytes() == whole.read_bytes()


def mount(folder, kibibytes, *, again=False):
    """A tmpfs of this size, for this process alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, remount, private = 0x00020000, 32, (1 << 18) | (1 << 14)
    if not again and (libc.unshare(new_namespace) or libc.mount(b"none", b"/", None, private, None)):
        raise OSError(ctypes.get_errno(), "no namespace")
    flags, size = remount if again else 0, f"size={kibibytes}k".encode()
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, size):
        raise OSError(ctypes.get_errno(), "no tmpfs")


@pytest.mark.parametrize("kibibytes", [8, 200, 400, 800])
def test_a_full_disk(files, tmp_path, kibibytes):
    """A run on a disk of this size fails with one line; on a larger one its resume ends as the whole run."""
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()

    def fill():
        try:
            mount(disk, kibibytes)
        except OSError:
            os._exit(77)
        status = cli.main([str(one) for one in train(files, disk / "out")])
        print(f"first {status}", file=sys.stderr, flush=True)
        assert status in (1, 2) and not list((disk / "out").glob("checkpoints/tmp-*"))
        mount(disk, 100_000, again=True)
        assert cli.main([*map(str, train(files, disk / "out")), "--resume"]) == 0
        shutil.copytree(disk / "out", copy)

    ended = run_forked(["metrics", str(tmp_path / "none")], fill)
    if ended.status == 77:
        pytest.skip("no tmpfs can be mounted here")
    first = ended.err.partition("\nfirst ")[0].rpartition("\r")[2]
    assert first.startswith("unlearn: error: ") and "No space left on device" in first and str(disk) in first, ended.err
    assert ending(copy) == ending(files / "whole")


# -------------------------------------------------------------------------------------------------------- the reference


def test_a_reference_of_something_else(files, tmp_path, capsys, monkeypatch):
    """The difference is named and the stored values stay."""
    cache = tmp_path / "cache"
    assert cli.main(["reference", *options(files, tmp_path / "one", reference_cache=cache)]) == 0
    before = contents(cache)
    other_model, other_tokenizer, templated = tmp_path / "model", tmp_path / "tokenizer", tmp_path / "template"
    for folder in (other_model, other_tokenizer, templated):
        save_tiny(folder)
    tiny_llama(seed=5).save_pretrained(other_model)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other_tokenizer)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(templated)
    more = write_rows(tmp_path / "more.jsonl", [*FORGET, {"question": "Who?", "answer": "Nobody."}])
    for changes, difference in (
        ({"model": other_model}, "another model (stored "),
        ({"model": other_tokenizer}, "another tokenizer (stored "),
        ({"model": templated}, "another chat template (stored "),
        ({"forget": more}, "another data (1 of 7 sequences are not in it)"),
        ({"dtype": "bfloat16"}, "another model (stored "),
    ):
        output = tmp_path / "two"
        message = refused(capsys, train(files, output, reference_cache=cache, **changes))
        assert message.startswith(f"reference_cache: {cache / 'reference.safetensors'} is of {difference}")
        assert message.endswith("delete it or give another --reference-cache")
        assert contents(cache) == before and not output.exists()
    monkeypatch.setattr(reference, "ATTENTION", "another")
    message = refused(capsys, ["reference", *options(files, tmp_path / "two", reference_cache=cache)])
    assert "is of another attention (stored unlearn_packed, now another)" in message
    assert contents(cache) == before


# ------------------------------------------------------------------------------------------------------------ the steps


def test_a_model_with_a_nan_stops_at_the_first_step(files, tmp_path, capsys):
    model, output = tmp_path / "model", tmp_path / "out"
    shutil.copytree(files / "model", model)
    tensors = load_file(model / "model.safetensors")
    token = next(token for token in tiny_tokenizer()(f"Question: {FORGET[0]['question']}").input_ids if token > 60)
    tensors["model.embed_tokens.weight"][token, 3] = float("nan")  # of a word that the check of the head does not use
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    message = refused(capsys, train(files, output, model=model), 1)
    assert message.startswith("NonFiniteError: step 1: loss nan, gradient norm nan; not applied. Sequences: forget:")
    saved = json.loads((output / "non-finite-step-000001.json").read_text())
    assert [member["key"] for member in saved["batch"]] == message.split("Sequences: ")[1].split(";")[0].split(", ")
    assert message.endswith(f"the batch is in {output / 'non-finite-step-000001.json'}")
    assert not (output / "model").exists() and not (output / "checkpoints").exists()


def test_a_model_of_nan_is_not_begun_with(files, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(files / "model", model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    for arguments in (train(files, tmp_path / "out", model=model), evaluate(files, model=model)):
        message = refused(capsys, arguments)
        assert message == "model: the logits of this LlamaForCausalLM are not finite; its weights are broken"
    assert not (tmp_path / "out").exists()


def test_a_rate_that_is_too_high(files, tmp_path, capsys):
    """The first step goes through, the second cannot; with skip no later one is applied."""
    output = tmp_path / "stop"
    message = refused(capsys, train(files, output, lr=1e30), 1)
    assert message.startswith("NonFiniteError: step 2: loss ") and "not applied" in message
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 2 and not (output / "model").exists()
    first = load_file(output / "checkpoints" / "step-00000001" / "model.safetensors")
    output = tmp_path / "skip"
    assert cli.main(train(files, output, lr=1e30, on_non_finite="skip")) == 0
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()[1:]]
    assert [row.get("skipped", False) for row in rows] == [False, True, True, True]
    last = load_file(output / "model" / "model.safetensors")
    assert all(torch.equal(first[name], last[name]) for name in first)
    assert len(list(output.glob("non-finite-step-*.json"))) == 3


@pytest.mark.parametrize("save_every", [0, 1])
def test_weights_that_are_not_finite_are_not_kept(files, tmp_path, capsys, save_every):
    """A finite gradient, and a step that overflows: the check of the next step's loss would come too late."""
    output = tmp_path / "out"
    changes = {
        "lr": 1e30,
        "weight_decay": 1e20,
        "save_every": save_every,
        "epochs": 1,
        "batch_size": 6 - 3 * save_every,
    }
    message = refused(capsys, train(files, output, **changes), 1)
    assert message.startswith("NonFiniteError: step 1: ") and "weights are not finite after it" in message
    assert not (output / "model").exists() and not (output / "checkpoints").exists()


def test_out_of_memory(tmp_path):
    """A true one: an allocation that the system refuses."""
    tiny_llama(vocab=60_000).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "forget.jsonl", [row | {"answer": row["answer"] * 8} for row in FORGET])
    arguments = train(tmp_path, tmp_path / "out", batch_size=6, method="ga", beta=None, epochs=1, save_every=0)
    assert run_forked(arguments).status == 0
    shutil.rmtree(tmp_path / "out")
    ended = run_forked(arguments, more_memory(80 * 2**20))
    assert ended.status == 1
    advice = "a smaller --max-tokens, or (train) --gradient-checkpointing or --tile-tokens, needs less"
    assert re.search(rf"; \d+ MiB were planned \([a-z ]+\); {re.escape(advice)}$", ended.line)


# ------------------------------------------------------------------------------------------------------- two at a time


def test_a_second_run_in_the_same_folder(files, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = train(files, output, epochs=8)
    with Fork(arguments) as first:
        assert first.wait_until((output / "checkpoints" / "latest").exists)
        first.send(signal.SIGSTOP)
        before = contents(output)
        for second in (arguments, [*arguments, "--resume"]):
            message = refused(capsys, [str(one) for one in second])
            assert message.startswith("output: another process is at work on it (it holds ") and str(output) in message
        assert contents(output) == before
        first.send(signal.SIGKILL)
    # the lock went with its holder
    assert run_forked([*arguments, "--resume"]).status == 0
    assert not (output / "lock").exists()


def test_a_second_run_on_the_same_alternates(files, tmp_path, capsys):
    path = tmp_path / "alternates.jsonl"
    with Fork(alternates(files, path, batch_size=1)) as first:
        assert first.wait_until(lambda: path.exists() and path.stat().st_size > 0)
        first.send(signal.SIGSTOP)
        message = refused(capsys, [*alternates(files, path, batch_size=1), "--resume"])
        assert message.startswith("output: another process is at work on it")
        first.send(signal.SIGKILL)
    assert cli.main([*alternates(files, path, batch_size=1), "--resume"]) == 0
    assert len(path.read_text().splitlines()) == len(FORGET)


def test_where_there_are_no_locks(files, tmp_path, monkeypatch):
    def no_locks(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert cli.main(train(files, tmp_path / "out")) == 0
    assert not (tmp_path / "out" / "lock").exists()


def test_a_lock_whose_file_was_removed_is_taken_anew(tmp_path, monkeypatch):
    """Between our opening and our lock the holder before us may have removed its file: that lock would hold nothing."""
    path, original, calls = tmp_path / "lock", fcntl.flock, []

    def flock(descriptor, operation):
        if not calls:
            path.unlink()
        calls.append(descriptor)
        original(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with own_files.holding(path, "output"):
        assert path.exists() and len(calls) == 2
        with pytest.raises(ValueError, match="^output: another process"), own_files.holding(path, "output"):
            pass
    assert not path.exists()


# ---------------------------------------------------------------------------------------------------------- checkpoints


class Evil:
    """A pickle that leaves a file behind when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


CHECKPOINT_DAMAGE = {
    "half the weights": lambda folder, evil: os.truncate(folder / "model.safetensors", 5000),
    "no weights": lambda folder, evil: (folder / "model.safetensors").unlink(),
    "weights of another model": lambda folder, evil: tiny_llama(vocab=340).save_pretrained(folder),
    "half the optimizer": lambda folder, evil: os.truncate(folder / "optimizer.pt", 5000),
    "an empty optimizer": lambda folder, evil: os.truncate(folder / "optimizer.pt", 0),
    "a pickle that acts": lambda folder, evil: (folder / "optimizer.pt").write_bytes(pickle.dumps(Evil(evil))),
    "an archive that acts": lambda folder, evil: torch.save({"state": Evil(evil)}, folder / "optimizer.pt"),
    "an optimizer of nothing": lambda folder, evil: torch.save({}, folder / "optimizer.pt"),
    "half the state": lambda folder, evil: os.truncate(folder / "state.json", 9),
    "a state of another step": lambda folder, evil: edit(folder / "state.json", step=4),
    "metrics of another length": lambda folder, evil: edit(folder / "state.json", metrics_bytes=10**9),
}


@pytest.mark.parametrize("name", CHECKPOINT_DAMAGE)
def test_a_damaged_checkpoint(files, tmp_path, capsys, name):
    output, evil = tmp_path / "out", tmp_path / "evil"
    shutil.copytree(files / "whole", output)
    shutil.rmtree(output / "model")  # or the run would be finished
    folder = output / "checkpoints" / "step-00000003"
    CHECKPOINT_DAMAGE[name](folder, evil)
    before = contents(output)
    message = refused(capsys, [*train(files, output), "--resume"])
    assert message.startswith(f"resume: the checkpoint {folder} is damaged (") and "name another --output" in message
    assert contents(output) == before and not evil.exists()


@pytest.mark.parametrize("kind", ["up", "absolute", "link", "bytes"])
def test_a_pointer_that_leads_out_of_the_folder(files, tmp_path, capsys, kind):
    """Even to a good checkpoint."""
    output = tmp_path / "out"
    shutil.copytree(files / "whole", output)
    shutil.rmtree(output / "model")
    root = output / "checkpoints"
    elsewhere = shutil.move(root / "step-00000003", output / "step-00000003")
    if kind == "link":
        (root / "step-00000003").symlink_to(elsewhere)
    text = {"up": b"../step-00000003", "absolute": os.fsencode(elsewhere), "link": b"step-00000003", "bytes": b"\xff"}
    (root / "latest").write_bytes(text[kind])
    message = refused(capsys, [*train(files, output), "--resume"])
    assert (
        message.startswith(f"output: {root / 'latest'} names ") and "which is not a checkpoint folder there" in message
    )
    assert (Path(elsewhere) / "optimizer.pt").exists()


# ------------------------------------------------------------------------------------------------------ strangers' code


def test_pickled_weights_are_not_read(files, tmp_path, capsys):
    model, evil = tmp_path / "model", tmp_path / "evil"
    shutil.copytree(files / "model", model)
    (model / "model.safetensors").unlink()
    for content in (pickle.dumps(Evil(evil)), None):
        if content is None:  # a good one, even
            torch.save(tiny_llama().state_dict(), model / "pytorch_model.bin")
        else:
            (model / "pytorch_model.bin").write_bytes(content)
        for arguments in (train(files, tmp_path / "out", model=model), evaluate(files, model=model)):
            message = refused(capsys, arguments)
            assert message.startswith(f"model: could not load {str(model)!r}")
    assert not evil.exists()


@pytest.mark.parametrize("part", ["model", "known model", "tokenizer", "generate"])
def test_code_that_comes_with_a_model_is_not_run(files, tmp_path, capsys, part):
    """Refused, or passed over where the library has the class itself; run only for --trust-remote-code."""
    model, evil = tmp_path / "model", tmp_path / "evil"
    shutil.copytree(files / "model", model)
    code = f"open({str(evil)!r}, 'w')\nfrom transformers import LlamaConfig as Config, LlamaForCausalLM as Model\n"
    (model / "code.py").write_text(code)
    (model / "own.py").write_text(code)
    if part == "generate":
        (model / "custom_generate").mkdir()
        (model / "custom_generate" / "generate.py").write_text(code + "def generate(model, **kwargs): pass\n")
    elif part == "tokenizer":
        edit(model / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]})
    else:
        auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
        edit(model / "config.json", auto_map=auto_map, **({"model_type": "own"} if part == "model" else {}))
    commands = [train(files, tmp_path / "out", model=model), evaluate(files, model=model)]
    if part == "known model":  # the one that each of them gets to the end with
        few = {"max_new_tokens": 1, "count": 1, "batch_size": 6}
        rows = ["--forget-qa", files / "forget.jsonl", "--max-rows", 1, "--device", "cpu"]
        commands += [
            [*train(files, tmp_path / "out", model=model, lora=2), "--dry-run"],
            ["reference", *options(files, tmp_path / "reference", model=model)],
            alternates(files, tmp_path / "alternates.jsonl", model=model, **few),
            ["muse", "--model", model, *rows],
            evaluate(files, model=files / "model", gold=model, holdout=files / "retain.jsonl"),
        ]
    for arguments in commands:
        capsys.readouterr()
        status = cli.main([str(one) for one in arguments])
        err = capsys.readouterr().err.rpartition("\r")[2]
        assert status == 0 or (status == 2 and err.startswith("unlearn: error: model: ") and err.count("\n") == 1)
        assert not evil.exists()
        assert status == (2 if part == "model" else 0) or part == "tokenizer", arguments
