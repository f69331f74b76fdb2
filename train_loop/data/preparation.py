"""Documents -> token store on disk + ledger: prepared once, then memory-mapped.

    documents -> pieces -> token ids -> tokens.bin, one stream per split:  d0 d0 d0 EOS d1 d1 EOS d2 ... EOS

Documents are read, cut into pieces and encoded as a stream. This takes the memory of a few batches of pieces, however
many documents there are and however long they are.

A store is a folder named after a hash of what it was made from (corpus, split, tokenizer). So a second run finds it
at once, and any change makes a new one. It is written under a temporary name and renamed when it is complete. A lock
file makes sure that processes which ask for it at the same time build it only once.

    <cache>/stores/<hash>/
        ledger.json               what went in and what came out, per split; it adds up
        tokenizer/                if one was trained
        train/ validation/
            tokens.bin            uint16, or uint32 for a vocabulary above 65,536; little-endian
            documents.bin         per document: where its tokens end in tokens.bin and its name ends in names.bin
            names.bin             UTF-8
"""

import hashlib
import itertools
import json
import os
import shutil
import socket
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from train_loop.config.load import cache_dir
from train_loop.config.schema import Config, DataConfig
from train_loop.console import Progress, say
from train_loop.data import tokenizer as tokenizers
from train_loop.data.corpus import Corpus, key_hash
from train_loop.data.formats import Document
from train_loop.data.round_trip import RoundTrip, warn
from train_loop.data.token_store import _DOCUMENT, TRAIN, VALIDATION, Ledger, Prepared, TokenStore, target_counts
from train_loop.errors import InputError
from train_loop.files import sync

_FORMAT = 2
# Characters that one core encodes at once. That takes a few hundredths of a second and some megabytes.
_BATCH_CHARACTERS = 125_000


def prepare(config: Config, tokenizer: PreTrainedTokenizerFast | None = None, shown: bool = True) -> Prepared:
    """The token store of a configuration; built first if it does not exist yet.

    The store is the same whether documents are isolated or not; only the ledger differs. A `tokenizer` is used instead
    of the configured one, for example to evaluate another model on this data; `shown` prints progress. Raises
    InputError if the data cannot be read, or if a split has no target.
    """
    corpus = Corpus(config.data)
    vocab_size = config.tokenizer.train_vocab_size
    key: dict[str, Any] = {"format": _FORMAT, "corpus": corpus.key()}
    stores = cache_dir(config) / "stores"
    folder = stores / key_hash(key | {"tokenizer": {"train_vocab_size": vocab_size}})
    if tokenizer is None and vocab_size is None:
        name = config.tokenizer.name_or_path or config.model.name_or_path
        if name is None:
            cure = "name one with tokenizer.name_or_path, or train one with tokenizer.train_vocab_size"
            raise InputError(f"tokenizer: {cure}")
        tokenizer = tokenizers.load(name)
    if tokenizer is not None:
        made_with = tokenizers.fingerprint(tokenizer)
        trained = folder / "tokenizer"  # a run's own model, evaluated later, has it too
        if not trained.is_dir() or tokenizers.fingerprint(tokenizers.load(str(trained))) != made_with:
            folder = stores / key_hash(key | {"tokenizer": made_with})
    if not folder.exists():
        stores.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                _build(folder, corpus, tokenizer, vocab_size, shown)
    elif shown:
        say(f"data: already prepared in {folder}")
    prepared = _open(folder, tokenizer)
    if config.data.isolate_documents:
        for store in (prepared.train, prepared.validation):
            store.ledger = store.ledger.isolated()
        _refuse_unusable(prepared.train.ledger, prepared.validation.ledger, config.data)
    return prepared


def _open(folder: Path, tokenizer: PreTrainedTokenizerFast | None) -> Prepared:
    """Open a store that is on disk; `tokenizer` is None if the store holds its own."""
    try:
        found = json.loads((folder / "ledger.json").read_text(encoding="utf-8"))
        dtype, fingerprint = np.dtype(found["dtype"]), found["fingerprint"]
        train, validation = (TokenStore(folder / split, dtype, Ledger(**found[split])) for split in (TRAIN, VALIDATION))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: damaged ({error}); remove the folder to prepare it again") from None
    return Prepared(folder, tokenizer or tokenizers.load(str(folder / "tokenizer")), train, validation, fingerprint)


def _build(
    folder: Path, corpus: Corpus, tokenizer: PreTrainedTokenizerFast | None, vocab_size: int | None, shown: bool
) -> None:
    """Write a store under a temporary name and rename it when it is complete. A failure leaves nothing behind."""
    # Named after the host: on a disk that several hosts share, a lock may only hold within one host.
    prefix = f"{folder.name}.tmp-{socket.gethostname()}-"
    for stale in folder.parent.glob(f"{prefix}*"):  # left by a process that was killed: we hold the lock
        shutil.rmtree(stale)
    temporary = folder.with_name(f"{prefix}{os.getpid()}")
    temporary.mkdir()
    try:
        if tokenizer is None:
            assert vocab_size is not None
            tokenizer = _train_tokenizer(corpus, vocab_size, shown)
            tokenizer.save_pretrained(temporary / "tokenizer")
        dtype = np.dtype("<u2" if len(tokenizer) <= 2**16 else "<u4")
        ledgers = _write_splits(temporary, corpus, tokenizer, dtype, shown)
        _refuse_unusable(ledgers[TRAIN], ledgers[VALIDATION], corpus.data)
        identity = [tokenizers.fingerprint(tokenizer), *(ledgers[split].sha256 for split in (TRAIN, VALIDATION))]
        content = {
            "format": _FORMAT,
            "dtype": dtype.str,
            "fingerprint": hashlib.sha256("\n".join(identity).encode()).hexdigest(),
        } | {split: asdict(ledger) for split, ledger in ledgers.items()}
        (temporary / "ledger.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for path in temporary.rglob("*"):
            sync(path)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.exists():  # if it does, another host was faster: the same documents give the same store
                raise
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _train_tokenizer(corpus: Corpus, vocab_size: int, shown: bool) -> PreTrainedTokenizerFast:
    """Train a tokenizer on the training documents."""
    with Progress("training the tokenizer, reading", "B", None, shown=shown) as progress:

        def texts() -> Iterator[str]:
            words = tokenizers.untrained()
            for document in corpus.documents(TRAIN):
                for text in tokenizers.pieces(words, document.blocks):  # no word is cut, so the counts are the same
                    progress.update(len(text.encode()))
                    yield text

        return tokenizers.train(texts(), vocab_size)


def _refuse_unusable(train: Ledger, validation: Ledger, data: DataConfig) -> None:
    """Raise an InputError if a split has nothing to predict."""
    total = train.documents + validation.documents
    if total == 0:
        empty = train.empty_documents + validation.empty_documents
        raise InputError(f"data: no document with text ({empty} empty ones were left out); check data.text_field")
    cure = "name data with more text"
    if not (data.validation_files or data.validation_split):
        cure = (
            f"data.test_size is {data.test_size} of {total} documents; name separate validation data "
            "(data.validation_files or data.validation_split), change data.test_size or add documents"
        )
    for split, ledger in ((TRAIN, train), (VALIDATION, validation)):
        if ledger.trained_targets == 0:
            raise InputError(f"data: the {split} split has {ledger.documents} documents but no target; {cure}")


class _SplitWriter:
    """Appends the documents of one split to its three files, and keeps its ledger."""

    def __init__(self, folder: Path, core: Tokenizer, eos: int, dtype: np.dtype[Any], compress: bool) -> None:
        folder.mkdir()
        self.core, self.eos, self.dtype = core, eos, dtype
        self.tokens, self.documents, self.names = (
            open(folder / name, "wb", buffering=1 << 20) for name in ("tokens.bin", "documents.bin", "names.bin")
        )
        self.ledger = Ledger()
        self.round_trip = RoundTrip(core, self.ledger)
        self.digest = hashlib.sha256()
        self.gzip = zlib.compressobj(9, wbits=31) if compress else None
        self.name_end = 0
        self.begins = True  # whether the next token is a document's first

    def __enter__(self) -> "_SplitWriter":
        return self

    def __exit__(self, *error: object) -> None:
        for file in (self.tokens, self.documents, self.names):
            file.close()

    def add_text(self, text: str, ids: npt.NDArray[np.uint32]) -> int:
        """Add a piece of a document's text and its token ids [tokens]; return its size in bytes of UTF-8."""
        content = text.encode()
        ledger = self.ledger
        self.round_trip.add(text, ids, self.begins)
        if self.begins and len(ids):
            size = tokenizers.first_token_bytes(self.core, text, int(ids[0]))
            ledger.first_token_bytes += size
            self.begins = False
            # The stream's first token is never a target, so its bytes don't count for bits per byte.
            if ledger.text_tokens + ledger.eos_tokens == 0:
                ledger.first_tokens, ledger.predicted_bytes = 1, -size
        ledger.bytes += len(content)
        ledger.predicted_bytes += len(content)
        ledger.text_tokens += len(ids)
        if self.gzip is not None:
            ledger.gzip_bytes += len(self.gzip.compress(content))
        self._write(ids)
        return len(content)

    def end_document(self, name: str) -> None:
        """Add the end-of-text token to the document whose text was added, and record its name."""
        self._write([self.eos])
        self.begins = True
        ledger = self.ledger
        ledger.documents += 1
        ledger.eos_tokens += 1
        self.name_end += self.names.write(name.encode("utf-8", "replace"))
        ends = np.array([(ledger.text_tokens + ledger.eos_tokens, self.name_end)], dtype=_DOCUMENT)
        self.documents.write(ends.tobytes())

    def _write(self, ids: npt.ArrayLike) -> None:
        """Append token ids [tokens] to tokens.bin and to its digest."""
        content = np.asarray(ids, dtype=self.dtype).tobytes()
        self.digest.update(content)
        self.tokens.write(content)

    def finish(self) -> Ledger:
        """The ledger, completed and checked."""
        ledger = self.ledger
        if self.gzip is not None:
            ledger.gzip_bytes += len(self.gzip.flush())
        tokens = ledger.text_tokens + ledger.eos_tokens
        if tokens and not ledger.first_tokens:  # the documents' text has no tokens, so the first token is an EOS
            ledger.first_tokens = 1
        ledger.trained_targets = int(target_counts(tokens, max(tokens, 1)).sum())
        ledger.dropped_tokens = tokens - ledger.first_tokens - ledger.trained_targets
        ledger.sha256 = self.digest.hexdigest()
        ledger.check()
        return ledger


def _write_splits(
    folder: Path, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, dtype: np.dtype[Any], shown: bool
) -> dict[str, Ledger]:
    """Write the files of both splits in one pass over the corpus; return their ledgers."""
    core, eos = tokenizers.encoder(tokenizer), tokenizer.eos_token_id
    assert isinstance(eos, int)
    with (
        _SplitWriter(folder / TRAIN, core, eos, dtype, compress=False) as train,
        _SplitWriter(folder / VALIDATION, core, eos, dtype, compress=True) as validation,
        Progress("preparing data", "B", corpus.size(), shown=shown) as progress,
    ):
        writers = {TRAIN: train, VALIDATION: validation}
        batches, again = itertools.tee(_batches(core, corpus.splits(), writers))
        texts = ([text for _, _, text, _ in batch] for batch in again)
        for batch, encoded in zip(batches, tokenizers.encode_batches(core, texts), strict=True):
            read = 0
            for (split, name, text, last), ids in zip(batch, encoded, strict=True):
                read += writers[split].add_text(text, ids)
                if last:
                    writers[split].end_document(name)
            progress.update(read)
        ledgers = {split: writer.finish() for split, writer in writers.items()}
    warn([writer.round_trip for writer in writers.values()])
    return ledgers


_Piece = tuple[str, str, str, bool]  # split, name, text, whether it ends the document


def _batches(
    core: Tokenizer, documents: Iterable[tuple[str, Document]], writers: dict[str, _SplitWriter]
) -> Iterator[list[_Piece]]:
    """Pieces of documents in batches of about `_BATCH_CHARACTERS`. Documents without text are counted, not kept."""
    batch: list[_Piece] = []
    size = 0
    for split, (name, blocks) in documents:
        text = ""
        for text, following in itertools.pairwise(itertools.chain(tokenizers.pieces(core, blocks), [""])):
            batch.append((split, name, text, not following))
            size += len(text)
            if size >= _BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
        if not text:
            writers[split].ledger.empty_documents += 1
    if batch:
        yield batch
