"""Measures by need: what settings leave open is what `unlearn plan` says, a resume keeps it, and no result changes."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from tests.families import family
from tests.test_train import Stop, lines, make_config, make_data, make_model, run, same_weights, steps, stop_after
from tests.tiny import SENTENCES, tiny_tokenizer
from unlearn import cli, forecast, memory, plan, runfiles
from unlearn.batches import all_steps, load_training_set, packing_of
from unlearn.commands.train import _config
from unlearn.engage import OFF, is_open, settings_of, settled, wanted_of
from unlearn.forecast import budget_of
from unlearn.measures import GIB, Load, Measures
from unlearn.model import load_skeleton, prepare
from unlearn.plan import Budget, Wanted
from unlearn.shapes import SHAPES, shape_of_config

CPU = torch.device("cpu")
WINDOW = 8192
CONTEXT = WINDOW - 1  # fed tokens


def size(num_bytes):
    return f"{(num_bytes + 1) / GIB:.12f}GiB"


def rungs(shape, load, **wanted):
    """The memory that each plan of the ladder takes with its reserve."""
    return [one.total + one.reserve for one in plan.ladder(shape, load, Budget(0.0), Wanted(**wanted))]


def settings(config):
    return {name: getattr(config, name) for name in settings_of(Measures())}


# ------------------------------------------------------------------------------------------------------- the two agree


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """(folder, skeleton, steps): a model wide enough for tiles to pay, two documents as one window each."""
    folder = tmp_path_factory.mktemp("documents")
    values = dict(hidden_size=64, intermediate_size=512, num_hidden_layers=6, max_position_embeddings=1 << 15)
    config = LlamaConfig(**values, vocab_size=330, num_attention_heads=4, num_key_value_heads=2)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for name in ("forget", "retain"):
        (folder / f"{name}.txt").write_text(name + " ".join(SENTENCES * 200))
    run_of = config_of(folder)
    data = load_training_set(run_of, tiny_tokenizer(), max_length=None)
    return folder, load_skeleton(run_of.model, dtype="bfloat16"), all_steps(data, run_of)


def command(folder, *more):
    return [
        "train", "--model", f"{folder}/model", "--forget", f"{folder}/forget.txt", "--retain", f"{folder}/retain.txt",
        "--retain-term", "nll", "--method", "npo", "--beta", "0.1", "--lr", "1e-5", "--epochs", "1", "--batch-size",
        "1", "--warmup-epochs", "0", "--seed", "0", "--window", str(WINDOW), "--device", "cpu", "--output",
        f"{folder}/out", *more,
    ]  # fmt: skip


def config_of(folder, *more):
    return _config(cli._parser().parse_args(command(folder, *more)))


def said(capsys, arguments):
    capsys.readouterr()
    assert cli.main(arguments) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "more",
    [(), ("--host-memory", "1MiB"), ("--tile-tokens", "0"), ("--gradient-checkpointing", "--offload-checkpoints", "2"),
     ("--tile-tokens", "2048", "--save-attention"), ("--no-gradient-checkpointing",), ("--optimizer-in-backward",),
     ("--lora", "4")],
)  # fmt: skip
@pytest.mark.parametrize("together", [1, 2])
def test_train_engages_what_plan_says(documents, capsys, monkeypatch, together, more):
    """At the memory of each rung of the ladder, with both documents in one pack and with a pack for each."""
    monkeypatch.setattr(forecast, "is_available", lambda name, device: True)
    folder, skeleton, made = documents
    packing = packing_of(made, together * CONTEXT)
    assert max(packing.tokens) == together * CONTEXT and max(packing.counts) == 2 // together

    def train(*options):
        run = config_of(folder, "--max-tokens", str(together * CONTEXT), *options)
        return forecast.forecast(run, skeleton, packing, budget=budget_of(run, CPU), device=CPU)

    load, found = Load((CONTEXT,) * together, 2 // together, fixed=True), set()
    for gpu in [*rungs(shape_of_config(skeleton.config, "model"), load), GIB]:
        given = ("--gpu-memory", size(gpu), "--optimizer", "auto", *more)
        asked = ["--model", f"{folder}/model", "--context", str(CONTEXT), "--max-tokens", str(together * CONTEXT)]
        planned = said(capsys, ["plan", *asked, *given, "--json"])
        engaged = train(*given)
        on = Measures(**{k: v for k, v in planned["measures"].items() if k != "names"})
        assert engaged.plan.on == on and engaged.plan.total == planned["total"] and engaged.plan.fits == planned["fits"]
        for limit in ((), ("--gpu-memory", "1")):  # they leave nothing open
            pasted = train(*planned["options"], *limit)
            assert pasted.plan.on == on
        assert not any(is_open(engaged.config, name) for name in (*OFF, "optimizer"))
        assert {**settings(pasted.config), "gradient_checkpointing": 0} == {
            **settings(engaged.config), "gradient_checkpointing": 0,
        }  # fmt: skip
        found.add((*on.names(), engaged.plan.fits))
    if not more:
        assert {("adamw", True), ("checkpointing", "adamw", True)} < found
        assert ("checkpointing", "tiled layers", "adamw", True) in found
        assert any({"checkpoints on host", "adamw8bit"} < set(names) for names in found)
        assert any(not names[-1] for names in found)  # GIB: less than the reserve


def test_a_step_in_the_backward_comes_only_where_packs_leave_it_nothing_to_add_up():
    """7B on 48 GB, and a host too small for float32 states: the plan of a free hand puts both documents in one pack, a
    token budget may forbid it."""
    shape, budget = SHAPES["llama-2-7b"], Budget(48e9, 40 * GIB)
    for load, expected in (
        (Load((65536,), 2), True),
        (Load((65536,), 2, fixed=True), False),
        (Load((65536, 65536), 1, fixed=True), True),
    ):
        made = plan.choose(shape, load, budget, Wanted())
        assert made.on.in_backward == made.fits == expected, load
    larger = plan.choose(shape, Load((65536,), 2), dataclasses.replace(budget, host=128 * GIB), Wanted())
    assert larger.fits and larger.on.optimizer == "adamw-offload" and not larger.on.in_backward
    # asked for, it is planned whatever the packs are: train itself refuses several
    assert plan.choose(shape, Load((65536,), 2, fixed=True), budget, Wanted("adamw8bit-in-backward")).on.in_backward


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({}, plan.OPTIMIZERS),
        ({"max_grad_norm": 1.0}, ("adamw", "adamw8bit", "adamw-offload")),
        ({"on_non_finite": "skip"}, ("adamw", "adamw8bit", "adamw-offload")),
        ({"optimizer_in_backward": True}, ("adamw-in-backward", "adamw8bit-in-backward", "adamw-offload-in-backward")),
        ({"dtype": "float32"}, ("adamw",)),
    ],
)
def test_auto_goes_through_the_optimizers_that_can_be_had(tmp_path, values, names):
    config = make_config(tmp_path, **{"dtype": "bfloat16", "optimizer": "auto"} | values)
    shape = SHAPES["llama-3.2-1b"]
    assert wanted_of(config, shape).optimizers == names and wanted_of(config, shape).optimizer is None
    for missing in ("adamw8bit", "adamw-offload"):
        without = wanted_of(config, shape, available=lambda name, missing=missing: name != missing).optimizers
        assert without == tuple(name for name in names if not name.startswith(missing))
    named = dataclasses.replace(config, optimizer="adafactor")
    assert wanted_of(named, shape).optimizer == "adafactor" + "-in-backward" * config.optimizer_in_backward


def test_a_named_card_is_planned_as_one_with_its_optimizers(documents, capsys):
    """Not here: what needs a GPU can be had there, unless the run is to be on a CPU."""
    folder, skeleton, made = documents
    load, shape = Load((CONTEXT,), 2, fixed=True), shape_of_config(skeleton.config, "model")
    plans = plan.ladder(shape, load, Budget(0.0), Wanted(optimizer="adamw-offload"))
    given = ("--gpu-memory", size(min(one.total + one.reserve for one in plans)), "--optimizer", "auto", "--max-tokens",
             str(CONTEXT), "--dry-run", "--json")  # fmt: skip
    for device, can in (("auto", True), ("cuda", True), ("cpu", False)):
        found = said(capsys, [*command(folder, *given), "--device", device])["measures"]["settings"]["optimizer"]
        assert (found == "adamw-offload") == can, device
    assert cli.main(command(folder, "--optimizer", "adamw-offload", "--dry-run")) == 2
    assert "adamw-offload spares a GPU's memory and the model is on 'cpu'" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- the run


def load_of(config):
    return forecast.run_load(config, packing_of(all_steps(make_data(config), config), config.max_tokens))


def memory_for(config, rung, model=None):
    """What the ladder's plan of this number takes, as a setting."""
    shape = shape_of_config((model or make_model(config)).config, "tiny")
    return size(rungs(shape, load_of(config), itemsize=4, optimizer="adamw")[rung])


def header(config):
    return lines(config)[0]["config"]


def test_without_a_limit_nothing_is_engaged(tmp_path):
    config, told = make_config(tmp_path), []
    run(config, say=told.append)
    assert header(config) == config.to_dict() | OFF
    assert not any("measures" in text for text in told)
    limited = make_config(tmp_path, "limited", gpu_memory="2", host_memory="1GB")
    assert same_weights(run(limited, say=told.append), run(make_config(tmp_path, "again")))
    assert {name: header(limited)[name] for name in OFF} == OFF
    assert "measures within 2 GiB and 0.9313 on the host: adamw" in told


def test_a_limit_engages_what_it_takes_and_changes_no_bit(tmp_path):
    base = make_config(tmp_path)
    expected, told = run(base), []
    config = make_config(tmp_path, "limited", gpu_memory=memory_for(base, 1), save_every=2)
    seen = []

    def look(step, model):
        seen.append([getattr(layer, "gradient_checkpointing", False) for layer in model.model.layers])
        if step == 3:
            raise Stop

    model = make_model(config)
    with pytest.raises(Stop):
        run(config, model, after_step=lambda step: look(step, model), say=told.append)
    assert all(all(one) for one in seen) and seen
    assert "measures within 1.001 GiB: checkpointing, adamw" in told
    begun = header(config)
    assert begun == config.to_dict() | OFF | {"gradient_checkpointing": True}
    # what is free at the resume is another matter
    for memory_now in ("80", None):
        again = dataclasses.replace(config, gpu_memory=memory_now)
        assert same_weights(run(again, resume=True), expected) and header(config) == begun
    assert steps(config) == steps(base)


def test_a_resume_that_names_another_measure_is_refused(tmp_path):
    config = make_config(tmp_path, save_every=2, tile_tokens=16, save_attention=True, gpu_memory="2")
    with pytest.raises(Stop):
        run(config, after_step=stop_after(3))
    assert header(config)["gradient_checkpointing"] is False
    for values, message in (
        ({"tile_tokens": 0}, "^resume: tile_tokens was 16 and is now 0"),
        ({"gradient_checkpointing": True}, "^resume: gradient_checkpointing was False and is now True"),
        ({"optimizer": "adafactor"}, "^resume: optimizer was 'adamw' and is now 'adafactor'"),
    ):
        with pytest.raises(ValueError, match=message):
            run(dataclasses.replace(config, **{"tile_tokens": None, "save_attention": None} | values), resume=True)
    left = {"tile_tokens": None, "save_attention": None, "optimizer": "auto", "offload_checkpoints": "auto"}
    auto = dataclasses.replace(config, **left)
    expected = run(make_config(tmp_path, "whole", tile_tokens=16))
    assert same_weights(run(auto, resume=True), expected)


@pytest.mark.parametrize(
    "before", [{"gradient_checkpointing": True}, {"tile_tokens": 16, "offload_checkpoints": "all"}]
)
def test_a_run_of_the_version_before_goes_on_as_it_began(tmp_path, before):
    """Its header had False, 0 and None for off, and it knew no limit."""
    expected = run(make_config(tmp_path, "whole", **before))
    config = make_config(tmp_path, save_every=2, **before)
    with pytest.raises(Stop):
        run(config, after_step=stop_after(3))
    path = Path(config.output) / "metrics.jsonl"
    text, rest = path.read_text().split("\n", 1)
    old = json.loads(text)
    for name in ("gpu_memory", "host_memory"):
        del old["config"][name]
    old["config"]["offload_checkpoints"] = before.get("offload_checkpoints")
    old["padding"] = "x" * (len(text) - len(json.dumps(old | {"padding": ""})))  # the checkpoint counts its bytes
    path.write_text(json.dumps(old) + "\n" + rest)
    now = dataclasses.replace(config, **dict.fromkeys(OFF), gpu_memory="1")
    begun = runfiles.as_begun(now)
    assert {name: getattr(begun, name) for name in OFF} == {**OFF, **before}
    assert same_weights(run(now, resume=True), expected)


def test_a_finished_run_is_known_by_its_own_measures(tmp_path):
    config = make_config(tmp_path, epochs=1, warmup_epochs=0.0, gpu_memory=memory_for(make_config(tmp_path), 1))
    run(config)
    now = runfiles.as_begun(dataclasses.replace(config, gpu_memory=None))
    assert now.gradient_checkpointing is True and runfiles.is_finished(Path(config.output), now.to_dict())
    path = Path(config.output) / "metrics.jsonl"
    path.write_text(path.read_text().replace('"tile_tokens": 0', '"tile_tokens": "0"'))
    assert runfiles.as_begun(config) is config  # a header that no run wrote


def test_what_does_not_fit_is_said_and_tried(tmp_path):
    config, told = make_config(tmp_path, gpu_memory="1", epochs=1, warmup_epochs=0.0), []
    run(config, say=told.append)
    (warning,) = [text for text in told if text.startswith("warning: ")]
    assert "MiB more than the GPU has; a smaller --max-tokens" in warning and warning.endswith("plans are careful")
    assert header(config)["tile_tokens"] == 4096 or header(config)["gradient_checkpointing"]


def test_the_hosts_memory_may_be_what_is_short(tmp_path, monkeypatch):
    monkeypatch.setattr(forecast, "is_available", lambda name, device: True)
    shape, load = SHAPES["llama-3.1-8b"], Load((131072,), 2)
    made = plan.choose(shape, load, Budget(141e9, GIB), Wanted("adamw", tile_tokens=4096, host_layers=32))
    config = make_config(tmp_path, dtype="bfloat16", max_grad_norm=1.0)
    (warning,) = forecast.Forecast(config, made.budget, made, CPU, 0.0).lines()[2:]
    assert "the layers' inputs are 31744 MiB more than the host has; --max-tokens 131072 --gradient-ch" in warning
    assert "--optimizer adamw8bit would do" in warning
    monkeypatch.setattr(forecast, "is_available", lambda name, device: name == "adamw")  # no torchao, no GPU
    (warning,) = forecast.Forecast(config, made.budget, made, CPU, 0.0).lines()[2:]
    assert "--optimizer adamw --lora 16 would do" in warning
    away = plan.choose(shape, Load((1024,)), Budget(80e9, GIB), Wanted("adamw-offload", host_layers=0))
    (warning,) = forecast.Forecast(config, away.budget, away, CPU, 0.0).lines()[2:]
    assert "the optimizer's states are 60" in warning and "inputs" not in warning
    made = plan.choose(shape, Load((1024,)), Budget(None), Wanted(host_layers=2))  # what is recomputed alone can wait
    assert made.on == Measures(checkpointing=True, host_layers=2)


@pytest.mark.parametrize(("name", "kept"), [("gpt-neox", "model: GPTNeoXForCausalLM is of type 'gpt_neox'")])
def test_a_model_that_cannot_be_planned_engages_nothing(tmp_path, name, kept):
    config, told = make_config(tmp_path, gpu_memory="1", epochs=1, warmup_epochs=0.0), []
    run(config, prepare(family(name, vocab=330)), say=told.append)
    assert told[0].startswith(f"memory plan: none ({kept}; plans exist for") and told[0].endswith("engaged by need")
    assert {key: header(config)[key] for key in OFF} == OFF
    wide = dataclasses.replace(config, gradient_checkpointing=True, offload_checkpoints="auto", optimizer="auto")
    for limited, expected in ((True, "all"), (False, "0")):
        made = settled(wide, None, limited=limited)
        assert (made.gradient_checkpointing, made.offload_checkpoints, made.optimizer) == (True, expected, "adamw")


@pytest.mark.parametrize("named", ["1", "all"])
def test_what_waits_on_the_host_is_recomputed(documents, named):
    """Without limits too, and for a model that is not planned."""
    folder, skeleton, made = documents
    config = config_of(folder, "--offload-checkpoints", named)
    planned = forecast.forecast(config, skeleton, packing_of(made, CONTEXT), budget=Budget(None), device=CPU)
    for found in (planned.config, settled(config, None, limited=False)):
        assert found.gradient_checkpointing and found.tile_tokens == 0
    assert planned.plan.on.host_layers == (1 if named == "1" else planned.plan.shape.layers)
    tiles = settled(dataclasses.replace(config, tile_tokens=64), None, limited=False)
    assert (tiles.gradient_checkpointing, tiles.tile_tokens) == (False, 64)


def test_layers_that_cannot_be_tiled_are_not(documents):
    """A model of a known type whose layers are someone's own: recomputed and sent to the host, never tiled."""
    folder, skeleton, made = documents
    config, packing = config_of(folder), packing_of(made, CONTEXT)
    assert forecast.forecast(config, skeleton, packing, budget=Budget(1.0), device=CPU).plan.on.tiled
    own = copy.deepcopy(skeleton)
    for layer in own.model.layers:
        layer.__class__ = type("OwnLayer", (type(layer),), {})
    for budget, recomputed in ((Budget(1.0), True), (Budget(None), False)):
        found = forecast.forecast(config, own, packing, budget=budget, device=CPU)
        assert found.config.tile_tokens == 0 and found.config.gradient_checkpointing == recomputed
        assert (found.config.offload_checkpoints == "0") != recomputed


def test_a_gpus_memory_is_what_no_one_else_holds(tmp_path, monkeypatch):
    """Free memory, what this process holds itself, and its context, which the plan's reserve counts."""
    device, config = torch.device("cuda"), make_config(tmp_path)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 15 * GIB)
    monkeypatch.setattr(forecast, "host_bytes", lambda: 100 * GIB)
    for free, expected in ((40, 56), (64.5, 80)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free * GIB, 80 * GIB))
        budget = budget_of(config, device)
        assert (budget.gpu, budget.host) == (expected * GIB, 80 * GIB)
    named = budget_of(dataclasses.replace(config, gpu_memory="24GB", host_memory="64"), device)
    assert (
        named
        == Budget(24e9, 64 * GIB)
        == budget_of(dataclasses.replace(config, gpu_memory="24GB", host_memory="64"), CPU)
    )
    nothing = budget_of(config, CPU)
    assert nothing.gpu is None and nothing.host is None


def test_a_container_has_less_than_the_machine(tmp_path, monkeypatch):
    whole = memory.host_bytes()
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "memory.max")
    for text, expected in (("max\n", None), ("1048576\n", 1048576.0)):
        (tmp_path / "memory.max").write_text(text)
        assert memory.host_bytes() == expected or (expected is None and memory.host_bytes() >= whole)
