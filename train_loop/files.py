"""Files that are whole or not there, and on the disk before anybody relies on them."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Have the disk hold what was written, before a rename says that it does."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
