"""Tiled layers against transformers' own in float64: outputs, every gradient, hooks, and what is held in between."""

import contextlib
import copy
import weakref

import pytest
import torch
import transformers
from peft import LoraConfig, inject_adapter_in_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.families import VOCAB, family
from tests.tiny import tiny_llama
from unlearn.attention import Segments
from unlearn.data import Item, Role, Sequence, collate
from unlearn.model import generating, hidden_states, prepare
from unlearn.offload import CheckpointStore
from unlearn.tiled import _Gradients, tiled

TILE = 8
# shorter than a tile, a whole number of tiles, one past it; then sequences packed, tiles across their borders
LENGTHS = [(5,), (2 * TILE,), (2 * TILE + 1,), (5, 13, 5)]
PHI3 = transformers.Phi3Config(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    initializer_range=0.2, resid_pdrop=0.0, sliding_window=None,
)  # fmt: skip
NAMES = ["llama", "llama-tied", "mha", "mistral", "qwen2-windows", "qwen3", "phi3", "gemma", "gemma2", "gemma3"]


def made(name, dtype=torch.float64):
    if name == "mha":
        return tiny_llama(vocab=VOCAB, dtype=dtype, num_key_value_heads=4, attention_bias=True)
    if name == "phi3":
        torch.manual_seed(0)
        return prepare(transformers.Phi3ForCausalLM(PHI3).to(dtype))
    return prepare(family(name, dtype))


def batch_of(lengths):
    generator = torch.Generator().manual_seed(sum(lengths))
    rows = [torch.randint(2, VOCAB, (n + 1,), generator=generator).tolist() for n in lengths]
    return collate([Item(Sequence(str(i), tuple(row), 1), Role.FORGET) for i, row in enumerate(rows)])


def backward(model, batch):
    """Hidden states, and the gradients of a random signed function of them that leaves some rows out."""
    hidden = hidden_states(model, batch)
    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    upstream[::3] = 0.0
    (hidden * upstream.to(hidden.dtype)).sum().backward()
    return hidden.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_same(found, expected, tolerance):
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    for name, grad in expected[1].items():
        if grad is None:
            assert found[1][name] is None, name
        else:
            assert (found[1][name] - grad).norm() <= tolerance * grad.norm(), name


def with_adapters(name, **options):
    """all-linear LoRA with random B, so that A has a gradient; everything else frozen."""
    config = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", lora_dropout=0.0, **options)
    model = prepare(inject_adapter_in_model(config, made(name)))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_are_the_layers_own(name, lengths):
    batch = batch_of(lengths)
    expected = backward(made(name), batch)
    model = made(name)
    with tiled(model, TILE, save_attention=lengths == LENGTHS[2]):
        found = backward(model, batch)
    # transformers' Gemma norms compute in float32, whatever the model's dtype
    assert_same(found, expected, 1e-6 if "gemma" in name else 1e-12)


@pytest.mark.parametrize("save_attention", [False, True])
@pytest.mark.parametrize("offload", [0, 1, 2])
def test_saving_and_offloading_change_no_bit(offload, save_attention):
    batch, found = batch_of((19, 6)), []
    for layers, save in ((0, False), (offload, save_attention)):
        model = made("qwen3", torch.bfloat16)
        with tiled(model, TILE, store=CheckpointStore(2, layers), save_attention=save):
            found.append(backward(model, batch))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(grad, found[1][1][name]) for name, grad in found[0][1].items() if grad is not None)


def test_many_tiles_add_up_in_float32():
    """bf16 sums of ones stop at 256."""
    linear = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
    grads = _Gradients(linear, tuple(linear.parameters()))
    ones = torch.ones(1, 1, 4, dtype=torch.bfloat16)
    for _ in range(600):
        grads.tile(torch.nn.Linear.__call__, (ones,), upstream=(ones,))
    grads.settle()
    assert [grad.unique().tolist() for grad in grads.result()] == [[600.0], [600.0]]
    assert all(grad.dtype == torch.bfloat16 for grad in grads.result()) and linear.weight.grad is None


def test_a_gradient_that_is_not_ours_is_left_as_it_was():
    model = made("llama")
    x = torch.randn(1, 11, 32, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)
    before = upstream.clone()
    rotation = model.model.rotary_emb(x, torch.arange(11)[None])
    with tiled(model, 4):
        y = model.model.layers[0](x, position_embeddings=rotation, segments=Segments.plan([11]))
        y.backward(upstream)
    assert torch.equal(upstream, before)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "llama-tied"])
def test_adapters_get_their_gradients_and_frozen_weights_none(name):
    batch = batch_of((21, 6))
    expected = backward(with_adapters(name), batch)
    model = with_adapters(name)
    with tiled(model, TILE):
        found = backward(model, batch)
    assert_same(found, expected, 1e-6 if "gemma" in name else 1e-12)
    trained = {name for name, grad in found[1].items() if grad is not None}
    assert trained and all("lora_" in name for name in trained)


@pytest.mark.parametrize("parts", [["mlp"], ["v_proj"], ["norm.weight"], ["embed_tokens"]])
def test_any_part_may_be_frozen(parts):
    """Below the first layer nothing may need a gradient, or of query, key and value just one."""
    found, batch = [], batch_of((11,))
    for tile in (None, 4):
        model = made("llama")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in parts))
        with tiled(model, tile) if tile else contextlib.nullcontext():
            found.append(backward(model, batch))
    assert_same(found[1], found[0], 1e-12)


@pytest.mark.parametrize("mode", ["plain", "tiled", "saved", "offloaded", "checkpointed"])
def test_hooks_fire_once_per_weight(mode):
    model = made("llama-tied")
    engaged = contextlib.nullcontext()
    if mode == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    elif mode != "plain":
        store = CheckpointStore(2, 2 if mode == "offloaded" else 0)
        engaged = tiled(model, 4, store=store, save_attention=mode == "saved")
    fired = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda grad, name=name: fired.append(("gradient", name)))
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: fired.append(("accumulated", name)))
    with engaged:
        backward(model, batch_of((17,)))
    assert sorted(fired) == sorted(
        (kind, n) for n, _ in model.named_parameters() for kind in ("gradient", "accumulated")
    )


def test_the_graph_can_be_used_twice():
    model, batch = made("llama"), batch_of((13,))
    with tiled(model, 4):
        hidden = hidden_states(model, batch)
        loss = (hidden * hidden.detach().cos()).sum()
        weights = [p for name, p in model.named_parameters() if "lm_head" not in name]
        first = torch.autograd.grad(loss, weights, retain_graph=True)
        second = torch.autograd.grad(loss, weights)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ----------------------------------------------------------------------------------------------------------- memory


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators returned and that are still alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.storages, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in known and storage._cdata not in self.storages:
                    self._count(storage)
        return out

    def _count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        self.storages[key] = weakref.finalize(storage, self._drop, key, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _drop(self, key, size):
        del self.storages[key]
        self.now -= size


def held(num_tokens, *, layers=2, offload=0, save_attention=False, kv_heads=4):
    """(bytes from forward to backward, the backward's peak), in units of 8 N H: float64."""
    torch.manual_seed(0)
    model = tiny_llama(vocab=VOCAB, dtype=torch.float64, num_hidden_layers=layers, num_key_value_heads=kv_heads,
                       max_position_embeddings=4096)  # fmt: skip
    batch, unit = batch_of((num_tokens,)), 8 * num_tokens * 32
    store = CheckpointStore(layers, offload)
    with tiled(model, 64, store=store, save_attention=save_attention):
        backward(model, batch)  # the slab, and the gradients, are there from now on
        upstream = torch.randn(num_tokens, 32, dtype=torch.float64)
        with LiveBytes() as live:
            hidden = hidden_states(model, batch)
            between = live.now
            live.peak = live.now
            hidden.backward(upstream)
    return between / unit, live.peak / unit


def test_what_waits_for_the_backward_is_the_layers_inputs():
    """3 u are no layer's: the embedding's indices and rotation, the final norm's input, the returned rows."""
    by_depth = {layers: held(256, layers=layers)[0] for layers in (2, 4)}
    assert by_depth[4] - by_depth[2] == pytest.approx(2.0, abs=0.02)
    saved = held(256, layers=4, save_attention=True)[0]
    assert saved - by_depth[4] == pytest.approx(4 * (1 + 4 / 32), abs=0.05)  # 4 heads of float64 logsumexp


def test_offloaded_inputs_leave_a_peak_that_depth_does_not_change():
    between, peaks = zip(*(held(256, layers=layers, offload=layers) for layers in (2, 5)), strict=True)
    assert max(between) - min(between) < 0.02
    # in the backward a layer's weight gradients in float32 and the next input are alive, whatever the depth
    assert max(peaks) - min(peaks) < 0.05
    hybrid = held(256, layers=5, offload=3)
    assert hybrid[0] - between[1] == pytest.approx(2.0, abs=0.02)


def test_memory_is_linear_in_the_tokens():
    small, large = held(256), held(512)
    assert large[0] == pytest.approx(small[0], rel=0.02)
    assert large[1] <= small[1] * 1.02
    # 10 u as unlearn.tiled counts them; the rows that were returned, the other layer's input, the rotation, tiles
    assert large[1] <= 10 + 1 + 1 + 0.5 + 1
    # a quarter of the key heads: keys, values and their gradients take 3 u less, and nothing is repeated; the tiles
    # behind the core then hold the most
    assert held(512, kv_heads=1)[1] < large[1] - 2.5


# ------------------------------------------------------------------------------------------------------ installation


def test_installing_leaves_no_trace_and_saves_the_same_files(tmp_path):
    model = made("llama")
    names = list(model.state_dict())
    with tiled(model, 4):
        assert list(model.state_dict()) == names
        model.save_pretrained(tmp_path)
        with pytest.raises(ZeroDivisionError), tiled(model, 2):
            raise ZeroDivisionError
    assert not any("forward" in vars(module) for module in model.modules())
    again = prepare(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64))
    batch = batch_of((9,))
    assert torch.equal(hidden_states(again, batch), hidden_states(model, batch))


def test_generation_goes_through_the_layers_own_forward():
    model, ids = made("gemma3"), torch.tensor([[5, 9, 7, 3, 3, 8, 2]])
    texts = []
    for engaged in (contextlib.nullcontext(), tiled(model, 2)):
        with engaged, generating(model):
            texts.append(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False))
    assert torch.equal(*texts)


def test_a_copy_of_a_tiled_model_runs_its_own_weights():
    model, batch = made("llama"), batch_of((9,))
    with tiled(model, 4):
        expected = hidden_states(model, batch)
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(hidden_states(twin, batch), expected)


@pytest.mark.parametrize(("name", "kind"), [("gpt-neox", "GPTNeoXLayer"), ("granite", "GraniteDecoderLayer")])
def test_other_layers_are_refused_by_name(name, kind):
    model = prepare(family(name))
    message = f"^tile_tokens: {kind} is not supported; LlamaDecoderLayer, .* are$"
    with pytest.raises(ValueError, match=message), tiled(model, 4):
        pass
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_a_tile_cannot_repeat_is_refused():
    model, batch = made("llama"), batch_of((9,))
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with tiled(model, 4), pytest.raises(ValueError, match="tile_tokens: dropout 0.1 in the attention"):
        hidden_states(model, batch)
    phi = transformers.Phi3ForCausalLM(PHI3)
    prepare(phi).train()
    phi.model.layers[1].resid_mlp_dropout.p = 0.5
    with tiled(phi, 4), pytest.raises(ValueError, match="tile_tokens: dropout 0.5 is not accepted"):
        hidden_states(phi, batch)
    with pytest.raises(ValueError, match="tile_tokens: 0 is not accepted"), tiled(phi, 0):
        pass
