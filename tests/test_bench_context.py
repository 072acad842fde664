"""The parts about long contexts (bench/gpu.sh train-a to train-d) on a CPU at shapes of a few tokens."""

import dataclasses
import sys
import weakref

import pytest
import torch

from bench import context_tables, gpu_attention, gpu_context, gpu_summary, models, readme, steps
from bench.gpu_attention import Flex, Inputs, Provider, ours, truth_of
from bench.gpu_context import Bench
from bench.rows import RowFile, read
from bench.timing import Budget
from unlearn.measures import GIB
from unlearn.model import check_head

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--backend", "torch", "--tiny"]
SHARED = ("commit", "source", "dirty", "device", "torch", "triton", "transformers")


def run_part(folder, *arguments, module=gpu_context):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bench", *arguments[:1], *TINY, "--out", str(folder), *arguments[1:]])
        return module.main()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for part in ("train-b", "train-c", "train-d"):
        assert run_part(folder, part) == 0
    return folder


def rows_of(folder, part, case):
    return [row for row in read(f"gpu_{part}", folder) if row["case"] == case]


def test_a_row_has_every_part_of_the_plan_and_what_there_was(folder):
    rows = rows_of(folder, "train-b", "depth")
    assert [(row["model"], row["layers"], row["context"]) for row in rows] == [
        (model, layers, context) for context in (48, 96) for model in ("8b", "7b") for layers in (1, 2)
    ]
    for row in rows:
        planned = row["planned"]["parts_bytes"]
        assert row["weights_bytes"] == planned["weights"] and row["gradient_bytes"] == planned["gradients"]
        assert row["optimizer_bytes"] == planned["optimizer"] and row["host_bytes"] == row["planned"]["host_bytes"] > 0
        assert row["delta_nats"] == 0.0  # policy and reference are the same weights and the same code path
        assert row["grad_norm"] > 1
        phases = [row[f"{name}_seconds"] for name in ("forward", "backward", "update")]
        assert sum(phases) == pytest.approx(row["seconds"])


def test_all_layers_are_on_the_line_through_two_depths(folder):
    shallow, deep = rows_of(folder, "train-b", "depth")[:2]
    extended = rows_of(folder, "train-b", "extended")[0]
    assert extended["layers"] == 4 and extended["from_layers"] == [1, 2]
    whole = models.TINY["8b"]
    assert extended["weights_bytes"] == 4 * whole.params
    line = shallow["seconds"] + 3 * (deep["seconds"] - shallow["seconds"])
    assert extended["seconds"] == pytest.approx(line)
    assert extended["planned"]["parts_bytes"]["weights"] == 4 * whole.params


def test_whole_models_forget_and_keep(folder):
    rows = rows_of(folder, "train-c", "full")
    assert [(row["model"], row["documents"]) for row in rows] == [
        (model, [n, n]) for model in ("8b", "7b") for n in (32, 64)
    ]
    for row in rows:
        assert row["measures"] == {"tile_tokens": 16, "offload_checkpoints": "4", "optimizer": "adamw"}
        shape = models.TINY[row["model"]]
        assert row["model_tflops"] * row["seconds"] * 1e12 == pytest.approx(models.model_flop(shape, row["documents"]))
        assert row["mfu"] is None and row["reserved_mib"] is None  # a CPU has neither


def test_every_rung_takes_the_plain_loop_s_step(folder):
    rows = rows_of(folder, "train-d", "rung")
    assert [row["layers"] for row in rows] == [4] * 8 + [1] * 8
    for first in rows[::8]:
        assert first["rung"] == "plain loop, full logits" and "grad_norm_relative" not in first
    for row in rows:
        assert row.get("grad_norm_relative", 0.0) < 1e-5
    last = rows[7]
    assert last["gradient_bytes"] == 0 and last["optimizer_bytes"] < rows[0]["optimizer_bytes"] / 10
    assert rows[4]["host_bytes"] > 0 == rows[3]["host_bytes"]


def test_a_rung_of_another_gradient_is_refused(tmp_path, monkeypatch):
    forward = steps.Ours.forward

    def twice(self, items, documents):
        loss, delta = forward(self, items, documents)
        return 2 * loss, delta

    monkeypatch.setattr(steps.Ours, "forward", twice)
    monkeypatch.setattr(gpu_context, "rungs", lambda *a: list(rungs(*a))[:2])
    assert run_part(tmp_path, "train-d") == 1
    plain, doubled = rows_of(tmp_path, "train-d", "rung")[:2]
    assert "refused" not in plain and doubled["refused"] and doubled["grad_norm_relative"] == pytest.approx(1.0)
    assert "refused" in gpu_summary.summary(tmp_path, ["train-d"])


rungs = gpu_context.rungs


GPU_FULL = (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 40 GiB.\nmore lines")
HOST_FULL = (RuntimeError, "DefaultCPUAllocator: can't allocate memory")


def out_of_memory(calls, allowed, error=GPU_FULL):
    """Ours.step that is out of memory from call number `allowed` on, until it was once."""
    step = steps.Ours.step

    def limited(self, optimizer, *arguments):
        calls.append(type(self).__name__)
        if len(calls) == allowed:
            optimizer.state[optimizer.param_groups[0]["params"][0]] = {"step": 1}  # half made
            raise error[0](error[1])
        return step(self, optimizer, *arguments)

    return limited


def test_a_case_out_of_memory_is_a_row_and_the_next_one_runs(tmp_path, monkeypatch):
    """The plain loop's is what the part shows, ours is a failure where the plan saw it fit."""
    for allowed, name, status, error in (
        (1, "plain loop, full logits", 0, GPU_FULL),
        (4, "+ this project's loss and packing", 1, HOST_FULL),
    ):
        monkeypatch.setattr(steps.Ours, "step", out_of_memory([], allowed, error))
        monkeypatch.setattr(gpu_context, "rungs", lambda *a: list(rungs(*a))[:3])
        assert run_part(tmp_path, "train-d") == status
        monkeypatch.undo()
        rows = rows_of(tmp_path, "train-d", "rung")
        (lost,) = [row for row in rows if "failed" in row]
        assert lost["rung"] == name and lost["out_of_memory"] and len(rows) == 6
        assert lost["failed"] == f"{error[0].__name__}: {error[1].splitlines()[0]}"
        assert read("gpu_train-d", tmp_path)[-1]["failed"] == status
        assert "out of memory" in gpu_summary.summary(tmp_path, ["train-d"])


@pytest.mark.parametrize("part", ["train-b", "train-c", "train-d"])
def test_one_model_at_a_time_is_alive(tmp_path, monkeypatch, part):
    earlier = []

    def watched(shape, device):
        assert all(model() is None for model in earlier)
        model = models.random_model(shape, device)
        earlier.append(weakref.ref(model))
        return model

    monkeypatch.setattr(gpu_context, "random_model", watched)
    monkeypatch.setattr(gpu_context, "rungs", lambda *a: list(rungs(*a))[:3])
    monkeypatch.setattr(steps.Ours, "step", out_of_memory([], 2))  # what failed lets go too
    run_part(tmp_path, part)
    assert len(earlier) == {"train-b": 8, "train-c": 2, "train-d": 2}[part]
    assert read(f"gpu_{part}", tmp_path)[-2]["case"] != "error"


def test_a_plan_that_does_not_run_is_followed_by_a_leaner_one(tmp_path, monkeypatch):
    monkeypatch.setattr(steps.Ours, "step", out_of_memory([], 2))
    assert run_part(tmp_path, "train-c") == 1
    lost, lean, *_ = rows_of(tmp_path, "train-c", "full")
    assert lost["out_of_memory"] and lost["measures"]["optimizer"] == "adamw"
    assert lean["measures"]["optimizer"] == "adafactor" and lean["seconds"] > 0
    assert lean["documents"] == lost["documents"] == [32, 32]


@pytest.mark.parametrize("part", ["train-a", "train-b", "train-c", "train-d"])
def test_what_the_time_does_not_reach_is_left_out_by_name(tmp_path, part):
    module, arguments = (gpu_attention, ()) if part == "train-a" else (gpu_context, (part,))
    assert run_part(tmp_path, *arguments, "--seconds=-1e6", module=module) == 0
    left, end = rows_of(tmp_path, part, "left_out"), read(f"gpu_{part}", tmp_path)[-1]
    assert left and end["case"] == "end" and end["left_out"] == len(left)
    assert all(row["model"] in ("8b", "7b") and row["context"] for row in left)
    assert f"8b {'' if part == 'train-a' else left[0]['layers']}" in gpu_summary.summary(tmp_path, [part])


def bench_of(tmp_path, gpu_gib, seconds):
    class FakePart:
        tiny, backend, device = False, None, CPU
        budget = Budget(seconds)
        rows = RowFile(tmp_path, "rows", {})

        def leave_out(self, what, reason="the time was spent"):
            self.rows.write({"case": "left_out", **what, "reason": reason})

    bench = Bench(FakePart())
    bench.budget = dataclasses.replace(bench.budget, gpu=gpu_gib * GIB, host=100 * GIB)
    bench.itemsize = 2
    return bench


def test_a_case_that_would_not_end_in_time_is_not_begun(tmp_path):
    bench = bench_of(tmp_path, 139, seconds=100)
    shape = models.MODELS["8b"]
    short, long = (next(gpu_context.candidates(bench, shape, n)) for n in (32768, 131072))
    assert bench.room_for({"context": 32768}, short) and not bench.room_for({"context": 131072}, long)
    (row,) = rows_of_file(tmp_path)
    assert row["context"] == 131072 and "it would take about" in row["reason"]


def rows_of_file(folder):
    return read("rows", folder)


@pytest.mark.parametrize(("gib", "optimizers"), [(139, ["adamw", "adamw", "adafactor"]), (79, ["adafactor"] * 2)])
def test_settings_follow_the_plan_and_then_leaner_ones(tmp_path, gib, optimizers):
    bench = bench_of(tmp_path, gib, 100)
    found = list(gpu_context.candidates(bench, models.MODELS["8b"], 131072))
    assert found[0].fits and found[0].on.tiled
    configs = [bench.config(plan.on) for plan in found]
    assert [config.optimizer for config in configs] == optimizers
    assert all(config.tile_tokens == 4096 and not config.gradient_checkpointing for config in configs)
    assert configs[0].offload_checkpoints == (str(found[0].on.host_layers))
    assert {config.offload_checkpoints for config in configs[1:]} == {"32"}
    assert [plan.on.optimizer for plan in found] == optimizers


@pytest.mark.parametrize("liger", [False, True])
def test_rungs_that_need_a_gpu_are_its_alone(tmp_path, monkeypatch, liger):
    """liger-kernel's layers where it is installed; AdamW's states on the host where the plan sees them fit there."""
    monkeypatch.setattr(gpu_context.importlib.util, "find_spec", lambda name: object() if liger else None)
    bench, shape = bench_of(tmp_path, 139, 100), models.MODELS["8b"]
    plain = [rung.name for rung in rungs(bench, shape, "adamw")]
    bench.device = torch.device("cuda")
    found = [rung for rung in rungs(bench, shape, "adamw") if rung.name not in plain]
    configs = [bench.config(rung.on, liger_kernels=rung.liger) for rung in found]
    assert [config.liger_kernels for config in configs] == [True] * liger + [False]
    assert configs[0].gradient_checkpointing == liger and configs[-1].optimizer == "adamw-offload"
    bench.budget = dataclasses.replace(bench.budget, host=50 * GIB)  # the states alone are 60
    assert [rung.liger for rung in rungs(bench, shape, "adamw") if rung.name not in plain] == [True] * liger


def test_model_flop_of_the_published_shapes():
    """6 P N and three causal forwards: P = 7.505e9 (8B) and 6.607e9 (7B) weights in products."""
    for name, products in (("8b", 7.505e9), ("7b", 6.607e9)):
        for n in (32768, 131072):
            by_hand = 6 * products * n + 3 * 2 * n**2 * 4096 * 32
            assert models.model_flop(models.MODELS[name], [n]) == pytest.approx(by_hand, rel=1e-3)
    halves, whole = (models.model_flop(models.MODELS["8b"], lengths) for lengths in ([65536] * 2, [131072]))
    assert halves < whole


@pytest.mark.parametrize("name", ["8b", "7b"])
def test_a_random_model_computes_what_transformers_would(name):
    model = models.random_model(models.TINY[name], CPU)
    check_head(model)  # packed against transformers' own attention, which reads the rotation's table
    rotary = model.model.rotary_emb
    torch.testing.assert_close(rotary.inv_freq, 1.0 / 10000.0 ** (torch.arange(0, 8, 2) / 8))
    weights = torch.cat([w.flatten() for w in model.parameters() if w.dim() > 1])
    assert weights.std().item() == pytest.approx(0.02, rel=0.05) and all(
        (w == 1).all() for w in model.model.norm.parameters()
    )
    assert sum(w.numel() for w in model.parameters()) == models.TINY[name].params


def naive(inputs):
    """float64 attention with a mask of all pairs."""
    q, k, v = (tensor.transpose(0, 1) for tensor in inputs.leaves)
    repeats = len(q) // len(k)
    k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
    document = torch.arange(len(inputs.lengths)).repeat_interleave(torch.tensor(inputs.lengths))
    place = torch.arange(len(document))
    seen = (place[:, None] >= place) & (document[:, None] == document)
    scores = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1)


@pytest.mark.parametrize("lengths", [[70], [5, 40, 33]])
def test_the_truth_is_autograd_s_in_float64(lengths):
    inputs = Inputs.make(models.TINY["8b"], lengths, CPU)
    leaves = [tensor.detach().double().requires_grad_() for tensor in inputs.leaves]
    doubled = dataclasses.replace(inputs, query=leaves[0], key=leaves[1], value=leaves[2])
    out = naive(doubled)
    grads = torch.autograd.grad(out, leaves, inputs.upstream.double())
    for sequence in (0, len(lengths) - 1):
        truth = truth_of(inputs, sequence)
        assert truth.rows.stop == sum(lengths[: sequence + 1])
        for want, found in zip((out, *grads), truth.tensors, strict=True):
            torch.testing.assert_close(found, want[truth.rows], rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attends_within_each_sequence():
    """Its backward needs a GPU; its mask does not."""
    inputs = Inputs.make(models.TINY["8b"], gpu_attention.packed_lengths(192), CPU)
    inputs = dataclasses.replace(inputs, **{name: getattr(inputs, name).detach() for name in ("query", "key", "value")})
    torch.testing.assert_close(Flex()(inputs), ours(inputs))


def test_packed_lengths_add_up():
    for context in (*gpu_attention.CONTEXTS, *gpu_attention.TINY_CONTEXTS):
        lengths = gpu_attention.packed_lengths(context)
        assert sum(lengths) == context and len(set(lengths)) > 8 and min(lengths) >= 2
        assert max(lengths) <= 1.9 * context / gpu_attention.NUM_PACKED


def test_attention_rows_and_a_wrong_core(tmp_path, monkeypatch):
    def across(inputs):
        """Sequences see each other."""
        return ours(dataclasses.replace(inputs, segments=gpu_attention.Segments.plan([sum(inputs.lengths)])))

    monkeypatch.setattr(gpu_attention, "providers", lambda: [Provider("unlearn", ours), Provider("across", across)])
    assert run_part(tmp_path, module=gpu_attention) == 1
    rows = rows_of(tmp_path, "train-a", "attention")
    assert len(rows) == 16
    for row in rows:
        if row["provider"] == "across" and row["packed"]:
            assert row["refused"] and "forward_ms" not in row
        else:
            assert row["forward_tflops"] > 0 and row["backward_tflops"] > 0 and row["gradient_relative"] < 1e-5
    assert "refused" in gpu_summary.summary(tmp_path, ["train-a"])


def test_repeated_keys_are_timed_beside_ours_where_there_are_fewer(tmp_path, monkeypatch):
    both = [one for one in gpu_attention.providers() if one.name.startswith("unlearn")]
    monkeypatch.setattr(gpu_attention, "providers", lambda: both)
    assert run_part(tmp_path, "--rounds=1", module=gpu_attention) == 0
    rows = rows_of(tmp_path, "train-a", "attention")
    assert {row["model"] for row in rows} == {"8b", "7b"} and all(row["forward_ms"] > 0 for row in rows)
    assert {row["model"] for row in rows if row["provider"] == "unlearn, keys repeated"} == {"8b"}
    assert {row["kernel"] for row in rows if row.get("kernel")} == {"flash_attention"}


def test_tables_show_what_was_measured_and_nothing_of_a_dry_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "read", lambda name: read(name, tmp_path))
    tables = {"train-b": "gpu-depth", "train-c": "gpu-context", "train-d": "gpu-ablation"}
    for part, marker in tables.items():
        assert readme.TABLES[marker]() == (
            f"Not measured yet: `bench/gpu.sh {part}` makes `bench/results/gpu_{part}.jsonl` on a machine with a GPU."
        )
        for tiny in (True, False):
            *found, end = read(f"gpu_{part}", folder)
            shared = {key: end[key] for key in SHARED} | {"tiny": tiny}
            with RowFile(tmp_path, f"gpu_{part}", shared) as rows:
                for row in found:
                    rows.write(row)
            text = readme.TABLES[marker]()
            assert ("Not measured yet" in text) == tiny
        head, *_ = text.splitlines()
        cells = context_tables.TABLES[part].cells(read(f"gpu_{part}", tmp_path))
        assert head == "| " + " | ".join(cells[0]) + " |" and len({len(line) for line in cells}) == 1
        assert len(cells) > 4 and f"Rows: `bench/results/gpu_{part}.jsonl`" in text
    assert "| 8b | 32 + 32 | " in readme.TABLES["gpu-context"]()
    assert "| 4 | plain loop, full logits | " in readme.TABLES["gpu-ablation"]()
    assert "Not measured yet: `bench/gpu.sh train-a`" in readme.TABLES["gpu-attention"]()
