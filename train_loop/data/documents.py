"""Documents that a script passes in: any iterable of texts. They are saved as a file, a source like any other.

    ("notes", texts)  ->  <cache>/documents/notes-<hash>.jsonl  ->  data.source files

So the commands can also resume, replay and evaluate a run that is trained on them.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from train_loop import libraries
from train_loop.config.load import cache_dir, checked
from train_loop.config.schema import Config
from train_loop.data import preparation
from train_loop.data.cache_folder import sweep, unfinished, writing
from train_loop.data.formats import encodable
from train_loop.data.token_store import Prepared
from train_loop.errors import InputError


class Documents(NamedTuple):
    """Texts, one per document, and the name to file them under."""

    name: str
    texts: Iterable[str]


@libraries.ready()
def prepare(config: Config, documents: Documents | tuple[str, Iterable[str]] | None = None) -> Prepared:
    """Turn documents into a token store, or find the existing one. This needs no torch.

    Args:
        config: only its sections data and tokenizer matter.
        documents: a name and texts, instead of the configured source.

    Raises:
        InputError: for data that cannot be read.
    """
    return preparation.prepare(configure(config, documents))


def configure(config: Config, documents: Documents | tuple[str, Iterable[str]] | None) -> Config:
    """A configuration that trains on these documents, or the given one if there are none: a copy, checked.

    The file is named after its content, so the same documents always give the same file, on every process. Raises
    InputError for settings that can't be, if the name can't be a file name, if a document is not text, or if the file
    can't be written.
    """
    config = checked(config)
    if documents is None:
        return config
    try:
        name, texts = documents
    except (TypeError, ValueError):
        raise InputError("documents: expected a pair, a name and texts, such as ('notes', ['one', 'two'])") from None
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise InputError(f"documents: {name}: expected an iterable of texts, got a {type(texts).__name__}")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise InputError(f"documents: the name {name!r} becomes a file name; use only letters, digits, and . _ -")
    folder = cache_dir(config.data) / "documents"
    digest = hashlib.sha256()
    with writing("documents", folder):
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        with unfinished(folder / name) as temporary:
            with open(temporary / name, "wb") as file:
                for number, text in enumerate(texts):
                    if not isinstance(text, str):
                        kind = type(text).__name__
                        raise InputError(f"documents: number {number} of {name} is a {kind}, expected text")
                    encodable(text, f"documents: number {number} of {name}")
                    line = json.dumps({"text": text}).encode() + b"\n"
                    digest.update(line)
                    file.write(line)
            path = folder / f"{name}-{digest.hexdigest()[:16]}.jsonl"
            if not _holds(path, digest.digest()):
                os.replace(temporary / name, path)
    data = config.data
    data.source, data.files, data.validation_files, data.text_field = "files", [str(path)], [], "text"
    data.name = data.subset = data.validation_split = None
    data.streaming = False
    return config


def _holds(path: Path, digest: bytes) -> bool:
    """Whether a file has this content (SHA-256). If so, it is left alone: another process may be reading it."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest() == digest
    except OSError:
        return False
