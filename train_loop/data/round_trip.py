"""What a tokenizer loses of the texts that are prepared: counted in the ledger, and said once with an example.

Unknown tokens are all counted. Whether a document's text comes back from its tokens is looked at in a sample: decoding
everything would take as long as encoding it. Byte-level tokenizers lose nothing, so theirs is not looked at.
"""

import json
from collections.abc import Collection

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from train_loop.console import say
from train_loop.data.token_store import Ledger
from train_loop.data.tokenizer import LONGEST_WORD, Severed

# The first documents are all looked at, then one of so many; of each its first characters.
_ALL, _ONE_OF, _CHARACTERS = 1000, 64, 2000
_SHOWN = 40  # characters of an example


class RoundTrip:
    """Keeps the part of a split's ledger that says what its tokens lost."""

    def __init__(self, core: Tokenizer, ledger: Ledger) -> None:
        self.core, self.ledger = core, ledger
        self.example: tuple[str, str] | None = None  # a text, and what came back of it
        self._unknown = _unknown(core)
        self._exact = _keeps_every_byte(core)

    def add(self, text: str, ids: npt.NDArray[np.uint32], begins: bool) -> None:
        """Look at a piece of a document and its token ids [tokens]; `begins` says whether it is the first piece."""
        ledger = self.ledger
        if self._unknown is not None:
            ledger.unknown_tokens += int(np.count_nonzero(ids == self._unknown))
        ledger.severed_words += isinstance(text, Severed)
        if self._exact or not begins or (ledger.documents >= _ALL and ledger.documents % _ONE_OF):
            return
        if len(text) > _CHARACTERS:
            text = text[:_CHARACTERS]
            found = self.core.encode(text, add_special_tokens=False).ids
        else:
            found = ids.tolist()
        back = self.core.decode(found, skip_special_tokens=False)
        ledger.checked_documents += 1
        if back != text:
            ledger.changed_documents += 1
            self.example = self.example or (text, back)


def warn(trips: Collection[RoundTrip]) -> None:
    """Say what was lost, if anything was, with an example."""
    ledgers = [trip.ledger for trip in trips]
    tokens, unknown, checked, changed, severed = (
        sum(getattr(each, name) for each in ledgers)
        for name in ("text_tokens", "unknown_tokens", "checked_documents", "changed_documents", "severed_words")
    )
    if unknown:
        say(f"warning: {unknown:,} of {tokens:,} text tokens are unknown: the tokenizer has none for that text")
    if changed:
        text, back = _difference(*next(trip.example for trip in trips if trip.example is not None))
        some = f"{changed:,} of {checked:,} documents that were looked at"
        say(f"warning: the tokenizer changes text: {some} don't come back from their tokens; {text!r} becomes {back!r}")
    if severed:
        say(f"warning: a word of more than {LONGEST_WORD:,} characters was cut {severed:,} times to be encoded")


def _difference(text: str, back: str) -> tuple[str, str]:
    """Where two texts begin to differ, with a little of what is before."""
    same = next((at for at, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
    start = max(0, same - _SHOWN // 4)
    return text[start : start + _SHOWN], back[start : start + _SHOWN]


def _unknown(core: Tokenizer) -> int | None:
    """The id of the token for what has no other; None if there is none."""
    if not isinstance(core.model, models.Unigram):
        token = core.model.unk_token
        return None if token is None else core.token_to_id(token)
    number = json.loads(core.to_str())["model"].get("unk_id")
    return number if isinstance(number, int) else None


def _keeps_every_byte(core: Tokenizer) -> bool:
    """Whether it is certain that any text comes back from its tokens."""
    splitter, model = core.pre_tokenizer, core.model
    return (
        core.normalizer is None
        and isinstance(splitter, pre_tokenizers.ByteLevel)
        and not splitter.add_prefix_space
        and isinstance(core.decoder, decoders.ByteLevel)
        and isinstance(model, models.BPE)
        and not (model.continuing_subword_prefix or model.end_of_word_suffix)
        and all(model.token_to_id(byte) is not None for byte in pre_tokenizers.ByteLevel.alphabet())
        and all(token.special for token in core.get_added_tokens_decoder().values())
    )
