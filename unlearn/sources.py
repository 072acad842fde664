"""From a source's name to its rows as dictionaries: files of JSON, CSV, Parquet and plain text; data sets of the hub.

Each row comes with the words that name it in messages ('file:line') and a key. Nothing is dropped: a row that cannot be
read is a ValueError of one line with file, line and reason. A file is data and nothing else: what it holds is never
taken for a path, a module or a program, so no other file than those that the source names is opened.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

TOFU_REPOSITORY = "locuslab/TOFU"
MUSE_REPOSITORIES = {"news": "muse-bench/MUSE-News", "books": "muse-bench/MUSE-Books"}
ACCEPTED = (
    "a file (.jsonl, .json, .csv, .tsv, .parquet, .txt), a folder of .txt files, a glob, tofu:SPLIT"
    " or muse:CORPUS/SUBSET/SPLIT is accepted"
)
# Files of rows with columns; any other name is one of plain text.
TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
# What a row can have under a name of its own (--fields), and the sets whose names may stand before it.
FIELD_NAMES = (
    "question", "answer", "prompt", "completion", "messages", "text", "key", "alternates", "perturbed_answer",
    "paraphrased_answer",
)  # fmt: skip
SET_NAMES = (
    "forget", "retain", "alternates", "holdout", "real_authors", "world_facts", "verbmem", "forget_qa", "retain_qa",
    "forget_shots", "retain_shots",
)  # fmt: skip
# A row's form is told by these; naming one of them in --fields decides it.
FORMS = ("messages", "question", "prompt", "text")


class Found(NamedTuple):
    """A row as its source has it. `where` names it in messages, `key` in results, unless the row has a key itself."""

    fields: dict[str, Any]
    where: str
    key: str
    is_text_file: bool = False


def read(source: str, *, role: str) -> list[Found]:
    """The rows of a source; `role` names the option in messages. Raises ValueError in one line."""
    if source.startswith("tofu:"):
        return _hub_rows(source, role, TOFU_REPOSITORY, source.removeprefix("tofu:"), "train")
    if source.startswith("muse:"):
        return _muse_rows(source, role)
    path = Path(source)
    if os.path.isfile(path):  # Path.is_file raises for a name that is too long
        return _read_file(path, path.name)
    if os.path.isdir(path):
        return [row for file in _documents(path, role) for row in _read_file(file, str(file.relative_to(path)))]
    if glob.has_magic(source):
        files = sorted(name for name in glob.glob(source, recursive=True) if os.path.isfile(name))
        if files:
            return [row for name in files for row in _read_file(Path(name), name)]
    raise ValueError(f"{role}: no file {source!r}; {ACCEPTED}")


def parse_fields(text: str | None) -> dict[str, dict[str, str]]:
    """'question=ask,retain.text=body' -> the columns of every set under '' and those of one set under its name.

    Raises ValueError naming the part that cannot be used.
    """
    columns: dict[str, dict[str, str]] = {}
    for part in text.split(",") if text else ():
        target, equals, column = part.partition("=")
        group, _, name = target.strip().rpartition(".")
        if not equals or not column.strip():
            raise ValueError(f"fields: {part!r} is not accepted; NAME=COLUMN,... or SET.NAME=COLUMN,... is")
        if name not in FIELD_NAMES:
            raise ValueError(f"fields: {name!r} is no name of a field; {', '.join(FIELD_NAMES)} are")
        if group and group not in SET_NAMES:
            raise ValueError(f"fields: {group!r} is no set; {', '.join(SET_NAMES)} are")
        if name in columns.setdefault(group, {}):
            raise ValueError(f"fields: {target.strip()} is given twice")
        columns[group][name] = column.strip()
    return columns


def renamed(found: Found, columns: dict[str, str]) -> Found:
    """The row with its own columns under the names that are read. A column that it lacks is a ValueError."""
    fields = dict(found.fields)
    for name, column in columns.items():
        if column not in found.fields:
            raise ValueError(f"{found.where}: no {column!r}, which fields has for {name}; this row has {names(fields)}")
    if any(form in columns for form in FORMS):
        fields = {name: value for name, value in fields.items() if name not in FORMS}
    return found._replace(fields=fields | {name: found.fields[column] for name, column in columns.items()})


def names(fields: dict[str, Any]) -> str:
    """The names of a row's fields for a message of one line, whatever they are."""
    shown = [name if name.isprintable() and 0 < len(name) <= 40 else f"{name!r:.40}" for name in list(fields)[:12]]
    return (", ".join(shown) + (", ..." if len(fields) > 12 else "")) or "no fields"


# ------------------------------------------------------------------------------------------------------------ files


def _documents(folder: Path, role: str) -> list[Path]:
    """The .txt files of a folder and those below it. A file that is none would be left out, so it is refused."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    visible = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    for path in visible:
        if path.suffix.lower() != ".txt":
            raise ValueError(
                f"{role}: {path} in the folder is no .txt file; a glob such as '{folder}/**/*.txt' leaves it out"
            )
    if not visible:
        raise ValueError(f"{role}: {folder} has no .txt file; {ACCEPTED}")
    return visible


def _read_file(path: Path, name: str) -> list[Found]:
    """`name` begins the keys of the file's rows; of a file of rows it loses its suffix."""
    suffix = path.suffix.lower()
    # a file name need not be text, a key has to be
    name = name.encode("utf-8", "backslashreplace").decode()
    if suffix == ".txt":
        return [Found({"text": read_text(path)}, f"{path}:1", name, is_text_file=True)]
    if suffix in (".csv", ".tsv"):
        found = _read_csv(path, delimiter="\t" if suffix == ".tsv" else ",")
    elif suffix == ".parquet":
        found = _read_parquet(path)
    else:
        found = _read_json(path)
    stem = name[: len(name) - len(path.suffix)]
    return [Found(fields, where, f"{stem}:{index}") for index, (fields, where) in enumerate(found)]


def read_text(path: Path, *, newlines: bool = True) -> str:
    """A whole text file. newlines: \\r\\n and \\r become \\n. Raises ValueError where the file is not UTF-8."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8 text ({error.reason} at byte {error.start} of the file)") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n") if newlines else text


def read_lines(path: Path) -> list[tuple[str, str]]:
    """The lines of a text file, each after its 'file:line' for messages. Raises ValueError where it is not UTF-8."""
    return [(f"{path}:{number}", line) for number, line in enumerate(read_text(path).split("\n"), 1)]


def read_json_lines(path: Path) -> list[tuple[dict[str, Any], str]]:
    """The objects of a JSON-lines file, each with 'file:line' for messages. Blank lines are allowed."""
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    rows = []
    for number, (where, line) in enumerate(read_lines(path), 1):
        if line.strip():
            with _one_line(path, number, before=number - 1):
                value = decoder.decode(line)
            rows.append((_expect_object(value, where), where))
    return rows


def _read_json(path: Path) -> list[tuple[dict[str, Any], str]]:
    """JSON lines, or one JSON array of objects where a .json file begins as one."""
    if path.suffix.lower() != ".json":
        return read_json_lines(path)
    text = read_text(path)
    begin = _after_space(text, 0)
    return _read_array(path, text, begin + 1) if text[begin : begin + 1] == "[" else read_json_lines(path)


def _read_array(path: Path, text: str, position: int) -> list[tuple[dict[str, Any], str]]:
    """The objects of the array that goes on at `position`, each with the line that it begins in."""
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    rows: list[tuple[dict[str, Any], str]] = []
    line, counted = 1, 0
    after = ","
    while after == ",":
        position = _after_space(text, position)
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]" and not rows:
            after = "]"
        else:
            with _one_line(path, line, before=0):
                value, position = decoder.raw_decode(text, position)
            rows.append((_expect_object(value, f"{path}:{line}"), f"{path}:{line}"))
            position = _after_space(text, position)
            after = text[position : position + 1]
        position += 1
    if after != "]" or text[position:].strip():
        line += text.count("\n", counted, position)
        reason = "there is more after the array's ]" if after == "]" else "a comma or ] is missing"
        raise ValueError(f"{path}:{line}: not JSON: {reason}")
    return rows


def _after_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\n":
        position += 1
    return position


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json would keep the last of two equal keys and drop the other without a word."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r:.40} is there twice")
    return fields


def _expect_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: a JSON object is accepted, this is a {type(value).__name__}")
    return value


@contextmanager
def _one_line(path: Path, line: int, *, before: int) -> Iterator[None]:
    """What the JSON decoder says, after the file and the line: its own line after `before` others, where it has one."""
    try:
        yield
    except json.JSONDecodeError as error:
        where = f"{path}:{before + error.lineno}"
        raise ValueError(
            f"{where}: not JSON: {error.msg} at column {error.colno}; one object per line is accepted"
        ) from None
    except RecursionError:
        raise ValueError(f"{path}:{line}: nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits; a key that is there twice
        raise ValueError(f"{path}:{line}: {str(error).partition(';')[0]}") from None


def _read_csv(path: Path, *, delimiter: str) -> list[tuple[dict[str, Any], str]]:
    """A table whose first line names the columns; every value is a string. Blank lines are allowed."""
    text = read_text(path, newlines=False)
    rows: list[tuple[dict[str, Any], str]] = []
    header: list[str] | None = None
    # the module's limit of 128 KiB is less than a document
    limit = csv.field_size_limit(2**31 - 1)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        while True:
            where = f"{path}:{reader.line_num + 1}"
            try:
                cells = next(reader)
            except StopIteration:
                return rows
            except csv.Error as error:
                raise ValueError(f"{where}: not a row of a table: {error}") from None
            if not cells:
                continue
            if header is None:
                header = cells
                twice = [name for index, name in enumerate(header) if name in header[:index]]
                if twice:
                    raise ValueError(f"{where}: two columns are named {twice[0]!r:.40}")
            elif len(cells) != len(header):
                raise ValueError(f"{where}: {len(cells)} cells, the header has {len(header)}")
            else:
                rows.append((dict(zip(header, cells, strict=True)), where))
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path) -> list[tuple[dict[str, Any], str]]:
    """The columns that have a counterpart in JSON; null is no value."""
    import pyarrow
    import pyarrow.parquet

    rows: list[tuple[dict[str, Any], str]] = []
    try:
        # an open file, not its name: a name can be a URL to pyarrow
        with path.open("rb") as file:
            table = pyarrow.parquet.ParquetFile(file)
            schema = table.schema_arrow
            if len(set(schema.names)) < len(schema.names):
                twice = next(name for name in schema.names if schema.names.count(name) > 1)
                raise ValueError(f"two columns are named {twice!r:.40}")
            columns = [field.name for field in schema if _plain(field.type)]
            for batch in table.iter_batches(columns=columns):
                for values in _values(batch, path, len(rows)):
                    found = {name: value for name, value in values.items() if value is not None}
                    rows.append((found, f"{path} row {len(rows)}"))
    except _BadRow as error:
        raise ValueError(str(error)) from None
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a Parquet file that can be read: {reason}") from None
    return rows


class _BadRow(ValueError):
    """A row of a good Parquet file."""


def _values(batch: Any, path: Path, first: int) -> list[dict[str, Any]]:
    """pyarrow does not check that strings are UTF-8 before it makes them; the row that is not is named."""
    try:
        return list(batch.to_pylist())
    except ValueError:
        for index in range(len(batch)):
            try:
                batch.slice(index, 1).to_pylist()
            except ValueError as error:
                raise _BadRow(f"{path} row {first + index}: {error}") from None
        raise


def _plain(kind: Any) -> bool:
    """Whether JSON has this type: strings, numbers, booleans, and lists and structures of them."""
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
        return _plain(kind.value_type)
    if types.is_struct(kind):
        return all(_plain(kind.field(index).type) for index in range(kind.num_fields))
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_integer, types.is_floating,
             types.is_boolean, types.is_null)  # fmt: skip
    return any(test(kind) for test in tests)


# ------------------------------------------------------------------------------------------------------------- hub


def _muse_rows(source: str, role: str) -> list[Found]:
    corpus, *place = source.removeprefix("muse:").split("/")
    if corpus not in MUSE_REPOSITORIES or len(place) != 2 or not all(place):
        raise ValueError(
            f"{role}: {source!r} is not accepted; muse:CORPUS/SUBSET/SPLIT is, with the corpus news or books,"
            " such as muse:news/raw/forget, muse:news/raw/retain1 or muse:books/knowmem/forget_qa"
        )
    found = _hub_rows(source, role, MUSE_REPOSITORIES[corpus], *place)
    # MUSE calls the true continuation gt
    return [row._replace(fields={{"gt": "completion"}.get(k, k): v for k, v in row.fields.items()}) for row in found]


def _hub_rows(source: str, role: str, repository: str, subset: str, split: str) -> list[Found]:
    """A data set of the hub by name. `datasets` runs no loading script since its version 4."""
    import datasets
    from huggingface_hub.utils import logging

    # its retries where there is no network would stand before the one line below
    if "HF_HUB_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()
    try:
        rows = list(datasets.load_dataset(repository, subset, split=split))
    except Exception as error:  # the hub's client raises many kinds; the user needs one line and the way out
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{role}: could not load {source!r} from the hub's {repository} ({reason});"
            f" a local file such as DIR/{subset if split == 'train' else split}.json works too"
        ) from None
    return [Found(dict(row), f"{source} row {index}", f"{source}:{index}") for index, row in enumerate(rows)]
