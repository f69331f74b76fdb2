"""The configuration: YAML, overrides, and mistakes that are named."""

from pathlib import Path
from typing import Any

import pytest

from train_loop.config.load import (
    checked,
    config_from_arguments,
    differences,
    load_config,
    shared_settings,
    to_dict,
    to_yaml,
)
from train_loop.config.parsing import bytes_of, help_text, keys
from train_loop.config.schema import Config
from train_loop.errors import InputError

VALID = """
run: {mixed_precision: no, seed: 3}
model:
  architecture: {model_type: gpt2, n_layer: 2}
tokenizer: {train_vocab_size: 512}
optimizer: {learning_rate: 1e-3, betas: [0.9, 0.95]}
"""


RECOMPUTE = (
    "model.activation_checkpointing: expected none | full | attention, or an integer > 0, or true or false, got "
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(VALID, encoding="utf-8")
    return path


def test_values_of_file_and_command_line(file: Path) -> None:
    loaded = config_from_arguments(
        [
            *("--config", str(file)),
            *("--optimizer.learning_rate", "3e-4"),
            "--model.architecture.n_layer=5",
            *("--evaluation.every", "10"),
            *("--sample.prompts", '["def f(x):", b]'),
            *("--data.join", ": "),
        ]
    )
    assert loaded.run.mixed_precision == "no" and loaded.run.seed == 3
    assert loaded.optimizer.learning_rate == 3e-4 and loaded.optimizer.betas == (0.9, 0.95)
    assert loaded.model.architecture == {"model_type": "gpt2", "n_layer": 5}
    assert loaded.evaluation.every == 10
    assert loaded.sample.prompts == ["def f(x):", "b"]
    assert loaded.data.join == ": "
    assert loaded.run.output_dir == "runs/my"


def test_text_on_the_command_line_is_not_read_as_yaml(file: Path) -> None:
    loaded = config_from_arguments(["--config", str(file), "--sample.prompts", "def f(x): # no"])
    assert loaded.sample.prompts == ["def f(x): # no"]


def test_resolved_yaml_loads_to_the_same(file: Path, tmp_path: Path) -> None:
    loaded = config_from_arguments(["--config", str(file), "--model.attention", "eager"])
    again = tmp_path / "resolved.yaml"
    again.write_text(to_yaml(loaded), encoding="utf-8")
    assert config_from_arguments(["--config", str(again)]) == loaded


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("optimizer: {learning_rat: 1}", "unknown key optimizer.learning_rat; did you mean learning_rate?"),
        ("learning_rate: 1", "unknown key learning_rate; did you mean optimizer.learning_rate?"),
        ("optimizr: {}", "unknown key optimizr; did you mean optimizer?"),
        ("optimizer: {learning_rate: fast}", "optimizer.learning_rate: expected a number >= 0, got 'fast'"),
        ("optimizer: {learning_rate: .nan}", "optimizer.learning_rate: expected a number >= 0"),
        ("run: {seed: 1.5}", "run.seed: expected an integer >= 0, got 1.5"),
        ("run: {seed: .inf}", "run.seed: expected an integer >= 0"),
        ("run: {seed: true}", "run.seed: expected an integer >= 0, got True"),
        ("run: {mixed_precision: half}", "run.mixed_precision: expected no | bf16 | fp16 | fp8, got 'half'"),
        ("evaluation: {every: -3}", "evaluation.every: expected an integer > 0, or epoch, got -3"),
        ("data: {test_size: 1}", "data.test_size: expected a number between 0 and 1, both excluded, got 1"),
        ("optimizer: {betas: [0.9]}", "optimizer.betas: expected a list of 2"),
        ("model: {activation_checkpointing: 0}", RECOMPUTE + "0"),
        ("model: {activation_checkpointing: -2}", RECOMPUTE + "-2"),
        ("model: {activation_checkpointing: 1.5}", RECOMPUTE + "1.5"),
        ("model: {activation_checkpointing: '2'}", RECOMPUTE + "'2'"),
        ("model: {activation_checkpointing: null}", RECOMPUTE + "None"),
        ("data: 3", "data is a section"),
        ("- a", "expected sections"),
        ("run: [1", "not valid YAML"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_the_file(tmp_path: Path, line: str, expected: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(InputError) as error:
        config_from_arguments(["--config", str(path)])
    message = str(error.value)
    assert "wrong.yaml" in message and "\n" not in message
    assert expected in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--optimizer.learning_rat", "1"], "did you mean optimizer.learning_rate?"),
        (["--run.seed"], "--run.seed needs a value"),
        (["foo"], "unexpected 'foo'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["--model.name_or_path", "x"], "exactly one of model.name_or_path and model.architecture"),
        (["--tokenizer.name_or_path", "x"], "only one of tokenizer"),
        (["--data.source", "files"], "no file is named"),
        (["--data.source", "hub"], "no data set is named"),
        (["--data.files", "a.txt"], "data.files only works with data.source files"),
        (["--batch.micro_batch_size", "9"], "micro_batch_size 9 is larger than"),
        (["--model.architecture", "{n_layer: 2}"], "model_type is missing"),
        (["--tokenizer.train_vocab_size", "256"], "at least 257"),
        (["--model.activation_checkpointing", "every 2nd"], "true or false, got 'every 2nd'"),
        (["--model.activation_checkpointing", "0"], "an integer > 0, or true or false, got 0"),
        (["--model.activation_checkpointing", "99999999999999999"], "99999999999999999 is too large"),
        (
            ["--data.source", "hub", "--data.name", "x", "--data.streaming", "true", "--data.split", "train[:5]"],
            "sliced",
        ),
        (["--export.hub_model_id", "x"], "export.push_to_hub"),
        *(
            (["--export.max_shard_size", size], "export.max_shard_size: expected a size such as 5GB or 500MB (TB, GB")
            for size in ("0", "0GB", "-1GB", "GB", "5GiB", "1e3GB", "nan GB", "0.1KB 5", "five", "9" * 20)
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_named(file: Path, arguments: list[str], expected: str) -> None:
    given = arguments if arguments[0] == "--config" else ["--config", str(file), *arguments]
    with pytest.raises(InputError, match=r"^[^\n]*$") as error:
        config_from_arguments(given)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("size", "expected"), [("5GB", 5 * 10**9), (" 500 mb", 5 * 10**8), ("0.5KB", 500), (7, 7), ("1TB", 10**12)]
)
def test_sizes(file: Path, size: object, expected: int) -> None:
    assert bytes_of(load_config(file, {"export.max_shard_size": size}).export.max_shard_size) == expected


@pytest.mark.parametrize(
    ("given", "expected"), [("true", "full"), ("false", "none"), ("none", "none"), ("2", 2), ("attention", "attention")]
)
def test_what_is_recomputed_has_one_name_in_all_places(
    file: Path, tmp_path: Path, given: str, expected: int | str
) -> None:
    """Before 0.2, it was true or false; all processes of a run must share it."""
    typed = config_from_arguments(["--config", str(file), "--model.activation_checkpointing", given])
    written = tmp_path / "written" / "my.yaml"
    written.parent.mkdir()
    written.write_text(VALID.replace("model:", f"model:\n  activation_checkpointing: {given}"), encoding="utf-8")
    assert typed == config_from_arguments(["--config", str(written)]) and checked(typed) == typed
    value: Any = typed.model.activation_checkpointing
    assert value == expected and type(value) is type(expected)
    named = config_from_arguments(["--config", str(file), "--model.activation_checkpointing", str(expected)])
    assert shared_settings(named) == shared_settings(typed)
    stored = to_dict(typed)["model"]["activation_checkpointing"]
    assert stored == {"full": True, "none": False}.get(str(expected), expected)  # older versions read these
    written.write_text(to_yaml(typed), encoding="utf-8")
    assert config_from_arguments(["--config", str(written)]) == typed
    old = to_dict(typed)
    old["model"]["activation_checkpointing"] = not stored  # a run may go on with another value
    assert differences(old, to_dict(typed)) == []


def test_every_setting_is_explained_in_the_help() -> None:
    lines = help_text(Config).splitlines()
    for key, _ in keys(Config):
        place = next(number for number, line in enumerate(lines) if line.startswith(f"  --{key} "))
        assert len(lines[place + 1].strip()) > 10


def test_only_decisions_that_change_the_result_make_a_different_run(file: Path) -> None:
    old = to_dict(config_from_arguments(["--config", str(file)]))
    free = ["--batch.micro_batch_size", "2", "--checkpoint.keep", "9", "--run.output_dir", "elsewhere"]
    assert differences(old, to_dict(config_from_arguments(["--config", str(file), *free]))) == []
    changed = config_from_arguments(
        ["--config", str(file), "--optimizer.weight_decay", "0.5", "--model.architecture.n_layer", "3"]
    )
    assert differences(old, to_dict(changed)) == [
        "model.architecture.n_layer: 2 -> 3",
        "optimizer.weight_decay: 0.01 -> 0.5",
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--run.seed", "1", "--run.seed=2"], "--run.seed is given twice, as '1' and '2'"),
        (
            ["--data.files", "a", "--data.files", "b"],
            "--data.files is given twice, as 'a' and 'b'; give one of them; a list",
        ),
        (["--model.architecture.n_layer", "1", "--model.architecture.n_layer", "2"], "n_layer is given twice"),
        (["--config", "other.yaml"], "--config is given twice"),
        (
            ["--model.architecture.n_layer", "1", "--model.architecture", "{model_type: gpt2}"],
            "--model.architecture would undo --model.architecture.n_layer, which stands before it",
        ),
        (["--run.output_dir", "--run.seed", "3"], "--run.output_dir needs a value"),
        (["--train.max_steps", ""], "--train.max_steps needs a value; for none, say null"),
        (["--train.max_steps="], "--train.max_steps needs a value"),
        (["--model.architecture.n_layer", " "], "--model.architecture.n_layer needs a value"),
        (
            ["--model.architecture", "{model_type: gpt2, n_layer: 1, n_layer: 2}"],
            "n_layer is given twice, first in line 1",
        ),
        (["--train.max_steps", "1_0"], "expected an integer > 0, or null, got '1_0'"),
        (["--optimizer.learning_rate", "1e400"], "expected a number >= 0, got inf"),
    ],
)
def test_nothing_is_given_twice_or_lost_on_the_command_line(file: Path, arguments: list[str], expected: str) -> None:
    with pytest.raises(InputError, match=r"^[^\n]*$") as error:
        config_from_arguments(["--config", str(file), *arguments])
    assert expected in str(error.value)


def test_the_command_line_reads_numbers_as_files_do(file: Path) -> None:
    given = ["--train.max_steps", "010", "--data.block_size", "0x10", "--run.output_dir", "007", "--data.join", "--x"]
    loaded = config_from_arguments(["--config", str(file), *given])
    assert (loaded.train.max_steps, loaded.data.block_size) == (10, 16)
    assert (loaded.run.output_dir, loaded.data.join) == ("007", "--x")
