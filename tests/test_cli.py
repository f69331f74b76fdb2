"""The commands: exit codes, one clear line for each mistake, and nothing left behind."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.runs import TINY_MODELS, Command, last_of_each

COMMANDS = ("prepare", "train", "evaluate", "sample")


def test_help_of_every_command(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--help") == 0
    assert all(f"  {name} " in command.out for name in COMMANDS)
    for name in COMMANDS[:3]:
        assert command(name, "--help") == 0
        assert f"usage: train-loop {name}" in command.out and "--optimizer.learning_rate" in command.out
    with pytest.raises(SystemExit, match="0"):
        command("sample", "--help")
    assert "--top_p" in capsys.readouterr().out


def test_a_reader_that_leaves_early_sees_no_traceback() -> None:
    command = f"{sys.executable} -m train_loop train --help | head -1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("usage: ") and result.stderr == ""


PROGRAM = """
import sys
from train_loop.cli import main
try:
    main(sys.argv[1:])
finally:
    print(*sys.modules, sep="\\n", file=sys.stderr)
"""
# What takes long to load, and what each command may not load before, or without, a use for it.
RARE = {"datasets", "evaluate", "pyarrow", "pandas", "matplotlib", "tensorboard", "wandb", "sklearn", "torchvision"}
HEAVY = {"torch", "transformers", "accelerate", "numpy", "tokenizers", "safetensors", "huggingface_hub", "tqdm"} | RARE


def loaded(*arguments: object, program: str = PROGRAM) -> set[str]:
    """The modules that a command has loaded by its end, or a program by the time that it names them."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines())


@pytest.mark.parametrize("name", ["", *COMMANDS, "inspect", "report"])
def test_help_loads_none_of_the_heavy_libraries(name: str) -> None:
    found = loaded(*name.split(), "--help")
    assert "train_loop.cli" in found and not found & HEAVY
    assert not found & {"importlib.metadata", "email", "hashlib", "socket"}  # as long as all the rest takes


def test_data_is_prepared_without_torch(settings: Callable[..., list[str]]) -> None:
    arguments = [*settings(), "--tokenizer.name_or_path", "null", "--tokenizer.train_vocab_size", "300"]
    assert "tokenizers" in loaded("prepare", *last_of_each(arguments))
    found = loaded("prepare", *last_of_each(arguments))  # it is there already
    assert "tokenizers" in found and not found & {"torch", "accelerate", *RARE}


def test_training_begins_without_what_only_some_runs_need(settings: Callable[..., list[str]]) -> None:
    program = """
import os, sys
import train_loop
from train_loop.config.load import config_from_arguments

class Names(train_loop.Observer):
    def after_step(self, state, record):
        print(*sys.modules, sep="\\n", file=sys.stderr, flush=True)
        os._exit(0)

train_loop.train(config_from_arguments(sys.argv[1:]), callbacks=[Names()])
"""
    found = loaded(*settings(), program=program)
    assert "torch" in found and not found & RARE


def test_help_is_there_at_once() -> None:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "train_loop", "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - began)
    assert min(times) < 0.5


def test_module_and_script_are_the_same() -> None:
    script = Path(sys.executable).with_name("train-loop")
    outputs = [
        subprocess.run([*start, "--version"], capture_output=True, text=True, check=True).stdout
        for start in ([sys.executable, "-m", "train_loop"], [str(script)])
    ]
    assert outputs[0] == outputs[1] and outputs[0].startswith("train-loop 0.")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "unknown command trian; commands: prepare, train, evaluate, sample"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["sample", "--model", "nowhere", "--prompt", "a"], "model nowhere: cannot be loaded"),
        (["sample", "--model", "nowhere"], "--prompt"),
        (["sample", "--model", "m", "--prompt", "a", "--top_k", "-1"], "top_k -1: must be at least 0"),
        (["sample", "--model", "m", "--prompt", "a", "--top_k", "few"], "argument --top_k: invalid int value: 'few'"),
        (["evaluate", "--config", "a.yaml"], "--model"),
        (["evaluate", "--model", "a", "--model", "b"], "--model is given twice, as 'a' and 'b'"),
        (["evaluate", "--model", "a", "--run.seed=1", "--run.seed=1"], "--run.seed is given twice"),
        (["sample", "--model", "m", "--prompt", "a", "--seed", "1", "--seed=2"], "--seed is given twice, as 1 and 2"),
        (["sample", "--model", "m", "--banned_tokens", "1", "--banned_tokens", "2"], "--banned_tokens is given twice"),
        (["sample", "--model", "m", "--json", "--prompt", "a", "--json"], "--json is given twice"),
        (["report", "--run", "a", "--run", "b", "--output", "c", "--output", "d"], "--output is given twice"),
        (["inspect", "--run", "a", "--step", "1", "--step", "2"], "--step is given twice, as 1 and 2"),
        (["inspect", "--run", "a", "--step", "1", "--set", "b=1", "--set", "b=2"], "--set b is given twice"),
        (["sample", "--model", "m", "--top_k", "1_0"], "argument --top_k: invalid int value: '1_0'"),
        (["sample", "--model", "m", "--temperature", "9" * 400], "argument --temperature: invalid float value"),
        (["inspect", "--run", "a", "--step", "9" * 5000], "argument --step: invalid int value"),
        (["sample", "--model", "./modle", "--prompt", "a"], "model ./modle: no such folder"),
        (["sample", "--model", "a/b", "--prompt", "a"], "there is no folder a/b here, either"),
        (["sample", "--model", "$UNKNOWN/a", "--prompt", "a"], "the environment variable UNKNOWN is not set"),
        (["report", "--run", ""], "--run '': is empty"),
        (["inspect", "--run", "a" * 300, "--step", "1"], "longer than a path can be"),
        (["inspect", "--run", "a", "--step", "1", "--html", "~nobody-here/x"], "no user nobody-here"),
        (["train", "--config", "\udcff.yaml"], r"'\udcff.yaml' is no text in"),
        (["trian\x1b[2J\n"], r"unknown command trian\x1b[2J"),
        (["--run", "a"], "unknown command --run"),
        (["sample", "--mod", "a", "--prompt", "b"], "--model"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(command: Command, arguments: list[str], expected: str) -> None:
    assert command(*arguments) == 2
    assert expected in command.err and command.err.count("\n") == 1 and command.out == ""


# What is wrong, and what the one line must say.
BAD_DATA: dict[str, tuple[dict[str, bytes], dict[str, object], str]] = {
    "a missing file": ({}, {"data.files": "{folder}/none.txt"}, "none.txt: no such file"),
    "an empty file": ({"a.txt": b""}, {}, "a.txt: the file is empty"),
    "no document left": ({"a.jsonl": b'{"text": ""}\n{"text": null}\n'}, {}, "no document with text (2 empty ones"),
    "not UTF-8": ({"a.txt": b"abc\xffdef"}, {}, "a.txt: not UTF-8 at byte 3 (value 0xff)"),
    "a field that isn't there": ({"a.jsonl": b'{"body": "x", "id": 1}\n'}, {}, "no field text; valid here: body, id"),
    "a misspelt key": ({"a.txt": b"x"}, {"data.blok_size": 8}, "did you mean data.block_size?"),
    "a wrong type": (
        {"a.txt": b"x"},
        {"data.block_size": "big"},
        "data.block_size: expected an integer > 0, got 'big'",
    ),
    "blocks beyond the context": (
        {f"{n}.txt": b"some words and more " * 9 for n in range(9)},
        {"data.block_size": 65},
        "data.block_size 65 exceeds the context",
    ),
    "a tokenizer larger than the vocabulary": (
        {f"{n}.txt": b"some words and more " * 9 for n in range(9)},
        {"tokenizer.name_or_path": None, "tokenizer.train_vocab_size": 321, "data.files": "{corpus}/*.txt"},
        "the tokenizer has 321 entries, but",
    ),
    "no validation target": ({"a.txt": b"only one document"}, {}, "the validation split has 0 documents"),
}


@pytest.mark.parametrize(("files", "changes", "expected"), BAD_DATA.values(), ids=BAD_DATA)
def test_bad_input_is_named_and_leaves_nothing(
    command: Command,
    settings: Callable[..., list[str]],
    corpus: Path,
    model_folder: Path,
    tmp_path: Path,
    files: dict[str, bytes],
    changes: dict[str, object],
    expected: str,
) -> None:
    folder = tmp_path / "input"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    base = {
        "model.architecture": None,
        "model.name_or_path": model_folder,
        "data.files": f"{folder}/*",
        "data.cache_dir": tmp_path / "cache",
    }
    given = {
        key: value.format(folder=folder, corpus=corpus) if isinstance(value, str) else value
        for key, value in (base | changes).items()
    }
    assert command("train", *settings(**given)) == 2
    assert expected in command.err and "Traceback" not in command.err and command.out == ""
    assert len([line for line in command.err.splitlines() if line.startswith("train-loop: ")]) == 1
    assert not (tmp_path / "run").exists()
    left = [path for path in (tmp_path / "cache").rglob("*") if path.name.count(".tmp")]
    assert left == []


def test_text_that_spells_a_special_token_is_ordinary_text(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path
) -> None:
    rows = [json.dumps({"text": f"one <|endoftext|> two {number}"}) for number in range(10)]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    assert command("prepare", *settings(data__files=tmp_path / "t.jsonl", data__cache_dir=tmp_path)) == 0
    books = json.loads(command.out)
    assert [books[side]["eos_tokens"] for side in ("train", "validation")] == [8, 2]


def test_prepare_prints_the_ledger_and_is_reused(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path
) -> None:
    assert command("prepare", *settings(data__cache_dir=tmp_path)) == 0
    first = command.out
    assert "preparing data" in command.err
    assert command("prepare", *settings(data__cache_dir=tmp_path)) == 0
    assert command.out == first and "already prepared" in command.err
    assert {"folder", "fingerprint", "train", "validation"} == json.loads(first).keys()


def test_sample_prints_text_or_json(command: Command, model_folder: Path) -> None:
    options = ["--model", model_folder, "--max_new_tokens", 8, "--seed", 4]
    assert command("sample", *options, "--prompt", "the ", "--prompt", "of ") == 0
    text = command.out
    assert command("sample", *options, "--prompt", "the ", "--prompt", "of ", "--json") == 0
    lines = [json.loads(line) for line in command.out.splitlines()]
    assert [line["prompt"] for line in lines] == ["the ", "of "]
    assert text == "\n\n".join(line["text"] for line in lines) + "\n"
    assert all(line["text"] == line["prompt"] + line["continuation"] for line in lines)
    # A prompt's text does not depend on the prompts before it.
    assert command("sample", *options, "--prompt", "of ") == 0
    assert command.out == lines[1]["text"] + "\n"


def test_evaluating_a_model_of_another_tokenizer(
    command: Command, settings: Callable[..., list[str]], model_folder: Path
) -> None:
    """The model's own tokenizer is used, whatever the configuration trains."""
    trained = settings(
        **{"tokenizer.name_or_path": None, "tokenizer.train_vocab_size": 300},
        model__architecture=json.dumps(TINY_MODELS["llama"]),
    )
    assert command("evaluate", "--model", model_folder, *trained) == 0
    assert json.loads(command.out)["bits_per_byte"] > 0
