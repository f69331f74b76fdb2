"""What a file really holds, if that is not what its name says: told by its first bytes.

A clone without Git LFS, a download that failed, an archive under another name: libraries complain about such files in
words that don't help.
"""

from pathlib import Path

from train_loop.errors import InputError

HEAD_BYTES = 512  # how much of a file is looked at
_POINTER_BYTES = 1024  # a pointer of Git LFS is smaller
POINTER = b"version https://git-lfs.github.com/spec/"
_SIGNS = (  # how a file begins, and what it is
    (POINTER, "is a Git LFS pointer, not the file itself; fetch it with git lfs pull"),
    (b"\x1f\x8b", "is compressed with gzip; unpack it with gunzip"),
    (b"\xfd7zXZ\x00", "is compressed with xz; unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "is compressed with Zstandard; unpack it with unzstd"),
    (b"BZh91AY&SY", "is compressed with bzip2; unpack it with bunzip2"),
    (b"PK\x03\x04", "is a ZIP archive; unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive; unpack it"),
    (b"%PDF-", "is a PDF; extract its text first"),
    (b"ARROW1\x00\x00", "is an Arrow file; convert it to Parquet"),
    (b"\xff\xfe\x00\x00", "is UTF-32; convert it with iconv -f UTF-32 -t UTF-8"),
    (b"\x00\x00\xfe\xff", "is UTF-32; convert it with iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xfe", "is UTF-16; convert it with iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "is UTF-16; convert it with iconv -f UTF-16 -t UTF-8"),
)
_PAGES = (b"<!doctype html", b"<html", b"<?xml")  # what a server sends with an error
_PARQUET = (b"PAR1", b"PARE")  # the second, where even the footer is encrypted


def disguise(start: bytes, suffix: str) -> str | None:
    """What a file is that begins with `start` and doesn't belong under this suffix; None if nothing is wrong with it.

    `start` is at least `HEAD_BYTES` long, or the whole file. A page of HTML is fine as a text file.
    """
    for sign, what in _SIGNS:
        if start.startswith(sign):
            return what
    if suffix == ".parquet":
        if start.startswith(_PARQUET):
            return None
    elif start.startswith(_PARQUET[0]):
        return "is a Parquet file; name it .parquet"
    elif 5 * start.count(0) >= 2 * max(len(start), 1):
        return "is mostly NUL bytes: UTF-16 (convert it with iconv -f UTF-16 -t UTF-8), damaged, or no text at all"
    if suffix != ".txt" and start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_PAGES):
        return "is a web page, perhaps a server's error message; download it again"
    return None


def refuse_disguised(path: str, suffix: str, name: str) -> None:
    """Raise InputError if a file is not what its suffix says; the message begins with `name`."""
    with open(path, "rb") as file:
        what = disguise(file.read(HEAD_BYTES), suffix)
    if what:
        raise InputError(f"{name}: {what}")


def refuse_pointers(where: str, folder: str | Path) -> None:
    """Raise InputError, which begins with `where`, if a local folder holds a Git LFS pointer in place of a file.

    The name of a repository on the Hub is no local folder, and passes.
    """
    root = Path(folder)
    try:
        files = sorted(path for path in root.iterdir() if path.is_file()) if root.is_dir() else []
        pointers = [path for path in files if path.stat().st_size <= _POINTER_BYTES and _is_pointer(path)]
    except OSError:  # whoever loads the folder says what can't be read
        return
    if pointers:
        raise InputError(f"{where}: {pointers[0].name} {_SIGNS[0][1]}")


def _is_pointer(path: Path) -> bool:
    return path.read_bytes().startswith(POINTER)
