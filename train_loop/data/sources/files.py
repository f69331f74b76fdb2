"""Documents from files: .txt (one document per file), .jsonl, .json, .csv and .parquet (one per row)."""

import codecs
import csv
import glob
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_loop.config.load import cache_dir
from train_loop.config.schema import DataConfig
from train_loop.data.content import digests
from train_loop.data.formats import ROWS_AT_ONCE, Document, text_of
from train_loop.data.token_store import TRAIN, VALIDATION
from train_loop.errors import InputError, one_line

_BLOCK_BYTES = 1 << 18  # how much of a text file is read at once


def documents(data: DataConfig, split: str) -> Iterator[Document]:
    """The documents of data.files or data.validation_files; InputError names the file and place that can't be read."""
    patterns = data.files if split == TRAIN else data.validation_files
    return itertools.chain.from_iterable(_documents_of(path, data) for path in expand(patterns))


def key(data: DataConfig) -> dict[str, Any]:
    """Names of the files, and the digests of their contents."""
    return {"text_field": data.text_field, "join": data.join} | {
        split: stamps(data, expand(patterns)) for split, patterns in _patterns(data)
    }


def size(data: DataConfig) -> int | None:
    """Bytes of text, if all files are .txt; otherwise it is not known before they are read."""
    paths = [path for _, patterns in _patterns(data) for path in expand(patterns)]
    return sum(map(os.path.getsize, paths)) if all(path.endswith((".py", ".txt")) for path in paths) else None


def _patterns(data: DataConfig) -> list[tuple[str, list[str]]]:
    """The splits that have files of their own, with their patterns."""
    named = [(TRAIN, data.files), (VALIDATION, data.validation_files)]
    return [(split, patterns) for split, patterns in named if patterns]


def expand(patterns: list[str]) -> list[str]:
    """The files of paths or patterns, sorted within each, without repeats; InputError if none, empty or unknown."""
    paths: dict[str, None] = {}
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        # A path that exists is taken literally: brackets in it are not a pattern.
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
            raise InputError(f"data.files: {path}: unknown kind of file; train_loop reads {', '.join(_READERS)}")
    return list(paths)


def stamps(data: DataConfig, paths: list[str]) -> list[tuple[str, str]]:
    """The absolute path of each file and the digest of its content. InputError for one that can't be read."""
    return list(zip(map(os.path.abspath, paths), digests(cache_dir(data)).of(paths), strict=True))


def _documents_of(path: str, data: DataConfig) -> Iterator[Document]:
    """The documents of one file."""
    read = _READERS[Path(path).suffix.lower()]
    try:
        if read is None:
            yield Document(path, TextFile(path))
            return
        for place, row in read(path):
            yield Document(f"{path}:{place}", (text_of(row, data.text_field, data.join, f"{path}, {place}"),))
    except OSError as error:
        raise _unreadable(path, error) from None


@dataclass(frozen=True)
class TextFile:
    """The text of a file, as strict UTF-8, in blocks that are read on demand. Each iteration reads it again.

    Raises InputError while iterating, if the file can't be read or isn't UTF-8; the message names the byte.
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
                    if text:  # empty if the block only holds part of a character
                        yield text.removeprefix("\ufeff") if begins else text  # a byte-order mark is not text
                        begins = False
                self._decode(decoder, b"", start, final=True)
        except OSError as error:
            raise _unreadable(self.path, error) from None

    def _decode(self, decoder: codecs.IncrementalDecoder, content: bytes, start: int, final: bool = False) -> str:
        kept, _ = decoder.getstate()  # the first bytes of a character that began in the previous block
        try:
            return decoder.decode(content, final)
        except UnicodeDecodeError as error:
            raise _not_utf8(self.path, start - len(kept), error) from None


def _unreadable(path: str, error: OSError) -> InputError:
    return InputError(f"data.files: {path}: cannot be read ({error.strerror or error})")


def _not_utf8(path: str, start: int, error: UnicodeDecodeError) -> InputError:
    """The error for bytes that can't be decoded; `start` is where they begin in the file."""
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
    """The lines of a file, decoded one by one."""
    start = 0
    with open(path, "rb") as file:
        for line in file:
            yield _decode(line, path, start)
            start += len(line)


def _read_jsonl(path: str) -> Iterator[tuple[str, Any]]:
    """One row per line; like every reader, yields the place of a row in the file, and the row."""
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield f"line {number}", _parse_json(line.rstrip(), path, number)


def _read_json(path: str) -> Iterator[tuple[str, Any]]:
    """An array of rows, which is held in memory as a whole; or one row per line, as in .jsonl."""
    with open(path, "rb") as file:
        first = next((line.lstrip() for line in file if line.strip()), b"")
    if not first.startswith(b"["):
        yield from _read_jsonl(path)
        return
    rows = _parse_json(_decode(Path(path).read_bytes(), path), path, 1)
    yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _parse_json(text: str, path: str, line: int) -> Any:
    """The value of a JSON text that begins at a line of the file."""
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
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=ROWS_AT_ONCE):
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
