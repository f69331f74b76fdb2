"""One process that meets signals, numbers that are none, and too little memory: nothing is lost, and it says so."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.support.faults import fault
from tests.support.runs import NO_DROPOUT, TINY_MODELS, Command, events, names, without_speeds
from train_loop.analysis import truth_sheet
from train_loop.checkpoint.run_folder import RunFolder
from train_loop.data import preparation
from train_loop.models import building
from train_loop.training import loop, optimizer
from train_loop.training.objective import Objective

MOMENTS = {"step": 9, "evaluation": 1, "last evaluation": 3, "sampling": 2, "save": 10}


@pytest.mark.parametrize("name", MOMENTS)
def test_a_signal_at_any_moment_loses_nothing(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, name: str
) -> None:
    same = {"train__max_steps": 20, "evaluation__every": 8, "checkpoint__every": 10}
    same |= {"sample__prompts": '["the ", "and ", "of "]', "sample__max_new_tokens": "9"}
    whole, cut = (settings(run__output_dir=tmp_path / each, **same) for each in ("whole", "cut"))
    assert command("train", *whole) == 0
    with fault(name.split()[-1], 0, MOMENTS[name]):
        assert command("train", *cut) == 3
    assert "stopped by SIGTERM at step" in command.out and "the same command resumes" in command.out
    status = json.loads((tmp_path / "cut" / "status.json").read_text())
    expected = {"step": 9, "evaluation": 8, "last evaluation": 20, "sampling": 8, "save": 11}[name]
    assert status["state"] == "stopped" and status["reason"] == "SIGTERM"
    assert status["step"] in ((expected, expected - 1) if name == "save" else (expected,))
    assert names(tmp_path / "cut")[-1] == status["step"] and not (tmp_path / "cut" / "model").exists()
    evaluated = {event["step"] for event in events(tmp_path / "cut", "evaluation")}
    assert (8 in evaluated) == (name != "evaluation")
    if name == "sampling":  # the second text was broken off
        assert len(events(tmp_path / "cut", "sample")) == 1
    assert command("train", *cut) == 0
    assert without_speeds(tmp_path / "cut") == without_speeds(tmp_path / "whole")
    weights = {(tmp_path / each / "model" / "model.safetensors").read_bytes() for each in ("whole", "cut")}
    assert len(weights) == 1


BEFORE = {
    "preparation": (preparation, "prepare"),
    "building": (building, "build"),
    "set-up": (optimizer, "build"),
    "truth sheet": (truth_sheet, "measure"),
}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
@pytest.mark.parametrize("moment", BEFORE)
def test_a_signal_before_the_first_step_is_one_line(
    command: Command,
    settings: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    name: str,
) -> None:
    """There is nothing to save, and nothing is left behind."""

    def hit(*arguments: Any, **named: Any) -> None:
        signal.raise_signal(signal.Signals[name])
        raise AssertionError("not interrupted")

    monkeypatch.setattr(*BEFORE[moment], hit)
    assert command("train", *settings(train__max_steps=2)) == 3
    assert command.err.splitlines()[-1] == f"train-loop: stopped by {name}; the same command starts again"
    assert command.out == "" and "Traceback" not in command.err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("moment", ["claim", "set_status"])
def test_a_signal_between_the_claim_and_the_first_step_saves_what_there_is(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    work = getattr(RunFolder, moment)
    hit: list[bool] = []

    def interrupted(*arguments: Any) -> None:
        if not hit:
            hit.append(True)
            signal.raise_signal(signal.SIGHUP)
        work(*arguments)

    monkeypatch.setattr(RunFolder, moment, interrupted)
    assert command("train", *settings(train__max_steps=2)) == 3
    assert "stopped by SIGHUP at step 0 of 2; the same command resumes" in command.out
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status == {"state": "stopped", "step": 0, "reason": "SIGHUP"} and names(tmp_path / "run") == [0]
    assert command("train", *settings(train__max_steps=2)) == 0
    assert len(events(tmp_path / "run", "step")) == 2


@pytest.mark.parametrize(("restarts", "so_far", "expected"), [(None, None, 3), (0, 0, 3), (2, 1, 0), (2, 2, 3)])
def test_a_launcher_with_restarts_left_does_not_restart_a_run_that_was_stopped(
    command: Command,
    settings: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    restarts: int | None,
    so_far: int | None,
    expected: int,
) -> None:
    for name, value in (("MAX_RESTARTS", restarts), ("RESTART_COUNT", so_far)):
        if value is not None:
            monkeypatch.setenv(f"TORCHELASTIC_{name}", str(value))
    with fault("step", 0, 2):
        assert command("train", *settings(train__max_steps=5)) == expected
    assert "stopped by SIGTERM at step 2" in command.out


def test_workers_of_the_loader_leave_signals_to_the_training(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal's Ctrl-C, and some schedulers, signal every process of a job."""
    take, hit = loop.train_step, []

    def train_step(*arguments: Any, **named: Any) -> Any:
        if arguments[2].index == 4:
            for child in psutil.Process().children():
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                    child.send_signal(number)
                hit.append(child.pid)
            time.sleep(0.3)
            assert all(psutil.pid_exists(pid) for pid in hit)
        return take(*arguments, **named)

    monkeypatch.setattr(loop, "train_step", train_step)
    assert command("train", *settings(train__max_steps=10, data__num_workers=2)) == 0
    assert len(hit) >= 2 and len(events(tmp_path / "run", "step")) == 10


def test_a_step_that_is_not_finite_is_skipped_and_said(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path
) -> None:
    with fault("nan", 0, 4):
        assert command("train", *settings(train__max_steps=8)) == 0
    steps = events(tmp_path / "run", "step")
    assert [event["step"] for event in steps if event.get("skipped")] == [4]
    assert steps[3]["loss"] is None and len(steps[3]["blocks"]) == 8 and steps[4]["loss"] > 0


def test_bad_steps_in_a_row_end_the_run_with_a_checkpoint_from_before(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a run that is resumed among them counts on."""
    forward, take, at = Objective.forward, loop.train_step, []

    def train_step(*arguments: Any, **named: Any) -> Any:
        at.append(arguments[2].index + 1)
        return take(*arguments, **named)

    def bad(self: Objective, *arguments: Any, **named: Any) -> Any:
        result = forward(self, *arguments, **named)
        return result * float("nan") if isinstance(result, torch.Tensor) and at and at[-1] >= 7 else result

    monkeypatch.setattr(loop, "train_step", train_step)
    monkeypatch.setattr(Objective, "forward", bad)
    same = {"train__max_steps": 30, "train__max_bad_steps": 4, "evaluation__every": 30}
    at.clear()
    assert command("train", *settings(**same, checkpoint__every=5)) == 1
    assert "step 10: loss nan" in command.err and "the weights are those of step 6" in command.err
    assert names(tmp_path / "run") == [5, 10] or names(tmp_path / "run") == [5, 6]
    at.clear()
    assert command("train", *settings(**same, checkpoint__every=5)) == 1
    assert "step 10: loss nan" in command.err and at[0] == 7 and at[-1] == 10
    # A checkpoint among the bad steps holds the same weights, and how many there were is in the metrics.
    other = settings(**same, checkpoint__every=9, run__output_dir=tmp_path / "other")
    at.clear()
    assert command("train", *other) == 1 and names(tmp_path / "other") == [9]
    at.clear()
    assert command("train", *other) == 1 and at == [10]


def out_of_memory_beyond(rows: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let passes with more sequences than that run out of memory; returns the sizes that were tried in training."""
    forward, tried = Objective.forward, []

    def limited(self: Objective, inputs: torch.Tensor, *rest: Any, **named: Any) -> Any:
        if self.training and torch.is_grad_enabled():
            tried.append(len(inputs))
            if len(inputs) > rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, inputs, *rest, **named)

    monkeypatch.setattr(Objective, "forward", limited)
    return tried


def without_dropout(settings: Callable[..., list[str]], **changes: object) -> list[str]:
    """Settings of ten steps whose losses don't depend on the size of micro-batches."""
    architecture = json.dumps(TINY_MODELS["gpt2"] | NO_DROPOUT)
    return settings(model__architecture=architecture, train__max_steps=10, optimizer__learning_rate=1e-3, **changes)


def test_micro_batches_are_halved_until_a_step_fits_into_memory(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = without_dropout(settings, checkpoint__every=5)
    assert command("train", *without, "--run.output_dir", tmp_path / "whole") == 0
    tried = out_of_memory_beyond(3, monkeypatch)
    assert command("train", *without, "--batch.micro_batch_size", "auto") == 0
    assert "batch.micro_batch_size auto: 8 sequences do not fit into memory, 2 do" in command.err
    # One first, for the moments; the truth sheet, too, looks at a single one.
    assert tried[:6] == [1, 8, 1, 4, 1, 2] and set(tried[6:]) <= {1, 2}
    expected, found = (events(tmp_path / name, "step") for name in ("whole", "run"))
    assert [event["loss"] for event in found] == pytest.approx([event["loss"] for event in expected], rel=1e-5)
    assert [event["tokens"] for event in found] == [event["tokens"] for event in expected]
    # It goes on with the size it had, also where a larger one would fit: dropout's masks belong to micro-batches.
    monkeypatch.undo()
    for path in (tmp_path / "run" / "checkpoints" / "step-00000010").iterdir():
        path.unlink()
    assert command("train", *without, "--batch.micro_batch_size", "auto") == 0
    truth = json.loads((tmp_path / "run" / "truth.json").read_text())
    assert truth["batch"]["micro_batch_size"] == 2
    assert events(tmp_path / "run", "step")[-1]["loss"] == found[-1]["loss"]


def test_too_little_memory_in_the_middle_of_a_run_halves_too(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What others take of the memory changes; the step that failed is taken again, and none is lost or stands twice."""
    without = without_dropout(settings, evaluation__every=5)
    assert command("train", *without, "--run.output_dir", tmp_path / "whole") == 0
    take = loop.train_step

    def train_step(*arguments: Any, **named: Any) -> Any:
        if arguments[2].index == 6:
            out_of_memory_beyond(5, monkeypatch)
        return take(*arguments, **named)

    monkeypatch.setattr(loop, "train_step", train_step)
    assert command("train", *without, "--batch.micro_batch_size", "auto") == 0
    assert "out of memory with 8 sequences; continuing with 4" in command.err
    expected, found = (events(tmp_path / name, "step") for name in ("whole", "run"))
    assert [event["step"] for event in found] == list(range(1, 11))
    assert [event["loss"] for event in found] == pytest.approx([event["loss"] for event in expected], rel=1e-5)
    assert [event["loss"] for event in found[:6]] == [event["loss"] for event in expected[:6]]
    assert len(events(tmp_path / "run", "evaluation")) == 2


def test_too_little_memory_is_one_line(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_of_memory_beyond(0, monkeypatch)
    assert command("train", *settings(batch__micro_batch_size="auto")) == 2
    assert "not even one sequence fits" in command.err and not (tmp_path / "run").exists()
    monkeypatch.undo()
    out_of_memory_beyond(1, monkeypatch)
    assert command("train", *settings()) == 1
    assert command.err.splitlines()[-1].startswith("train-loop: out of memory; lower batch.micro_batch_size")


def test_trackers_see_no_step_twice(command: Command, settings: Callable[..., list[str]], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = settings(run__log_with="[tensorboard]", train__max_steps=12, checkpoint__every=5, evaluation__every=6)
    take = loop.train_step

    def until(last: int) -> Any:
        def train_step(*rest: Any, **named: Any) -> Any:
            if rest[2].index == last:
                raise SystemError("the machine is gone")
            return take(*rest, **named)

        return train_step

    for last in (3, 9):  # before the first checkpoint, and after it
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "train_step", until(last))
            with pytest.raises(SystemError):
                command("train", *arguments)
    assert command("train", *arguments) == 0
    log = EventAccumulator(str(tmp_path / "run" / "train_loop")).Reload()
    for name, expected in (("train/loss", range(1, 13)), ("evaluation/loss", (6, 12))):
        assert [event.step for event in log.Scalars(name)] == list(expected)
    losses = [event["loss"] for event in events(tmp_path / "run", "step")]
    assert [event.value for event in log.Scalars("train/loss")] == pytest.approx(losses)
