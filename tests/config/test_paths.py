"""Paths in settings: `~`, `$VAR`, and what can't be a path."""

import os
from pathlib import Path

import pytest

from train_loop.config import paths
from train_loop.config.load import cache_dir, config_from_arguments, load_config, to_yaml
from train_loop.config.schema import Config
from train_loop.errors import InputError

MODEL = ["--model.architecture", "{model_type: gpt2}", "--tokenizer.train_vocab_size", "300"]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/7")
    monkeypatch.delenv("UNKNOWN", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("written", "expanded"),
    [
        ("~", "/home/me"),
        ("~/a", "/home/me/a"),
        ("~root/a", os.path.expanduser("~root/a")),
        ("$SCRATCH/a", "/scratch/7/a"),
        ("${SCRATCH}s/*.txt", "/scratch/7s/*.txt"),
        ("a/$SCRATCH$HOME", "a//scratch/7/home/me"),
        ("a~b/~", "a~b/~"),
        ("a$", "a$"),
        ("a$1/$-", "a$1/$-"),
        ("gpt2", "gpt2"),
        ("openai-community/gpt2", "openai-community/gpt2"),
        ("hf://datasets/a/b", "hf://datasets/a/b"),
    ],
)
def test_a_path_is_read_as_a_shell_reads_it(written: str, expanded: str) -> None:
    assert paths.expand(written, "key") == expanded


def test_a_name_that_exists_is_taken_literally(tmp_path: Path) -> None:
    for name in ("$UNKNOWN", "~", "a$HOME"):
        (tmp_path / name).mkdir()
        assert paths.expand(name, "key") == name


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("a/$UNKNOWN/b", r"^key a/\$UNKNOWN/b: the environment variable UNKNOWN is not set$"),
        ("${UNKNOWN}", "the environment variable UNKNOWN is not set"),
        ("~nobody-here/a", "no user nobody-here"),
        ("", "is empty"),
        ("  ", "is empty"),
        ("a\0b", "NUL"),
        ("a" * 256, "longer than a path can be"),
        ("\u20ac" * 86, "longer than a path can be"),
        ("a/" * 2100, "longer than a path can be"),
    ],
)
def test_what_is_no_path_is_named(written: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        paths.expand(written, "key")


@pytest.mark.parametrize(
    ("key", "others"),
    [
        ("run.output_dir", []),
        ("data.cache_dir", []),
        ("data.files", ["--data.source", "files"]),
        ("data.validation_files", ["--data.source", "files", "--data.files", "x"]),
        ("data.name", ["--data.source", "hub"]),
        ("model.name_or_path", ["--model.architecture", "null", "--tokenizer.train_vocab_size", "null"]),
        ("tokenizer.name_or_path", ["--tokenizer.train_vocab_size", "null"]),
    ],
)
def test_every_path_setting_is_expanded_and_stored_so(tmp_path: Path, key: str, others: list[str]) -> None:
    given = dict(zip(MODEL[::2], MODEL[1::2], strict=True)) | dict(zip(others[::2], others[1::2], strict=True))
    config = config_from_arguments([part for pair in given.items() for part in pair] + [f"--{key}", "$SCRATCH/a"])
    section, _, name = key.partition(".")
    assert getattr(getattr(config, section), name) in ("/scratch/7/a", ["/scratch/7/a"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    os.environ["SCRATCH"] = "/elsewhere"  # `surroundings` puts it back
    assert load_config("config.yaml") == config


def test_the_file_of_settings_and_the_cache_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.yaml").write_text("run: {seed: 3}")
    monkeypatch.setenv("HERE", str(tmp_path))
    assert load_config("$HERE/a.yaml").run.seed == 3
    monkeypatch.setenv("TRAIN_LOOP_CACHE", "~/cache")
    assert cache_dir(Config().data) == Path("/home/me/cache")
    monkeypatch.setenv("TRAIN_LOOP_CACHE", "$UNKNOWN/cache")
    with pytest.raises(InputError, match=r"TRAIN_LOOP_CACHE.*UNKNOWN is not set"):
        cache_dir(Config().data)


@pytest.mark.parametrize("name", ["./modle", "/a/b", "a/b/c", "../x", "model.safetensors", "a/", "x\\y", "~/nowhere"])
def test_a_missing_path_is_called_that(name: str) -> None:
    with pytest.raises(InputError, match=r"^model.name_or_path .*: no such folder$"):
        paths.find(name, "model.name_or_path")


def test_a_name_may_mean_a_folder_or_a_repository(tmp_path: Path) -> None:
    assert paths.find("gpt2", "model") == "gpt2" and paths.find("a/b", "model") == "a/b"
    assert paths.no_folder("a/b") == "; there is no folder a/b here, either"
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="model file: is a file; name the folder that it is in"):
        paths.find("file", "model")
    (tmp_path / "a").mkdir()
    assert paths.find("a", "model") == "a" and paths.no_folder("a") == ""
