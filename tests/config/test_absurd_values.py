"""Every setting with absurd values of each kind: taken, or refused in one line; never another exception."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from train_loop.config.load import checked, config_from_arguments, load_config, to_yaml
from train_loop.config.parsing import keys
from train_loop.config.schema import Config
from train_loop.errors import InputError

VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        -0.0,
        0.5,
        1.0,
        1e3,
        1e-300,
        5e-324,
        1e30,
        1.7e308,
        math.nan,
        math.inf,
        -math.inf,
    ),
    *(10**15, 2**53, 2**63, 2**64, 10**20, -(10**20), 10**400, 10**5000, 1 - 1e-16),
    *(
        "",
        " ",
        "x",
        "nan",
        "1e400",
        "10",
        "010",
        "\0",
        "a\0b",
        "a\nb",
        "\x1b[31m",
        "caf\xe9",
        "\udcff",
        "\ud800",
        "~",
        "$",
    ),
    *(
        "~nobody-here",
        "$UNKNOWN_HERE",
        "a" * 256,
        "a/" * 3000,
        "/",
        "/dev/null",
        "/proc/self/mem",
        "auto",
        "epoch",
        "null",
    ),
    *(
        [],
        [1],
        [1, 1],
        [0.9, math.nan],
        [0.9, 1],
        [None],
        ["\udcff"],
        [["a"]],
        ["a"] * 3,
        {},
        {"a": 1},
        {"a": {"b": math.nan}},
    ),
    *((), (0.9, 0.95), b"x", {1, 2}, object, 1j, np.int64(3), np.float32(0.5), Path("x")),
)
KEYS = [key for key, _ in keys(Config)]
BASE = {"model.architecture": {"model_type": "gpt2"}, "tokenizer.train_vocab_size": 300}


def refused(error: InputError) -> bool:
    """Whether it is one line, with nothing that moves a terminal's cursor."""
    message = str(error)
    return bool(message) and "\n" not in message and len(message) < 1000


@pytest.mark.parametrize("key", KEYS)
def test_absurd_values_of_a_script_are_taken_or_refused(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is taken is read back as it was from the key's section of what is written; the last one, from all of it."""
    monkeypatch.chdir(tmp_path)
    file, section = tmp_path / "train.yaml", key.partition(".")[0]
    others = {name: value for name, value in BASE.items() if not name.startswith(f"{section}.")}
    taken = []
    for value in VALUES:
        try:
            config = load_config(None, BASE | {key: value})
        except InputError as error:
            assert refused(error), (key, value, str(error))
            continue
        taken.append(config)
        (own,) = re.findall(rf"^{section}:.*?(?=^\w|\Z)", to_yaml(config), re.MULTILINE | re.DOTALL)
        file.write_text(own, encoding="utf-8")
        assert load_config(file, others) == config, (key, value)
    assert len(taken) < len(VALUES)
    for config in taken[-1:]:
        file.write_text(to_yaml(config), encoding="utf-8")
        assert load_config(file) == config
    assert [path.name for path in tmp_path.iterdir()] in ([], ["train.yaml"])


@pytest.mark.parametrize("key", KEYS)
def test_absurd_values_of_the_command_line_are_taken_or_refused(key: str) -> None:
    base = [part for name, value in BASE.items() if name != key for part in (f"--{name}", str(value))]
    texts = [value if isinstance(value, str) else repr(value) for value in VALUES if not isinstance(value, int)]
    for text in [*texts, "[", "{", "- a", "a: b", "!!python/name:os.system", "*a", "&a [*a]", "1_000", "0x10", "1e400"]:
        try:
            config_from_arguments([*base, f"--{key}={text}"])
        except InputError as error:
            assert refused(error), (key, text, str(error))


@pytest.mark.parametrize("section", [field.name for field in dataclasses.fields(Config)])
def test_absurd_sections_are_refused(section: str) -> None:
    for value in VALUES:
        try:
            load_config(None, BASE | {section: value})
        except InputError as error:
            assert refused(error), (section, value)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("run.seed", 2**64, "run.seed: 18446744073709551616 is too large; at most 18,446,744,073,709,551,615"),
        (
            "run.timeout_seconds",
            10**20,
            "run.timeout_seconds: 100000000000000000000 is too large; at most 1,000,000,000",
        ),
        ("tokenizer.train_vocab_size", 10**10, "is too large; at most 16,777,216"),
        ("data.block_size", 10**9, "data.block_size: 1000000000 is too large"),
        ("data.num_workers", 10**6, "at most 1,024"),
        ("batch.micro_batch_size", 10**20, "batch.micro_batch_size: 100000000000000000000 is too large"),
        ("evaluation.every", 10**20, "is too large"),
        ("train.max_steps", float(10**300), "is too large"),
        ("train.max_steps", lambda: 10**5000, "a number of thousands of digits is too large"),
        ("optimizer.betas", [1, 1], "optimizer.betas: expected a number >= 0 and < 1, got 1"),
        ("optimizer.eps", 1e-300, "optimizer.eps: 1e-300 is too small; at least 1e-30"),
        ("optimizer.learning_rate", 1.7e308, "too large"),
        ("optimizer.learning_rate", lambda: 10**400, "expected a number >= 0"),
        ("data.test_size", 1e-309, "too small"),
        ("sample.temperature", math.nan, "sample.temperature: expected a number >= 0, got nan"),
        ("run.output_dir", "", "run.output_dir '': is empty"),
        ("data.cache_dir", "a\0b", "data.cache_dir 'a\\x00b': a path cannot hold the character NUL"),
        ("data.join", "\udcff", "data.join: '\\udcff' is not UTF-8"),
        ("train.max_steps", "010", "train.max_steps: expected an integer > 0, or null, got '010'"),
    ],
)
def test_what_cannot_be_meant_is_named(key: str, value: Any, expected: str) -> None:
    with pytest.raises(InputError) as error:
        load_config(None, BASE | {key: value() if callable(value) else value})
    assert expected in str(error.value)


def test_a_script_may_not_put_absurd_values_past_the_check() -> None:
    config = load_config(None, BASE)
    assert checked(config) == config and checked(config) is not config
    config.train.max_steps = -5
    with pytest.raises(InputError, match=r"^config: train.max_steps: expected an integer > 0, or null, got -5$"):
        checked(config)


@pytest.mark.parametrize(
    ("written", "key", "expected"),
    [
        ("run: {output_dir: 007}", "run.output_dir", "007"),
        ("run: {output_dir: 1e3}", "run.output_dir", "1e3"),
        ("run: {output_dir: 2024_01}", "run.output_dir", "2024_01"),
        ("sample: {prompts: [010, 0x10, 1.50, 12, yes, 2024-01-01]}", "sample.prompts", None),
        ("train: {max_steps: 010}", "train.max_steps", 10),
        ("train: {max_steps: 0o10}", "train.max_steps", 8),
        ("train: {max_steps: 1e3}", "train.max_steps", 1000),
        ("model: {architecture: {model_type: gpt2, n_layer: 010}}", "model.architecture", None),
    ],
)
def test_numbers_are_those_of_yaml_1_2_and_text_is_what_was_written(
    tmp_path: Path, written: str, key: str, expected: Any
) -> None:
    lists = {"sample.prompts": ["010", "0x10", "1.50", "12", "yes", "2024-01-01"]}
    expected = lists.get(key, expected) or {"model_type": "gpt2", "n_layer": 10}
    (tmp_path / "a.yaml").write_text(written)
    section, _, name = key.partition(".")
    config = load_config(tmp_path / "a.yaml", {k: v for k, v in BASE.items() if k != key})
    found = getattr(getattr(config, section), name)
    assert found == expected and type(found) is type(expected)
    (tmp_path / "b.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "b.yaml") == config
