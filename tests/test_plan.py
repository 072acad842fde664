"""The memory plan against what real transformers layers allocate, counted on the meta device; its choices; its command.

Meta tensors have a storage of the right size and no memory, so a step at 8B size and 512k tokens takes a second here.
Flash attention is stood in for by its allocations, CUDA's sizes: the output, the logsumexp, and in the backward dq in
float32, the row sums and, for key heads that several query heads share, dk and dv of every query head.
"""

import dataclasses
import functools
import importlib.util
import json
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.test_tiled import held
from unlearn import adapters, attention, cli, plan, quantized
from unlearn.commands.plan import find_shape
from unlearn.config import TrainConfig
from unlearn.data import PackedBatch, Role
from unlearn.footprint import weight_bytes
from unlearn.measures import GIB, Load, Measures
from unlearn.memory import LiveStorages
from unlearn.methods import StepTotals, batch_loss
from unlearn.model import head_of, hidden_states
from unlearn.plan import Budget, Wanted, choose, longest_context
from unlearn.rates import RATES, step_seconds
from unlearn.saturation import npo_weight, saturation
from unlearn.shapes import SHAPES
from unlearn.train import repeatable
from unlearn_kernels import checks, functions, options, problem

META = functools.partial(torch.empty, device="meta")
LONG = 131072
CONFIG = functools.partial(
    TrainConfig, model="m", output="o", lr=1e-5, epochs=1, batch_size=1, seed=0, method="npo", forget="f", beta=0.1
)
NEEDS_TILES = pytest.mark.skipif(importlib.util.find_spec("unlearn.tiled") is None, reason="unlearn.tiled is not here")

NEEDS_BITSANDBYTES = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


class Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        batch, heads, length, width = q.shape
        out = q.new_empty(batch, length, heads, width).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(batch, heads, length, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, logsumexp = ctx.saved_tensors
        expanded = q if k.shape[1] < q.shape[1] else META(0)
        grads = tuple(map(torch.empty_like, (q, k, v)))
        sizes = ((q, torch.float32), (logsumexp, None), (expanded, None), (expanded, None))
        workspace = [torch.empty_like(like, dtype=dtype) for like, dtype in sizes]
        del workspace
        return grads


def meta_batch(num_tokens):
    ids, rows = META(num_tokens, dtype=torch.int64), META(num_tokens, dtype=torch.int64)
    return PackedBatch(
        input_ids=ids,
        position_ids=META(num_tokens, dtype=torch.int64),
        cu_seqlens=META(2, dtype=torch.int32),
        answer_index=rows,
        targets=META(num_tokens, dtype=torch.int64),
        cu_answers=META(2, dtype=torch.int64),
        role=META(1, dtype=torch.int64),
        ref_logprob=META(1, dtype=torch.float64),
        lengths=(num_tokens,),
        answer_lengths=(num_tokens,),
        roles=(Role.FORGET,),
        keys=("document",),
    )


def meta_llama(shape, layers):
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=1 << 20,
        tie_word_embeddings=shape.tied,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    model.set_attn_implementation(attention.ATTENTION)
    return model


def with_adapters(model, on):
    """Adapters as a run attaches them; under qlora above matrices packed as bitsandbytes packs them."""
    if on.adapter == "qlora":
        bnb = quantized.bitsandbytes("test")
        for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]:
            if linear is not model.lm_head:
                packed = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, False, torch.bfloat16, device="meta"
                )
                count = linear.weight.numel()
                scales, table = META(count // 64, dtype=torch.uint8), META(16)
                outer = bnb.functional.QuantState(META(count >> 14), None, META(256), 256, dtype=torch.float32)
                state = bnb.functional.QuantState(
                    scales, linear.weight.shape, table, 64, "nf4", torch.bfloat16, META(()), outer
                )
                packed.weight = bnb.nn.Params4bit(
                    META(count // 2, 1, dtype=torch.uint8), quant_state=state, bnb_quantized=True, module=packed
                )
                model.set_submodule(name, packed)
        model.is_loaded_in_4bit = True
    adapters.attach(model, CONFIG(lora=on.rank))


def storages_of(weight):
    """A parameter, and what a packed one needs to be read."""
    state = getattr(weight, "quant_state", None)
    return (weight,) if state is None else (weight, state.absmax, state.state2.absmax)


def workspace(num_tokens):
    """Of the head: CUDA's default at 32k. In proportion beyond, or half a test's time would go to its chunks."""
    return options.DEFAULT_WORKSPACE_BYTES["cuda"] * num_tokens // (1 << 15)


def in_tiles(on, num_tokens):
    """Eight tiles at any length: what a tile adds is a matter of its size, the test's time of their number."""
    return dataclasses.replace(on, tile_tokens=num_tokens // 8)


def switched_on(stack, on, model, live):
    """The measures as unlearn.train switches them on."""
    if not on.tiled:
        stack.enter_context(repeatable(model, recompute=on.checkpointing))
        return
    from unlearn import offload, tiled

    def host_bytes(num_bytes, *_):
        slab = META(num_bytes, dtype=torch.uint8)
        live.ignore(slab)
        return slab

    stack.enter_context(mock.patch.object(offload, "host_bytes", host_bytes))
    store = offload.CheckpointStore(len(model.base_model.layers), on.host_layers)
    stack.enter_context(tiled.tiled(model, on.tile_tokens, store=store))


@functools.cache
def measured(name, layers, num_tokens, on, lengths=None):
    """Bytes alive at three moments of a step's forward and backward, weights included: {moment: peak}."""
    shape, on = SHAPES[name], in_tiles(on, num_tokens)
    model = meta_llama(shape, layers)
    if on.adapter:
        with_adapters(model, on)
    packing = attention.Segments((attention.Bucket(META(1, num_tokens, dtype=torch.int64), None),), None)
    if lengths is not None:
        made = attention.Segments.plan(lengths)
        on_meta = [[None if index is None else index.to("meta") for index in (b.gather, b.valid)] for b in made.buckets]
        buckets = tuple(attention.Bucket(*pair) for pair in on_meta)
        packing = attention.Segments(buckets, made.order.to("meta"))
    config = CONFIG()
    live, peaks = LiveStorages(), {}
    for weight in (part for parameter in model.parameters() for part in storages_of(parameter)):
        live.see(weight, "weight")
    with ExitStack() as stack:
        switched_on(stack, on, model, live)
        for patch in (
            mock.patch.object(attention.F, "scaled_dot_product_attention", lambda q, k, v, **_: Flash.apply(q, k, v)),
            mock.patch.object(attention, "takes_fewer_key_heads", lambda *_: True),  # as on CUDA
            mock.patch.object(attention.Segments, "plan", lambda *_: packing),
            mock.patch.dict(options.DEFAULT_WORKSPACE_BYTES, {"cpu": workspace(num_tokens)}),
            mock.patch.object(problem, "_CACHED_BYTES", workspace(num_tokens) // 8),
            mock.patch.object(checks, "check_target_values", lambda targets, vocab: None),
            mock.patch.object(functions, "_boundaries", lambda hidden, cu_seqlens: [0, num_tokens]),
            live,
        ):
            stack.enter_context(patch)
        decoder, norm = model.base_model.layers, model.base_model.norm
        for module, moment in ((norm, "head"), (decoder[-1], "top layer"), (decoder[1], "middle")):
            # its input's gradient is there: everything above is done
            note = functools.partial(lambda at, grad: peaks.update({at: live.reset_peak()}), moment)
            module.register_forward_pre_hook(lambda _, args, note=note: args[0].register_hook(note) and None)
        batch = meta_batch(num_tokens)
        loss = batch_loss(hidden_states(model, batch), head_of(model), batch, config, StepTotals(1, num_tokens, 0)).loss
        loss.backward()
        peaks["bottom layer"] = live.reset_peak()
    return peaks


def extrapolated(name, num_tokens, on, moment, host_share=0.0):
    """The measured peak at the model's full depth: affine in the number of layers, from 2 and 4 of them."""
    two, four = (
        measured(name, layers, num_tokens, dataclasses.replace(on, host_layers=round(layers * host_share)))[moment]
        for layers in (2, 4)
    )
    return two + (four - two) / 2 * (SHAPES[name].layers - 2)


def planned(shape, num_tokens, on, moment):
    """The same from the plan: without optimizer states, which do not take part."""
    budget = Budget(None, workspace=workspace(num_tokens))
    made = plan.make(shape, Load((num_tokens,)), in_tiles(on, num_tokens), budget)
    return made.moment_total(moment) - made.moments[moment]["optimizer"]


CHECKPOINTING = Measures(checkpointing=True)
TILED = Measures(checkpointing=True, tiled=True)
EVERY_MOMENT = ("head", "top layer", "bottom layer")


@pytest.mark.parametrize("moment", EVERY_MOMENT)
@pytest.mark.parametrize("num_tokens", [1 << 15, 1 << 17, 1 << 19])
@pytest.mark.parametrize(
    ("on", "host_share"),
    [(CHECKPOINTING, 0), pytest.param(TILED, 0, marks=NEEDS_TILES), pytest.param(TILED, 1, marks=NEEDS_TILES)],
    ids=["checkpointing", "tiled", "tiled, on host"],
)
def test_eight_billion_at_full_depth(on, host_share, num_tokens, moment):
    shape = SHAPES["llama-3.1-8b"]
    found = extrapolated(shape.name, num_tokens, on, moment, host_share)
    on = dataclasses.replace(on, host_layers=round(host_share * shape.layers))
    assert planned(shape, num_tokens, on, moment) == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("moment", EVERY_MOMENT)
@pytest.mark.parametrize("on", [Measures(), CHECKPOINTING, pytest.param(TILED, marks=NEEDS_TILES)])
@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3.2-1b"])
def test_other_shapes(name, on, moment):
    """As many key heads as query heads; a tied head, and key heads of half the width."""
    assert planned(SHAPES[name], LONG, on, moment) == pytest.approx(extrapolated(name, LONG, on, moment), rel=0.03)


@pytest.mark.parametrize("on", [CHECKPOINTING, pytest.param(TILED, marks=NEEDS_TILES)])
def test_the_working_set_alone(on):
    """What is neither weights nor gradients nor checkpoints, which would hide it."""
    shape, u = SHAPES["llama-3.1-8b"], 2 * LONG * 4096
    made = plan.make(dataclasses.replace(shape, layers=4), Load((LONG,)), in_tiles(on, LONG), Budget(None))
    rest = made.moment_total("top layer") - made.moments["top layer"]["layer"] - made.moments["top layer"]["optimizer"]
    found = measured(shape.name, 4, LONG, on)["top layer"] - rest
    assert made.moments["top layer"]["layer"] == pytest.approx(found, rel=0.03)
    assert (10 if on.tiled else 32) * u < found < (12 if on.tiled else 34) * u


@pytest.mark.parametrize(
    ("adapter", "on"),
    [
        ("lora", Measures()),
        ("lora", CHECKPOINTING),
        pytest.param("qlora", CHECKPOINTING, marks=NEEDS_BITSANDBYTES),
        pytest.param("qlora", TILED, marks=NEEDS_BITSANDBYTES),
    ],
)
def test_adapters_and_what_they_keep_in_float32(adapter, on):
    """The layer's working set under peft's layers, and bitsandbytes' where matrices are in 4 bits."""
    shape, on = plan.replace(SHAPES["llama-3.1-8b"], layers=2), plan.replace(on, adapter=adapter, rank=16)
    made = plan.make(shape, Load((1 << 15,)), in_tiles(on, 1 << 15), Budget(None))
    found = measured(shape.name, 2, 1 << 15, on)["top layer"] + made.moments["top layer"]["optimizer"]
    assert made.moment_total("top layer") == pytest.approx(found, rel=0.03)
    assert made.moments["top layer"]["layer"] > 0.3 * found


@pytest.mark.parametrize("on", [CHECKPOINTING, pytest.param(TILED, marks=NEEDS_TILES)])
@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-2-7b"])
def test_sequences_of_several_lengths_are_gathered(name, on):
    """The plan allows for a quarter of padding, the most there is: two sequences of which one is 5/3 as long."""
    shape, lengths = SHAPES[name], (LONG // 8 * 5, LONG // 8 * 3)
    made = plan.make(dataclasses.replace(shape, layers=2), Load(lengths), in_tiles(on, LONG), Budget(None))
    planned_bytes = made.moment_total("top layer") - made.moments["top layer"]["optimizer"]
    found = measured(shape.name, 2, LONG, on, lengths)["top layer"]
    assert measured(shape.name, 2, LONG, on)["top layer"] < found
    assert planned_bytes == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("moment", ["top layer", "bottom layer"])
@pytest.mark.parametrize("on", [CHECKPOINTING, pytest.param(TILED, marks=NEEDS_TILES)])
def test_linear_in_the_tokens(on, moment):
    one, four, sixteen = (measured("llama-3.1-8b", 2, n << 15, on)[moment] for n in (1, 4, 16))
    assert (sixteen - four) / 12 == pytest.approx((four - one) / 3, rel=0.01)


@NEEDS_TILES
def test_depth_costs_nothing_but_weights_when_checkpoints_are_on_the_host():
    peaks = {}
    for layers in (2, 4):
        on = dataclasses.replace(TILED, host_layers=layers)
        peaks[layers] = measured("llama-3.1-8b", layers, LONG, on)["top layer"]
    assert peaks[4] - peaks[2] == pytest.approx(2 * 2 * SHAPES["llama-3.1-8b"].layer_params, rel=1e-3)


# --------------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-2-7b", 6.738),
        ("llama-2-13b", 13.016),
        ("llama-3.1-8b", 8.030),
        ("llama-3.2-1b", 1.236),
        ("llama-3.2-3b", 3.213),
        ("mistral-7b", 7.242),
        ("zephyr-7b", 7.242),
        ("qwen2.5-1.5b", 1.544),
        ("qwen2.5-7b", 7.616),
        ("qwen3-8b", 8.191),
    ],
)
def test_known_shapes_have_the_published_sizes(name, billions):
    assert SHAPES[name].params / 1e9 == pytest.approx(billions, abs=6e-4)


def test_a_configuration_gives_the_same_shape_as_the_table(tmp_path):
    for name, kind, more in (
        ("llama-3.1-8b", "llama", {"tie_word_embeddings": False}),
        ("qwen2.5-1.5b", "qwen2", {"tie_word_embeddings": True}),
        ("qwen3-8b", "qwen3", {"tie_word_embeddings": False, "head_dim": 128}),
    ):
        shape = SHAPES[name]
        values = {
            "model_type": kind,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "vocab_size": shape.vocab,
        }
        (tmp_path / "config.json").write_text(json.dumps(values | more))
        for given in (tmp_path, tmp_path / "config.json"):
            found = find_shape(str(given))
            assert dataclasses.replace(found, name=name, source=shape.source) == shape


@pytest.mark.parametrize(
    "name", ["Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf", "meta-llama/Meta-Llama-3.1-8B-Instruct", "qwen/Qwen3-8B"]
)
def test_repositories_of_known_models_need_no_network(name):
    assert find_shape(name).params > 6e9


# ----------------------------------------------------------------------------------------------------------- the ladder

EIGHT, H200 = SHAPES["llama-3.1-8b"], Budget(131 * GIB, 128 * GIB)


def test_measures_come_in_order_and_only_when_needed():
    found = [choose(EIGHT, Load((n,), 2), H200, Wanted()).on for n in (2048, 65536, 131072, 524288)]
    assert found[0] == Measures()
    assert found[1] == Measures(checkpointing=True)
    assert found[2].tiled and 0 < found[2].host_layers < EIGHT.layers and found[2].optimizer == "adamw"
    assert found[3].host_layers < EIGHT.layers and found[3].optimizer == "adamw8bit"


def test_no_more_layers_on_the_host_than_it_takes():
    made = choose(EIGHT, Load((131072,), 2), H200, Wanted())
    fewer = plan.make(EIGHT, made.load, dataclasses.replace(made.on, host_layers=made.on.host_layers - 1), H200)
    assert made.fits and not fewer.fits


def test_a_small_host_sends_the_plan_to_the_next_optimizer():
    small = dataclasses.replace(H200, host=4 * GIB)
    assert choose(EIGHT, Load((131072,), 2), small, Wanted()).on.optimizer == "adamw8bit"


def test_the_longest_context_is_the_last_that_fits():
    for wanted in (Wanted(), Wanted(adapter="qlora"), Wanted(optimizer="adafactor")):
        longest = longest_context(EIGHT, lambda n: Load((n,), 2), H200, wanted)
        assert longest > 30_000
        assert choose(EIGHT, Load((longest,), 2), H200, wanted).fits
        assert not choose(EIGHT, Load((longest + plan.STEP,), 2), H200, wanted).fits


def test_adapters_are_used_only_when_asked_for_and_named_as_a_remedy():
    card = Budget(24 * GIB, 32 * GIB)  # too small a host for optimizer states
    made = choose(EIGHT, Load((8192,), 2), card, Wanted())
    assert not made.fits and made.on.adapter is None
    text = "; ".join(plan.remedies(made, lambda n: Load((n,), 2), Wanted()))
    assert "lora of rank 16" in text and "a GPU of" in text
    with_adapter = choose(EIGHT, Load((8192,), 2), card, Wanted(adapter="lora"))
    assert with_adapter.fits and with_adapter.on.adapter == "lora"


def test_float32_gets_no_remedy_that_it_is_not_planned_with():
    made = choose(EIGHT, Load((65536,), 2), Budget(48e9), Wanted(itemsize=4))
    named = "; ".join(plan.remedies(made, lambda n: Load((n,), 2), Wanted(itemsize=4)))
    assert not made.fits and "qlora" not in named and "adafactor" not in named and "a GPU of" in named


def test_the_gpu_named_as_a_remedy_is_the_smallest_that_would_do():
    made = choose(EIGHT, Load((131072,), 2), Budget(24 * GIB), Wanted())
    (named,) = [text for text in plan.remedies(made, lambda n: Load((n,), 2), Wanted()) if "a GPU of" in text]
    gib = int("".join(filter(str.isdigit, named)))
    assert choose(EIGHT, Load((131072,), 2), Budget(gib * GIB), Wanted()).fits
    assert not choose(EIGHT, Load((131072,), 2), Budget((gib - 1) * GIB), Wanted()).fits


@pytest.mark.parametrize(("gpu", "host"), [(24, 8), (48, 16), (74, 16)])
def test_a_host_named_as_a_remedy_and_a_gpu_beside_this_host_would_do(gpu, host):
    load, budget = Load((131072,), 2), Budget(gpu * GIB, host * GIB)
    made = choose(EIGHT, load, budget, Wanted())
    named = plan.remedies(made, lambda n: Load((n,), 2), Wanted())
    assert not made.fits and any("a GPU of" in text for text in named)
    for text in named:
        gib = int("".join(filter(str.isdigit, text)) or 0) * GIB
        if "GPU of" in text:
            assert choose(EIGHT, load, dataclasses.replace(budget, gpu=gib), Wanted()).fits
        elif "host memory" in text:
            assert choose(EIGHT, load, dataclasses.replace(budget, host=gib), Wanted()).fits
    # states that the host cannot hold
    away = Wanted("adamw-offload")
    made = choose(EIGHT, load, dataclasses.replace(budget, host=40 * GIB), away)
    assert not any("a GPU of" in text for text in plan.remedies(made, lambda n: Load((n,), 2), away))


def test_stepping_in_the_backward_takes_the_whole_step_in_one_pack():
    on = Measures(checkpointing=True, optimizer="adamw8bit", in_backward=True)
    made = plan.make(EIGHT, Load((1000,), 2), on, H200)
    assert made.load == Load((1000, 1000), 1)
    assert made.part("gradients") == 2 * EIGHT.head_params


def test_kept_attention_is_what_tiles_keep():
    """Against tests/test_tiled.py's count of live bytes, in units of 8 N H; its logsumexp is float64, 0.125 of them."""
    shape, u = (
        dataclasses.replace(SHAPES["llama-2-7b"], hidden=32, layers=4, heads=4, kv_heads=4, head_dim=8),
        8 * 256 * 32,
    )
    plain, kept = (
        plan.make(shape, Load((256,)), Measures(True, True, itemsize=8, save_attention=save), Budget(None))
        for save in (False, True)
    )
    counted = held(256, layers=4, save_attention=True)[0] - held(256, layers=4)[0]
    of_head, of_top, of_bottom = (
        (kept.moment_total(moment) - plain.moment_total(moment)) / u for moment in ("head", "top layer", "bottom layer")
    )
    assert of_head == pytest.approx(counted - 4 * 0.125 / 2, abs=0.1)
    assert (of_top, of_bottom) == (pytest.approx(of_head * 3 / 4), 0) and kept.seconds < plain.seconds


def test_states_on_the_host_take_none_of_the_gpus_memory_but_two_pairs_of_slices():
    """8.030e9 weights: 59.83 GiB on the host, which cross the bus both ways, and 256 MiB on the GPU."""
    load, on = Load((1024,), 2), Measures(optimizer="adamw-offload")
    plain, offloaded = (plan.make(EIGHT, load, measures, H200) for measures in (Measures(), on))
    assert offloaded.part("optimizer") == 2 * 2 * 4 * (1 << 24)
    assert offloaded.host / GIB == offloaded.host_states / GIB == pytest.approx(59.83, abs=0.01)
    assert offloaded.seconds - plain.seconds == pytest.approx(16 * 8.030e9 / 50e9, rel=1e-3)
    assert plan.make(EIGHT, load, dataclasses.replace(on, itemsize=4), H200).host == offloaded.host


def test_on_80_gb_states_go_to_the_host_before_gradients_are_given_up():
    card = Budget(80e9, 200 * GIB, rates=RATES["h100"])
    longest = longest_context(EIGHT, lambda n: Load((n,), 2), card, Wanted())
    eight_bits = longest_context(EIGHT, lambda n: Load((n,), 2), card, Wanted(optimizer="adamw8bit"))
    made = choose(EIGHT, Load((eight_bits + plan.STEP,), 2), card, Wanted())
    assert made.on.optimizer == "adamw-offload" and not made.on.in_backward
    assert made.host == made.host_states + made.on.host_layers * 2 * made.load.tokens * 4096
    assert longest > 1.5 * eight_bits


def test_static_sizes_of_published_models():
    """GiB by hand: 8.030e9 weights of 2 bytes, their gradients, 8 bytes of states; 2 + 1/32 bytes of 8-bit ones."""
    made = plan.make(EIGHT, Load((1024,), 2), Measures(), H200)
    assert [made.part(name) / GIB for name in ("weights", "gradients", "optimizer")] == pytest.approx(
        [14.96, 14.96, 59.83], abs=0.01
    )
    eight_bits = plan.make(EIGHT, Load((1024,), 2), Measures(optimizer="adamw8bit"), H200)
    assert eight_bits.part("optimizer") / GIB == pytest.approx(15.19, abs=0.01)
    quarter = weight_bytes(EIGHT, Measures(adapter="qlora", rank=16))
    assert 5.3 < quarter / GIB < 5.8  # embedding and head stay at 2 bytes


def test_seconds_add_up_from_flop():
    """8B at 131072 tokens, recomputed: 4 x 2 x P per token, and 4.5 forwards of causal attention."""
    rates = RATES["h200"]
    load, on = Load((131072,)), Measures(checkpointing=True)
    linear = 8 * 7.505e9 * 131072 / 600e12
    scores = 2 * 131072**2 * 4096 * 32
    attention_seconds = scores * (2 / 360e12 + 2.5 / 310e12)
    update = 150 * 8.03e9 / 4.8e12
    assert step_seconds(EIGHT, load, on, rates) == pytest.approx(linear + attention_seconds + update, rel=2e-3)


# ----------------------------------------------------------------------------------------------------------- saturation


def test_the_npo_weight_at_its_limits():
    assert npo_weight(beta=0.1, tokens=1000, drift=0.0) == 1.0
    assert npo_weight(beta=0.1, tokens=1 << 30, drift=1.0) == pytest.approx(0.0, abs=1e-300)
    assert npo_weight(beta=0.1, tokens=100, drift=0.01) == pytest.approx(2 / (1 + 2.718281828**0.1))


def test_long_documents_saturate_and_answers_do_not():
    assert saturation(beta=0.1, tokens=200, drift=1e-3) is None
    text = saturation(beta=0.1, tokens=131072, drift=1e-3)
    assert "131 nats" in text and "SimNPO" in text and "mean over tokens" in text


# ---------------------------------------------------------------------------------------------------------- the command


def run(capsys, *arguments):
    status = cli.main(["plan", *arguments])
    return status, capsys.readouterr()


def test_json_stands_alone_and_adds_up(capsys):
    status, printed = run(
        capsys,
        "--model",
        "llama-3.1-8b",
        "--context",
        "128k",
        "--gpu-memory",
        "141GB",
        "--host-memory",
        "128",
        "--json",
    )
    found = json.loads(printed.out)
    assert status == 0 and printed.err == ""
    assert found["tokens"] == 131072 and found["packs"] == 2 and found["fits"]
    assert found["total"] == max(sum(parts.values()) for parts in found["moments"].values())
    assert found["headroom"] == pytest.approx(141e9 - found["total"] - found["reserve"])
    assert found["measures"]["host_layers"] * 2 * 131072 * 4096 == found["parts"]["checkpoints_host"]
    assert found["longest_context"] >= 131072


def test_the_table_says_what_would_fit(capsys):
    status, printed = run(capsys, "--model", "llama-3.1-8b", "--context", "131072", "--gpu-memory", "24GB")
    assert status == 0
    for text in (
        "does not fit",
        "would fit: ",
        "a GPU of",
        "NPO's weight saturates",
        "s a step on rtx4090",
    ):
        assert text in printed.out
    assert "as options of `unlearn train`: --max-tokens 131072 --tile-tokens 4096 --offload-ch" in printed.out


def test_without_a_context_the_longest_is_planned(capsys):
    _, printed = run(capsys, "--model", "llama-2-7b", "--gpu-memory", "80", "--qlora", "16", "--json")
    found = json.loads(printed.out)
    assert found["fits"] and found["tokens"] == found["longest_context"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "gpt-7"], "no file or folder 'gpt-7'; known by name are llama-2-7b"),
        (["--gpu-memory", "80XB"], "'80XB' is not accepted; a size such as"),
        (["--gpu-memory", "0"], "'0' is not accepted"),
        (["--context", "-5"], "context"),
        (["--context", "0k"], "'0k' is not accepted"),
        (["--lora", "0"], "0 is not accepted"),
        (["--lora", "8", "--qlora", "8"], "qlora: 8 and lora 8"),
        (["--optimizer", "sgd"], "'sgd'"),
        (["--dtype", "float32", "--optimizer", "adamw8bit"], "dtype: float32"),
        (["--context", "64k", "--max-tokens", "32k"], "max-tokens: 32768 is below the context of 65536"),
        (["--drift", "0"], "drift: 0.0 is not accepted"),
        (["--tile-tokens", "-1"], "tile_tokens: -1 is not accepted"),
        (["--gradient-checkpointing", "--offload-checkpoints", "33"], "33 is not accepted; 0 to 32 layers are"),
    ],
)
def test_refusals_take_one_line(capsys, options, said):
    defaults = {"--model": "llama-2-7b", "--gpu-memory": "80"}
    rest = [text for name, value in defaults.items() if name not in options for text in (name, value)]
    arguments = [*rest, *options]
    status, printed = run(capsys, *arguments)
    assert status == 2 and printed.out == ""
    assert said in printed.err and printed.err.count("\n") == 1


def test_a_model_of_another_kind_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    status, printed = run(capsys, "--model", str(tmp_path), "--gpu-memory", "80")
    assert status == 2 and "is of type 'gpt2'; plans exist for llama" in printed.err
