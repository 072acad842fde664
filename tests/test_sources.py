"""Whatever a file holds, its rows come out whole and in order, or one line says which row cannot be used and why."""

import csv
import io
import json
import os
import re
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unlearn.data import load_rows
from unlearn.sources import FIELD_NAMES, parse_fields, read

FORMATS = ("rows.jsonl", "rows.json", "rows.csv", "rows.tsv", "rows.parquet", "rows.txt")
# one folder for every example of a test: the file is written anew each time
fuzzed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_csv(path, header, rows, **dialect):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, **dialect).writerows([header, *rows])
    return str(path)


def write_parquet(path, columns, **kwargs):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **kwargs)
    return str(path)


def refusal(source, **kwargs):
    with pytest.raises(ValueError) as caught:
        load_rows(str(source), role="forget", **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------- formats


def test_the_same_rows_from_every_format(tmp_path):
    rows = [
        {"question": 'Who said "so, what?"', "answer": "Mara\nQuill"},
        {"question": "caf\u00e9 \u2028 \U0001f600?", "answer": " , "},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    write_csv(tmp_path / "rows.csv", list(rows[0]), [list(row.values()) for row in rows])
    write_csv(tmp_path / "rows.tsv", list(rows[0]), [list(row.values()) for row in rows], dialect="excel-tab")
    write_parquet(tmp_path / "rows.parquet", {name: [row[name] for row in rows] for name in rows[0]})
    for name in FORMATS[:-1]:
        found = load_rows(str(tmp_path / name), role="forget")
        assert [(row.turns[0][1], row.answer) for row in found] == [tuple(row.values()) for row in rows], name
        assert [row.key for row in found] == ["rows:0", "rows:1"] and not found[0].document


def test_rows_of_a_json_array_are_named_by_their_line(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('\n[\n {"text": "a"},\n {"text":\n  "b"}, {"text": " "}\n]\n')
    assert refusal(path) == f"{path}:5: the document is empty"
    assert [row.where for row in read_two(path, '[{"text": "a"},\n\n{"text": "b"}]')] == [f"{path}:1", f"{path}:3"]
    for text, message in (
        ('[{"text": "a"}\n {"text": "b"}]', ":2: not JSON: a comma or ] is missing"),
        ('[{"text": "a"}', ":1: not JSON: a comma or ] is missing"),
        ('[{"text": "a"}]\n{"text": "b"}', "not JSON: there is more after the array's ]"),
        ('[{"text": "a"},\n]', ":2: not JSON: Expecting value at column 1"),
        ('[{"text": "a"},\n{"text": \n oops}]', ":3: not JSON: Expecting value at column 2"),
        ('[{"text": "a"},\n"b"]', ":2: a JSON object is accepted, this is a str"),
        ("[]", "holds no rows"),
        ("[", "not JSON"),
    ):
        path.write_text(text)
        assert message in refusal(path), text


def read_two(path, text):
    path.write_text(text)
    found = read(str(path), role="forget")
    assert [one.fields["text"] for one in found] == ["a", "b"]
    return found


def test_cells_of_a_csv(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'\xef\xbb\xbfquestion,answer\r\n\r\n"a\r\nb","say ""x"""\r\nc,' + b"d" * 200_000 + b"\r\n")
    one, two = load_rows(str(path), role="forget")
    assert one.turns[0][1] == "a\r\nb" and one.answer == 'say "x"' and len(two.answer) == 200_000
    assert csv.field_size_limit() == 131072  # whoever else reads CSV in this process keeps the module's limit
    for text, message in (
        ("question,answer\na,b\nc\n", "rows.csv:3: 1 cells, the header has 2"),
        ('question,answer\n"a\n\n",b\nc,d,e\n', "rows.csv:5: 3 cells, the header has 2"),
        ("question,question\na,b\n", "rows.csv:1: two columns are named 'question'"),
        ('question,answer\na,b\nc,"d\n', "rows.csv:3: not a row of a table: unexpected end of data"),
        ('question,answer\n"a"b,c\n', "rows.csv:2: not a row of a table"),
        ("question,answer\na,b\nc, \n", "rows.csv:3: answer is empty"),
        ("question;answer\na;b\n", "rows.csv:2: .*this row has question;answer"),
        ("question,answer\n", "rows.csv holds no rows"),
    ):
        path.write_text(text, newline="")
        assert re.search(message, refusal(path)), text


def test_columns_of_a_parquet_file(tmp_path):
    messages = [[{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}], None]
    path = write_parquet(
        tmp_path / "rows.parquet",
        {
            "messages": messages,
            "text": pyarrow.array([None, "A document."]).dictionary_encode(),
            "when": pyarrow.array([0, 1], pyarrow.timestamp("ns")),
            "picture": [b"\xff", None],
            "page": [None, 7],
        },
        row_group_size=1,
    )
    chat, document = load_rows(path, role="forget")
    assert chat.turns == (("user", "Hi?"),) and chat.answer == "Hello."
    assert document.document and document.fields == {"text": "A document.", "page": 7}
    json.dumps([chat.fields, document.fields])  # what `unlearn alternates` writes
    assert "rows.parquet row 1: " in refusal(write_parquet(tmp_path / "rows.parquet", {"text": ["a", None]}))
    bad = pyarrow.StringArray.from_buffers(
        2, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"a\xff")
    )
    assert "rows.parquet row 1: 'utf-8' codec" in refusal(write_parquet(tmp_path / "rows.parquet", {"text": bad}))
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "rows.parquet")
    assert "two columns are named 'text'" in refusal(tmp_path / "rows.parquet")
    (tmp_path / "rows.parquet").write_bytes(b"")
    assert "rows.parquet: not a Parquet file that can be read: " in refusal(tmp_path / "rows.parquet")


# -------------------------------------------------------------------------------------------------------- documents


def test_text_files_are_documents(tmp_path):
    (tmp_path / "docs" / "more").mkdir(parents=True)
    (tmp_path / "docs" / "b.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    (tmp_path / "docs" / "more" / "a.TXT").write_text("three")
    (tmp_path / "docs" / ".hidden").write_text("no document")
    one, two = load_rows(str(tmp_path / "docs"), role="forget")
    assert (one.key, one.answer, two.key, two.answer) == ("b.txt", "one\ntwo\n", str(Path("more/a.TXT")), "three")
    assert one.document and one.raw
    (single,) = load_rows(str(tmp_path / "docs" / "b.txt"), role="forget", fields="text=body")
    assert single == one
    found = load_rows(str(tmp_path / "**" / "*.[tT]*"), role="forget")
    assert [row.key for row in found] == [str(tmp_path / "docs" / name) for name in ("b.txt", "more/a.TXT")]
    (tmp_path / "docs" / "c.txt").write_text(" \n\n")
    assert refusal(tmp_path / "docs") == f"{tmp_path / 'docs' / 'c.txt'}:1: the document is empty"
    (tmp_path / "docs" / "c.txt").write_bytes(b"a\nb\xff")
    assert f"{tmp_path / 'docs' / 'c.txt'}:2: not UTF-8 text" in refusal(tmp_path / "docs")
    (tmp_path / "docs" / "c.txt").rename(tmp_path / "docs" / "notes.md")
    assert "notes.md in the folder is no .txt file; a glob such as" in refusal(tmp_path / "docs")
    assert "forget: no file" in refusal(tmp_path / "*.docx")


def test_a_glob_reads_files_of_rows_too(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"text": "t"}\n')
    keys = [row.key for row in load_rows(str(tmp_path / "?.jsonl"), role="forget")]
    assert keys == [f"{tmp_path / 'a'}:0", f"{tmp_path / 'b'}:0"]


# ------------------------------------------------------------------------------------------------------- own columns


def test_own_columns(tmp_path):
    path = write_csv(tmp_path / "rows.csv", ["ask", "reply", "question"], [["Who?", "Mara.", "not this"]])
    (row,) = load_rows(path, role="forget", fields="question=ask, answer=reply")
    assert row.turns == (("user", "Who?"),) and row.answer == "Mara." and row.fields["ask"] == "Who?"
    # the name that is given decides the form, whatever else the row has
    (row,) = load_rows(path, role="forget", fields="retain.text=nowhere,forget.text=reply,forget.key=ask")
    assert row.document and row.answer == "Mara." and row.key == "Who?"
    assert refusal(path, fields="answer=gold") == (
        f"{path}:2: no 'gold', which fields has for answer; this row has ask, reply, question"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question", "fields: 'question' is not accepted; NAME=COLUMN,"),
        ("question=", "fields: 'question=' is not accepted"),
        ("question=a,,answer=b", "fields: '' is not accepted"),
        ("query=a", "fields: 'query' is no name of a field; question, answer"),
        ("keep.text=a", "fields: 'keep' is no set; forget, retain"),
        ("text=a,text=b", "fields: text is given twice"),
    ],
)
def test_own_columns_that_cannot_be_read(text, message):
    with pytest.raises(ValueError) as caught:
        parse_fields(text)
    assert str(caught.value).startswith(message)


# --------------------------------------------------------------------------------------------------------------- hub


def test_names_of_the_hub_without_the_network():
    for source in ("muse:news/raw/forget", "muse:books/knowmem/retain_qa"):
        assert f"forget: could not load '{source}' from the hub's muse-bench/MUSE-" in refusal(source)
    for source in ("muse:", "muse:news", "muse:papers/raw/forget", "muse:news/raw", "muse:news/raw/"):
        assert "is not accepted; muse:CORPUS/SUBSET/SPLIT is" in refusal(source)


def test_rows_of_the_hub(monkeypatch):
    import datasets

    def load_dataset(repository, subset, *, split):
        assert (repository, subset, split) == ("muse-bench/MUSE-News", "verbmem", "forget")
        return [{"prompt": "Once", "gt": " upon"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (row,) = load_rows("muse:news/verbmem/forget", role="verbmem")
    assert row.raw and row.answer == " upon" and row.key == "muse:news/verbmem/forget:0"


# ---------------------------------------------------------------------------------------------------------- security


def test_no_other_file_is_opened(tmp_path):
    """Every string of every format names a file that exists; an audit hook sees what is opened or run."""
    secret = tmp_path / "secret.txt"
    secret.write_text("never read")
    bait = {"text": str(secret), "file_path": secret.as_uri(), "data_files": str(secret), "script": "rows.py"}
    (tmp_path / "rows.py").write_text("raise SystemExit('a loading script ran')")
    (tmp_path / "rows.jsonl").write_text(json.dumps(bait | {"_target_": "os.system", "builder_name": "rows.py"}))
    (tmp_path / "rows.json").write_text(json.dumps([bait]))
    write_csv(tmp_path / "rows.csv", list(bait), [list(bait.values())])
    write_csv(tmp_path / "rows.tsv", list(bait), [list(bait.values())], dialect="excel-tab")
    write_parquet(tmp_path / "rows.parquet", {name: [value] for name, value in bait.items()})
    (tmp_path / "rows.txt").write_text(str(secret))
    watched = ("open", "os.listdir", "os.scandir", "os.system", "subprocess.Popen", "socket.connect", "exec")
    seen = []

    def answers():
        return [load_rows(f"{tmp_path}/{name}", role="forget")[0].answer for name in FORMATS]

    assert all(answer.endswith("secret.txt") for answer in answers())  # and what that needs is imported
    reading, writing = os.pipe()
    child = os.fork()  # a hook cannot be taken away again
    if child == 0:
        try:
            sys.addaudithook(lambda event, args: seen.append([event, str(args[0])]) if event in watched else None)
            answers()
            os.write(writing, json.dumps(seen).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as found:
        assert json.load(found) == [["open", str(tmp_path / name)] for name in FORMATS]
    os.waitpid(child, 0)


# -------------------------------------------------------------------------------------------------------------- fuzz


TEXT = st.text(max_size=12)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.just("a b"), st.just(10**4200)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(TEXT, inner, max_size=2)),
    max_leaves=4,
)
NAMES = st.one_of(st.sampled_from((*FIELD_NAMES, "alternate", "sub_answer")), TEXT)
MESSAGES = st.lists(
    st.dictionaries(st.sampled_from(["role", "content"]), st.one_of(st.sampled_from(["user", "assistant"]), VALUES)),
    max_size=3,
)
OBJECTS = st.dictionaries(NAMES, st.one_of(TEXT, VALUES, MESSAGES), max_size=5)


def rows_or_one_line(path, expected=None):
    """The rows, as many as expected, or None where one line named the file and a line of it."""
    try:
        rows = load_rows(str(path), role="forget")
    except ValueError as error:
        message = str(error)
        assert len(message.splitlines()) == 1, message
        assert str(path) in message and len(message) < 3000
        number = message.partition(f"{path}:")[2].partition(":")[0]
        assert number.isdigit() or " row " in message or "holds no rows" in message or "not a Parquet" in message
        if number.isdigit():
            assert 1 <= int(number) <= 2 + path.read_bytes().count(b"\n") + path.read_bytes().count(b"\r")
        return None
    assert rows and all(row.answer.strip() and row.key.encode() is not None for row in rows)
    assert expected is None or len(rows) == expected
    return rows


@fuzzed
@given(name=st.sampled_from(FORMATS), data=st.binary(max_size=60))
def test_any_bytes(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    rows_or_one_line(path, expected=1 if name == "rows.txt" else None)


@fuzzed
@given(
    name=st.sampled_from(FORMATS[:4]),
    text=st.text(st.sampled_from('{}[]":,\\\n\r\t \0\ufeff\u2028auqestionr0-e'), max_size=60),
)
def test_any_text_that_looks_like_rows(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text.encode())
    rows_or_one_line(path)


@fuzzed
@given(values=st.lists(st.one_of(OBJECTS, OBJECTS, VALUES), min_size=1, max_size=3), array=st.booleans())
def test_any_json(tmp_path, values, array):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(values) if array else "\n".join(map(json.dumps, values)))
    rows = rows_or_one_line(path, expected=len(values))
    if rows:
        assert [row.fields for row in rows] == values or "nan" in repr(values)


@fuzzed
@given(
    cells=st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8)), min_size=1, max_size=4),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    newline=st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_any_cells(tmp_path, cells, quoting, newline):
    cells = [(f"q{i}" + ask, "a" + reply) for i, (ask, reply) in enumerate(cells)]
    if quoting == csv.QUOTE_MINIMAL:  # the writer leaves a line's end bare where it is not the one of its own rows
        cells = [tuple(re.sub("[\r\n]", " ", cell) for cell in row) for row in cells]
    buffer = io.StringIO(newline="")
    csv.writer(buffer, quoting=quoting, lineterminator=newline).writerows([("question", "answer"), *cells])
    path = tmp_path / "rows.csv"
    path.write_bytes(buffer.getvalue().encode())
    rows = rows_or_one_line(path, expected=len(cells))
    assert rows is not None and [(row.turns[0][1], row.answer) for row in rows] == cells


@fuzzed
@given(position=st.integers(0, 2000), byte=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_parquet_file(tmp_path, position, byte, cut):
    path = tmp_path / "rows.parquet"
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["first", "second"], "key": ["a", "b"]}), sink)
    data = bytearray(sink.getvalue())
    position %= len(data)
    if cut:
        del data[position:]
    data[position : position + 1] = bytes([byte])
    path.write_bytes(data)
    rows_or_one_line(path)
