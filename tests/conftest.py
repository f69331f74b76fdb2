"""What the tests share: text, small tokenizers and models made here, and a way to run a command.

Nothing comes from a hub: a folder on disk stands for a repository.
"""

import functools
import json
import os
import random
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Set before any library reads them: no network, and no cache outside the tests' own folder.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="train_loop-tests-")
os.environ["TRAIN_LOOP_CACHE"] = os.environ["HF_HOME"] + "/train_loop"
os.environ["ACCELERATE_USE_CPU"] = "true"
# Models this small are fastest on one thread, and tests that start several processes share the cores.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings as hypothesis_settings

from train_loop.cli import main

# The machines are shared: how long an example takes says nothing.
hypothesis_settings.register_profile("shared", deadline=None)
hypothesis_settings.load_profile("shared")

# What a shell runs in the background ignores interrupts, and so would the processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were all her she there would their we him been has when who will no more if out so said what up its about"
).split()

TINY_MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2},
    "llama": {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 64,
    },
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def text(words: int, seed: int) -> str:
    """Made-up prose: `words` common words in sentences."""
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) + ("." if draw.random() < 0.1 else "") for _ in range(words))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 40 text files of 5 to 200 words."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        (folder / f"{number:02d}.txt").write_text(text(5 + 5 * number, number), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with 320 entries, on disk."""
    from train_loop.data import tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.train([text(2000, 0)], 320).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A tiny GPT-2 with random weights and its tokenizer, on disk: stands for a model on the Hub."""
    from train_loop.config.schema import Config
    from train_loop.data import tokenizer
    from train_loop.models import building

    folder = tmp_path_factory.mktemp("model")
    config = Config()
    config.model.architecture = TINY_MODELS["gpt2"]
    config.data.block_size = 64
    its_tokenizer = tokenizer.load(str(tokenizer_folder))
    building.build(config, its_tokenizer).save_pretrained(folder)
    its_tokenizer.save_pretrained(folder)
    return folder


def forget_accelerator() -> None:
    """Accelerate keeps one state a process; a command must not see the precision or trackers of one before it."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Every test begins as a new process would."""
    threads = torch.get_num_threads()
    yield
    forget_accelerator()
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


class Command:
    """Runs `train-loop` in this process and keeps what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.out = self.err = ""

    def __call__(self, *arguments: object) -> int:
        """The exit code of `train-loop ARGUMENTS`."""
        forget_accelerator()
        self.capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        self.out, self.err = self.capsys.readouterr()
        return code


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """`command("train", "--config", ...)` -> exit code; `command.out`, `command.err`."""
    return Command(capsys)


def arguments_for(corpus: Path, tokenizer_folder: Path, output: Path, **changes: object) -> list[str]:
    """Command-line settings of a run that takes a second, in `output`; keyword arguments change them (a__b for a.b)."""
    values: dict[str, object] = {
        "run.output_dir": output,
        "model.architecture": json.dumps(TINY_MODELS["gpt2"]),
        "tokenizer.name_or_path": tokenizer_folder,
        "data.source": "files",
        "data.files": f"{corpus}/*.txt",
        "data.test_size": 0.2,
        "data.block_size": 32,
        "batch.sequences_per_step": 8,
        "optimizer.learning_rate": 1e-2,
        "train.epochs": 2,
        "export.verify": "false",  # takes five seconds
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return [part for key, value in values.items() if value is not None for part in (f"--{key}", str(value))]


@pytest.fixture
def settings(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """`arguments_for` a run in `tmp_path / "run"`."""
    return functools.partial(arguments_for, corpus, tokenizer_folder, tmp_path / "run")


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind in a run's metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]
