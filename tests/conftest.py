"""What the tests share: text, small tokenizers and models made here, and a way to run a command.

Nothing comes from a hub: a folder on disk stands for a repository.
"""

import functools
import os
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

from tests.support.runs import TINY_MODELS, Command, arguments_for, forget_accelerator, text
from train_loop.metrics import throughput

RUNS = {
    "test_fuzz.py",
    "test_streams.py",
    "test_gpu_day.py",
    "test_soak.py",
    "test_versions.py",
    "test_devices.py",
    "test_golden.py",
    "test_old_runs.py",
}
"""Files whose tests start whole runs in ways of their own."""

# The machines are shared: how long an example takes says nothing.
hypothesis_settings.register_profile("shared", deadline=None)
hypothesis_settings.load_profile("shared")

# What a shell runs in the background ignores interrupts, and so would the processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several workers a file stays together, and tests that start processes come one after the other."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "processes" if file.split("/")[1] in ("cluster", "distributed") else file

    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by what it needs; see CONTRIBUTING.md."""
    for item in items:
        folder, file = item.path.parent.name, item.path.name
        fixtures = set(getattr(item, "fixturenames", ()))
        if folder == "cluster":
            kind = "cluster"
        elif (folder, file) == ("report", "test_page.py"):
            kind = "browser"
        elif folder == "distributed" and file in ("test_launching.py", "test_processes.py", "test_study.py"):
            kind = "distributed"
        elif (folder, file) in (("distributed", "test_survival.py"), ("scripts", "test_one_file_loop.py")):
            kind = "distributed"
        else:
            kind = "run" if fixtures & {"command", "settings", "run"} or file in RUNS else "unit"
        item.add_marker(kind)


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
