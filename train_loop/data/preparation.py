"""Documents -> token store on disk + ledger: prepared once, then only read.

    documents -> pieces -> token ids -> tokens.bin, one stream per split:  d0 d0 d0 EOS d1 d1 EOS d2 ... EOS

Documents are read, cut into pieces and encoded as a stream. This takes the memory of a few batches of pieces, however
many documents there are and however long they are.

A store is a folder named after a hash of what it was made from (the files' contents, split, tokenizer). So a second run
finds it at once, and any change makes a new one. It is written under a temporary name and renamed when it is complete
(`cache_folder.py`), and checked when it is opened (`store_folder.py`). If the data changes meanwhile, nothing is kept.

    <cache>/stores/<hash>/
        ledger.json               what went in and what came out, per split; it adds up; and each file's digest
        tokenizer/                if one was trained
        train/ validation/
            tokens.bin            uint16, or uint32 for a vocabulary above 65,536; little-endian
            documents.bin         per document: where its tokens end in tokens.bin and its name ends in names.bin
            names.bin             UTF-8
"""

import hashlib
import itertools
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from train_loop.config.load import cache_dir
from train_loop.config.schema import Config, DataConfig
from train_loop.console import Progress, say
from train_loop.data import cache_folder, duplicates, store_folder
from train_loop.data import tokenizer as tokenizers
from train_loop.data.cache_folder import writing
from train_loop.data.content import key_hash
from train_loop.data.corpus import Corpus
from train_loop.data.formats import Document
from train_loop.data.round_trip import RoundTrip, warn
from train_loop.data.token_store import _DOCUMENT, TRAIN, VALIDATION, Ledger, Prepared, TokenStore, target_counts
from train_loop.errors import InputError

# Characters that one core encodes at once. That takes a few hundredths of a second and some megabytes.
_BATCH_CHARACTERS = 125_000


def prepare(config: Config, tokenizer: PreTrainedTokenizerFast | None = None, shown: bool = True) -> Prepared:
    """The token store of a configuration; built first if it does not exist yet.

    The store is the same whether documents are isolated or not; only the ledger differs. A `tokenizer` is used instead
    of the configured one, for example to evaluate another model on this data; `shown` prints progress. Raises
    InputError if the data cannot be read or changes meanwhile, if a split has no target, if the store is damaged, or if
    the cache folder cannot be used.
    """
    vocab_size = config.tokenizer.train_vocab_size
    if tokenizer is None and vocab_size is None:
        name = config.tokenizer.name_or_path or config.model.name_or_path
        if name is None:
            cure = "name one with tokenizer.name_or_path, or train one with tokenizer.train_vocab_size"
            raise InputError(f"tokenizer: {cure}")
        tokenizer = tokenizers.load(name)
    stores = cache_dir(config.data) / "stores"
    with writing("data.cache_dir", stores):
        for folder in (stores, stores.parent):
            cache_folder.sweep(folder)
        prepared = _prepared(stores, Corpus(config.data), tokenizer, vocab_size, shown)
    for line in _notes(prepared, config.data) if shown else ():
        say(line)
    if config.data.isolate_documents:
        for store in (prepared.train, prepared.validation):
            store.ledger = store.ledger.isolated()
        _refuse_unusable(prepared.train.ledger, prepared.validation.ledger, config.data)
    return prepared


def _prepared(
    stores: Path, corpus: Corpus, tokenizer: PreTrainedTokenizerFast | None, vocab_size: int | None, shown: bool
) -> Prepared:
    """The store in the folder `stores`, found or built."""
    key: dict[str, Any] = {"format": store_folder.FORMAT, "corpus": corpus.key()}
    folder = stores / key_hash(key | {"tokenizer": {"train_vocab_size": vocab_size}})
    if tokenizer is not None:
        # A run's own model, evaluated later, has the tokenizer that was trained for it.
        made_with = tokenizers.fingerprint(tokenizer)
        if (
            not (folder / "tokenizer").is_dir()
            or tokenizers.fingerprint(store_folder.open_store(folder).tokenizer) != made_with
        ):
            folder = stores / key_hash(key | {"tokenizer": made_with})
    if os.path.lexists(folder):
        if shown:
            say(f"data: already prepared in {folder}")
    else:
        stores.mkdir(parents=True, exist_ok=True)
        with cache_folder.alone(Path(f"{folder}.lock")):
            if not folder.exists():
                _build(folder, corpus, key["corpus"], tokenizer, vocab_size, shown)
    return store_folder.open_store(folder, tokenizer)


def _notes(prepared: Prepared, data: DataConfig) -> Iterator[str]:
    """What is worth a look in the ledgers."""
    train, validation = prepared.train.ledger, prepared.validation.ledger
    for split, ledger in ((TRAIN, train), (VALIDATION, validation)):
        empty, total = ledger.empty_documents, ledger.empty_documents + ledger.documents
        if empty and data.source != "stdlib":  # which has empty files
            example = f", e.g. {ledger.empty_example}" if ledger.empty_example else ""
            share = f"{empty:,} of {total:,} {split} documents ({empty / total:.1%})"
            yield f"data: {share} are null or empty, and left out{example}"
    if line := duplicates.warning(train, validation):
        yield line


def _build(
    folder: Path,
    corpus: Corpus,
    key: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast | None,
    vocab_size: int | None,
    shown: bool,
) -> None:
    """Write a store under a temporary name and rename it when it is complete. A failure leaves nothing behind."""
    with cache_folder.unfinished(folder) as temporary:
        if corpus.data.drop_duplicates != "none":
            corpus = duplicates.without(corpus, shown)
        if tokenizer is None:
            assert vocab_size is not None
            tokenizer = _train_tokenizer(corpus, vocab_size, shown)
            tokenizer.save_pretrained(temporary / "tokenizer")
        dtype = np.dtype("<u2" if tokenizers.highest_id(tokenizer) < 2**16 else "<u4")
        ledgers = _write_splits(temporary, corpus, tokenizer, dtype, shown)
        if (now := corpus.key()) != key:
            changed = min(_files(key) ^ _files(now), default=("the data",))[0]
            raise InputError(f"{changed}: changed while it was prepared; start again when nothing writes to it")
        _refuse_unusable(ledgers[TRAIN], ledgers[VALIDATION], corpus.data)
        store_folder.complete(temporary, folder, dtype, ledgers, tokenizers.fingerprint(tokenizer))


def _files(key: Any) -> set[tuple[str, str]]:
    """The files in a corpus's key, each with its digest."""
    if isinstance(key, tuple) and len(key) == 2:
        return {key}
    values = key.values() if isinstance(key, dict) else key if isinstance(key, list) else ()
    return set().union(*map(_files, values))


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
    if train.dropped_documents and not train.documents:
        cure = f"data.drop_duplicates left out {train.dropped_documents}, which are on the other side, too; name others"
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
        self.hashes = duplicates.Hashes()
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
        self.hashes.update(content)
        self._write(ids)
        return len(content)

    def end_document(self, name: str) -> None:
        """Add the end-of-text token to the document whose text was added, and record its name."""
        self._write([self.eos])
        self.begins = True
        self.hashes.end()
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
        for split, dropped in corpus.dropped.items():
            ledger = writers[split].ledger
            ledger.dropped_documents = int(dropped.sum())
            ledger.read_documents += ledger.dropped_documents
            if ledger.read_documents != len(dropped):
                raise InputError(f"data: the {split} documents changed while they were read; start again")
        ledgers = {split: writer.finish() for split, writer in writers.items()}
    _count_twins(folder, dtype, writers)
    warn([writer.round_trip for writer in writers.values()])
    return ledgers


def _count_twins(folder: Path, dtype: np.dtype[Any], writers: dict[str, _SplitWriter]) -> None:
    """Complete the ledgers of both splits with the number of documents whose text occurs more than once."""
    found = duplicates.count(writers[TRAIN].hashes.array(), writers[VALIDATION].hashes.array())
    for split, writer in writers.items():
        writer.ledger.repeated_documents, writer.ledger.shared_documents = found.repeated[split], found.shared[split]
    if found.example is not None:
        names = []
        for (split, writer), index in zip(writers.items(), found.example, strict=True):
            store = TokenStore(folder / split, dtype, writer.ledger)
            names.append(store.document_at(int(store.document_ends[index]) - 1)[0])
        writers[VALIDATION].ledger.shared_example = f"{names[1]} = {names[0]}"


_Piece = tuple[str, str, str, bool]  # split, name, text, whether it ends the document


def _batches(
    core: Tokenizer, documents: Iterable[tuple[str, Document]], writers: dict[str, _SplitWriter]
) -> Iterator[list[_Piece]]:
    """Pieces of documents in batches of about `_BATCH_CHARACTERS`. Documents without text are counted, not kept."""
    batch: list[_Piece] = []
    size = 0
    for split, (name, blocks) in documents:
        text = ""
        ledger = writers[split].ledger
        ledger.read_documents += 1
        for text, following in itertools.pairwise(itertools.chain(tokenizers.pieces(core, blocks), [""])):
            batch.append((split, name, text, not following))
            size += len(text)
            if size >= _BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
        if not text:
            ledger.empty_documents += 1
            ledger.empty_example = ledger.empty_example or name
    if batch:
        yield batch
