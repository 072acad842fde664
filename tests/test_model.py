"""Heads, loading, hidden states: what a model has to be, and that another one is refused."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.families import FAMILIES, VOCAB, family
from tests.tiny import tiny_llama, tiny_tokenizer
from unlearn.attention import ATTENTION
from unlearn.data import Item, Role, Sequence, collate
from unlearn.model import (
    check_head,
    generating,
    head_of,
    hidden_states,
    load_model,
    load_tokenizer,
    max_positions,
    prepare,
    resolve_device,
)
from unlearn.scoring import score


def refusal(function, *args, **kwargs):
    with pytest.raises(ValueError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -------------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_heads_of_known_families_are_accepted(name, dtype):
    model = prepare(family(name, dtype))
    assert not model.training
    assert model.config._attn_implementation == ATTENTION


def test_head_values():
    assert head_of(family("cohere")).logit_scale == 0.3
    assert head_of(family("granite")).logit_scale == 0.25
    assert head_of(family("gemma2")).softcap == 3.0
    assert head_of(family("phi")).bias is not None
    tied = family("llama-tied")
    assert head_of(tied).weight is tied.get_input_embeddings().weight
    plain = head_of(family("llama"))
    assert plain.kwargs() == {"bias": None, "logit_scale": 1.0, "softcap": None}


@pytest.mark.parametrize("name", FAMILIES)
def test_log_likelihoods_equal_the_models_own(name):
    """Head, factor, softcap and bias together: sums over the model's own log softmax."""
    model = prepare(family(name))
    ids = (3, 50, 7, 21, 9, 60)
    value = score(model, [Sequence("s", ids, 2)], max_tokens=100)[0]
    with generating(model), torch.no_grad():
        logprobs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    assert value == pytest.approx(sum(logprobs[i - 1, ids[i]].item() for i in range(2, len(ids))), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0.02, 1.0])
def test_a_head_with_an_unknown_factor_is_refused(monkeypatch, dtype, size):
    """Also where logits are small, as in a model that was just initialised."""
    model = tiny_llama(vocab=VOCAB, initializer_range=size, dtype=dtype)
    own = type(model).forward

    def scaled(self, *args, **kwargs):
        output = own(self, *args, **kwargs)
        output.logits = output.logits * 1.2
        return output

    monkeypatch.setattr(type(model), "forward", scaled)
    message = refusal(check_head, model)
    assert message.startswith("model: LlamaForCausalLM's logits differ from its head") and "0.17" in message


def test_a_head_that_gives_nan_is_refused():
    model = tiny_llama(vocab=VOCAB)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    assert "logits of this LlamaForCausalLM are not finite" in refusal(check_head, model)


def test_a_backbone_that_ignores_the_packing_is_refused(monkeypatch):
    """A state that runs through the pack (a convolution, a recurrence) reaches the second sequence."""
    model = tiny_llama(vocab=VOCAB)
    layer = model.model.layers[0].mlp
    own = type(layer).forward
    monkeypatch.setattr(type(layer), "forward", lambda self, x: own(self, x.cumsum(1)))
    assert "not supported" in refusal(check_head, model)


def test_a_model_whose_attention_cannot_be_replaced_is_refused():
    config = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=2)
    message = refusal(prepare, transformers.BloomForCausalLM(config))
    assert message == "model: BloomForCausalLM does not let its attention be replaced; it is not supported"


# ------------------------------------------------------------------------------------------------------------ loading


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def copied(saved, tmp_path, *, without=()):
    for path in saved.iterdir():
        if path.name not in without:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_a_saved_model_loads_as_it_was(saved):
    model = load_model(str(saved), dtype="float32", device="cpu")
    ids = [Sequence("s", (3, 4, 5, 6), 1)]
    assert score(model, ids, max_tokens=9) == score(tiny_llama(), ids, max_tokens=9)
    assert next(load_model(str(saved), dtype="bfloat16", device="cpu").parameters()).dtype == torch.bfloat16
    assert load_tokenizer(str(saved)).get_vocab() == tiny_tokenizer().get_vocab()
    assert max_positions(str(saved)) == 256


@pytest.mark.parametrize("tied", [False, True])
def test_tied_weights_are_not_missing_ones(tmp_path, tied):
    tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype="float32", device="cpu")
    assert (head_of(model).weight is model.get_input_embeddings().weight) == tied


def test_loading_errors_take_one_line(saved, tmp_path):
    for name in ("/nowhere/at/all", "./nowhere", "a/b/c"):
        assert refusal(load_model, name, dtype="float32", device="cpu") == f"model: no folder {name!r}"
    assert refusal(load_tokenizer, str(tmp_path)).startswith("model: no tokenizer in")
    empty = refusal(load_model, str(tmp_path), dtype="float32", device="cpu")
    assert empty.startswith("model: could not load") and str(tmp_path) in empty
    assert refusal(max_positions, str(tmp_path)).startswith("model: no configuration in")
    # nothing on the hub is reached in tests: still one line
    assert refusal(load_model, "nobody/nothing", dtype="float32", device="cpu").startswith("model: could not load")


def test_a_folder_without_weights(saved, tmp_path):
    folder = copied(saved, tmp_path, without=("model.safetensors",))
    assert refusal(load_model, str(folder), dtype="float32", device="cpu").startswith("model: could not load")


def test_a_damaged_weight_file(saved, tmp_path):
    folder = copied(saved, tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert refusal(load_model, str(folder), dtype="float32", device="cpu").startswith("model: could not load")


def test_weights_of_another_shape(saved, tmp_path):
    folder = copied(saved, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    assert refusal(load_model, str(folder), dtype="float32", device="cpu").startswith("model: could not load")


def test_missing_weights_are_not_filled_with_random_numbers(saved, tmp_path):
    folder = copied(saved, tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    message = refusal(load_model, str(folder), dtype="float32", device="cpu")
    assert message.endswith("lacks weights of LlamaForCausalLM: lm_head.weight")


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
    assert refusal(resolve_device, "abacus").startswith("device: 'abacus' is not available here")
    if not torch.cuda.is_available():
        assert refusal(resolve_device, "cuda").startswith("device: 'cuda' is not available here")


# ------------------------------------------------------------------------------------------- hidden states, generating


def test_hidden_states_are_those_of_the_label_positions():
    model = tiny_llama(dtype=torch.float64)
    sequences = [Sequence("a", (5, 9, 7, 11, 3), 3), Sequence("b", (8, 20, 31), 2)]
    batch = collate([Item(s, Role.FORGET) for s in sequences])
    hidden = hidden_states(model, batch)
    assert hidden.shape == (3, 32)
    with generating(model):
        whole = [
            model.model(input_ids=torch.tensor([s.input_ids[:-1]]), use_cache=False).last_hidden_state[0]
            for s in sequences
        ]
    torch.testing.assert_close(hidden, torch.cat([whole[0][2:], whole[1][1:]]), rtol=1e-6, atol=1e-6)


def test_the_head_never_sees_more_than_the_label_rows():
    model = tiny_llama()
    model.lm_head.forward = None  # hidden_states() does not call it
    batch = collate([Item(Sequence("a", (5, 9, 7), 2), Role.FORGET)])
    assert hidden_states(model, batch).shape == (1, 32)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-neox"])
def test_generating_continues_and_restores_packed_attention(name):
    model = prepare(family(name))
    ids = torch.tensor([[5, 9, 7]])
    with generating(model):
        with_cache = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert model.config._attn_implementation == ATTENTION
    # token by token from packed hidden states
    head, text = head_of(model), (5, 9, 7)
    for _ in range(with_cache.shape[1] - 3):
        batch = collate([Item(Sequence("s", (*text, 0), len(text)), Role.FORGET)])
        logits = hidden_states(model, batch) @ head.weight.T + (0 if head.bias is None else head.bias)
        text = (*text, int(logits[-1].argmax()))
    assert text == tuple(with_cache[0].tolist())


def test_generating_restores_packed_attention_after_an_error():
    model = tiny_llama()
    with pytest.raises(KeyboardInterrupt), generating(model):
        assert model.config._attn_implementation == "sdpa"
        raise KeyboardInterrupt
    assert model.config._attn_implementation == ATTENTION
    check_head(model)


def test_gradient_checkpointing_changes_no_gradient():
    sequences = [Sequence("a", (5, 9, 7, 11, 3), 3), Sequence("b", (8, 20, 31), 2)]
    batch = collate([Item(s, Role.FORGET) for s in sequences])
    grads = []
    for checkpointing in (False, True):
        model = tiny_llama()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.train()
        hidden_states(model, batch).square().sum().backward()
        grads.append([p.grad for p in model.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
