"""QLoRA: products with 4-bit matrices are those with the matrices that they stand for, in every measure and to the end
of a run; what a matrix takes; what is refused."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.test_cli import refused
from tests.test_lora import arguments, evaluated, first_logprob
from tests.test_train import (
    FORGET,
    RETAIN,
    Stop,
    lines,
    make_config,
    make_data,
    optimizers,  # noqa: F401  (a fixture)
    run,
    same_tree,
    same_weights,
    steps,
    stop_after,
)
from tests.tiny import save_tiny, tiny_llama, tiny_tokenizer, write_rows
from unlearn import adapters, cli, footprint, methods, quantized
from unlearn.batches import epoch_steps, with_reference
from unlearn.data import collate
from unlearn.dryrun import dry_run
from unlearn.longcontext import long_context
from unlearn.memory import LiveStorages
from unlearn.model import generating, head_of, hidden_states, load_model, load_skeleton
from unlearn.scoring import score
from unlearn.train import repeatable

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (pip install '.[qlora]')"
)
# whole blocks of 64 in a row, whose matrices bitsandbytes widens itself everywhere; and hardly a whole block anywhere
WIDE, ODD = {"hidden_size": 64, "intermediate_size": 128}, {"hidden_size": 40, "intermediate_size": 45}
MODELS = ("base", "wide", "odd")
MEASURES = {
    "plain": {},
    "recomputed": {"gradient_checkpointing": True, "offload_checkpoints": "1"},
    "tiled": {"tile_tokens": 96, "offload_checkpoints": "1", "save_attention": True},
}


def qlora_config(tmp_path, name="out", **values):
    return make_config(tmp_path, name, **{"lora": 4, "lora_4bit": True, "lr": 2e-2, **values})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with two models, a 4-bit adapter trained by the command line, and rows. Read only."""
    folder = tmp_path_factory.mktemp("qlora")
    save_tiny(folder / "base")
    tiny_llama(**WIDE).save_pretrained(folder / "wide")
    tiny_llama(**ODD).save_pretrained(folder / "odd")
    write_rows(folder / "forget.jsonl", FORGET)
    write_rows(folder / "retain.jsonl", RETAIN)
    assert cli.main(arguments(folder, folder / "adapter", "--lora-4bit")) == 0
    return folder


def loaded(files, name="base", dtype="float32"):
    return load_model(str(files / name), dtype=dtype, device="cpu", in_4bit=True)


def sequences(config):
    return [s for step in epoch_steps(make_data(config), config, 0) for s in step.sequences()]


def widened(files, name, model):
    """The same model with plain float32 matrices: those that the 4-bit ones stand for."""
    plain = load_model(str(files / name), dtype="float32", device="cpu")
    with torch.no_grad():
        for place, layer in quantized.layers(model).items():
            plain.get_submodule(place.removesuffix(".base_layer")).weight.copy_(quantized.widened(layer.weight))
    return plain


# ---------------------------------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_layer_multiplies_with_is_the_matrix_that_was_read(files, name, dtype):
    """nf4's widest gap is 0.304 of a block's largest weight: rounding moves a weight by half of that at most."""
    model, plain = loaded(files, name, dtype), load_model(str(files / name), dtype="float32", device="cpu")
    found = quantized.layers(model)
    assert len(found) == 14 and not any("lm_head" in place for place in found)
    rest = [p for n, p in model.named_parameters() if n.removesuffix(".weight") not in found]
    assert all(p.dtype == getattr(torch, dtype) for p in rest) and len(rest) == 3 + 2 * 2
    for place, layer in found.items():
        original = plain.get_submodule(place).weight
        product = layer(torch.eye(layer.in_features, dtype=getattr(torch, dtype))).T.float()
        padded = (torch.nn.functional.pad(t.flatten(), (0, -t.numel() % 64)).view(-1, 64) for t in (original, product))
        before, now = padded
        largest = before.abs().amax(1, keepdim=True)
        assert 0.01 < ((now - before).abs() / largest).amax() < 0.152 + 0.03, place
        values = (now / now.abs().amax(1, keepdim=True)).unique()  # 16 levels, the ends and zero among them
        assert values.min() == -1 and values.max() == 1 and 0 in values and (dtype != "float32" or len(values) < 200)
    assert quantized.described(model).startswith("nf4, double quantization (bitsandbytes ")
    assert quantized.described(plain) is None and not quantized.layers(plain)
    assert adapters.num_parameters(model)[1] == adapters.num_parameters(plain)[1]


@pytest.mark.parametrize("name", MODELS)
def test_log_likelihoods_are_those_of_the_widened_matrices(files, tmp_path, name):
    """Without gradients and with: there is one way to compute, and it stays after either."""
    model, some = loaded(files, name), sequences(qlora_config(tmp_path))[:6]
    plain = widened(files, name, model)
    expected = torch.tensor(score(plain, some, max_tokens=200))
    for _ in range(2):
        torch.testing.assert_close(torch.tensor(score(model, some, max_tokens=200)), expected, rtol=1e-5, atol=1e-5)
    unquantized = load_model(str(files / name), dtype="float32", device="cpu")
    assert (torch.tensor(score(unquantized, some, max_tokens=200)) - expected).norm() > 1e-2 * expected.norm()


@pytest.mark.parametrize("measures", MEASURES)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_adapters_are_those_above_the_widened_matrices(files, tmp_path, name, measures):
    config = qlora_config(tmp_path, max_tokens=10_000, **MEASURES[measures])
    found = []
    quantized_model = loaded(files, name)
    for model, own in ((quantized_model, config), (widened(files, name, quantized_model), qlora_config(tmp_path))):
        adapters.attach(model, own)
        torch.manual_seed(1)
        with torch.no_grad():
            for tensor in adapters.state(model).values():
                tensor.normal_(std=0.1)
        step = epoch_steps(make_data(own), own, 0)[0]
        groups = with_reference(step.groups, {s.content_key: -20.0 - s.num_tokens for s in step.sequences()})
        batch = collate([item for group in groups for item in group])
        score(model, list(step.sequences()), max_tokens=200)  # as the reference is, before any gradient
        recompute = own.gradient_checkpointing and not own.tile_tokens
        with repeatable(model, recompute=recompute), long_context(model, own, longest=1000, say=lambda text: None):
            result = methods.batch_loss(hidden_states(model, batch), head_of(model), batch, own, step.totals)
            result.loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert len(found[0]) == 28 and found[0].keys() == found[1].keys()
    for name, gradient in found[1].items():
        assert (found[0][name] - gradient).norm() <= 1e-4 * gradient.norm() > 0, name


# ------------------------------------------------------------------------------------------------------------- a run


@pytest.mark.parametrize(
    "values",
    [
        {"dtype": "bfloat16", **MEASURES["tiled"]},
        {"retain_term": "kl", "lora_targets": "all-linear,lm_head", **MEASURES["recomputed"]},
    ],
    ids=str,
)
def test_resume_is_bit_for_bit(files, tmp_path, optimizers, values):  # noqa: F811
    config, said = qlora_config(tmp_path, "whole", save_every=2, **values), []
    expected = run(config, loaded(files, dtype=config.dtype), say=said.append)
    assert any("14 matrices of 15,360 weights in nf4" in text for text in said)
    before = "policy against stored reference before the first step"
    assert any(text.startswith(before) for text in said) and steps(config)[0]["step"] == 1
    stopped = qlora_config(tmp_path, "stopped", save_every=2, **values)
    with pytest.raises(Stop):
        run(stopped, loaded(files, dtype=config.dtype), after_step=stop_after(3))
    resumed = run(stopped, loaded(files, dtype=config.dtype), resume=True)
    assert same_weights(resumed, expected) and steps(stopped) == steps(config)
    assert same_tree(optimizers[-1].state_dict(), optimizers[0].state_dict())
    (folder,) = (tmp_path / "whole" / "checkpoints").glob("step-*")
    stored = load_file(folder / "adapter_model.safetensors")
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in expected.parameters() if p.requires_grad)
    provenance = lines(config)[0]["provenance"]
    assert provenance["quantization"].startswith("nf4") and provenance["parameters"] > 36_000
    fresh = loaded(files, dtype=config.dtype)
    assert all(torch.equal(t, expected.state_dict()[add_base(n, expected)]) for n, t in fresh.state_dict().items())


def add_base(name, model):
    """The name that a tensor of the plain model has under adapters."""
    for wrapped in adapters.layers(model):
        name = name.replace(f"{wrapped}.", f"{wrapped}.base_layer.") if name.startswith(f"{wrapped}.") else name
    return name


def test_training_lowers_the_forget_likelihood_and_leaves_pefts_folder(files, capsys):
    rows = [json.loads(row) for row in (files / "adapter" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["config"]["lora_4bit"] and rows[0]["provenance"]["lora"]["layers"] == 14
    assert rows[-1]["forget_logprob_per_token"] < rows[1]["forget_logprob_per_token"] - 0.1
    folder = files / "adapter" / "model"
    assert sorted(path.name for path in folder.glob("adapter*")) == ["adapter_config.json", "adapter_model.safetensors"]
    by_transformers = AutoModelForCausalLM.from_pretrained(folder)  # on its unquantized base
    own = load_model(str(folder), dtype="float32", device="cpu")
    ids = torch.arange(12)[None]
    with torch.no_grad(), generating(own):
        torch.testing.assert_close(by_transformers(input_ids=ids).logits, own(input_ids=ids).logits)


def test_evaluation_says_which_base_it_is_on(files, tmp_path, capsys):
    """By default the unquantized base; --load-in-4bit what was trained: what a run begins with that trains it on."""
    options = ["--device", "cpu", "--dtype", "float32", "--max-new-tokens", "2", "--json"]
    command = ["eval", "--model", str(files / "adapter/model"), "--forget", str(files / "forget.jsonl"), *options]
    found = []
    for more in ([], ["--load-in-4bit"]):
        assert cli.main([*command, *more]) == 0
        printed = capsys.readouterr()
        found.append(json.loads(printed.out)["forget_logprob_per_token"])
        told = "adapter/model: the adapter was trained under a base in nf4, double quantization (bitsandbytes "
        assert (told in printed.err and "; its base here is in float32\n" in printed.err) == (not more)
    assert abs(found[0] - found[1]) > 1e-3
    assert json.loads((files / "adapter" / "eval.json").read_text())["options"]["load_in_4bit"] is True
    assert cli.main(arguments(files, tmp_path / "on", "--lora-4bit", model="adapter/model", epochs=1)) == 0
    told = capsys.readouterr()
    assert first_logprob(tmp_path / "on") < -8 and "policy against stored reference" in told.out
    assert evaluated(files, "base", capsys)["forget_logprob_per_token"] > found[1]


def test_a_reference_of_the_unquantized_base_is_refused(files, tmp_path, capsys):
    shared = ["--reference-cache", str(tmp_path / "cache")]
    reference = ["reference", *arguments(files, tmp_path / "ref", *shared, "--lora-4bit")[1:]]
    assert cli.main(reference) == 0
    assert cli.main(arguments(files, tmp_path / "own", *shared, "--lora-4bit", epochs=1)) == 0
    assert "reference log-likelihoods of 6 sequences: loaded" in capsys.readouterr().out
    message = refused(capsys, arguments(files, tmp_path / "plain", *shared, epochs=1))
    assert "is of another model" in message


# ----------------------------------------------------------------------------------------------------------- memory


def stored_bytes(layer):
    state = layer.weight.quant_state
    kept = (layer.weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept)


def test_bytes_of_a_matrix_are_the_plans():
    """Tables of 1092 bytes a matrix are not in the plan: 0.02 % of Llama's smallest."""
    bnb = quantized.bitsandbytes("test")
    layer = bnb.nn.Linear4bit(2048, 1024, bias=False, compress_statistics=True, quant_type="nf4")
    layer.to("cpu")
    assert layer.weight.dtype == torch.uint8
    assert stored_bytes(layer) - 1092 == footprint.NF4_BYTES * 2048 * 1024


def test_the_whole_model_never_stands_in_bf16(tmp_path):
    """Each matrix is quantized as it is read: beside what stays, one at a time, in wider dtypes."""

    class Held(LiveStorages):
        def see(self, tensor, name):
            if not tensor.is_meta:
                super().see(tensor, name)

    tiny_llama(num_hidden_layers=8, hidden_size=128, intermediate_size=256).save_pretrained(tmp_path / "deep")
    peaks = {}
    for in_4bit in (False, True):
        with Held() as live:
            model = load_model(str(tmp_path / "deep"), dtype="bfloat16", device="cpu", in_4bit=in_4bit)
        peaks[in_4bit] = live.peak_bytes
    matrices = [layer.weight for layer in quantized.layers(model).values()]
    in_bf16 = 2 * sum(map(quantized.num_weights, matrices))
    assert peaks[False] > in_bf16 and peaks[True] < peaks[False] - in_bf16 / 4


def test_the_dry_run_counts_what_a_loaded_model_takes(tmp_path):
    wide = {"hidden_size": 256, "intermediate_size": 512}
    tiny_llama(**wide).save_pretrained(tmp_path / "wide")
    config = qlora_config(tmp_path, model=str(tmp_path / "wide"), dtype="bfloat16")
    skeleton = load_skeleton(config.model, dtype="bfloat16")
    adapters.attach(skeleton, config)
    found = dry_run(config, skeleton, tiny_tokenizer(), make_data(config))
    model = load_model(config.model, dtype="bfloat16", device="cpu", in_4bit=True)
    adapters.attach(model, config)
    matrices = quantized.layers(model).values()
    rest = [p for p in model.parameters() if quantized.num_weights(p) == p.numel()]
    taken = sum(p.numel() * p.element_size() for p in rest) + sum(map(stored_bytes, matrices))
    assert found["bytes"]["weights"] == pytest.approx(taken, rel=0.03)
    assert found["model"]["parameters"] == adapters.num_parameters(model)[1]


# --------------------------------------------------------------------------------------------------------- mistakes


def test_mistakes_are_one_line(files, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    for more, values, message in (
        ([], {"lora": None}, "lora_4bit: given, but without lora (a rank) nothing would read it"),
        (["--lora-merge"], {}, "lora_merge: not accepted with lora_4bit; the run holds no float32 matrices to merge"),
        ([], {"lora": 40}, "lora: 40 is not accepted; no layer here has a rank above 32"),
    ):
        assert message in refused(capsys, arguments(files, output, "--lora-4bit", *more, **values))
    again = [*arguments(files, files / "adapter"), "--resume"]
    assert "resume: lora_4bit was True and is now False; they have to agree" in refused(capsys, again)
    (tmp_path / "run.toml").write_text("lora_4bit = 4\n")
    message = refused(capsys, [*arguments(files, output), "--config", str(tmp_path / "run.toml")])
    assert "lora_4bit: 4 is not accepted; a value of type bool is" in message
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    missing = "the packages bitsandbytes and accelerate are needed"
    for more in ([], ["--dry-run"]):
        assert f"lora_4bit: {missing}" in refused(capsys, arguments(files, output, "--lora-4bit", *more))
    command = ["eval", "--model", str(files / "base"), "--forget", str(files / "forget.jsonl"), "--load-in-4bit"]
    assert f"load-in-4bit: {missing}" in refused(capsys, command)
    assert not output.exists()


def test_a_model_that_is_not_what_the_run_says(files, tmp_path):
    with pytest.raises(ValueError, match="^lora_4bit: True, and the model was loaded with in_4bit=False"):
        run(qlora_config(tmp_path), tiny_llama())
    with pytest.raises(ValueError, match="^lora_4bit: False, and the model was loaded with in_4bit=True"):
        run(make_config(tmp_path), loaded(files))
    with pytest.raises(ValueError, match="^model: adapters are not merged into 4-bit matrices"):
        adapters.merge(loaded(files))
    wanted = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    stored = AutoModelForCausalLM.from_pretrained(files / "base", quantization_config=wanted, device_map={"": "cpu"})
    stored.save_pretrained(tmp_path / "stored")
    with pytest.raises(ValueError, match=r"^model: '.*stored' holds its matrices in 4 bits; accepted is"):
        load_model(str(tmp_path / "stored"), dtype="float32", device="cpu")
    as_it_is = load_model(str(tmp_path / "stored"), dtype="float32", device="cpu", in_4bit=True)
    assert quantized.described(as_it_is).startswith("fp4 (bitsandbytes ")


def test_the_import_says_nothing_and_asks_no_hub(tmp_path, monkeypatch):
    """bitsandbytes asks `kernels` for code of the hub on CPUs with AVX512-BF16; peft imports it without being asked."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*args, **kwargs): print('asked for', args)\n")
    code = "from unlearn import quantized; quantized.import_quietly(); import sys; assert 'bitsandbytes' in sys.modules"
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    imported = []
    monkeypatch.setattr(quantized, "import_quietly", lambda: imported.append("before peft"))
    adapters._peft()
    assert imported
