"""What files hold, as a digest, which names their content whatever their dates say.

A digest is remembered by what the file system says of a file: device, inode, size, and when it was last changed, so a
second look reads nothing. Of the two times, one can be set (`cp -p`, `rsync -t` and archives set it), but not the other
(ctime). The memory is a file in the cache folder; if it is missing, damaged or can't be written, files are read again.

A file that changed a moment ago is not remembered: it may change once more before the file system's clock moves on, and
would then look the same (git calls such a file racily clean).
"""

import functools
import hashlib
import itertools
import json
import os
import socket
import stat
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from train_loop.console import Progress
from train_loop.data.cache_folder import alone
from train_loop.errors import InputError, one_line
from train_loop.files import clear, write_atomically

_BLOCK, _PIECE = 1 << 18, 1 << 26  # bytes that are read at once, and that one thread takes
# Pieces that wait at most, and threads: disks that many hosts share are only fast if several places are read at once.
_TOGETHER, _THREADS = 1024, 8
_REMEMBERED = 500_000  # files; a line of the memory has 73 bytes
# How long ago a file must have changed [s] for its times to tell two contents apart; some disks count in seconds.
_SETTLED, _SETTLED_IN_SECONDS = 0.1, 3.0
_LONG = 1 << 31  # bytes that are not read without a word


class Look(NamedTuple):
    """What the file system says of a file; while it says the same, the file's content is the same."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def at(cls, file: int) -> "Look":
        """Of an open file. Opening has a network file system ask its server, while a path may show what was before."""
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise OSError("not a file")
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def settled(self, now: float) -> bool:
        """Whether a change after `now` [s] would show in the times."""
        coarse = self.mtime_ns % 10**9 == self.ctime_ns % 10**9 == 0
        changed = max(self.mtime_ns, self.ctime_ns) / 1e9
        return now - changed > (_SETTLED_IN_SECONDS if coarse else _SETTLED)


class Digests:
    """The digests of files, and the memory of them in a folder."""

    def __init__(self, folder: Path) -> None:
        self._memory = folder / "digests"
        self._known: dict[str, str] = {}

    def of(self, paths: Iterable[str | Path]) -> list[str]:
        """The digest of each file. Raises InputError for one that can't be read, or that is written to meanwhile."""
        places = [os.path.abspath(path) for path in paths]
        looks = list(map(_look, places))
        names = [_name(place, look) for place, look in zip(places, looks, strict=True)]
        if not self._known.keys() >= set(names):
            self._recall()
        if not self._known.keys() >= set(names):
            # Of several processes of a host, one reads, and the others then find what it remembers.
            with alone(self._memory.with_suffix(".lock")):
                self._recall()
                new = [each for each in zip(names, places, looks, strict=True) if each[0] not in self._known]
                now = time.time()
                found = dict(zip((name for name, _, _ in new), self._read(new), strict=True))
                self._remember({name: found[name] for name, _, look in new if look.settled(now)})
                return [found.get(name) or self._known[name] for name in names]
        return [self._known[name] for name in names]

    def _read(self, new: Sequence[tuple[str, str, Look]]) -> list[str]:
        """The digests of files, from their contents."""
        total = sum(look.size for _, _, look in new)
        # A file's digest is that of its pieces' digests, so that several threads can read one file.
        hashed = [xxhash.xxh3_128(b"%d\n" % look.size) for _, _, look in new]
        pieces = (
            (number, (path, look, start))
            for number, (_, path, look) in enumerate(new)
            for start in range(0, look.size, _PIECE)
        )
        with Progress("checking data", "B", total, shown=total > _LONG) as progress:
            threads = ThreadPoolExecutor(_THREADS)
            try:
                while some := list(itertools.islice(pieces, _TOGETHER)):
                    for (number, _), digest in zip(
                        some, threads.map(_piece_of, (place for _, place in some)), strict=True
                    ):
                        hashed[number].update(digest)
                        progress.update(min(_PIECE, new[number][2].size))
            finally:
                threads.shutdown(cancel_futures=True)
        return [each.hexdigest() for each in hashed]

    def _recall(self) -> None:
        """Add what the memory holds, if it can be read and is whole."""
        with suppress(OSError, ValueError, RecursionError):
            digest, _, found = self._memory.read_text(encoding="ascii").partition("\n")
            if digest == xxhash.xxh3_128_hexdigest(found.encode()):
                self._known |= json.loads(found)

    def _remember(self, new: dict[str, str]) -> None:
        """Add digests to the memory, if it can be written; the oldest are forgotten."""
        if not new:
            return
        self._known |= new
        kept = json.dumps(dict(list(self._known.items())[-_REMEMBERED:]))
        with suppress(OSError):
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            clear(self._memory.parent)
            write_atomically(self._memory, f"{xxhash.xxh3_128_hexdigest(kept.encode())}\n{kept}")


@functools.lru_cache
def digests(folder: Path) -> Digests:
    """The digests that are remembered in a folder; those of one process for all that it does."""
    return Digests(folder)


def digest_of(file: int, look: Look) -> str:
    """The digest of an open file, read by this thread alone."""
    hashed = xxhash.xxh3_128(b"%d\n" % look.size)
    for start in range(0, look.size, _PIECE):
        hashed.update(_piece(file, start, look.size))
    return hashed.hexdigest()


def key_hash(key: Any) -> str:
    """A short name for a key: 20 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:20]


def _look(path: str) -> Look:
    """Of the file at a path."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for a writer
        try:
            return Look.at(file)
        finally:
            os.close(file)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def _piece_of(place: tuple[str, Look, int]) -> bytes:
    """The digest of one piece: of which file, which must still look the same, and where it begins."""
    path, look, start = place
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            digest = _piece(file, start, look.size)
            if Look.at(file) != look:
                raise InputError(f"{path}: was written to while it was read; start again when it is complete")
            return digest
        finally:
            os.close(file)
    except OSError as error:
        raise _unreadable(path, error) from None


def _piece(file: int, start: int, size: int) -> bytes:
    """The digest of the bytes from `start` on, at most a piece, of a file of `size` bytes."""
    hashed, end = xxhash.xxh3_128(), min(start + _PIECE, size)
    while start < end and (content := os.pread(file, min(_BLOCK, end - start), start)):
        hashed.update(content)
        start += len(content)
    return hashed.digest()


def _name(path: str, look: Look) -> str:
    """What a file is remembered under. Another host's disks may have the same device numbers."""
    return xxhash.xxh3_128_hexdigest(
        "\0".join(map(str, (socket.gethostname(), path, *look))).encode("utf-8", "surrogateescape")
    )


def _unreadable(path: str, error: Exception) -> InputError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
    return InputError(f"{path}: cannot be read ({reason})")
