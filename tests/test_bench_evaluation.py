"""The evaluation benchmark: three ways to the same metrics, and none that differs is timed."""

import sys

import torch

from bench import evaluation
from bench.rows import read


def test_a_tiny_run_has_a_row_per_way(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench/evaluation.py", "--tiny", "--rounds", "2", "--out", str(tmp_path)])
    assert evaluation.main() == 0
    *rows, end = read("evaluation", tmp_path)
    assert end["case"] == "end" and end["failed"] == 0
    assert [(row["dtype"], row["provider"]) for row in rows] == [
        (dtype, name)
        for dtype in ("bfloat16", "float32")
        for name in ("unlearn", "one padded forward", "a padded forward per metric")
    ]
    # 3 forget rows of 7 answers and 3 holdout rows of one; 7 passes over the forget answers and 4 over the others
    assert [row["sequences"] for row in rows[3:]] == [24, 24, 3 * 7 + 3 * 6 + 3 * 4]
    assert all(row["rows_per_second"] > 0 and row["units"] > 0 and row["command"].endswith("--out DIR") for row in rows)
    assert rows[4]["metric_difference"] < 1e-4 and str(tmp_path) not in capsys.readouterr().out


def test_a_way_that_differs_is_refused():
    model = evaluation.make_model(evaluation.TINY_SIZE, evaluation.TINY_VOCAB)
    sets = evaluation.make_sets(model, evaluation.TINY_VOCAB, 2)
    ours, again = (evaluation.padded_evaluation(model, sets, repeated=again) for again in (False, True))
    assert ours.metrics["forget_exact_memorization"] > 0.2  # or the comparison would be one of zeros
    assert "refused" not in evaluation.compared(again, ours, torch.float32)
    again.metrics["mia_min_k_auc"] += 0.25
    assert evaluation.compared(again, ours, torch.float32)["refused"]
    again.sets["forget"].wrong_nll[1, 2] = float("nan")
    assert evaluation.compared(again, ours, torch.bfloat16)["refused"]
    assert "CUDA" in evaluation.compared("RuntimeError: CUDA", ours, torch.float32)["failed"]
