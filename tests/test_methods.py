"""Every method's loss and gradient against full logits and autograd, however the step is cut into micro-batches."""

import dataclasses
import functools
import math
import random

import pytest
import torch
from torch.nn.functional import kl_div, logsigmoid

from tests.tiny import tiny_llama, tiny_tokenizer
from unlearn import methods
from unlearn.config import TrainConfig
from unlearn.data import Item, Role, Sequence, collate, pack
from unlearn.methods import METHODS, BatchLoss, StepTotals, batch_loss, check_config
from unlearn.model import generating, head_of, hidden_states
from unlearn.reference import ReferenceHidden
from unlearn_kernels import Options

VOCAB = 97
FORGET_WEIGHT, RETAIN_WEIGHT, BASELINE = 0.7, 1.3, 0.4
PARAMETERS = {"beta": 0.3, "beta2": 1.5, "gamma": 0.2}
CASES = [
    (name, term)
    for name, method in METHODS.items()
    if name != "finetune"
    for term in ("none", "nll", "kl")
    if not (method.token_weights is not None and term == "kl")
]


def config_of(method, retain_term="none", **values):
    needed = {name: PARAMETERS[name] for name in METHODS[method].parameters}
    shared = {
        "model": "m", "output": "o", "method": method, "lr": 1e-3, "epochs": 1, "batch_size": 4, "seed": 0,
        "forget": "f", "retain": None if retain_term == "none" else "r", "retain_term": retain_term,
        "forget_weight": FORGET_WEIGHT, "retain_weight": RETAIN_WEIGHT,
    }  # fmt: skip
    if METHODS[method].pairs == "refusals" or METHODS[method].baseline:
        shared["alternates"] = "a"
    return TrainConfig(**(shared | needed | values))


def sequences_of(count, seed):
    rng = random.Random(seed)
    made = []
    for number in range(count):
        length = rng.randint(4, 16)
        ids = tuple(rng.randrange(2, VOCAB) for _ in range(length))
        made.append(Sequence(f"{seed}.{number}", ids, rng.randint(1, length - 1)))
    return made


def step_of(method, retain_term):
    """Groups of a step, forget first: 5 forget rows or pairs, 4 retain rows, references at random."""
    rng = random.Random(5)
    forget, chosen, retain = sequences_of(5, 1), sequences_of(5, 2), sequences_of(4, 3)
    if METHODS[method].pairs:
        groups = [
            [Item(a, Role.CHOSEN, rng.uniform(-60, -20)), Item(b, Role.REJECTED, rng.uniform(-60, -20))]
            for a, b in zip(chosen, forget, strict=True)
        ]
    else:
        groups = [[Item(s, Role.FORGET, rng.uniform(-60, -20))] for s in forget]
    if retain_term != "none":
        groups += [[Item(s, Role.RETAIN)] for s in retain]
    totals = StepTotals(
        num_forget=5,
        num_forget_tokens=sum(s.num_answer_tokens for s in forget),
        num_retain_tokens=sum(s.num_answer_tokens for s in retain) if retain_term != "none" else 0,
        baseline=BASELINE,
    )
    return groups, totals


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Hidden states of another model for KL, float64."""
    model = tiny_llama(vocab=VOCAB, seed=9, dtype=torch.float64)
    states = ReferenceHidden.load_or_compute(
        model, tiny_tokenizer(), sequences_of(4, 3), tmp_path_factory.mktemp("reference"), max_tokens=30
    )
    return model, states


def run(model, config, groups, totals, max_tokens, states):
    """(loss, gradients, results) of a step in micro-batches of max_tokens."""
    model.zero_grad()
    results = []
    for packed in pack(groups, max_tokens):
        items = [item for group in packed for item in group]
        batch = collate(items)
        kept = [item.sequence for item in items if item.role == Role.RETAIN]
        extra = ()
        if config.retain_term == "kl" and kept:
            weight = states.weight.to(head_of(model).weight.dtype)
            extra = (states.rows(kept).to(weight.dtype), weight)
        result = batch_loss(hidden_states(model, batch), head_of(model), batch, config, totals, *extra)
        assert isinstance(result, BatchLoss)
        assert len(result.logprobs) == len(result.active) == batch.num_sequences
        result.loss.backward()
        results.append(result)
    grads = [p.grad.clone() for p in model.parameters()]
    return float(sum(result.loss.detach().double() for result in results)), grads, results


def naive(model, config, groups, totals, ref_model):
    """The step's loss from full logits, sequence by sequence, as the papers write it."""

    def token_logprobs(which, s):
        logits = which(input_ids=torch.tensor([s.input_ids])).logits[0]
        return logits.double().log_softmax(-1)[s.answer_start - 1 : -1]

    def of(s):
        table = token_logprobs(model, s)
        return table[range(len(table)), s.input_ids[s.answer_start :]]

    method, beta = config.method, config.beta
    forget, retain = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for group in groups:
        first = group[0]
        if first.role == Role.RETAIN:
            if config.retain_term == "kl":
                with generating(ref_model), torch.no_grad():
                    q = token_logprobs(ref_model, first.sequence)
                p = token_logprobs(model, first.sequence)
                retain = retain + kl_div(p, q, log_target=True, reduction="sum")
            else:
                retain = retain - of(first.sequence).sum()
            continue
        tokens = of(first.sequence)
        s, ratio = tokens.sum(), tokens.sum() - first.ref_logprob
        if len(group) == 2:
            other = of(group[1].sequence)
            if method == "simpo":
                loss = -logsigmoid(beta * (tokens.mean() - other.mean()) - config.gamma)
            else:
                margin = ratio - (other.sum() - group[1].ref_logprob)
                loss = -2 / beta * logsigmoid(beta * margin)
        elif method == "ga":
            loss = s
        elif method == "npo":
            loss = -2 / beta * logsigmoid(-beta * ratio)
        elif method == "simnpo":
            loss = -2 / beta * logsigmoid(-beta * s / len(tokens) - config.gamma)
        elif method == "kto":
            loss = 1 - 2 / beta * torch.sigmoid(BASELINE - beta * ratio)
        elif method == "kto-log":
            loss = 1 - 2 / beta * logsigmoid(BASELINE - beta * ratio)
        elif method == "wga":
            loss = (tokens.detach().exp() ** beta * tokens).sum()
        elif method == "satimp":
            p = tokens.detach().exp()
            loss = (p**beta * (1 - p) ** config.beta2 * tokens).sum()
        forget = forget + loss
    denominator = totals.num_forget_tokens if method in ("ga", "wga", "satimp") else totals.num_forget
    total = config.forget_weight * forget / denominator
    return total + config.retain_weight * retain / max(1, totals.num_retain_tokens)


@pytest.mark.parametrize(("method", "retain_term"), CASES)
def test_loss_and_gradient_equal_full_logits_in_any_micro_batches(method, retain_term, reference):
    config = config_of(method, retain_term)
    check_config(config)
    groups, totals = step_of(method, retain_term)
    ref_model, states = reference
    model = tiny_llama(vocab=VOCAB, dtype=torch.float64)
    with generating(model):
        expected = naive(model, config, groups, totals, ref_model)
        expected_grads = torch.autograd.grad(expected, list(model.parameters()))
    for max_tokens in (10_000, 45, 1):
        loss, grads, results = run(model, config, groups, totals, max_tokens, states)
        assert len(results) == {10_000: 1, 1: len(groups)}.get(max_tokens, len(results))
        assert loss == pytest.approx(float(expected.detach()), rel=2e-5)
        for a, b in zip(grads, expected_grads, strict=True):
            # transformers' rotary embedding and norms are float32 inside
            assert (a - b).norm() <= 2e-5 * b.norm()


@pytest.mark.parametrize(("method", "retain_term"), CASES)
def test_micro_batches_add_up_in_float32(method, retain_term, reference):
    config = config_of(method, retain_term)
    groups, totals = step_of(method, retain_term)
    model = tiny_llama(vocab=VOCAB)
    whole, whole_grads, _ = run(model, config, groups, totals, 10_000, reference[1])
    parts, parts_grads, results = run(model, config, groups, totals, 25, reference[1])
    assert len(results) > 1
    assert parts == pytest.approx(whole, rel=1e-5)
    for a, b in zip(parts_grads, whole_grads, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize("method", ["npo", "altpo", "simpo"])
def test_chunks_inside_the_kernel_keep_pairs_and_references_together(method, monkeypatch):
    """A workspace of one group: the objective is called for some sequences of the batch at a time."""
    config = config_of(method, "nll")
    groups, totals = step_of(method, "nll")
    model = tiny_llama(vocab=VOCAB, dtype=torch.float64)
    whole, whole_grads, _ = run(model, config, groups, totals, 10_000, None)
    calls = []
    objective_of = methods.step_objective

    def counted(*args):
        objective = objective_of(*args)

        def count(logprobs, lengths, index):
            calls.append(len(index))
            return objective(logprobs, lengths, index)

        return count

    monkeypatch.setattr(methods, "step_objective", counted)
    monkeypatch.setattr(methods, "Options", functools.partial(Options, workspace_bytes=8 * VOCAB * 16))
    parts, parts_grads, _ = run(model, config, groups, totals, 10_000, None)
    assert len(calls) > 3
    assert parts == pytest.approx(whole, rel=1e-9)
    for a, b in zip(parts_grads, whole_grads, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()


def test_finetune_is_the_token_mean():
    config = config_of("finetune", forget=None, retain="r", retain_weight=1.0)
    check_config(config)
    model = tiny_llama(vocab=VOCAB)
    retain = sequences_of(4, 3)
    totals = StepTotals(0, 0, sum(s.num_answer_tokens for s in retain))
    loss, _, _ = run(model, config, [[Item(s, Role.RETAIN)] for s in retain], totals, 30, None)
    with generating(model), torch.no_grad():
        sums = [
            torch.nn.functional.cross_entropy(
                model(input_ids=torch.tensor([s.input_ids])).logits[0, s.answer_start - 1 : -1],
                torch.tensor(s.input_ids[s.answer_start :]),
                reduction="sum",
            ).item()
            for s in retain
        ]
    assert loss == pytest.approx(sum(sums) / totals.num_retain_tokens, rel=1e-5)


def test_npo_at_the_reference_is_two_over_beta_log_two():
    """And its gradient is gradient ascent's on the sequences' sums."""
    config = config_of("npo", forget_weight=1.0)
    model = tiny_llama(vocab=VOCAB, dtype=torch.float64)
    sequences = sequences_of(4, 1)
    totals = StepTotals(4, 1, 0)
    plain = collate([Item(s, Role.FORGET) for s in sequences])
    logprobs = batch_loss(hidden_states(model, plain), head_of(model), plain, config, totals).logprobs
    groups = [[Item(s, Role.FORGET, v)] for s, v in zip(sequences, logprobs.tolist(), strict=True)]
    loss, grads, _ = run(model, config, groups, totals, 10_000, None)
    assert loss == pytest.approx(2 / 0.3 * math.log(2), rel=1e-12)
    ascent = config_of("ga", forget_weight=1.0)
    _, ascent_grads, _ = run(model, ascent, groups, StepTotals(4, 4, 0), 10_000, None)  # sums over 4, not over tokens
    for a, b in zip(grads, ascent_grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("method", ["altpo", "simpo"])
def test_partners_are_right_neighbours_and_nobody_else(method):
    """Changing one pair's rejected reference or text moves that pair's term alone: others keep their gradient."""
    config = config_of(method, "nll")
    groups, totals = step_of(method, "nll")
    model = tiny_llama(vocab=VOCAB, dtype=torch.float64)
    whole, _, _ = run(model, config, groups, totals, 10_000, None)
    by_hand = sum(run(model, config, [group], totals, 10_000, None)[0] for group in groups)
    assert whole == pytest.approx(by_hand, rel=1e-9)
    swapped = [groups[1], groups[0], *groups[2:]]
    assert run(model, config, swapped, totals, 10_000, None)[0] == pytest.approx(whole, rel=1e-9)
    crossed = [[groups[0][0], groups[1][1]], [groups[1][0], groups[0][1]], *groups[2:]]
    assert run(model, config, crossed, totals, 10_000, None)[0] != pytest.approx(whole, rel=1e-6)


def test_logprobs_are_reported_per_sequence_in_order(reference):
    groups, totals = step_of("npo", "kl")
    model = tiny_llama(vocab=VOCAB)
    _, _, (kl,) = run(model, config_of("npo", "kl"), groups, totals, 10_000, reference[1])
    assert kl.kl is not None and float(kl.kl) > 0
    assert kl.logprobs[:5].isfinite().all() and kl.logprobs[5:].isnan().all()  # unknown under KL
    plain, plain_totals = step_of("npo", "nll")
    _, _, (nll,) = run(model, config_of("npo", "nll"), plain, plain_totals, 10_000, None)
    torch.testing.assert_close(nll.logprobs[:5], kl.logprobs[:5])
    _, _, (wga,) = run(model, config_of("wga", "nll"), plain, plain_totals, 10_000, None)
    torch.testing.assert_close(wga.logprobs, nll.logprobs, rtol=1e-5, atol=1e-5)
    assert not nll.logprobs.requires_grad and nll.kl is None


def test_kl_wants_the_retain_sequences_last(reference):
    groups, totals = step_of("npo", "kl")
    with pytest.raises(AssertionError, match="retain sequences stand last"):
        run(tiny_llama(vocab=VOCAB), config_of("npo", "kl"), groups[::-1], totals, 10_000, reference[1])


def test_skipping_reports_the_inactive():
    """A forget row far below its reference has no NPO gradient left."""
    config = config_of("npo", skip_below=1e-3)
    a, b = sequences_of(2, 1)
    groups = [[Item(a, Role.FORGET, -1.0)], [Item(b, Role.FORGET, 1e6)]]
    _, _, (result,) = run(tiny_llama(vocab=VOCAB), config, groups, StepTotals(2, 1, 0), 10_000, None)
    assert result.active.tolist() == [True, False]


# ---------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "magic"}, "method: 'magic' is not accepted; finetune, ga, npo"),
        ({"method": "npo", "beta": None}, "beta: missing, and npo needs it"),
        ({"method": "simnpo", "gamma": None}, "gamma: missing, and simnpo needs it"),
        ({"method": "satimp", "beta2": None}, "beta2: missing, and satimp needs it"),
        ({"method": "ga", "beta": 0.1}, "beta: given, but ga has no beta"),
        ({"method": "npo", "gamma": 0.0}, "gamma: given, but npo has no gamma"),
        ({"method": "npo", "beta": 0.0}, "beta: 0.0 is not accepted; a number above 0 is"),
        ({"method": "satimp", "beta2": -1.0}, "beta2: -1.0 is not accepted; a number of 0 or more is"),
        ({"method": "npo", "forget": None}, "forget: missing, and npo needs rows to forget"),
        ({"method": "idkdpo", "alternates": None}, "alternates: missing, and idkdpo needs a file of refusals"),
        ({"method": "kto", "alternates": None}, "alternates: missing, and kto needs a file of refusals"),
        ({"method": "npo", "alternates": "a"}, "alternates: given, but npo does not use them"),
        (
            {"method": "wga", "retain": "r", "retain_term": "kl"},
            "retain_term: kl is not accepted with wga; none and nll are",
        ),
        ({"method": "finetune"}, "finetune: trains on --retain rows alone; give --retain and no --forget"),
        ({"method": "finetune", "retain": "r"}, "finetune: trains on --retain rows alone"),
        (
            {"method": "finetune", "forget": None, "retain": "r", "retain_term": "kl"},
            "retain_term: kl is not accepted with finetune",
        ),
    ],
)
def test_settings_that_do_not_fit_a_method(values, message):
    known = values["method"] if values["method"] in METHODS else "npo"
    config = dataclasses.replace(config_of(known), **values)
    with pytest.raises(ValueError) as caught:
        check_config(config)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_every_method_is_described_and_has_one_loss():
    for name, method in METHODS.items():
        losses = [method.single, method.paired, method.token_weights]
        assert sum(loss is not None for loss in losses) == (name != "finetune")
        assert (method.paired is not None) == (method.pairs is not None)
        assert method.summary
        values = {"forget": None, "retain": "r"} if name == "finetune" else {}
        assert check_config(config_of(name, **values)) is method
