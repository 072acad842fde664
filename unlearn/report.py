"""From plain results to files: a table, two pictures, everything a reader needs to judge them.

results = {
    "title": str, "settings": {...}, "provenance": {...}, "notes": [str],
    "models": [{"name": "full" | "gold" | a method's name,
                "metrics": {"forget_probability": float | None, ...},           keys as in COLUMNS, others allowed
                "trajectory": [{"step": int, "forget_logprob_per_token": float, "retain_logprob_per_token": float,
                                "forget_quality": float, "utility": float}, ...]}, ...],
    "columns": [str],                  the metrics that tables show; default: all
    "utility_axis": str,               what plane.png's utility is
    "samples": [{"question": str, "answer": str, <model name>: str, ...}, ...],
}
Only "models" and their names are required. A number that is missing or None shows as "-", NaN as "nan": a method that
failed is seen to have failed. results.json holds non-finite numbers as the strings "nan", "inf" and "-inf", because
JSON has no such numbers; the functions here read them back.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unlearn.files import replacing
from unlearn.plots import as_float, plot_logprobs, plot_plane

SIGNIFICANT_DIGITS = 3
COLUMNS = {
    "forget_probability": "forget prob.",
    "retain_probability": "retain prob.",
    "forget_rouge_l": "forget ROUGE-L",
    "retain_rouge_l": "retain ROUGE-L",
    "forget_logprob_per_token": "forget log-prob. [nats/token]",
    "retain_logprob_per_token": "retain log-prob. [nats/token]",
    "truth_ratio": "truth ratio",
    "forget_quality": "forget quality (p)",
    "model_utility": "utility",
    "retain_utility": "retain utility",
    "forget_exact_memorization": "exact memorization",
    "forget_extraction_strength": "extraction strength",
    "mia_loss_auc": "AUC, loss",
    "mia_zlib_auc": "AUC, zlib",
    "mia_min_k_auc": "AUC, min-k",
    "mia_min_k_plus_plus_auc": "AUC, min-k++",
    "mia_reference_auc": "AUC, reference model",
    "privleak": "PrivLeak [%]",
    "verbmem_f": "VerbMem, forget",
    "verbmem_f_recall": "VerbMem, forget, recall",
    "knowmem_f": "KnowMem, forget",
    "knowmem_f_recall": "KnowMem, forget, recall",
    "knowmem_r": "KnowMem, retain",
    "knowmem_r_recall": "KnowMem, retain, recall",
    "muse_mia_min_k_auc": "AUC, min-k (muse)",
    "muse_privleak": "PrivLeak (muse) [%]",
    "steps": "steps",
    "seconds": "time [s]",
    "peak_memory_mib": "memory [MiB]",
}


def format_number(value: Any, *, digits: int = SIGNIFICANT_DIGITS) -> str:
    """The number with `digits` significant digits: 0.500, 12.3, 1.23e-05; whole above 10^digits; "-" for None.

    Integers are shown whole, NaN as "nan". Text that is no number is shown as it is.
    """
    if value is None:
        return "-"
    if isinstance(value, bool | int):
        return str(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    if not math.isfinite(number) or number == 0:
        return f"{number:g}"
    # The exponent after rounding: 0.9996 is 1.00, not 1.000.
    exponent = int(f"{number:.{digits - 1}e}".partition("e")[2])
    if -4 < exponent < 7:
        return f"{number:.{max(0, digits - 1 - exponent)}f}"
    return f"{number:.{digits - 1}e}"


def markdown_table(results: Mapping[str, Any], columns: Sequence[str] | None = None) -> str:
    """One row per model, one column per metric; columns: metric keys, default those that any model has."""
    header, rows = _table(results, columns)
    align = [":--", *["--:"] * (len(header) - 1)]
    return "\n".join(_markdown_row(row) for row in (header, align, *rows))


def console_table(results: Mapping[str, Any], columns: Sequence[str] | None = None) -> str:
    """The same table as aligned plain text for a terminal; long headings stand in two lines."""
    header, rows = _table(results, columns)
    words = [_two_lines(heading) for heading in header]
    lines = [[top for top, _ in words], [bottom for _, bottom in words], *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    # Names on the left, numbers on the right of their column.
    text = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    text.insert(2, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(text)


def write_report(results: Mapping[str, Any], out_dir: str | os.PathLike[str]) -> Path:
    """Write results.json, plane.png, logprobs.png and report.md into out_dir, made if absent; returns report.md's path.

    Each file replaces its predecessor at once, report.md last: what it shows is there when it is.
    Raises ValueError if results has no models or a model has no name.
    """
    if not results.get("models"):
        raise ValueError("results['models'] is missing or empty")
    names = [model.get("name") for model in results["models"]]
    if not all(names) or len(set(names)) != len(names):
        raise ValueError(f"every model needs a name of its own, got {names}")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    plot_plane(results, out_dir / "plane.png")
    plot_logprobs(results, out_dir / "logprobs.png")
    _write_text(out_dir / "results.json", json.dumps(_plain(results), indent=1, allow_nan=False) + "\n")
    _write_text(out_dir / "report.md", _report_text(results))
    return out_dir / "report.md"


def _report_text(results: Mapping[str, Any]) -> str:
    names = [model["name"] for model in results["models"]]
    sections = [f"# {results.get('title') or 'Unlearning report'}", markdown_table(results)]
    explained = []
    if "full" in names:
        explained.append("`full` is the model before forgetting.")
    if "gold" in names:
        explained.append("`gold` was trained without the forget set: what perfect forgetting would give.")
    explained.append(
        "Forget quality is a p-value: near 1, the model cannot be told from one retrained without that set."
    )
    sections += [" ".join(explained), "![Forget quality over utility](plane.png)", "![Log-likelihoods](logprobs.png)"]
    if results.get("notes"):
        sections += ["## Notes", "\n".join(f"- {_one_line(note)}" for note in results["notes"])]
    if results.get("samples"):
        sections += ["## Sample answers", *(_sample(sample, names) for sample in results["samples"])]
    for key in ("settings", "provenance"):
        if results.get(key):
            rows = [_markdown_row([key, "value"]), _markdown_row([":--", ":--"])]
            rows += [_markdown_row([name, _setting(value)]) for name, value in _flat(results[key])]
            sections += [f"## {key.capitalize()}", "\n".join(rows)]
    return "\n\n".join(sections) + "\n"


def _table(results: Mapping[str, Any], columns: Sequence[str] | None) -> tuple[list[str], list[list[str]]]:
    """Header and rows as strings; the first column holds the models' names."""
    models = results["models"]
    columns = columns or results.get("columns")
    if columns is None:
        present = dict.fromkeys(key for model in models for key in model.get("metrics", {}))
        columns = [key for key in COLUMNS if key in present] + [key for key in present if key not in COLUMNS]
    header = ["model", *(COLUMNS.get(key, key.replace("_", " ")) for key in columns)]
    rows = [[model["name"], *(_cell(key, model.get("metrics", {}).get(key)) for key in columns)] for model in models]
    return header, rows


def _cell(key: str, value: Any) -> str:
    # The order of magnitude is all there is to say about a p-value.
    return format_number(value, digits=2 if key == "forget_quality" else SIGNIFICANT_DIGITS)


def _two_lines(heading: str) -> tuple[str, str]:
    """The heading broken at the space that makes it narrowest; a single word stands in the lower line."""
    words = heading.split()
    halves = [(" ".join(words[:i]), " ".join(words[i:])) for i in range(max(1, len(words)))]
    return min(halves, key=lambda lines: max(map(len, lines)))


def _sample(sample: Mapping[str, Any], names: Iterable[str]) -> str:
    rows = [
        ("", _verbatim(sample.get("question", ""))),
        (":--", ":--"),
        ("true answer", _verbatim(sample.get("answer", ""))),
    ]
    rows += [(name, _verbatim(sample[name]) or "(empty)") for name in names if name in sample]
    return "\n".join(f"| {name} | {text} |" for name, text in rows)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested dicts as rows with dotted names."""
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value))
    return rows


def _setting(value: Any) -> str:
    # Settings are shown exactly: 1e-05 and not a rounded number.
    return str(value) if isinstance(value, str | int | float) else json.dumps(_plain(value))


def _markdown_row(cells: Iterable[Any]) -> str:
    return f"| {' | '.join(_one_line(cell) for cell in cells)} |"


def _one_line(text: Any) -> str:
    """Text that stays in its table cell or list item."""
    return " ".join(str(text).replace("|", "\\|").split())


def _verbatim(text: Any) -> str:
    """Text shown as it is, on one line, markup included: what a damaged model writes may hold anything."""
    return " ".join(re.sub(r"([\\`*_\[\]|<~&])", r"\\\1", str(text)).split())


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: numpy scalars become numbers, paths text, non-finite numbers their names."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays, without importing numpy
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(as_float(value))
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
