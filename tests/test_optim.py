"""AdamWSR: parity with torch where nothing is rounded, unbiased movement where bf16 rounds, bitwise resume."""

import contextlib
import copy

import pytest
import torch

from unlearn.optim import AdamWOffload, AdamWSR, linear_schedule, round_stochastically_

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
def device(request):
    return request.param


def bf16_weights(numel, device="cpu", seed=0):
    values = 0.02 * torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    return torch.nn.Parameter(values.bfloat16().to(device))


def gradients(like, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(like.shape, generator=generator).to(like) for _ in range(steps)]


def take_steps(optimizer, weight, grads):
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parity_with_torch_where_nothing_is_rounded(dtype, device):
    ours = torch.nn.Parameter(torch.randn(7, 11, dtype=dtype, device=device))
    theirs = torch.nn.Parameter(ours.detach().clone())
    options = {"lr": 3e-3, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}
    grads = gradients(ours, 20)
    take_steps(AdamWSR([ours], seed=0, **options), ours, grads)
    take_steps(torch.optim.AdamW([theirs], foreach=False, **options), theirs, grads)
    assert torch.allclose(ours, theirs, rtol=4 * torch.finfo(dtype).eps, atol=0)


def moved_share(make_optimizer, device, steps=50):
    """Distance bf16 weights travelled over the distance float32 weights travel, under a gradient of constant sign."""
    start = bf16_weights(200_000, device)
    low, high = torch.nn.Parameter(start.detach().clone()), torch.nn.Parameter(start.detach().float())
    sign = gradients(high, 1)[0].sign()
    for weight, optimizer in ((low, make_optimizer(low)), (high, torch.optim.AdamW([high], lr=1e-5, weight_decay=0.0))):
        take_steps(optimizer, weight, [sign.to(weight.dtype)] * steps)
    intended = high.detach() - start.detach().float()
    return (((low.detach().float() - start.detach().float()) * intended).sum() / (intended**2).sum()).item()


def test_stochastic_rounding_travels_the_intended_distance(device):
    share = moved_share(lambda w: AdamWSR([w], lr=1e-5, weight_decay=0.0, seed=0), device)
    assert 0.99 < share < 1.01


def test_plain_bf16_adamw_does_not():
    """The reason for this file: to nearest, most steps at lr 1e-5 are dropped whole."""
    assert moved_share(lambda w: torch.optim.AdamW([w], lr=1e-5, weight_decay=0.0), "cpu") < 0.5


def test_bf16_states_still_travel_the_intended_distance(device):
    share = moved_share(lambda w: AdamWSR([w], lr=1e-5, weight_decay=0.0, seed=0, state_dtype=torch.bfloat16), device)
    assert 0.98 < share < 1.02


@pytest.mark.parametrize("value", [1.0 + 2**-9, -1.0 - 2**-9, 3e-39, -1.9999, 1e-30])
def test_rounding_is_unbiased_and_lands_on_the_two_neighbours(value, device):
    source = torch.full((200_000,), value, device=device)
    target = torch.empty_like(source, dtype=torch.bfloat16)
    round_stochastically_(target, source, generator=torch.Generator(device).manual_seed(0))
    neighbours = target.double().unique()
    assert len(neighbours) == 2
    assert neighbours[0] < source[0] < neighbours[1]
    # 5 standard errors of the mean of a Bernoulli variable between the neighbours, at most half their distance
    bound = 5 * 0.5 * (neighbours[1] - neighbours[0]) / 200_000**0.5
    assert (target.double().mean() - source[0].double()).abs() <= bound


def test_rounding_keeps_exact_values_infinities_and_nans(device):
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, 3.3895e38, float("inf"), float("-inf")]).bfloat16().to(device)
    target = torch.empty_like(exact)
    generator = torch.Generator(device).manual_seed(0)
    round_stochastically_(target, exact.float(), generator=generator)
    assert torch.equal(target.view(torch.int16), exact.view(torch.int16))
    # all payloads, CUDA's 0x7fffffff and one that lives in the cut half included
    nans = torch.tensor([0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32).to(device)
    target = torch.empty(4, dtype=torch.bfloat16, device=device)
    round_stochastically_(target, nans, generator=generator)
    assert target.isnan().all()


def test_weight_decay_is_decoupled():
    """With a zero gradient the weight shrinks by 1 - lr * decay per step, whatever the second moment is."""
    weight = torch.nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))
    take_steps(AdamWSR([weight], lr=0.1, weight_decay=0.5, seed=0), weight, [torch.zeros(3, dtype=torch.float64)] * 4)
    assert torch.allclose(weight, torch.full_like(weight, 2.0 * 0.95**4), rtol=1e-14)


def test_slices_and_whole_tensors_agree(monkeypatch):
    results = []
    for slice_numel in (1 << 24, 10):
        monkeypatch.setattr("unlearn.optim._SLICE_NUMEL", slice_numel)
        matrix = torch.nn.Parameter(torch.arange(21.0).view(3, 7).t())  # not contiguous
        scalar = torch.nn.Parameter(torch.tensor(2.0))
        optimizer = AdamWSR([matrix, scalar], lr=0.1, weight_decay=0.1, seed=0)
        for weight in (matrix, scalar):
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        results.append((matrix, scalar))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bitwise_equal(state_dtype, device, tmp_path):
    grads = gradients(bf16_weights(1000, device), 10)
    options = {"lr": 1e-3, "weight_decay": 0.01, "state_dtype": state_dtype}
    whole = bf16_weights(1000, device)
    take_steps(AdamWSR([whole], seed=3, **options), whole, grads)

    first = bf16_weights(1000, device)
    optimizer = AdamWSR([first], seed=3, **options)
    take_steps(optimizer, first, grads[:4])
    torch.save({"weight": first.detach(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    take_steps(optimizer, first, grads[4:])  # goes on, and must not reach into what was saved

    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed = torch.nn.Parameter(saved["weight"])
    optimizer = AdamWSR([resumed], seed=99, **options)
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.state[resumed]["exp_avg"].dtype == state_dtype
    take_steps(optimizer, resumed, grads[4:])
    assert torch.equal(resumed, whole)
    assert torch.equal(first, whole)


def test_loading_copies():
    weight = bf16_weights(10)
    optimizer = AdamWSR([weight], lr=1e-3, weight_decay=0.0, seed=0)
    take_steps(optimizer, weight, gradients(weight, 1))
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved["state"])
    other = bf16_weights(10)
    loaded = AdamWSR([other], lr=1e-3, weight_decay=0.0, seed=0)
    loaded.load_state_dict(saved)
    take_steps(loaded, other, gradients(other, 3))
    assert torch.equal(saved["state"][0]["exp_avg"], before[0]["exp_avg"])


def test_seeds_differ_and_repeat():
    runs = []
    for seed in (0, 0, 1):
        weight = bf16_weights(1000)
        take_steps(AdamWSR([weight], lr=1e-4, weight_decay=0.0, seed=seed), weight, gradients(weight, 3))
        runs.append(weight)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_the_global_random_state_is_not_touched():
    weight = bf16_weights(100)
    before = torch.get_rng_state()
    take_steps(AdamWSR([weight], lr=1e-4, weight_decay=0.0, seed=0), weight, [torch.ones_like(weight)])
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_without_gradient_are_left_alone():
    trained, frozen = bf16_weights(10), bf16_weights(10)
    optimizer = AdamWSR([trained, frozen], lr=1e-2, weight_decay=0.5, seed=0)
    take_steps(optimizer, trained, gradients(trained, 1))
    assert torch.equal(frozen, bf16_weights(10))
    assert not torch.equal(trained, bf16_weights(10))


def test_refusals():
    half = torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))
    with pytest.raises(ValueError, match="float16"):
        AdamWSR([half], lr=1e-3, weight_decay=0.0, seed=0)
    weight = bf16_weights(2)
    with pytest.raises(ValueError, match="lr=-1"):
        AdamWSR([weight], lr=-1.0, weight_decay=0.0, seed=0)
    with pytest.raises(ValueError, match=r"state_dtype must be .* got torch.float16"):
        AdamWSR([weight], lr=1e-3, weight_decay=0.0, seed=0, state_dtype=torch.float16)
    saved = AdamWSR([weight], lr=1e-3, weight_decay=0.0, seed=0).state_dict()
    other = AdamWSR([weight], lr=1e-3, weight_decay=0.0, seed=0, state_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"holds torch.float32 states, this optimizer torch.bfloat16"):
        other.load_state_dict(saved)


# -------------------------------------------------------------------------------------------------- states on the host


def mixed_weights(device="cpu"):
    """Of every accepted dtype; one not contiguous, one a scalar, one that gets no gradient at times."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((7, 3, torch.bfloat16), (5, 9, torch.float32), (11, 1, torch.float64), (3, 3, torch.bfloat16))
    made = [torch.randn(a, b, generator=generator).to(device, dtype) for a, b, dtype in shapes]
    made[1] = made[1].t()
    return [torch.nn.Parameter(w) for w in (*made, torch.tensor(0.5, dtype=torch.bfloat16, device=device))]


def mixed_steps(optimizer, weights, seeds):
    for seed in seeds:
        for index, weight in enumerate(weights):
            weight.grad = None if (index + seed) % 4 == 3 else gradients(weight, 1, seed=10 * seed + index)[0]
        optimizer.step()


@pytest.fixture
def small_slices(monkeypatch):
    monkeypatch.setattr("unlearn.optim._SLICE_NUMEL", 6)


OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "seed": 3}


def test_states_on_the_host_change_no_bit(device, small_slices):
    plain, offloaded = mixed_weights(device), mixed_weights(device)
    mine, theirs = AdamWOffload(offloaded, **OPTIONS), AdamWSR(plain, **OPTIONS)
    for optimizer, weights in ((mine, offloaded), (theirs, plain)):
        mixed_steps(optimizer, weights, range(6))
    assert all(torch.equal(a, b) for a, b in zip(plain, offloaded, strict=True))
    mine.state_dict()
    slabs = {slab.untyped_storage()._cdata for slab in mine._slabs.values()}
    for a, b in zip(plain, offloaded, strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(mine.state[b][name], theirs.state[a][name].cpu())
            assert mine.state[b][name].untyped_storage()._cdata in slabs
    # 8 bytes a weight, 16 for float64; on the device two pairs of slices of 6 float64, the largest
    assert sum(slab.nbytes for slab in mine._slabs.values()) == sum(
        2 * max(4, w.element_size()) * w.numel() for w in plain
    )
    assert mine.staged_bytes == 2 * 2 * 48


class LateStream:
    """A stream that copies nothing before somebody waits for it: what is not waited for is not there."""

    def __init__(self):
        self.waiting = []

    def wait_stream(self, other):
        pass

    def record_event(self):
        return len(self.waiting), self

    def synchronize(self):
        self.run(len(self.waiting))

    def run(self, until):
        for target, source in self.waiting[:until]:
            if target is not None:
                OWN_COPY(target, source)
        self.waiting[:until] = [(None, None)] * min(until, len(self.waiting))


OWN_COPY = torch.Tensor.copy_


def test_copies_are_waited_for_however_late_they_are(small_slices, monkeypatch):
    plain, offloaded = mixed_weights(), mixed_weights()
    mine, theirs = AdamWOffload(offloaded, **OPTIONS), AdamWSR(plain, **OPTIONS)
    late = mine._stream = LateStream()

    def copy(target, source, non_blocking=False):
        return late.waiting.append((target, source)) if non_blocking else OWN_COPY(target, source)

    class Current:
        def wait_event(self, event):
            event[1].run(event[0])

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Current())
    for optimizer, weights in ((mine, offloaded), (theirs, plain)):
        mixed_steps(optimizer, weights, range(5))
    assert all(torch.equal(a, b) for a, b in zip(plain, offloaded, strict=True))
    saved, expected = mine.state_dict()["state"], theirs.state_dict()["state"]
    assert all(torch.equal(saved[i][name], expected[i][name]) for i in expected for name in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize(("first", "then"), [(AdamWOffload, AdamWOffload), (AdamWSR, AdamWOffload),
                                             (AdamWOffload, AdamWSR)])  # fmt: skip
def test_states_on_the_host_resume_bit_for_bit(first, then, device, tmp_path, small_slices):
    """From one another's too; the file holds each state once."""
    whole, resumed = mixed_weights(device), mixed_weights(device)
    mixed_steps(AdamWSR(whole, **OPTIONS), whole, range(6))
    before = first(resumed, **OPTIONS)
    mixed_steps(before, resumed, range(3))
    torch.save(before.state_dict(), tmp_path / "optimizer.pt")
    after = then(resumed, **(OPTIONS | {"seed": 99}))
    kept = [weight.detach().clone() for weight in resumed]
    mixed_steps(after, resumed, [7])  # what it holds before the loading is gone after it
    for weight, value in zip(resumed, kept, strict=True):
        weight.data.copy_(value)
    after.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True, map_location="cpu"))
    mixed_steps(after, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    for weight in resumed:
        assert after.state[weight]["exp_avg"].device.type == ("cpu" if then is AdamWOffload else device)


def test_memory_that_the_host_does_not_have_takes_one_line(monkeypatch):
    monkeypatch.setattr("unlearn.offload.torch.empty", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no")))
    message = "^optimizer: adamw-offload: .* GiB of host memory could not be had; adamw8bit or adafactor would"
    with pytest.raises(ValueError, match=message):
        AdamWOffload([bf16_weights(10)], **OPTIONS)


def test_linear_schedule():
    assert [linear_schedule(step, 10, 4) for step in (0, 1, 4, 7, 10, 12)] == [0.0, 0.25, 1.0, 0.5, 0.0, 0.0]
    assert [linear_schedule(step, 4, 0) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert linear_schedule(3, 3, 3) == 0.0


@pytest.mark.parametrize("arguments", [(-1, 10, 2), (0, 0, 0), (0, 10, 11), (0, 10, -1)])
def test_linear_schedule_refuses(arguments):
    with pytest.raises(ValueError, match=f"total_steps={arguments[1]}"):
        linear_schedule(*arguments)
