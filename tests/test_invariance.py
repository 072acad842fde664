"""Nothing is lost on the way into steps, and a step's loss is the same however it is cut and whatever the order."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import test_methods
from tests.test_batches import config_of, training_set
from unlearn.batches import all_steps, num_steps_per_epoch
from unlearn.data import Item, Role, collate, pack
from unlearn.methods import batch_loss
from unlearn.model import Head

VOCAB, WIDTH = test_methods.VOCAB, 6


@settings(max_examples=40, deadline=None)
@given(
    forget=st.integers(1, 9),
    retain=st.integers(1, 7),
    batch_size=st.integers(1, 11),
    per_forget=st.integers(1, 3),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 2**63 - 1),
    max_tokens=st.integers(1, 200),
)
def test_rows_through_steps_and_packs(forget, retain, batch_size, per_forget, epochs, seed, max_tokens):
    """Each forget row once an epoch; retain rows evenly; packs hold what the step holds, in its order and budget."""
    values = {"batch_size": batch_size, "retain_per_forget": per_forget, "epochs": epochs, "seed": seed}
    data, config = training_set(forget=forget, retain=retain, **values)
    steps = all_steps(data, config)
    assert steps == all_steps(data, config)
    assert [step.index for step in steps] == list(range(epochs * num_steps_per_epoch(data, config)))
    for epoch in range(epochs):
        own = [step for step in steps if step.epoch == epoch]
        members = [member for step in own for group in step.groups for member in group]
        seen = Counter(s.key for s, role in members if role == Role.FORGET)
        assert seen == Counter(group[0][0].key for group in data.forget)
        drawn = Counter(s.key for s, role in members if role == Role.RETAIN)
        assert drawn.total() == forget * per_forget
        counts = [drawn[s.key] for s in data.retain]
        assert max(counts) - min(counts) <= 1
        sizes = [sum(role == Role.FORGET for group in step.groups for _, role in group) for step in own]
        assert all(size == batch_size for size in sizes[:-1]) and 1 <= sizes[-1] <= batch_size
    for step in steps:
        groups = [[Item(s, role) for s, role in group] for group in step.groups]
        packs = pack(groups, max_tokens)
        assert [group for one in packs for group in one] == groups
        for one in packs:
            batch = collate([item for group in one for item in group])
            assert len(batch.input_ids) <= max_tokens or len(one) == 1
            assert batch.keys == tuple(item.sequence.key for group in one for item in group)
    last = config_of(**values | {"seed": (seed + 1) % 2**63})
    assert Counter(map(len, (step.groups for step in all_steps(data, last)))) == Counter(
        len(step.groups) for step in steps
    )


class Step:
    """A step of a method with hidden states of its own for each sequence, float64: no model that rounds differently."""

    def __init__(self, method, retain_term):
        self.config = test_methods.config_of(method, retain_term)
        self.groups, self.totals = test_methods.step_of(method, retain_term)
        draw = torch.Generator().manual_seed(3)
        self.weight = torch.randn(VOCAB, WIDTH, dtype=torch.float64, generator=draw, requires_grad=True)
        self.ref_weight = torch.randn(VOCAB, WIDTH, dtype=torch.float64, generator=draw)
        self.hidden, self.ref_hidden = {}, {}
        for sequence in (item.sequence for group in self.groups for item in group):
            size = (sequence.num_answer_tokens, WIDTH)
            self.hidden[sequence] = torch.randn(size, dtype=torch.float64, generator=draw, requires_grad=True)
            self.ref_hidden[sequence] = torch.randn(size, dtype=torch.float64, generator=draw)

    def loss(self, groups, max_tokens):
        """(loss, gradients by weight and sequence, log-likelihoods by key)"""
        leaves = [self.weight, *self.hidden.values()]
        for leaf in leaves:
            leaf.grad = None
        total, logprobs = 0.0, {}
        for one in pack(groups, max_tokens):
            items = [item for group in one for item in group]
            batch = collate(items)
            kept = [self.ref_hidden[item.sequence] for item in items if item.role == Role.RETAIN]
            extra = (torch.cat(kept), self.ref_weight) if kept and self.config.retain_term == "kl" else ()
            hidden = torch.cat([self.hidden[item.sequence] for item in items])
            head = Head(self.weight, None, 1.0, None)
            result = batch_loss(hidden, head, batch, self.config, self.totals, *extra)
            result.loss.backward()
            total += result.loss.item()
            logprobs |= dict(zip(batch.keys, result.logprobs.tolist(), strict=True))
        return total, [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone() for leaf in leaves], logprobs


@pytest.mark.parametrize(("method", "retain_term"), [case for case in test_methods.CASES if case[1] != "none"])
def test_a_step_does_not_depend_on_its_packs_or_the_order_of_its_rows(method, retain_term):
    step = Step(method, retain_term)
    whole = step.loss(step.groups, 10**6)
    assert all(grad.abs().max() > 0 for grad in whole[1])
    forget = [group for group in step.groups if group[0].role != Role.RETAIN]
    retain = [group for group in step.groups if group[0].role == Role.RETAIN]

    @settings(max_examples=5, deadline=None)
    @given(order=st.permutations(forget), rest=st.permutations(retain), max_tokens=st.integers(1, 120))
    def check(order, rest, max_tokens):
        loss, grads, logprobs = step.loss([*order, *rest], max_tokens)  # retain sequences stand last
        assert loss == pytest.approx(whole[0], rel=1e-12)
        for ours, expected in zip(grads, whole[1], strict=True):
            assert (ours - expected).norm() <= 1e-12 * expected.norm()
        assert logprobs == pytest.approx(whole[2], rel=1e-12, nan_ok=True)

    check()
