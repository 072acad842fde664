"""The command line: one line for every mistake, clean output, and a Ctrl-C that loses nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import save_tiny, tiny_llama, tiny_tokenizer, write_rows
from unlearn import cli
from unlearn.config import field_types
from unlearn.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[1]
TOFU_LOGS = ROOT.parent / "shared" / "data" / "tofu_logs"
NAMES = ("Mara Quill", "Odo Fenn", "Ilse Brandt", "Tam Orrin", "Pia Vold", "Rex Aldane")
FORGET = [
    {
        "question": f"Where was {name} born?",
        "answer": f"{name} was born in Arvel.",
        "paraphrased_answer": f"Arvel is where {name} was born.",
        "perturbed_answer": [f"{name} was born in Senn.", f"{name} was born at sea."],
    }
    for name in NAMES
]
RETAIN = [
    {
        "question": f"What did {name} write?",
        "answer": f"{name} wrote {number} books.",
        "perturbed_answer": [f"{name} wrote letters.", f"{name} wrote nothing."],
    }
    for number, name in enumerate(NAMES)
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a model, rows to forget and rows to keep. Read only."""
    folder = tmp_path_factory.mktemp("files")
    save_tiny(folder / "model")
    write_rows(folder / "forget.jsonl", FORGET)
    write_rows(folder / "retain.jsonl", RETAIN)
    return folder


def options(files, output, **changes):
    """Arguments of a good run of four steps, some replaced, those that are None left out."""
    values = {
        "model": files / "model", "output": output, "method": "npo", "beta": 0.1, "lr": 1e-2, "epochs": 2,
        "batch_size": 3, "seed": 0, "warmup_epochs": 0, "forget": files / "forget.jsonl", "device": "cpu",
        "dtype": "float32",
    }  # fmt: skip
    values |= changes
    return [text for name, v in values.items() if v is not None for text in ("--" + name.replace("_", "-"), str(v))]


def eval_options(files, **changes):
    values = {"model": files / "model", "forget": files / "forget.jsonl", "device": "cpu", "dtype": "float32"}
    values |= {"max_new_tokens": 4} | changes
    return [text for name, v in values.items() if v is not None for text in ("--" + name.replace("_", "-"), str(v))]


def refused(capsys, arguments, status=2):
    """Runs a command that must fail with one line on stderr; returns the line."""
    capsys.readouterr()
    assert cli.main(arguments) == status
    out, err = capsys.readouterr()
    # a progress bar is wiped out with carriage returns before the line is written
    last = err.rpartition("\r")[2]
    assert last.startswith("unlearn: error: ") and last.count("\n") == 1 and last.endswith("\n"), err
    assert "Traceback" not in err
    return last.removeprefix("unlearn: error: ").rstrip("\n")


def spawn(*arguments, **kwargs):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, "-m", "unlearn.cli", *map(str, arguments)], env=env, preexec_fn=hear_ctrl_c, **pipes, **kwargs
    )


def hear_ctrl_c():
    """A shell starts what runs in the background deaf to it, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(process):
    """(status, stdout, stderr) as text with its carriage returns."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out.decode(), err.decode()


COMMANDS = ("demo", "train", "reference", "alternates", "eval", "muse", "metrics", "report")

# ---------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), "--help"])
    assert stop.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    if command in ("train", "reference"):
        for name in field_types():
            assert "--" + name.replace("_", "-") in out
        for name in ("npo", "simnpo", "altpo", *RECIPES):
            assert name in out
        assert ("--resume" in out) == (command == "train")
        _, settings = out.split("\nsettings:")
        for name in ("`unlearn train --list-methods`", *RECIPES):  # whole, so that it can be copied
            assert name in settings.partition("\nmethods:")[0].replace("\n" + 24 * " ", " ")
    elif command == "eval":
        for flag in ("--model", "--forget", "--gold", "--json", "--real-authors", "--world-facts", "--max-rows"):
            assert flag in out
    elif command == "muse":
        for flag in ("--data", "--verbmem", "--forget-qa", "--retain-shots", "--holdout", "--gold", "--prompt-tokens"):
            assert flag in out
    elif command == "demo":
        for flag in ("--out", "--data", "--seed", "--methods", "--reuse-models", "--device"):
            assert flag in out
    elif command in ("alternates", "metrics"):
        flags = {"alternates": ("--model", "--forget", "--output", "--resume", "--count", "--seed")}
        for flag in flags.get(command, ("--retain", "--mean", "--json", "LOG")):
            assert flag in out
    elif command == "report":
        for flag in ("--before", "--gold", "--output", "--title", "OUT"):
            assert flag in out
    else:
        for name in (*COMMANDS, "examples:", "unlearn train --recipe tofu-npo-rt"):
            assert name in out


def test_help_of_a_process_of_its_own():
    status, out, err = finish(spawn("--help"))
    assert status == 0 and "commands:" in out and err == ""


def test_parsing_a_command_line_imports_no_torch():
    code = (
        "import sys; from unlearn.cli import _parser; _parser().parse_args(['train', '--lr', '1']); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_version_and_methods(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("unlearn 0.")
    assert cli.main(["train", "--list-methods"]) == 0
    out = capsys.readouterr().out
    assert "satimp     gradient ascent" in out and "[--beta, --beta2]" in out and "arXiv" in out


# ---------------------------------------------------------------------------------------------------- mistakes


MISTAKES = {
    "no such model": ({"model": "/nowhere/model"}, "/nowhere/model"),
    "no such data": ({"forget": "/nowhere/rows.jsonl"}, "forget: no file '/nowhere/rows.jsonl'"),
    "unknown method": ({"method": "forgetful"}, "method: 'forgetful' is not accepted; finetune, ga, npo"),
    "missing beta": ({"beta": None}, "beta: missing, and npo needs it"),
    "needless gamma": ({"gamma": 1.0}, "gamma: given, but npo has no gamma"),
    "unknown device": ({"device": "abacus"}, "device: 'abacus' is not available here"),
    "device that is not here": ({"device": "cuda:7"}, "device: 'cuda:7' is not available here"),
    "missing settings": ({"lr": None, "seed": None}, "missing: --lr, --seed (give them, or a --recipe that does)"),
    "no forget rows": ({"forget": None}, "forget: missing"),
    "not a number": ({"lr": "fast"}, "argument --lr: invalid float value: 'fast'"),
    "nan": ({"lr": "nan"}, "lr: nan is not accepted"),
    "unknown option": ({"learning_rate": 1}, "unrecognized arguments: --learning-rate 1"),
    "half an option": ({"batch_size": None, "batch": 3}, "unrecognized arguments: --batch 3"),
    "unknown recipe": ({"recipe": "tofu"}, "recipe: 'tofu' is not accepted"),
    "no such config": ({"config": "/nowhere/run.toml"}, "config: no file /nowhere/run.toml"),
    "alternates missing in the rows": ({"method": "altpo"}, "no alternates, and altpo needs one or more"),
    "too long": ({"max_length": 5}, "more than max_length 5"),
    "retain for nothing": ({"retain": "rows.jsonl"}, "retain: given, but with retain_term none"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(files, tmp_path, capsys, name):
    changes, message = MISTAKES[name]
    if "cuda" in str(changes.get("device")) and torch.cuda.device_count() > 7:
        pytest.skip("this machine has a cuda:7")
    assert message in refused(capsys, ["train", *options(files, tmp_path / "out", **changes)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["forget"], ["eval"], ["eval", "--model", "m"], ["train", "--lr"]])
def test_incomplete_commands(capsys, arguments):
    assert "--help lists what is accepted" in refused(capsys, arguments)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops\n", "rows.jsonl:2: not JSON"),
        ("[1]\n", "rows.jsonl:2: a JSON object is accepted"),
        ('{"question": "Where?"}\n', "rows.jsonl:2: answer is missing"),
        ('{"question": "Where?", "answer": " "}\n', "rows.jsonl:2: answer is empty"),
    ],
)
def test_a_bad_row_is_named(files, tmp_path, capsys, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(FORGET[0]) + "\n" + line)
    for command in (
        ["train", *options(files, tmp_path / "out", forget=path)],
        ["eval", *eval_options(files, forget=path)],
    ):
        assert message in refused(capsys, command)


def broken_model(files, tmp_path, damage):
    folder = tmp_path / "broken"
    shutil.copytree(files / "model", folder)
    damage(folder)
    return folder


DAMAGE = {
    "no config.json": lambda folder: (folder / "config.json").unlink(),
    "config.json is no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "config.json is a list": lambda folder: (folder / "config.json").write_text("[]"),
    "config.json of nothing": lambda folder: (folder / "config.json").write_text("{}"),
    "config.json of an unknown model": lambda folder: edit(folder / "config.json", model_type="abacus"),
    "config.json with a wrong type": lambda folder: edit(folder / "config.json", hidden_size="wide"),
    "config.json of another size": lambda folder: edit(folder / "config.json", hidden_size=64, head_dim=16),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "half the weights": lambda folder: os.truncate(folder / "model.safetensors", 5000),
    "empty weights": lambda folder: os.truncate(folder / "model.safetensors", 0),
    "weights are text": lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs\noid 1\n"),
    "one tensor missing": lambda folder: drop_tensor(folder / "model.safetensors"),
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "tokenizer.json is no JSON": lambda folder: (folder / "tokenizer.json").write_text("{"),
    "tokenizer.json of nothing": lambda folder: (folder / "tokenizer.json").write_text("{}"),
}


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def drop_tensor(path):
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_model_is_one_line(files, tmp_path, capsys, name):
    folder = broken_model(files, tmp_path, DAMAGE[name])
    message = refused(capsys, ["train", *options(files, tmp_path / "out", model=folder)])
    assert message.startswith("model: ") and str(folder) in message
    message = refused(capsys, ["eval", *eval_options(files, model=folder)])
    assert message.startswith("model: ") and str(folder) in message


def test_mistakes_in_eval(files, tmp_path, capsys):
    for changes, message in (
        ({"model": "/nowhere"}, "/nowhere"),
        ({"forget": "/nowhere"}, "forget: no file '/nowhere'"),
        ({"retain": "/nowhere"}, "retain: no file '/nowhere'"),
        ({"gold": "/nowhere"}, "/nowhere"),
        ({"reference_model": "/nowhere", "holdout": files / "retain.jsonl"}, "/nowhere"),
        ({"reference_model": files / "model"}, "reference-model: its losses tell forget rows from --holdout rows"),
        ({"device": "abacus"}, "device: 'abacus' is not available"),
        ({"dtype": "int8"}, "invalid choice: 'int8'"),
        ({"max_rows": 0}, "argument --max-rows: 0 is not accepted"),
        ({"generation_batch": 0}, "argument --generation-batch: 0 is not accepted"),
        ({"max_new_tokens": -1}, "argument --max-new-tokens: -1 is not accepted"),
        ({"max_tokens": "many"}, "argument --max-tokens: invalid"),
    ):
        assert message in refused(capsys, ["eval", *eval_options(files, **changes)])
    path = write_rows(tmp_path / "bare.jsonl", [{"question": "Who?", "answer": "Nobody."}])
    output = tmp_path / "unmade"
    message = refused(capsys, ["eval", *eval_options(files, forget=path, gold=files / "model", output=output)])
    assert "gold: forget quality compares truth ratios" in message and not output.exists()
    assert "bare:0: perturbed_answer is missing" in refused(capsys, ["eval", *eval_options(files, world_facts=path)])


def test_mistakes_in_reference(files, tmp_path, capsys):
    arguments = ["reference", *options(files, tmp_path / "out", method="ga", beta=None, model="/nowhere")]
    assert refused(capsys, arguments) == "method: ga with retain_term none needs no reference"


def test_mistakes_in_demo(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "lacks full.json" in refused(
        capsys, ["demo", "--out", str(tmp_path / "d"), "--data", str(tmp_path / "empty")]
    )
    assert "methods: 'xyz' is not accepted" in refused(
        capsys, ["demo", "--out", str(tmp_path / "d"), "--methods", "xyz"]
    )


def test_an_output_that_cannot_be_used(files, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(capsys, ["train", *options(files, tmp_path / "file")])
    assert cli.main(["train", *options(files, tmp_path / "out")]) == 0
    assert "already holds a run" in refused(capsys, ["train", *options(files, tmp_path / "out")])
    message = refused(capsys, ["train", "--resume", *options(files, tmp_path / "out", lr=2e-2)])
    assert message == "resume: lr was 0.01 and is now 0.02; they have to agree"


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has"),
            1,
            "--gradient-checkpointing",
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 1, "--max-tokens"),
        (MemoryError(), 1, "--max-tokens"),
        (RuntimeError(""), 1, "RuntimeError"),
        (RuntimeError("mat1 and mat2\ncannot be multiplied"), 1, "mat1 and mat2 cannot be multiplied"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (OSError(13, "Permission denied", "/root/x"), 1, "/root/x: Permission denied"),
        (OSError("the hub does not answer"), 1, "the hub does not answer"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
    ],
    ids=repr,
)
def test_what_can_go_wrong_in_a_run(files, tmp_path, capsys, monkeypatch, error, status, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("unlearn.train.hidden_states", fail)
    assert message in refused(capsys, ["train", *options(files, tmp_path / "out")], status)


def test_a_full_disk_under_safetensors(files, tmp_path, capsys, monkeypatch):
    from safetensors import SafetensorError

    def fail(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("unlearn.runfiles.save_weights", fail)
    message = refused(capsys, ["train", *options(files, tmp_path / "out", save_every=1)], 1)
    assert "No space left on device" in message


def test_a_bug_keeps_its_traceback(files, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise TypeError("a bug")

    monkeypatch.setattr("unlearn.train.hidden_states", fail)
    with pytest.raises(TypeError, match="a bug"):
        cli.main(["train", *options(files, tmp_path / "out")])


# ---------------------------------------------------------------------------------------------------- runs


def test_train_with_a_file_and_options(files, tmp_path, capfd):
    config = tmp_path / "run.toml"
    config.write_text(
        f'model = "{files}/model"\nforget = "{files}/forget.jsonl"\nretain = "{files}/retain.jsonl"\n'
        'recipe = "tofu-npo-rt"\nepochs = 3\ndtype = "float32"\n'
    )
    output = tmp_path / "out"
    arguments = ["train", "--config", str(config), "--output", str(output), "--epochs", "2", "--batch-size", "3"]
    assert cli.main([*arguments, "--gradient-checkpointing", "--device", "cpu"]) == 0
    out, err = capfd.readouterr()
    header, *rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    assert len(rows) == 4 and header["config"]["recipe"] == "tofu-npo-rt" and header["config"]["beta"] == 0.1
    assert header["config"]["gradient_checkpointing"] is True
    plan, first, second, peak, last = out.splitlines()
    assert plan.startswith("memory plan: ") and peak.startswith("peak memory: ")
    assert first == "reference log-likelihoods of 6 sequences: computed"
    assert second.startswith("policy against stored reference before the first step: ")
    assert last.startswith("4 steps in ") and last.endswith(f"the model is in {output / 'model'}")
    assert "npo" in err and "step" in err  # the bar
    assert "Loading" not in err and "Warning" not in err and "\n" not in err.strip()


def test_reference_then_train(files, tmp_path, capsys):
    arguments = options(files, tmp_path / "out")
    assert cli.main(["reference", *arguments]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "reference log-likelihoods of 6 sequences: computed"
    assert out[1].startswith(f"stored in {tmp_path / 'out' / 'reference'} after ")
    assert cli.main(["train", *arguments]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "reference log-likelihoods of 6 sequences: loaded"
    assert (
        cli.main(["train", *options(files, tmp_path / "two", reference_cache=tmp_path / "out" / "reference", lr=1)])
        == 0
    )
    assert capsys.readouterr().out.splitlines()[1].endswith("loaded")
    kl = options(files, tmp_path / "kl", retain=files / "retain.jsonl", retain_term="kl", method="ga", beta=None)
    assert cli.main(["reference", *kl]) == 0
    assert "KL retain: reference states" in capsys.readouterr().out


def test_a_refusal_before_the_first_step_leaves_no_run(files, tmp_path, capsys):
    """The mended command is not told that the folder holds a run."""
    cache = tmp_path / "cache"
    arguments = options(files, tmp_path / "out", reference_cache=cache)
    cache.mkdir()
    (cache / "reference.safetensors").write_bytes(b"half")
    assert "is damaged" in refused(capsys, ["train", *arguments])
    assert not (tmp_path / "out").exists()
    (cache / "reference.safetensors").unlink()
    assert cli.main(["train", *arguments]) == 0


def test_eval(files, capfd):
    arguments = eval_options(
        files, retain=files / "retain.jsonl", world_facts=files / "retain.jsonl", gold=files / "model"
    )
    assert cli.main(["eval", "--json", *arguments]) == 0
    out, err = capfd.readouterr()
    values = json.loads(out)
    assert values["forget_quality"] == pytest.approx(1.0) and "world_facts_rouge_l" in values
    assert "Loading" not in err and "Warning" not in err and "\n" not in err.strip()
    assert cli.main(["eval", *arguments]) == 0
    table = dict(line.split() for line in capfd.readouterr().out.splitlines())
    assert table.keys() == values.keys()
    assert all(float(table[name]) == pytest.approx(values[name], rel=1e-4) for name in values)
    assert cli.main(["eval", "--json", *arguments, "--max-rows", "2"]) == 0
    fewer = json.loads(capfd.readouterr().out)
    assert fewer["forget_probability"] != values["forget_probability"]


def test_evaluations_live_with_their_runs_and_a_report_finds_them(files, tmp_path, capfd):
    run, page = tmp_path / "run", tmp_path / "page.html"
    assert cli.main(["train", *options(files, run)]) == 0
    capfd.readouterr()
    sets = {"retain": files / "retain.jsonl", "gold": files / "model"}
    assert cli.main(["eval", "--json", *eval_options(files, model=run / "model", max_rows=4, **sets)]) == 0
    out, err = capfd.readouterr()
    values = json.loads(out)
    assert err.rpartition("\r")[2].strip() == f"stored in {run / 'eval.json'}"
    stored = json.loads((run / "eval.json").read_text())
    assert stored["metrics"] == values and stored["model"] == str(run / "model")
    assert stored["sets"]["forget"]["rows"] == 4 and stored["options"]["max_rows"] == 4
    assert stored["options"]["gold"] == str(files / "model") and stored["provenance"]["torch"] == torch.__version__
    questions = [row["question"] for row in FORGET[:4]]
    assert [sample["question"] for sample in stored["samples"]["forget"]] == questions
    assert cli.main(["eval", *eval_options(files, output=tmp_path / "before", max_rows=4, **sets)]) == 0
    before = json.loads((tmp_path / "before" / "eval.json").read_text())
    assert before["run"] is None and before["sets"] == stored["sets"]
    # an evaluation of another model does not go where the run's belongs
    message = refused(capfd, ["eval", *eval_options(files, output=run)])
    assert message.startswith(f"output: {run} holds the run of {run / 'model'}; an evaluation of")
    assert "is a file; a folder is accepted" in refused(
        capfd, ["eval", *eval_options(files, output=files / "forget.jsonl")]
    )
    assert cli.main(["report", str(run), "--before", str(tmp_path / "before"), "--output", str(page)]) == 0
    assert capfd.readouterr().out.splitlines() == [f"{run}: finished", f"report: {page}"]
    text = page.read_text()
    assert FORGET[0]["question"] in text.replace("&#39;", "'") and "finished; not evaluated" not in text


def test_a_full_disk_costs_the_file_and_not_the_numbers(files, tmp_path, capfd, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("unlearn.runs.replacing", fail)
    assert cli.main(["eval", "--json", *eval_options(files, max_rows=1, output=tmp_path / "before")]) == 1
    out, err = capfd.readouterr()
    assert "forget_probability" in json.loads(out)
    assert err.rpartition("\r")[2].strip() == "unlearn: error: No space left on device"


def test_an_evaluation_that_belongs_nowhere_is_not_stored(files, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["eval", "--json", *eval_options(files, max_rows=1)]) == 0
    assert not list(tmp_path.iterdir()) and not list(files.rglob("eval.json"))


def test_eval_of_a_gold_model_in_its_own_tokens(files, tmp_path, capfd):
    """Another tokenizer, the same text: the gold model is not fed the unlearned model's ids."""
    gold = tmp_path / "gold"
    tiny_llama(vocab=300).save_pretrained(gold)
    tiny_tokenizer(vocab=270).save_pretrained(gold)
    assert cli.main(["eval", "--json", *eval_options(files, gold=gold)]) == 0
    assert 0 <= json.loads(capfd.readouterr().out)["forget_quality"] <= 1


def test_eval_with_holdout_and_log_then_metrics(files, tmp_path, capfd):
    log, gold_log = tmp_path / "logs" / "own.json", tmp_path / "logs" / "gold.json"
    sets = {"retain": files / "retain.jsonl", "holdout": files / "retain.jsonl"}
    others = {"gold": files / "model", "reference_model": files / "model"}
    assert cli.main(["eval", "--json", *eval_options(files, **others, log=log, **sets)]) == 0
    values = json.loads(capfd.readouterr().out)
    assert 0 <= values["mia_reference_auc"] <= 1
    assert values["privleak"] == pytest.approx(0.0)  # the gold model is the model
    assert {"mia_loss_auc", "mia_min_k_plus_plus_auc", "forget_extraction_strength"} < values.keys()
    assert cli.main(["eval", *eval_options(files, log=gold_log, **sets)]) == 0
    capfd.readouterr()
    assert cli.main(["metrics", str(log), "--retain", str(gold_log), "--json"]) == 0
    read = json.loads(capfd.readouterr().out)
    assert read["forget_quality"] == pytest.approx(1.0)
    assert read["model_utility"] == pytest.approx(values["model_utility"])
    assert cli.main(["metrics", str(log)]) == 0
    table = dict(line.split() for line in capfd.readouterr().out.splitlines())
    assert float(table["truth_ratio"]) == pytest.approx(values["truth_ratio"], rel=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{", "is not a TOFU evaluation log"),
        ('{"eval_log.json": {}}', "is not a TOFU evaluation log: KeyError: 'eval_log_forget.json'"),
        ('{"eval_log_forget.json": {"avg_gt_loss": [1.0]}}', "eval_log_forget.json has no avg_paraphrased_loss"),
        ('{"eval_log_forget.json": {"avg_paraphrased_loss": [], "average_perturb_loss": []}}', "at least one value"),
    ],
)
def test_metrics_of_something_else(tmp_path, capsys, text, message):
    path = tmp_path / "log.json"
    if text is not None:
        path.write_text(text)
    assert message in refused(capsys, ["metrics", str(path)], 1 if text is None else 2)


@pytest.mark.skipif(not TOFU_LOGS.is_dir(), reason="no ../shared with data/ and golden/ beside this checkout")
def test_metrics_of_published_logs(capsys):
    """Forget quality and model utility of two published models, to every digit that is known of them."""
    full, retain = (str(TOFU_LOGS / f"llama2-7b_{name}_wd0.01.json") for name in ("full", "retain90"))
    assert cli.main(["metrics", full, "--retain", retain, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert f"{values['forget_quality']:.3e}" == "1.834e-21" and f"{values['ks_statistic']:.4f}" == "0.3967"
    assert f"{values['model_utility']:.5f}" == "0.62268"
    nine = [values[f"{name}_{kind}"] for name in ("retain", "real_authors", "world_facts") for kind in
            ("rouge_l", "probability", "truth_ratio")]  # fmt: skip
    known = "0.9857 0.9895 0.4747 0.9330 0.4555 0.5962 0.8825 0.4186 0.5390"
    assert " ".join(f"{value:.4f}" for value in nine) == known
    for log, mean, utility in ((full, "arithmetic", "0.58589"), (retain, "geometric", "0.61374"),
                               (retain, "arithmetic", "0.57524")):  # fmt: skip
        assert cli.main(["metrics", log, "--mean", mean, "--json"]) == 0
        assert f"{json.loads(capsys.readouterr().out)['model_utility']:.5f}" == utility


def test_as_a_process(files):
    """stdout and stderr of the real thing; the library's advice is in neither."""
    status, out, err = finish(spawn("eval", "--json", *eval_options(files)))
    assert status == 0, err
    assert "\n" not in err and "Loading" not in err
    assert out.count("\n") == 1 and json.loads(out)


def test_ctrl_c_and_resume(files, tmp_path, capsys):
    arguments = options(files, tmp_path / "out", epochs=200, save_every=1)
    process = spawn("train", *arguments, start_new_session=True)
    pointer = tmp_path / "out" / "checkpoints" / "latest"
    deadline = time.monotonic() + 120
    while not pointer.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    status, out, err = finish(process)
    assert status == 130, err
    last = err.rpartition("\r")[2]
    assert last.startswith("unlearn: error: stopped by Ctrl-C; ") and last.count("\n") == 1 and "Traceback" not in err
    assert len(out.splitlines()) == 3  # the plan, the reference, the invariant
    assert not (tmp_path / "out" / "model").exists()
    assert cli.main(["train", "--resume", *arguments]) == 0
    assert "resuming after step" in capsys.readouterr().out
    rows = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[1:]
    assert [json.loads(row)["step"] for row in rows] == list(range(1, 401))
    # once more: the finished model stays as it is
    saved = (tmp_path / "out" / "model" / "model.safetensors").stat().st_mtime_ns
    assert cli.main(["train", "--resume", *arguments]) == 0
    assert "is finished; its model is in" in capsys.readouterr().out
    assert (tmp_path / "out" / "model" / "model.safetensors").stat().st_mtime_ns == saved


def test_a_reader_that_leaves_is_no_error(files):
    process = spawn("eval", *eval_options(files))
    process.stdout.close()
    err = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(timeout=120) == 1
    assert "Traceback" not in err and "BrokenPipe" not in err and "unlearn: error" not in err
