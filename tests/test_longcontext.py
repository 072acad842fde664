"""Runs with the measures for long contexts: the result is that of a run without, resumed too; early refusals."""

import json
from pathlib import Path

import pytest
import torch

from tests.test_train import (
    FORGET,
    NUM_STEPS,
    RETAIN,
    Stop,
    lines,
    make_config,
    make_model,
    run,
    same_weights,
    steps,
    stop_after,
)
from tests.tiny import save_tiny, tiny_llama, write_rows
from unlearn import cli, optimizers
from unlearn.optim import AdamWOffload
from unlearn.train import NonFiniteError

MEASURES = {
    "offloaded": {"tile_tokens": 16, "offload_checkpoints": "all"},
    "hybrid": {"tile_tokens": 16, "offload_checkpoints": "1", "save_attention": True},
    "auto": {"tile_tokens": 16, "offload_checkpoints": "auto", "gradient_checkpointing": True},
}


@pytest.mark.parametrize("retain_term", ["nll", "kl"])
@pytest.mark.parametrize("max_tokens", [10_000, 60])
def test_a_tiled_run_ends_where_the_plain_one_does(tmp_path, retain_term, max_tokens):
    """NPO with a retain term in float64, in one micro-batch and in several: tiles are cut across sequences of both."""
    shared = {"retain_term": retain_term, "max_tokens": max_tokens, "epochs": 1, "warmup_epochs": 0.0}
    found = []
    for name, measures in (("plain", {}), ("tiled", {"tile_tokens": 16, "offload_checkpoints": "1"})):
        config = make_config(tmp_path, name, **shared, **measures)
        found.append((run(config, tiny_llama(dtype=torch.float64)), steps(config)))
    for key in ("loss", "forget_loss", "retain_loss", "grad_norm"):
        values = [[row[key] for row in rows] for _, rows in found]
        assert values[1] == pytest.approx(values[0], rel=1e-9), key
    for one, other in zip(found[0][0].parameters(), found[1][0].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_where_inputs_wait_changes_no_bit(tmp_path):
    short = {"epochs": 1, "warmup_epochs": 0.0}
    tiled = run(make_config(tmp_path, "tiled", tile_tokens=16, **short))
    for name, measures in MEASURES.items():
        assert same_weights(run(make_config(tmp_path, name, **measures, **short)), tiled), name
    plain = run(make_config(tmp_path, "plain", **short))
    for layers in ("1", "all"):
        config = make_config(tmp_path, layers, gradient_checkpointing=True, offload_checkpoints=layers, **short)
        assert same_weights(run(config), plain), layers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, dtype):
    shared = {"dtype": dtype, "save_every": 2, "max_tokens": 10_000, **MEASURES["hybrid"]}
    shared |= {"optimizer": "adafactor", "optimizer_in_backward": True}
    expected = run(make_config(tmp_path, "whole", **shared))
    config = make_config(tmp_path, "killed", **shared)
    with pytest.raises(Stop):
        run(config, after_step=stop_after(3))
    assert same_weights(run(config, resume=True), expected)
    assert steps(config) == steps(make_config(tmp_path, "whole", **shared))


@pytest.mark.parametrize("in_backward", [False, True])
def test_states_on_the_host_end_where_adamw_does_even_when_killed(tmp_path, monkeypatch, in_backward):
    shared = {"dtype": "bfloat16", "save_every": 2, "max_tokens": 10_000, "optimizer_in_backward": in_backward}
    expected = run(make_config(tmp_path, "adamw", **shared))
    monkeypatch.setitem(optimizers._MAKERS, "adamw-offload", AdamWOffload)  # a CPU is refused otherwise
    config = make_config(tmp_path, "offload", optimizer="adamw-offload", **shared)
    with pytest.raises(Stop):
        run(config, after_step=stop_after(3))
    assert same_weights(run(config, resume=True), expected)
    assert steps(config) == steps(make_config(tmp_path, "adamw", **shared))


def test_steps_in_the_backward_are_the_runs_own(tmp_path):
    shared = {"max_tokens": 10_000, "tile_tokens": 16}
    plain = make_config(tmp_path, "plain", **shared)
    inside = make_config(tmp_path, "inside", **shared, optimizer_in_backward=True)
    assert same_weights(run(plain), run(inside))
    assert steps(plain) == steps(inside)  # gradient norms included


def test_several_micro_batches_are_refused_before_anything_is_written(tmp_path):
    config = make_config(tmp_path, optimizer_in_backward=True, max_tokens=60)
    message = (
        r"^optimizer_in_backward: step 1 takes \d micro-batches of max_tokens 60, and gradients are not accumulated"
    )
    with pytest.raises(ValueError, match=message):
        run(config)
    assert not Path(config.output).exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"offload_checkpoints": "3", "tile_tokens": 8}, "offload_checkpoints: 3 is not accepted; 0 to 2 layers are"),
        ({"offload_checkpoints": "3", "gradient_checkpointing": True}, "offload_checkpoints: 3 is not accepted"),
    ],
)
def test_more_layers_than_there_are(tmp_path, values, message):
    config = make_config(tmp_path, **values)
    model = make_model(config)
    with pytest.raises(ValueError, match=message):
        run(config, model)
    assert not Path(config.output).exists()
    assert not model.training and not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tile_tokens": -1}, "tile_tokens: -1 is not accepted; a number of 0 or more is"),
        ({"save_attention": True}, "save_attention: given, but without tile_tokens"),
        (
            {"offload_checkpoints": "all", "gradient_checkpointing": False},
            "offload_checkpoints: all given, but with gradient_checkpointing off and without tile_tokens",
        ),
        ({"offload_checkpoints": "most", "tile_tokens": 4}, "offload_checkpoints: 'most' is not accepted; a number of"),
        ({"offload_checkpoints": "-1", "tile_tokens": 4}, "offload_checkpoints: '-1' is not accepted"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_config(tmp_path, **values)
    assert "\n" not in str(caught.value)


def test_a_broken_loss_moves_no_weight_and_a_broken_gradient_is_not_called_unapplied(tmp_path):
    for name, break_it, words in (
        ("loss", lambda h: h * float("nan"), "; not applied. Sequences:"),
        ("gradient", lambda h: h.register_hook(lambda g: g * float("nan")) and h, "; applied in the backward already;"),
    ):
        config = make_config(tmp_path, name, optimizer_in_backward=True, max_tokens=10_000, method="ga", beta=None)
        model = make_model(config)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        done = []

        def spoil(module, args, output, break_it=break_it, done=done):
            return break_it(output) if output.requires_grad and done else output

        model.model.norm.register_forward_hook(spoil)
        with pytest.raises(NonFiniteError) as caught:
            run(config, model, after_step=lambda step, done=done: step == 0 and done.append(step))
        assert words in str(caught.value), str(caught.value)
        moved = any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert moved == (name == "gradient")


def test_the_command_line(tmp_path, capsys):
    save_tiny(tmp_path / "model")
    arguments = [
        "--model", str(tmp_path / "model"), "--method", "npo", "--beta", "0.1", "--lr", "1e-3", "--epochs", "1",
        "--batch-size", "3", "--seed", "0", "--dtype", "float32", "--device", "cpu", "--warmup-epochs", "0",
        "--forget", write_rows(tmp_path / "forget.jsonl", FORGET), "--retain-term", "nll",
        "--retain", write_rows(tmp_path / "retain.jsonl", RETAIN), "--tile-tokens", "16",
    ]  # fmt: skip
    out = tmp_path / "out"
    assert cli.main(["train", *arguments, "--output", str(out), "--offload-checkpoints", "1", "--optimizer",
                     "adafactor", "--optimizer-in-backward"]) == 0  # fmt: skip
    assert "layer inputs: 1 of 2 layers on the host" in capsys.readouterr().out
    header = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert header["config"]["tile_tokens"] == 16 and header["config"]["offload_checkpoints"] == "1"
    assert (
        cli.main(["reference", *arguments, "--output", str(tmp_path / "reference"), "--offload-checkpoints", "all"])
        == 0
    )
    capsys.readouterr()
    assert cli.main(["train", *arguments, "--output", str(tmp_path / "no"), "--max-tokens", "50",
                     "--optimizer-in-backward"]) == 2  # fmt: skip
    assert capsys.readouterr().err.startswith("unlearn: error: optimizer_in_backward: step 1 takes ")
    assert not (tmp_path / "no").exists()
    assert len(lines(make_config(tmp_path))) == 1 + NUM_STEPS // 3
