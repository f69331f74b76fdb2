"""Documents whose text occurs more than once: counted always, left out if `data.drop_duplicates` says so.

A validation document that is also trained on makes the validation loss lie. Two documents are the same if the 128-bit
hashes (XXH3) of their UTF-8 bytes are: among 10^9 different documents, two have the same hash with a probability of
10^-21. Hashes take 16 bytes of memory per document while it is read, and three times that while they are compared.

Documents to leave out have to be known before the first is written, because its twin may come later and on the other
side. So the data is read once more, before everything else, and only if documents are to be left out.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from train_loop.console import Progress
from train_loop.data.corpus import Corpus
from train_loop.data.token_store import TRAIN, VALIDATION, Ledger

_HASH = np.dtype("S16")  # compared as bytes, all 16 of them
_EMPTY = bytes(16)  # in place of the hash of a document without text
_AT_ONCE = 1 << 20  # hashes that are looked up at once


class Hashes:
    """The hashes of the documents of one split, in order; a document may come in parts."""

    def __init__(self) -> None:
        self._hashes = bytearray()
        self._begun: xxhash.xxh3_128 | None = None

    def update(self, content: bytes) -> None:
        """Add a part of a document's text, in UTF-8."""
        if self._begun is None:
            self._begun = xxhash.xxh3_128()
        self._begun.update(content)

    def end(self) -> None:
        """The document is complete; it may have no text."""
        self._hashes += _EMPTY if self._begun is None else self._begun.digest()
        self._begun = None

    def array(self) -> npt.NDArray[Any]:
        """All of them [documents]; nothing may be added while the array is in use."""
        return np.frombuffer(self._hashes, _HASH)


class Twins(NamedTuple):
    """How many documents have twins, and the first training document that has one on the other side, and its twin."""

    repeated: dict[str, int]  # by split: whose text occurred before in the same split
    shared: dict[str, int]  # by split: whose text is also in the other split
    example: tuple[int, int] | None  # (training document, validation document)


def count(train: npt.NDArray[Any], validation: npt.NDArray[Any]) -> Twins:
    """Count the twins among the hashes of the documents of both splits [documents], none of which is empty."""
    sides = {TRAIN: train, VALIDATION: validation}
    ordered = {split: np.sort(hashes) for split, hashes in sides.items()}
    repeated = {split: int((hashes[1:] == hashes[:-1]).sum()) for split, hashes in ordered.items()}
    in_train, in_validation = _found(validation, ordered[TRAIN]), _found(train, ordered[VALIDATION])
    example = None
    if in_validation.any():
        first = int(in_validation.argmax())
        example = first, int((validation == train[first]).argmax())
    return Twins(repeated, {TRAIN: int(in_validation.sum()), VALIDATION: int(in_train.sum())}, example)


def without(corpus: Corpus, shown: bool) -> Corpus:
    """The corpus without the documents that `data.drop_duplicates` leaves out, for which it is read once.

    "across" leaves out training documents that are also validation documents; "all" also leaves out, on each side, all
    but the first of the same documents.
    """
    sides = {TRAIN: Hashes(), VALIDATION: Hashes()}
    with Progress("looking for duplicates, reading", "B", corpus.size(), shown=shown) as progress:
        for split, document in corpus.splits():
            for text in document.blocks:
                content = text.encode()
                if content:
                    sides[split].update(content)
                progress.update(len(content))
            sides[split].end()
    hashes = {split: side.array() for split, side in sides.items()}
    dropped = {split: np.zeros(len(each), dtype=bool) for split, each in hashes.items()}
    if corpus.data.drop_duplicates == "all":
        dropped = {split: _repeats(each) for split, each in hashes.items()}
    dropped[TRAIN] |= _found(hashes[TRAIN], np.sort(hashes[VALIDATION]))
    for split, each in hashes.items():
        dropped[split] &= each != b""  # documents without text are counted as such
    return replace(corpus, dropped=dropped)


def counts(train: Ledger, validation: Ledger) -> dict[str, int]:
    """Documents of both splits, and how many of them are shared, repeated or left out."""
    return {
        "train": train.documents,
        "validation": validation.documents,
        "shared": validation.shared_documents,
        "repeated": train.repeated_documents,
        "dropped": train.dropped_documents + validation.dropped_documents,
    }


def warning(train: Ledger, validation: Ledger) -> str | None:
    """A line about documents that are on both sides; None if there are none."""
    shared, total = validation.shared_documents, validation.documents
    if not shared:
        return None
    documents = f"{shared:,} of {total:,} validation documents ({shared / total:.1%}) are also training documents"
    example = f", e.g. {validation.shared_example}" if validation.shared_example else ""
    cure = "data.drop_duplicates: across leaves them out of training"
    return f"data: {documents}{example}, which lowers the validation loss; {cure}"


def _found(hashes: npt.NDArray[Any], ordered: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Whether each hash [documents] is among the sorted ones [any number]."""
    found = np.zeros(len(hashes), dtype=bool)
    for start in range(0, len(hashes) if len(ordered) else 0, _AT_ONCE):
        some = hashes[start : start + _AT_ONCE]
        place = np.searchsorted(ordered, some).clip(max=len(ordered) - 1)
        found[start : start + _AT_ONCE] = ordered[place] == some
    return found


def _repeats(hashes: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Whether each hash [documents] occurred before."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    repeats = np.zeros(len(hashes), dtype=bool)
    repeats[order[1:][ordered[1:] == ordered[:-1]]] = True
    return repeats
