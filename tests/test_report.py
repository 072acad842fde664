"""The report: every number shown, nothing hidden, files whole or absent."""

import copy
import json
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlearn import files, plots, report

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
METHODS = {  # name: utility, p-value, forget and retain log-likelihood per token at the end
    "GA": (0.0, 1e-20, -340.0, -280.0),
    "NPO": (0.61, 0.02, -9.0, -0.8),
    "SimNPO": (0.765, 0.54, -3.0, -0.06),
}


def trajectory(utility: float, p_value: float, forget: float, retain: float) -> list[dict]:
    rng = random.Random(0)
    return [
        {
            "step": 10 * i,
            "forget_logprob_per_token": -0.05 + forget * (i / 10) ** 1.5,
            "retain_logprob_per_token": -0.04 + retain * (i / 10) ** 1.5,
            "forget_quality": 10 ** (-22 + (22 + math.log10(p_value)) * i / 10),
            "utility": max(0.0, 0.78 + (utility - 0.78) * i / 10 + rng.gauss(0, 0.01)),
        }
        for i in range(11)
    ]


@pytest.fixture
def results() -> dict:
    models = [
        {"name": "full", "metrics": {"forget_quality": 1.3e-22, "model_utility": 0.781, "seconds": 61.2}},
        {"name": "gold", "metrics": {"forget_quality": 1.0, "model_utility": 0.775, "seconds": None}},
    ]
    for name, end in METHODS.items():
        metrics = {"forget_quality": end[1], "model_utility": end[0], "truth_ratio": 0.5, "seconds": 9.87654}
        models.append({"name": name, "metrics": metrics, "trajectory": trajectory(*end)})
    models[2]["metrics"]["truth_ratio"] = float("nan")
    return {
        "title": "Forgetting six people",
        "settings": {"lr": 1e-5, "model": {"layers": 4}, "betas": [0.9, 0.95]},
        "provenance": {"torch": "2.13.0"},
        "models": models,
        "notes": ["GA collapsed."],
        "samples": [{"question": "Where | when?", "answer": "In Brellick.", "GA": "the\n<b>*the*", "NPO": " "}],
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), (math.nan, "nan"), (math.inf, "inf"), ("nan", "nan"), (np.float32("nan"), "nan"), (0.0, "0"),
        (0.5, "0.500"), (0.99961, "1.00"), (0.0012345, "0.00123"), (1.2345e-5, "1.23e-05"), (12.345, "12.3"),
        (1234.5678, "1235"), (1e9, "1.00e+09"), (-0.25, "-0.250"), (7, "7"), (True, "True"), ("text", "text"),
    ],
)  # fmt: skip
def test_numbers_have_three_significant_digits(value, text):
    assert report.format_number(value) == text


@given(st.floats(-1e300, 1e300), st.integers(1, 6))
def test_formatted_numbers_are_the_numbers(value, digits):
    text = report.format_number(value, digits=digits)
    assert float(text) == pytest.approx(value, rel=0.51 * 10.0 ** (1 - digits), abs=5e-324)


def test_console_table_is_aligned_and_shows_missing_and_nan(results):
    lines = report.console_table(results).splitlines()
    assert len(lines) == 3 + len(results["models"])
    numbers_end = [len(line) for line in lines[3:]]
    assert len(set(numbers_end)) == 1, lines
    rows = {line.split()[0]: line.split()[1:] for line in lines[3:]}
    # Columns: truth ratio, forget quality, utility, time.
    assert rows["full"] == ["-", "1.3e-22", "0.781", "61.2"]
    assert rows["gold"] == ["-", "1.0", "0.775", "-"]
    assert rows["GA"] == ["nan", "1.0e-20", "0", "9.88"]


def test_markdown_table_has_the_asked_columns_in_order(results):
    table = report.markdown_table(results, ["model_utility", "forget_quality", "unheard_of"])
    lines = table.splitlines()
    assert lines[0] == "| model | utility | forget quality (p) | unheard of |"
    assert lines[1] == "| :-- | --: | --: | --: |"
    assert lines[5] == "| NPO | 0.610 | 0.020 | - |"


def test_report_files_are_complete_and_read_back(results, tmp_path):
    before = copy.deepcopy(results)
    path = report.write_report(results, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "report.md"
    assert repr(results) == repr(before)  # repr, because NaN does not equal itself
    names = sorted(p.name for p in path.parent.iterdir())
    assert names == ["logprobs.png", "plane.png", "report.md", "results.json"]
    text = path.read_text(encoding="utf-8")
    for expected in (
        "# Forgetting six people", "| nan |", "![Forget quality over utility](plane.png)", "](logprobs.png)",
        "- GA collapsed.", "| lr | 1e-05 |", "| model.layers | 4 |", "| betas | [0.9, 0.95] |", "| torch | 2.13.0 |",
        "Where \\| when?", "| GA | the \\<b>\\*the\\* |", "| NPO | (empty) |",
    ):  # fmt: skip
        assert expected in text, expected
    for name in ("plane.png", "logprobs.png"):
        assert (path.parent / name).read_bytes().startswith(PNG_SIGNATURE)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    stored = json.loads((path.parent / "results.json").read_text(), parse_constant=refuse)
    assert stored["models"][2]["metrics"]["truth_ratio"] == "nan"
    # A report made from the stored results is the same report, pictures included.
    again = report.write_report(stored, tmp_path / "again")
    for name in names:
        assert (again.parent / name).read_bytes() == (path.parent / name).read_bytes(), name


def test_pictures_are_1200_by_800(results, tmp_path):
    plots.plot_plane(results, tmp_path / "a.png")
    plots.plot_logprobs(results, tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        header = (tmp_path / name).read_bytes()[16:24]
        assert (
            (int.from_bytes(header[:4], "big"), int.from_bytes(header[4:], "big")) == plots.SIZE_PIXELS == (1200, 800)
        )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf, 0.0, -1e300])
def test_damaged_and_sparse_results_still_make_a_report(results, tmp_path, bad):
    for point in results["models"][2]["trajectory"]:
        point["retain_logprob_per_token"] = bad
        point["utility"] = None if bad == -1e300 else bad
        point["forget_quality"] = 0.0
    results["models"][3]["trajectory"] = []
    del results["models"][4]["trajectory"], results["models"][4]["metrics"]
    report.write_report(results, tmp_path)
    report.write_report({"models": [{"name": "NPO"}]}, tmp_path)
    report.console_table({"models": [{"name": "NPO"}]})


def test_undrawable_points_are_counted_in_the_picture(results, tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr(plots, "_finish", lambda *_, missing, **__: counted.append(missing))
    results["models"][3]["trajectory"][4]["retain_logprob_per_token"] = -math.inf
    results["models"][3]["trajectory"][5]["utility"] = math.nan
    plots.plot_plane(results, tmp_path / "a.png")
    plots.plot_logprobs(results, tmp_path / "b.png")
    # 11 points of the trajectory and the final one.
    assert counted == [["NPO (1 of 12)"], ["NPO retain (1 of 11)"]]


def test_failure_leaves_the_old_file_and_no_temporary(tmp_path):
    target = tmp_path / "report.md"
    target.write_text("old")
    with pytest.raises(RuntimeError), files.replacing(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
    with files.replacing(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("models", [[], [{"metrics": {}}], [{"name": "NPO"}, {"name": "NPO"}]])
def test_results_without_named_models_are_refused(tmp_path, models):
    with pytest.raises(ValueError, match="models|name of its own"):
        report.write_report({"models": models}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
