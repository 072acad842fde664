"""One person's afternoon with each family of models: train, adapters, evaluation and what stands around them."""

import functools
import json

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.families import family
from tests.test_train import FORGET, RETAIN
from tests.tiny import CHATML_TEMPLATE, tiny_tokenizer, write_rows
from unlearn import cli

FAMILIES = ("llama", "qwen3", "qwen2-windows", "gemma", "gemma2", "gemma3", "gpt-neox")
SHARED = ["--device", "cpu", "--dtype", "float32"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_commands_in_order(tmp_path, capsys, name):
    tokenizer = tiny_tokenizer(CHATML_TEMPLATE if name.startswith("qwen") else None)
    model = family(name, vocab=len(tokenizer))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = ["--forget", write_rows(tmp_path / "forget.jsonl", FORGET[:3])]
    kept = ["--retain", write_rows(tmp_path / "retain.jsonl", RETAIN[:3]), "--retain-term"]
    common = [
        *rows,
        *SHARED,
        "--lr",
        "3e-2",
        "--epochs",
        "2",
        "--batch-size",
        "3",
        "--seed",
        "0",
        "--warmup-epochs",
        "0",
    ]
    base = ["--model", str(tmp_path / "base"), *common]
    npo = ["--method", "npo", "--beta", "0.1", *kept, "nll"]
    simnpo = ["--method", "simnpo", "--beta", "2.5", "--gamma", "0", *kept, "kl"]

    def run(*arguments):
        capsys.readouterr()
        assert cli.main(list(arguments)) == 0, capsys.readouterr().err
        out, err = capsys.readouterr()
        assert "Warning" not in err and "\n" not in err.strip()
        return out

    @functools.cache
    def evaluated(folder):
        out = run("eval", "--model", str(tmp_path / folder), *rows, *SHARED, "--max-new-tokens", "3", "--json")
        return json.loads(out)["forget_logprob_per_token"]

    plan = run("train", *base, *npo, "--output", str(tmp_path / "full"), "--dry-run")
    assert f"{type(model).__name__}, {model.num_parameters():,} parameters in float32" in plan
    assert not (tmp_path / "full").exists()
    reference = ["--reference-cache", str(tmp_path / "cache")]
    assert "computed" in run("reference", *base, *npo, "--output", str(tmp_path / "full"), *reference)
    # one stored reference serves the run of all weights and that of adapters
    for output, more in (("full", []), ("adapter", ["--lora", "4", "--gradient-checkpointing"])):
        out = run("train", *base, *npo, "--output", str(tmp_path / output), *reference, *more)
        assert "reference log-likelihoods of 3 sequences: loaded" in out
    run("train", *base, *simnpo, "--output", str(tmp_path / "simnpo"))
    run("train", *base, *simnpo, "--output", str(tmp_path / "merged"), "--lora", "4", "--lora-merge")
    before = evaluated("base")
    for output in ("full", "adapter", "simnpo", "merged"):
        # random models know nothing that they could forget: that they move is what is asked
        assert abs(evaluated(f"{output}/model") - before) > 1e-3, output
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "model")
    assert type(loaded) is type(model) and loaded.num_parameters() == model.num_parameters()
    tensors = load_file(tmp_path / "adapter" / "model" / "adapter_model.safetensors")
    assert tensors and all(".lora_" in tensor for tensor in tensors)
    alternates = str(tmp_path / "alternates.jsonl")
    run("alternates", "--model", str(tmp_path / "adapter" / "model"), *rows, *SHARED, "--output", alternates,
        "--count", "1", "--max-new-tokens", "4")  # fmt: skip
    run("train", "--model", str(tmp_path / "adapter" / "model"), *common, "--method", "altpo", "--beta", "0.1",
        "--alternates", alternates, "--output", str(tmp_path / "altpo"), "--lora", "4")  # fmt: skip
    assert evaluated("altpo/model") != evaluated("adapter/model")
