"""Optimizers by name: what they are, that bf16 weights move, that they resume bit for bit, and the in-backward mode."""

import contextlib
import sys

import pytest
import torch

from tests.test_optim import bf16_weights, gradients, moved_share, take_steps
from tests.tiny import tiny_llama
from unlearn import optimizers
from unlearn.attention import Segments
from unlearn.config import BY_NEED, OPTIMIZERS, TrainConfig
from unlearn.measures import HOST_STATE_BYTES, STATE_BYTES
from unlearn.optim import AdamWOffload
from unlearn.optimizers import InBackward, gradient_norm, is_available, make_optimizer, set_lr, tensor_norm


def config(**values):
    shared = dict(model="m", output="o", method="npo", lr=1e-3, epochs=1, batch_size=1, seed=3, forget="f")
    return TrainConfig(**{**shared, **values})


@pytest.fixture
def eager():
    """torchao compiles its step once per shape, for seconds each; uncompiled it computes the same."""
    pytest.importorskip("torchao")
    with torch.compiler.set_stance("force_eager"):
        yield


def weights(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.nn.Parameter((torch.randn(shape) * 0.02).to(dtype)) for shape in ((64, 128), (16, 8), (8,))]


def step_all(optimizer, params, seed):
    for index, parameter in enumerate(params):
        parameter.grad = gradients(parameter, 1, seed=seed + index)[0]
    optimizer.step()


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_float32_weights_move_as_torchs_own_optimizer_moves_them(name):
    ours, theirs = weights(), weights()
    mine = make_optimizer(config(optimizer=name, weight_decay=0.1), ours)
    kind = {"adafactor": torch.optim.Adafactor, "adamw": torch.optim.AdamW}[name]
    other = kind(theirs, lr=1e-3, weight_decay=0.1, foreach=False)
    for seed in range(5):
        step_all(mine, ours, seed)
        step_all(other, theirs, seed)
    assert all(torch.allclose(a, b, rtol=1e-6, atol=0) for a, b in zip(ours, theirs, strict=True))


def test_adafactor_moves_bf16_weights_as_far_as_float32_ones():
    """Its steps are lr times a weight's own size: under lr 1e-3 rounding to nearest would drop most of them whole."""
    start = bf16_weights(200_000).detach().view(400, 500)
    low, high = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    lost = torch.nn.Parameter(start.clone())
    sign = gradients(high, 1)[0].sign()
    settings = config(optimizer="adafactor", weight_decay=0.0, lr=1e-3)
    take_steps(make_optimizer(settings, [low]), low, [sign.bfloat16()] * 20)
    take_steps(make_optimizer(settings, [high]), high, [sign] * 20)
    take_steps(torch.optim.Adafactor([lost], lr=1e-3), lost, [sign.bfloat16()] * 20)
    intended = high.detach() - start.float()
    shares = [((w.detach().float() - start.float()) * intended).sum() / (intended**2).sum() for w in (low, lost)]
    assert 0.98 < shares[0] < 1.02 and not 0.9 < shares[1] < 1.1


def test_adamw8bit_moves_bf16_weights_too(eager):
    share = moved_share(
        lambda w: make_optimizer(config(optimizer="adamw8bit", weight_decay=0.0, lr=1e-5), [w]), "cpu", steps=20
    )
    assert 0.97 < share < 1.03


def test_adamw8bit_holds_a_quarter_of_the_states(eager):
    (weight,) = [torch.nn.Parameter(torch.randn(64, 128))]
    optimizer = make_optimizer(config(optimizer="adamw8bit"), [weight])
    step_all(optimizer, [weight], 0)
    state = optimizer.state[weight]["exp_avg"]
    assert state.codes.dtype == torch.uint8 and state.codes.numel() == weight.numel()


def test_bf16_states_halve_and_bf16_weights_move_too():
    (weight,) = weights(torch.bfloat16)[:1]
    optimizer = make_optimizer(config(optimizer="adamw-bf16"), [weight])
    step_all(optimizer, [weight], 0)
    sizes = [optimizer.state[weight][name].nbytes for name in ("exp_avg", "exp_avg_sq")]
    assert sum(sizes) == STATE_BYTES["adamw-bf16"] * weight.numel()
    share = moved_share(
        lambda w: make_optimizer(config(optimizer="adamw-bf16", weight_decay=0.0, lr=1e-5), [w]), "cpu", steps=20
    )
    assert 0.97 < share < 1.03


def test_missing_torchao_takes_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert not is_available("adamw8bit", gpu) and is_available("adamw-offload", gpu)
    assert [name for name in STATE_BYTES if is_available(name, cpu)] == ["adamw", "adamw-bf16", "adafactor"]
    with pytest.raises(ValueError, match="^optimizer: adamw8bit needs torchao .*; install it, or take adamw") as caught:
        make_optimizer(config(optimizer="adamw8bit"), weights())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["adamw", "adamw-bf16", "adafactor", "adamw8bit"])
def test_resume_is_bitwise_equal(name, tmp_path, request):
    if name == "adamw8bit":
        request.getfixturevalue("eager")
    settings = config(optimizer=name)
    params = weights(torch.bfloat16)
    optimizer = make_optimizer(settings, params)
    for seed in range(3):
        step_all(optimizer, params, 10 * seed)
    saved = {"weights": [p.detach().clone() for p in params], "optimizer": optimizer.state_dict()}
    torch.save(saved, tmp_path / "saved.pt")
    torch.rand(7)  # the global generator is nobody's business
    for seed in range(3, 6):
        step_all(optimizer, params, 10 * seed)

    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed = [torch.nn.Parameter(w) for w in saved["weights"]]
    optimizer = make_optimizer(config(optimizer=name, seed=99), resumed)
    optimizer.load_state_dict(saved["optimizer"])
    for seed in range(3, 6):
        step_all(optimizer, resumed, 10 * seed)
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))


def test_the_noise_is_seeded_and_leaves_the_global_generator_alone(eager):
    results = []
    for seed in (3, 3, 4):
        params = weights(torch.bfloat16)
        before = torch.get_rng_state()
        step_all(make_optimizer(config(optimizer="adamw8bit", seed=seed), params), params, 0)
        assert torch.equal(torch.get_rng_state(), before)
        results.append(params[0].detach())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", ["adamw", "adafactor", "adamw8bit"])
def test_the_rate_is_set_in_place(name, request):
    if name == "adamw8bit":
        request.getfixturevalue("eager")
    params = weights()
    optimizer = make_optimizer(config(optimizer=name, weight_decay=0.0), params)
    before = [p.detach().clone() for p in params]
    set_lr(optimizer, 0.0)
    step_all(optimizer, params, 0)
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    set_lr(optimizer, 1e-2)
    step_all(optimizer, params, 0)
    assert not any(torch.equal(a, b) for a, b in zip(params, before, strict=True))


# ------------------------------------------------------------------------------------------------------ in the backward


def hidden_of(model):
    return model.model(torch.arange(3, 23)[None], segments=Segments.plan([20])).last_hidden_state


MAKERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: make_optimizer(config(weight_decay=0.1), params),
    "adamw-offload": lambda params: AdamWOffload(params, lr=1e-3, weight_decay=0.1, seed=3),
    "adafactor": lambda params: make_optimizer(config(optimizer="adafactor"), params),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("tied", [False, True])
def test_steps_in_the_backward_are_the_plain_steps(name, tied):
    """Bit for bit, with weights that several layers use, and no gradient is left."""
    found = []
    for in_backward in (False, True):
        model = tiny_llama(tie_word_embeddings=tied)
        optimizer = MAKERS[name]([p for p in model.parameters() if p.requires_grad])
        norms = []
        with InBackward(optimizer) if in_backward else contextlib.nullcontext() as stepper:
            for _ in range(3):
                (hidden_of(model) @ model.lm_head.weight.T).logsumexp(-1).sum().backward()
                if stepper:
                    norms.append(stepper.pop_gradient_norm())
                    assert all(p.grad is None for p in model.parameters())
                else:
                    norms.append(gradient_norm([tensor_norm(p.grad) for p in model.parameters()]))
                    optimizer.step()
                    optimizer.zero_grad()
        found.append((list(model.parameters()), norms))
    assert found[0][1] == found[1][1] and found[0][1][0] > 0
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))


def test_no_two_gradients_are_alive():
    model, alive = tiny_llama(), []
    optimizer = MAKERS["adamw"](list(model.parameters()))
    step = optimizer.step
    optimizer.step = lambda: (alive.append(sum(p.grad is not None for p in model.parameters())), step())
    with InBackward(optimizer):
        hidden_of(model).square().sum().backward()
    assert alive == [1] * len(list(model.model.parameters()))
    hidden_of(model).square().sum().backward()  # the hooks are gone
    assert model.model.norm.weight.grad is not None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"optimizer": "sgd"},
            "optimizer: 'sgd' is not accepted; adamw, adamw-offload, adamw-bf16, adamw8bit, adafactor, auto are",
        ),
        ({"optimizer_in_backward": True, "max_grad_norm": 1.0}, "not accepted with max_grad_norm 1.0"),
        ({"optimizer_in_backward": True, "on_non_finite": "skip"}, "not accepted with on_non_finite skip"),
    ],
)
def test_combinations_that_cannot_be_are_refused(values, message):
    with pytest.raises(ValueError, match=message) as caught:
        config(**values)
    assert "\n" not in str(caught.value)


def test_every_optimizer_has_a_maker_and_a_size():
    assert set(optimizers._MAKERS) == set(OPTIMIZERS) - {BY_NEED} == set(STATE_BYTES) > set(HOST_STATE_BYTES)


def test_states_on_the_host_are_for_a_gpu():
    with pytest.raises(
        ValueError, match="^optimizer: adamw-offload spares a GPU's memory and the model is on 'cpu'; adam"
    ):
        make_optimizer(config(optimizer="adamw-offload"), weights())
