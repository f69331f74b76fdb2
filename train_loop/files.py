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
