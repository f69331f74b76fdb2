"""What a tokenizer loses of texts is counted in the ledger, and said once."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.runs import configured
from train_loop.data import preparation, round_trip, tokenizer
from train_loop.data.round_trip import RoundTrip
from train_loop.data.token_store import Ledger

WORDS = {"[UNK]": 0, "<eos>": 1, "the": 2, "cat": 3, "sat": 4}


def words() -> Tokenizer:
    """Knows three words, and nothing of the white space between them."""
    core = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return core


def looked_at(core: Tokenizer, texts: list[str]) -> RoundTrip:
    trip = RoundTrip(core, Ledger())
    for each in texts:
        trip.add(each, np.array(core.encode(each, add_special_tokens=False).ids, dtype=np.uint32), begins=True)
        trip.ledger.documents += 1
    return trip


def test_unknown_tokens_and_changed_documents_are_counted() -> None:
    trip = looked_at(words(), ["the cat", "the dog sat", "cat"])
    assert trip.ledger.unknown_tokens == 1
    assert (trip.ledger.checked_documents, trip.ledger.changed_documents) == (3, 1)
    assert trip.example == ("the dog sat", "the [UNK] sat")


def test_lower_case_is_a_change_and_the_example_shows_where(
    tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    core = tokenizer.encoder(tokenizer.load(str(tokenizer_folder)))
    core.normalizer = normalizers.Lowercase()
    trip = looked_at(core, ["no capitals", "x" * 300 + " Then One", "y" * 3000 + "Z"])
    assert trip.ledger.changed_documents == 1 and trip.ledger.checked_documents == 3  # the last Z is too far behind
    round_trip.warn([trip])
    said = capsys.readouterr().err
    assert "1 of 3 documents that were looked at don't come back" in said and "'xxxxxxxxx Then One' becomes" in said


def test_a_byte_level_tokenizer_loses_nothing_and_is_not_looked_at(tokenizer_folder: Path) -> None:
    core = tokenizer.encoder(tokenizer.load(str(tokenizer_folder)))
    trip = looked_at(core, ["any \U0001f99c text"])
    assert trip.ledger.checked_documents == 0
    core.decoder = decoders.Fuse()  # no longer certain
    assert looked_at(core, ["a b"]).ledger.changed_documents == 1


def test_only_a_sample_of_many_documents_is_looked_at() -> None:
    assert looked_at(words(), ["the"] * 1640).ledger.checked_documents == 1000 + 10


def test_the_unknown_token_of_a_unigram_model() -> None:
    core = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    assert looked_at(core, ["aba"]).ledger.unknown_tokens == 1


def test_the_ledger_of_prepared_data_and_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = PreTrainedTokenizerFast(tokenizer_object=words(), eos_token="<eos>", unk_token="[UNK]")
    saved.save_pretrained(tmp_path / "tokenizer")
    rows = [{"text": "the cat sat"}, {"text": "the dog"}, {"text": "cat Δ"}, {"text": "sat"}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = configured()
    config.tokenizer.name_or_path = str(tmp_path / "tokenizer")
    config.data.source, config.data.files = "files", [str(tmp_path / "d.jsonl")]
    config.data.test_size, config.data.cache_dir = 0.5, str(tmp_path / "cache")
    ledger = preparation.prepare(config, shown=False).ledger()
    sums = {name: ledger["train"][name] + ledger["validation"][name] for name in ledger["train"] if "_" in name}
    assert sums["unknown_tokens"] == 2 and (sums["checked_documents"], sums["changed_documents"]) == (4, 2)
    said = capsys.readouterr().err
    assert said.count("warning: 2 of 8 text tokens are unknown") == 1 and said.count("the tokenizer changes text") == 1
