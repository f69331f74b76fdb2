"""Documents from Hugging Face Datasets: from the Hub or from a local folder."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train_loop.config import paths
from train_loop.config.schema import DataConfig
from train_loop.data.formats import ROWS_AT_ONCE, Document, refuse_field, text_of
from train_loop.data.sources.files import stamp
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
    """What identifies the data: a download's fingerprint, or a stream's name (and its files, if they are local)."""
    splits = [_split_key(data, name) for name in (data.split, data.validation_split) if name]
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
    try:
        return datasets.load_dataset(data.name, data.subset, split=split, streaming=data.streaming)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise InputError(f"data.name: {one_line(error)}; name a data set on the Hub or a local folder") from None
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"data.name {data.name}, subset {data.subset}, split {split}: {one_line(error)}") from None


def _split_key(data: DataConfig, split: str) -> list[Any]:
    """The part of `key` for one split."""
    key = [data.name, data.subset, split]
    if data.streaming:
        files = sorted(str(path) for path in Path(data.name or "").rglob("*") if path.is_file())
        return [*key, [stamp(path) for path in files] if os.path.isdir(data.name or "") else None]
    return [*key, _load(data, split)._fingerprint]
