"""What can go wrong with a run, on purpose: contexts that break it at a moment of one's choice, on one process."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from train_loop import versions
from train_loop.analysis import truth_sheet
from train_loop.checkpoint import storage
from train_loop.checkpoint.manager import CheckpointManager
from train_loop.generation.sampler import Sampler
from train_loop.training import evaluation, loop
from train_loop.training.objective import Objective


def _here(process: int) -> bool:
    return int(os.environ.get("RANK", "0")) == process


def _ask(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def nan(patch: pytest.MonkeyPatch, process: int, at: int) -> None:
    """The loss of one process's first micro-batch of step `at` is not a number."""
    take, forward = loop.train_step, Objective.forward
    poisoned = []

    def train_step(*arguments: Any, **named: Any) -> Any:
        if arguments[2].index + 1 == at and _here(process):
            poisoned.append(True)
        return take(*arguments, **named)

    def wrong(self: Objective, *arguments: Any, **named: Any) -> Any:
        result = forward(self, *arguments, **named)
        return result * float("nan") if poisoned and poisoned.pop() else result

    patch.setattr(loop, "train_step", train_step)
    patch.setattr(Objective, "forward", wrong)


def signal_in_step(patch: pytest.MonkeyPatch, process: int, at: int) -> None:
    """A signal in step `at`."""
    take = loop.train_step

    def train_step(*arguments: Any, **named: Any) -> Any:
        if arguments[2].index + 1 == at and _here(process):
            _ask()
        return take(*arguments, **named)

    patch.setattr(loop, "train_step", train_step)


def signal_before(patch: pytest.MonkeyPatch, process: int, at: int) -> None:
    """A signal before the first step, while the run is measured."""
    measure = truth_sheet.measure

    def measured(*arguments: Any) -> Any:
        if _here(process):
            _ask()
        return measure(*arguments)

    patch.setattr(truth_sheet, "measure", measured)


def signal_in_evaluation(patch: pytest.MonkeyPatch, process: int, at: int) -> None:
    """A signal in the evaluation number `at`, after its first batch."""
    load, evaluations = evaluation.loader, []

    def loader(*arguments: Any, **named: Any) -> Iterator[Any]:
        evaluations.append(True)
        for number, batch in enumerate(load(*arguments, **named)):
            if number == 1 and len(evaluations) == at and _here(process):
                _ask()
                time.sleep(1.2)  # longer than it takes until somebody asks
            yield batch

    patch.setattr(evaluation, "loader", loader)


def signal_in_sampling(patch: pytest.MonkeyPatch, process: int, at: int) -> None:
    """A signal while text number `at` is sampled, after its third token."""
    sample, texts = Sampler.sample, []

    def slowly(*arguments: Any, stop: Callable[[], bool], **named: Any) -> Any:
        texts.append(0)

        def count() -> bool:
            texts[-1] += 1
            if len(texts) == at and texts[-1] == 3 and _here(process):
                _ask()
                time.sleep(1.2)
            return stop()

        return sample(*arguments, stop=count, **named)

    patch.setattr(Sampler, "sample", slowly)


def signal_in_save(patch: pytest.MonkeyPatch, process: int, at: int) -> None:
    """A signal while the checkpoint of step `at` is written, which takes a while."""
    write = storage.write_part
    begin = CheckpointManager.save_async

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.5)
        return write(*arguments)

    def begun(self: Any, model: Any, optimizer: Any, state: Any, *rest: Any, **named: Any) -> None:
        begin(self, model, optimizer, state, *rest, **named)
        if state["step"] == at and _here(process):
            _ask()

    patch.setattr(storage, "write_part", slowly)
    patch.setattr(CheckpointManager, "save_async", begun)


def killed_in_save(patch: pytest.MonkeyPatch, process: int, at: int) -> None:
    """`kill -9` while this process writes its part of the checkpoint of step `at`; the others have written theirs."""
    write = storage.write_part

    def dies(folder: Path, part: int, parts: int, held: storage.Shards) -> Any:
        if f"{at:08d}" in folder.name and _here(process):
            write(folder, part, parts, held | {"optimizer": {}})
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        return write(folder, part, parts, held)

    patch.setattr(storage, "write_part", dies)


def another_version(patch: pytest.MonkeyPatch, process: int, at: int) -> None:
    """On one process, what Python finds first of the libraries' versions is in another folder."""
    if _here(process):
        patch.syspath_prepend(os.environ["TESTS_OTHER_VERSION"])
        patch.setattr(versions, "version", versions.version.__wrapped__)  # which remembers nothing


FAULTS: dict[str, Callable[[pytest.MonkeyPatch, int, int], None]] = {
    "nan": nan,
    "before": signal_before,
    "step": signal_in_step,
    "evaluation": signal_in_evaluation,
    "sampling": signal_in_sampling,
    "save": signal_in_save,
    "killed": killed_in_save,
    "version": another_version,
}


@contextmanager
def fault(name: str, process: int, at: int) -> Iterator[None]:
    """Break runs within this context."""
    with pytest.MonkeyPatch.context() as patch:
        FAULTS[name](patch, process, at)
        yield
