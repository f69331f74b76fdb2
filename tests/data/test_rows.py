"""Rows of files: text is text, and what does not follow its format is one line that says where and what to do.

Each file is read twice: by name, and as a local folder of the source "hub". Both follow one rule.
"""

import csv
import datetime
import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from train_loop.config.schema import DataConfig
from train_loop.data.corpus import Corpus
from train_loop.data.sources import files, hub
from train_loop.data.sources.rows import read_csv
from train_loop.errors import InputError


def read(path: Path, source: str, **more: Any) -> list[str]:
    where = {"files": [str(path)]} if source == "files" else {"name": str(path.parent)}
    return [document.text for _, document in Corpus(DataConfig(source=source, **where, **more)).splits()]


def parquet_bytes(columns: Any) -> bytes:
    file = io.BytesIO()
    parquet.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), file)
    return file.getvalue()


WHOLE = parquet_bytes({"text": ["a", "b"]})
NOT_UTF8 = pa.Array.from_buffers(
    pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
)
DEEP = b"[" * 100_000 + b"]" * 100_000

READ: list[tuple[str, bytes, list[str]]] = [
    (
        "a.csv",
        b"text,n\nNA,1\nnull,2\nNone,3\nnan,4\n007,5\n1.0,6\n,7\n",
        ["NA", "null", "None", "nan", "007", "1.0", ""],
    ),
    ("a.csv", b"text,n\n2020-01-01,1\n", ["2020-01-01"]),
    ("a.csv", b'\xef\xbb\xbf"text","n"\r\n"one, two","1"\r\n"x\r\n\r\n""y""","2"', ["one, two", 'x\r\n\r\n"y"']),
    ("a.csv", b'text\n"a\rb"\n', ["a\rb"]),
    ("a.csv", b"\ntext,n\n\na,1\n\n\nb,2\n\n", ["a", "b"]),
    ("a.csv", b",text\n0,a\n1,b\n", ["a", "b"]),  # as pandas writes it, with its index
    ("a.csv", b"text,n\na\0b,1\n", ["a\0b"]),
    ("a.csv", b'a.b,text\nx,"1;2"\n', ["1;2"]),
    ("a.tsv", b'n\ttext\n1\t"a ""b"" c"\n2\td,e\n', ['a "b" c', "d,e"]),
    ("a.jsonl", b'{"text": "2009-01-01T00:00:00Z"}\n{"text": "2010-01-01"}\n', ["2009-01-01T00:00:00Z", "2010-01-01"]),
    ("a.jsonl", b'{"text": "\\ud83e\\udd9c"}\n', ["🦜"]),
    ("a.jsonl", b'{"text": "a", "x": NaN, "y": -Infinity, "z": "\\ud800"}\n', ["a"]),
    ("a.jsonl", b'{"text": "a", "x": 1, "x": 2, "n": ' + b"1" * 5000 + b"}\n", ["a"]),
    ("a.jsonl", b'{"text": null}\n{"text": "a"}\n', ["", "a"]),
    ("a.jsonl", b'{"text": ["a", null, "b"]}\n', ["a b"]),
    ("a.json", b'\xef\xbb\xbf[{"text": "a"},\n {"text": "b"}]', ["a", "b"]),
    ("a.parquet", parquet_bytes({"text": pa.array(["a", "b", None]).dictionary_encode()}), ["a", "b", ""]),
    ("a.parquet", parquet_bytes({"text": pa.array(["a"], pa.large_string()), "n": [1]}), ["a"]),
    ("a.parquet", parquet_bytes({"text": pa.array([], pa.string())}), []),
]


@pytest.mark.parametrize("source", ["files", "hub"])
@pytest.mark.parametrize(("name", "content", "expected"), READ)
def test_text_is_text(tmp_path: Path, source: str, name: str, content: bytes, expected: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name, source) == expected


REFUSED: list[tuple[str, bytes, str]] = [
    ("a.csv", b"text,n\na,1\nb,c,2\n", "line 3: 3 cells, but the header has 2; a cell with commas"),
    ("a.csv", b"text,n\na\n", "line 2: 1 cells, but the header has 2"),
    ("a.csv", b'text,n\n"x\ny",1\nb\n', "line 4: 1 cells"),
    ("a.csv", b'text,n\na,1\n"b,2\nc,3\nd,4\n', "line 3: a quote opens here and never closes; close it"),
    ("a.csv", b'text,n\na,1\n"b,2\n"c",3\n', "line 4: text after the closing quote of a cell, which began in line 3;"),
    ("a.csv", b'text,n\n"a"b,1\n', "line 2: text after the closing quote of a cell; write a quote inside a cell twice"),
    (
        "a.csv",
        b'text,n\na "b" c,1\n',
        "line 2: a quote inside a cell that does not begin with one; put the whole cell in",
    ),
    ("a.csv", b'n,text\n1, "b, c"\n', "line 2: a quote inside a cell that does not begin with one"),
    ("a.csv", b"text,n\ra,1\rb,2\r", r"line 1: a carriage return without a line feed; end lines with \n or \r\n"),
    ("a.csv", b"text,text\na,b\n", "line 1: the header names text 2 times"),
    ("a.csv", b"hello there,1\nb,2\n", "a.csv, line 1 (the header): no field text; valid here: hello there, 1"),
    ("a.csv", b"id;text\n1;a\n", "seem to be separated by semicolons, but .csv means commas; write it with commas"),
    ("a.csv", b"id\ttext\n1\ta\n", "seem to be separated by tabs, but .csv means commas; name the file .tsv"),
    ("a.tsv", b"id,text\n1,a\n", "seem to be separated by commas, but .tsv means tabs; name the file .csv"),
    ("a.csv", "text\nä\n".encode("latin1"), "a.csv: not UTF-8 at byte 5 (value 0xe4); convert the file"),
    ("a.csv", "text\na\n".encode("utf-16"), "a.csv: is UTF-16; convert it with iconv"),
    ("a.jsonl", b'{"text": "a"}\n{"txt": "a"}\n', "a.jsonl, line 2: no field text; did you mean txt?"),
    ("a.jsonl", b'{"text": "a"}\n{}\n', "a.jsonl, line 2: no field text; the row is an empty object"),
    (
        "a.jsonl",
        b'{"text": "ab\\ud800c"}\n',
        r"a.jsonl, line 1: character 3 of the text is \ud800, half of a surrogate",
    ),
    ("a.jsonl", b'{"text": "a", "text": "b"}\n', "line 1: an object has the field text 2 times; keep one of them"),
    ("a.jsonl", b'{"text": NaN}\n', "line 1: field text holds a float, expected text"),
    ("a.jsonl", b'{"text": {"a": "b"}}\n', "line 1: field text holds a dict, expected text"),
    ("a.jsonl", b"null\n", "line 1: no field text; the row is null, expected an object with named fields"),
    ("a.json", b'["a", "b"]', "row 1: no field text; the row is a str, expected an object with named fields"),
    (
        "a.jsonl",
        b'{\n "text": "a"\n}\n',
        "line 1: an object over several lines; write one object per line, e.g. with jq -c .",
    ),
    ("a.json", b'{"data":\n[{"text": "a"}]}', "an object over several lines; its field data holds the rows"),
    ("a.json", b'{"data": [{"text": "a"}]}', "one object for the whole file; its field data holds the rows"),
    (
        "a.jsonl",
        b'{"text": "a"}{"text": "b"}\n',
        "line 1, column 14: another value after the end of the first; expected",
    ),
    ("a.jsonl", b'{"text": "a"},\n{"text": "b"}\n', "line 1, column 14: ',' after the end of the first; expected one"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "b",}\n', "line 2, column 14: not valid JSON"),
    ("a.jsonl", b'{"text": "a", "x": ' + DEEP + b"}\n", "line 1: nested too deeply to be read"),
    ("a.json", DEEP, "nested too deeply to be read"),
    ("a.json", b"<html>404</html>", "a.json: is a web page, perhaps a server's error message; download it again"),
    ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "a.parquet: is a Git LFS pointer"),
    ("a.parquet", WHOLE[:-20], "a.parquet: not valid Parquet"),
    ("a.parquet", WHOLE[:8] + b"\xff" * 40 + WHOLE[48:], "a.parquet: not valid Parquet"),
    ("a.parquet", b"PARE" + WHOLE[4:-4] + b"PARE", "a.parquet: not valid Parquet"),
    ("a.parquet", parquet_bytes({"text": [b"a"]}), "row 1: field text holds a bytes, expected text"),
    (
        "a.parquet",
        parquet_bytes({"text": [datetime.date(2020, 1, 1)]}),
        "row 1: field text holds a date, expected text",
    ),
    ("a.parquet", parquet_bytes({"text": NOT_UTF8}), "a.parquet, row 2: not UTF-8"),
    ("a.parquet", parquet_bytes({"m": [[{"text": "a"}]]}), "a.parquet: no field text; did you mean m.text?"),
    ("a.parquet", parquet_bytes(pa.Table.from_arrays([pa.array(["a"])] * 2, ["text"] * 2)), "2 columns are named text"),
]


@pytest.mark.parametrize("source", ["files", "hub"])
@pytest.mark.parametrize(("name", "content", "expected"), REFUSED)
def test_what_is_wrong_is_named_with_its_place(
    tmp_path: Path, source: str, name: str, content: bytes, expected: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=r"^[^\n]*$") as error:
        read(tmp_path / name, source)
    assert expected in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'["a", "b"]\n', "line 1: an array in place of a row; one object per line is expected"),
        (b'[{"text": "a"}, {"text": "b"}]\n', "line 1: an array in place of a row"),
        (b'[\n{"text": "a"}\n]\n', "line 1: an array over several lines; name the file .json, or write one object"),
    ],
)
def test_an_array_in_place_of_lines(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(InputError) as error:
        read(tmp_path / "a.jsonl", "files")
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("row", "field", "expected"),
    [
        ({"m": [{"text": "a"}, {"txt": "b"}]}, "m.text", "no field m.text; a record in m lacks it; write null"),
        ({"m": ["a", "b"]}, "m.text", "no field m.text; m holds a list without named fields"),
        ({"m": [["a"]]}, "m.text", "no field m.text"),
    ],
)
def test_a_record_that_lacks_the_field(tmp_path: Path, row: Any, field: str, expected: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(InputError) as error:
        read(tmp_path / "a.jsonl", "files", text_field=field)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"), [("a.csv", b"a.b,n\nx,1\n"), ("a.parquet", parquet_bytes({"a.b": ["x"]}))]
)
@pytest.mark.parametrize("source", ["files", "hub"])
def test_a_column_whose_name_has_a_dot(tmp_path: Path, source: str, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name, source, text_field="a.b") == ["x"]


TEXT = st.text(st.sampled_from('a,"\r\n\t ;ü\0'), max_size=6)


@given(rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), end=st.sampled_from(["\n", "\r\n"]))
def test_what_csv_writes_is_read_back(tmp_path_factory: pytest.TempPathFactory, rows: Any, end: str) -> None:
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator=end, quoting=csv.QUOTE_ALL)
        writer.writerows([("n", "text"), *rows])
    assert [row["text"] for _, row in read_csv(str(path), "text")] == [text for _, text in rows]


@given(content=st.text(st.sampled_from('ab,"\n'), max_size=12))
def test_csv_is_rfc_4180_or_refused(tmp_path_factory: pytest.TempPathFactory, content: str) -> None:
    """What is read, written with as many quotes as needed, says the same; nothing is dropped and nothing filled in."""
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_text("text,n\n" + content, encoding="utf-8", newline="")
    try:
        found = [row["text"] for _, row in read_csv(str(path), "text")]
    except InputError:
        return
    strict = [row for row in csv.reader(io.StringIO(content, newline=""), strict=True) if row]
    assert found == [text for text, _ in strict]  # fails for a row that has not exactly two cells
    quotes = sum(cell.count('"') for row in strict for cell in row)
    assert content.count('"') >= 2 * quotes and content.count('"') % 2 == 0


# ---- folders that datasets looks at ----


def test_a_compressed_table_in_a_folder_is_named_as_it_lies_there(tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"text,n\nNA,1\nb\n"))
    with pytest.raises(InputError, match=r"a\.csv\.gz: line 3: 1 cells"):
        read(tmp_path / "a.csv.gz", "hub")


def test_a_file_of_several_that_lacks_the_column_is_named(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "train-0.parquet")
    parquet.write_table(pa.table({"n": [1]}), tmp_path / "train-1.parquet")
    with pytest.raises(InputError, match=r"train-1.parquet: no field text; valid here: n"):
        read(tmp_path / "train-0.parquet", "hub")


def test_a_line_of_text_is_a_row_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_bytes(b"\xef\xbb\xbfone\n\ntwo \r\nthree\rfour")
    assert sorted(read(tmp_path / "train.txt", "hub")) == ["", "one", "three\rfour", "two "]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_table_with_settings_of_its_own_is_still_text(tmp_path: Path, streaming: bool) -> None:
    """Settings that only `datasets` knows: then it reads, but it may not guess."""
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: a.csv\n  skiprows: 1\n---\n", encoding="utf-8"
    )
    (tmp_path / "a.csv").write_text("a comment\ntext,n\nNA,1\n007,2\nnull,3\n", encoding="utf-8")
    assert sorted(read(tmp_path / "a.csv", "hub", streaming=streaming)) == ["007", "NA", "null"]


def test_a_download_of_csv_is_read_as_strictly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with a cell too many would shift the columns: the first would be taken for an index."""
    monkeypatch.setattr(hub, "_is_local", lambda data: False)  # as for a name on the Hub
    (tmp_path / "a.csv").write_text("text,n\nNA,1\nb,2\n", encoding="utf-8")
    data = DataConfig(source="hub", name=str(tmp_path), test_size=0.01)
    assert [document.text for _, document in Corpus(data).splits()] == ["NA", "b"]
    (tmp_path / "a.csv").write_text("text,n\na,b,1\nc,d,2\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"a.csv: line 2: 3 cells"):
        list(Corpus(data).splits())


def arrow_file(path: Path, columns: Any) -> None:
    table = pa.table(columns)
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.arrow", b"no Arrow at all", "a.arrow|File is too small|not an Arrow"),
        ("a.arrow", b"version https://git-lfs.github.com/spec/v1\n", "a.arrow is a Git LFS pointer"),
        ("a.tar", b"no archive", "ReadError"),
        ("a.zip", b"PK\x03\x04no archive", "BadZipFile"),
        ("a.py", b"pass", "data files found"),
        ("README.md", b"---\nconfigs: [\n---\n", "ParserError"),
    ],
)
def test_errors_of_datasets_say_their_cause(
    tmp_path: Path, streaming: bool, name: str, content: bytes, expected: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=expected) as error:
        read(tmp_path / name, "hub", streaming=streaming)
    assert "\n" not in str(error.value) and "An error occurred while generating" not in str(error.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_type_that_changes_while_reading_is_one_line(tmp_path: Path, streaming: bool) -> None:
    arrow_file(tmp_path / "train-0.arrow", {"text": ["a"]})
    arrow_file(tmp_path / "train-1.arrow", {"text": [{"a": 1}]})
    with pytest.raises(InputError, match=r"^[^\n]*split train: [^\n]*cast[^\n]*$") as error:
        read(tmp_path / "train-0.arrow", "hub", streaming=streaming)
    assert "An error occurred while generating" not in str(error.value)


# ---- names of files ----


def test_a_file_with_several_names_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one", encoding="utf-8")
    (tmp_path / "link.txt").symlink_to("a.txt")
    (tmp_path / "hard.txt").hardlink_to(tmp_path / "a.txt")
    monkeypatch.chdir(tmp_path)
    names = ["./a.txt", "a.txt", str(tmp_path / "a.txt"), "link.txt", "*.txt"]
    assert files.expand(names) == ["./a.txt"]


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(InputError, match=r"pipe.txt: is no regular file"):
        files.expand([str(tmp_path / "pipe.txt")])
    (tmp_path / "broken.txt").symlink_to("nowhere")
    (tmp_path / "pipe.txt").unlink()
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    for pattern in ("broken.txt", "*.txt"):  # also among others, which would be read
        with pytest.raises(InputError, match=r"^data.validation_files: .*broken.txt: is a link to nothing"):
            files.expand([str(tmp_path / pattern)], "data.validation_files")


def test_files_of_another_kind_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "read"}\n')
    (tmp_path / "c.csv").write_text("text\nnot read\n")
    (tmp_path / "README.md").write_text("# no data\n")
    data = DataConfig(source="hub", name=str(tmp_path))
    assert [document.blocks for document in hub.documents(data, "train")] == [("read",), ("read",)]
    assert f"1 files in it are not read, e.g. {tmp_path}/c.csv" in capsys.readouterr().err
