"""Runs side by side as one HTML page: no other file, no network, no script; every text of the data is escaped.

page.html is the template (jinja2, escaping on); what it shows is put together here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from unlearn import __version__
from unlearn.files import replacing
from unlearn.plots import COLORS, PAGE, Style, as_float, curve_svg, plane_svg, styled
from unlearn.report import COLUMNS, format_number
from unlearn.runs import CURVES, EVAL_FILE, MUSE_FILE, Run

TEMPLATE = Path(__file__).with_name("page.html")
# key -> what its number should be, in the order of the table; where a retrained model is shown, it is the aim
AIMS = {
    "forget_quality": "high (above 0.05: not told from retrained)",
    "forget_probability": "low",
    "forget_logprob_per_token": "low",
    "forget_rouge_l": "low",
    "truth_ratio": "as retrained",
    "forget_exact_memorization": "low",
    "forget_extraction_strength": "low",
    "verbmem_f": "low",
    "verbmem_f_recall": "low",
    "knowmem_f": "low",
    "knowmem_f_recall": "low",
    "privleak": "0 (negative: still known)",
    "muse_privleak": "0 (negative: still known)",
    "model_utility": "high",
    "retain_utility": "high",
    "retain_probability": "high",
    "retain_rouge_l": "high",
    "knowmem_r": "high",
    "knowmem_r_recall": "high",
}
_MEMBERSHIP = ("mia_", "privleak")
_MEMBERSHIP_AIM = "0.5 (not told from unseen)"
# what differs between any two runs and is no setting
_NAMES = ("output",)


@dataclass(frozen=True)
class Subject:
    """A column of the page. role: "before", "retrained" or "run"; css: its colour."""

    name: str
    run: Run
    role: str
    style: Style
    css: str

    @property
    def metrics(self) -> dict[str, float]:
        """Of all evaluations; what two kinds of them have, each on its own rows, keeps two names."""
        own = dict(self.run.evaluations[EVAL_FILE].metrics) if EVAL_FILE in self.run.evaluations else {}
        muse = self.run.evaluations[MUSE_FILE].metrics if MUSE_FILE in self.run.evaluations else {}
        return own | {f"muse_{key}" if key.startswith(_MEMBERSHIP) else key: value for key, value in muse.items()}

    @property
    def method(self) -> str:
        """The method with its retain term and LoRA's rank, "" without a run."""
        rank = self.run.config.get("lora")
        terms = (self.run.config.get("method"), self.run.config.get("retain_term"), rank and f"LoRA {rank}")
        return " + ".join(str(term) for term in terms if term not in (None, "none"))


def write_page(
    path: str | os.PathLike[str], runs: Sequence[Run], *, before: Run | None, gold: Run | None, title: str
) -> None:
    """Write the page, whole or not at all. before, gold: the original model's evaluation, the retrained model's."""
    subjects = make_subjects(runs, before=before, gold=gold)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(render(subjects, title), encoding="utf-8")


def make_subjects(runs: Sequence[Run], *, before: Run | None, gold: Run | None) -> list[Subject]:
    """Columns in the order before, retrained, runs. A run is called as its folder; by its path where two have one name.

    Raises ValueError for a folder given twice.
    """
    given = [(before, "before"), (gold, "retrained"), *((run, "run") for run in runs)]
    members = [(run, role) for run, role in given if run is not None]
    folders = [run.folder.resolve() for run, _ in members]
    for place, folder in enumerate(folders):
        if folder in folders[:place]:
            raise ValueError(f"runs: {members[place][0].folder} is given twice")
    short = [folder.name if role == "run" else role for folder, (_, role) in zip(folders, members, strict=True)]
    names = [
        str(run.folder) if role == "run" and short.count(name) > 1 else name
        for name, (run, role) in zip(short, members, strict=True)
    ]
    reference = {"before": "full", "retrained": "gold", "run": None}
    models = [{"name": name, "reference": reference[role]} for name, (_, role) in zip(names, members, strict=True)]
    subjects = []
    for (run, role), (model, style) in zip(members, styled({"models": models}, PAGE), strict=True):
        css = f"var(--run{COLORS.index(style.color)})" if role == "run" else "currentColor"
        subjects.append(Subject(model["name"], run, role, style, css))
    return subjects


def render(subjects: Sequence[Subject], title: str) -> str:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = format_number
    trained = [subject for subject in subjects if subject.run.steps]
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        version=__version__,
        subjects=subjects,
        warnings=list(_warnings(subjects)),
        groups=_metric_groups(subjects),
        plane=_plane(subjects),
        curves=_curves(trained),
        samples=_samples(subjects),
        settings=_settings([subject for subject in subjects if subject.run.config]),
        provenance=_provenance(subjects),
    )


# -------------------------------------------------------------------------------------------------------------- metrics


def _metric_groups(subjects: Sequence[Subject]) -> list[tuple[str, list[tuple[str, str, list[Any]]]]]:
    """(heading, [(label, aim, a value per subject)]) of every metric that any of them has."""
    groups: dict[str, list[tuple[str, str, list[Any]]]] = {
        "Forgetting": [],
        "Membership": [],
        "Keeping": [],
        "Cost": [],
    }
    retrained = any(subject.role == "retrained" for subject in subjects)
    present = {key for subject in subjects for key in subject.metrics}
    found = dict.fromkeys(key for subject in subjects for key in subject.metrics)
    for key in (key for key in dict.fromkeys([*AIMS, *COLUMNS, *found]) if key in present):
        group = "Keeping"
        if key.removeprefix("muse_").startswith(_MEMBERSHIP):
            group = "Membership"
        elif key.startswith(("forget_", "verbmem_", "knowmem_f")) or key == "truth_ratio":
            group = "Forgetting"
        aim = AIMS.get(key, {"Membership": _MEMBERSHIP_AIM, "Forgetting": "", "Keeping": "high"}[group])
        if group == "Forgetting" and retrained and key != "forget_quality":
            aim = "as retrained"
        label = COLUMNS.get(key, key.replace("_", " ").replace("rouge l", "ROUGE-L"))
        groups[group].append((label, aim, [subject.metrics.get(key) for subject in subjects]))
    for label, field in (("optimizer steps", None), ("training time [s]", "seconds")):
        costs = [_total(subject.run.steps, field) for subject in subjects]
        if any(cost is not None for cost in costs):
            groups["Cost"].append((label, "", costs))
    return [(heading, rows) for heading, rows in groups.items() if rows]


def _total(steps: Sequence[Mapping[str, Any]], field: str | None) -> Any:
    if not steps:
        return None
    return len(steps) if field is None else sum(as_float(step.get(field)) for step in steps)


def _warnings(subjects: Sequence[Subject]) -> Iterable[str]:
    """What a reader has to know before comparing the columns."""
    for subject in subjects:
        if subject.role == "run" and subject.run.status != "finished":
            yield f"{subject.name}: {subject.run.status}."
    for file in (EVAL_FILE, MUSE_FILE):
        evaluated = [subject for subject in subjects if file in subject.run.evaluations]
        for subject in evaluated[1:]:
            yield from _differences(evaluated[0], subject, file)


def _differences(one: Subject, other: Subject, file: str) -> Iterable[str]:
    """Why two evaluations of a kind may not be compared."""
    first, this = one.run.evaluations[file], other.run.evaluations[file]
    for name in sorted({*first.sets, *this.sets}):
        theirs, own = (stored.sets.get(name, {}).get("digest") for stored in (first, this))
        if theirs and own and theirs != own:
            yield f"{other.name} was evaluated on other rows of {name} than {one.name}: not comparable."
        elif theirs != own:
            yield f"{name}: only one of {other.name} and {one.name} was evaluated on it."
    changed = [key for key in {**first.options, **this.options} if first.options.get(key) != this.options.get(key)]
    if changed:
        yield f"{other.name} was evaluated with another {', '.join(changed)} than {one.name}."


# ------------------------------------------------------------------------------------------------------------- pictures


def _plane(subjects: Sequence[Subject]) -> dict[str, Any]:
    """The forget-quality / utility plane of those that have both; a reason where none has."""
    models = [
        {
            "name": subject.name,
            "reference": {"before": "full", "retrained": "gold"}.get(subject.role),
            "metrics": subject.metrics,
        }
        for subject in subjects
    ]
    lacking = [
        subject.name for subject in subjects if not {"forget_quality", "model_utility"} <= subject.metrics.keys()
    ]
    if len(lacking) == len(subjects):
        reason = "No model here has both: forget quality needs `unlearn eval --gold`, utility a set to be kept."
        return {"svg": None, "notes": [reason]}
    svg, notes = plane_svg({"models": models})
    if lacking:
        notes.append(f"Without both values, so not drawn: {', '.join(lacking)}")
    return {"svg": Markup(svg), "notes": notes}


def _curves(trained: Sequence[Subject]) -> list[tuple[str, Markup]]:
    """(title, picture) of each quantity that any run has."""
    found = []
    for field, title in CURVES.items():
        svg = curve_svg([(subject.style, subject.run.steps) for subject in trained], field)
        if svg is not None:
            found.append((title, Markup(svg)))
    return found


# --------------------------------------------------------------------------------------------------------------- tables


def _samples(subjects: Sequence[Subject]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(set, [question, true answer, what each subject answers]) of the rows that evaluations kept."""
    sets: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for subject in subjects:
        stored = [one.samples for one in subject.run.evaluations.values()]
        for name, rows in (item for samples in stored for item in samples.items()):
            for row in rows:
                asked = sets.setdefault(name, {}).setdefault(
                    (row["question"], row["answer"]),
                    {"question": row["question"], "answer": row["answer"], "answers": []},
                )
                asked["answers"].append((subject, row["generated"], row["probability"]))
    return [(name, list(asked.values())) for name, asked in sets.items()]


def _settings(subjects: Sequence[Subject]) -> dict[str, Any]:
    """Settings that differ between the runs, and all the others with their one value."""
    differing: list[tuple[str, list[Any]]] = []
    shared: list[tuple[str, Any]] = []
    for key in dict.fromkeys(key for subject in subjects for key in subject.run.config):
        values = [subject.run.config.get(key) for subject in subjects]
        if key in _NAMES:
            continue
        if len(subjects) > 1 and any(value != values[0] for value in values):
            differing.append((key, values))
        else:
            shared.append((key, values[0]))
    return {"subjects": subjects, "differing": differing, "shared": shared}


def _provenance(subjects: Sequence[Subject]) -> list[tuple[Subject, list[tuple[str, Any]]]]:
    """What places each subject's numbers: folder, rows, versions, device, and the same of its evaluation."""
    found = []
    for subject in subjects:
        run, rows = subject.run, []
        rows += [("folder", run.folder), ("status", run.status)]
        if run.header:
            rows.append(("rows and order (digest)", run.header["data"]))
        rows += [(f"training: {key}", value) for key, value in run.header.get("provenance", {}).items()]
        for file, stored in run.evaluations.items():
            rows += [(f"{file}: model", stored.model), (f"{file}: date", stored.date)]
            for name, one in stored.sets.items():
                rows.append((f"{file}: set {name}", f"{one['rows']} rows of {one['source']} ({one['digest']})"))
            rows += [(f"{file}: option {key}", value) for key, value in stored.options.items()]
            rows += [(f"{file}: {key}", value) for key, value in stored.provenance.items()]
        found.append((subject, rows))
    return found
