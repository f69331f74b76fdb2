"""Fixtures that tests share: text, small tokenizers and models made here, and a way to run a command."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings as hypothesis_settings

from tests.support.runs import TINY_MODELS, Command, arguments_for, forget_accelerator, text
from train_loop import devices
from train_loop.metrics import throughput

# The machines are shared: how long an example takes says nothing.
hypothesis_settings.register_profile("shared", deadline=None)
hypothesis_settings.load_profile("shared")


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


@pytest.fixture(autouse=True, scope="session")
def bf16_on_any_cpu() -> Iterator[None]:
    """What is asked for is tested also on a CPU without instructions for it, where a run would compute in fp32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "cpu_computes_bf16", lambda: True)
        yield


@pytest.fixture(autouse=True, scope="session")
def rate_of_the_machine() -> Iterator[None]:
    """Every run measures it before its first step; here the first one does, for all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput, "matrix_rate", functools.cache(throughput.matrix_rate))
        yield


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Every test begins as a new process would."""
    threads = torch.get_num_threads()
    yield
    forget_accelerator()
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """`command("train", "--config", ...)` -> exit code; `command.out`, `command.err`."""
    return Command(capsys)


@pytest.fixture
def settings(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """`arguments_for` a run in `tmp_path / "run"`."""
    return functools.partial(arguments_for, corpus, tokenizer_folder, tmp_path / "run")
