"""A stream of token ids on disk, read when it is asked for.

It is not memory-mapped: where a mapped file is cut, or its disk fails, the kernel kills the process without a word
(SIGBUS). After each read, a look at the file tells whether somebody has written to it since it was checked. If so, its
digest decides: with another content the run stops, before it computes with any of it.
"""

import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from train_loop.data.content import Look, digest_of
from train_loop.errors import InputError


class DamagedError(InputError):
    """A file of a store is not what was written."""

    def __init__(self, line: str) -> None:
        # A DataLoader's worker passes its traceback on for a message, which ends with the line.
        super().__init__(line.strip().rpartition(f"{type(self).__name__}: ")[2])


def damaged(path: Path, what: str, store: Path) -> DamagedError:
    """The error for a damaged file of a store."""
    return DamagedError(f"{path}: damaged ({what}); remove {store} to prepare it again")


class TokenFile:
    """Token ids [tokens], uint16 or uint32, of a store's file.

    `tokens[3:7]` are those of a stretch, `tokens[places]` those at places [rows, width], each of whose rows ascends.
    Raises DamagedError for a file that has another size, can't be read or has been changed since it was opened; without
    a `digest` of its content, each change counts.
    """

    def __init__(self, path: Path, dtype: npt.DTypeLike, count: int, digest: str | None = None) -> None:
        self.path, self.dtype, self.digest = path, np.dtype(dtype), digest
        self._count = count
        try:
            self._file = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)
            self._look = Look.at(self._file)
        except OSError as error:
            raise self._damaged(error.strerror or str(error)) from None
        expected = count * self.dtype.itemsize
        if self._look.size != expected:
            raise self._damaged(f"has {self._look.size} bytes instead of {expected}")

    def __reduce__(self) -> tuple[Any, ...]:
        # For a DataLoader's worker that is not a copy of this process.
        return TokenFile, (self.path, self.dtype, self._count, self.digest)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, places: slice | npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        if isinstance(places, slice):
            first, end, _ = places.indices(self._count)
            return np.frombuffer(self._read([first], [max(first, end)])[0], self.dtype)
        firsts = places[:, 0].tolist()
        read = self._read(firsts, (places[:, -1] + 1).tolist())
        width = places.shape[1] * self.dtype.itemsize
        if all(len(each) == width for each in read):
            return np.frombuffer(b"".join(read), self.dtype).reshape(places.shape)
        found = np.empty(places.shape, self.dtype)
        for row, first, each in zip(range(len(read)), firsts, read, strict=True):
            found[row] = np.frombuffer(each, self.dtype)[places[row] - first]
        return found

    def check(self) -> None:
        """Raise DamagedError if the file is not what it was when it was opened."""
        while not self._is_unchanged():
            pass

    def _read(self, firsts: Sequence[int], ends: Sequence[int]) -> list[bytes]:
        """The bytes of some stretches of tokens."""
        size = self.dtype.itemsize
        while True:
            found = [self._stretch(first * size, (end - first) * size) for first, end in zip(firsts, ends, strict=True)]
            if self._is_unchanged():
                return found

    def _stretch(self, start: int, length: int) -> bytes:
        try:
            content = os.pread(self._file, length, start)
            while len(content) < length:  # one call reads at most 2 GB
                more = os.pread(self._file, length - len(content), start + len(content))
                if not more:
                    raise self._damaged("has been cut")
                content += more
        except OSError as error:
            raise self._damaged(error.strerror or str(error)) from None
        return content

    def _is_unchanged(self) -> bool:
        """Whether nothing has touched the file since this was last asked. DamagedError if its content is another."""
        look = Look.at(self._file)
        if look == self._look:
            return True
        if look.size != self._look.size or digest_of(self._file, look) != self.digest:
            raise self._damaged("has been written to")
        self._look = look  # its dates, its rights or its name were changed
        return False

    def _damaged(self, what: str) -> DamagedError:
        return damaged(self.path, what, self.path.parent.parent)
