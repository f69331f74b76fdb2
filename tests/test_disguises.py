"""Files that are not what their names say."""

import gzip
import lzma
from pathlib import Path

import pytest

from train_loop.disguises import disguise, refuse_pointers
from train_loop.errors import InputError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "suffix", "expected"),
    [
        (POINTER, ".txt", "a Git LFS pointer, not the file itself; fetch it with git lfs pull"),
        (POINTER, ".parquet", "Git LFS"),
        (gzip.compress(b"text", mtime=0), ".jsonl", "gzip"),
        (lzma.compress(b"text"), ".csv", "xz"),
        (b"\x28\xb5\x2f\xfd rest", ".txt", "Zstandard"),
        (b"PK\x03\x04 rest", ".json", "ZIP"),
        (b"%PDF-1.7 rest", ".txt", "PDF"),
        ("text".encode("utf-16"), ".txt", "UTF-16"),
        ("text".encode("utf-16-be"), ".csv", "UTF-16"),
        ("text".encode("utf-32"), ".txt", "UTF-32"),
        (bytes(512), ".txt", "NUL"),
        (b"PAR1 rest", ".jsonl", "name it .parquet"),
        (b"\xef\xbb\xbf\n<!DOCTYPE HTML><html>", ".csv", "web page"),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", ".parquet", "web page"),
    ],
)
def test_what_a_file_is_instead(content: bytes, suffix: str, expected: str) -> None:
    assert expected in (disguise(content, suffix) or "")


@pytest.mark.parametrize(
    ("content", "suffix"),
    [
        (b"plain text", ".txt"),
        (b"<html>a page is text, too</html>", ".txt"),
        (b"one \0 NUL in a text", ".txt"),
        (b"PAR1 rest", ".parquet"),
        (b"", ".txt"),
        (b"BZh is how this text begins", ".txt"),
    ],
)
def test_a_file_that_is_what_it_says(content: bytes, suffix: str) -> None:
    assert disguise(content, suffix) is None


def test_pointers_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"{}")
    refuse_pointers("model x", tmp_path)
    refuse_pointers("model gpt2", "gpt2")  # a name on the Hub
    (tmp_path / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(InputError, match=r"^model x: model.safetensors is a Git LFS pointer.*git lfs pull"):
        refuse_pointers("model x", tmp_path)
