"""Documents that a script passes in: any iterable of texts. They are saved as a file, a source like any other.

    ("notes", texts)  ->  <cache>/documents/notes-<hash>.jsonl  ->  data.source files

So the commands can also resume, replay and evaluate a run that is trained on them.
"""

import copy
import hashlib
import json
import os
import re
from collections.abc import Iterable
from typing import NamedTuple

from train_loop.config.load import cache_dir
from train_loop.config.schema import Config
from train_loop.data.formats import encodable
from train_loop.errors import InputError, one_line


class Documents(NamedTuple):
    """Texts, one per document, and the name to file them under."""

    name: str
    texts: Iterable[str]


def configure(config: Config, documents: Documents | tuple[str, Iterable[str]] | None) -> Config:
    """A configuration that trains on these documents; the given one if there are none.

    The file is named after its content, so the same documents always give the same file, on every process. Raises
    InputError if the name can't be a file name, if a document is not text, or if the file can't be written.
    """
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
    folder = cache_dir(config) / "documents"
    digest = hashlib.sha256()
    temporary = folder / f"{name}.tmp-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            for number, text in enumerate(texts):
                if not isinstance(text, str):
                    raise InputError(f"documents: number {number} of {name} is a {type(text).__name__}, expected text")
                encodable(text, f"documents: number {number} of {name}")
                line = json.dumps({"text": text}).encode() + b"\n"
                digest.update(line)
                file.write(line)
        path = folder / f"{name}-{digest.hexdigest()[:16]}.jsonl"
        if not path.exists():  # an existing file keeps its modification time, so what was prepared from it stays valid
            os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"documents: {folder} cannot be written to ({one_line(error)}); set data.cache_dir") from None
    finally:
        temporary.unlink(missing_ok=True)
    config = copy.deepcopy(config)
    data = config.data
    data.source, data.files, data.validation_files, data.text_field = "files", [str(path)], [], "text"
    data.name = data.subset = data.validation_split = None
    data.streaming = False
    return config
