"""Prompts from files and standard input: what ends a line, and what is no text."""

import io
import sys
from pathlib import Path

import pytest

from tests.support.runs import Command
from train_loop.data import tokenizer
from train_loop.errors import InputError
from train_loop.generation.prompts import converse, read_prompts
from train_loop.generation.sampler import prompt_ids


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xef\xbb\xbfa\nb", ["a", "b"]),
        (b"a\r\nb \r\n\r\n", ["a", "b "]),
        ("a\u2028b\u0085c\x0cd\x0be\x1cf\nnext".encode(), ["a\u2028b\u0085c\x0cd\x0be\x1cf", "next"]),
        (b"a\rb", ["a\rb"]),
        (b"x" * 3_000_000, ["x" * 3_000_000]),
        (b"  a\n \n", ["  a"]),
    ],
)
def test_only_line_feeds_end_a_line(tmp_path: Path, content: bytes, expected: list[str]) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    assert read_prompts([], str(tmp_path / "p.txt")) == expected


def test_objects_are_read_in_the_same_way(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes('\ufeff{"prompt": "a\u2028b"}\r\n{"prompt": "c"}\r\n'.encode())
    assert read_prompts([], str(tmp_path / "p.jsonl")) == ["a\u2028b", "c"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"abc\xffd", "not UTF-8 at byte 3"),
        ("text".encode("utf-16"), "not UTF-8 at byte 0"),
        (b"ab\x00c", "character 3 is NUL, so this is no text"),
        (b"", "has no prompt"),
        (b"\xef\xbb\xbf\n \r\n", "has no prompt"),
    ],
)
def test_what_is_no_text_is_one_line(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(InputError, match=expected):
        read_prompts([], str(tmp_path / "p.txt"))


def test_places_that_are_no_file(tmp_path: Path) -> None:
    for name in (tmp_path, tmp_path / "nowhere", "a\0b"):
        with pytest.raises(InputError, match="cannot be read"):
            read_prompts([], str(name))


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def give(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))

    give("one prompt,\r\nof two lines ü\r\n".encode())
    assert read_prompts([], None) == ["one prompt,\r\nof two lines ü"]
    give("ä\nb".encode())
    assert read_prompts([], "-") == ["ä", "b"]
    give(b"a\xff")
    with pytest.raises(InputError, match=r"^standard input: not UTF-8 at byte 1"):
        read_prompts([], "-")
    closed = io.StringIO()
    closed.close()
    for stdin in (None, closed):
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(InputError, match="no prompt"):
            read_prompts([], None)
        converse(lambda prompt: None)


def test_half_of_a_surrogate_pair_is_no_prompt(command: Command, model_folder: Path, tmp_path: Path) -> None:
    own = tokenizer.load(str(model_folder))
    with pytest.raises(InputError, match="character 2 is half of a surrogate pair"):
        prompt_ids(own, "a\udcff")
    (tmp_path / "p.jsonl").write_text('{"prompt": "\\ud800"}', encoding="utf-8")
    assert command("sample", "--model", model_folder, "--prompts", tmp_path / "p.jsonl") == 2
    assert "half of a surrogate pair" in command.err and command.err.count("\n") == 1


def test_an_enormous_word_is_refused_in_a_moment(command: Command, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"x" * 1_000_000)
    assert command("sample", "--model", model_folder, "--prompts", tmp_path / "p.txt") == 2
    assert "tokens exceed the model's context of 64; shorten it" in command.err
