"""The cache folder, which processes, hosts and colleagues share. What is in it is complete, and never written to again.

Something new is made in a folder of its own beside its place, and renamed when it is complete. Locks only save work:
of several that want the same thing, one makes it while the others wait. On a disk without locks, each makes it, and the
first that is ready wins. A lock ends with its process, so none is ever left behind.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from train_loop.errors import InputError, one_line

# NAME.tmp-HOST-TOKEN; 0.1.0 had the process's number for a token.
_UNFINISHED = re.compile(r"[\w.-]+\.tmp-(?P<host>.+)-([0-9a-f]{8}|\d+)")
_LOCK = re.compile(r"([0-9a-f]{20}|digests)\.lock")
_ABANDONED_SECONDS = 24 * 3600  # what nothing was written to for so long has no living process, on any host


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Within this context, no other process is, as far as the disk knows locks. The file is gone afterwards.

    If the disk has no locks, or nothing can be written there, the context holds nothing.
    """
    file = _locked(path)
    try:
        yield
    finally:
        if file is not None:
            with suppress(OSError):
                os.unlink(path)
            os.close(file)


def _locked(path: Path) -> int | None:
    """Open a lock file, wait for its lock, and return it; None if there is none to be had."""
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except (OSError, ValueError):
            try:  # a colleague's, whose lock can be had without writing
                file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            except (OSError, ValueError):
                return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(file), os.lstat(path)):
                return file
        except FileNotFoundError:
            pass  # whoever had the lock before has removed the file: another one counts now
        except OSError:
            os.close(file)
            return None
        except BaseException:
            os.close(file)
            raise
        os.close(file)


@contextmanager
def unfinished(target: Path) -> Iterator[Path]:
    """A new folder beside `target` to make it in. What is left of the folder afterwards is removed.

    It is locked, which tells `sweep` that its process lives.
    """
    while True:
        folder = target.with_name(f"{target.name}.tmp-{socket.gethostname()}-{secrets.token_hex(4)}")
        folder.mkdir()
        file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.is_dir():  # no `sweep` was faster
                yield folder
                return
        finally:
            os.close(file)
            shutil.rmtree(folder, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Remove what killed processes left in a folder: unfinished things, and files of locks that nobody holds.

    Another host's are only removed after a day, since its locks may not be seen here.
    """
    with suppress(OSError, ValueError):
        for path in parent.iterdir():
            made = _UNFINISHED.fullmatch(path.name)
            if not (made or _LOCK.fullmatch(path.name)):
                continue
            with suppress(OSError):
                file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    if made is None:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        if os.path.samestat(os.fstat(file), os.lstat(path)):
                            os.unlink(path)
                    elif _is_abandoned(path, file, made["host"]):
                        shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(file)


def _is_abandoned(folder: Path, file: int, host: str) -> bool:
    """Whether the process that was at work in a folder is gone."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if host == socket.gethostname():
            return True
    except BlockingIOError:
        return False
    except OSError:
        pass  # no locks
    changed = [each.lstat().st_mtime for each in (folder, *folder.rglob("*"))]
    return time.time() - max(changed) > _ABANDONED_SECONDS


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Within this context, a folder that can't be used, or is full, is a mistake in the input."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # a library's, of another kind
            raise InputError(f"{what}: {one_line(error)}") from None
        reason, place = error.strerror or str(error), str(error.filename or folder)
        if not (place.startswith(str(folder)) or str(folder).startswith(place)):
            raise InputError(f"{place}: cannot be used ({reason})") from None
        room = "make room, or " if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
        cure = f"{room}name another folder with data.cache_dir"
        raise InputError(f"{what}: {folder} cannot be used ({reason}); {cure}") from None
