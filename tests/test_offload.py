"""The slab of layer inputs: same bits as without, one forward at a time, the size that was asked for."""

import weakref

import pytest
import torch

from tests.families import family
from tests.tiny import tiny_llama
from unlearn.data import Item, Role, Sequence, collate
from unlearn.model import hidden_states, prepare
from unlearn.offload import CheckpointStore, offloaded_checkpoints
from unlearn.tiled import decoder_layers

CPU = torch.device("cpu")


def filled(value, num_tokens=5):
    return torch.full((1, num_tokens, 4), float(value), dtype=torch.float64)


def test_layers_come_back_in_any_order_of_a_backward():
    store = CheckpointStore(5, 3)
    tickets = [store.put(i, filled(i)) for i in range(5)]
    assert [ticket.offloaded for ticket in tickets] == [True, True, True, False, False]
    for i in (4, 3, 2, 1, 0, 2, 0, 1):  # a backward, then parts of it again
        kept = None if tickets[i].offloaded else filled(i)
        assert torch.equal(store.restore(tickets[i], kept, CPU), filled(i))


def test_the_next_layer_is_fetched_ahead():
    store = CheckpointStore(4, 2)
    tickets = [store.put(i, filled(i)) for i in range(4)]
    fetched = []
    for i in (3, 2, 1, 0):
        store.restore(tickets[i], None if tickets[i].offloaded else filled(i), CPU)
        fetched.append(store._fetched and store._fetched[0].index)
    assert fetched == [None, 1, 0, None]  # also by the last layer whose input stayed


def test_what_comes_back_is_not_the_slab_itself():
    store = CheckpointStore(2, 2)
    tickets = [store.put(i, filled(i)) for i in range(2)]
    store.restore(tickets[1], None, CPU).zero_()
    assert torch.equal(store.restore(tickets[1], None, CPU), filled(1))


def test_the_slab_has_the_exact_size_of_the_longest_pack():
    said = []
    store = CheckpointStore(4, 3, say=said.append)
    for num_tokens, expected in ((7, 7), (3, 7), (11, 11)):  # 7 and 11 are far from powers of two
        tickets = [store.put(i, filled(i, num_tokens)) for i in range(4)]
        assert store._slab.untyped_storage().nbytes() == 3 * expected * 4 * 8
        assert torch.equal(store.restore(tickets[2], None, CPU), filled(2, num_tokens))
    assert len(said) == 2 and said[0].startswith("layer inputs: 3 of 4 layers on the host")
    store.close()
    assert store._slab is None
    store = CheckpointStore(4, 3, longest=13)
    for num_tokens in (3, 13):
        store.put(0, filled(0, num_tokens))
        assert store._slab.untyped_storage().nbytes() == 3 * 13 * 4 * 8


@pytest.mark.parametrize("num_tokens", [5, 2, 9])
def test_an_earlier_forwards_inputs_are_refused_not_replaced(num_tokens):
    store = CheckpointStore(3, 2)
    old = [store.put(i, filled(i)) for i in range(3)]
    new = [store.put(i, filled(10 + i, num_tokens)) for i in range(3)]
    with pytest.raises(RuntimeError, match="belongs to an earlier forward"):
        store.restore(old[1], None, CPU)
    # a kept input is the caller's own, and must not fetch the other forward's layer for the next
    assert torch.equal(store.restore(old[2], filled(2), CPU), filled(2))
    assert torch.equal(store.restore(new[1], None, CPU), filled(11, num_tokens))
    store.close()
    with pytest.raises(RuntimeError, match="belongs to an earlier forward"):
        store.restore(new[0], None, CPU)


def test_a_forward_that_broke_off_leaves_nothing_behind():
    store = CheckpointStore(3, 3)
    store.put(0, filled(7))
    tickets = [store.put(i, filled(i)) for i in range(3)]
    assert [store.restore(tickets[i], None, CPU).flatten()[0].item() for i in (2, 1, 0)] == [2.0, 1.0, 0.0]


def test_how_many_layers():
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match=f"offload_checkpoints: {wrong} is not accepted; 0 to 3 layers are"):
            CheckpointStore(3, wrong)


def test_memory_that_cannot_be_had(monkeypatch):
    def refused(*size, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    store = CheckpointStore(2, 2)
    monkeypatch.setattr(torch, "empty", refused)
    with pytest.raises(ValueError, match="^offload_checkpoints: .* GiB of host memory could not be had; fewer layers"):
        store.put(0, filled(0))


@pytest.mark.parametrize("name", ["llama", "gpt-neox"])
@pytest.mark.parametrize("offload", [0, 1, 2])
def test_transformers_own_checkpoints_offloaded_give_the_same_bits(name, offload):
    batch = collate([Item(Sequence("a", tuple(range(3, 20)), 1), Role.FORGET)])
    grads, seen = [], []
    for used in (None, offload):
        model = prepare(family(name))
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        layers = decoder_layers(model)
        if used is None:
            hidden_states(model, batch).square().sum().backward()
        else:
            own = [layer._gradient_checkpointing_func for layer in layers]
            store = CheckpointStore(len(layers), used)
            with offloaded_checkpoints(layers, store):
                hidden = hidden_states(model, batch)
                seen.append(0 if store._slab is None else store._slab.numel())
                hidden.square().sum().backward()
            assert [layer._gradient_checkpointing_func for layer in layers] == own
        grads.append([p.grad for p in model.parameters()])
    assert seen == [offload * 16 * 32 * 4]  # the layers' inputs and nothing else went there
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_input_itself_is_let_go():
    """Offloaded, the device's copy has to be gone after the forward, not merely copied."""
    model = tiny_llama(dtype=torch.float64)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    layers, inputs = decoder_layers(model), []
    for layer in layers:
        layer.register_forward_pre_hook(lambda m, args: inputs.append(weakref.ref(args[0])))
    batch = collate([Item(Sequence("a", (5, 9, 7, 11), 1), Role.FORGET)])
    with offloaded_checkpoints(layers, CheckpointStore(2, 1)):
        hidden = hidden_states(model, batch)
        assert inputs[0]() is None and inputs[1]() is not None
        hidden.sum().backward()
