"""Packed attention against transformers' own, one sequence at a time, and what it must never allocate."""

from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.families import FAMILIES, VOCAB, WINDOW, family
from tests.tiny import tiny_llama
from unlearn import attention
from unlearn.attention import MAX_PADDING, Segments, packed_attention
from unlearn.data import Item, Role, Sequence, collate
from unlearn.model import hidden_states, prepare
from unlearn.scoring import score

LENGTHS = [(1,), (5,), (1, 1, 1), (6, 6, 6), (3, 40, 1, 18, 2), (20, 2, 21, 22, 23)]


def batch_of(lengths, seed=0):
    """Sequences whose every fed position is an answer position."""
    generator = torch.Generator().manual_seed(seed)
    ids = [tuple(torch.randint(2, VOCAB, (n + 1,), generator=generator).tolist()) for n in lengths]
    return collate([Item(Sequence(str(b), row, 1), Role.FORGET) for b, row in enumerate(ids)])


def backbone_alone(model, batch):
    """[T, H]: transformers' eager attention, each sequence in a call of its own."""
    model.set_attn_implementation("eager")
    parts = batch.input_ids.split(list(batch.lengths))
    return torch.cat([model.base_model(input_ids=part[None], use_cache=False).last_hidden_state[0] for part in parts])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_forward_and_gradients_equal_transformers_own(name, lengths):
    model = family(name, torch.float64)
    batch = batch_of(lengths)
    upstream = torch.randn(sum(lengths), 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = backbone_alone(model, batch)
    expected_grads = torch.autograd.grad((expected * upstream).sum(), list(model.parameters()), allow_unused=True)

    prepare(model)
    found = hidden_states(model, batch)
    found_grads = torch.autograd.grad((found * upstream).sum(), list(model.parameters()), allow_unused=True)
    # eager attention takes its softmax in float32, whatever the model's dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found, expected, **tolerance)
    for parameter, a, b in zip(model.named_parameters(), found_grads, expected_grads, strict=True):
        assert (a is None) == (b is None), parameter[0]
        if a is not None:
            scale = b.abs().max().clamp_min(1e-3)
            torch.testing.assert_close(a / scale, b / scale, **tolerance, msg=lambda m, p=parameter: f"{p[0]}: {m}")


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_a_sequence_alone_or_packed_has_the_same_log_likelihood(name):
    model = prepare(family(name))
    generator = torch.Generator().manual_seed(2)
    lengths = (3, 41, 2, 19, 20, 33, 7)
    sequences = [
        Sequence(str(n), tuple(torch.randint(2, VOCAB, (n + 1,), generator=generator).tolist()), 1) for n in lengths
    ]
    alone = [score(model, [sequence], max_tokens=1)[0] for sequence in sequences]
    for max_tokens in (1, 50, 10_000):
        packed = score(model, sequences, max_tokens=max_tokens)
        assert packed == pytest.approx(alone, abs=1e-4, rel=1e-5)


def test_a_token_sees_nothing_of_the_other_sequences():
    model = tiny_llama(dtype=torch.float64)
    first, other = batch_of((4, 9, 5), seed=3), batch_of((4, 9, 5), seed=4)
    mixed = torch.cat([other.input_ids[:4], first.input_ids[4:13], other.input_ids[13:]])
    here = hidden_states(model, first)[4:13]
    there = hidden_states(model, replace(first, input_ids=mixed))[4:13]
    torch.testing.assert_close(here, there, rtol=1e-12, atol=1e-12)


class LargestProduct(TorchDispatchMode):
    """Refuses any tensor in which two dimensions are `length` or more."""

    def __init__(self, length):
        self.length = length

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, torch.Tensor):
                assert sum(n >= self.length for n in one.shape) < 2, f"{func} made {tuple(one.shape)}"
        return result


@pytest.mark.parametrize(
    ("name", "lengths", "limit"),
    [
        ("llama", (101, 99, 150), 350),
        ("llama", (350,), 350),
        ("gemma3", (101, 99, 150), 150),
        ("mistral", (350,), 350),
        # with a softcap the scores of one sequence are written out, but never those of the pack
        ("gemma2", (101, 99, 150), 151),
    ],
)
def test_no_square_of_the_pack_is_ever_made(name, lengths, limit):
    model = prepare(family(name, torch.float64))
    batch = batch_of(lengths)
    with LargestProduct(limit):
        hidden_states(model, batch).sum().backward()


def test_a_window_needs_memory_for_the_window_alone():
    query = torch.randn(1, 2, 64, 4, dtype=torch.float64)
    with LargestProduct(17):
        packed_attention(
            torch.nn.Module(), query, query, query, None, segments=Segments.plan([64]), sliding_window=8, softcap=3.0
        )


@pytest.mark.parametrize("length", [WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 2 * WINDOW + 1, 5 * WINDOW - 1])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_windows_at_the_edges_of_their_blocks(length, softcap):
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(1, 2, 2 * length, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    found, _ = packed_attention(
        torch.nn.Module(), q, k, v, None, segments=Segments.plan([length] * 2), sliding_window=WINDOW, softcap=softcap
    )
    for part in (slice(0, length), slice(length, 2 * length)):
        scores = q[0, :, part] @ k[0, :, part].transpose(-1, -2) / 2.0
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        for i in range(length):
            seen = slice(max(0, i - WINDOW + 1), i + 1)
            weights = scores[:, i, seen].softmax(-1)
            expected = (weights[:, :, None] * v[0, :, part][:, seen]).sum(1)
            torch.testing.assert_close(found[0, part][i], expected)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=20))
def test_a_plan_holds_every_token_once(lengths):
    plan = Segments.plan(lengths)
    total = sum(lengths)
    taken = [
        bucket.gather.flatten() if bucket.valid is None else bucket.gather.flatten()[bucket.valid]
        for bucket in plan.buckets
    ]
    joined = torch.cat(taken)
    assert sorted(joined.tolist()) == list(range(total))
    order = torch.arange(total) if plan.order is None else plan.order
    assert joined[order].tolist() == list(range(total))  # outputs come back in the order of the pack
    for bucket, tokens in zip(plan.buckets, taken, strict=True):
        assert int(bucket.gather.max()) < total
        assert bucket.gather.numel() <= MAX_PADDING * len(tokens)


def test_equal_lengths_are_not_gathered():
    assert Segments.plan([7, 7, 7]).order is None and Segments.plan([9]).order is None
    assert Segments.plan([7, 8]).order is not None and Segments.plan([8, 7]).order is not None


# ----------------------------------------------------------------------------------------------------- fewer key heads


@pytest.fixture
def kernel_calls(monkeypatch):
    """(key heads, enable_gqa) of every call of scaled_dot_product_attention; fake tensors are not computed with."""
    calls, own = [], attention.F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        assert k.shape == v.shape
        calls.append((k.shape[1], options["enable_gqa"]))
        return q if q.device.type == "cuda" else own(q, k, v, **options)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", spy)
    return calls


def heads_of(dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, 40, 8, generator=generator).to(dtype).requires_grad_() for heads in (6, 2, 2)]


def attended(dtype, repeats, **options):
    """Output and gradients of 6 query heads over 2 key heads, which the caller repeats where `repeats` is 3."""
    query, key, value = leaves = heads_of(dtype)
    key, value = (t.repeat_interleave(repeats, 1) for t in (key, value))
    out, _ = packed_attention(torch.nn.Module(), query, key, value, None, segments=Segments.plan([23, 17]), **options)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return out, torch.autograd.grad(out, leaves, upstream)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 8}, {"softcap": 3.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_are_repeated_only_where_the_kernel_would_lose_by_it(dtype, options, kernel_calls):
    """On a CPU: the same bits forward, gradients no worse than with repeated keys, bf16 ones included."""
    out, grads = attended(dtype, 1, **options)
    if "softcap" not in options:
        assert set(kernel_calls) == ({(2, True)} if dtype == torch.float32 else {(6, False)})
    repeated, theirs = attended(dtype, 3, **options)
    assert torch.equal(out, repeated)
    truth = attended(torch.float64, 3, **options)[1]
    for one, other, true in zip(grads, theirs, truth, strict=True):
        mine, yours = ((found.double() - true).norm() / true.norm() for found in (one, other))
        assert mine <= 1.1 * yours + 1e-7
    with torch.no_grad():
        kernel_calls.clear()
        assert torch.equal(packed_attention(
            torch.nn.Module(), *heads_of(dtype), None, segments=Segments.plan([23, 17]), **options
        )[0], repeated)  # fmt: skip
    assert set(kernel_calls) <= {(2, True)}


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_a_gpu_without_a_kernel_for_fewer_key_heads_gets_them_repeated(flash, masked, kernel_calls, monkeypatch):
    """What flash attention would refuse must not end in plain matrices: fake CUDA tensors show what is asked for."""
    asked = []

    def can_use(params):
        asked.append((params.attn_mask is not None, params.is_causal, params.enable_gqa, params.key.shape[1]))
        return flash

    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", can_use)
    with FakeTensorMode():
        q, k, v = (torch.empty(1, heads, 40, 8, dtype=torch.bfloat16, device="cuda") for heads in (6, 2, 2))
        mask = torch.empty(40, 40, dtype=torch.bool, device="cuda") if masked else None
        attention._attend(q, k, v, mask, scaling=None, dropout=0.0, softcap=None)
        attention._attend(q, q, q, mask, scaling=None, dropout=0.0, softcap=None)
    assert asked == [(masked, not masked, True, 2)]  # of the first call alone
    assert kernel_calls == [(2, True) if flash else (6, False), (6, False)]


def test_refuses_what_it_does_not_compute():
    query = torch.randn(1, 2, 6, 4)
    segments = Segments.plan([6])
    module = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="needs a packed batch"):
        packed_attention(module, query, query, query, None)
    for name in ("s_aux", "position_bias"):
        with pytest.raises(ValueError, match=f"Linear uses {name}"):
            packed_attention(module, query, query, query, None, segments=segments, **{name: torch.zeros(2)})
    with pytest.raises(ValueError, match="Linear got a mask"):
        packed_attention(module, query, query, query, torch.zeros(6, 6), segments=segments)
    with pytest.raises(ValueError, match="dropout 0.1 with a softcap"):
        packed_attention(module, query, query, query, None, segments=segments, softcap=1.0, dropout=0.1)


def test_a_model_called_without_a_plan_is_refused():
    with pytest.raises(ValueError, match="needs a packed batch"):
        tiny_llama()(input_ids=torch.tensor([[3, 4, 5]]))


def test_windows_that_a_model_leaves_to_its_mask_are_refused_where_they_matter():
    """Qwen2-MoE hands its window to the mask alone; packed attention would silently see further."""
    config = transformers.Qwen2MoeConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        shared_expert_intermediate_size=16, num_attention_heads=4, num_key_value_heads=2, num_experts=2,
        num_experts_per_tok=1, use_sliding_window=True, sliding_window=8, max_window_layers=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = prepare(transformers.Qwen2MoeForCausalLM(config))
    hidden_states(model, batch_of((8, 3)))
    with pytest.raises(ValueError, match="masks by sliding_window 8 .* in 9 tokens; sequences of at most 8"):
        hidden_states(model, batch_of((9, 3)))
