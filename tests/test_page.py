"""Runs read back and shown side by side: every number from the files, markup in the data kept text, damage named."""

import dataclasses
import html.parser
import json
import math
import re

import pytest

from tests.tiny import tiny_tokenizer
from unlearn import cli, plots, runs
from unlearn.data import rows_from, windows
from unlearn.evaluate import make_set
from unlearn.page import _metric_groups, make_subjects, render, write_page
from unlearn.runs import StoredEvaluation, described_set, read_run, text_of, write_evaluation

SCRIPT = "<script>alert('x')</script> & $x_1$"
CONFIG = {"method": "npo", "retain_term": "nll", "beta": 0.1, "lr": 1e-5, "output": "out", "model": "./my-model"}


def evaluation(**changes) -> StoredEvaluation:
    values = {
        "model": "out/model",
        "metrics": {"forget_quality": 0.37, "model_utility": 0.6125, "forget_probability": 0.0123, "new_metric": 7.5},
        "sets": {"forget": {"kind": "forget", "source": "forget.jsonl", "rows": 72, "digest": "ab12"}},
        "samples": {"forget": [{"question": "Who?", "answer": "Mara.", "generated": "Odo.", "probability": 0.25}]},
        "options": {"dtype": "float32"},
        "provenance": {"torch": "2.13"},
        "date": "2026-01-02T03:04:05+00:00",
        "run": None,
    }
    return StoredEvaluation(**(values | changes))


def make_run(folder, *, num_steps=4, done=4, config=CONFIG, model=True, evaluated=None, rows=None):
    """A run's folder as `unlearn train` leaves it, with an evaluation of it unless `evaluated` is False."""
    folder.mkdir(parents=True)
    header = {"config": config, "provenance": {"torch": "2.13"}, "data": "d1", "num_steps": num_steps}
    made = [
        {"step": i + 1, "loss": 2.0 - i / 4, "forget_logprob_per_token": -0.5 - i, "grad_norm": 10.0**-i, "lr": 1e-5,
         "retain_loss": None, "seconds": 1.5} for i in range(done)
    ]  # fmt: skip
    lines = [json.dumps(header), *(json.dumps(row) for row in made)] if rows is None else rows
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    if model:
        (folder / "model").mkdir()
    if evaluated is not False:
        name = runs._run_name(lines[0].encode())
        write_evaluation(folder, dataclasses.replace(evaluated or evaluation(), run=name))
    return folder


class Reader(html.parser.HTMLParser):
    """Tags and texts of a page; a tag that is not closed fails."""

    VOID = ("meta", "br", "link", "img", "path", "use", "rect", "circle", "line")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts, self.attributes = [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append(" ".join(data.split()))


def page_of(tmp_path, *folders, before=None, gold=None, title="A title"):
    """(the page read, its text)."""
    path = tmp_path / "pages" / "report.html"
    read = [None if folder is None else read_run(folder) for folder in (before, gold)]
    write_page(path, [read_run(folder) for folder in folders], before=read[0], gold=read[1], title=title)
    text = path.read_text(encoding="utf-8")
    return Reader(text), text


def test_the_page_shows_what_the_files_say(tmp_path):
    other = CONFIG | {"beta": 0.5, "output": "elsewhere", "lora": 16}
    better = evaluation(metrics={"forget_quality": 0.62, "model_utility": 0.4})
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b", config=other, evaluated=better)
    for name in ("before", "gold"):
        write_evaluation(tmp_path / name, evaluation(metrics={"forget_quality": 1e-22, "model_utility": 0.7}))
    page, text = page_of(tmp_path, first, second, before=tmp_path / "before", gold=tmp_path / "gold")
    for expected in ("0.370", "0.620", "0.0123", "new metric", "7.50", "1.00e-22", "Odo.", "0.250", "6.00", "d1",
                     "npo + nll", "npo + nll + LoRA 16"):  # fmt: skip
        assert expected in page.texts, expected
    # beta is the one setting that differs; the folders' names are none
    table = text[text.index("<h2>Configuration") : text.index("settings that the runs share")]
    assert "beta" in table and "0.5" in table and "lr" not in table and "elsewhere" not in table
    assert page.tags.count("svg") == 5  # the plane, the loss, the log-probability, the gradient norm, the rate
    assert "warnings" not in text[text.index("<main>") :]
    plane = text[text.index("<figure") : text.index("</figure>")]
    assert all(f">{name}<" in plane for name in ("before", "retrained", "a", "b"))


def test_nothing_is_fetched_and_nothing_runs(tmp_path):
    page, text = page_of(tmp_path, make_run(tmp_path / "a"))
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "data", "action")]
    assert all(value.startswith("#") for value in links)
    assert not any(name.startswith("on") for name, _ in page.attributes)


def test_text_of_the_data_stays_text(tmp_path):
    sample = {"question": SCRIPT, "answer": SCRIPT, "generated": SCRIPT, "probability": 0.5}
    hostile = evaluation(
        model=SCRIPT, samples={SCRIPT: [sample]}, options={SCRIPT: SCRIPT}, provenance={SCRIPT: SCRIPT},
        sets={SCRIPT: {"kind": "forget", "source": SCRIPT, "rows": 1, "digest": SCRIPT}},
        metrics={SCRIPT: 1.0, "forget_quality": 0.5, "model_utility": 0.5},
    )  # fmt: skip
    config = {key: SCRIPT for key in CONFIG} | {SCRIPT: SCRIPT, f"{SCRIPT} shared": SCRIPT}
    folder = make_run(tmp_path / "<b>$x_1$ & \"'", config=config, evaluated=hostile)
    # one whose evaluation is of another run: what is said of it names that run's model, and the picture's notes name it
    stale = make_run(tmp_path / "<u>", config=config | {SCRIPT: f"{SCRIPT} too"}, evaluated=hostile)
    (stale / "metrics.jsonl").write_text((stale / "metrics.jsonl").read_text().replace('"d1"', '"d2"'))
    page, text = page_of(tmp_path, folder, stale, title=SCRIPT)
    assert not {"script", "b", "u"} & set(page.tags) and "<script" not in text
    assert any("is not of this run (<script>" in said for said in page.texts)
    assert any("Without both values, so not drawn: <u>" in said for said in page.texts)
    assert page.texts.count(SCRIPT) >= 10
    # the name in the picture is the name, and no formula
    assert folder.name in Reader(text[text.index("<figure") : text.index("</figure>")] + "</figure>").texts


def test_what_is_missing_is_said(tmp_path):
    bare = make_run(tmp_path / "bare", evaluated=False)
    cut = make_run(tmp_path / "cut", done=2, model=False, evaluated=False)
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # a kill
    unsaved = make_run(tmp_path / "unsaved", model=False, evaluated=False)
    none = make_run(tmp_path / "none", done=0, model=False, evaluated=False)
    page, text = page_of(tmp_path, bare, cut, unsaved, none)
    for expected in (
        "bare: finished; not evaluated.", "cut: unfinished: 2 of 4 steps; not evaluated.",
        "unsaved: all 4 steps done, no model saved; not evaluated.", "none: unfinished: 0 of 4 steps; not evaluated.",
    ):  # fmt: skip
        assert expected in page.texts, expected
    assert "No model here has both" in text
    assert page_of(tmp_path, none)[0].tags.count("svg") == 0


def test_an_evaluation_of_other_rows_or_another_run_is_not_passed_off(tmp_path):
    other_rows = evaluation(
        sets={"forget": {"kind": "forget", "source": "f", "rows": 3, "digest": "other"}}, options={"dtype": "bfloat16"}
    )
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two", evaluated=other_rows)
    page, _ = page_of(tmp_path, one, two)
    assert "two was evaluated on other rows of forget than one: not comparable." in page.texts
    assert "two was evaluated with another dtype than one." in page.texts
    # the run was done again in the same folder
    redone = (one / "metrics.jsonl").read_text().replace('"beta": 0.1', '"beta": 0.2')
    (one / "metrics.jsonl").write_text(redone)
    found = read_run(one)
    assert found.evaluations == {} and "is not of this run" in found.status


def test_both_kinds_of_evaluation_stand_side_by_side(tmp_path):
    """PrivLeak of `unlearn eval` and of `unlearn muse` are of their own rows: two lines, neither hides the other."""
    folder = make_run(tmp_path / "a", evaluated=evaluation(metrics={"privleak": -12.5, "forget_probability": 0.25}))
    name = json.loads((folder / "eval.json").read_text())["run"]
    found = evaluation(
        metrics={"verbmem_f": 0.75, "knowmem_r": 0.625, "mia_min_k_auc": 0.875, "privleak": -50.0}, run=name
    )
    write_evaluation(folder, dataclasses.replace(found, samples={}), name="muse.json")
    other = make_run(tmp_path / "b", evaluated=False)
    name = runs._run_name((other / "metrics.jsonl").read_bytes().partition(b"\n")[0])
    write_evaluation(other, dataclasses.replace(found, options={"max_rows": 1}, run=name), name="muse.json")
    page, text = page_of(tmp_path, folder, other)
    subjects = make_subjects([read_run(folder), read_run(other)], before=None, gold=None)
    table = [row for heading, rows in _metric_groups(subjects) for row in (heading, *rows)]
    assert table[: table.index("Cost")] == [
        "Forgetting",
        ("forget prob.", "low", [0.25, None]),
        ("VerbMem, forget", "low", [0.75, 0.75]),
        "Membership",
        ("PrivLeak [%]", "0 (negative: still known)", [-12.5, None]),
        ("PrivLeak (muse) [%]", "0 (negative: still known)", [-50.0, -50.0]),
        ("AUC, min-k (muse)", "0.5 (not told from unseen)", [0.875, 0.875]),
        "Keeping",
        ("KnowMem, retain", "high", [0.625, 0.625]),
    ]
    assert "b was evaluated with another dtype, max_rows than a." in page.texts
    assert {"eval.json: model", "muse.json: model", "muse.json: set forget"} <= set(page.texts)
    assert "not evaluated" not in text


def test_the_text_of_a_window_is_read_and_not_its_whole_document():
    document = "Mara Quill was born in the town of Arvel, by the river. " * 40
    rows = windows(rows_from([{"text": document}], "d"), tiny_tokenizer(), size=16)
    group = make_set("forget", "forget", rows, tiny_tokenizer())
    assert len(group.rows) > 20 and len(json.dumps(list(text_of(group)))) < 2 * len(document)
    described = [
        described_set("forget", "d", text_of(one)) for one in (group, dataclasses.replace(group, rows=group.rows[1:]))
    ]
    assert described[0]["rows"] == len(rows) and described[0]["digest"] != described[1]["digest"]


def test_collapsed_and_non_finite_steps_are_drawn_as_far_as_they_go(tmp_path):
    rows = [json.dumps({"config": CONFIG, "provenance": {}, "data": "d", "num_steps": 3})]
    rows += [
        json.dumps({"step": i + 1, "loss": loss, "forget_logprob_per_token": -(30.0**i), "skipped": loss == "nan"})
        for i, loss in enumerate((1.0, "nan", "-inf"))
    ]
    metrics = {"forget_quality": 0.0, "model_utility": 0.0}
    page, text = page_of(
        tmp_path, make_run(tmp_path / "a", num_steps=3, rows=rows, evaluated=evaluation(metrics=metrics))
    )
    assert page.tags.count("svg") == 3
    assert "1 steps with a non-finite loss or gradient were skipped" in text
    assert "P-values below 1e-20 are drawn at 1e-20" in text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: ["", *lines[1:]], "metrics.jsonl:1: damaged, not JSON"),
        (lambda lines: lines[1:], "metrics.jsonl:1: not a run's header: config is missing"),
        (lambda lines: [*lines[:2], lines[2][:20], *lines[3:]], "metrics.jsonl:3: damaged, not JSON"),
        (lambda lines: [*lines[:2], "[1]", *lines[3:]], "metrics.jsonl:3: damaged, a JSON object is expected"),
        (lambda lines: [*lines[:2], *lines[3:]], "metrics.jsonl:3: step 3 where step 2 is expected"),
        (lambda lines: [lines[0], lines[1].replace("2.0", '"high"')], "metrics.jsonl:2: a number is expected where"),
        (lambda lines: [], "metrics.jsonl: cut short in its first line"),
    ],
)
def test_a_damaged_metrics_file_is_one_line(tmp_path, capsys, damage, message):
    folder = make_run(tmp_path / "a")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in damage(lines)))
    assert cli.main(["report", str(folder), "--output", str(tmp_path / "r.html")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("unlearn: error: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:40], "not an evaluation"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "format 2; 1 is accepted"),
        (lambda text: text.replace('"date"', '"day"'), "unexpected keyword argument 'day'"),
        (lambda text: text.replace("0.37", '"much"'), "a number is expected where 'much' stands"),
        (lambda text: text.replace('"generated"', '"said"'), "a sample lacks a field"),
        (lambda text: text.replace('"source"', '"file"'), "a set lacks a field"),
        (lambda text: "[]", "not an evaluation"),
    ],
)
def test_a_damaged_evaluation_is_named(tmp_path, change, message):
    path = make_run(tmp_path / "a") / "eval.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_run(tmp_path / "a")
    assert str(path) in str(error.value)


def test_wrong_folders_are_refused(tmp_path, capsys):
    run, empty = make_run(tmp_path / "a", evaluated=False), tmp_path / "empty"
    empty.mkdir()
    output = ["--output", str(tmp_path / "r.html")]
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "runs: no folder"),
        ([str(empty)], "holds neither metrics.jsonl nor eval.json"),
        ([str(run), str(run)], "is given twice"),
        ([str(run), "--before", str(run)], "before: "),
        ([str(run), "--output", str(empty)], "is a folder; a file is accepted"),
        ([], "the following arguments are required: OUT"),
    ):
        assert cli.main(["report", *output, *arguments]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


def test_names_are_told_apart(tmp_path):
    folders = [make_run(tmp_path / name) for name in ("x/out", "y/out", "before", "npo")]
    write_evaluation(tmp_path / "original", evaluation())
    subjects = make_subjects([read_run(f) for f in folders], before=read_run(tmp_path / "original"), gold=None)
    assert [s.name for s in subjects] == ["before", *(str(f) for f in folders[:3]), "npo"]
    assert subjects[0].css == "currentColor" and len({s.css for s in subjects}) == 5
    Reader(render(subjects, "t"))


def test_an_earlier_evaluation_is_kept(tmp_path):
    for number in (0.1, 0.2, 0.3):
        write_evaluation(tmp_path, evaluation(metrics={"forget_quality": number}))
    assert runs.read_evaluation(tmp_path / "eval.json").metrics["forget_quality"] == 0.3
    assert runs.read_evaluation(tmp_path / "eval.old.json").metrics["forget_quality"] == 0.2
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(("rows", "count"), [(1, 5), (5, 5), (6, 5), (7, 3), (400, 5)])
def test_sample_places_are_spread_and_distinct(rows, count):
    places = runs.sample_places(rows, count)
    assert places == sorted(set(places)) and places[0] >= 0 and places[-1] < rows
    assert len(places) >= min(rows, count) - 1


def test_long_curves_are_means_over_equal_parts():
    steps = [{"step": i + 1, "loss": float(i)} for i in range(1000)]
    points = plots.thinned(steps, "loss")
    assert len(points) == 334 <= plots.POINTS_PER_CURVE
    assert points[0] == {"step": 2.0, "loss": 1.0}
    steps[4]["loss"] = "nan"
    assert math.isnan(plots.thinned(steps, "loss")[1]["loss"])
    assert plots.thinned(steps[:3], "loss") == steps[:3]
