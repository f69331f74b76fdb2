"""Where documents come from, and which of them are held out.

    source (stdlib | files | hub)  ->  rows  ->  text of a row  ->  Document  ->  train | validation

A corpus is read as a stream, so its size does not matter. Nor does the size of a document that is a file of its own.
Rows are held one at a time (a few at a time for Parquet and for data sets from the Hub). Whether a document is held
out depends only on its index and the split's seed, so nothing needs the number of documents or a list of them.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from train_loop.config.schema import DataConfig
from train_loop.data.formats import Document
from train_loop.data.sources import files, hub, stdlib
from train_loop.data.token_store import TRAIN, VALIDATION
from train_loop.rng import uniform

_SOURCES: dict[str, ModuleType] = {"stdlib": stdlib, "files": files, "hub": hub}


@dataclass(frozen=True)
class Corpus:
    """The documents that a configuration describes. Reading it yields the same documents every time."""

    data: DataConfig
    # By split: whether each document is left out because its text occurs elsewhere [documents].
    dropped: Mapping[str, npt.NDArray[np.bool_]] = field(default_factory=dict)

    def documents(self, split: str) -> Iterator[Document]:
        """The documents of "train" or "validation" in the source's order; InputError names what can't be read."""
        return (document for found, document in self.splits() if found == split)

    def splits(self) -> Iterator[tuple[str, Document]]:
        """Every document of the corpus and the split that it belongs to, in one pass over the source."""
        if not self.dropped:
            return self._every()
        left_out = {split: iter(each) for split, each in self.dropped.items()}
        return ((split, document) for split, document in self._every() if not next(left_out[split], False))

    def _every(self) -> Iterator[tuple[str, Document]]:
        """The documents of both splits, duplicates included."""
        data, source = self.data, _SOURCES[self.data.source]
        main = itertools.islice(source.documents(data, TRAIN), data.max_documents)
        if data.validation_files or data.validation_split:
            yield from ((TRAIN, document) for document in main)
            held_out = itertools.islice(source.documents(data, VALIDATION), data.max_documents)
            yield from ((VALIDATION, document) for document in held_out)
        else:
            chosen = held_out_documents(data.test_size, data.split_seed)
            following = next(chosen)
            for index, document in enumerate(main):
                yield VALIDATION if index == following else TRAIN, document
                if index == following:
                    following = next(chosen)

    def key(self) -> dict[str, Any]:
        """What this corpus is made from, without reading what was read before; the token store is filed under it."""
        data = self.data
        key: dict[str, Any] = {"source": data.source, "max_documents": data.max_documents}
        key |= _SOURCES[data.source].key(data)
        if data.drop_duplicates != "none":
            key["drop_duplicates"] = data.drop_duplicates
        if not (data.validation_files or data.validation_split):
            key |= {"test_size": data.test_size, "split_seed": data.split_seed}
        return key

    def size(self) -> int | None:
        """Bytes of text, if known before reading (for the standard library and for .txt files); else None."""
        return None if self.data.max_documents else _SOURCES[self.data.source].size(self.data)


def held_out_documents(test_size: float, seed: int) -> Iterator[int]:
    """Indices of the held-out documents, in ascending order and without end: a stratified random sample.

    The indices are cut into strata of length 1 / test_size, and one index is drawn from each stratum. So every prefix
    of the corpus holds out its share to within one document, a corpus that grows keeps its split, and a stream can be
    split before its length is known. The draws are counter-based: they are keyed by (seed, stratum).
    """
    length = 1 / test_size
    last = -1
    for stratum in itertools.count():
        # If the length is not a whole number, strata share an index at their border. It must not be yielded twice.
        last = max(last + 1, int((stratum + uniform("split", seed, stratum)) * length))
        yield last
