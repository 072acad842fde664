"""Whatever a caller can get wrong: a ValueError that names the argument, its value and what is accepted; nothing
launched."""

import warnings

import pytest
import torch

import unlearn_kernels as uk
from tests.kernels.cases import make_case
from unlearn_kernels import backends, native

CASE = make_case(6, 8, 20, parts=("bias", "lora"))
HIDDEN, WEIGHT, TARGETS = (tensor.detach() for tensor in CASE.inputs)
CU = torch.tensor([0, 2, 6])


def changed(tensor, index, value):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


TOKENS = [
    ((HIDDEN[0], WEIGHT, TARGETS), {}, r"hidden.shape is \(8,\); accepted: \[N, H\]"),
    ((HIDDEN[None], WEIGHT, TARGETS), {}, r"hidden.shape is \(1, 6, 8\)"),
    (("text", WEIGHT, TARGETS), {}, "hidden is a str"),
    ((HIDDEN[:0], WEIGHT, TARGETS[:0]), {}, "empty batch"),
    ((HIDDEN, WEIGHT[:, 1:], TARGETS), {}, r"weight.shape is \(20, 7\); accepted: \[V, 8\]"),
    ((HIDDEN, WEIGHT[:0], TARGETS), {}, "weight.shape"),
    ((HIDDEN.int(), WEIGHT, TARGETS), {}, "hidden.dtype is torch.int32"),
    ((HIDDEN, WEIGHT.bfloat16(), TARGETS), {}, "weight.dtype is torch.bfloat16; accepted: torch.float32 as hidden"),
    ((HIDDEN.half(), WEIGHT.bfloat16(), TARGETS), {}, "weight.dtype"),
    ((HIDDEN.double(), WEIGHT, TARGETS), {}, "weight.dtype"),
    ((HIDDEN, WEIGHT.to("meta"), TARGETS), {}, "weight.device is meta; accepted: cpu"),
    ((HIDDEN, WEIGHT, TARGETS[:-1]), {}, r"targets.shape is \(5,\); accepted: \[6\]"),
    ((HIDDEN, WEIGHT, TARGETS.int()), {}, "targets.dtype is torch.int32"),
    ((HIDDEN, WEIGHT, TARGETS[:, None]), {}, "targets.shape"),
    ((HIDDEN, WEIGHT, changed(TARGETS, 3, 20)), {}, r"targets\[3\] is 20; accepted: 0 to 19"),
    ((HIDDEN, WEIGHT, changed(TARGETS, 2, -100)), {}, r"targets\[2\] is -100"),
    ((HIDDEN, WEIGHT, TARGETS), {"bias": torch.zeros(19)}, r"bias.shape is \(19,\); accepted: \[20\]"),
    ((HIDDEN, WEIGHT, TARGETS), {"bias": torch.zeros(20).half()}, "bias.dtype"),
    ((HIDDEN, WEIGHT, TARGETS), {"logit_scale": 0.0}, "logit_scale is 0.0"),
    ((HIDDEN, WEIGHT, TARGETS), {"logit_scale": float("nan")}, "logit_scale is nan"),
    ((HIDDEN, WEIGHT, TARGETS), {"softcap": -1.0}, "softcap is -1.0"),
    ((HIDDEN, WEIGHT, TARGETS), {"softcap": 0.0}, "softcap is 0.0"),
    ((HIDDEN, WEIGHT, TARGETS), {"lora": (torch.zeros(2, 8),)}, "lora is a tuple"),
    ((HIDDEN, WEIGHT, TARGETS), {"lora": (torch.zeros(2, 7), torch.zeros(20, 2), 1.0)}, r"lora\[0\].shape"),
    ((HIDDEN, WEIGHT, TARGETS), {"lora": (torch.zeros(2, 8), torch.zeros(20, 3), 1.0)}, r"lora\[1\].shape"),
    ((HIDDEN, WEIGHT, TARGETS), {"lora": (torch.zeros(2, 8), torch.zeros(20, 2), float("inf"))}, r"lora\[2\] is inf"),
    ((HIDDEN, WEIGHT, TARGETS), {"lora": (torch.zeros(2, 8).half(), torch.zeros(20, 2), 1.0)}, r"lora\[0\].dtype"),
    ((HIDDEN, WEIGHT, TARGETS), {"options": uk.Options(workspace_bytes=0)}, "options.workspace_bytes is 0"),
    ((HIDDEN, WEIGHT, TARGETS), {"options": uk.Options(skip_below=1.0)}, "options.skip_below is 1.0"),
    (
        (HIDDEN, WEIGHT, TARGETS),
        {"options": uk.Options(backend="nonesuch")},
        "options.backend is 'nonesuch'; accepted: 'torch', 'native', 'triton' or None",
    ),
]


@pytest.mark.parametrize("function", [uk.token_logprobs, uk.token_stats])
@pytest.mark.parametrize(("arguments", "head", "message"), TOKENS)
def test_tokens(function, arguments, head, message, launched):
    with pytest.raises(ValueError, match=message):
        function(*arguments, **head)
    assert not launched


BOUNDARIES = [
    (torch.tensor([0]), r"cu_seqlens.shape is \(1,\)"),
    (torch.tensor([[0, 6]]), "cu_seqlens.shape"),
    (torch.tensor([0.0, 6.0]), "cu_seqlens.dtype is torch.float32"),
    (torch.tensor([1, 6]), r"cu_seqlens\[0\] is 1; accepted: 0"),
    (torch.tensor([0, 3, 3, 6]), r"cu_seqlens\[1:3\] is \[3, 3\].*strictly rising"),
    (torch.tensor([0, 4, 2, 6]), r"cu_seqlens\[1:3\] is \[4, 2\]"),
    (torch.tensor([0, 5]), r"cu_seqlens\[-1\] is 5; accepted: 6"),
]


@pytest.mark.parametrize(("cu_seqlens", "message"), BOUNDARIES)
def test_boundaries(cu_seqlens, message, launched):
    inputs = (HIDDEN, WEIGHT, TARGETS, cu_seqlens)
    ref = torch.zeros(max(0, cu_seqlens.shape[0] - 1))
    for call in (
        lambda: uk.sequence_logprobs(*inputs),
        lambda: uk.npo_loss(*inputs, ref, beta=0.1),
        lambda: uk.simnpo_loss(*inputs, beta=0.1),
        lambda: uk.sequence_loss(*inputs, lambda logprobs, lengths, index: logprobs),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not launched


INPUTS = (HIDDEN, WEIGHT, TARGETS, CU)
LOSSES = [
    (lambda: uk.npo_loss(*INPUTS, torch.zeros(2), beta=0.0), "beta is 0.0"),
    (lambda: uk.simnpo_loss(*INPUTS, beta=-1.0), "beta is -1.0"),
    (lambda: uk.simnpo_loss(*INPUTS, beta=1.0, gamma=float("nan")), "gamma is nan"),
    (lambda: uk.npo_loss(*INPUTS, torch.zeros(3), beta=0.1), r"ref_logprobs.shape is \(3,\); accepted: \[2\]"),
    (lambda: uk.npo_loss(*INPUTS, torch.zeros(2, dtype=torch.int64), beta=0.1), "ref_logprobs.dtype"),
    (lambda: uk.sequence_loss(*INPUTS, None), "objective is None"),
    (lambda: uk.sequence_loss(*INPUTS, lambda *a: a[0], groups=[1, 2]), r"groups is \[1, 2\]; .*add up to 2"),
    (lambda: uk.sequence_loss(*INPUTS, lambda *a: a[0], groups=[0, 2]), "groups"),
    (lambda: uk.linear_kl(HIDDEN, WEIGHT, HIDDEN[1:], WEIGHT), "ref_hidden.shape"),
    (lambda: uk.linear_kl(HIDDEN, WEIGHT, HIDDEN, WEIGHT[1:]), "ref_weight.shape"),
    (lambda: uk.linear_kl(HIDDEN, WEIGHT, HIDDEN, WEIGHT[:, 1:]), "ref_weight.shape"),
    (lambda: uk.linear_kl(HIDDEN, WEIGHT, HIDDEN.double(), WEIGHT.double()), "ref_hidden.dtype"),
]


@pytest.mark.parametrize(("call", "message"), LOSSES)
def test_losses(call, message, launched):
    with pytest.raises(ValueError, match=message):
        call()
    assert not launched


def test_an_objective_must_return_one_loss_per_sequence():
    with pytest.raises(ValueError, match=r"objective returned \(\); accepted: a Tensor of shape \(2,\)"):
        uk.sequence_loss(*INPUTS, lambda logprobs, lengths, index: logprobs.sum())


@pytest.fixture
def launched(monkeypatch):
    """The names of the steps that ran."""
    from types import SimpleNamespace

    from unlearn_kernels import backends

    names = []

    def recorded(name, step):
        def run(*arguments):
            names.append(name)
            return step(*arguments)

        return run

    from dataclasses import replace

    for backend in ("torch", "native"):
        given = backends.BACKENDS[backend]
        steps = SimpleNamespace(**{name: recorded(name, step) for name, step in vars(given.steps).items()})
        monkeypatch.setitem(backends.BACKENDS, backend, replace(given, steps=steps))
    return names


def test_launched_does_record(launched):
    uk.token_logprobs(HIDDEN, WEIGHT, TARGETS)
    assert launched == ["target_logits", "exp_sums", "redo_rows", "finish_rows"]


# -- the native library
# -------------------------------------------------------------------------------------------------


def test_a_missing_native_library_warns_once_with_the_command(monkeypatch):
    monkeypatch.setattr(native, "find_library", lambda: None)
    native._load.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            uk.token_logprobs(HIDDEN.double(), WEIGHT.double(), TARGETS)
            assert not caught, "float64 never had a native path to miss"
            for _ in range(3):
                value = uk.token_logprobs(HIDDEN, WEIGHT, TARGETS)
        assert len(caught) == 1
        assert "pip install --no-build-isolation -e ." in str(caught[0].message)
    finally:
        native._load.cache_clear()
    truth = uk.token_logprobs(HIDDEN.double(), WEIGHT.double(), TARGETS)
    torch.testing.assert_close(value.double(), truth, rtol=1e-6, atol=1e-5)


def test_a_library_that_does_not_load_warns_with_the_reason(monkeypatch, tmp_path):
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(native, "find_library", lambda: broken)
    native._load.cache_clear()
    try:
        with pytest.warns(UserWarning, match="could not be loaded"):
            uk.token_logprobs(HIDDEN, WEIGHT, TARGETS)
    finally:
        native._load.cache_clear()


def test_a_library_of_an_older_version_warns_and_is_not_used(monkeypatch):
    if not native.load():
        pytest.skip("no native build")
    monkeypatch.setattr(native, "_OPERATORS", (*native._OPERATORS, "an_operator_to_come"))
    native._load.cache_clear()
    try:
        with pytest.warns(UserWarning, match="has no an_operator_to_come: it was built from an older version.*pip"):
            uk.token_logprobs(HIDDEN, WEIGHT, TARGETS)
        assert backends.choose(HIDDEN, WEIGHT, None).name == "torch"
    finally:
        native._load.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:unlearn_kernels runs its torch formulation")
def test_native_and_torch_target_logits_agree(dtype, monkeypatch):
    if not native.load():
        pytest.skip("no native build")
    case = make_case(40, 33, 257, dtype)
    with torch.no_grad():
        mine = uk.token_logprobs(*case.inputs)
        monkeypatch.setattr(native, "load", lambda: False)
        plain = uk.token_logprobs(*case.inputs)
    torch.testing.assert_close(mine, plain, rtol=1e-6, atol=1e-5)
