"""Which plan serves a head: measured once, remembered in the process and on disk, never a reason to fail."""

import json
import pathlib

import pytest
import torch

pytest.importorskip("triton")
from unlearn_kernels import triton_tuning as tuning  # noqa: E402
from unlearn_kernels.triton_tuning import LIBRARY, Config  # noqa: E402

FAST, SLOW = Config(128, 128, 64, 8, 3), Config(64, 128, 32, 8, 2)


def test_the_fastest_plan_wins():
    assert tuning.fastest((SLOW, FAST, LIBRARY), {SLOW: 3.0, FAST: 1.0, LIBRARY: 2.0}.__getitem__) == FAST
    assert tuning.fastest((SLOW, FAST, LIBRARY), {SLOW: 3.0, FAST: 2.0, LIBRARY: 1.0}.__getitem__) == LIBRARY


def test_the_first_of_equals_wins():
    assert tuning.fastest((SLOW, FAST, LIBRARY), lambda plan: 1.0) == SLOW


def test_a_plan_the_device_refuses_is_left_out():
    def seconds(plan):
        if plan == FAST:
            raise MemoryError("out of shared memory")
        return 1.0 if plan == LIBRARY else 2.0

    assert tuning.fastest((FAST, SLOW, LIBRARY), seconds) == LIBRARY


def test_all_plans_refused_is_an_error_with_the_first_reason():
    def refuse(plan):
        raise MemoryError(f"{tuning.plan_name(plan)} does not fit")

    with pytest.raises(RuntimeError, match="no plan of .*library runs on this device") as caught:
        tuning.fastest((FAST, LIBRARY), refuse)
    assert str(caught.value.__cause__) == f"{FAST.name} does not fit"


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A device that looks like an H100, an empty cache, and clocks that answer by plan. Returns what was timed."""
    timed = []

    def time_on_device(run):
        before = len(timed)
        run()
        assert len(timed) == before + 1, "what is timed must do the work"
        return {LIBRARY: 2.0}.get(timed[-1], 1.0 if timed[-1] == tuning._16_BIT["sm_90"][1] else 3.0)

    monkeypatch.setattr(tuning, "family", lambda device: "sm_90")
    monkeypatch.setattr(tuning, "_memory", {})
    monkeypatch.setattr(tuning, "time_on_device", time_on_device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("UNLEARN_KERNELS_CACHE", str(tmp_path / "plans"))
    monkeypatch.delenv("UNLEARN_KERNELS_AUTOTUNE", raising=False)
    return timed


def chosen(timed, num_rows=tuning.MIN_ROWS, dtype=torch.bfloat16, width=8, **kind):
    hidden, weight = torch.empty(num_rows, width, dtype=dtype), torch.empty(20, width, dtype=dtype)
    return tuning.choose(hidden, weight, timed.append, **kind)


def new_process(monkeypatch):
    monkeypatch.setattr(tuning, "_memory", {})


def test_measured_once_and_read_again_by_the_next_process(gpu, monkeypatch):
    plans = tuning._16_BIT["sm_90"]
    assert chosen(gpu) == plans[1] and gpu == list(plans)
    assert chosen(gpu) == chosen(gpu, num_rows=1) == plans[1] and len(gpu) == len(plans)
    new_process(monkeypatch)
    assert chosen(gpu, num_rows=1) == plans[1] and len(gpu) == len(plans)
    (key,) = json.loads(tuning.cache_file().read_text())
    assert "NVIDIA H100" in key and "H 8 V 20 bfloat16/bfloat16" in key


def test_other_kernels_are_measured_anew(gpu, monkeypatch):
    chosen(gpu)
    count = len(gpu)
    new_process(monkeypatch)
    monkeypatch.setattr(tuning, "_source_digest", lambda: "other kernels")
    chosen(gpu)
    assert len(gpu) == 2 * count and len(json.loads(tuning.cache_file().read_text())) == 2


def test_the_digest_is_the_kernels(monkeypatch):
    read = pathlib.Path.read_bytes
    before = tuning._source_digest.__wrapped__()
    monkeypatch.setattr(pathlib.Path, "read_bytes", lambda path: read(path) + b" ")
    assert tuning._source_digest.__wrapped__() != before == tuning._source_digest()


def test_what_another_process_has_measured_since_stays(gpu):
    chosen(gpu)
    (key,) = json.loads(tuning.cache_file().read_text())
    tuning.cache_file().write_text(json.dumps({key: LIBRARY, "another head": FAST.name}))
    chosen(gpu, width=16)
    stored = json.loads(tuning.cache_file().read_text())
    assert len(stored) == 3 and stored[key] == LIBRARY and stored["another head"] == FAST.name
    assert chosen(gpu) == tuning._16_BIT["sm_90"][1], "this process goes on as it measured"


def test_steps_that_write_e_are_measured_apart(monkeypatch):
    backend = pytest.importorskip("unlearn_kernels.triton_backend")
    asked = []

    def choose(hidden, weight, run, *, writes_e, **traits):
        asked.append(writes_e)
        raise StopIteration

    monkeypatch.setattr(tuning, "choose", choose)
    hidden, weight, row = torch.zeros(3, 8), torch.zeros(20, 8), torch.zeros(3)
    for e in (None, torch.zeros(3, 20)):
        with pytest.raises(StopIteration):
            backend.exp_sums(hidden, weight, row.long(), None, None, None, 1.0, 0.0, row, row, e, row)
    assert asked == [False, True]


def test_every_kind_of_head_has_a_measurement_of_its_own(gpu):
    kinds = ({}, {"lora": True}, {"capped": True}, {"width": 16}, {"dtype": torch.float16}, {"writes_e": True})
    for kind in kinds:
        before = len(gpu)
        chosen(gpu, **kind)
        assert len(gpu) > before, kind
    assert len(json.loads(tuning.cache_file().read_text())) == 6


def test_nothing_is_measured_with_few_rows_under_capture_or_when_told_not_to(gpu, monkeypatch):
    first = tuning._16_BIT["sm_90"][0]
    assert chosen(gpu, num_rows=tuning.MIN_ROWS - 1) == first
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert chosen(gpu) == first
    monkeypatch.setenv("UNLEARN_KERNELS_AUTOTUNE", "0")
    assert chosen(gpu) == first
    assert not gpu and not tuning.cache_file().exists()


def test_a_single_candidate_is_not_measured(gpu, monkeypatch):
    monkeypatch.setattr(tuning, "family", lambda device: "interpret")
    assert chosen(gpu) == tuning._16_BIT["interpret"][0] and not gpu


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '"text"', "null", '{"a": 1}', "\x00\xff"])
def test_a_broken_cache_is_measured_anew_and_written_anew(gpu, content):
    tuning.cache_file().parent.mkdir(parents=True)
    tuning.cache_file().write_bytes(content.encode("latin-1"))
    assert chosen(gpu) == tuning._16_BIT["sm_90"][1]
    assert set(json.loads(tuning.cache_file().read_text()).values()) == {tuning._16_BIT["sm_90"][1].name}


def test_a_plan_that_is_no_longer_shipped_is_measured_anew(gpu, monkeypatch):
    chosen(gpu)
    (key,) = json.loads(tuning.cache_file().read_text())
    tuning.cache_file().write_text(json.dumps({key: "999x999x9-w8-s3-v2-g16", "other": LIBRARY}))
    new_process(monkeypatch)
    gpu.clear()
    assert chosen(gpu) == tuning._16_BIT["sm_90"][1] and gpu
    assert json.loads(tuning.cache_file().read_text())["other"] == LIBRARY


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_file(gpu, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("UNLEARN_KERNELS_CACHE", str(tmp_path / "file"))
    assert chosen(gpu) == tuning._16_BIT["sm_90"][1]
    count = len(gpu)
    assert chosen(gpu) == tuning._16_BIT["sm_90"][1] and len(gpu) == count


def test_where_the_cache_lies(monkeypatch):
    monkeypatch.delenv("UNLEARN_KERNELS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert str(tuning.cache_file()) == "/caches/unlearn_kernels/plans.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(tuning.cache_file()) == "/home/someone/.cache/unlearn_kernels/plans.json"


def test_forced_plans(gpu):
    plans = tuning._16_BIT["sm_90"]
    with tuning.force("library"):
        assert chosen(gpu) == LIBRARY
        with tuning.force("fused"):
            assert chosen(gpu) == plans[0]
        with tuning.force(plans[2].name):
            assert chosen(gpu) == plans[2]
        assert chosen(gpu) == LIBRARY
    with tuning.force("nonesuch"), pytest.raises(ValueError, match="plan is 'nonesuch'; accepted: fused, 128x256x64"):
        chosen(gpu)
    assert not gpu
    assert chosen(gpu) == plans[1], "what was forced is forgotten"


def test_fused_is_a_fused_plan_where_the_library_comes_first(gpu, monkeypatch):
    with tuning.force("fused"):
        assert isinstance(chosen(gpu, dtype=torch.float32), Config)


def test_every_table_has_safe_and_interpreted_entries_and_names_are_unique():
    for table in (tuning.LORA_CONFIGS, tuning.PLAIN_CONFIGS, tuning.KL_CONFIGS, tuning._16_BIT, tuning._32_BIT):
        assert {"safe", "interpret"} <= set(table)
    assert set(tuning._CAPPED) == set(tuning._16_BIT) - {"interpret"}
    for plans in (*tuning._16_BIT.values(), *tuning._32_BIT.values(), *tuning._CAPPED.values()):
        names = [tuning.plan_name(plan) for plan in plans]
        assert len(set(names)) == len(names)
        assert {"plan"} <= set(tuning.describe(plans[0]))


@pytest.mark.parametrize(
    ("kind", "largest"),
    [({}, 256 * 128), ({"lora": True}, 128 * 128), ({"capped": True}, 128 * 128), ({"aligned": False}, 64 * 64)],
)
def test_heavy_epilogues_take_no_large_tile(gpu, kind, largest):
    plans = tuning.candidates(torch.device("cpu"), torch.bfloat16, torch.bfloat16, **kind)
    assert LIBRARY in plans
    assert max(plan.block_t * plan.block_v for plan in plans if isinstance(plan, Config)) <= largest
