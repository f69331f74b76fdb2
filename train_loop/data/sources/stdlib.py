"""Documents that every machine has: the source files of the running Python's standard library."""

import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train_loop.config.load import cache_dir
from train_loop.config.schema import DataConfig
from train_loop.data.content import digests
from train_loop.data.formats import Document
from train_loop.data.sources.files import TextFile
from train_loop.errors import InputError

_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}


def source_files() -> list[tuple[str, str]]:
    """(name, path) of the source files of the running Python's standard library, sorted by name.

    Left out are its tests, installed packages, and `encodings`, whose generated tables of characters teach nothing.
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


def documents(data: DataConfig, split: str) -> Iterator[Document]:
    """Every source file as one document. Validation documents are always split off from these."""
    return (Document(name, TextFile(path)) for name, path in source_files())


def key(data: DataConfig) -> dict[str, Any]:
    """What distinguishes one Python's standard library from another's."""
    names, paths = zip(*source_files(), strict=True)
    return {"python": sys.version, "files": list(zip(names, digests(cache_dir(data)).of(paths), strict=True))}


def size(data: DataConfig) -> int | None:
    """Bytes of text."""
    return sum(os.path.getsize(path) for _, path in source_files())
