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
    """The ledger of one split: text_tokens + eos_tokens = trained_targets + first_tokens + dropped_tokens.

    Args:
        documents: documents with text; each ends in one end-of-text token.
        empty_documents: documents without text, left out.
        bytes: UTF-8 bytes of the documents.
        text_tokens: tokens of text.
        eos_tokens: end-of-text tokens.
        trained_targets: tokens that are predicted once per epoch.
        first_tokens: tokens that only serve as context: the first of the stream, or of each document where documents
            are isolated.
        dropped_tokens: tokens that are in no window.
        predicted_bytes: bytes without those of the first tokens: what bits per byte refer to.
        first_token_bytes: bytes of all documents' first tokens.
        gzip_bytes: size of the documents, one after the other, under gzip -9; validation only, else 0.
        sha256: of tokens.bin.
    """

    documents: int = 0
    empty_documents: int = 0
    bytes: int = 0
    text_tokens: int = 0
    eos_tokens: int = 0
    trained_targets: int = 0
    first_tokens: int = 0
    dropped_tokens: int = 0
    predicted_bytes: int = 0
    first_token_bytes: int = 0
    gzip_bytes: int = 0
    sha256: str = ""

    def check(self) -> None:
        """Raises ArithmeticError where the ledger does not add up: a mistake in this package, not in the data."""
        tokens = self.text_tokens + self.eos_tokens
        accounted = self.trained_targets + self.first_tokens + self.dropped_tokens
        if tokens != accounted or self.eos_tokens != self.documents:
            raise ArithmeticError(f"the ledger does not add up: {tokens} tokens against {accounted} accounted for")

    def isolated(self) -> "Ledger":
        """The same ledger where no document's first token is predicted from the document before it."""
        ledger = replace(
            self,
            trained_targets=self.text_tokens + self.eos_tokens - self.documents,
            first_tokens=self.documents,
            predicted_bytes=self.bytes - self.first_token_bytes,
        )
        ledger.check()
        return ledger


class TokenStore:
    """One split of a prepared store, memory-mapped.

    Attributes:
        tokens: the stream of token ids [tokens], uint16 or uint32.
        ledger: what is in it.
    """

    def __init__(self, folder: Path, dtype: npt.DTypeLike, ledger: Ledger) -> None:
        self.folder, self.ledger = folder, ledger
        expected = (ledger.text_tokens + ledger.eos_tokens) * np.dtype(dtype).itemsize
        path = folder / "tokens.bin"
        found = path.stat().st_size if path.exists() else 0
        if found != expected:
            raise InputError(f"{path}: damaged, {found} bytes where {expected} belong; remove {folder.parent}")
        # A plain view of the map: memmap's own indexing runs Python code each time.
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
        """Name of the document that a token of the stream belongs to, and the token's place in it."""
        index = int(np.searchsorted(self.document_ends, token, side="right"))
        start, name_start = map(int, self._documents[index - 1]) if index else (0, 0)
        with open(self.folder / "names.bin", "rb") as names:
            names.seek(name_start)
            name = names.read(int(self._documents["name_end"][index]) - name_start)
        return name.decode("utf-8"), token - start


@dataclass
class Prepared:
    """Data that is ready to train on.

    Attributes:
        folder: where it lies.
        tokenizer: what made it.
        train, validation: the two splits.
        fingerprint: SHA-256 of the tokens of both splits and of the tokenizer: equal on every host, whatever the paths.
    """

    folder: Path
    tokenizer: PreTrainedTokenizerFast
    train: TokenStore
    validation: TokenStore
    fingerprint: str

    def ledger(self) -> dict[str, Any]:
        """The ledgers of both splits as plain values."""
        splits = {TRAIN: self.train, VALIDATION: self.validation}
        return {"fingerprint": self.fingerprint} | {split: asdict(store.ledger) for split, store in splits.items()}


def window_count(tokens: int, block_size: int) -> int:
    """Windows over a stream: each is block_size + 1 tokens wide and starts block_size after the one before.

    So neighbours share one token, which is the last target of one and the first input of the next: every token but
    the stream's first is predicted once. The last window may be shorter.
    """
    return max(0, -(-(tokens - 1) // block_size))


def target_counts(tokens: int, block_size: int) -> npt.NDArray[np.int64]:
    """Targets of each window [windows]: block_size, but for the last, shorter one."""
    counts = np.full(window_count(tokens, block_size), block_size, dtype=np.int64)
    if len(counts):
        counts[-1] = tokens - 1 - block_size * (len(counts) - 1)
    return counts
