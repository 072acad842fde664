"""What a run says about its memory before its first step and after its last, and what it warns of."""

import dataclasses
import re

import pytest
import torch

from tests.test_train import make_config, make_data, run
from unlearn import plan, shapes
from unlearn.batches import epoch_steps, packing_of
from unlearn.engage import wanted_of
from unlearn.forecast import Forecast, run_load, saturated
from unlearn.measures import Load, Measures
from unlearn.plan import Budget
from unlearn.shapes import SHAPES


def steps_of(config):
    return epoch_steps(make_data(config), config, 0)


def test_a_run_says_its_plan_first_and_what_it_took_last(tmp_path):
    said = []
    run(make_config(tmp_path), say=said.append)
    assert said[0].startswith("memory plan: ") and "warning" not in " ".join(said)
    found = re.fullmatch(
        r"peak memory: the process rose by (-?\d+) MiB over the (\d+) it held with the model; (\d+) planned .*",
        said[-1],
    )
    assert found is not None and 50 < int(found[2]) < 10_000 and 0 <= int(found[3]) < 50


def test_the_largest_pack_is_what_is_planned(tmp_path):
    config = make_config(tmp_path, max_tokens=60)
    steps = steps_of(config)
    load = run_load(config, packing_of(steps, 60))
    members = [[s.num_tokens for group in step.groups for s, _ in group] for step in steps]
    longest = max(max(lengths) for lengths in members)  # more than the budget: such a row is a pack of its own
    assert longest <= load.tokens <= max(60, longest)
    assert load.packs >= max(-(-sum(lengths) // 60) for lengths in members) > 1
    assert 0 < load.answers < load.tokens
    whole = run_load(make_config(tmp_path), packing_of(steps, 10_000))
    assert whole.packs == 1 and whole.tokens == max(map(sum, members))


def test_a_4_bit_run_is_planned_as_one(tmp_path):
    """Weights below those of plain adapters, and else the same."""
    config = make_config(tmp_path, lora=4, dtype="bfloat16")
    shape, load = SHAPES["llama-2-7b"], Load((1024,))
    one, two = (
        plan.choose(shape, load, Budget(None), wanted_of(c, shape))
        for c in (config, dataclasses.replace(config, lora_4bit=True))
    )
    assert (one.on.adapter, two.on.adapter) == ("lora", "qlora")
    assert two.part("weights") < one.part("weights") and two.part("gradients") == one.part("gradients")


def test_kl_keeps_the_references_head(tmp_path):
    config = make_config(tmp_path, retain_term="kl")
    load = run_load(config, packing_of(steps_of(config), 200))
    assert load.reference_head
    shape, budget = SHAPES["llama-2-7b"], Budget(None)
    with_head, without = (
        plan.make(shape, dataclasses.replace(load, reference_head=kept), Measures(), budget) for kept in (True, False)
    )
    assert with_head.total - without.total == 2 * shape.head_params


@pytest.mark.parametrize(("method", "warned"), [("npo", True), ("simnpo", False)])
def test_saturation_is_warned_of_where_log_likelihoods_are_summed(tmp_path, method, warned):
    """beta so large that answers of ten tokens are what documents are at 0.1."""
    config = make_config(tmp_path, method=method, beta=1000.0, **({} if warned else {"gamma": 0.0}))
    assert any("SimNPO" in text for text in saturated(config, steps_of(config))) == warned


def test_a_model_without_a_plan_trains_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "MODEL_TYPES", ("mistral",))
    said = []
    run(make_config(tmp_path, epochs=1, warmup_epochs=0.0), say=said.append)
    assert said[0] == "memory plan: none (model: LlamaForCausalLM is of type 'llama'; plans exist for mistral)"
    assert not any(text.startswith("peak memory") for text in said)


def test_on_a_gpu_the_allocator_is_compared():
    made = plan.make(SHAPES["llama-2-7b"], Load((4096,)), Measures(), Budget(None))
    text = Forecast(None, made.budget, made, torch.device("cuda"), 0.0).compare(1.1 * made.total / 2**20)
    assert text is not None and text.endswith("planned (+10%)")
