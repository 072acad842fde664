"""liger-kernel's layers against transformers' own, packed; that they are taken back; and what is refused.

Without a GPU its Triton kernels run interpreted, which takes two repairs of the interpreter's."""

import importlib.util
import sys
import types

import numpy as np
import pytest
import torch
from transformers.models.llama import modeling_llama

from tests.families import family
from tests.test_attention import batch_of
from tests.test_train import make_config, run
from tests.tiny import save_tiny, tiny_llama, write_rows
from unlearn import cli
from unlearn.config import TrainConfig
from unlearn.liger import liger_layers
from unlearn.model import hidden_states, prepare

NEEDS_LIGER = pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is missing")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def interpreted(monkeypatch):
    """Triton's interpreter hands floats to a kernel as Python's, and computes nothing with CUDA's own rsqrt."""
    if DEVICE == "cuda":
        return
    import liger_kernel.ops.rms_norm
    import triton.language as tl
    from triton.runtime import interpreter

    own = interpreter._implicit_cvt

    def convert(argument):
        if not isinstance(argument, float):
            return own(argument)
        return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert)
    monkeypatch.setattr(liger_kernel.ops.rms_norm, "rsqrt", lambda x: tl.rsqrt(x))


def backward(model, batch):
    model.zero_grad()
    hidden = hidden_states(model, batch)
    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    (hidden * upstream.to(hidden.device)).sum().backward()
    return hidden.detach(), {name: p.grad for name, p in model.named_parameters()}


@NEEDS_LIGER
@pytest.mark.parametrize("name", ["llama", "qwen2-windows"])
def test_packed_outputs_and_gradients_are_transformers_own(name, interpreted):
    model, batch = prepare(family(name).to(DEVICE)), batch_of((3, 9, 4)).to(DEVICE)
    expected = backward(model, batch)
    with liger_layers(model):
        assert type(model).__module__ in sys.modules and "LigerRMSNorm" in repr(model)
        found = backward(model, batch)
    assert not torch.equal(found[0], expected[0])  # other kernels ran
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    for weight, grad in expected[1].items():
        assert grad is None or (found[1][weight] - grad).norm() <= 1e-5 * grad.norm(), weight
    again = backward(model, batch)  # and transformers' own run again
    assert torch.equal(again[0], expected[0]) and "Liger" not in repr(model)


def stand_in(monkeypatch, apply):
    module = types.ModuleType("liger_kernel.transformers")
    module.apply_liger_kernel_to_llama = apply
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.parametrize("fails", [False, True])
def test_everything_replaced_is_put_back(monkeypatch, fails):
    """In transformers' module and in the instances; what others set meanwhile stays."""
    given = {}

    def apply(model, **switches):
        given.update(switches)
        modeling_llama.apply_rotary_pos_emb = modeling_llama.LlamaMLP = None
        model.model.norm.forward = None
        model.model.norm.in_place = True
        if fails:
            raise ZeroDivisionError

    stand_in(monkeypatch, apply)
    model = tiny_llama()
    before = {name: vars(modeling_llama)[name] for name in ("apply_rotary_pos_emb", "LlamaMLP")}
    try:
        with liger_layers(model):
            assert modeling_llama.LlamaMLP is None and model.model.norm.forward is None
            model.model.norm.of_the_run = 3
    except ZeroDivisionError:
        assert fails
    assert {name: vars(modeling_llama)[name] for name in before} == before
    own = vars(model.model.norm)
    assert "forward" not in own and "in_place" not in own and ("of_the_run" in own) != fails
    assert given["rope"] and given["rms_norm"] and given["swiglu"]
    assert not given["cross_entropy"] and not given["fused_linear_cross_entropy"]


def test_a_run_engages_them_and_ends_without(tmp_path, monkeypatch):
    calls = []
    stand_in(monkeypatch, lambda model, **switches: calls.append(model))
    config = make_config(tmp_path, liger_kernels=True, gradient_checkpointing=True, epochs=1, warmup_epochs=0.0)
    assert calls == [run(config)]


def test_a_dry_run_knows_them_without_weights(tmp_path, monkeypatch, capsys):
    stand_in(monkeypatch, lambda model, **switches: None)
    monkeypatch.delenv("TRITON_INTERPRET")
    save_tiny(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "Who?", "answer": "Mara Quill."}])
    arguments = ["train", "--method", "ga", "--model", str(tmp_path / "model"), "--forget", rows, "--output",
                 str(tmp_path / "out"), "--lr", "1e-3", "--epochs", "1", "--batch-size", "1", "--seed", "0",
                 "--warmup-epochs", "0", "--liger-kernels", "--dry-run"]  # fmt: skip
    assert cli.main(arguments) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("gemma2", {}, "Gemma2ForCausalLM is of type 'gemma2'; llama, mistral, qwen2, qwen3, phi3 are accepted"),
        ("llama", {"hidden_act": "gelu"}, "the MLP's activation is 'gelu'; silu is accepted"),
        ("llama", {}, "the model is on 'cpu'; liger-kernel's kernels run on a GPU"),
    ],
)
def test_models_that_it_does_not_know_are_refused(name, changes, said, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = family(name)
    for key, value in changes.items():
        setattr(model.config, key, value)
    with pytest.raises(ValueError, match=f"^liger_kernels: {said}$"), liger_layers(model):
        pass


def test_missing_or_beside_tiles_takes_one_line(tmp_path, capsys, monkeypatch):
    save_tiny(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "Who?", "answer": "Mara Quill."}])
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    out = tmp_path / "out"
    arguments = ["train", "--method", "ga", "--model", str(tmp_path / "model"), "--forget", rows, "--output", str(out),
                 "--lr", "1e-3", "--epochs", "1", "--batch-size", "1", "--seed", "0", "--warmup-epochs", "0",
                 "--liger-kernels"]  # fmt: skip
    assert cli.main(arguments) == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    assert printed.startswith("unlearn: error: liger_kernels: needs liger-kernel (")
    assert printed.endswith("; install it, or leave the option out") and not out.exists()
    with pytest.raises(ValueError, match="^liger_kernels: not accepted with tile_tokens 8; a tiled layer keeps"):
        TrainConfig(model="m", output="o", method="ga", lr=1e-3, epochs=1, batch_size=1, seed=0, forget="f",
                    liger_kernels=True, tile_tokens=8)  # fmt: skip
