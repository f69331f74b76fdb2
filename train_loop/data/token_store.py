"""Prepared data, opened: a stream of tokens for each split, and the ledger that accounts for it.

tokens   t0 t1 t2 t3 t4 t5 t6 ...          block_size = 3
window 0 [t0 t1 t2 t3]                     predicts t1 t2 t3
window 1          [t3 t4 t5 t6]            predicts t4 t5 t6
"""

import functools
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from train_loop.data.token_file import TokenFile, damaged
from train_loop.errors import one_line

TRAIN, VALIDATION = "train", "validation"
_DOCUMENT = np.dtype([("token_end", "<u8"), ("name_end", "<u8")])


@dataclass
class Ledger:
    """The ledger of one split: text_tokens + eos_tokens = trained_targets + first_tokens + dropped_tokens.

    And read_documents = documents + empty_documents + dropped_documents.
    """

    documents: int = 0  # with text; each ends with one end-of-text token
    empty_documents: int = 0  # without text (a null counts as none), which are left out
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
    empty_example: str = ""  # name of the first document without text
    read_documents: int = 0  # all that were read: those with text, empty ones and dropped ones; 0 in older ledgers
    dropped_documents: int = 0  # left out by data.drop_duplicates
    repeated_documents: int = 0  # whose text occurred before in the same split
    shared_documents: int = 0  # whose text is also in the other split
    shared_example: str = ""  # names of such a document, here and in the other split

    def check(self) -> None:
        """Raise ArithmeticError if the ledger does not add up: a bug in this package, not a mistake in the data."""
        tokens = self.text_tokens + self.eos_tokens
        accounted = self.trained_targets + self.first_tokens + self.dropped_tokens
        if tokens != accounted or self.eos_tokens != self.documents:
            raise ArithmeticError(f"the ledger does not add up: {tokens} tokens against {accounted} accounted for")
        documents = self.documents + self.empty_documents + self.dropped_documents
        if self.read_documents not in (0, documents):
            raise ArithmeticError(
                f"the ledger does not add up: {self.read_documents} documents read, {documents} accounted for"
            )

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
    """One split of a prepared store: `tokens` are its token ids [tokens], uint16 or uint32, read when asked for.

    Raises DamagedError, which names the file, when one is not what was written.
    """

    def __init__(self, folder: Path, dtype: npt.DTypeLike, ledger: Ledger, digest: str | None = None) -> None:
        self.folder, self.ledger = folder, ledger
        self.tokens = TokenFile(folder / "tokens.bin", dtype, ledger.text_tokens + ledger.eos_tokens, digest)

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    @functools.cached_property
    def _documents(self) -> npt.NDArray[Any]:
        """Where the documents end [documents], in memory: 16 bytes each."""
        path, expected = self.folder / "documents.bin", self.ledger.documents
        try:
            found = np.fromfile(path, _DOCUMENT)
        except OSError as error:
            raise damaged(path, error.strerror or str(error), self.folder.parent) from None
        if len(found) != expected:
            raise damaged(path, f"has {len(found)} documents instead of {expected}", self.folder.parent)
        return found

    @property
    def document_ends(self) -> npt.NDArray[np.uint64]:
        """Where each document ends in the stream: one past its end-of-text token [documents]."""
        return self._documents["token_end"]

    def document_at(self, token: int) -> tuple[str, int]:
        """The name of the document that a token of the stream belongs to, and the token's place in it."""
        index = int(np.searchsorted(self.document_ends, token, side="right"))
        start, name_start = map(int, self._documents[index - 1]) if index else (0, 0)
        path = self.folder / "names.bin"
        try:
            with open(path, "rb") as names:
                names.seek(name_start)
                name = names.read(int(self._documents["name_end"][index]) - name_start).decode("utf-8")
        except (OSError, ValueError) as error:
            raise damaged(path, one_line(error), self.folder.parent) from None
        return name, token - start


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
