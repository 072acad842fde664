"""Breaks the kernels on purpose, one way at a time, and shows that a test notices: `python -m tests.kernels.mutants
[name ...]`.

Each mutant is applied to a temporary copy of the package, and the tests it names are run against that copy. A mutant
that survives is a missing test. Before any mutant the same tests are run on an unchanged copy, or red would mean
nothing.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import torch

from tests.kernels.triton_mutants import TRITON_MUTANTS, Mutant

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "kernels" / "unlearn_kernels"

GRADIENTS, LOSS, LOGPROBS = "test_gradients.py", "test_sequence_loss.py", "test_logprobs.py"
COLUMNS = "test_columns.py"
DISTRIBUTIONS, MEMORY, PACK = "test_distributions.py", "test_memory.py", "test_pack_labels.py"

MUTANTS = (
    Mutant(
        "the target's own column stays in S and E",
        "chunked.py",
        "fill_target_column(z_RK, targets_C[rows], first, -torch.inf)",
        "pass",
        (f"{LOGPROBS}::test_peaked_rows",),
    ),
    Mutant(
        "1 - exp instead of expm1",
        "chunked.py",
        "-torch.expm1(logprob_C) * logit_scale",
        "(1.0 - torch.exp(logprob_C)) * logit_scale",
        (f"{GRADIENTS}::test_both_ends_of_the_range",),
    ),
    Mutant(
        "log instead of log1p where the target dominates",
        "chunked.py",
        "torch.where(sums_C < e_y_C, -torch.log1p(sums_C / e_y_C), -d_C - torch.log(total_C))",
        "-d_C - torch.log(total_C)",
        (f"{LOGPROBS}::test_memorised_targets_keep_relative_accuracy",),
    ),
    Mutant(
        "d is 40 and not m - z_y",
        "chunked.py",
        "d_C = offset_C.double() - target_logit_C.double()",
        "d_C = torch.full_like(offset_C, 40.0).double()",
        (f"{LOGPROBS}::test_hopeless_targets",),
    ),
    Mutant(
        "E without the softcap's slope",
        "chunked.py",
        "z_RK.mul_(slope_RK)",
        "pass",
        (f"{GRADIENTS}::test_every_part_of_the_head",),
    ),
    Mutant(
        "target term without the softcap's slope",
        "chunked.py",
        "1.0 - (target_logit_C.double() / softcap).square() if softcap else 1.0",
        "1.0",
        (f"{GRADIENTS}::test_every_part_of_the_head",),
    ),
    Mutant(
        "E term without the logit scale",
        "chunked.py",
        "e_coeff_C.copy_(logit_scale / total_C)",
        "e_coeff_C.copy_(1.0 / total_C)",
        (f"{GRADIENTS}::test_every_part_of_the_head",),
    ),
    Mutant(
        "rows out of range are not redone",
        "chunked.py",
        "if bad.numel() == 0:",
        "if True:",
        (f"{LOGPROBS}::test_hopeless_targets", f"{GRADIENTS}::test_both_ends_of_the_range"),
    ),
    Mutant(
        "only infinite sums are redone",
        "chunked.py",
        "(sums_C > MAX_SUM)",
        "torch.isinf(sums_C)",
        (f"{GRADIENTS}::test_both_ends_of_the_range",),
    ),
    Mutant(
        "last chunk of rows unwritten",
        "autograd.py",
        "for start in range(first, last, chunks.size):",
        "for start in range(first, last - chunks.size, chunks.size):",
        (f"{GRADIENTS}::test_trained_head",),
    ),
    Mutant(
        "a slice of E is written over before it is used",
        "columns.py",
        "(vocab - size) * min(width, num_rows) // num_rows",
        "(vocab - size // 2) * min(width, num_rows) // num_rows",
        (f"{COLUMNS}::test_no_slice_is_written_over_before_it_is_used",),
    ),
    Mutant(
        "streamed rows out of range keep their sums",
        "columns.py",
        "            total[index] = corrected",
        "            pass",
        (f"{COLUMNS}::test_hidden_alone_with_rows_out_of_range",),
    ),
    Mutant(
        "a second backward writes into the first one's gradient",
        "columns.py",
        "        self.e_NS, self.weight_grad_VH = {}, None\n",
        "",
        (f"{COLUMNS}::test_a_retained_graph_gives_the_same_gradients_twice",),
    ),
    Mutant(
        "last vocabulary tile unwritten",
        "chunked.py",
        "    direct = out_VD.dtype == scratch.dtype\n    for first, last in blocks(vocab, regions.cols):",
        "    direct = out_VD.dtype == scratch.dtype\n    for first, last in list(blocks(vocab, regions.cols))[:-1]:",
        (f"{GRADIENTS}::test_around_the_tile",),
    ),
    Mutant(
        "weight gradient accumulated in the weight's dtype",
        "problem.py",
        "dtype=tensor.dtype if final else self.dtype",
        "dtype=tensor.dtype",
        (f"{GRADIENTS}::test_a_label_in_most_rows_loses_nothing_in_bf16",),
    ),
    Mutant(
        "repeated labels take another row's coefficient",
        "chunked.py",
        "mul_(coeff_C[order_C, None])",
        "mul_(coeff_C[:, None])",
        (f"{GRADIENTS}::test_trained_head",),
    ),
    Mutant(
        "unstable accumulation: a label's rows overwrite each other",
        "chunked.py",
        "sums.add_(out_VD[label_C, first:last])",
        "sums = terms",
        (f"{GRADIENTS}::test_a_label_in_most_rows_loses_nothing_in_bf16",),
    ),
    Mutant(
        "backward scales the saved gradient in place",
        "problem.py",
        "torch.mul(grad[start : start + block], factor, out=out[start : start + block])",
        "torch.mul(grad[start : start + block].mul_(factor), 1.0, out=out[start : start + block])",
        (f"{LOSS}::test_a_retained_graph_gives_the_same_gradients_twice",),
    ),
    Mutant(
        "double backward gives a silent zero",
        "autograd.py",
        "if torch.compiler.is_compiling() or not torch.is_grad_enabled():",
        "if True:",
        (f"{GRADIENTS}::test_double_backward_is_refused", f"{LOSS}::test_double_backward_is_refused"),
    ),
    Mutant(
        "recomputed chunks take the first chunk's upstream gradient",
        "autograd.py",
        ".times(upstream_N[start:stop])",
        ".times(upstream_N[: stop - start])",
        (f"{GRADIENTS}::test_trained_head",),
    ),
    Mutant(
        "groups are cut",
        "autograd.py",
        "for size in self.groups:",
        "for size in [1] * sum(self.groups):",
        (f"{LOSS}::test_the_objective_sees_whole_groups_in_order_once",),
    ),
    Mutant(
        "a group longer than the workspace takes the wrong rows' slopes",
        "autograd.py",
        "torch.cat([slope.new_zeros(start), slope])",
        "torch.cat([slope, slope.new_zeros(start)])",
        (f"{LOSS}::test_gradients",),
    ),
    Mutant(
        "float16 gradients do not wait for their scale in float32",
        "problem.py",
        "not final and self.hidden_NH.dtype == torch.float16",
        "False",
        (f"{LOSS}::test_float16_gradients_survive_a_loss_scale",),
    ),
    Mutant(
        "LoRA's A without its scale",
        "problem.py",
        "matmul(part_RR.T, self.hidden_NH[span], scale,",
        "matmul(part_RR.T, self.hidden_NH[span], 1.0,",
        (f"{GRADIENTS}::test_every_part_of_the_head",),
    ),
    Mutant(
        "skipping forgets the lengths",
        "autograd.py",
        "weight = slope.abs() * self.lengths",
        "weight = slope.abs()",
        (f"{LOSS}::test_skipping_leaves_out_exactly_the_small_ones",),
    ),
    Mutant(
        "the active rows' gradients land on the first rows",
        "autograd.py",
        "grads.hidden_NH[index] = ",
        "grads.hidden_NH[: index.numel()] = ",
        (f"{LOSS}::test_skipping_leaves_out_exactly_the_small_ones",),
    ),
    Mutant(
        "KL by expm1 everywhere",
        "chunked_distributions.py",
        "u_RV.abs() < 0.5",
        "u_RV.abs() < torch.inf",
        (f"{DISTRIBUTIONS}::test_kl_of_models_hundreds_of_nats_apart",),
    ),
    Mutant(
        "KL by p - q everywhere",
        "chunked_distributions.py",
        "u_RV.abs() < 0.5",
        "u_RV.abs() < 0.0",
        (f"{DISTRIBUTIONS}::test_kl_of_nearby_models_does_not_cancel",),
    ),
    Mutant(
        "the highest index wins a tie",
        "chunked_distributions.py",
        "torch.where(top_R > self.maximum,",
        "torch.where(top_R >= self.maximum,",
        (f"{DISTRIBUTIONS}::test_the_lowest_index_wins_a_tie",),
    ),
    Mutant(
        "variances merged without the distance of the means",
        "chunked_distributions.py",
        " + share * (1 - share) * delta.square()",
        "",
        (f"{DISTRIBUTIONS}::test_token_stats",),
    ),
    Mutant(
        "the workspace is not respected",
        "problem.py",
        "(self.spec.workspace_bytes - scratch_bytes) // row_bytes",
        "(8 * self.spec.workspace_bytes) // row_bytes",
        (f"{MEMORY}::test_no_single_allocation_passes_the_bound",),
    ),
    Mutant(
        "labels are not shifted",
        "functions.py",
        "hidden_states[:, :-1][labelled]",
        "hidden_states[:, 1:][labelled]",
        (f"{PACK}::test_rows_that_predict_labels",),
    ),
    *TRITON_MUTANTS,
)

# The copy has to win over an editable install, whose import hook comes before sys.path, and over pytest's own
# pythonpath setting.
RUN = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "_editable_" not in getattr(f, "__module__", type(f).__module__)]
sys.path[:0] = [{copy!r}, {root!r}]
import unlearn_kernels, pytest
assert unlearn_kernels.__file__.startswith({copy!r}), unlearn_kernels.__file__
arguments = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore:unlearn_kernels runs", "-o", "pythonpath="]
sys.exit(pytest.main([*arguments, "-k", {only!r}, *{tests!r}]))
"""


def passes(copy: pathlib.Path, tests: tuple[str, ...], only: str = "") -> tuple[bool, str]:
    paths = [str(ROOT / "tests" / "kernels" / test) for test in tests]
    code = RUN.format(copy=str(copy), root=str(ROOT), tests=paths, only=only)
    environment = dict(os.environ)
    # the package imports triton before tests/conftest.py can ask for its interpreter
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.returncode == 0, done.stdout


def copy_package(folder: str, package: pathlib.Path = PACKAGE) -> pathlib.Path:
    copy = pathlib.Path(folder)
    shutil.copytree(package, copy / "unlearn_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def passes_mutated(unchanged: pathlib.Path, mutant: Mutant) -> tuple[bool, str]:
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_package(folder, unchanged / "unlearn_kernels")
        path = copy / "unlearn_kernels" / mutant.file
        path.write_text(path.read_text().replace(mutant.old, mutant.new))
        return passes(copy, mutant.tests, mutant.only)


def first_failure(output: str) -> str:
    return next((line for line in output.splitlines() if line.startswith("FAILED")), "FAILED ?").split("/")[-1]


def main(names: list[str]) -> int:
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        unchanged = copy_package(folder)
        for only in sorted({mutant.only for mutant in chosen}):
            tests = {test for mutant in chosen if mutant.only == only for test in mutant.tests}
            ok, output = passes(unchanged, tuple(sorted(tests)), only)
            if not ok:
                print(output)
                print("the tests fail on the unchanged package: nothing can be shown")
                return 2
        for mutant in chosen:
            survived, output = passes_mutated(unchanged, mutant)
            survivors += survived
            print(
                f"{'SURVIVED' if survived else 'caught  '} {mutant.name}: {'' if survived else first_failure(output)}",
                flush=True,
            )
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
