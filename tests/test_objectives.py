"""Objectives by their limits, bounds and the identities their papers state, not by a second copy of the formula."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn import objectives

EXTREME = torch.tensor([-1e4, -800.0, -40.0, -1.0, 0.0, 1.0, 40.0, 800.0, 1e4], dtype=torch.float64)

nats = st.floats(-500.0, 0.0, allow_nan=False)
betas = st.floats(1e-3, 10.0)


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def gradient(loss, logprob):
    """d loss / d logprob of independent rows, [B]."""
    logprob = logprob.clone().requires_grad_()
    return torch.autograd.grad(loss(logprob).sum(), logprob)[0]


def every_objective(beta=0.7):
    """name -> a function of one [B] vector, the others held fixed, for the checks that all share."""
    ref = torch.linspace(-30.0, -1.0, 9, dtype=torch.float64)
    length = torch.arange(1, 10)
    zero = torch.zeros(9, dtype=torch.float64)
    return {
        "ga": objectives.ga,
        "nll": objectives.nll,
        "npo": lambda s: objectives.npo(s, ref, beta=beta),
        "simnpo": lambda s: objectives.simnpo(s, length, beta=beta, gamma=0.3),
        "dpo_chosen": lambda s: objectives.dpo(s, ref - 2, ref + 1, ref, beta=beta),
        "dpo_rejected": lambda s: objectives.dpo(ref - 2, s, ref, ref + 1, beta=beta),
        "kto_sigmoid": lambda s: objectives.kto_sigmoid(s, ref, vector(0.2)[0], beta=beta),
        "kto_logsigmoid": lambda s: objectives.kto_logsigmoid(s, ref, zero + 0.2, beta=beta),
        "simpo_chosen": lambda s: objectives.simpo(s, ref, length, length + 3, beta=beta, gamma=0.3),
        "simpo_rejected": lambda s: objectives.simpo(ref, s, length, length + 3, beta=beta, gamma=0.3),
    }


@pytest.mark.parametrize("name", every_objective())
@pytest.mark.parametrize("beta", [0.05, 4.0])
def test_extreme_inputs_stay_finite(name, beta):
    loss = every_objective(beta)[name]
    assert loss(EXTREME).shape == EXTREME.shape
    assert loss(EXTREME).dtype == torch.float64
    assert torch.isfinite(loss(EXTREME)).all()
    assert torch.isfinite(gradient(loss, EXTREME)).all()


@pytest.mark.parametrize("name", every_objective())
def test_gradcheck(name):
    logprob = torch.linspace(-20.0, -0.5, 9, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(every_objective()[name], (logprob,))


@pytest.mark.parametrize("name", every_objective())
def test_rows_are_independent(name):
    """No batch statistic inside: a row's loss is the same whatever the other rows hold."""
    loss = every_objective()[name]
    logprob = torch.linspace(-20.0, -0.5, 9, dtype=torch.float64)
    other = logprob.clone()
    other[1:] = -7.0
    assert torch.equal(loss(logprob)[:1], loss(other)[:1])


@pytest.mark.parametrize(
    ("name", "sign"),
    [("ga", 1), ("nll", -1), ("npo", 1), ("simnpo", 1), ("dpo_chosen", -1), ("dpo_rejected", 1)]
    + [("kto_sigmoid", 1), ("kto_logsigmoid", 1), ("simpo_chosen", -1), ("simpo_rejected", 1)],
)
def test_minimising_moves_the_answer_the_right_way(name, sign):
    logprob = torch.linspace(-20.0, -0.5, 9, dtype=torch.float64)
    assert (sign * gradient(every_objective()[name], logprob) > 0).all()


@given(logprob=nats, ref=nats, beta=betas)
@settings(max_examples=100, deadline=None)
def test_npo_gradient_is_the_papers_adaptive_weight(logprob, ref, beta):
    """Zhang et al., section 3: grad NPO = W grad log pi with W = 2 pi^beta / (pi^beta + pi_ref^beta)."""
    weight = gradient(lambda s: objectives.npo(s, vector(ref), beta=beta), vector(logprob)).item()
    ratio = beta * (ref - logprob)
    expected = 0.0 if ratio > 700 else 2.0 / (1.0 + math.exp(ratio))  # exp overflows past 709
    assert math.isclose(weight, expected, rel_tol=1e-12, abs_tol=1e-300)
    assert 0.0 <= weight <= 2.0
    if logprob <= ref:  # along unlearning, NPO never pushes harder than gradient ascent
        assert weight <= 1.0


def test_npo_equals_gradient_ascent_at_the_reference_and_as_beta_vanishes():
    ref = vector(-3.0, -50.0, -700.0)
    assert gradient(lambda s: objectives.npo(s, ref, beta=0.1), ref).tolist() == [1.0, 1.0, 1.0]
    logprob = ref + vector(2.0, -30.0, 100.0)
    errors = []
    for beta in (1e-2, 1e-3, 1e-4):
        difference = gradient(lambda s, b=beta: objectives.npo(s, ref, beta=b), logprob) - gradient(
            objectives.ga, logprob
        )
        errors.append(difference.abs().max().item())
    assert errors[2] < 1e-2
    assert all(later < 0.2 * earlier for earlier, later in zip(errors, errors[1:], strict=False))  # first order in beta


def test_npo_is_bounded_below_where_gradient_ascent_is_not():
    """The point of NPO: the loss flattens at 0 and the gradient with it."""
    logprob, ref = vector(-1e4), vector(-10.0)
    loss = objectives.npo(logprob, ref, beta=0.1)
    assert 0.0 <= loss.item() < 1e-300
    assert gradient(lambda s: objectives.npo(s, ref, beta=0.1), logprob).item() < 1e-300
    assert objectives.ga(logprob).item() == -1e4


def test_npo_value_at_the_reference():
    assert math.isclose(objectives.npo(vector(-5.0), vector(-5.0), beta=0.1).item(), 20 * math.log(2), rel_tol=1e-14)


@given(logprob=nats, length=st.integers(1, 500), beta=betas)
@settings(max_examples=100, deadline=None)
def test_simnpo_gradient_is_the_papers_weight(logprob, length, beta):
    """Fan et al., the weight w' at gamma = 0: 2 pi^(beta/|y|) / (1 + pi^(beta/|y|)) / |y|."""
    weight = gradient(
        lambda s: objectives.simnpo(s, torch.tensor([length]), beta=beta, gamma=0.0), vector(logprob)
    ).item()
    power = math.exp(beta * logprob / length)
    assert math.isclose(weight, 2.0 * power / (1.0 + power) / length, rel_tol=1e-12, abs_tol=1e-300)
    assert 0.0 <= weight <= 1.0 / length


def test_simnpo_margin_is_outside_beta():
    """gamma shifts the argument by itself: equal to a mean log-likelihood that is gamma / beta higher."""
    beta, gamma, length = 4.0, 0.6, torch.tensor([7])
    shifted = objectives.simnpo(vector(-20.0 + 7 * gamma / beta), length, beta=beta, gamma=0.0)
    assert torch.allclose(objectives.simnpo(vector(-20.0), length, beta=beta, gamma=gamma), shifted, rtol=1e-14)


def test_simnpo_of_one_token_is_npo_against_a_certain_reference():
    logprob = vector(-0.1, -5.0, -60.0)
    simnpo = objectives.simnpo(logprob, torch.ones(3), beta=0.8, gamma=0.0)
    assert torch.equal(simnpo, objectives.npo(logprob, torch.zeros(3, dtype=torch.float64), beta=0.8))


def test_dpo_is_npo_where_the_chosen_answer_stays_at_its_reference():
    rejected, ref = vector(-3.0, -40.0, -2.0), vector(-3.5, -20.0, -2.0)
    chosen = vector(-7.0, -0.5, -300.0)
    assert torch.equal(objectives.dpo(chosen, rejected, chosen, ref, beta=0.3), objectives.npo(rejected, ref, beta=0.3))


def test_altpo_ignores_what_both_reference_terms_share():
    """Equal reference terms cancel: only the margin between alternative and original answer is left."""
    chosen, rejected = vector(-12.0, -3.0), vector(-2.0, -9.0)
    at_zero = objectives.dpo(chosen, rejected, vector(0.0, 0.0), vector(0.0, 0.0), beta=0.1)
    at_ref = objectives.dpo(chosen, rejected, vector(-64.0, -8.0), vector(-64.0, -8.0), beta=0.1)
    assert torch.allclose(at_zero, at_ref, rtol=1e-13)
    # log sigmoid(x) - log sigmoid(-x) = x: swapping a pair changes the loss by twice the margin
    swapped = objectives.dpo(rejected, chosen, vector(0.0, 0.0), vector(0.0, 0.0), beta=0.1)
    assert torch.allclose(at_zero - swapped, -2.0 * (chosen - rejected), rtol=1e-13)


def test_dpo_moves_both_answers_by_equal_and_opposite_amounts():
    fixed = vector(-4.0, -30.0)
    up = gradient(lambda s: objectives.dpo(s, fixed, fixed - 1, fixed, beta=0.5), fixed)
    down = gradient(lambda s: objectives.dpo(fixed, s, fixed - 1, fixed, beta=0.5), fixed)
    assert torch.equal(up, -down)


def test_kto_values_at_the_reference():
    """sigmoid(0) = 1/2: 1 - 1/beta and 1 + (2/beta) log 2, from NPO's code."""
    at_ref = vector(-5.0), vector(-5.0), vector(0.0)[0]
    assert math.isclose(objectives.kto_sigmoid(*at_ref, beta=0.1).item(), -9.0, rel_tol=1e-14)
    assert math.isclose(objectives.kto_logsigmoid(*at_ref, beta=0.1).item(), 1 + 20 * math.log(2), rel_tol=1e-14)


def test_kto_logsigmoid_without_baseline_is_npo_plus_one():
    logprob, ref = vector(-3.0, -80.0), vector(-9.0, -10.0)
    kto = objectives.kto_logsigmoid(logprob, ref, vector(0.0)[0], beta=0.2)
    assert torch.allclose(kto, 1 + objectives.npo(logprob, ref, beta=0.2), rtol=1e-14)


def test_kto_baseline_is_not_scaled_by_beta_and_has_no_gradient():
    logprob, ref = vector(-3.0, -80.0), vector(-9.0, -10.0)
    shifted = objectives.kto_sigmoid(logprob - 1.5 / 0.2, ref, vector(0.0)[0], beta=0.2)
    baseline = vector(1.5)[0].requires_grad_()
    loss = objectives.kto_sigmoid(logprob, ref, baseline, beta=0.2)
    assert torch.allclose(loss, shifted, rtol=1e-13)
    assert not loss.requires_grad


def test_kto_sigmoid_is_bounded_and_forgets_both_tails():
    """Unlike NPO, KTO's gradient vanishes on either side of the baseline: at most beta/4 * 2/beta = 1/2."""
    ref = torch.zeros_like(EXTREME)
    loss = objectives.kto_sigmoid(EXTREME, ref, vector(0.0)[0], beta=0.5)
    assert (loss >= 1 - 2 / 0.5).all()
    assert (loss <= 1).all()
    weight = gradient(lambda s: objectives.kto_sigmoid(s, ref, vector(0.0)[0], beta=0.5), EXTREME)
    assert weight.max().item() == 0.5
    assert weight[0] < 1e-100
    assert weight[-1] < 1e-100


def test_simpo_costs_log_2_exactly_at_its_margin():
    """Meng et al.: the target reward margin gamma is where the sigmoid is 1/2; no 2/beta in front."""
    loss = objectives.simpo(vector(-6.0), vector(-30.0), vector(6.0), vector(10.0), beta=2.0, gamma=4.0)
    assert math.isclose(loss.item(), math.log(2), rel_tol=1e-14)


def test_simpo_gradients_are_normalised_by_each_length():
    args = vector(-6.0), vector(-30.0)
    lengths = torch.tensor([6]), torch.tensor([10])
    up = gradient(lambda s: objectives.simpo(s, args[1], *lengths, beta=2.0, gamma=1.0), args[0])
    down = gradient(lambda s: objectives.simpo(args[0], s, *lengths, beta=2.0, gamma=1.0), args[1])
    assert torch.allclose(6 * up, -10 * down, rtol=1e-14)


def test_wga_weights_reach_gradient_ascent_and_full_confidence():
    token_logprob = vector(0.0, -1e-20, -1.0, -50.0, -1e4).requires_grad_()
    weights = objectives.wga_weights(token_logprob, beta=0.5)
    assert not weights.requires_grad
    assert weights[0] == 1.0
    assert weights[-1] == 0.0
    assert math.isclose(weights[3].item(), math.exp(-25.0), rel_tol=1e-14)
    assert torch.equal(objectives.wga_weights(token_logprob, beta=0.0), torch.ones(5, dtype=torch.float64))


def test_satimp_weights_keep_digits_near_certainty():
    token_logprob = vector(0.0, -1e-20, -1e-9, -1.0, -1e4)
    weights = objectives.satimp_weights(token_logprob, beta1=0.0, beta2=0.5)
    assert weights[0] == 0.0
    # 1 - p = x to first order: 1 - exp(-1e-20) computed directly would be 0
    assert math.isclose(weights[1].item(), 1e-10, rel_tol=1e-12)
    assert math.isclose(weights[2].item(), math.sqrt(1e-9 - 5e-19), rel_tol=1e-14)
    assert weights[-1] == 1.0


def test_satimp_combines_both_factors():
    token_logprob = -torch.logspace(-6, 2, 33, dtype=torch.float64)
    product = objectives.wga_weights(token_logprob, beta=5.0) * objectives.satimp_weights(
        token_logprob, beta1=0.0, beta2=1.0
    )
    both = objectives.satimp_weights(token_logprob, beta1=5.0, beta2=1.0)
    assert torch.allclose(both, product, rtol=1e-13)
    peak = token_logprob[both.argmax()].exp()  # p^5 (1 - p) is largest at p = 5/6
    assert abs(peak.item() - 5 / 6) < 0.1
    assert torch.equal(
        objectives.satimp_weights(token_logprob, beta1=5.0, beta2=0.0), objectives.wga_weights(token_logprob, beta=5.0)
    )


def test_token_weights_survive_a_log_probability_rounded_above_zero():
    above = torch.tensor([1e-7], dtype=torch.float32)
    assert objectives.satimp_weights(above, beta1=5.0, beta2=0.5).item() == 0.0
    assert objectives.wga_weights(above, beta=2.0).item() == 1.0


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
def test_beta_must_be_positive(beta):
    one = vector(-1.0)
    for loss in (
        lambda: objectives.npo(one, one, beta=beta),
        lambda: objectives.simnpo(one, one, beta=beta, gamma=0.0),
        lambda: objectives.dpo(one, one, one, one, beta=beta),
        lambda: objectives.kto_sigmoid(one, one, one, beta=beta),
        lambda: objectives.kto_logsigmoid(one, one, one, beta=beta),
        lambda: objectives.simpo(one, one, one, one, beta=beta, gamma=0.0),
    ):
        with pytest.raises(ValueError, match=f"beta must be positive and finite, got {beta}"):
            loss()


def test_other_scalars_are_checked():
    one = vector(-1.0)
    with pytest.raises(ValueError, match="gamma must be finite, got nan"):
        objectives.simnpo(one, one, beta=1.0, gamma=math.nan)
    with pytest.raises(ValueError, match="beta2 must be finite and not negative, got -0.5"):
        objectives.satimp_weights(one, beta1=1.0, beta2=-0.5)
    with pytest.raises(ValueError, match="beta must be finite and not negative"):
        objectives.wga_weights(one, beta=-1.0)


def test_shapes_are_not_broadcast():
    two, column = vector(-1.0, -2.0), vector(-1.0, -2.0)[:, None]
    with pytest.raises(ValueError, match=r"ref_logprob.*\(2, 1\)"):
        objectives.npo(two, column, beta=1.0)
    with pytest.raises(ValueError, match=r"length.*\(1,\)"):
        objectives.simnpo(two, vector(3.0), beta=1.0, gamma=0.0)
    with pytest.raises(ValueError, match="ref_rejected"):
        objectives.dpo(two, two, two, vector(-1.0), beta=1.0)
    with pytest.raises(ValueError, match="baseline"):
        objectives.kto_sigmoid(two, two, vector(0.0), beta=1.0)
    with pytest.raises(ValueError, match="rejected_length"):
        objectives.simpo(two, two, two, vector(1.0), beta=1.0, gamma=0.0)
