"""Write files completely or not at all, and make sure that they are on disk before anything relies on them."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Flush a file or folder to disk, so that a rename afterwards only shows what the disk really holds."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, text: str) -> None:
    """Write a small file completely or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def unwritable(path: Path) -> str | None:
    """Why a file can't be written here, as far as can be told before it is; None if nothing is in the way."""
    folder = path.absolute().parent
    if path.is_dir():
        return "is a folder"
    if not folder.is_dir():
        return f"there is no folder {folder}"
    return None if os.access(path if path.exists() else folder, os.W_OK) else "permission denied"
