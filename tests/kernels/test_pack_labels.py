"""From Hugging Face shapes to rows: the one place that shifts labels."""

import pytest
import torch

import unlearn_kernels as uk
from unlearn_kernels import reference

STATES = torch.randn(4, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor(
    [
        [-100, -100, 3, 4, -100, -100],
        [-100, -100, -100, -100, -100, -100],
        [7, -100, -100, -100, -100, -100],  # its only label has no hidden state before it
        [-100, 1, -100, 2, 0, 5],
    ]
)


def test_rows_that_predict_labels():
    packed = uk.pack_labels(STATES, LABELS)
    assert packed.kept.tolist() == [0, 3]
    assert packed.cu_seqlens.tolist() == [0, 2, 6]
    assert packed.targets.tolist() == [3, 4, 1, 2, 0, 5]
    expected = [STATES[0, 1], STATES[0, 2], STATES[3, 0], STATES[3, 2], STATES[3, 3], STATES[3, 4]]
    assert torch.equal(packed.hidden, torch.stack(expected))


def test_as_a_causal_language_model_counts_it():
    """Hugging Face: cross entropy of logits[:, :-1] against labels[:, 1:], ignored labels left out."""
    weight = torch.randn(11, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    packed = uk.pack_labels(STATES, LABELS)
    mine = uk.sequence_logprobs(packed.hidden, weight, packed.targets, packed.cu_seqlens)
    logits = reference.logits(STATES.flatten(0, 1), weight).view(4, 6, 11)
    nll = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), LABELS[:, 1:], ignore_index=-100, reduction="none"
    ).sum(1)
    torch.testing.assert_close(mine, -nll[packed.kept])


def test_gradients_reach_only_the_rows_that_predict():
    states = STATES.clone().requires_grad_()
    packed = uk.pack_labels(states, LABELS)
    uk.token_logprobs(packed.hidden, torch.randn(11, 8, dtype=torch.float64), packed.targets).sum().backward()
    reached = states.grad.abs().sum(2) > 0
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[:, :-1] = LABELS[:, 1:] != -100
    assert torch.equal(reached, expected)


def test_all_ignored_is_reported_and_still_connected():
    states = STATES.clone().requires_grad_()
    packed = uk.pack_labels(states, torch.full((4, 6), -100))
    assert packed.hidden.shape == (0, 8) and packed.cu_seqlens.tolist() == [0] and packed.kept.numel() == 0
    (packed.hidden.sum() * 0).backward()
    assert torch.equal(states.grad, torch.zeros_like(states))
    with pytest.raises(ValueError, match="empty batch"):
        uk.token_logprobs(packed.hidden, torch.randn(11, 8, dtype=torch.float64), packed.targets)


@pytest.mark.parametrize(
    ("states", "labels", "message"),
    [
        (STATES[0], LABELS, "hidden_states.shape"),
        (STATES, LABELS[:, 1:], "labels.shape"),
        (STATES, LABELS.int(), "labels.dtype"),
    ],
)
def test_refused(states, labels, message):
    with pytest.raises(ValueError, match=message):
        uk.pack_labels(states, labels)
