"""Documents from Hugging Face Datasets: from the Hub or from a local folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train_loop.config import paths
from train_loop.config.schema import DataConfig
from train_loop.data.content import key_hash
from train_loop.data.formats import ROWS_AT_ONCE, Document, refuse_field, text_of
from train_loop.data.sources.files import stamps
from train_loop.data.token_store import TRAIN
from train_loop.errors import InputError, one_line


def documents(data: DataConfig, split: str) -> Iterator[Document]:
    """The documents, one per row; InputError if the data set, the split or the field does not exist."""
    name = data.split if split == TRAIN else data.validation_split or ""
    dataset = _load(data, name)
    column, _, _ = data.text_field.partition(".")
    place = f"data set {data.name}, split {name}"
    if dataset.column_names is not None:
        if column not in dataset.column_names:
            refuse_field(dict.fromkeys(dataset.column_names, ""), data.text_field, place)
        dataset = dataset.select_columns([column])
    number = 0
    for batch in dataset.iter(batch_size=ROWS_AT_ONCE):
        if column not in batch:
            refuse_field(dict.fromkeys(batch, ""), data.text_field, place)
        for value in batch[column]:
            where = f"row {number}"
            number += 1
            text = text_of({column: value}, data.text_field, data.join, f"{place}, {where}")
            yield Document(f"{name}:{where}", (text,))


def key(data: DataConfig) -> dict[str, Any]:
    """What identifies the data: the digests of a local folder's files, or else the commit in a repository."""
    splits = [
        [data.name, data.subset, name, _revision(data, name)] for name in (data.split, data.validation_split) if name
    ]
    return {"splits": splits, "text_field": data.text_field, "join": data.join}


def size(data: DataConfig) -> int | None:
    """None: the size is not known before reading."""
    return None


def _load(data: DataConfig, split: str) -> Any:
    """Load one split of the data set."""
    import datasets

    assert data.name is not None
    paths.find(data.name, "data.name")
    if os.path.isdir(data.name) and not any(path.is_file() for path in Path(data.name).rglob("*")):
        raise InputError(f"data.name: {data.name}: the folder has no files in it")
    cache = None
    if (content := _local(data)) is not None and not data.streaming:
        # Of a local file, datasets only looks at the date, and would give the rows that were in it before.
        cache = str(datasets.config.HF_DATASETS_CACHE / f"train_loop-{key_hash(content)}")
    with _naming(data, split):
        return datasets.load_dataset(data.name, data.subset, split=split, streaming=data.streaming, cache_dir=cache)


@contextmanager
def _naming(data: DataConfig, split: str) -> Iterator[None]:
    """Within this context, what datasets finds wrong is an InputError."""
    import datasets

    try:
        yield
    except datasets.exceptions.DatasetNotFoundError as error:
        raise InputError(f"data.name: {one_line(error)}; name a data set on the Hub or a local folder") from None
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"data.name {data.name}, subset {data.subset}, split {split}: {one_line(error)}") from None


def _revision(data: DataConfig, split: str) -> Any:
    """The part of `key` that changes with the content."""
    import datasets

    if (content := _local(data)) is not None:
        return content
    if not data.streaming:
        return _load(data, split)._fingerprint  # made from the commit
    with _naming(data, split):
        builder = datasets.load_dataset_builder(data.name, data.subset)
    return [builder.hash, builder.config_id]


def _local(data: DataConfig) -> list[tuple[str, str]] | None:
    """The files of a local folder, each with the digest of its content; None for a repository on the Hub."""
    if not os.path.isdir(data.name or ""):
        return None
    found, seen = [], set()
    for folder, folders, files in os.walk(data.name or "", followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()  # links in a circle
            continue
        seen.add(real)
        found += [path for file in files if os.path.isfile(path := os.path.join(folder, file))]
    return stamps(data, sorted(found))
