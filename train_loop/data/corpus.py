"""Where documents come from, and which of them are held out.

    source (stdlib | files | hub)  ->  rows  ->  text of a row  ->  Document  ->  train | validation

A corpus is read as a stream, so its size does not matter, nor does the size of a document that is a file of its own.
Of rows one is held at a time (of Parquet and of the Hub's data sets, a few). Whether a document is held out depends
only on its index and the split's seed: nothing needs to know how many documents there are, and no list of them is kept.
"""

import codecs
import csv
import glob
import hashlib
import itertools
import json
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from train_loop.config import DataConfig
from train_loop.errors import InputError, one_line
from train_loop.randomness import key
from train_loop.settings import nearest

TRAIN, VALIDATION = "train", "validation"
_BLOCK_BYTES = 1 << 18  # of a text file, read at once
_ROWS = 100  # of Parquet or the Hub, read at once


class Document(NamedTuple):
    """One document: where it was found, and its text in blocks, which may be read from a file as they are asked for."""

    name: str
    blocks: Iterable[str]

    @property
    def text(self) -> str:
        """All of its text."""
        return "".join(self.blocks)


@dataclass(frozen=True)
class Corpus:
    """The documents that a configuration describes. Reading it yields the same documents every time."""

    data: DataConfig

    def documents(self, side: str) -> Iterator[Document]:
        """The documents of "train" or "validation", in the order of the source.

        Raises:
            InputError: for a source that cannot be read; the message names file and place.
        """
        for found, document in self.sides():
            if found == side:
                yield document

    def sides(self) -> Iterator[tuple[str, Document]]:
        """Every document of the corpus with the side it belongs to, in one pass over the source."""
        data = self.data
        main = itertools.islice(self._rows(data.files, data.split), data.max_documents)
        if data.validation_files or data.validation_split:
            yield from ((TRAIN, document) for document in main)
            held_out = self._rows(data.validation_files, data.validation_split or "")
            yield from ((VALIDATION, document) for document in itertools.islice(held_out, data.max_documents))
        else:
            chosen = held_out_documents(data.test_size, data.split_seed)
            following = next(chosen)
            for index, document in enumerate(main):
                if index == following:
                    following = next(chosen)
                    yield VALIDATION, document
                else:
                    yield TRAIN, document

    def key(self) -> dict[str, Any]:
        """What this corpus is made from, cheaply: names, sizes and times of change, not contents.

        Two corpora with one key hold the same documents; the token store is filed under it.
        """
        data = self.data
        key: dict[str, Any] = {"source": data.source, "max_documents": data.max_documents}
        if data.source == "stdlib":
            key |= {"python": sys.version, "files": [(name, os.path.getsize(path)) for name, path in stdlib_files()]}
        elif data.source == "files":
            key |= {side: [_stamp(path) for path in expand(patterns)] for side, patterns in self._patterns()}
        else:
            key |= {"splits": [_hub_key(data, split) for split in (data.split, data.validation_split) if split]}
        if data.source != "stdlib":
            key |= {"text_field": data.text_field, "join": data.join}
        if not (data.validation_files or data.validation_split):
            key |= {"test_size": data.test_size, "split_seed": data.split_seed}
        return key

    def size(self) -> int | None:
        """Bytes of text to come, where that is known before reading: of the standard library and of .txt files."""
        data = self.data
        if data.max_documents or data.source == "hub":
            return None
        paths = [path for _, path in stdlib_files()] if data.source == "stdlib" else []
        for _, patterns in self._patterns():
            paths += expand(patterns)
        return sum(map(os.path.getsize, paths)) if all(path.endswith((".py", ".txt")) for path in paths) else None

    def _patterns(self) -> list[tuple[str, list[str]]]:
        sides = [(TRAIN, self.data.files), (VALIDATION, self.data.validation_files)]
        return [(side, patterns) for side, patterns in sides if patterns]

    def _rows(self, patterns: list[str], split: str) -> Iterator[Document]:
        if self.data.source == "stdlib":
            return (Document(name, TextFile(path)) for name, path in stdlib_files())
        if self.data.source == "files":
            return itertools.chain.from_iterable(
                _file_documents(path, self.data.text_field, self.data.join) for path in expand(patterns)
            )
        return _hub_documents(self.data, split)


def held_out_documents(test_size: float, seed: int) -> Iterator[int]:
    """Indices of the held-out documents, ascending and without end: a stratified random sample.

    The indices are cut into strata of length 1 / test_size, and one index is drawn from each. So every prefix of the
    corpus holds out its share to within one document, a corpus that grows keeps its split, and a stream can be split
    without knowing its length. The draws are counter-based: keyed by (seed, stratum).
    """
    length = 1 / test_size
    last = -1
    for stratum in itertools.count():
        draw = (key("split", seed, stratum) >> 10) / 2**53
        # Strata whose length is no whole number share an index at their border: it must not be yielded twice.
        last = max(last + 1, int((stratum + draw) * length))
        yield last


# --- the standard library -------------------------------------------------------------------------------------------


_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}


def stdlib_files() -> list[tuple[str, str]]:
    """(name, path) of the sources of the running Python's standard library, sorted by name.

    Without its tests, what was installed into it, and `encodings`: generated tables of characters, no text to learn.
    """
    root = sysconfig.get_path("stdlib")
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - _NOT_STDLIB)
        prefix = "" if folder == root else Path(folder).relative_to(root).as_posix() + "/"
        found += [(prefix + file, os.path.join(folder, file)) for file in files if file.endswith(".py")]
    if not found:
        raise InputError(f"data.source stdlib: no Python source below {root}; use data.source files")
    return sorted(found)


# --- files ----------------------------------------------------------------------------------------------------------


def expand(patterns: list[str]) -> list[str]:
    """The files that paths or glob patterns name, sorted within each pattern, each once.

    Raises:
        InputError: for a pattern without a file, an empty file, or a kind of file that is not known.
    """
    paths: dict[str, None] = {}
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        # A path that exists is taken as it is: its brackets are no pattern.
        found = [expanded] if os.path.isfile(expanded) else sorted(glob.glob(expanded, recursive=True))
        found = [path for path in found if os.path.isfile(path)]
        if not found:
            what = "is a folder; name files, e.g. with a pattern *.txt" if os.path.isdir(expanded) else "no such file"
            raise InputError(f"data.files: {pattern}: {what}")
        paths |= dict.fromkeys(found)
    for path in paths:
        if os.path.getsize(path) == 0:
            raise InputError(f"data.files: {path}: the file is empty")
        if Path(path).suffix.lower() not in _READERS:
            raise InputError(f"data.files: {path}: unknown kind of file; known are {', '.join(_READERS)}")
    return list(paths)


def _stamp(path: str) -> tuple[str, int, int]:
    stat = os.stat(path)
    return os.path.abspath(path), stat.st_size, stat.st_mtime_ns


def _file_documents(path: str, text_field: str, join: str) -> Iterator[Document]:
    suffix = Path(path).suffix.lower()
    try:
        if suffix == ".txt":
            yield Document(path, TextFile(path))
            return
        for place, row in _READERS[suffix](path):
            yield Document(f"{path}:{place}", (text_of(row, text_field, join, f"{path}, {place}"),))
    except OSError as error:
        raise _unreadable(path, error) from None


@dataclass(frozen=True)
class TextFile:
    """The text of a file, strict UTF-8, in blocks that are read as they are asked for, each time anew.

    Raises:
        InputError: while it is read, for a file that can't be, or isn't UTF-8; the message names the byte.
    """

    path: str

    def __iter__(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        start = 0  # where the next block begins in the file [bytes]
        begins = True  # whether the next text is the file's first
        try:
            with open(self.path, "rb", buffering=0) as file:
                while content := file.read(_BLOCK_BYTES):
                    text = self._decode(decoder, content, start)
                    start += len(content)
                    if text:  # none, where the block holds but a part of a character
                        yield text.removeprefix("\ufeff") if begins else text  # a byte-order mark is no text
                        begins = False
                self._decode(decoder, b"", start, final=True)
        except OSError as error:
            raise _unreadable(self.path, error) from None

    def _decode(self, decoder: codecs.IncrementalDecoder, content: bytes, start: int, final: bool = False) -> str:
        kept, _ = decoder.getstate()  # the first bytes of a character that the block before ended in
        try:
            return decoder.decode(content, final)
        except UnicodeDecodeError as error:
            raise _not_utf8(self.path, start - len(kept), error) from None


def _unreadable(path: str, error: OSError) -> InputError:
    return InputError(f"data.files: {path}: cannot be read ({error.strerror or error})")


def _not_utf8(path: str, start: int, error: UnicodeDecodeError) -> InputError:
    """`start` is where the bytes that were decoded begin in the file."""
    return InputError(
        f"{path}: not UTF-8 at byte {start + error.start} (value 0x{error.object[error.start]:02x}); "
        "convert the file, e.g. with iconv -t UTF-8"
    )


def _decode(content: bytes, path: str, start: int = 0) -> str:
    """Strict UTF-8; `start` is where `content` begins in the file, in bytes."""
    try:
        text = content.decode("utf-8")
        return text.removeprefix("\ufeff") if start == 0 else text
    except UnicodeDecodeError as error:
        raise _not_utf8(path, start, error) from None


def _lines(path: str) -> Iterator[str]:
    start = 0
    with open(path, "rb") as file:
        for line in file:
            yield _decode(line, path, start)
            start += len(line)


def _read_jsonl(path: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield f"line {number}", _parse_json(line.rstrip(), path, number)


def _read_json(path: str) -> Iterator[tuple[str, Any]]:
    """An array of rows, which is held in memory whole; or, as in .jsonl, one row a line."""
    with open(path, "rb") as file:
        first = next((line.lstrip() for line in file if line.strip()), b"")
    if not first.startswith(b"["):
        yield from _read_jsonl(path)
        return
    rows = _parse_json(_decode(Path(path).read_bytes(), path), path, 1)
    yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _parse_json(text: str, path: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {line + error.lineno - 1}, column {error.colno}"
        raise InputError(f"{path}: {place}: not valid JSON ({error.msg})") from None


def _read_csv(path: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader(_lines(path))
    try:
        for number, row in enumerate(rows, 1):
            yield f"row {number}", row
    except csv.Error as error:
        raise InputError(f"{path}: line {rows.line_num}: not valid CSV ({error})") from None


def _read_parquet(path: str) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        numbers = itertools.count(1)
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=_ROWS):
            yield from ((f"row {next(numbers)}", row) for row in batch.to_pylist())
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not valid Parquet ({one_line(error)})") from None


_READERS: dict[str, Any] = {
    ".txt": None,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


# --- Hugging Face Datasets ------------------------------------------------------------------------------------------


def _load_hub(data: DataConfig, split: str) -> Any:
    import datasets

    assert data.name is not None
    if os.path.isdir(data.name) and not any(path.is_file() for path in Path(data.name).rglob("*")):
        raise InputError(f"data.name: {data.name}: the folder holds no file")
    try:
        return datasets.load_dataset(data.name, data.subset, split=split, streaming=data.streaming)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise InputError(f"data.name: {one_line(error)}; name a data set on the Hub or a local folder") from None
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"data.name {data.name}, subset {data.subset}, split {split}: {one_line(error)}") from None


def _hub_key(data: DataConfig, split: str) -> list[Any]:
    """A data set that was downloaded has a fingerprint; a stream is known by its name (and its files, if local)."""
    key = [data.name, data.subset, split]
    if data.streaming:
        files = sorted(str(path) for path in Path(data.name or "").rglob("*") if path.is_file())
        return [*key, [_stamp(path) for path in files] if os.path.isdir(data.name or "") else None]
    return [*key, _load_hub(data, split)._fingerprint]


def _hub_documents(data: DataConfig, split: str) -> Iterator[Document]:
    dataset = _load_hub(data, split)
    column, _, _ = data.text_field.partition(".")
    place = f"data set {data.name}, split {split}"
    if dataset.column_names is not None:
        if column not in dataset.column_names:
            _refuse_field(dict.fromkeys(dataset.column_names, ""), data.text_field, place)
        dataset = dataset.select_columns([column])
    number = 0
    for batch in dataset.iter(batch_size=_ROWS):
        if column not in batch:
            _refuse_field(dict.fromkeys(batch, ""), data.text_field, place)
        for value in batch[column]:
            where = f"row {number}"
            number += 1
            text = text_of({column: value}, data.text_field, data.join, f"{place}, {where}")
            yield Document(f"{split}:{where}", (text,))


# --- the text of a row ----------------------------------------------------------------------------------------------


def text_of(row: Any, text_field: str, join: str, place: str) -> str:
    """The text at a dotted path of a row; the strings of a list are joined, a null is no text.

    Raises:
        InputError: for a field that is not there (naming those that are) or that holds no text.
    """
    values = [row]
    listed = False
    for name in text_field.split("."):
        found: list[Any] = []
        for value in values:
            if isinstance(value, list):  # a list of records: the field of each
                listed = True
                found.extend(record.get(name) if isinstance(record, dict) else None for record in value)
            elif isinstance(value, dict) and name in value:
                found.append(value[name])
            elif value is not None:
                _refuse_field(row, text_field, place)
        values = found
    if len(values) == 1 and isinstance(values[0], list):
        values, listed = values[0], True
    texts = [value for value in values if value is not None]
    for value in texts:
        if not isinstance(value, str):
            raise InputError(f"{place}: field {text_field} holds a {type(value).__name__}, expected text")
    return join.join(texts) if listed else "".join(texts)


def _refuse_field(row: Any, text_field: str, place: str) -> None:
    fields = list(_paths(row))
    raise InputError(f"data.text_field: {place}: no field {text_field}; {nearest(text_field, fields)}")


def _paths(row: Any, prefix: str = "") -> Iterator[str]:
    """The dotted paths of a row's fields."""
    if isinstance(row, list):
        row = row[0] if row else {}
    if not isinstance(row, dict):
        return
    for name, value in row.items():
        inner = list(_paths(value, f"{prefix}{name}."))
        yield from inner or [f"{prefix}{name}"]


def key_hash(key: Any) -> str:
    """A short name for a key: 20 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:20]
