"""Documents from files: .txt (one document per file), .jsonl, .json, .csv, .tsv and .parquet (one per row)."""

import codecs
import glob
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_loop.config.load import cache_dir
from train_loop.config.schema import DataConfig
from train_loop.data.content import digests
from train_loop.data.formats import Document, text_of
from train_loop.data.sources.rows import READERS, not_utf8, rows, unreadable
from train_loop.data.token_store import TRAIN, VALIDATION
from train_loop.disguises import HEAD_BYTES, disguise
from train_loop.errors import InputError

TEXT = ".txt"
_BLOCK_BYTES = 1 << 18  # how much of a text file is read at once


def documents(data: DataConfig, split: str) -> Iterator[Document]:
    """The documents of data.files or data.validation_files; InputError names the file and place that can't be read."""
    return itertools.chain.from_iterable(_documents_of(path, data) for path in _paths(data)[split])


def key(data: DataConfig) -> dict[str, Any]:
    """Names of the files, and the digests of their contents."""
    return {"text_field": data.text_field, "join": data.join} | {
        split: stamps(data, paths) for split, paths in _paths(data).items()
    }


def size(data: DataConfig) -> int | None:
    """Bytes of text, if all files are .txt; otherwise it is not known before they are read."""
    paths = [path for paths in _paths(data).values() for path in paths]
    return sum(map(os.path.getsize, paths)) if all(Path(path).suffix.lower() == TEXT for path in paths) else None


def _paths(data: DataConfig) -> dict[str, list[str]]:
    """The files of each split that has files of its own; InputError if a file is on both sides, under any name."""
    paths = {TRAIN: expand(data.files)}
    if data.validation_files:
        paths[VALIDATION] = expand(data.validation_files, "data.validation_files")
        train = {_identity(path): path for path in paths[TRAIN]}
        for path in paths[VALIDATION]:
            if other := train.get(_identity(path)):
                which = path if path == other else f"{path} is {other}, which"
                cure = "the validation loss would be a lie; name other files, or leave data.validation_files out"
                raise InputError(f"data.validation_files: {which} is also in data.files; {cure}")
    return paths


def expand(patterns: list[str], key: str = "data.files") -> list[str]:
    """The files of paths or patterns, sorted within each; a file that has several names comes once, under the first.

    Raises InputError, which begins with `key`, if there is none, or if one is empty or of an unknown kind.
    """
    paths: dict[str, None] = {}
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        # A path that exists is taken literally: brackets in it are not a pattern.
        found = [expanded] if os.path.isfile(expanded) else sorted(glob.glob(expanded, recursive=True))
        found = [path for path in found if not os.path.isdir(path)]
        if not found:
            raise InputError(f"{key}: {pattern}: {_why_none(expanded)}")
        for path in found:
            if not os.path.isfile(path):
                raise InputError(f"{key}: {path}: {_why_none(path)}")
        paths |= dict.fromkeys(found)
    unique: dict[tuple[int, int], str] = {}
    for path in paths:
        unique.setdefault(_identity(path, key), path)
        if Path(path).suffix.lower() not in (TEXT, *READERS):
            kinds = ", ".join((TEXT, *READERS))
            raise InputError(f"{key}: {path}: unknown kind of file; train_loop reads {kinds}")
    return list(unique.values())


def _why_none(path: str) -> str:
    """Why a path or pattern names no file."""
    if os.path.isdir(path):
        return "is a folder; name files, e.g. with a pattern *.txt"
    if os.path.exists(path):
        return "is no regular file; copy it into one"
    return "is a link to nothing; mend or remove it" if os.path.islink(path) else "no such file"


def _identity(path: str, key: str = "data.files") -> tuple[int, int]:
    """What a file is, whatever its names are (links, relative paths)."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise unreadable(path, error) from None
    if stat.st_size == 0:
        raise InputError(f"{key}: {path}: the file is empty")
    return stat.st_dev, stat.st_ino


def stamps(data: DataConfig, paths: list[str]) -> list[tuple[str, str]]:
    """The absolute path of each file and the digest of its content. InputError for one that can't be read."""
    return list(zip(map(os.path.abspath, paths), digests(cache_dir(data)).of(paths), strict=True))


def _documents_of(path: str, data: DataConfig) -> Iterator[Document]:
    """The documents of one file."""
    suffix = Path(path).suffix.lower()
    if suffix == TEXT:
        yield Document(path, TextFile(path))
        return
    for place, row in rows(path, data.text_field, suffix):
        yield Document(f"{path}:{place}", (text_of(row, data.text_field, data.join, f"{path}, {place}"),))


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
                    if start == 0 and (what := disguise(content[:HEAD_BYTES], TEXT)):
                        raise InputError(f"{self.path}: {what}")
                    text = self._decode(decoder, content, start)
                    start += len(content)
                    if text:  # empty if the block only holds part of a character
                        yield text.removeprefix("\ufeff") if begins else text  # a byte-order mark is not text
                        begins = False
                self._decode(decoder, b"", start, final=True)
        except OSError as error:
            raise unreadable(self.path, error) from None

    def _decode(self, decoder: codecs.IncrementalDecoder, content: bytes, start: int, final: bool = False) -> str:
        kept, _ = decoder.getstate()  # the first bytes of a character that began in the previous block
        try:
            return decoder.decode(content, final)
        except UnicodeDecodeError as error:
            raise not_utf8(self.path, start - len(kept), error) from None
