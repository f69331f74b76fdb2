"""Prepared data, opened: a memory-mapped stream of tokens for each split, and the ledger that accounts for it.

tokens   t0 t1 t2 t3 t4 t5 t6 ...          block_size = 3
window 0 [t0 t1 t2 t3]                     predicts t1 t2 t3
window 1          [t3 t4 t5 t6]            predicts t4 t5 t6
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from train_loop.errors import InputError

TRAIN, VALIDATION = "train", "validation"
_DOCUMENT = np.dtype([("token_end", "<u8"), ("name_end", "<u8")])


@dataclass
class Ledger:
    """The ledger of one split: text_tokens + eos_tokens = trained_targets + first_tokens + dropped_tokens."""

    documents: int = 0  # with text; each ends with one end-of-text token
    empty_documents: int = 0  # without text, which are left out
    bytes: int = 0  # of UTF-8, of the documents
    text_tokens: int = 0
    eos_tokens: int = 0
    trained_targets: int = 0  # tokens that are predicted once per epoch
    first_tokens: int = 0  # only context: the first of the stream, or of each document if documents are isolated
    dropped_tokens: int = 0  # in no window
    predicted_bytes: int = 0  # without those of the first tokens: what bits per byte are measured on
    first_token_bytes: int = 0  # of all documents
    unknown_tokens: int = 0  # text tokens that stand for what the tokenizer has no token for
    checked_documents: int = 0  # of which it was looked at whether their text comes back from their tokens
    changed_documents: int = 0  # of those, whose text does not come back
    severed_words: int = 0  # how often a word was too long to be encoded as a whole
    gzip_bytes: int = 0  # of all documents, concatenated, under gzip -9; validation only, else 0
    sha256: str = ""  # of tokens.bin

    def check(self) -> None:
        """Raise ArithmeticError if the ledger does not add up: a bug in this package, not a mistake in the data."""
        tokens = self.text_tokens + self.eos_tokens
        accounted = self.trained_targets + self.first_tokens + self.dropped_tokens
        if tokens != accounted or self.eos_tokens != self.documents:
            raise ArithmeticError(f"the ledger does not add up: {tokens} tokens against {accounted} accounted for")

    def isolated(self) -> "Ledger":
        """The same ledger, for training that never predicts a document's first token from the document before it."""
        ledger = replace(
            self,
            trained_targets=self.text_tokens + self.eos_tokens - self.documents,
            first_tokens=self.documents,
            predicted_bytes=self.bytes - self.first_token_bytes,
        )
        ledger.check()
        return ledger


class TokenStore:
    """One split of a prepared store, memory-mapped: `tokens` are its token ids [tokens], uint16 or uint32."""

    def __init__(self, folder: Path, dtype: npt.DTypeLike, ledger: Ledger) -> None:
        self.folder, self.ledger = folder, ledger
        expected = (ledger.text_tokens + ledger.eos_tokens) * np.dtype(dtype).itemsize
        path = folder / "tokens.bin"
        found = path.stat().st_size if path.exists() else 0
        if found != expected:
            raise InputError(f"{path}: damaged, has {found} bytes instead of {expected}; remove {folder.parent}")
        # A plain view of the map, because memmap's own indexing runs Python code each time.
        self.tokens: npt.NDArray[Any] = np.asarray(np.memmap(path, dtype, "r")) if expected else np.empty(0, dtype)
        documents = folder / "documents.bin"
        self._documents = np.memmap(documents, _DOCUMENT, "r") if ledger.documents else np.empty(0, _DOCUMENT)

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    @property
    def document_ends(self) -> npt.NDArray[np.uint64]:
        """Where each document ends in the stream: one past its end-of-text token [documents]."""
        return self._documents["token_end"]

    def document_at(self, token: int) -> tuple[str, int]:
        """The name of the document that a token of the stream belongs to, and the token's place in it."""
        index = int(np.searchsorted(self.document_ends, token, side="right"))
        start, name_start = map(int, self._documents[index - 1]) if index else (0, 0)
        with open(self.folder / "names.bin", "rb") as names:
            names.seek(name_start)
            name = names.read(int(self._documents["name_end"][index]) - name_start)
        return name.decode("utf-8"), token - start


@dataclass
class Prepared:
    """Data that is ready to train on, and the tokenizer that it was encoded with.

    `fingerprint` is the SHA-256 of the tokenizer and of the tokens of both splits; the same on every host.
    """

    folder: Path
    tokenizer: PreTrainedTokenizerFast
    train: TokenStore
    validation: TokenStore
    fingerprint: str

    def ledger(self) -> dict[str, Any]:
        """The ledgers of both splits, as plain values."""
        splits = {TRAIN: self.train, VALIDATION: self.validation}
        return {"fingerprint": self.fingerprint} | {split: asdict(store.ledger) for split, store in splits.items()}


def window_count(tokens: int, block_size: int) -> int:
    """The number of windows over a stream. Each is block_size + 1 tokens wide and starts block_size after the last one.

    So neighbours share one token: it is the last target of one and the first input of the next. Every token except
    the stream's first is predicted once. The last window may be shorter.
    """
    return max(0, -(-(tokens - 1) // block_size))


def target_counts(tokens: int, block_size: int) -> npt.NDArray[np.int64]:
    """The number of targets of each window [windows]: block_size, except for the last one, which may be shorter."""
    counts = np.full(window_count(tokens, block_size), block_size, dtype=np.int64)
    if len(counts):
        counts[-1] = tokens - 1 - block_size * (len(counts) - 1)
    return counts
