"""Write files completely or not at all, under names that are nobody else's, and make sure that they are on disk.

What isn't finished has a name that nobody can foresee (`private`), and is made by this process or not at all. So
nothing that was there before is written to, followed or removed. What a killed process left is known by its name
(`clear`). Files and folders get the permissions that the umask leaves.
"""

import itertools
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

_PRIVATE = re.compile(r"\.train_loop-[0-9a-f]{16}-.+")


def sync(path: Path) -> None:
    """Flush a file or folder to disk, so that a rename afterwards only shows what the disk really holds."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def new_token() -> str:
    """What makes a name one that nobody can foresee."""
    return os.urandom(8).hex()


def private(path: Path, token: str | None = None) -> Path:
    """A name beside a path for what will be moved there when it is whole, or was moved away."""
    return path.parent / f".train_loop-{token or new_token()}-{path.name}"


def clear(folder: Path) -> None:
    """Remove what killed processes have left half written in a folder. No other process may be writing there."""
    for each in folder.iterdir() if folder.is_dir() else ():
        if _PRIVATE.fullmatch(each.name):
            remove(each)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def create(path: Path, text: str) -> None:
    """Write a file that is not there yet to disk; FileExistsError if anything is. A failure leaves nothing behind."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(handle)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Write a small file completely or not at all, in place of one that is there. A link is replaced, not followed."""
    temporary = private(path)
    create(temporary, text)
    try:
        os.replace(temporary, path)
    except FileNotFoundError:  # a run that begins in this folder has just cleared it
        create(temporary, text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_output(path: Path, text: str) -> None:
    """Write a file that a user named: atomically, unless it is a terminal, a pipe or another device."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        path.write_text(text, encoding="utf-8")
    else:
        write_atomically(path, text)


def free(path: Path) -> Path:
    """The path, or if something is there, the path with a number that makes it free."""
    numbers = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(each for each in itertools.chain([path], numbers) if not os.path.lexists(each))


def replace(temporary: Path, folder: Path) -> None:
    """Put a whole folder in the place of one that is there, or of nothing. No reader sees half of either."""
    old = private(folder)
    with suppress(FileNotFoundError):
        os.rename(folder, old)
    os.rename(temporary, folder)
    sync(folder.parent)
    remove(old)


def share(path: Path) -> None:
    """Give a file the permissions of its folder: some libraries write files that only their owner can read."""
    with suppress(OSError):  # some disks know no permissions
        path.chmod(path.parent.stat().st_mode & 0o666)


def unwritable(path: Path) -> str | None:
    """Why a file can't be written here, as far as can be told before it is; None if nothing is in the way."""
    folder = path.absolute().parent
    if path.is_dir():
        return "is a folder"
    if not folder.is_dir():
        return f"there is no folder {folder}"
    return None if os.access(path if path.exists() else folder, os.W_OK) else "permission denied"
