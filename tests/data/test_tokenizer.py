"""Tokenizers: trained here, loaded, and what text that spells a special token becomes."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Encoding, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from tests.support.runs import text
from train_loop.data import tokenizer
from train_loop.errors import InputError


def test_training_is_deterministic_and_has_the_asked_size() -> None:
    first, second = (tokenizer.train([text(2000, 1)], 300) for _ in range(2))
    assert len(first) == 300
    assert tokenizer.fingerprint(first) == tokenizer.fingerprint(second)
    assert tokenizer.fingerprint(first) != tokenizer.fingerprint(tokenizer.train([text(2000, 2)], 300))


@given(st.text(max_size=50))
def test_every_text_comes_back(tokenizer_folder: Path, content: str) -> None:
    loaded = tokenizer.load(str(tokenizer_folder))
    content = content.encode("utf-8", "ignore").decode()
    ids = tokenizer.encoder(loaded).encode(content, add_special_tokens=False).ids
    assert loaded.decode(ids) == content


def test_the_fingerprint_survives_saving(tokenizer_folder: Path, tmp_path: Path) -> None:
    loaded = tokenizer.load(str(tokenizer_folder))
    loaded.model_max_length = 64
    loaded.save_pretrained(tmp_path)
    assert tokenizer.fingerprint(tokenizer.load(str(tmp_path))) == tokenizer.fingerprint(loaded)


def test_text_that_spells_a_special_token_is_ordinary_text(tokenizer_folder: Path) -> None:
    loaded = tokenizer.load(str(tokenizer_folder))
    [[ids]] = tokenizer.encode_batches(tokenizer.encoder(loaded), [["a <|endoftext|> b"]])
    assert loaded.eos_token_id not in ids and loaded.decode(ids) == "a <|endoftext|> b"
    assert loaded.eos_token_id in loaded("a <|endoftext|> b").input_ids  # what the library does by default


def byte_level(folder: Path) -> Tokenizer:
    return tokenizer.encoder(tokenizer.load(str(folder)))


def spaces_marked(folder: Path) -> Tokenizer:
    """As SentencePiece does it: a space becomes a letter of the word it precedes, and one is put before the text."""
    core = Tokenizer(models.BPE(unk_token="?", byte_fallback=False))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["?"], show_progress=False)
    core.train_from_iterator([text(2000, 1), MIXED], trainer)
    return core


def composed(folder: Path) -> Tokenizer:
    """With a normalizer, which makes one character of a letter and the accent after it."""
    core = byte_level(folder)
    core.normalizer = normalizers.NFC()
    return core


def modern(folder: Path) -> Tokenizer:
    """The pattern of newer models: line breaks stay with the punctuation before them, one sign with the word after."""
    core = byte_level(folder)
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return core


def prefixed(folder: Path) -> Tokenizer:
    core = byte_level(folder)
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return core


@pytest.mark.parametrize("before", [None, "true"])
def test_batches_are_encoded_side_by_side_each_by_one_thread(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    if before is None:
        monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    else:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
    core, meet, variables = byte_level(tokenizer_folder), threading.Barrier(2), set[str | None]()

    class Core:
        def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> list[Encoding]:
            meet.wait(timeout=30)  # breaks where the other batch waits for this one
            variables.add(os.environ.get("TOKENIZERS_PARALLELISM"))
            return core.encode_batch_fast(texts, add_special_tokens=add_special_tokens)

    batches = [[f"text {batch}", "of three"] for batch in range(6)]

    def encoded() -> Any:
        return tokenizer.encode_batches(cast(Tokenizer, Core()), batches)

    assert [[core.decode(list(ids)) for ids in batch] for batch in encoded()] == batches
    assert variables == {"false"} and os.environ.get("TOKENIZERS_PARALLELISM") == before
    left = encoded()
    next(left)
    left.close()  # as when the loop over it meets an error
    assert os.environ.get("TOKENIZERS_PARALLELISM") == before


# Characters of one to four bytes, accents of their own, line ends of Windows, runs of white space.
MIXED = "ä e\u0301 你好 🦜\r\n  the cat's 12;\n\n\tand\u00a0  of\u3000x \x1c y. " * 3
TOKENIZERS = [byte_level, spaces_marked, composed, modern, prefixed]


def ids(core: Tokenizer, texts: list[str]) -> list[int]:
    [encoded] = tokenizer.encode_batches(core, [texts])
    return [int(token) for each in encoded for token in each]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens_of_pieces_are_those_of_the_whole_text(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, kind: Callable[[Path], Tokenizer]
) -> None:
    monkeypatch.setattr(tokenizer, "_MARGIN", 100)
    core = kind(tokenizer_folder)
    content = "\n".join(
        text(number % 30, number) + MIXED * (number % 7 == 0) + " \n" * (number % 4) for number in range(400)
    )
    whole = core.encode(content, add_special_tokens=False).ids
    for block in (37, 1000, len(content)):
        blocks = [content[start : start + block] for start in range(0, len(content), block)]
        pieces = list(tokenizer.pieces(core, blocks, size=500))
        assert len(pieces) > 50 and "".join(pieces) == content
        assert ids(core, pieces) == whole


@given(content=st.text(st.sampled_from("ab'sä1!. \n\r\t\u00a0\u0301\x1c🦜"), max_size=300))
def test_no_word_of_gpt2s_pattern_is_cut(tokenizer_folder: Path, content: str) -> None:
    """Where a place to cut need not be tried, there is none that would not do."""
    core = byte_level(tokenizer_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "_MARGIN", 0)
        pieces = list(tokenizer.pieces(core, [content], size=4))
    assert "".join(pieces) == content
    assert ids(core, pieces) == core.encode(content, add_special_tokens=False).ids


def test_an_entry_that_spans_words_is_not_cut(tokenizer_folder: Path) -> None:
    loaded = tokenizer.load(str(tokenizer_folder))
    loaded.add_tokens(["the cat"])
    core = tokenizer.encoder(loaded)
    content = "the cat " * 2000
    pieces = list(tokenizer.pieces(core, [content], size=1000))
    assert len(pieces) > 5 and ids(core, pieces) == core.encode(content, add_special_tokens=False).ids


def test_no_more_than_a_piece_and_a_block_are_held(tokenizer_folder: Path) -> None:
    core = byte_level(tokenizer_folder)
    block, size = 1000, 500
    read = given = 0

    def blocks() -> Iterator[str]:
        nonlocal read
        for number in range(500):
            read += block
            yield text(block, number)[:block]

    for piece in tokenizer.pieces(core, blocks(), size=size):
        given += len(piece)
        assert len(piece) <= size + tokenizer._MARGIN
        assert read - given <= 2 * (block + size + tokenizer._MARGIN)
    assert given == read == 500 * block


ENDLESS = {"letter": "x", "spaces": " ", "lines": "\n", "digits": "17", "base64": "aB3+/", "han": "\u4f60\u597d"}


@pytest.mark.parametrize("kind", ENDLESS)
@pytest.mark.parametrize("core", [byte_level, composed])
def test_a_word_without_an_end_is_cut_at_a_stated_length(
    tokenizer_folder: Path, kind: str, core: Callable[[Path], Tokenizer]
) -> None:
    endless = (ENDLESS[kind] * 300_000)[:300_000]
    content = f"the cat. {endless} and so on"
    for block in (1 << 16, 99_999):
        blocks = (content[start : start + block] for start in range(0, len(content), block))
        pieces = list(tokenizer.pieces(core(tokenizer_folder), blocks))
        assert "".join(pieces) == content
        assert max(map(len, pieces)) <= tokenizer.LONGEST_WORD + tokenizer._MARGIN  # also of the rest
        cut = [piece for piece in pieces if isinstance(piece, tokenizer.Severed)]
        assert len(cut) == 2 and {*map(len, cut)} == {tokenizer.LONGEST_WORD}


def test_a_text_whose_words_end_is_never_severed(tokenizer_folder: Path) -> None:
    """Also where no place to cut keeps the tokens, as with tokenizers that put a space before each text."""
    core = byte_level(tokenizer_folder)
    core.normalizer = normalizers.Prepend("_")
    content = "word " * 80_000
    assert list(tokenizer.pieces(core, [content])) == [content]


def test_training_takes_a_word_without_an_end_and_prose_as_before() -> None:
    prose, endless = text(3000, 5), "qz" * 100_000
    whole = tokenizer.untrained()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[tokenizer.END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    whole.train_from_iterator([prose], trainer)
    assert tokenizer.train([prose], 300).backend_tokenizer.get_vocab() == whole.get_vocab()
    began = time.monotonic()
    found = tokenizer.train([prose, endless, "\n" * 100_000], 320)
    assert time.monotonic() - began < 20 and "qz" in found.get_vocab()  # it took minutes


@pytest.mark.parametrize("work", ["reading", "learning", "encoding"])
def test_an_interrupt_is_heard_while_the_core_works(tokenizer_folder: Path, work: str) -> None:
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=400_000)
    words = ["".join(letters[start : start + 200]) for start in range(0, len(letters), 200)] * 2

    def endless() -> Iterator[str]:
        while True:
            yield "the same words"

    class Core:
        def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> list[Encoding]:
            time.sleep(20)
            return []

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(0.5, interrupt)
    began = time.monotonic()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        if work == "encoding":
            list(tokenizer.encode_batches(cast(Tokenizer, Core()), [["a"]] * 3))
        else:
            tokenizer.train(endless() if work == "reading" else words, 100_000)
    assert time.monotonic() - began < 5


def test_what_the_core_cannot_encode_is_one_line() -> None:
    core = Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]"))
    with pytest.raises(InputError, match="tokenizer: cannot encode the texts"):
        list(tokenizer.encode_batches(core, [["b"]]))


def test_an_error_of_whoever_reads_the_texts_is_passed_on() -> None:
    def texts() -> Iterator[str]:
        yield "some text"
        raise InputError("this file is damaged")

    with pytest.raises(InputError, match="this file is damaged"):
        tokenizer.train(texts(), 300)


def test_a_text_without_a_place_to_cut_stays_whole(tokenizer_folder: Path) -> None:
    core = byte_level(tokenizer_folder)
    assert list(tokenizer.pieces(core, ["x" * 2500] * 2, size=1000)) == ["x" * 5000]
    assert list(tokenizer.pieces(core, [], size=1000)) == list(tokenizer.pieces(core, [""], size=1000)) == []


def test_texts_are_split_while_others_are_learned_from() -> None:
    """With more text than is handed over at once; the tokenizer being trained must not be asked for anything."""
    trained: list[object] = []
    texts = [text(40_000, seed) for seed in range(6)]
    learning = threading.Thread(target=lambda: trained.append(tokenizer.train(texts, 300)), daemon=True)
    learning.start()
    learning.join(60)
    assert trained


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        tokenizer.load(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"yield only \d+ entries"):
        tokenizer.train(["too little text"], 5000)
