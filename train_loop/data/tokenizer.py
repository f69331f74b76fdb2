"""Load a tokenizer, or train a byte-level BPE on the training documents.

Text is encoded as it is. Nothing is added before or after it, and text that happens to spell a special token (such as
`<|endoftext|>` in a document about tokenizers) stays ordinary text. The only special token in the data is the
end-of-text token that the store adds after each document.

A document is encoded in pieces, cut where the cut changes no token. So it takes little memory, however long it is, and
all cores share the work. Small pieces are also faster, because what the Rust core needs for them stays in the caches.
Only where 131,072 characters have no end of a word among them (as in base64) is a word itself cut, and counted.

The Rust core hears no signals. So it works in threads of its own, and whoever waits for them can be interrupted.
"""

import hashlib
import os
import re
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from train_loop.config import paths
from train_loop.data import in_background, tokenizer_file
from train_loop.errors import InputError, one_line
from train_loop.trust import check_tokenizer

END_OF_TEXT = "<|endoftext|>"
_LONGEST_CHARACTER = 4  # bytes of UTF-8
# Sizes of pieces [characters]: if a place is known to be safe to cut, and if it has to be tried first, which costs
# the encoding of some 2,000 characters. Then how much text is looked at before and after a place.
_PIECE, _TRIED_PIECE, _MARGIN = 1 << 11, 1 << 17, 500
LONGEST_WORD = 1 << 17
"""Characters without an end of a word before a word is cut."""
# Training takes quadratic time in the length of a word. So in a text of so many characters without an end of a word,
# words of more than so many characters count as several.
_LONG_TEXT, _LONG_WORD = 1 << 12, 1 << 8
# Batches that wait for each thread, and the most threads: a sixteenth of the time goes into making arrays of ids, which
# holds Python's lock, so more threads would wait for each other.
_AHEAD, _MOST_WORKERS = 4, 16
_CORE_THREADS = "TOKENIZERS_PARALLELISM"
# The last place where a word ends, and where the white space after it is short and fully visible.
_END_OF_WORD = re.compile(r".*\S(?=[ \n\r\t]\s{0,9}\S)", re.DOTALL)


def load(name_or_path: str) -> PreTrainedTokenizerFast:
    """A tokenizer from the Hub or a local folder; InputError if there is none, or none that is fast and ends texts."""
    name_or_path = paths.find(name_or_path, "tokenizer")
    check_tokenizer(name_or_path)
    tokenizer = tokenizer_file.load(name_or_path)
    if tokenizer.eos_token_id is None:
        raise InputError(f"tokenizer {name_or_path}: has no end-of-text token (eos_token) to end documents with")
    return tokenizer


def train(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE (Sennrich et al., 2016; Radford et al., 2019) with at most `vocab_size` entries.

    It covers every text, since it falls back on single bytes. The end-of-text token has id 0. Raises InputError if
    there is too little text for so many entries.
    """
    tokenizer = untrained()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    splitter = untrained().pre_tokenizer  # not the tokenizer's own, which is locked while it learns
    in_background.train(tokenizer, trainer, (part for text in texts for part in _short_words(splitter, text)))
    if (size := tokenizer.get_vocab_size()) < vocab_size:
        only = f"the training documents yield only {size} entries; use at most {size}"
        raise InputError(f"tokenizer.train_vocab_size {vocab_size}: {only}")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)


def placeholder(entries: int) -> PreTrainedTokenizerFast:
    """A tokenizer that stands for one with so many entries, which has not been trained yet; the first ends texts."""
    core = Tokenizer(models.WordLevel({str(number): number for number in range(entries)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="0", bos_token="0")


def _short_words(splitter: Any, text: str) -> Iterator[str]:
    """A text in parts, so that no word is too long to learn from. It stays whole if none is, as in all prose."""
    start = 0
    if len(text) > _LONG_TEXT:
        for _, (begin, end) in splitter.pre_tokenize_str(text):
            for place in range(begin + _LONG_WORD, end, _LONG_WORD):
                yield text[start:place]
                start = place
    if start < len(text):
        yield text[start:]


def untrained() -> Tokenizer:
    """The tokenizer that `train` starts with: it splits text into words and has no entries yet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def encoder(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of the tokenizer's Rust core that encodes the spellings of special tokens as ordinary text."""
    return tokenizer_file.for_data(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))


def encode_batches(core: Tokenizer, batches: Iterable[list[str]]) -> Iterator[list[npt.NDArray[np.uint32]]]:
    """Token ids [tokens] of each text, batch by batch, in order. Some batches are encoded ahead, one on each core.

    The Rust core releases Python's lock, so our threads work side by side, each on its own batch. The core's own
    threads would share one batch after another, and at times some would sleep while others had work. What the core
    returns is much larger than the arrays made from it, and is not kept.
    """

    def encode(texts: list[str]) -> list[npt.NDArray[np.uint32]]:
        # array.array reads a list of ints three times as fast as numpy.
        encoded = core.encode_batch_fast(texts, add_special_tokens=False)
        return [np.frombuffer(array("I", each.ids), dtype=np.uint32) for each in encoded]

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores, _MOST_WORKERS)
    with _one_thread_a_call(), in_background.Workers(encode, workers) as ahead:
        pending: deque[Future[list[npt.NDArray[np.uint32]]]] = deque()
        try:
            for texts in batches:
                pending.append(ahead.submit(texts))
                if len(pending) > _AHEAD * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except (InputError, OSError):  # of whoever reads the texts
            raise
        except Exception as error:  # the core raises plain exceptions
            raise InputError(f"tokenizer: cannot encode the texts ({one_line(error)})") from None


@contextmanager
def _one_thread_a_call() -> Iterator[None]:
    """Have the Rust core encode each batch in the calling thread. It reads this variable at each call."""
    before = os.environ.get(_CORE_THREADS)
    os.environ[_CORE_THREADS] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_CORE_THREADS]
        else:
            os.environ[_CORE_THREADS] = before


class Severed(str):
    """A piece of a text that ends inside a word, which is too long to be encoded as a whole."""

    __slots__ = ()


def pieces(core: Tokenizer, blocks: Iterable[str], size: int | None = None) -> Iterator[str]:
    """Cut a text into pieces of about `size` characters. Their tokens, put together, are those of the whole text.

    A text is only cut at the end of a word, where the cut does not change the tokens around it. If there is no such
    place nearby, the piece grows. If `LONGEST_WORD` characters have no end of a word among them, the piece ends after
    them. It is a `Severed` one then, since this cut may change tokens. No piece is empty. The pieces don't depend on
    where the blocks end; at most a piece and a block are held. By default, `size` is so large that looking for places
    to cut costs little.
    """
    known = _splits_at_words(core)
    size = size or (_PIECE if known else _TRIED_PIECE)
    near = size
    held: list[str] = []  # what was read but not yielded yet; joined only when it may be enough
    length = 0
    for block in blocks:
        held.append(block)
        length += len(block)
        if length <= near + _MARGIN:
            continue
        text, start = "".join(held), 0
        while len(text) - start > near + _MARGIN:
            place = _cut(core, text, start + near // 2, start + near, known)
            endless = place is None and near >= LONGEST_WORD and _endless(text, start, start + near)
            if endless and (place := _cut(core, text, start, start + near, known)) is None:
                yield Severed(text[start:endless])
                start, near = endless, size
            elif place is not None:
                yield text[start:place]
                start, near = place, size
            else:
                near *= 2
        held, length = [text[start:]], len(text) - start
    if length:
        yield "".join(held)


def _endless(text: str, start: int, stop: int) -> int:
    """Where the first `LONGEST_WORD` characters end that follow the last end of a word in start..stop; 0 if beyond."""
    found = _END_OF_WORD.match(text, start, stop)
    end = (start if found is None else found.end()) + LONGEST_WORD
    return end if end <= stop else 0


def _splits_at_words(core: Tokenizer) -> bool:
    r"""Whether each word is encoded by itself, and a word ends wherever white space follows other characters.

    That is true of GPT-2's pattern (Radford et al., 2019), which is

        's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

    In a match with other characters, white space can only come first, and nothing looks back. Entries that were added
    to the vocabulary could span words; only special ones are harmless, because they are not looked for here.
    """
    splitter = core.pre_tokenizer
    return (
        core.normalizer is None
        and isinstance(splitter, pre_tokenizers.ByteLevel)
        and splitter.use_regex
        and not splitter.add_prefix_space
        and all(token.special for token in core.get_added_tokens_decoder().values())
    )


def _cut(core: Tokenizer, text: str, low: int, high: int, known: bool, tries: int = 20) -> int | None:
    """The last place in low..high where cutting `text` does not change the tokens around it; a few are tried."""

    def ids(start: int, stop: int) -> list[int]:
        return core.encode(text[max(start, 0) : stop], add_special_tokens=False).ids

    place = high
    for _ in range(tries):
        found = _END_OF_WORD.match(text, low, place)
        if found is None:
            return None
        place = found.end()
        before, after = place - _MARGIN, place + _MARGIN
        if known or ids(before, place) + ids(place, after) == ids(before, after):
            return place
    return None


def first_token_bytes(core: Tokenizer, text: str, token: int) -> int:
    """How many UTF-8 bytes of a text its first token, `token`, stands for."""
    splitter = core.pre_tokenizer
    if core.normalizer is None and isinstance(splitter, pre_tokenizers.ByteLevel) and not splitter.add_prefix_space:
        return len(core.id_to_token(token) or "")  # in this alphabet, one character stands for one byte
    start = text[:100]  # little to encode, but more than one token
    offsets = core.encode(start, add_special_tokens=False).offsets
    return len(start[: offsets[0][1]].encode()) if offsets else 0


def highest_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The highest token id, which is more than the number of entries allows if some ids are not used."""
    return max(tokenizer.get_vocab().values())


def strings(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[str]:
    """The text that each token adds [tokens], which is empty for all tokens of one character but the last."""
    found: list[str] = []
    start = read = 0  # start: where decoding begins again, for context; read: how many tokens are done

    def text(first: int, end: int) -> str:
        return str(tokenizer.decode(list(ids[first:end]), clean_up_tokenization_spaces=False))

    for end in range(1, len(ids) + 1):
        known, whole = text(start, read), text(start, end)
        if whole.endswith("\ufffd") and end < len(ids) and end - read < _LONGEST_CHARACTER:
            found.append("")
            continue
        found.append(whole[len(known) :])
        start, read = read, end
    return found


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of everything that decides how text becomes tokens: the core's definition and the end-of-text id."""
    core = tokenizer.backend_tokenizer
    if core.truncation or core.padding:  # part of the definition, but not used here
        core = encoder(tokenizer)
    return hashlib.sha256(f"{tokenizer.eos_token_id}\n{core.to_str()}".encode()).hexdigest()
