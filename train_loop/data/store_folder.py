"""The folder of a prepared store: how it is completed, and how it is opened again, each file checked.

ledger.json holds, beside what went in and what came out, the store's name and the digest of each file, and a sum of
itself. Whoever opens a store checks them all; files that look as they did the last time are not read again.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from train_loop.data import tokenizer as tokenizers
from train_loop.data.content import Look, digest_of, digests
from train_loop.data.token_file import damaged
from train_loop.data.token_store import TRAIN, VALIDATION, Ledger, Prepared, TokenStore
from train_loop.errors import one_line
from train_loop.files import sync

FORMAT = 3
_LEDGER, _TOKENIZER = "ledger.json", "tokenizer"


def complete(made: Path, folder: Path, dtype: np.dtype[Any], ledgers: dict[str, Ledger], tokenizer: str) -> None:
    """Write the ledger of a store whose other files are `made`, and move it to its place `folder`.

    `tokenizer` is the tokenizer's fingerprint. A store that is there by now stays: it holds the same.
    """
    identity = [tokenizer, *(ledgers[split].sha256 for split in (TRAIN, VALIDATION))]
    content: dict[str, Any] = {
        "format": FORMAT,
        "name": folder.name,
        "dtype": dtype.str,
        "fingerprint": hashlib.sha256("\n".join(identity).encode()).hexdigest(),
        "digests": {path.relative_to(made).as_posix(): _digest(path) for path in _files(made)},
    } | {split: asdict(ledger) for split, ledger in ledgers.items()}
    content["sum"] = _sum(content)
    (made / _LEDGER).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for path in (*_files(made), made / _LEDGER):
        with suppress(PermissionError):  # some network disks have no such rights
            path.chmod(path.stat().st_mode & ~0o222)  # against slips: nothing writes to a store
    for path in (*made.rglob("*"), made):
        sync(path)
    try:
        os.rename(made, folder)
    except OSError:
        if not folder.exists():  # if it does, another host was faster: the same documents give the same store
            raise
    sync(folder.parent)


def open_store(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> Prepared:
    """Open a store, with its own tokenizer if none is given. DamagedError names a file that is not what was written."""
    path = folder / _LEDGER
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("sum") != _sum(found):
            raise ValueError("it has been changed")
        if (found["format"], found["name"]) != (FORMAT, folder.name):
            raise ValueError(f"it belongs to {found['name']}")
        written, dtype = found["digests"], np.dtype(found["dtype"])
        train, validation = (
            TokenStore(folder / split, dtype, Ledger(**found[split]), written[f"{split}/tokens.bin"])
            for split in (TRAIN, VALIDATION)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, one_line(error), folder) from None
    _check(folder, written)
    for store in (train, validation):
        store.tokens.check()
    return Prepared(
        folder, tokenizer or tokenizers.load(str(folder / _TOKENIZER)), train, validation, found["fingerprint"]
    )


def _check(folder: Path, written: dict[str, str]) -> None:
    """Raise DamagedError if a file is missing or has another content, or if the tokenizer has one too many."""
    for name in written:
        if not (folder / name).is_file():
            raise damaged(folder / name, "it is missing", folder)
    for path in _files(folder):
        if path.parent.name == _TOKENIZER and path.relative_to(folder).as_posix() not in written:
            raise damaged(path, "it was added later", folder)
    known = digests(folder.parent.parent)
    for name, digest in zip(written, known.of(folder / name for name in written), strict=True):
        if digest != written[name]:
            raise damaged(folder / name, "its content is not what was written", folder)


def _files(folder: Path) -> Iterator[Path]:
    """The files of a store, without its ledger and without hidden ones, which a network disk may add."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith(".") and path != folder / _LEDGER:
            yield path


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return digest_of(file.fileno(), Look.at(file.fileno()))


def _sum(content: dict[str, Any]) -> str:
    """The sum of a ledger, which is itself not part of it."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
