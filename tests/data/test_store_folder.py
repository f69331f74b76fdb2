"""A store that is not what was written is never trained on, whatever was done to it, and says which file it is."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.test_preparation import configured, overwrite, write
from tests.support.runs import text
from train_loop.config.schema import Config
from train_loop.data import content, preparation, store_folder
from train_loop.data.corpus import Corpus
from train_loop.data.token_file import DamagedError
from train_loop.errors import InputError


@pytest.fixture
def settings(tmp_path: Path, tokenizer_folder: Path) -> Config:
    write(tmp_path, [text(50, 1), text(60, 2)], [text(40, 3)])
    config = configured(tmp_path, tokenizer_folder)
    config.tokenizer.name_or_path, config.tokenizer.train_vocab_size = None, 270
    return config


@pytest.fixture
def store(settings: Config) -> Path:
    return preparation.prepare(settings, shown=False).folder


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """An edit of the ledger that forgets nothing but its sum."""

    def edit(path: Path) -> None:
        found = json.loads(path.read_text())
        change(found)
        overwrite(path, json.dumps(found).encode())

    return edit


def numbers(dtype: str, change: Callable[[Any], Any]) -> Callable[[Path], object]:
    return lambda path: overwrite(path, change(np.frombuffer(path.read_bytes(), dtype).copy()).tobytes())


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "reversed": ("train/tokens.bin", numbers("<u2", lambda ids: ids[::-1])),
    "zeroed": ("train/tokens.bin", numbers("<u2", lambda ids: ids * 0)),
    "one bit": ("validation/tokens.bin", numbers("<u2", lambda ids: ids ^ (np.arange(len(ids)) == 7))),
    "ids beyond the vocabulary": ("train/tokens.bin", numbers("<u2", lambda ids: ids + 60_000)),
    "cut": ("train/tokens.bin", numbers("<u2", lambda ids: ids[:-1])),
    "appended": ("validation/tokens.bin", numbers("<u2", lambda ids: np.append(ids, ids[:1]))),
    "emptied": ("train/tokens.bin", lambda path: overwrite(path, b"")),
    "removed": ("train/tokens.bin", os.unlink),
    "ends out of order": ("train/documents.bin", numbers("<u8", lambda ends: ends[::-1])),
    "documents cut": ("train/documents.bin", numbers("<u8", lambda ends: ends[:2])),
    "other names": ("train/names.bin", lambda path: overwrite(path, path.read_bytes()[::-1])),
    "no names": ("validation/names.bin", os.unlink),
    "swapped entries": (
        "tokenizer/tokenizer.json",
        lambda path: overwrite(
            path, path.read_bytes().replace(b'"A"', b'"?"').replace(b'"B"', b'"A"').replace(b'"?"', b'"B"')
        ),
    ),
    "another tokenizer file": ("tokenizer/added_tokens.json", lambda path: path.write_text('{"<a>": 270}')),
    "ledger: counts": ("ledger.json", edited(lambda found: found["validation"].update(gzip_bytes=1))),
    "ledger: another width": ("ledger.json", edited(lambda found: found.update(dtype="<u4"))),
    "ledger: digests": ("ledger.json", edited(lambda found: found["digests"].clear())),
    "ledger: fingerprint": ("ledger.json", edited(lambda found: found.update(fingerprint="0" * 64))),
    "ledger: no sum": ("ledger.json", edited(lambda found: found.pop("sum"))),
    "ledger: half": ("ledger.json", lambda path: overwrite(path, path.read_bytes()[:200])),
    "ledger: a list": ("ledger.json", lambda path: overwrite(path, b"[]")),
    "ledger: nested": ("ledger.json", lambda path: overwrite(path, b"[" * 100_000)),
    "ledger: removed": ("ledger.json", os.unlink),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(store: Path, settings: Config, damage: str) -> None:
    """For the run itself, and for a model that was trained with the store's tokenizer and is evaluated later."""
    name, change = DAMAGE[damage]
    own = store_folder.open_store(store).tokenizer
    change(store / name)
    line = f"^{re.escape(str(store / name))}: damaged \\(.+\\); remove {re.escape(str(store))} to prepare it again$"
    for tokenizer in (None, own):
        with pytest.raises(DamagedError, match=line):
            preparation.prepare(settings, tokenizer, shown=False)
    shutil.rmtree(store)
    assert preparation.prepare(settings, shown=False).folder == store


def test_a_store_under_anothers_name_is_refused(store: Path, settings: Config) -> None:
    settings.data.max_documents = 1
    other = preparation.prepare(settings, shown=False).folder
    shutil.rmtree(store)
    shutil.copytree(other, store)
    settings.data.max_documents = None
    with pytest.raises(DamagedError, match=f"it belongs to {other.name}"):
        preparation.prepare(settings, shown=False)


def test_what_was_checked_is_not_read_again(store: Path, settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_SETTLED", 0.0)
    preparation.prepare(settings, shown=False)
    content.digests.cache_clear()  # as in another process
    monkeypatch.setattr(content, "_piece", lambda *_: pytest.fail("read again"))
    preparation.prepare(settings, shown=False)


def test_a_store_is_read_only_and_shared_as_the_umask_says(settings: Config) -> None:
    before = os.umask(0o027)
    try:
        folder = preparation.prepare(settings, shown=False).folder
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
    assert modes == {0o440} and folder.stat().st_mode & 0o777 == 0o750


def test_a_cache_that_is_read_only_is_enough_for_what_is_in_it(
    store: Path, settings: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests may run as root, whom no permission stops: here, every attempt to write fails."""
    real = os.open

    def denied(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(30, "Read-only file system", str(path))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", denied)
    monkeypatch.setattr(os, "mkdir", denied)
    monkeypatch.setattr(content, "write_atomically", lambda *_: denied("digests", os.O_WRONLY))
    content.digests.cache_clear()
    assert preparation.prepare(settings, shown=False).folder == store


@pytest.mark.parametrize("place", ["file", "long", "below a file"])
def test_a_cache_folder_that_cannot_be_made_is_one_line(tmp_path: Path, settings: Config, place: str) -> None:
    (tmp_path / "taken").write_text("")
    places = {"file": tmp_path / "taken", "long": tmp_path / ("x" * 300), "below a file": tmp_path / "taken" / "below"}
    settings.data.cache_dir = str(places[place])
    with pytest.raises(InputError, match=r"^data.cache_dir: .*cannot be used \(.*\); name another folder"):
        preparation.prepare(settings, shown=False)


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(
    tmp_path: Path, settings: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(preparation._SplitWriter, "end_document", full)
    with pytest.raises(InputError, match=r"cannot be used \(No space left on device\); make room"):
        preparation.prepare(settings, shown=False)
    assert list((tmp_path / "cache" / "stores").iterdir()) == []


def test_without_a_home_folder_a_cache_has_to_be_named(settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.data.cache_dir = None
    monkeypatch.delenv("TRAIN_LOOP_CACHE")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine")))
    with pytest.raises(InputError, match="there is no home folder"):
        preparation.prepare(settings, shown=False)


def test_an_interrupt_leaves_nothing(tmp_path: Path, settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal raises KeyboardInterrupt wherever the program is."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    for owner, name in (
        (preparation._SplitWriter, "add_text"),
        (preparation.tokenizers, "train"),
        (store_folder, "_sum"),
        (store_folder.os, "rename"),
    ):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, name, interrupted)
            preparation.prepare(settings, shown=False)
        assert list((tmp_path / "cache" / "stores").iterdir()) == [], name


@pytest.mark.parametrize("change", ["appended", "rewritten", "another file", "gone"])
def test_data_that_changes_while_it_is_prepared_is_refused(
    tmp_path: Path, settings: Config, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Its start would be of one state and its end of another; nothing of it is kept."""
    settings.data.files, settings.data.validation_files = [f"{tmp_path}/*.jsonl"], []
    settings.data.test_size = 0.5
    path, splits = tmp_path / "t.jsonl", Corpus.splits

    def changing(self: Corpus) -> Any:
        yield from splits(self)
        if change == "appended":
            with open(path, "a") as file:
                file.write('{"text": "more"}\n')
        elif change == "rewritten":
            before = path.stat()
            path.write_bytes(path.read_bytes().replace(b"a", b"e"))
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        elif change == "another file":
            (tmp_path / "u.jsonl").write_text('{"text": "more"}\n')
        else:
            path.unlink(missing_ok=True)

    monkeypatch.setattr(Corpus, "splits", changing)
    with pytest.raises(InputError, match=r"[tu].jsonl: changed while it was prepared; start again"):
        preparation.prepare(settings, shown=False)
    assert list((tmp_path / "cache" / "stores").iterdir()) == []
