"""Whatever stands in a configuration: a run, or one line that names what is wrong."""

import contextlib
import io
import json
import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.test_cli import FORGET, RETAIN
from tests.tiny import tiny_llama, tiny_tokenizer, write_rows
from unlearn import cli
from unlearn.config import field_types

NUMBERS = st.one_of(
    st.sampled_from([-1, 0, 1, 2, 3, 10**9, 2**63, 2**64, 10**400, -1.0, 0.0, -0.0, 0.1, 1.0, 5.0, 1e-45, 1e-20, 1e20]),
    st.sampled_from([1e38, 1e39, 1e308, -1e308, 5e-324, math.inf, -math.inf, math.nan]),
)
TEXTS = st.sampled_from(["", " ", "\0", "a\nb", "none", "nll", "kl", "npo", "ga", "simnpo", "skip", "stop", "float32",
                         "bfloat16", "tofu-npo", "meta", "cpu", "cpu:3", "../x", "x" * 5000, "é"])  # fmt: skip
OTHERS = st.sampled_from([True, False, [], [1], ["a"], {}, {"a": 1}])
# folders and files stay where they are; the rest is anyone's
KEYS = [name for name in field_types() if name not in ("model", "output", "forget", "reference_cache")]


def plausible(name):
    plain, _ = field_types()[name]
    right = {int: NUMBERS, float: NUMBERS, str: TEXTS, bool: st.booleans()}[plain]
    return st.one_of(right, right, right, NUMBERS, TEXTS, OTHERS)


EXTREME = {"lr", "beta", "forget_weight", "retain_weight", "weight_decay"}

CHANGES = st.lists(st.sampled_from(KEYS), min_size=1, max_size=2, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: plausible(name) for name in names})
)


def toml(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value)  # a string, a number or a boolean is written alike


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a model and rows. Read only."""
    folder = tmp_path_factory.mktemp("files")
    tiny_llama(num_hidden_layers=1).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    write_rows(folder / "forget.jsonl", FORGET[:2])
    write_rows(folder / "retain.jsonl", RETAIN[:2])
    return folder


def run(arguments):
    """(status, what was printed on stderr)"""
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        status = cli.main(arguments)
    return status, err.getvalue()


def base(files, folder):
    return {
        "model": str(files / "model"), "output": f"{folder}/out", "forget": str(files / "forget.jsonl"),
        "method": "npo", "retain": str(files / "retain.jsonl"), "retain_term": "nll", "beta": 0.1, "lr": 1e-3,
        "epochs": 1, "batch_size": 1, "seed": 0, "dtype": "float32", "device": "cpu", "warmup_epochs": 0.0,
    }  # fmt: skip


def write(folder, values):
    path = Path(folder, "run.toml")
    path.write_text("".join(f"{key} = {toml(value)}\n" for key, value in values.items()), encoding="utf-8")
    return ["train", "--config", str(path)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changes=CHANGES)
@example(changes={"epochs": 0})
@example(changes={"lora": 1})
@example(changes={"lora": 1, "lora_merge": True})
@example(changes={"lr": 1e39})
@example(changes={"lr": math.inf})
@example(changes={"weight_decay": math.nan})
def test_a_configuration_runs_or_is_one_line(files, changes):
    with tempfile.TemporaryDirectory() as folder:
        status, err = run(write(folder, base(files, folder) | changes))
        if status == 0:
            adapter = changes.get("lora") and not changes.get("lora_merge")
            weights = "adapter_model.safetensors" if adapter else "model.safetensors"
            assert (Path(folder) / "out" / "model" / weights).exists()
            assert (Path(folder) / "out" / "metrics.jsonl").read_bytes().count(b"\n") > 1  # one step or more
            return
        line = err.rpartition("\r")[2]
        assert line.startswith("unlearn: error: ") and line.count("\n") == 1 and "Traceback" not in err, err
        if status == 1:  # a rate or a weight that a step could not bear is known after the step alone
            assert "NonFiniteError: step " in line and EXTREME & changes.keys(), line
            assert all(abs(changes[name]) <= 1e30 for name in EXTREME & changes.keys()), line
            return
        assert status == 2
        # a method that wants other settings is named with them by its value
        assert any(name in line or str(value) in line for name, value in changes.items()), line
        assert not (Path(folder) / "out" / "metrics.jsonl").exists()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changes=CHANGES)
def test_an_option_is_stronger_than_the_file(files, changes):
    """Whatever the file says of a setting, also what could not be: the option's value is the run's."""
    with tempfile.TemporaryDirectory() as folder:
        own = base(files, folder) | {"max_tokens": 64, "save_every": 0, "on_non_finite": "stop", "retain_weight": 0.5}
        changes = {name: value for name, value in changes.items() if name in own}
        options = [text for name in changes for text in ("--" + name.replace("_", "-"), str(own[name]))]
        status, err = run([*write(folder, own | changes), *options])
        assert status == 0, err
        header = json.loads((Path(folder) / "out" / "metrics.jsonl").read_text().splitlines()[0])
        assert {name: header["config"][name] for name in own} == own


@pytest.mark.parametrize(
    "text", ["epochs = " + "1" * 5000, "lr = " + "[" * 50_000, "lr = 1\nlr = 2", "lr = 07", "\x00"]
)
def test_a_file_that_no_parser_takes(files, tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    status, err = run(["train", "--config", str(path)])
    assert (
        status == 2 and err.startswith(f"unlearn: error: config: {path} is not a TOML file: ") and err.count("\n") == 1
    )
