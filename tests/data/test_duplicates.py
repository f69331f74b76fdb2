"""The same text on both sides, or twice on one: refused, counted, warned about, left out if asked for."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pyarrow import parquet

from train_loop.config.load import config_from_arguments
from train_loop.config.schema import DataConfig
from train_loop.data import duplicates, preparation
from train_loop.data.corpus import Corpus
from train_loop.data.duplicates import Hashes
from train_loop.data.sources import files
from train_loop.data.token_store import TRAIN, VALIDATION, Ledger, Prepared
from train_loop.errors import InputError


def prepare(
    folder: Path, tokenizer_folder: Path, train: list[str], validation: list[str] | None, *more: str
) -> Prepared:
    """Prepare these documents; without validation documents, a part of the others is held out."""
    folder.mkdir(exist_ok=True)
    for name, texts in (("t", train), ("v", validation or [])):
        rows = "".join(json.dumps({"text": each}) + "\n" for each in texts)
        (folder / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    held_out = [] if validation is None else ["--data.validation_files", f"{folder}/v.jsonl"]
    arguments = [
        *("--model.architecture", "{model_type: gpt2}", "--data.source", "files", "--data.files", f"{folder}/t.jsonl"),
        *("--data.cache_dir", f"{folder}/cache", *held_out, *more),
    ]
    if "--tokenizer.train_vocab_size" not in more:
        arguments += ["--tokenizer.name_or_path", str(tokenizer_folder)]
    return preparation.prepare(config_from_arguments(arguments), shown=True)


def texts(prepared: Prepared, split: str) -> list[str]:
    """The documents in a store, decoded."""
    store = {TRAIN: prepared.train, VALIDATION: prepared.validation}[split]
    ends = [0, *map(int, store.document_ends)]
    return [prepared.tokenizer.decode(store.tokens[a : b - 1].tolist()) for a, b in itertools.pairwise(ends)]


SOME = st.lists(st.sampled_from(["", "a", "b", "c", "long " * 50, "long " * 51]), min_size=1, max_size=12)


@given(train=SOME, validation=SOME, mode=st.sampled_from(["none", "across", "all"]))
@hypothesis_settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_counted_and_left_out_exactly(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path, train: list[str], validation: list[str], mode: str
) -> None:
    """Against sets of texts."""
    train, validation = ["only here", *train], ["only there", *validation]
    folder = tmp_path_factory.mktemp("twins")
    prepared = prepare(folder, tokenizer_folder, train, validation, "--data.drop_duplicates", mode)
    expected = {TRAIN: list(filter(None, train)), VALIDATION: list(filter(None, validation))}
    if mode != "none":
        expected[TRAIN] = [each for each in expected[TRAIN] if each not in set(validation)]
    if mode == "all":
        expected = {split: list(dict.fromkeys(each)) for split, each in expected.items()}
    for split, given_texts in ((TRAIN, train), (VALIDATION, validation)):
        assert texts(prepared, split) == expected[split]
        ledger = {TRAIN: prepared.train, VALIDATION: prepared.validation}[split].ledger
        other = expected[VALIDATION if split == TRAIN else TRAIN]
        assert ledger.read_documents == len(given_texts)
        assert ledger.empty_documents == given_texts.count("")
        assert ledger.dropped_documents == sum(map(bool, given_texts)) - len(expected[split])
        assert ledger.repeated_documents == len(expected[split]) - len(set(expected[split]))
        assert ledger.shared_documents == sum(each in other for each in expected[split])


def test_a_ledger_whose_documents_do_not_add_up_is_refused() -> None:
    with pytest.raises(ArithmeticError, match="9 documents read, 8 accounted for"):
        Ledger(
            documents=5, empty_documents=2, dropped_documents=1, eos_tokens=5, trained_targets=5, read_documents=9
        ).check()


def test_the_warning_names_the_share_and_an_example(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # built, and found again
        prepare(tmp_path / "x", tokenizer_folder, ["a", "", "b", "c"], ["d", "c", "b", "e"])
        said = capsys.readouterr().err
        assert "2 of 4 validation documents (50.0%) are also training documents" in said
        assert f"e.g. {tmp_path}/x/v.jsonl:line 3 = {tmp_path}/x/t.jsonl:line 3" in said
        assert "data.drop_duplicates: across leaves them out of training" in said
        assert (
            f"1 of 4 train documents (25.0%) are null or empty, and left out, e.g. {tmp_path}/x/t.jsonl:line 2" in said
        )
    prepare(tmp_path / "x", tokenizer_folder, ["a", "b"], ["d", "e"])
    assert "also training" not in capsys.readouterr().err


def test_twins_in_a_split_of_the_same_documents(tmp_path: Path, tokenizer_folder: Path) -> None:
    """The held-out documents are the same ones, whether their twins are trained on or not."""
    given_texts = [f"text {number % 20}" for number in range(60)]
    plain = prepare(tmp_path, tokenizer_folder, given_texts, None)
    across = prepare(tmp_path, tokenizer_folder, given_texts, None, "--data.drop_duplicates", "across")
    held_out = texts(plain, VALIDATION)
    assert plain.validation.ledger.shared_documents == len(held_out) > 0
    assert texts(across, VALIDATION) == held_out
    assert texts(across, TRAIN) == [each for each in texts(plain, TRAIN) if each not in held_out]
    assert across.validation.ledger.shared_documents == across.train.ledger.shared_documents == 0


def test_a_trained_tokenizer_does_not_see_what_is_left_out(tmp_path: Path, tokenizer_folder: Path) -> None:
    words = "one two three four " * 20
    more = ("--tokenizer.train_vocab_size", "262", "--data.drop_duplicates", "across")
    prepared = prepare(tmp_path, tokenizer_folder, [words, "zqzqzqzq" * 500], ["zqzqzqzq" * 500], *more)
    assert prepared.train.ledger.documents == 1
    assert not any("zq" in token for token in prepared.tokenizer.get_vocab())


def test_if_nothing_is_left_to_train_on(tmp_path: Path, tokenizer_folder: Path) -> None:
    with pytest.raises(
        InputError, match=r"data.drop_duplicates left out 2, which are on the other side, too; name others"
    ):
        prepare(tmp_path, tokenizer_folder, ["a", "b"], ["b", "a"], "--data.drop_duplicates", "across")


def test_data_that_grows_between_the_readings_is_refused(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = duplicates.without

    def grown(corpus: Corpus, shown: bool) -> Corpus:
        found = without(corpus, shown)
        with open(tmp_path / "t.jsonl", "a") as file:
            file.write('{"text": "more"}\n')
        return found

    monkeypatch.setattr(duplicates, "without", grown)
    with pytest.raises(InputError, match="changed while"):
        prepare(tmp_path, tokenizer_folder, ["a", "b"], ["c"], "--data.drop_duplicates", "all")


def test_documents_in_blocks_and_in_whole_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_BLOCK_BYTES", 7)
    content = "ein längerer Text 🦜 " * 20
    (tmp_path / "a.txt").write_text("\ufeff" + content, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": content}), encoding="utf-8")
    data = DataConfig(
        source="files", files=[f"{tmp_path}/a.txt"], validation_files=[f"{tmp_path}/b.jsonl"], drop_duplicates="across"
    )
    assert list(duplicates.without(Corpus(data), False).documents(TRAIN)) == []


@given(st.lists(st.lists(st.binary(max_size=3), max_size=3), max_size=30))
def test_hashes_of_parts_are_those_of_the_whole(documents: list[list[bytes]]) -> None:
    hashes = Hashes()
    for parts in documents:
        for part in filter(None, parts):
            hashes.update(part)
        hashes.end()
    found = hashes.array()
    wholes = [b"".join(parts) for parts in documents]
    assert len(found) == len(wholes)
    same = {(int(a), int(b)) for a in range(len(wholes)) for b in range(len(wholes)) if found[a] == found[b]}
    assert same == {(a, b) for a in range(len(wholes)) for b in range(len(wholes)) if wholes[a] == wholes[b]}


def test_hashes_that_end_in_zeros_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy takes zeros at the end of bytes for padding."""
    monkeypatch.setattr(duplicates, "_AT_ONCE", 2)
    every = [bytes([0, *rest, 0]) + bytes(12) for rest in itertools.product(range(2), repeat=2)] + [bytes(15) + b"\1"]
    rng = np.random.default_rng(0)
    chosen = [[every[k] for k in rng.integers(0, len(every), 20)] for _ in range(2)]
    train, validation = (np.frombuffer(b"".join(each), "S16") for each in chosen)
    found = duplicates.count(train, validation)
    counts = [Counter(each) for each in chosen]
    assert found.repeated == {TRAIN: 20 - len(counts[0]), VALIDATION: 20 - len(counts[1])}
    assert found.shared[VALIDATION] == sum(each in counts[0] for each in chosen[1])


# ---- the same file, the same split ----


@pytest.mark.parametrize("other", ["t.txt", "./t.txt", "absolute", "link.txt", "hard.txt", "folder/../t.txt", "?.txt"])
def test_a_file_on_both_sides_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("text", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.txt").symlink_to("t.txt")
    (tmp_path / "hard.txt").hardlink_to(tmp_path / "t.txt")
    other = str(tmp_path / "t.txt") if other == "absolute" else other
    data = DataConfig(source="files", files=["t.txt"], validation_files=[other])
    for look in (lambda: Corpus(data).key(), lambda: list(Corpus(data).splits())):
        with pytest.raises(InputError, match=r"^data.validation_files: .*also in data.files; the validation loss"):
            look()


def rows_in(folder: Path, kind: str, counts: dict[str, int]) -> None:
    for split, count in counts.items():
        table = pa.table({"text": [f"{split} {number}" for number in range(count)]})
        if kind == "parquet":
            parquet.write_table(table, folder / f"{split}.parquet")
        else:
            with pa.ipc.new_stream(str(folder / f"{split}.arrow"), table.schema) as writer:
                writer.write_table(table)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])  # read here, read by datasets
@pytest.mark.parametrize(
    ("train", "validation", "expected"),
    [
        ("train", "train", "both are train"),
        ("train[:50%]", "train[40%:]", "share row 4 of train"),
        ("train", "train[-2:]", "share rows 8 to 9 of train"),
        ("train[:6]", "train[3:5]", "share rows 3 to 4 of train"),
        ("train+test", "test", "of test"),
        ("train[:50%]", "train[50%:]", None),
        ("train[:-2]", "train[-2:]+test", None),
        ("train", "test", None),
    ],
)
def test_splits_that_share_rows_are_refused(
    tmp_path: Path, kind: str, train: str, validation: str, expected: str | None
) -> None:
    rows_in(tmp_path, kind, {"train": 10, "test": 3})
    corpus = Corpus(DataConfig(source="hub", name=str(tmp_path), split=train, validation_split=validation))

    def look() -> Any:
        return corpus.key(), Counter(document.text for _, document in corpus.splits())

    if expected is None:
        assert max(look()[1].values()) == 1
        return
    with pytest.raises(InputError, match=r"^data.validation_split: .*the validation loss") as error:
        look()
    assert expected in str(error.value)


def test_splits_that_share_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: a.jsonl}\n"
        "  - {split: test, path: a.jsonl}\n---\n",
        encoding="utf-8",
    )
    corpus = Corpus(DataConfig(source="hub", name=str(tmp_path), validation_split="test"))
    with pytest.raises(InputError, match=r"train and test share the file .*a.jsonl"):
        list(corpus.splits())
