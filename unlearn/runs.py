"""Runs read back from their folders, and evaluations stored beside them: what a report is made from.

FOLDER/metrics.jsonl    what `unlearn train` wrote (unlearn.runfiles)
FOLDER/eval.json        what `unlearn eval` found of FOLDER/model: metrics, sample answers, what they were measured on
FOLDER/muse.json        the same of `unlearn muse`, without sample answers

A folder with evaluations alone is of a model that no run here made: the original, or one retrained without the forget
set.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlearn.evaluate import EvalSet, Evaluation
from unlearn.files import replacing
from unlearn.runfiles import METRICS_FILE, MODEL_FOLDER

EVAL_FILE, MUSE_FILE = "eval.json", "muse.json"
FORMAT = 1
SAMPLES = 5  # answers of each set that are kept as text
CURVES = {  # what metrics.jsonl says of every step, as a report draws it
    "forget_logprob_per_token": "Forget log-probability [nats/token]",
    "retain_logprob_per_token": "Retain log-probability [nats/token]",
    "chosen_logprob_per_token": "Log-probability of preferred answers [nats/token]",
    "loss": "Loss",
    "forget_loss": "Forget term",
    "retain_loss": "Retain term",
    "grad_norm": "Gradient norm",
    "lr": "Learning rate",
}
_HEADER = {"config": dict, "provenance": dict, "data": str, "num_steps": int}


# ---------------------------------------------------------------------------------------------------------- evaluations


@dataclass(frozen=True)
class StoredEvaluation:
    """eval.json or muse.json. metrics: as unlearn.evaluate and unlearn.muse name them. sets: name -> kind, source,
    number of rows and a digest of them. samples: set -> question, answer, generated, probability. options: what decides
    the numbers beside model and rows; nothing is drawn at random. run: names the run whose model this is, None for
    another model."""

    model: str
    metrics: dict[str, float]
    sets: dict[str, dict[str, Any]]
    samples: dict[str, list[dict[str, Any]]]
    options: dict[str, Any]
    provenance: dict[str, Any]
    date: str
    run: str | None
    format: int = FORMAT


def run_of(model: str) -> Path | None:
    """The folder of the run whose final model lies at `model`; None for any other model."""
    folder = Path(model).parent
    return folder if Path(model).name == MODEL_FOLDER and (folder / METRICS_FILE).is_file() else None


def evaluation_folder(model: str, output: str | None) -> Path | None:
    """Where an evaluation of `model` is stored: in `output`, else in the model's run, else nowhere.

    Raises ValueError for an output that is a file or that holds the run of another model.
    """
    run = run_of(model)
    if output is None:
        return run
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output: {folder} is a file; a folder is accepted")
    if (folder / METRICS_FILE).exists() and (run is None or run.resolve() != folder.resolve()):
        raise ValueError(
            f"output: {folder} holds the run of {folder / MODEL_FOLDER}; an evaluation of {model} needs another folder"
        )
    return folder


def stored_form(
    model: str,
    metrics: dict[str, float],
    sets: dict[str, dict[str, Any]],
    *,
    options: dict[str, Any],
    provenance: dict[str, Any],
    samples: dict[str, list[dict[str, Any]]] | None = None,
) -> StoredEvaluation:
    """An evaluation with what a reader needs to place its numbers. sets: name -> described_set()."""
    run = run_of(model)
    return StoredEvaluation(
        model=model,
        metrics=metrics,
        sets=sets,
        samples=samples or {},
        options=options,
        provenance=provenance,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        run=None if run is None else _run_name((run / METRICS_FILE).read_bytes().partition(b"\n")[0]),
    )


def described_set(kind: str, source: str, rows: Iterable[Any]) -> dict[str, Any]:
    """What tells a set that was measured on from another one; its rows as JSON has them."""
    digest, count = hashlib.blake2b(digest_size=8), 0
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        count += 1
    return {"kind": kind, "source": source, "rows": count, "digest": digest.hexdigest()}


def text_of(group: EvalSet) -> Iterator[list[Any]]:
    """The rows of an evaluation set for described_set(). The fields of a window hold its whole document: read for each
    of a book's windows they would be gigabytes."""
    for row in (one.row for one in group.rows):
        yield [row.turns, row.answer, None if row.document else row.fields]


def sample_answers(found: Evaluation, sets: Iterable[EvalSet]) -> dict[str, list[dict[str, Any]]]:
    """A few generated answers of each set that has some."""
    samples: dict[str, list[dict[str, Any]]] = {}
    for group in sets:
        scores = found.sets[group.name]
        if scores.generated:
            samples[group.name] = [
                {
                    "question": group.rows[i].row.turns[-1][1],
                    "answer": group.rows[i].row.answer,
                    "generated": scores.generated[i],
                    "probability": math.exp(-scores.answer_nll[i]),
                }
                for i in sample_places(len(group.rows), SAMPLES)
            ]
    return samples


def sample_places(num_rows: int, count: int) -> list[int]:
    """`count` places at even distances, one further each time: facts often come in the same order for every person."""
    if num_rows <= count:
        return list(range(num_rows))
    return sorted({min(k * num_rows // count + k, num_rows - 1) for k in range(count)})


def write_evaluation(folder: Path, stored: StoredEvaluation, *, name: str = EVAL_FILE) -> Path:
    """FOLDER/eval.json or muse.json, whole or not at all; one that was there is kept, as eval.old.json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if path.exists():
        with replacing(path.with_suffix(f".old{path.suffix}")) as temporary:
            temporary.write_bytes(path.read_bytes())
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(stored), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def read_evaluation(path: Path) -> StoredEvaluation:
    """Raises ValueError naming the file where it is no evaluation of `unlearn eval` or `unlearn muse`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        stored = StoredEvaluation(**values)
        if stored.format != FORMAT:
            raise ValueError(f"format {stored.format}; {FORMAT} is accepted")
        for part in (stored.metrics, stored.sets, stored.samples, stored.options, stored.provenance):
            if not isinstance(part, dict):
                raise ValueError(f"an object is expected where {part!r:.40} stands")
        for value in stored.metrics.values():
            _number(value)
        for described in stored.sets.values():
            if not {"kind", "source", "rows", "digest"} <= described.keys():
                raise ValueError("a set lacks a field")
        for sample in (one for group in stored.samples.values() for one in group):
            if not all(isinstance(sample.get(field), str) for field in ("question", "answer", "generated")):
                raise ValueError("a sample lacks a field")
            _number(sample["probability"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not an evaluation as `unlearn eval` and `unlearn muse` write it ({error})") from None
    return stored


# ----------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Run:
    """A folder read back. header and steps: metrics.jsonl's first line and the others, empty where there is none.
    evaluations: file name -> what it holds."""

    folder: Path
    header: dict[str, Any]
    steps: list[dict[str, Any]]
    status: str
    evaluations: dict[str, StoredEvaluation]

    @property
    def config(self) -> dict[str, Any]:
        return self.header.get("config", {})


def read_run(folder: Path) -> Run:
    """Raises ValueError in one line for a folder without a run or an evaluation, and for files that are damaged."""
    if not folder.is_dir():
        raise ValueError(f"runs: no folder {str(folder)!r}; folders of `unlearn train` and `unlearn eval` are accepted")
    metrics_path, paths = folder / METRICS_FILE, (folder / EVAL_FILE, folder / MUSE_FILE)
    evaluations = {path.name: read_evaluation(path) for path in paths if path.exists()}
    if not metrics_path.exists():
        if not evaluations:
            raise ValueError(
                f"runs: {folder} holds neither {METRICS_FILE} nor {EVAL_FILE} or {MUSE_FILE}; folders of "
                "`unlearn train`, `unlearn eval` and `unlearn muse` are accepted"
            )
        return Run(folder, {}, [], "an evaluation alone", evaluations)
    first_line, header, steps = read_metrics(metrics_path)
    status = _training_status(folder, header, steps)
    if not evaluations:
        status += "; not evaluated"
    for name, one in list(evaluations.items()):
        if one.run != _run_name(first_line):
            # made of another model that lay here: to show its numbers beside this run's curves would be wrong
            status += f"; {name} is not of this run ({one.model}, {one.date}) and is left out"
            del evaluations[name]
    return Run(folder, header, steps, status, evaluations)


def read_metrics(path: Path) -> tuple[bytes, dict[str, Any], list[dict[str, Any]]]:
    """(first line, the same as the header, a dictionary per step). A last line cut short by a kill is no step.

    Raises ValueError naming file and line of what is not as `unlearn train` writes it.
    """
    *lines, _cut = path.read_bytes().split(b"\n")
    if not lines:
        raise ValueError(f"{path}: cut short in its first line; such a run did no step")
    header = _object(lines[0], f"{path}:1")
    for name, kind in _HEADER.items():
        if not isinstance(header.get(name), kind):
            raise ValueError(f"{path}:1: not a run's header: {name} is missing or no {kind.__name__}")
    steps: list[dict[str, Any]] = []
    for number, line in enumerate(lines[1:], 2):
        row = _object(line, f"{path}:{number}")
        if row.get("step") != len(steps) + 1:
            raise ValueError(f"{path}:{number}: step {row.get('step')!r:.20} where step {len(steps) + 1} is expected")
        try:
            for name in (*CURVES, "seconds", "answer_tokens"):
                _number(row.get(name))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        steps.append(row)
    return lines[0], header, steps


def _training_status(folder: Path, header: Mapping[str, Any], steps: list[dict[str, Any]]) -> str:
    done, planned = len(steps), header["num_steps"]
    skipped = sum(bool(row.get("skipped")) for row in steps)
    text = f"unfinished: {done} of {planned} steps"
    if done == planned:
        text = "finished" if (folder / MODEL_FOLDER).is_dir() else f"all {planned} steps done, no model saved"
    return text + (f"; {skipped} steps with a non-finite loss or gradient were skipped" if skipped else "")


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:  # UnicodeDecodeError too
        raise ValueError(f"{where}: damaged, not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: damaged, a JSON object is expected")
    return value


def _number(value: Any) -> None:
    """Raises ValueError for what is no number; the strings nan, inf and -inf stand for numbers, None for none."""
    try:
        if value is not None:
            float(value)
    except (TypeError, ValueError):
        raise ValueError(f"a number is expected where {value!r:.40} stands") from None


def _run_name(first_line: bytes) -> str:
    """Names a run by its header: configuration, rows and where it ran."""
    return hashlib.blake2b(first_line, digest_size=16).hexdigest()
