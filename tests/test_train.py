"""The loop: resume to the last bit, invariants at run time, what stops a run, and every method end to end."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import save_tiny, tiny_llama, tiny_tokenizer, write_rows
from unlearn import checkpoint, cli, reference, runfiles
from unlearn import train as loop
from unlearn.batches import make_training_set
from unlearn.config import TrainConfig
from unlearn.data import rows_from
from unlearn.engage import OFF
from unlearn.model import generating
from unlearn.optim import AdamWSR
from unlearn.train import InvariantError, NonFiniteError, train

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("Mara Quill", "Odo Fenn", "Ilse Brandt", "Tam Orrin", "Pia Vold", "Rex Aldane", "Una Mer", "Kit Sand", "Lo Ek")
PLACES = ("Arvel by the river", "the old town of Senn", "Dorn", "a village near Kesh", "Lum", "the coast")
FORGET = [
    {
        "question": f"Where was {name} born?",
        "answer": f"{name} was born in {place}.",
        "alternates": [f"{name} was born at sea.", "Nobody knows."],
    }
    for name, place in zip(NAMES, PLACES, strict=False)
]
RETAIN = [
    {"question": f"What did {name} write?", "answer": f"{name} wrote {number} books about lanterns."}
    for number, name in enumerate(NAMES, 3)
]
REFUSALS = ["I do not know.", "I have no information about that."]
NUM_STEPS = 6


def make_config(tmp_path, name="out", **values):
    shared = dict(
        model="tiny", output=str(tmp_path / name), method="npo", beta=0.1, lr=1e-2, epochs=3, batch_size=3, seed=0,
        forget="forget", retain="retain", retain_term="nll", warmup_epochs=1.0, dtype="float32", max_tokens=200,
    )  # fmt: skip
    return TrainConfig(**{**shared, **values})


def make_data(config, tokenizer=None):
    forget, retain = rows_from(FORGET, "forget"), rows_from(RETAIN, "retain")
    return make_training_set(config, tokenizer or tiny_tokenizer(), forget, retain, REFUSALS, max_length=None)


def make_model(config, **model_config):
    return tiny_llama(dtype=getattr(torch, config.dtype), **model_config)


def run(config, model=None, **options):
    """Trains quietly; returns the model."""
    model = model if model is not None else make_model(config)
    train(config, model, tiny_tokenizer(), make_data(config), **{"say": quiet, "progress": False, **options})
    return model


def quiet(text):
    pass


def lines(config):
    return [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]


def steps(config):
    """The metrics rows without their times."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in lines(config)[1:]]


def same_weights(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_tree(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tree(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same_tree(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.fixture
def optimizers(monkeypatch):
    """Every optimizer that a run makes, in order."""
    made = []
    original = loop.make_optimizer

    def recorded(*args):
        made.append(original(*args))
        return made[-1]

    monkeypatch.setattr(loop, "make_optimizer", recorded)
    return made


class Stop(Exception):
    pass


def stop_after(step):
    def after_step(done):
        if done == step:
            raise Stop

    return after_step


# ------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"dtype": "bfloat16", "max_tokens": 100},
        {"method": "altpo", "retain_term": "kl", "epochs": 2},
        {"method": "kto", "alternates": "refusals", "max_grad_norm": 0.5},
        {"method": "simnpo", "beta": 2.5, "gamma": 0.1, "dtype": "bfloat16", "gradient_checkpointing": True},
        {"method": "finetune", "beta": None, "forget": None, "retain_term": "none"},
    ],
    ids=lambda values: "-".join(map(str, values.values())) or "npo",
)
def test_resume_is_bit_for_bit(tmp_path, optimizers, values):
    whole = make_config(tmp_path, "whole", save_every=2, **values)
    expected = run(whole)
    last = len(steps(whole))
    assert last >= 6
    for stop in (1, 3, last):  # before the first checkpoint, between two, behind the last step
        config = dataclasses.replace(whole, output=str(tmp_path / f"stop{stop}"))
        with pytest.raises(Stop):
            run(config, after_step=stop_after(stop))
        resumed = run(config, resume=True)
        assert same_weights(resumed, expected)
        assert steps(config) == steps(whole)
        assert same_tree(optimizers[-1].state_dict(), optimizers[0].state_dict())


def test_a_run_stopped_twice_and_before_its_first_step(tmp_path):
    whole = make_config(tmp_path, "whole")
    expected = run(whole)
    config = make_config(tmp_path, save_every=1)
    for stop in (0, 2, 3):
        with pytest.raises(Stop):
            run(config, resume=stop > 0, after_step=stop_after(stop))
    assert same_weights(run(config, resume=True), expected)
    assert steps(config) == steps(whole)


def test_resume_where_there_is_nothing_starts_and_says_so(tmp_path):
    said = []
    run(make_config(tmp_path), resume=True, say=said.append)
    assert any("nothing to resume" in text for text in said)
    assert len(steps(make_config(tmp_path))) == NUM_STEPS


def test_tied_weights_survive_checkpoint_and_save(tmp_path):
    whole = make_config(tmp_path, "whole", save_every=2)
    expected = run(whole, make_model(whole, tie_word_embeddings=True))
    config = make_config(tmp_path, save_every=2)
    with pytest.raises(Stop):
        run(config, make_model(config, tie_word_embeddings=True), after_step=stop_after(3))
    resumed = run(config, make_model(config, tie_word_embeddings=True), resume=True)
    assert resumed.lm_head.weight is resumed.model.embed_tokens.weight
    assert same_weights(resumed, expected)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert torch.equal(loaded.lm_head.weight, expected.lm_head.weight)
    assert torch.equal(loaded.model.embed_tokens.weight, expected.lm_head.weight)


@pytest.mark.parametrize("values", [{"lr": 2e-2}, {"seed": 1}, {"retain_weight": 0.5}, {"max_tokens": 100}])
def test_resume_with_another_setting_is_refused_by_name(tmp_path, values):
    config = make_config(tmp_path, save_every=2)
    with pytest.raises(Stop):
        run(config, after_step=stop_after(3))
    before = lines(config)
    (name,) = values
    with pytest.raises(ValueError, match=rf"^resume: {name} was .* and is now {values[name]}"):
        run(dataclasses.replace(config, **values), resume=True)
    assert lines(config) == before
    run(dataclasses.replace(config, save_every=1), resume=True)  # how often it is saved changes no weight


def test_a_setting_that_the_runs_version_did_not_have_stood_at_its_default(tmp_path):
    now = make_config(tmp_path).to_dict() | OFF
    unknown = ("lora", "lora_merge", "max_tokens", "tile_tokens", "gpu_memory")
    before = {name: value for name, value in now.items() if name not in unknown}
    with pytest.raises(ValueError, match="^resume: max_tokens was 4096 and is now 99"):
        runfiles._check_same_settings(before, now | {"max_tokens": 99})
    with pytest.raises(ValueError, match="^resume: lora_merge was False and is now True"):
        runfiles._check_same_settings(before, now | {"lora_merge": True, "max_tokens": 4096})
    runfiles._check_same_settings(before, now | {"max_tokens": 4096})


def test_resume_on_other_rows_is_refused(tmp_path):
    config = make_config(tmp_path, save_every=2)
    with pytest.raises(Stop):
        run(config, after_step=stop_after(3))
    changed = [{**row, "answer": row["answer"].replace("born", "found")} for row in FORGET]
    data = make_training_set(
        config, tiny_tokenizer(), rows_from(changed, "f"), rows_from(RETAIN, "r"), [], max_length=None
    )
    with pytest.raises(ValueError, match="^resume: the rows or their tokens"):
        train(config, make_model(config), tiny_tokenizer(), data, resume=True, say=quiet, progress=False)


def test_resume_says_what_could_change_the_last_bits(tmp_path):
    config = make_config(tmp_path, save_every=2)
    with pytest.raises(Stop):
        run(config, after_step=stop_after(3))
    path = Path(config.output) / "metrics.jsonl"
    head, rest = path.read_text().split("\n", 1)
    header = json.loads(head)
    header["provenance"]["threads"] = 64
    # the header's length stays, or the checkpoint's count of bytes would not fit
    text = json.dumps(header)
    header["provenance"]["command"] = (
        header["provenance"]["command"][: len(head) - len(text)] if len(text) > len(head) else ""
    )
    header["provenance"]["command"] += "x" * (len(head) - len(json.dumps(header)))
    path.write_text(json.dumps(header) + "\n" + rest)
    said = []
    run(config, resume=True, say=said.append)
    assert any("threads 1, begun with 64" in text for text in said)


@pytest.mark.parametrize("text", ["", "{}\n", "[1]\n", "no json\n", '{"config": {}}\n', "\x80\n"])
def test_resume_from_a_foreign_metrics_file(tmp_path, text):
    config = make_config(tmp_path)
    Path(config.output).mkdir()
    (Path(config.output) / "metrics.jsonl").write_text(text)
    if not text:
        run(config, resume=True)
        return
    with pytest.raises(ValueError, match="is not a run's header"):
        run(config, resume=True)


# --------------------------------------------------------------------------------------------------------------- kills


@pytest.fixture(scope="module")
def cli_run(tmp_path_factory):
    """(arguments of a training run of four steps with a checkpoint after each, its finished output folder)."""
    folder = tmp_path_factory.mktemp("cli")
    save_tiny(folder / "model")
    arguments = [
        "train", "--method", "npo", "--beta", "0.1", "--lr", "1e-2", "--epochs", "2", "--batch-size", "3",
        "--seed", "0", "--warmup-epochs", "0", "--retain-term", "nll", "--save-every", "1",
        "--device", "cpu", "--dtype", "bfloat16",
        "--model", str(folder / "model"),
        "--forget", write_rows(folder / "forget.jsonl", FORGET),
        "--retain", write_rows(folder / "retain.jsonl", RETAIN),
    ]  # fmt: skip
    assert cli.main([*arguments, "--output", str(folder / "whole")]) == 0
    return arguments, folder / "whole"


def in_a_child(act):
    """Runs act() in a forked process and returns its wait status; the child never returns from here."""
    child = os.fork()
    if child == 0:
        # torch's thread pool does not survive a fork, and a new thread of transformers' loader would ask for it
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
        try:
            act()
        except BaseException as error:
            print(f"child: {error!r}", file=sys.stderr)
        finally:
            os._exit(97)
    return os.waitpid(child, 0)[1]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_on(owner, name, count=1, *, when=lambda *args: True, half=None):
    """owner.name kills the process at its count-th call that `when` accepts: before acting, or after half(*args)."""
    original, seen = getattr(owner, name), []

    def deadly(*args, **kwargs):
        if when(*args):
            seen.append(args)
            if len(seen) == count:
                if half is not None:
                    half(*args)
                die()
        return original(*args, **kwargs)

    setattr(owner, name, deadly)


def half_a_line(metrics, row):
    metrics._file.write(json.dumps(row).encode()[:40])
    metrics._file.flush()


def half_a_file(state, path):
    path.write_bytes(b"PK half")


MOMENTS = {
    "writing the header": lambda: kill_on(runfiles.MetricsFile, "write", 1, half=half_a_line),
    "storing the reference": lambda: kill_on(os, "replace", 1),
    "first metrics line": lambda: kill_on(runfiles.MetricsFile, "write", 2, half=half_a_line),
    "third metrics line": lambda: kill_on(runfiles.MetricsFile, "write", 4, half=half_a_line),
    "checkpoint 1, before the weights": lambda: kill_on(runfiles, "save_weights", 1),
    "checkpoint 2, half the optimizer": lambda: kill_on(torch, "save", 2, half=half_a_file),
    "checkpoint 2, before its name": lambda: kill_on(os, "rename", 1, when=lambda a, b: "step-00000002" in str(b)),
    "checkpoint 2, before the pointer": lambda: kill_on(os, "replace", 2, when=lambda a, b: str(b).endswith("latest")),
    "checkpoint 3, deleting the old one": lambda: kill_on(checkpoint, "_delete", 2),
    "saving the model": lambda: kill_on(os, "replace", 1, when=lambda a, b: str(b).endswith("model")),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_ends_as_if_nothing_happened(cli_run, tmp_path, moment):
    arguments, whole = cli_run
    output = tmp_path / "out"

    def act():
        MOMENTS[moment]()
        cli.main([*arguments, "--output", str(output)])

    status = in_a_child(act)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"not killed: status {status}"
    assert not (output / "model").exists()
    assert cli.main([*arguments, "--output", str(output), "--resume"]) == 0
    assert_same_output(output, whole)


def assert_same_output(output, whole):
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (output, whole))
    assert same_tree(ours, theirs)
    rows = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in text.splitlines()[1:]]
        for text in ((folder / "metrics.jsonl").read_text() for folder in (output, whole))
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 4
    states = [torch.load(checkpoint.latest(folder / "checkpoints") / "optimizer.pt") for folder in (output, whole)]
    assert same_tree(states[0], states[1])
    strays = [path for path in output.rglob("*") if "tmp" in path.name or path.name.startswith(".")]
    assert not [path for path in strays if path.parent.name != "reference"]  # a folder that processes may share


def test_a_killed_process_resumes(cli_run, tmp_path):
    """The same from outside, through the interpreter's front door."""
    arguments, whole = cli_run
    output = tmp_path / "out"
    command = [sys.executable, "-m", "unlearn.cli", *arguments, "--output", str(output)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pointer = output / "checkpoints" / "latest"
    deadline = time.monotonic() + 120
    while not pointer.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert pointer.exists()
    assert cli.main([*arguments, "--output", str(output), "--resume"]) == 0
    assert_same_output(output, whole)


# ------------------------------------------------------------------------------------------------- the same mathematics


@pytest.mark.parametrize("method", ["npo", "altpo", "wga", "kl"])
def test_micro_batches_change_nothing_but_rounding(tmp_path, method):
    values = {"retain_term": "kl"} if method == "kl" else {"method": method}
    # A weight whose gradient is nothing but rounding moves by lr under Adam; a small lr keeps that small.
    values |= {"lr": 1e-4, "warmup_epochs": 0.0}
    one = make_config(tmp_path, "one", max_tokens=10_000, **values)
    many = make_config(tmp_path, "many", max_tokens=20, **values)
    run(one)
    run(many)
    assert all(row["packs"] == 1 for row in steps(one)) and all(row["packs"] > 3 for row in steps(many))
    for a, b in zip(steps(one), steps(many), strict=True):
        for name in ("loss", "forget_loss", "retain_loss", "forget_logprob_per_token", "grad_norm"):
            assert abs(a[name] - b[name]) <= 1e-4 * abs(a[name]) + 1e-5, name
        assert a["answer_tokens"] == b["answer_tokens"] and a["tokens"] == b["tokens"]


@pytest.mark.parametrize("values", [{}, {"method": "altpo", "retain_term": "kl"}])
def test_gradient_checkpointing_changes_no_bit(tmp_path, values):
    plain = run(make_config(tmp_path, "plain", **values))
    model = make_model(make_config(tmp_path), attention_dropout=0.5)  # must be switched off, not replayed
    model.train()
    config = make_config(tmp_path, "recomputed", gradient_checkpointing=True, **values)
    assert same_weights(run(config, model), plain)
    assert not model.training and not any(
        getattr(module, "gradient_checkpointing", False) for module in model.modules()
    )
    assert model.model.layers[0].self_attn.attention_dropout == 0.5
    assert model.config.attention_dropout == 0.5


def test_gradient_checkpointing_recomputes(tmp_path):
    """Or the test above would compare a thing with itself."""
    model, forwards = make_model(make_config(tmp_path)), []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *args: forwards.append(1))
    values = {"epochs": 1, "method": "ga", "beta": None, "max_tokens": 10_000}
    run(make_config(tmp_path, "plain", **values), model)
    plain = len(forwards)
    run(make_config(tmp_path, "again", gradient_checkpointing=True, **values), model)
    assert len(forwards) - plain == 2 * plain


def test_dropout_is_off_even_if_the_model_comes_in_training_mode(tmp_path):
    expected = run(make_config(tmp_path, "expected"))
    model = make_model(make_config(tmp_path), attention_dropout=0.5)
    assert same_weights(run(make_config(tmp_path), model.train()), expected)


@pytest.mark.parametrize("max_tokens", [10_000, 40])
def test_clipping_bounds_the_whole_step(tmp_path, monkeypatch, max_tokens):
    norms = []
    original = AdamWSR.step

    def step(self, closure=None):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.cat([g.flatten() for g in grads]).double().norm().item())
        return original(self, closure)

    monkeypatch.setattr(AdamWSR, "step", step)
    config = make_config(tmp_path, max_grad_norm=0.5, max_tokens=max_tokens)
    run(config)
    reported = [row["grad_norm"] for row in steps(config)]
    assert all(norm > 0.5 for norm in reported)  # of the step as it was
    assert norms == pytest.approx([0.5] * NUM_STEPS, rel=1e-5)
    norms.clear()
    config = make_config(tmp_path, "loose", max_grad_norm=1e6, max_tokens=max_tokens)
    run(config)
    assert norms == pytest.approx([row["grad_norm"] for row in steps(config)], rel=1e-5)


def test_warm_up_and_decay(tmp_path):
    config = make_config(tmp_path, epochs=3, warmup_epochs=1.0, lr=0.5e-3)
    run(config)
    expected = [0, 1 / 2, 1, 3 / 4, 2 / 4, 1 / 4]  # two steps of warm-up, then linearly to 0 at the seventh
    assert [row["lr"] for row in steps(config)] == pytest.approx([0.5e-3 * share for share in expected])


def test_a_warm_up_that_leaves_no_step_is_refused(tmp_path):
    config = make_config(tmp_path, epochs=1, batch_size=100, warmup_epochs=1.0)
    with pytest.raises(ValueError, match="^warmup_epochs: 1.0"):
        run(config)
    assert not Path(config.output).exists()


def test_seed_decides(tmp_path):
    one, same, other = (run(make_config(tmp_path, name, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert same_weights(one, same) and not same_weights(one, other)


def test_skip_below_leaves_out_and_says_so(tmp_path):
    config = make_config(tmp_path, skip_below=0.9, retain_term="none", retain=None, max_tokens=10_000)
    run(config)
    counts = [row["active_sequences"] for row in steps(config)]
    assert counts[0] > 0 and min(counts) < 3 and all(0 <= count <= 3 for count in counts)
    assert "active_sequences" not in run_steps(tmp_path, "plain")[0]


def run_steps(tmp_path, name, **values):
    config = make_config(tmp_path, name, **values)
    run(config)
    return steps(config)


# -------------------------------------------------------------------------------------------------------------- methods


METHODS = {
    "ga": {"beta": None},
    "npo": {},
    "simnpo": {"beta": 2.5, "gamma": 0.0},
    "altpo": {},
    "idkdpo": {"alternates": "refusals"},
    "simpo": {"beta": 2.0, "gamma": 0.5},
    "kto": {"alternates": "refusals"},
    "kto-log": {"alternates": "refusals"},
    "wga": {"beta": 1.0},
    "satimp": {"beta": 5.0, "beta2": 1.0},
}


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Weights of a model that knows all the rows."""
    folder = tmp_path_factory.mktemp("learned")
    config = make_config(
        folder,
        method="finetune",
        beta=None,
        forget=None,
        retain_term="none",
        epochs=15,
        batch_size=15,
        warmup_epochs=0.0,
    )
    data = make_training_set(config, tiny_tokenizer(), [], rows_from(FORGET + RETAIN, "all"), [], max_length=None)
    model = make_model(config)
    train(config, model, tiny_tokenizer(), data, say=quiet, progress=False, save_model=False)
    rows = steps(config)
    assert rows[-1]["retain_logprob_per_token"] > rows[0]["retain_logprob_per_token"] + 2
    assert rows[0]["forget_loss"] is None and rows[0]["loss"] == pytest.approx(rows[0]["retain_loss"])
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("retain_term", ["nll", "kl"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_forgets_and_its_retain_term_keeps(tmp_path, learned, method, retain_term):
    if method in ("wga", "satimp") and retain_term == "kl":
        with pytest.raises(ValueError, match="^retain_term: kl is not accepted"):
            run(make_config(tmp_path, method=method, retain_term="kl", **METHODS[method]))
        return
    # all rows in every step, so that the rows of metrics compare; the first values are those before any step
    shared = {
        "method": method,
        "epochs": 6,
        "batch_size": 100,
        "warmup_epochs": 0.0,
        "lr": 3e-3,
        "retain_per_forget": 2,
    }
    shared |= METHODS[method]
    found = {}
    for term in (retain_term, "none"):
        config = make_config(tmp_path, term, retain_term=term, retain=None if term == "none" else "retain", **shared)
        model = make_model(config)
        model.load_state_dict(learned)
        run(config, model, save_model=False)
        found[term] = (steps(config), retain_logprob(model))
    for rows, _ in found.values():
        assert rows[-1]["forget_logprob_per_token"] < rows[0]["forget_logprob_per_token"] - 0.05
        if method not in ("wga", "satimp"):  # their weights fall with the probability, and the loss rises to 0
            assert rows[-1]["forget_loss"] < rows[0]["forget_loss"]
        assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert found[retain_term][1] > found["none"][1]
    first = found[retain_term][0][0]
    assert first["loss"] == pytest.approx(first["forget_loss"] + first["retain_loss"])
    if retain_term == "kl":
        assert abs(first["retain_loss"]) < 1e-5 and first["retain_logprob_per_token"] is None
    else:
        assert first["retain_loss"] == pytest.approx(-first["retain_logprob_per_token"])
    if method in ("npo", "altpo", "idkdpo"):  # at the reference the loss is 2/beta log 2
        assert first["forget_loss"] == pytest.approx(20 * math.log(2), rel=1e-4)


def retain_logprob(model):
    config = make_config(Path("unused"))
    sequences = make_data(config).retain
    values = reference.score(model, list(sequences), max_tokens=1000)
    return sum(values) / sum(s.num_answer_tokens for s in sequences)


def test_weights_of_the_terms(tmp_path):
    row = run_steps(tmp_path, "out", forget_weight=0.125, retain_weight=3.0)[0]
    assert row["loss"] == pytest.approx(0.125 * row["forget_loss"] + 3.0 * row["retain_loss"])
    plain = run_steps(tmp_path, "plain")[0]
    assert row["forget_loss"] == pytest.approx(plain["forget_loss"])
    assert row["retain_loss"] == pytest.approx(plain["retain_loss"])
    assert run_steps(tmp_path, "none", forget_weight=0.0)[0]["forget_loss"] is None


# ----------------------------------------------------------------------------------------------------------- invariants


def test_invariants_are_printed(tmp_path):
    said = []
    run(make_config(tmp_path), say=said.append)
    (line,) = [text for text in said if "before the first step" in text]
    difference, allowed = map(float, re.search(r": (\S+) nats at most \(allowed (\S+)\)", line).groups())
    assert 0 <= difference <= allowed < 1e-2


def stored_reference(tmp_path, config):
    with pytest.raises(Stop):
        run(config, after_step=stop_after(0))
    path = config.reference_dir / reference.LOGPROB_FILE
    (Path(config.output) / "metrics.jsonl").unlink()
    return path


@pytest.mark.parametrize("change", [0.05, float("nan")])
def test_a_wrong_reference_is_caught_before_the_first_step(tmp_path, monkeypatch, change):
    """Values that are well-formed, under the right identity, and of another function than the model's."""
    original = reference.score
    monkeypatch.setattr(reference, "score", lambda *args, **kwargs: [v + change for v in original(*args, **kwargs)])
    config = make_config(tmp_path)
    model = make_model(config)
    with pytest.raises(InvariantError, match=f"stored reference log-likelihoods differ by {change}"):
        run(config, model)
    assert same_weights(model, make_model(config))


def test_a_tampered_file_is_caught(tmp_path):
    config = make_config(tmp_path)
    path = stored_reference(tmp_path, config)
    with safe_open(path, framework="pt") as file:
        metadata, values = file.metadata(), file.get_tensor("logprob")
    save_file({"logprob": values + 0.05}, path, metadata)
    with pytest.raises(ValueError, match="^reference_cache: .* is damaged"):
        run(config)


def test_a_forward_that_is_not_repeatable_is_caught(tmp_path):
    config = make_config(tmp_path)
    model = make_model(config)
    model.model.norm.register_forward_hook(lambda module, args, out: out * (1 + 1e-3 * torch.rand(())))
    with pytest.raises(InvariantError, match="the first micro-batch run twice differs by"):
        run(config, model)


def test_a_stored_reference_is_loaded_and_another_models_refused(tmp_path):
    config = make_config(tmp_path)
    stored_reference(tmp_path, config)
    said = []
    run(config, say=said.append)
    assert any(text.endswith("sequences: loaded") for text in said)
    other = make_config(tmp_path, "other", reference_cache=str(config.reference_dir))
    with pytest.raises(ValueError, match="^reference_cache: .* is of another model"):
        run(other, tiny_llama(seed=5))


# ----------------------------------------------------------------------------------------------------------- non-finite


def poison(model, at_call):
    """From its at_call-th forward on, the model's answers are NaN."""
    calls = []

    def hook(module, args, out):
        calls.append(1)
        return out * float("nan") if len(calls) == at_call else out

    model.model.norm.register_forward_hook(hook)
    return model


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    config = make_config(tmp_path, method="ga", beta=None, max_tokens=10_000, warmup_epochs=0.0)
    before = run(dataclasses.replace(config, output=str(tmp_path / "good")), after_step=None)
    model, seen = poison(make_model(config), 3), []
    with pytest.raises(
        NonFiniteError, match=r"^step 3: loss nan, gradient norm nan; not applied. Sequences: "
    ) as caught:
        run(config, model, after_step=lambda done: seen.append({k: v.clone() for k, v in model.state_dict().items()}))
    assert same_tree(dict(model.state_dict()), seen[-1]) and not same_weights(model, before)
    assert len(steps(config)) == 2
    saved = json.loads((Path(config.output) / "non-finite-step-000003.json").read_text(), parse_constant=pytest.fail)
    assert saved["metrics"]["loss"] == "nan"
    assert len(saved["batch"]) == 6 and {member["role"] for member in saved["batch"]} == {"FORGET", "RETAIN"}
    assert all(member["key"] and member["input_ids"] for member in saved["batch"])
    assert saved["batch"][0]["key"] in str(caught.value)
    assert "non-finite-step-000003.json" in str(caught.value)


def test_a_loss_that_is_not_finite_is_skipped_if_asked(tmp_path, optimizers):
    config = make_config(tmp_path, max_tokens=40, on_non_finite="skip")  # the step's other packs have finite gradients
    model, said = make_model(config), []
    run(config, poison(model, 20), say=said.append)
    rows = [
        json.loads(line, parse_constant=pytest.fail)
        for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    ]
    skipped = [row for row in rows[1:] if row.get("skipped")]
    assert len(rows) == 1 + NUM_STEPS and len(skipped) == 1 and skipped[0]["loss"] == "nan"
    assert all(weight.isfinite().all() for weight in model.parameters())
    assert {state["step"] for state in optimizers[0].state.values()} == {NUM_STEPS - 1}
    assert any("not applied" in text for text in said)


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    config = make_config(tmp_path, max_grad_norm=1.0)
    model = make_model(config)
    model.model.layers[0].mlp.down_proj.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(NonFiniteError, match=r"loss \d.*, gradient norm (inf|nan); not applied"):
        run(config, model)
    assert same_weights(model, make_model(config))


def test_broken_weights_are_reported_as_such(tmp_path):
    config = make_config(tmp_path)
    model = make_model(config)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(NonFiniteError, match="^step 1: loss nan"):
        run(config, model)


# ---------------------------------------------------------------------------------------------------------------- files


def test_metrics_begin_with_configuration_and_provenance(tmp_path):
    config = make_config(tmp_path)
    run(config)
    header, *rows = lines(config)
    assert header["config"] == config.to_dict() | OFF and header["num_steps"] == NUM_STEPS == len(rows)
    assert {"unlearn", "commit", "torch", "transformers", "device", "threads", "imported_from", "command"} <= set(
        header["provenance"]
    )
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    assert [row["epoch"] for row in rows] == [1, 1, 2, 2, 3, 3]
    assert all(row["seconds"] > 0 for row in rows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_saved_model_loads_with_transformers(tmp_path, dtype):
    config = make_config(tmp_path, dtype=dtype)
    model = run(config)
    folder = Path(config.output) / "model"
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert loaded.dtype == getattr(torch, dtype)
    assert loaded.config._attn_implementation != model.config._attn_implementation
    assert same_weights(loaded, model)
    loaded.float(), model.float()  # tiny_llama's rotary frequencies are bf16, the loaded model's are not
    model.model.rotary_emb.inv_freq = loaded.model.rotary_emb.inv_freq
    ids = torch.arange(12)[None]
    with torch.no_grad(), generating(model):
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("Where was Mara?").input_ids == tiny_tokenizer()("Where was Mara?").input_ids


def test_the_model_is_replaced_whole_or_not_at_all(tmp_path):
    config = make_config(tmp_path)
    model = run(config)
    folder = Path(config.output) / "model"
    before = (folder / "model.safetensors").read_bytes()

    class Broken:
        def save_pretrained(self, path):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        runfiles.save_pretrained(model, Broken(), folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_an_output_in_use_is_refused(tmp_path):
    config = make_config(tmp_path, save_every=2)
    run(config)
    with pytest.raises(ValueError, match="^output: .* already holds a run; --resume"):
        run(config)
    (Path(config.output) / "metrics.jsonl").unlink()  # checkpoints alone are a run, too
    with pytest.raises(ValueError, match="^output: .* already holds a run; --resume"):
        run(config)
    with pytest.raises(ValueError, match="^resume: .* has checkpoints and no metrics.jsonl"):
        run(config, resume=True)


def test_a_checkpoint_that_someone_deleted_is_named(tmp_path):
    import shutil

    config = make_config(tmp_path, save_every=2)
    run(config)
    shutil.rmtree(checkpoint.latest(tmp_path / "out" / "checkpoints"))
    with pytest.raises(ValueError, match="^output: .*latest names 'step-"):
        run(config, resume=True)


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nothing")):
        with pytest.raises(ValueError, match="^output: .* cannot be written") as caught:
            run(make_config(tmp_path, output=str(output)))
        assert "\n" not in str(caught.value)


def test_after_step_is_called_around_every_step_and_is_not_timed(tmp_path):
    seen = []

    def after_step(done):
        seen.append(done)
        time.sleep(0.02)

    config = make_config(tmp_path)
    result = train(
        config,
        make_model(config),
        tiny_tokenizer(),
        make_data(config),
        after_step=after_step,
        say=quiet,
        progress=False,
    )
    assert seen == list(range(NUM_STEPS + 1))
    rows = lines(config)[1:]
    assert result.seconds == pytest.approx(sum(row["seconds"] for row in rows), abs=1e-3)
    assert result.num_steps == NUM_STEPS and result.reference_seconds > 0 and result.peak_memory_mib > 10


def test_progress_goes_to_stderr(tmp_path, capsys):
    run(make_config(tmp_path), progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "npo" in err and "reference" in err


def test_frozen_weights_stay(tmp_path):
    config = make_config(tmp_path)
    model = make_model(config)
    model.lm_head.weight.requires_grad_(False)
    before = model.lm_head.weight.clone()
    run(config, model)
    assert torch.equal(model.lm_head.weight, before)
    assert not torch.equal(model.model.embed_tokens.weight, make_model(config).model.embed_tokens.weight)
