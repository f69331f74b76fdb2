"""The token store: its books add up, it is built once, and it leaves nothing half written."""

import gzip
import json
import os
import shutil
import socket
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.support.runs import text
from train_loop.config.load import config_from_arguments
from train_loop.config.schema import Config, DataConfig
from train_loop.data import preparation, tokenizer
from train_loop.data.corpus import Corpus
from train_loop.data.token_store import VALIDATION, Ledger, Prepared, target_counts
from train_loop.errors import InputError


def configured(folder: Path, tokenizer_folder: Path, *more: str) -> Config:
    return config_from_arguments(
        [
            *("--model.architecture", "{model_type: gpt2}", "--tokenizer.name_or_path", str(tokenizer_folder)),
            *("--data.source", "files", "--data.files", f"{folder}/t.jsonl", "--data.cache_dir", f"{folder}/cache"),
            *("--data.validation_files", f"{folder}/v.jsonl", *more),
        ]
    )


def write(folder: Path, train: list[str], validation: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in (("t", train), ("v", validation)):
        rows = "".join(json.dumps({"text": each}) + "\n" for each in texts)
        (folder / f"{name}.jsonl").write_text(rows, encoding="utf-8")


def overwrite(path: Path, content: bytes) -> None:
    """Write to a file that is read-only."""
    path.chmod(0o644)
    path.write_bytes(content)


DOCUMENTS = st.lists(
    st.one_of(st.just(""), st.just("a"), st.text(max_size=30), st.just(text(100, 1)), st.just("<|endoftext|>")),
    min_size=1,
    max_size=12,
).map(lambda texts: [each.encode("utf-8", "ignore").decode() for each in texts])


@given(documents=DOCUMENTS, block_size=st.integers(1, 40))
@hypothesis_settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_ledger_adds_up(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path, documents: list[str], block_size: int
) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    write(folder, ["some text", *documents], ["held out"])
    prepared = preparation.prepare(configured(folder, tokenizer_folder), shown=False)
    texts = ["some text", *filter(None, documents)]
    loaded = tokenizer.load(str(tokenizer_folder))
    core = tokenizer.encoder(loaded)
    ids = [core.encode(each, add_special_tokens=False).ids for each in texts]
    stream = [token for each in ids for token in [*each, loaded.eos_token_id]]
    books = prepared.train.ledger
    # Every figure against one that was counted another way.
    assert books.documents == books.eos_tokens == len(texts)
    assert books.empty_documents == documents.count("")
    assert books.bytes == sum(len(each.encode()) for each in texts)
    assert books.text_tokens == sum(map(len, ids))
    assert prepared.train.tokens[:].tolist() == stream
    assert books.trained_targets == target_counts(len(stream), block_size).sum() == len(stream) - 1
    assert (books.first_tokens, books.dropped_tokens) == (1, 0)
    assert books.text_tokens + books.eos_tokens == books.trained_targets + books.first_tokens + books.dropped_tokens
    assert prepared.train.document_ends.tolist() == np.cumsum([len(each) + 1 for each in ids]).tolist()
    assert books.predicted_bytes == books.bytes - len(core.decode(ids[0][:1]).encode())


def test_a_ledger_that_does_not_add_up_is_refused() -> None:
    with pytest.raises(ArithmeticError, match="does not add up"):
        Ledger(documents=1, text_tokens=5, eos_tokens=1, trained_targets=4, first_tokens=1).check()


def test_gzip_bytes_are_those_of_gzip(tmp_path: Path, tokenizer_folder: Path) -> None:
    write(tmp_path, ["a b c"], [text(300, 1), text(200, 2)])
    prepared = preparation.prepare(configured(tmp_path, tokenizer_folder), shown=False)
    expected = len(gzip.compress((text(300, 1) + text(200, 2)).encode(), compresslevel=9))
    assert prepared.validation.ledger.gzip_bytes == expected


def test_names_and_places_of_tokens(tmp_path: Path, tokenizer_folder: Path) -> None:
    write(tmp_path, ["first words", "second words and more"], ["held out"])
    prepared = preparation.prepare(configured(tmp_path, tokenizer_folder), shown=False)
    end = int(prepared.train.document_ends[0])
    assert prepared.train.document_at(0) == (f"{tmp_path}/t.jsonl:line 1", 0)
    assert prepared.train.document_at(end - 1) == (f"{tmp_path}/t.jsonl:line 1", end - 1)
    assert prepared.train.document_at(end) == (f"{tmp_path}/t.jsonl:line 2", 0)


def test_long_documents_are_one_document(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "\n".join(text(20, number) for number in range(100))
    write(tmp_path, ["short", long, "short"], ["held out"])
    monkeypatch.setattr(preparation, "_BATCH_CHARACTERS", 3000)
    monkeypatch.setattr(tokenizer, "_PIECE", 1000)
    prepared = preparation.prepare(configured(tmp_path, tokenizer_folder), shown=False)
    loaded = tokenizer.load(str(tokenizer_folder))
    ids = tokenizer.encoder(loaded).encode(long, add_special_tokens=False).ids
    first, second = (int(end) for end in prepared.train.document_ends[:2])
    assert prepared.train.tokens[first:second].tolist() == [*ids, loaded.eos_token_id]


@pytest.mark.slow
def test_memory_does_not_grow_with_a_document(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Python holds at most is the same for 1 MB and 4 MB in a single file."""
    monkeypatch.setattr(preparation, "_BATCH_CHARACTERS", 20_000)

    def peak(copies: int) -> int:
        write(tmp_path / str(copies), [], ["held out"])
        path = tmp_path / str(copies) / "t.txt"
        path.write_text("\n".join(text(1000, number) for number in range(20)) * 10 * copies, "utf-8")
        settings = configured(path.parent, tokenizer_folder)
        settings.data.files = [str(path)]
        loaded = tokenizer.load(str(tokenizer_folder))
        tracemalloc.start()
        try:
            prepared = preparation.prepare(settings, loaded, shown=False)
            assert prepared.train.ledger.documents == 1 and prepared.train.ledger.bytes == path.stat().st_size
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(2)  # imports and caches
    assert peak(4) < 1.1 * peak(1) + 200_000


def test_a_second_run_reuses_the_store(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, ["some text"], ["held out"])
    first = preparation.prepare(configured(tmp_path, tokenizer_folder), shown=False)
    monkeypatch.setattr(Corpus, "splits", lambda self: pytest.fail("read again"))
    again = preparation.prepare(configured(tmp_path, tokenizer_folder), shown=False)
    assert again.folder == first.folder and again.fingerprint == first.fingerprint
    monkeypatch.undo()
    write(tmp_path, ["other text"], ["held out"])
    changed = preparation.prepare(configured(tmp_path, tokenizer_folder), shown=False)
    assert changed.folder != first.folder and changed.fingerprint != first.fingerprint


def test_the_same_text_elsewhere_has_the_same_fingerprint(tmp_path: Path, tokenizer_folder: Path) -> None:
    prints = set()
    for name in ("here", "there"):
        write(tmp_path / name, ["some text"], ["held out"])
        prints.add(preparation.prepare(configured(tmp_path / name, tokenizer_folder), shown=False).fingerprint)
    assert len(prints) == 1


def test_two_at_the_same_time_build_one(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, [text(50, n) for n in range(20)], ["held out"])
    builds: list[Path] = []
    build: Callable[..., None] = preparation._build

    def counted(folder: Path, *rest: Any) -> None:
        builds.append(folder)
        build(folder, *rest)

    monkeypatch.setattr(preparation, "_build", counted)
    results: list[Prepared] = []

    def ask() -> None:
        results.append(preparation.prepare(configured(tmp_path, tokenizer_folder), shown=False))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1 and len({result.fingerprint for result in results}) == 1 and len(results) == 4


def test_a_failure_leaves_nothing_behind(tmp_path: Path, tokenizer_folder: Path) -> None:
    write(tmp_path, ["good"], ["held out"])
    with open(tmp_path / "t.jsonl", "ab") as file:
        file.write(b'{"text": "\xff"}\n')
    with pytest.raises(InputError, match="not UTF-8"):
        preparation.prepare(configured(tmp_path, tokenizer_folder), shown=False)
    assert [path for path in (tmp_path / "cache" / "stores").iterdir() if path.is_dir()] == []


def test_another_host_may_be_faster_on_a_shared_disk(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock need not hold across hosts: then both build, and the later one takes what is there."""
    write(tmp_path, ["good"], ["held out"])
    rename = os.rename

    def late(source: Path, target: Path) -> None:
        shutil.copytree(source, target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    prepared = preparation.prepare(configured(tmp_path, tokenizer_folder), shown=False)
    assert prepared.train.ledger.documents == 1
    assert [path.name for path in prepared.folder.parent.iterdir() if "tmp" in path.name] == []


def test_what_a_killed_process_left_is_cleared(tmp_path: Path, tokenizer_folder: Path) -> None:
    write(tmp_path, ["good"], ["held out"])
    prepared = preparation.prepare(configured(tmp_path, tokenizer_folder), shown=False)
    stale = prepared.folder.with_name(f"{prepared.folder.name}.tmp-{socket.gethostname()}-1")
    prepared.folder.rename(stale)
    again = preparation.prepare(configured(tmp_path, tokenizer_folder), shown=False)
    assert again.fingerprint == prepared.fingerprint and not stale.exists()


def test_damage_is_named(tmp_path: Path, tokenizer_folder: Path) -> None:
    write(tmp_path, ["good text"], ["held out"])
    settings = configured(tmp_path, tokenizer_folder)
    folder = preparation.prepare(settings, shown=False).folder
    overwrite(folder / VALIDATION / "tokens.bin", b"12")
    with pytest.raises(InputError, match=r"tokens.bin: damaged \(has 2 bytes instead of \d+\); remove"):
        preparation.prepare(settings, shown=False)
    overwrite(folder / "ledger.json", b"{")
    with pytest.raises(InputError, match="damaged"):
        preparation.prepare(settings, shown=False)


@pytest.mark.parametrize(
    ("train", "validation", "expected"),
    [
        ([""], [""], "no document with text (2 empty ones were left out)"),
        (["text"], [""], "the validation split has 0 documents but no target"),
        ([""], ["text"], "the train split has 0 documents"),
    ],
)
def test_sides_without_a_target(
    tmp_path: Path, tokenizer_folder: Path, train: list[str], validation: list[str], expected: str
) -> None:
    write(tmp_path, train, validation)
    with pytest.raises(InputError) as error:
        preparation.prepare(configured(tmp_path, tokenizer_folder), shown=False)
    assert expected in str(error.value)


def test_a_trained_tokenizer_sees_the_training_documents_only(tmp_path: Path) -> None:
    write(tmp_path, [text(500, 1)], ["zqzqzqzq" * 500])
    settings = config_from_arguments(
        [
            *("--model.architecture", "{model_type: gpt2}", "--tokenizer.train_vocab_size", "280"),
            *("--data.source", "files", "--data.files", f"{tmp_path}/t.jsonl", "--data.cache_dir", f"{tmp_path}/cache"),
            *("--data.validation_files", f"{tmp_path}/v.jsonl"),
        ]
    )
    prepared = preparation.prepare(settings, shown=False)
    assert len(prepared.tokenizer) == 280 and not any("zq" in token for token in prepared.tokenizer.get_vocab())
    # A model that was trained with it finds the same store.
    assert (
        preparation.prepare(settings, tokenizer.load(str(prepared.folder / "tokenizer")), shown=False).folder
        == prepared.folder
    )


def test_wide_ids_for_a_large_vocabulary(tmp_path: Path, tokenizer_folder: Path) -> None:
    write(tmp_path, ["some text"], ["held out"])
    large = tokenizer.load(str(tokenizer_folder))
    large.add_tokens([f"<extra {number}>" for number in range(2**16)])
    prepared = preparation.prepare(configured(tmp_path, tokenizer_folder), large, shown=False)
    assert prepared.train.tokens.dtype == np.uint32
    assert preparation.prepare(configured(tmp_path, tokenizer_folder), shown=False).train.tokens.dtype == np.uint16


def as_lines(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))


def as_packed_lines(path: Path, texts: list[str]) -> None:
    content = "".join(json.dumps({"text": each}) + "\n" for each in texts)
    path.write_bytes(gzip.compress(content.encode(), compresslevel=0, mtime=0))


def as_arrow(path: Path, texts: list[str]) -> None:
    """Which `datasets` reads by itself, by way of its own cache."""
    table = pyarrow.table({"text": texts})
    with pyarrow.ipc.new_stream(path, table.schema) as file:
        file.write_table(table)


@pytest.mark.parametrize(
    ("source", "name", "save"),
    [
        ("files", "t.jsonl", as_lines),
        ("hub", "t.jsonl", as_lines),
        ("hub, streaming", "t.jsonl", as_lines),
        ("hub", "t.jsonl.gz", as_packed_lines),
        ("hub", "t.arrow", as_arrow),
    ],
)
def test_other_content_of_the_same_size_and_date_is_prepared_anew(
    tmp_path: Path, tokenizer_folder: Path, source: str, name: str, save: Callable[..., None]
) -> None:
    """As archives, `cp -p` and `rsync -t` leave it."""
    path = tmp_path / "data" / name
    path.parent.mkdir()
    save(path, ["some text", "more text"])
    settings = configured(tmp_path, tokenizer_folder, "--data.test_size", "0.5")
    settings.data.validation_files = []
    if source == "files":
        settings.data.files = [str(path)]
    else:
        settings.data.source, settings.data.files, settings.data.name = "hub", [], str(tmp_path / "data")
        settings.data.streaming = "streaming" in source
    first, before = preparation.prepare(settings, shown=False), path.stat()
    save(path, ["some tale", "more tale"])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    again = preparation.prepare(settings, shown=False)
    assert again.folder != first.folder
    words = {first.tokenizer.decode(each.tokens[:]) for each in (again.train, again.validation)}
    assert words == {"some tale<|endoftext|>", "more tale<|endoftext|>"}
    path.touch()
    assert preparation.prepare(settings, shown=False).folder == again.folder
    assert {each.name for each in (tmp_path / "cache").iterdir()} <= {"stores", "digests"}


def test_a_stream_from_the_hub_is_known_by_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    class Builder:
        hash, config_id = "commit 1", "default"

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: Builder)
    data = DataConfig(source="hub", name="someone/something", streaming=True)
    first = Corpus(data).key()
    assert Corpus(data).key() == first
    Builder.hash = "commit 2"
    assert Corpus(data).key() != first


def test_a_vocabulary_with_unused_ids_gets_wide_ids(tmp_path: Path, tokenizer_folder: Path) -> None:
    """As many entries as fit into 16 bits, but an id that does not."""
    found = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    last = max(found["model"]["vocab"], key=found["model"]["vocab"].get)
    found["model"]["vocab"][last] = 70_000
    folder = shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    (folder / "tokenizer.json").write_text(json.dumps(found))
    write(tmp_path, [text(500, 1)], [text(500, 2)])
    prepared = preparation.prepare(configured(tmp_path, folder), shown=False)
    assert prepared.train.tokens.dtype == np.uint32 and 70_000 in prepared.train.tokens[:]
