"""What is read from a token file is what was written, or it is an error; the process is never killed."""

import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from train_loop.data import content
from train_loop.data.content import Look
from train_loop.data.loader import Windows
from train_loop.data.loader import loader as batches
from train_loop.data.order import MicroBatch
from train_loop.data.token_file import DamagedError, TokenFile
from train_loop.data.token_store import Ledger, TokenStore
from train_loop.errors import InputError

IDS = np.arange(1000, dtype="<u2")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "store" / "train"
    folder.mkdir(parents=True)
    (folder / "tokens.bin").write_bytes(IDS.tobytes())
    return folder / "tokens.bin"


def opened(path: Path) -> TokenFile:
    with open(path, "rb") as file:
        return TokenFile(path, "<u2", 1000, content.digest_of(file.fileno(), Look.at(file.fileno())))


@pytest.mark.parametrize(
    "stretch", [slice(0, 7), slice(None), slice(990, None), slice(5, 5), slice(990, 2000), slice(7, 3)]
)
def test_stretches_are_those_of_the_array(path: Path, stretch: slice) -> None:
    found = opened(path)
    assert found[stretch].tolist() == IDS[stretch].tolist() and found[stretch].dtype == IDS.dtype and len(found) == 1000


@pytest.mark.parametrize("first", [[], [3], [0, 500, 17], [995, 3]])
def test_rows_of_places_are_those_of_the_array(path: Path, first: list[int]) -> None:
    """As the loader asks for windows; the last one is filled up with the last token."""
    places = np.minimum(np.array(first, dtype=np.int64)[:, None] + np.arange(9), 999)
    assert opened(path)[places].tolist() == IDS[places].tolist()


def cut(path: Path) -> None:
    os.truncate(path, 100)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"12")


def reverse(path: Path) -> None:
    path.write_bytes(IDS[::-1].tobytes())


def reverse_under_the_same_date(path: Path) -> None:
    before = path.stat()
    reverse(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def zero_one(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(1990)
        file.write(b"\0\0")


DAMAGE = [cut, empty, append, reverse, reverse_under_the_same_date, zero_one]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_is_written_to_while_it_is_open_is_no_longer_read(path: Path, damage: Any) -> None:
    """Nothing is returned of it, not even where it is as it was."""
    found = opened(path)
    assert found[:3].tolist() == [0, 1, 2]
    damage(path)
    with pytest.raises(DamagedError, match=r"tokens.bin: damaged \(has been .*\); remove .*/store to prepare it again"):
        found[:3]


def test_a_damage_that_is_repaired_while_it_is_looked_at_is_not_returned(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read before the look may be the other content: it is read again."""
    found, whole, stretch = opened(path), path.read_bytes(), TokenFile._stretch
    reverse(path)

    def repaired(self: TokenFile, *place: int) -> bytes:
        read = stretch(self, *place)
        if path.read_bytes() != whole:
            path.write_bytes(whole)
        return read

    monkeypatch.setattr(TokenFile, "_stretch", repaired)
    assert found[:3].tolist() == [0, 1, 2]


def touch(path: Path) -> None:
    os.utime(path)


def change_rights(path: Path) -> None:
    path.chmod(0o600)


def link(path: Path) -> None:
    os.link(path, path.with_name("other"))


def replace(path: Path) -> None:
    path.with_name("new").write_bytes(b"other")
    os.replace(path.with_name("new"), path)


@pytest.mark.parametrize("change", [touch, change_rights, link, replace, os.unlink])
def test_what_leaves_the_content_alone_ends_nothing(path: Path, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """People touch files on scratch disks, and remove a cache while a run goes on."""
    found = opened(path)
    change(path)
    assert found[:].tolist() == IDS.tolist()
    monkeypatch.setattr("train_loop.data.token_file.digest_of", lambda *_: pytest.fail("checked again"))
    assert found[:3].tolist() == [0, 1, 2]


@pytest.mark.parametrize("size", [0, 1999, 2001, 4000])
def test_another_size_is_refused(path: Path, size: int) -> None:
    os.truncate(path, size)
    with pytest.raises(InputError, match=f"has {size} bytes instead of 2000"):
        TokenFile(path, "<u2", 1000)


def test_an_error_of_the_disk_is_one_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = opened(path)

    def fail(*_: int) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(DamagedError, match=r"tokens.bin: damaged \(Input/output error\)"):
        found[:3]


def test_a_file_may_be_read_in_parts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of the kernel reads two gigabytes at most."""
    found, pread = opened(path), os.pread
    monkeypatch.setattr(os, "pread", lambda file, length, start: pread(file, min(length, 7), start))
    assert found[3:100].tolist() == IDS[3:100].tolist()


def test_another_process_opens_its_own(path: Path) -> None:
    copy = pickle.loads(pickle.dumps(opened(path)))
    assert copy[5:8].tolist() == [5, 6, 7]


def test_a_worker_of_the_loader_hands_on_the_line(path: Path) -> None:
    store = TokenStore(path.parent, "<u2", Ledger(text_tokens=1000), "another digest")
    reverse(path)
    windows = Windows(store, 9, filler=0)
    before = {*multiprocessing.active_children()}
    with pytest.raises(InputError) as error:
        list(batches(windows, [MicroBatch(0, np.arange(3))], num_workers=1))
    for worker in {*multiprocessing.active_children()} - before:  # torch waits for it in vain when the error is freed
        worker.kill()
        worker.join()
    assert str(error.value) == (
        f"{path}: damaged (has been written to); remove {path.parent.parent} to prepare it again"
    )


def test_files_are_closed(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(50):
        opened(path)
    assert (len(os.listdir("/proc/self/fd")) if before else 0) <= before + 2
