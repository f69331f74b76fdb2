"""Files are known by what they hold, and a second look reads nothing."""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from train_loop.data import content
from train_loop.data.content import Digests
from train_loop.errors import InputError


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """Write a file whose change lies in the past, as far as its times can say so."""

    def write(name: str, text: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(text)
        time.sleep(0.02)
        return path

    return write


@pytest.fixture(autouse=True)
def soon_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_SETTLED", 0.01)


def test_a_digest_is_that_of_the_content_alone(tmp_path: Path, written: Callable[..., Path]) -> None:
    found = Digests(tmp_path / "cache").of([written("a", b"one"), written("b", b"two"), written("c", b"one")])
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 640, 1001])
def test_pieces_make_up_a_file(
    tmp_path: Path, written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Every byte counts, wherever pieces and blocks end; one thread and several agree."""
    monkeypatch.setattr(content, "_PIECE", 64)
    monkeypatch.setattr(content, "_BLOCK", 10)
    monkeypatch.setattr(content, "_TOGETHER", 3)
    text = bytes(number % 251 for number in range(size))
    path = written("f", text)
    (digest,) = Digests(tmp_path / "cache").of([path])
    with open(path, "rb") as file:
        assert content.digest_of(file.fileno(), content.Look.at(file.fileno())) == digest
    others = [bytes([*text[:place], text[place] ^ 1, *text[place + 1 :]]) for place in {0, size // 2, size - 1} if size]
    for other in [*others, text + b"\0", text[:-1] if size else b"x"]:
        path.write_bytes(other)
        assert Digests(tmp_path / "cache").of([path]) != [digest]


def test_a_second_look_reads_nothing(
    tmp_path: Path, written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [written("a", b"one"), written("b", b"two")]
    first = Digests(tmp_path / "cache").of(paths)
    monkeypatch.setattr(content, "_piece", lambda *_: pytest.fail("read again"))
    assert Digests(tmp_path / "cache").of(paths) == first


def test_the_same_size_and_date_are_not_the_same_content(tmp_path: Path, written: Callable[..., Path]) -> None:
    """As `cp -p`, `rsync -t`, archives and `touch -r` leave it."""
    path, known = written("f", b"one"), Digests(tmp_path / "cache")
    before, first = path.stat(), known.of([path])
    written("f", b"two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert known.of([path]) != first
    other = written("other", b"six")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, path)
    assert known.of([path]) != first


def test_a_file_that_has_just_changed_is_read_again(
    tmp_path: Path, written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may change once more without another date: here, the file system's clock stands still."""
    path, known = written("f", b"one"), Digests(tmp_path / "cache")
    look = content._look(str(path))
    monkeypatch.setattr(content.Look, "at", classmethod(lambda cls, file: look))
    now = look.ctime_ns / 1e9
    monkeypatch.setattr(content.time, "time", lambda: now + 0.005)
    first = known.of([path])
    path.write_bytes(b"two")
    assert known.of([path]) != first
    monkeypatch.setattr(content.time, "time", lambda: now + 1)
    second = known.of([path])
    path.write_bytes(b"six")  # what cannot be: a change of now with a date of long ago
    assert known.of([path]) == second


def test_disks_that_count_in_seconds_settle_later() -> None:
    fine, coarse = (content.Look(1, 2, 3, 10**18 + part, 10**18 + part) for part in (7, 0))
    assert fine.settled(1e9 + 1) and not coarse.settled(1e9 + 1) and coarse.settled(1e9 + 4)


def test_a_file_that_is_written_to_meanwhile_is_refused(
    tmp_path: Path, written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = written("f", b"one"), content._piece

    def slowly(*place: int) -> bytes:
        with open(path, "ab") as file:
            file.write(b"more")
        return read(*place)

    monkeypatch.setattr(content, "_piece", slowly)
    with pytest.raises(InputError, match="f: was written to while it was read"):
        Digests(tmp_path / "cache").of([path])


@pytest.mark.parametrize("damage", ["", "{", "[1]", "00\n{}", "\udcff", "null\nnull", "9" * 5000])
def test_a_damaged_memory_is_ignored(tmp_path: Path, written: Callable[..., Path], damage: str) -> None:
    path, memory = written("f", b"one"), tmp_path / "cache" / "digests"
    first = Digests(memory.parent).of([path])
    memory.write_text(damage, encoding="utf-8", errors="surrogateescape")
    assert Digests(memory.parent).of([path]) == first


def test_an_edited_memory_is_ignored(tmp_path: Path, written: Callable[..., Path]) -> None:
    path, memory = written("f", b"one"), tmp_path / "cache" / "digests"
    first = Digests(memory.parent).of([path])
    memory.write_text(memory.read_text().replace(first[0], "0" * 32))
    assert Digests(memory.parent).of([path]) == first


def test_the_memory_is_bounded(tmp_path: Path, written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_REMEMBERED", 3)
    for number in range(5):
        Digests(tmp_path / "cache").of([written(str(number), b"%d" % number)])
    assert len(json.loads((tmp_path / "cache" / "digests").read_text().partition("\n")[2])) == 3


def test_without_a_cache_folder_files_are_read(tmp_path: Path, written: Callable[..., Path]) -> None:
    (tmp_path / "cache").write_text("a file")
    assert len(Digests(tmp_path / "cache").of([written("f", b"one")])[0]) == 32


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: None], ids=["folder", "pipe", "nothing"])
def test_what_is_no_file_is_named(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "f")
    with pytest.raises(InputError, match="f: cannot be read"):
        Digests(tmp_path / "cache").of([tmp_path / "f"])


def test_of_several_that_look_at_once_one_reads(
    tmp_path: Path, written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read, reads = written("f", b"one"), content._piece, []
    (tmp_path / "cache").mkdir()

    def counted(*place: int) -> bytes:
        reads.append(place)
        time.sleep(0.05)
        return read(*place)

    monkeypatch.setattr(content, "_piece", counted)
    threads = [threading.Thread(target=lambda: Digests(tmp_path / "cache").of([path])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 1
