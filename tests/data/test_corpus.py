"""Sources of documents, their split, and the text of a row."""

import csv
import itertools
import json
import sysconfig
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from train_loop.config.schema import DataConfig
from train_loop.data.corpus import Corpus, held_out_documents
from train_loop.data.formats import text_of
from train_loop.data.sources import files
from train_loop.data.sources.stdlib import source_files
from train_loop.data.token_store import TRAIN, VALIDATION
from train_loop.errors import InputError

ROWS = [{"id": number, "answers": {"text": [f"first {number}", "zweite ü"]}} for number in range(30)]
TEXTS = [f"first {number}|zweite ü" for number in range(30)]


def read(data: DataConfig) -> list[str]:
    return [document.text for _, document in Corpus(data).splits()]


def write_rows(folder: Path, suffix: str) -> Path:
    path = folder / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n", encoding="utf-8")
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    else:
        parquet.write_table(pa.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_nested_lists_of_text_in_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path, suffix)
    data = DataConfig(source="files", files=[str(path)], text_field="answers.text", join="|")
    assert sorted(read(data)) == sorted(TEXTS)
    assert read(data) == read(data)


def test_json_with_a_row_a_line(tmp_path: Path) -> None:
    path = write_rows(tmp_path, ".jsonl").rename(tmp_path / "rows.json")
    assert sorted(read(DataConfig(source="files", files=[str(path)], text_field="answers.text", join="|"))) == sorted(
        TEXTS
    )


def test_csv_with_line_breaks_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    texts = ["one, two", 'say "hi"\nthere', "ü"]
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["text", "n"])
        writer.writeheader()
        writer.writerows({"text": text, "n": 1} for text in texts)
    assert read(DataConfig(source="files", files=[str(path)])) == texts


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "[x].txt"):
        (tmp_path / name).write_text(f"{name}\n\nmore", encoding="utf-8")
    data = DataConfig(source="files", files=[f"{tmp_path}/?.txt", f"{tmp_path}/[x].txt"])
    assert read(data) == ["a.txt\n\nmore", "b.txt\n\nmore", "[x].txt\n\nmore"]


@pytest.mark.parametrize("block", [1, 2, 3, 5, 7, 1000])
@pytest.mark.parametrize("start", ["", "\ufeff", "\ufeff\ufeff"])
def test_a_text_file_in_blocks_is_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, start: str
) -> None:
    """Characters of 1 to 4 bytes across blocks; line ends stay; a byte-order mark goes, at the very start only."""
    monkeypatch.setattr(files, "_BLOCK_BYTES", block)
    content = "aä你🦜\r\nx\ufeffy\r🦜🦜\n"
    (tmp_path / "a.txt").write_bytes((start + content).encode())
    [(_, document)] = Corpus(DataConfig(source="files", files=[f"{tmp_path}/a.txt"])).splits()
    assert document.text == document.text == start[1:] + content  # read anew each time
    assert max(map(len, document.blocks)) <= block


@pytest.mark.parametrize("block", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize(
    "content", [b"\xff", b"good \xff", "🦜a".encode() + b"\xe4\xbd", b"ab\xf0\x9f\xa6x", b"\xef\xbb\xbfa\x80"]
)
def test_the_byte_that_is_not_utf8_is_named_across_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, content: bytes
) -> None:
    monkeypatch.setattr(files, "_BLOCK_BYTES", block)
    with pytest.raises(UnicodeDecodeError) as whole:
        content.decode("utf-8")
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(
        InputError, match=rf"not UTF-8 at byte {whole.value.start} \(value 0x{content[whole.value.start]:02x}"
    ):
        read(DataConfig(source="files", files=[f"{tmp_path}/a.txt"]))


def test_a_file_with_nothing_but_a_byte_order_mark_has_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf")
    assert read(DataConfig(source="files", files=[f"{tmp_path}/a.txt"])) == [""]


def test_validation_files_are_the_validation_side(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name, encoding="utf-8")
    data = DataConfig(source="files", files=[f"{tmp_path}/a.txt"], validation_files=[f"{tmp_path}/b.txt"])
    assert [(side, document.text) for side, document in Corpus(data).splits()] == [(TRAIN, "a"), (VALIDATION, "b")]


def test_max_documents_cuts_each_side_of_the_source(tmp_path: Path) -> None:
    path = write_rows(tmp_path, ".jsonl")
    data = DataConfig(source="files", files=[str(path)], text_field="answers.text", join="|", max_documents=7)
    assert sorted(read(data)) == sorted(TEXTS[:7])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_stands_for_a_data_set_of_the_hub(tmp_path: Path, streaming: bool) -> None:
    write_rows(tmp_path, ".parquet")
    data = DataConfig(
        source="hub", name=str(tmp_path), text_field="answers.text", join="|", streaming=streaming, max_documents=12
    )
    assert sorted(read(data)) == sorted(TEXTS[:12])
    key = Corpus(data).key()
    assert key == Corpus(data).key()


def test_slices_and_named_validation_split(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        parquet.write_table(
            pa.Table.from_pylist([{"text": f"{split} {n}"} for n in range(5)]), tmp_path / f"{split}.parquet"
        )
    data = DataConfig(source="hub", name=str(tmp_path), split="train[:2]", validation_split="validation[3:]")
    assert [document.text for document in Corpus(data).documents(TRAIN)] == ["train 0", "train 1"]
    assert [document.text for document in Corpus(data).documents(VALIDATION)] == ["validation 3", "validation 4"]


def test_the_standard_library_without_its_tests() -> None:
    names = [name for name, _ in source_files()]
    assert names == sorted(names) and "argparse.py" in names and "json/decoder.py" in names
    assert not {"test", "tests", "site-packages"} & {part for name in names for part in name.split("/")}
    documents = {document.name: document.text for _, document in Corpus(DataConfig()).splits()}
    source = Path(sysconfig.get_path("stdlib"), "argparse.py").read_text(encoding="utf-8")
    assert documents["argparse.py"] == source


@given(test_size=st.floats(0.01, 0.99), seed=st.integers(0, 1000), n=st.integers(1, 500))
def test_the_split_holds_out_its_share(test_size: float, seed: int, n: int) -> None:
    chosen = list(itertools.takewhile(lambda index: index < n, held_out_documents(test_size, seed)))
    assert chosen == sorted(set(chosen))
    assert abs(len(chosen) - n * test_size) <= 1 + 1e-6 * n


def test_the_split_depends_on_its_seed_alone(corpus: Path) -> None:
    def held_out(seed: int, count: int | None = None) -> set[str]:
        data = DataConfig(
            source="files", files=[f"{corpus}/*.txt"], test_size=0.2, split_seed=seed, max_documents=count
        )
        return {document.name for document in Corpus(data).documents(VALIDATION)}

    assert len(held_out(0)) == 8 and held_out(0) == held_out(0) and held_out(0) != held_out(1)
    assert held_out(0, 20) <= held_out(0)  # a corpus that grows keeps its split


@pytest.mark.parametrize(
    ("row", "field", "expected"),
    [
        ({"text": "a"}, "text", "a"),
        ({"text": None}, "text", ""),
        ({"text": ["a", None, "b"]}, "text", "a-b"),
        ({"text": []}, "text", ""),
        ({"a": {"text": ["x", "y"]}}, "a.text", "x-y"),
        ({"a": [{"text": "x"}, {"text": "y"}]}, "a.text", "x-y"),
        ({"a": None}, "a.text", ""),
    ],
)
def test_text_of_a_row(row: Any, field: str, expected: str) -> None:
    assert text_of(row, field, "-", "row 1") == expected


@pytest.mark.parametrize(
    ("row", "field", "expected"),
    [
        ({"answers": {"text": "a", "id": 1}}, "answers.txt", "no field answers.txt; did you mean answers.text?"),
        ({"body": "a"}, "text", "no field text; valid here: body"),
        ({"text": 3}, "text", "holds a int, expected text"),
        ("just text", "text", "no field text"),
    ],
)
def test_a_field_that_is_not_there_is_named_with_those_that_are(row: Any, field: str, expected: str) -> None:
    with pytest.raises(InputError) as error:
        text_of(row, field, "", "f.jsonl, line 3")
    assert expected in str(error.value) and "f.jsonl, line 3" in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"", "a.txt: the file is empty"),
        ("a.txt", b"good \xff", "a.txt: not UTF-8 at byte 5 (value 0xff)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe4"}\n', "a.jsonl: not UTF-8 at byte 24"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl: line 2, column 9: not valid JSON"),
        ("a.jsonl", b'{"txt": "x"}\n', "a.jsonl, line 1: no field text; did you mean txt?"),
        ("a.json", b'[{"text": "x"},]', "a.json: line 1"),
        ("a.csv", b"text\na\xff\n", "a.csv: not UTF-8 at byte 6"),
        ("a.csv", b"body,n\na,1\n", "a.csv, line 1 (the header): no field text; valid here: body, n"),
        ("a.parquet", b"PAR1 not really", "a.parquet: not valid Parquet"),
        ("a.pdf", b"%PDF", "a.pdf: unknown kind of file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_place(
    tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        read(DataConfig(source="files", files=[f"{tmp_path}/{name}"]))
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("pattern", "expected"), [("none*.txt", "no such file"), (".", "is a folder")])
def test_files_that_are_not_there(tmp_path: Path, pattern: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        read(DataConfig(source="files", files=[f"{tmp_path}/{pattern}"]))


def test_hub_mistakes_are_one_line(tmp_path: Path) -> None:
    write_rows(tmp_path, ".parquet")
    for wrong, expected in (
        (DataConfig(source="hub", name=str(tmp_path), split="nosplit"), "nosplit"),
        (DataConfig(source="hub", name=str(tmp_path / "nowhere")), "nowhere"),
        (DataConfig(source="hub", name=str(tmp_path)), "no field text; valid here: id, answers"),
        (DataConfig(source="hub", name=str(tmp_path), text_field="answers.txt"), "did you mean answers.text?"),
    ):
        with pytest.raises(InputError, match=r"^[^\n]*$") as error:
            read(wrong)
        assert expected in str(error.value)
