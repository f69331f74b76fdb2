"""Tokenizers: trained here, loaded, and what text that spells a special token becomes."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import text
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


def test_long_texts_are_cut_where_no_token_depends_on_it(tokenizer_folder: Path) -> None:
    core = tokenizer.encoder(tokenizer.load(str(tokenizer_folder)))
    content = "\n".join(text(number % 30, number) + "  \n" * (number % 4) for number in range(2000))
    pieces = list(tokenizer.pieces(core, content, size=2000))
    assert len(pieces) > 50 and "".join(pieces) == content
    [encoded] = tokenizer.encode_batches(core, [pieces])
    assert [token for piece in encoded for token in piece] == core.encode(content, add_special_tokens=False).ids


def test_a_text_without_a_place_to_cut_stays_whole(tokenizer_folder: Path) -> None:
    core = tokenizer.encoder(tokenizer.load(str(tokenizer_folder)))
    assert list(tokenizer.pieces(core, "x" * 5000, size=1000)) == ["x" * 5000]


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be loaded"):
        tokenizer.load(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"yield only \d+ entries"):
        tokenizer.train(["too little text"], 5000)
