"""bench/gpu.sh's parts on a CPU at shapes of a few rows: what is written, refused, left out, resumed and imported."""

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import context_tables, gpu_correctness, gpu_kernels, gpu_summary, part, providers, readme, workers
from bench.inputs import Case, Padded, npo, padded_truth, relative_error, truth_of
from bench.rows import ROOT, RowFile, read
from bench.timing import Budget, Interleaved, Stopwatch, Unit, quartiles
from unlearn_kernels import reference

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--backend", "torch", "--tiny"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": ".:kernels", "OMP_NUM_THREADS": "1"}

# A machine with torch, triton, transformers and what those three require: nothing else can be found.
BARE = """
import importlib.machinery, runpy, sys
allowed = set(sys.argv[1].split(",")) | set(sys.stdlib_module_names)
find_spec = importlib.machinery.PathFinder.find_spec
def find_allowed(name, path=None, target=None):
    top = name.partition(".")[0]
    return find_spec(name, path, target) if top in allowed or top.startswith("_sysconfigdata") else None
importlib.machinery.PathFinder.find_spec = find_allowed
try:
    import pytest
    raise SystemExit("pytest was found: the machine is not bare")
except ImportError:
    pass
for arguments in sys.argv[2:]:
    sys.argv = arguments.split(" ")
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
"""


def run_part(monkeypatch, module, folder, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", *TINY, "--out", str(folder), *arguments])
    return module.main()


def closure(*names):
    """Distributions that these require, extras aside, by the names their modules are imported under."""
    found, todo = set(), list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        todo += [re.match(r"[\w.-]+", line)[0] for line in distribution.requires or [] if "extra ==" not in line]
    named = importlib.metadata.packages_distributions()
    return {top for top, owners in named.items() if any(re.sub(r"[-_.]+", "-", o).lower() in found for o in owners)}


def test_every_part_runs_with_torch_triton_and_transformers_alone(tmp_path):
    allowed = closure("torch", "triton", "transformers") | {"bench", "unlearn", "unlearn_kernels"}
    assert not {"pytest", "datasets", "matplotlib", "scipy"} & allowed
    shared = f"{' '.join(TINY)} --out {tmp_path}"
    calls = [
        f"bench.gpu_kernels {shared}",
        f"bench.gpu_kernels --peers {shared}",
        f"bench.gpu_train {shared}",
        f"bench.gpu_attention {shared}",
        *(f"bench.gpu_context {part} {shared}" for part in ("train-b", "train-c", "train-d")),
        f"bench.gpu_correctness {shared} --groups strides bad_targets",
        f"bench.gpu_summary --out {tmp_path}",
        f"bench.gpu_summary --out {tmp_path} {' '.join(context_tables.TABLES)}",
    ]
    command = [sys.executable, "-c", BARE, ",".join(sorted(allowed)), *calls]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    for name in (*gpu_summary.PARTS, *context_tables.TABLES):
        rows = read(f"gpu_{name}", tmp_path)
        assert rows[-1]["case"] == "end" and rows[-1]["failed"] == 0, name
        assert str(tmp_path) not in (tmp_path / f"gpu_{name}.jsonl").read_text(), "a path of this machine in the rows"
    printed = done.stdout[done.stdout.index("== correctness") :]
    assert max(map(len, printed.splitlines())) <= 100
    for expected in ("checks passed, 0 failed", "missing: liger: not installed", "frozen", "times as fast", "tiny"):
        assert expected in printed, expected


def test_the_shell_script_runs_a_part_and_prints_the_summary_last(tmp_path):
    environment = {**ENVIRONMENT, "PYTHON": sys.executable, "OUT": str(tmp_path)}

    def call(*arguments):
        command = [str(ROOT / "bench" / "gpu.sh"), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("torch-2.14.0-cp312-none-any.whl", "triton-3.9.0-cp312-none-any.whl"):
        (wheels / name).write_text("not installed")
    done = call("--dry-run", "--wheels", str(wheels), "--seconds", "kernels=30", "kernels")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "padded batch" in done.stdout[done.stdout.rindex("== kernels") :]
    left_out = "cp312-none-any.whl is left out: torch and triton are the machine's"
    assert done.stderr.count(left_out) == 2 and "was not installed" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"gpu_kernels.jsonl", "gpu_kernels.log", "wheels"}
    assert call("nonsense").returncode == 2


def test_a_killed_part_leaves_valid_rows_and_the_summary_says_so(tmp_path):
    path = tmp_path / "gpu_correctness.jsonl"
    command = [sys.executable, "-m", "bench.gpu_correctness", *TINY, "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not path.exists() or path.read_bytes().count(b"\n") < 5:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) >= 5 and rows[-1]["case"] == "check"
    assert "CUT OFF" in gpu_summary.summary(tmp_path, ["correctness"])
    assert part.finished("correctness", tmp_path, rows[-1]) is None


def test_a_part_has_its_share_however_old_the_process_is(monkeypatch):
    now = time.monotonic() + 1e6
    monkeypatch.setattr(time, "monotonic", lambda: now)
    budget = Budget(165)
    assert budget.left == 165 and not budget.spent


def test_a_part_stopped_at_its_limit_says_so_and_fails(tmp_path, monkeypatch):
    def stop(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    before = signal.getsignal(signal.SIGTERM)
    try:
        monkeypatch.setattr(gpu_kernels.Matrix, "measure", stop)
        assert run_part(monkeypatch, gpu_kernels, tmp_path) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    *_, error, end = read("gpu_kernels", tmp_path)
    assert error["message"] == "Stopped: at the part's hard limit" and end["failed"] == 1


def test_rows_that_exist_are_kept_when_asked_for(tmp_path, monkeypatch, capsys):
    assert run_part(monkeypatch, gpu_kernels, tmp_path) == 0
    before = (tmp_path / "gpu_kernels.jsonl").read_bytes()
    capsys.readouterr()
    assert run_part(monkeypatch, gpu_kernels, tmp_path, "--if-missing") == 0
    assert "exist" in capsys.readouterr().out
    assert (tmp_path / "gpu_kernels.jsonl").read_bytes() == before
    monkeypatch.setattr(part, "source_digest", lambda: "another tree")
    assert run_part(monkeypatch, gpu_kernels, tmp_path, "--if-missing") == 0
    assert (tmp_path / "gpu_kernels.jsonl").read_bytes() != before


def test_spent_time_leaves_shapes_out_by_name(tmp_path, monkeypatch):
    assert run_part(monkeypatch, gpu_kernels, tmp_path, "--seconds=-1e6") == 0
    left = [row for row in read("gpu_kernels", tmp_path) if row["case"] == "left_out"]
    assert len(left) == 3 and all(row["shape"] for row in left)
    assert "128 x 32 x 300" in gpu_summary.summary(tmp_path, ["kernels"])


class Wrong(providers.PlainTorch):
    def tokens(self, hidden, weight, targets):
        return super().tokens(hidden, weight, targets) * 1.5


class Broken(providers.PlainTorch):
    def tokens(self, hidden, weight, targets):
        raise RuntimeError("no such kernel\nsecond line")


def test_a_wrong_answer_has_no_speed_and_fails_the_part(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_kernels, "chosen_providers", lambda _: [Wrong("wrong"), providers.PlainTorch("torch")])
    assert run_part(monkeypatch, gpu_kernels, tmp_path, "--peers") == 1
    rows = read("gpu_peers", tmp_path)
    wrong = [row for row in rows if row.get("provider") == "wrong"]
    assert {row["case"] for row in wrong} >= {"forward", "full", "frozen", "padded_full"}
    assert all(row["refused"] and not {"units", "ms", "peak_mib"} & set(row) for row in wrong)
    assert any(row.get("provider") == "torch" and row["units"] > 0 for row in rows)
    assert rows[-1]["failed"] == len(wrong)


def test_a_peer_that_raises_is_a_row_and_no_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(
        gpu_kernels, "chosen_providers", lambda _: [Broken("broken"), providers.Ours("unlearn_kernels")]
    )
    assert run_part(monkeypatch, gpu_kernels, tmp_path, "--peers") == 0
    broken = [row for row in read("gpu_peers", tmp_path) if row.get("provider") == "broken"]
    assert broken and all(row["failed"] == "RuntimeError: no such kernel" for row in broken)


def test_a_check_that_raises_or_is_nan_fails_and_the_next_goes_on(tmp_path, monkeypatch):
    def group(make):
        yield "raises", lambda: 1 / 0
        yield "nan", lambda: gpu_correctness.Outcome(float("nan"), 1.0)
        yield "holds", lambda: gpu_correctness.Outcome(0.5, 1.0)

    monkeypatch.setattr(gpu_correctness, "GROUPS", (group,))
    assert run_part(monkeypatch, gpu_correctness, tmp_path) == 1
    rows = read("gpu_correctness", tmp_path)
    assert [row["passed"] for row in rows if row["case"] == "check"] == [False, False, True]
    assert rows[0]["message"] == "ZeroDivisionError: division by zero" and rows[1]["error"] == "nan"


def checks_of(folder):
    return {row["check"]: row["passed"] for row in read("gpu_correctness", folder) if row["case"] == "check"}


def test_several_processes_make_the_same_checks(tmp_path, monkeypatch):
    groups = ["--groups", "strides", "statistics_and_packing", "bad_targets"]
    for count in ("1", "3"):
        assert run_part(monkeypatch, gpu_correctness, tmp_path / count, "--workers", count, *groups) == 0
    assert checks_of(tmp_path / "3") == checks_of(tmp_path / "1")
    *_, end = read("gpu_correctness", tmp_path / "3")
    assert len(checks_of(tmp_path / "3")) == 15 and end["case"] == "end" and end["failed"] == end["left_out"] == 0


# Eight checks of a group; the third kills its process, the fifth leaves the device unusable in its own.
DEADLY = """
import os, sys
from bench import gpu_correctness as part
lost = False
def group(make):
    def check(number):
        global lost
        if number == 2:
            os._exit(9)
        if number == 4:
            lost = True
            print("a library prints")
            raise RuntimeError("the device is lost")
        assert not lost
        return part.Outcome(0.5, 1.0)
    for number in range(8):
        yield f"check {number}", lambda number=number: check(number)
def synchronize(device):
    if lost:
        raise RuntimeError
part.GROUPS, part.synchronize = (group,), synchronize
sys.exit(part.main())
"""


def deadly_part(monkeypatch, folder, *arguments, code=DEADLY):
    checks = [(f"check {number}", None) for number in range(8)]

    def group(make):
        yield from checks

    monkeypatch.setattr(gpu_correctness, "GROUPS", (group,))
    command = gpu_correctness.worker_command
    monkeypatch.setattr(
        gpu_correctness, "worker_command", lambda args: [sys.executable, "-c", code, *command(args)[3:]]
    )
    monkeypatch.setenv("PYTHONPATH", ".:kernels")
    return run_part(monkeypatch, gpu_correctness, folder, "--workers", "2", *arguments)


def test_a_process_that_dies_costs_one_check(tmp_path, monkeypatch):
    assert deadly_part(monkeypatch, tmp_path) == 1
    rows = {row["check"]: row for row in read("gpu_correctness", tmp_path) if row["case"] == "check"}
    assert {name for name, row in rows.items() if not row["passed"]} == {"check 2", "check 4"} and len(rows) == 8
    assert rows["check 2"]["message"] == "its process ended with status 9"
    assert rows["check 4"]["message"] == "RuntimeError: the device is lost"


def test_processes_that_cannot_start_are_given_up(tmp_path, monkeypatch):
    assert deadly_part(monkeypatch, tmp_path, code="raise SystemExit(3)") == 1
    *rows, left, end = read("gpu_correctness", tmp_path)
    assert 3 <= end["failed"] == len(rows) <= 6 and left["case"] == "left_out"
    assert {row["message"] for row in rows} == {"its process ended with status 3"}


def test_processes_leave_groups_out_by_name_when_the_time_is_over(tmp_path, monkeypatch):
    assert deadly_part(monkeypatch, tmp_path, "--seconds=-1e6") == 0
    left, end = read("gpu_correctness", tmp_path)
    assert left["check"] == "group" and end["left_out"] == 1


def test_a_process_that_hangs_is_ended_after_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "GRACE", 0.5)
    start = time.monotonic()
    assert deadly_part(monkeypatch, tmp_path, "--seconds", "1", code="import time; time.sleep(60)") == 1
    assert time.monotonic() - start < 20
    *rows, end = read("gpu_correctness", tmp_path)
    assert {row["message"] for row in rows if row["case"] == "check"} == {"its process ended with status -9"}
    assert end["case"] == "end" and end["left_out"] == 1


def test_checks_notice_a_broken_kernel(monkeypatch):
    """The first group with log-probabilities a fifth off: every check of that function fails, no other does."""
    good = gpu_correctness.uk.token_logprobs
    monkeypatch.setattr(gpu_correctness.uk, "token_logprobs", lambda *a, **k: good(*a, **k) * 1.2)
    make = gpu_correctness.Maker(CPU, "torch", True)
    outcomes = {name: check() for name, check in gpu_correctness.functions(make)}
    wrong = {name for name, outcome in outcomes.items() if not outcome.error <= outcome.bound}
    assert wrong == {name for name in outcomes if name.startswith("token_logprobs")}


def test_rows_survive_an_error_and_a_nan(tmp_path):
    with pytest.raises(ValueError, match="stop"), RowFile(tmp_path, "rows", {"shared": 1}) as rows:
        rows.write({"case": "a", "value": float("nan"), "values": [float("inf"), 1.0]})
        raise ValueError("stop")
    first, error, end = read("rows", tmp_path)
    assert first == {"case": "a", "value": "nan", "values": ["inf", 1.0], "shared": 1}
    assert error["message"] == "ValueError: stop" and end["failed"] == 1


def test_truth_in_blocks_is_autograd_in_float64(monkeypatch):
    monkeypatch.setattr("bench.inputs._BLOCK", 700)
    case = Case.make((256, 24, 101), torch.float32)
    truth = truth_of(case, num_rows=128, num_columns=20)
    hidden, weight = (tensor.double().requires_grad_() for tensor in (case.hidden, case.weight))
    logprob = reference.token_logprobs(hidden, weight, case.targets)
    npo(logprob.reshape(-1, case.length).sum(1), case.ref).backward()
    assert len(truth.rows) == 128
    torch.testing.assert_close(truth.logprob_S, logprob.detach()[truth.rows], rtol=1e-12, atol=1e-12)
    assert relative_error(hidden.grad[truth.rows], truth.dhidden_SH) < 1e-12
    assert relative_error(weight.grad[truth.columns], truth.dweight_CH) < 1e-12


def test_padded_truth_and_every_provider_agree():
    batch = Padded.make(4, 20, 24, 101, 0.3, torch.float32, "cpu")
    assert 0.15 < batch.num_labels / 80 < 0.45
    truth = padded_truth(batch)
    there, absent = providers.split([*providers.ours("torch"), *providers.peers()], CPU)
    assert {"unlearn_kernels", "torch"} <= {provider.name for provider in there}
    assert set(absent) <= {provider.name for provider in providers.peers()}
    for provider in there:
        gpu_kernels.padded_work(provider, "full", batch)()
        assert relative_error(batch.hidden.grad, truth) < 1e-5, provider.name


def test_forced_plans_are_providers_and_surround_the_backward(monkeypatch):
    calls = []

    class Tuning:
        PLANS = ("fused", "library")

        @staticmethod
        def force(name):
            class Forced:
                def __enter__(self):
                    calls.append(f"enter {name}")

                def __exit__(self, *_):
                    calls.append("exit")

            return Forced()

    monkeypatch.setattr(providers, "_triton_tuning", lambda: Tuning)
    forced = providers.variants()
    assert [provider.name for provider in forced] == ["unlearn_kernels[fused]", "unlearn_kernels[library]"]
    forced[0].backend = "torch"
    case = Case.make((64, 16, 50), torch.float32)
    case.hidden.requires_grad_().register_hook(lambda grad: calls.append("backward"))
    providers.work_of(forced[0], "frozen", case)()
    assert calls == ["enter fused", "backward", "exit"]


def test_whole_e_asks_for_a_workspace_that_holds_it():
    options = providers.whole_e().options(16384, 128256)
    assert options.workspace_bytes == 2 * 16384 * 128256 + (512 << 20)


def test_interleaved_drops_what_raises_and_times_the_rest():
    order, state = [], {"left": 3}

    def fails_later():
        state["left"] -= 1
        if not state["left"]:
            raise MemoryError("out of memory")

    timed = Interleaved(Stopwatch(CPU), warmups=1)
    timed.add("good", lambda: order.append("good"), lambda: order.append("prepare"))
    timed.add("bad", fails_later)
    assert timed.rounds(0.0, least=4, most=9) == 4
    assert len(timed.times["good"]) == 4 and timed.failed == {"bad": "MemoryError: out of memory"}
    assert order == ["prepare", "good"] * 5


def test_the_unit_in_row_blocks_is_the_same_product(monkeypatch):
    hidden, weight = torch.randn(10, 4), torch.randn(6, 4)
    unit = Unit(hidden, weight)
    unit.rows = 4  # as where N x V does not fit
    unit()
    torch.testing.assert_close(unit.out[:2], hidden[8:] @ weight.T)


def test_quartiles():
    assert quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == (2.0, 3.0, 4.0)


def gpu_rows(folder, tiny):
    shape = {"shape": {"N": 64, "H": 16, "V": 50}, "dtype": "bfloat16"}
    shared = {"commit": None, "source": "5eed", "dirty": None, "device": "GPU", "tiny": tiny}
    shared |= {"torch": "2.11", "triton": "3.6", "transformers": "5.17"}
    with RowFile(folder, "gpu_kernels", shared) as rows:
        rows.write({"case": "unit", **shape, "unit_ms": 2.0})
        rows.write({"case": "forward", "provider": "unlearn_kernels", **shape, "units": 1.04, "logprob_rms": 2e-6})
        rows.write({"case": "full", "provider": "unlearn_kernels", **shape, "refused": True})


def test_readme_tables_show_what_was_measured_and_nothing_of_a_dry_run(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "read", lambda name: read(name, tmp_path))
    assert "Not measured yet" in readme.gpu_kernels_table() and "Not measured yet" in readme.gpu_train_table()
    gpu_rows(tmp_path, tiny=True)
    assert "Not measured yet" in readme.gpu_kernels_table()
    gpu_rows(tmp_path, tiny=False)
    assert "| 64 x 16 x 50 | 2.00 | unlearn_kernels | 1.04 | refused | - | 2.0e-06 |  |" in readme.gpu_kernels_table()
    assert "at 5eed; GPU, torch 2.11" in readme.gpu_kernels_table()


@pytest.mark.parametrize(
    ("units", "verdict"),
    [
        (1.04, "met at all 1 shapes, worst 1.04"),
        (1.06, "NOT met at 1 of 1, worst 1.06: 16384x4096x128256"),
        (None, "NOT"),
    ],
)
def test_targets(tmp_path, units, verdict):
    row = {"case": "forward", "provider": "unlearn_kernels", "shape": {"N": 16384, "H": 4096, "V": 128256}}
    row |= {"refused": True} if units is None else {"units": units, "logprob_rms": 2e-6}
    shared = {"commit": None, "dirty": None, "device": "GPU", "torch": "2.11", "tiny": False}
    with RowFile(tmp_path, "gpu_kernels", shared) as rows:
        rows.write(row)
    text = gpu_summary.summary(Path(tmp_path), ["kernels"])
    assert f"target forward <= 1.05 units: {verdict}" in text
    assert "target full <= 3.2 units: not measured" in text


def test_the_target_for_log_probabilities_is_reported_apart_from_what_is_refused(tmp_path):
    shared = {"commit": None, "dirty": None, "device": "GPU", "torch": "2.11", "tiny": False}
    with RowFile(tmp_path, "gpu_correctness", shared) as rows:
        for error in (4e-6, 1.4e-5):
            rows.write(
                {"case": "check", "check": "a", "passed": True, "error": error, "bound": 2e-4, "what": "nats rms"}
            )
    with RowFile(tmp_path, "gpu_kernels", shared) as rows:
        shape = {"shape": {"N": 64, "H": 4096, "V": 50}}
        rows.write({"case": "forward", "provider": "unlearn_kernels", **shape, "units": 1.0, "logprob_rms": 1.4e-5})
    text = gpu_summary.summary(tmp_path, ["correctness", "kernels"])
    assert "2 checks passed, 0 failed\ntarget log-prob error <= 1e-05: NOT met in 1 of 2, worst 1.4e-05" in text
    assert "target log-prob error <= 1e-05: NOT met at 1 of 1, worst 1.4e-05: 64x4096x50" in text


def cut_toward_zero(hidden, weight):
    """hidden W^T as matrix cores add: 16 products at a time, exactly, to a float32 sum that is then cut off."""
    total = torch.zeros(len(hidden), len(weight))
    for k in range(0, hidden.shape[1], 16):
        exact = total.double() + hidden[:, k : k + 16].double() @ weight[:, k : k + 16].double().T
        near = exact.float()
        total = torch.where(near.double().abs() > exact.abs(), torch.nextafter(near, torch.zeros(())), near)
    return total


@pytest.mark.parametrize("width", [1024, 4096])
def test_what_matrix_cores_cut_off_is_not_refused_and_rounded_logits_are(width):
    case = Case.make((64, width, 512), torch.bfloat16)
    truth = truth_of(case, num_rows=64)
    ours = providers.Ours("unlearn_kernels")
    limit = ours.refused_above(torch.device("cuda"), width, truth.logsumexp_S)
    assert ours.refused_above(CPU, width, truth.logsumexp_S) == ours.error_bound == 1e-5

    def error(logits):
        logprob = logits.double().log_softmax(1).gather(1, case.targets[:, None])[truth.rows, 0]
        return float((logprob - truth.logprob_S).square().mean().sqrt())

    logits = cut_toward_zero(case.hidden, case.weight)
    assert width / 4096 * 1e-5 * 0.9 < error(logits) < limit / 4
    assert error(logits.bfloat16()) > 10 * limit
