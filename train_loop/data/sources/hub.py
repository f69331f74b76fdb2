"""Documents from Hugging Face Datasets: from the Hub or from a local folder.

`datasets` finds the files of a local folder and their splits, and `rows.py` reads those that hold text in tables or
lines. For `datasets` guesses: it turns cells such as NA into nothing, 007 into 7 and a text that looks like a date into
one, shifts columns where a row has too many cells, and fills in fields that a row lacks.
"""

import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from train_loop import versions
from train_loop.config import paths
from train_loop.config.load import cache_dir
from train_loop.config.schema import DataConfig
from train_loop.console import say
from train_loop.data.cache_folder import unfinished
from train_loop.data.content import key_hash
from train_loop.data.formats import ROWS_AT_ONCE, Document, refuse_field, text_of
from train_loop.data.sources.files import stamps
from train_loop.data.sources.rows import READERS, SEPARATORS, Rows, lines, read_csv, rows
from train_loop.data.token_store import TRAIN
from train_loop.disguises import refuse_pointers
from train_loop.errors import InputError, one_line

_KINDS = {"csv": ".csv", "json": ".json", "parquet": ".parquet", "text": ".txt"}  # those that are read here
# Settings of a kind that don't change how a file is read.
_NEUTRAL = {"name", "version", "data_dir", "data_files", "description", "features", "sep", "delimiter"}
_TEXTS = {".csv", ".tsv", ".jsonl", ".parquet", ".txt", ".arrow"}
_NEEDS_LENGTHS = re.compile(r"\[[^]]*[-%]")  # a slice that counts from the end, or in per cent


def documents(data: DataConfig, split: str) -> Iterator[Document]:
    """The documents, one per row; InputError if the data set, the split or the field does not exist."""
    name = data.split if split == TRAIN else data.validation_split or ""
    local = _tables(data) if _is_local(data) else None
    if split == TRAIN:
        _refuse_overlap(data, local)
        if local is not None and local.left_out:
            example = f"e.g. {local.left_out[0]}; datasets takes the commonest kind of file: {local.suffix}"
            say(f"data.name {data.name}: {len(local.left_out)} files in it are not read, {example}")
    found = _loaded_rows(data, name) if local is None else local.rows(data, name)
    for number, (place, row) in enumerate(found):
        yield Document(f"{name}:row {number}", (text_of(row, data.text_field, data.join, place),))


def key(data: DataConfig) -> dict[str, Any]:
    """What identifies the data: the digests of a local folder's files, or else the commit in a repository."""
    paths.find(data.name or "", "data.name")
    if data.split == data.validation_split:
        _refuse_same(data, f"both are {data.split}")
    splits = [
        [data.name, data.subset, name, _revision(data, name)] for name in (data.split, data.validation_split) if name
    ]
    return {"splits": splits, "text_field": data.text_field, "join": data.join}


def size(data: DataConfig) -> int | None:
    """None: the size is not known before reading."""
    return None


@dataclass(frozen=True)
class _Tables:
    """The files of a data set by split, all of one kind that is read here, and how they are read."""

    files: Mapping[str, list[str]]
    suffix: str
    read: Callable[[str, str], Rows]
    left_out: list[str]  # files that hold text, too, but are of another kind

    def rows(self, data: DataConfig, spec: str) -> Rows:
        """The rows of a split or of slices, each with the file and the place in it."""
        with _worded(data, spec):
            parts = _parts(spec, self.lengths(data, spec))
        for name, start, stop in parts:
            yield from itertools.islice(self._all(data, name), start, stop)

    def lengths(self, data: DataConfig, *specs: str) -> dict[str, int]:
        """The number of rows of each split, counted only if one of the slices asks for it."""
        if any(map(_NEEDS_LENGTHS.search, specs)):
            return {name: sum(1 for _ in self._all(data, name)) for name in self.files}
        return dict.fromkeys(self.files, sys.maxsize)

    def shared(self, name: str, other: str) -> str | None:
        """A file that belongs to both splits, or None."""
        train = set(map(os.path.realpath, self.files[name]))
        return next((file for file in self.files[other] if os.path.realpath(file) in train), None)

    def _all(self, data: DataConfig, split: str) -> Rows:
        from datasets import DownloadConfig, DownloadManager

        cache = cache_dir(data)
        cache.mkdir(parents=True, exist_ok=True)
        with unfinished(cache / "unpacked") as folder:
            # A local file, for example .csv.gz, is unpacked anew: `datasets` would take what it unpacked from that path
            # before, although the file may be another by now, or the process that unpacked it was killed.
            manager = DownloadManager(download_config=DownloadConfig(cache_dir=folder) if _is_local(data) else None)
            for file in self.files[split]:
                with _worded(data, split, file):
                    unpacked = list(manager.iter_files(manager.download_and_extract(file)))
                for path in unpacked:
                    try:
                        for place, row in rows(path, data.text_field, self.suffix, self.read):
                            yield f"{file}, {place}", row
                    except InputError as error:
                        raise InputError(str(error).replace(path, file)) from None


def _read_lines(path: str, text_field: str) -> Rows:
    """A row per line, as `datasets` reads text files."""
    return ((f"line {number}", {"text": line.rstrip("\r\n")}) for number, line in enumerate(lines(path), 1))


def _is_local(data: DataConfig) -> bool:
    return os.path.isdir(data.name or "")


def _tables(data: DataConfig) -> _Tables | None:
    """The files of a data set whose rows are read here; None if `datasets` has to read them."""
    import datasets

    if _is_local(data) and not any(path.is_file() for path in Path(data.name or "").rglob("*")):
        raise InputError(f"data.name: {data.name}: the folder has no files in it")
    with _worded(data, data.split):
        builder = datasets.load_dataset_builder(data.name, data.subset)
    config = builder.config
    files = {str(split): list(each) for split, each in (config.data_files or {}).items()}
    homes = (each.__module__.split(".") for each in type(builder).__mro__)
    suffix = next((_KINDS.get(home[-1]) for home in homes if home[:2] == ["datasets", "packaged_modules"]), None)
    plain = all(
        getattr(config, name) == getattr(type(config)(), name)
        for name in {each.name for each in fields(config)} - _NEUTRAL
    )
    read: Callable[[str, str], Rows] | None = None
    if plain and suffix == ".csv":
        read = partial(read_csv, separator=config.sep) if config.sep in SEPARATORS else None
    elif plain and suffix is not None:
        read = _read_lines if suffix == ".txt" else READERS[suffix]
    if read is None or suffix is None:
        for folder in sorted({os.path.dirname(file) for each in files.values() for file in each}):
            refuse_pointers(f"data.name {folder}", folder)
        return None
    taken = {os.path.realpath(file) for each in files.values() for file in each}
    others = () if config.name != "default" else sorted(Path(data.name or "").rglob("*"))  # else others may have them
    left_out = [str(path) for path in others if path.suffix in _TEXTS and os.path.realpath(path) not in taken]
    return _Tables(files, suffix, read, left_out)


def _parts(spec: str, lengths: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """What a split such as train[:10%]+test stands for: (name, first row, one past the last row)."""
    from datasets import ReadInstruction

    instruction = ReadInstruction.from_spec("+".join(lengths) if spec == "all" else spec)
    return [(each.splitname, each.from_, each.to) for each in instruction.to_absolute(lengths)]


def _refuse_overlap(data: DataConfig, local: _Tables | None) -> None:
    """Raise an InputError if data.split and data.validation_split have rows in common."""
    train, validation = data.split, data.validation_split
    if not validation:
        return
    if local is not None:
        lengths = local.lengths(data, train, validation)
    elif data.streaming:
        lengths = dict.fromkeys(re.split(r"\s*\+\s*", f"{train}+{validation}"), sys.maxsize)
    else:
        lengths = {name: each.num_examples for name, each in (_load(data, train).info.splits or {}).items()}
    with _worded(data, f"{train} and {validation}"):
        pairs = list(itertools.product(_parts(train, lengths), _parts(validation, lengths))) if lengths else []
    for (name, start, stop), (other, other_start, other_stop) in pairs:
        if local is not None and name != other and (shared := local.shared(name, other)):
            _refuse_same(data, f"{name} and {other} share the file {shared}")
        if name == other and (first := max(start, other_start)) < (last := min(stop, other_stop)):
            what = f"rows {first} to {last - 1} of {name}" if last - first > 1 else f"row {first} of {name}"
            what = f"all rows of {name}" if (first, last) == (0, sys.maxsize) else what
            _refuse_same(data, f"{train} and {validation} share {what}")


def _refuse_same(data: DataConfig, what: str) -> None:
    cure = "the validation loss would be a lie; name other rows, or leave data.validation_split out"
    raise InputError(f"data.validation_split: {what} (data.split is {data.split}); {cure}")


def _loaded_rows(data: DataConfig, name: str) -> Rows:
    """The rows of a split that `datasets` reads, with only the text's column."""
    place = f"data set {data.name}, split {name}"
    dataset = _load(data, name)
    if dataset.info.builder_name == "csv" and not data.streaming and (tables := _tables(data)) is not None:
        yield from tables.rows(data, name)
        return
    column = data.text_field.partition(".")[0]
    if dataset.column_names is not None:
        column = data.text_field if data.text_field in dataset.column_names else column
        if column not in dataset.column_names:
            refuse_field(dict.fromkeys(dataset.column_names, ""), data.text_field, place)
        dataset = dataset.select_columns([column])
    numbers = itertools.count()
    for batch in _each(data, name, dataset.iter(batch_size=ROWS_AT_ONCE)):
        if column not in batch:
            refuse_field(dict.fromkeys(batch, ""), data.text_field, place)
        for value in batch[column]:
            yield f"{place}, row {next(numbers)}", {column: value}


def _each(data: DataConfig, split: str, values: Iterable[Any]) -> Iterator[Any]:
    """The values; whatever goes wrong while `datasets` finds the next one is an InputError."""
    iterator = iter(values)
    while True:
        with _worded(data, split):
            try:
                value = next(iterator)
            except StopIteration:
                return
        yield value


@contextmanager
def _worded(data: DataConfig, split: str, file: str = "") -> Iterator[None]:
    """Within this, whatever `datasets` and the libraries under it raise is an InputError: data is all they work on."""
    from datasets.exceptions import DatasetNotFoundError

    try:
        yield
    except (InputError, MemoryError):
        raise
    except DatasetNotFoundError as error:
        raise InputError(f"data.name: {one_line(error)}; name a data set on the Hub or a local folder") from None
    except Exception as error:
        if isinstance(error, AttributeError | ImportError | TypeError) and versions.too_new(error):
            raise
        place = file or f"data.name {data.name}, subset {data.subset}, split {split}"
        raise InputError(f"{place}: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    """What went wrong, in the words of the error that another one hides."""
    said = "An error occurred while generating the dataset"
    while error.__cause__ is not None and str(error).strip() == said:
        error = error.__cause__
    text = one_line(Exception(str(error).removeprefix(said))) if str(error) else type(error).__name__
    plain = isinstance(error, OSError | RuntimeError | ValueError) or type(error).__module__.startswith("datasets")
    return text if plain else f"{type(error).__name__}: {text}"


def _load(data: DataConfig, split: str) -> Any:
    """Load one split of the data set."""
    import datasets

    column = data.text_field.partition(".")[0]

    def load(**options: Any) -> Any:
        return datasets.load_dataset(
            data.name, data.subset, split=split, streaming=data.streaming, cache_dir=cache, **options
        )

    cache = None
    if (content := _contents(data)) is not None and not data.streaming:
        # Of a local file, datasets only looks at the date, and would give the rows that were in it before.
        cache = str(datasets.config.HF_DATASETS_CACHE / f"train_loop-{key_hash(content)}")
    with _worded(data, split):
        dataset = load()
        if dataset.info.builder_name == "csv":  # then again, without guessing what cells mean
            dataset = load(keep_default_na=False, index_col=False, converters={column: str})
        return dataset


def _revision(data: DataConfig, split: str) -> Any:
    """The part of `key` that changes with the content."""
    import datasets

    if (content := _contents(data)) is not None:
        tables = _tables(data)
        return [None if tables is None else tables.suffix, content]
    if not data.streaming:
        return _load(data, split)._fingerprint  # made from the commit
    with _worded(data, split):
        builder = datasets.load_dataset_builder(data.name, data.subset)
    return [builder.hash, builder.config_id]


def _contents(data: DataConfig) -> list[tuple[str, str]] | None:
    """The files of a local folder, each with the digest of its content; None for a repository on the Hub."""
    if not _is_local(data):
        return None
    found, seen = [], set()
    for folder, folders, files in os.walk(data.name or "", followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()  # links in a circle
            continue
        seen.add(real)
        found += [path for file in files if os.path.isfile(path := os.path.join(folder, file))]
    return stamps(data, sorted(found))
