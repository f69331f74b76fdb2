"""Writing beside training: what is written, when, and what happens when it can't be."""

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.runs import Command, events, names, without_speeds
from train_loop.checkpoint import storage
from train_loop.training import loop

WRITE = storage.write_part


@pytest.mark.parametrize("background", ["true", "false", "no room"])
def test_training_goes_on_while_a_checkpoint_is_written(
    command: Command,
    settings: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    background: str,
) -> None:
    """And what is written is the state of the step that it is named after, one at a time."""
    metrics = tmp_path / "run" / "metrics.jsonl"
    seen, writing = [], threading.Lock()

    def slowly(*arguments: Any) -> Any:
        assert writing.acquire(blocking=False), "two at a time"
        first = metrics.read_text().count('"event": "step"')
        time.sleep(0.3)
        seen.append(metrics.read_text().count('"event": "step"') - first)
        result = WRITE(*arguments)
        writing.release()
        return result

    monkeypatch.setattr(storage, "write_part", slowly)
    arguments = settings(train__max_steps=20, checkpoint__every=5, evaluation__every=20, checkpoint__keep=9)
    if background == "no room":
        memory = psutil.virtual_memory()._replace(available=psutil.virtual_memory().total // 20)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert command("train", *arguments, "--checkpoint.background", str(background != "false").lower()) == 0
    assert command.err.count("too little to copy the state") == (background == "no room")
    assert len(seen) == 4 and seen[-1] == 0
    assert min(seen[:3]) >= 2 if background == "true" else max(seen) == 0
    monkeypatch.undo()
    assert names(tmp_path / "run") == [5, 10, 15, 20]
    expected = without_speeds(tmp_path / "run")
    for step in (10, 15, 20):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    assert command("train", *arguments) == 0
    assert "step-00000005" in command.err and without_speeds(tmp_path / "run") == expected


def fail(monkeypatch: pytest.MonkeyPatch, *steps: int) -> list[int]:
    """Let the writing of some steps' checkpoints fail; returns those that were tried."""
    tried: list[int] = []

    def write(folder: Path, *rest: Any) -> Any:
        step = int(folder.name.rpartition("-")[2])
        tried.append(step)
        if step in steps:
            raise OSError(28, "No space left on device", str(folder))
        return WRITE(folder, *rest)

    monkeypatch.setattr(storage, "write_part", write)
    return tried


def test_a_failed_write_is_said_and_tried_again(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = fail(monkeypatch, 5, 10)
    assert command("train", *settings(train__max_steps=20, checkpoint__every=5, evaluation__every=20)) == 0
    assert tried == [5, 10, 15, 20] and names(tmp_path / "run") == [15, 20]
    for step in (5, 10):
        assert f"step {step}: the checkpoint could not be written ([Errno 28] No space left on device" in command.err
    assert len(events(tmp_path / "run", "step")) == 20


def test_a_run_that_would_end_without_its_checkpoint_fails(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = settings(train__max_steps=20, checkpoint__every=8, evaluation__every=20)
    tried = fail(monkeypatch, 20)
    assert command("train", *arguments) == 1
    assert tried == [8, 16, 20, 20] and names(tmp_path / "run") == [8, 16]
    complaint = command.err.splitlines()[-1]
    assert complaint.startswith("train-loop: step 20: the checkpoint could not be written") and "make room" in complaint
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    assert not (tmp_path / "run" / "model").exists()
    monkeypatch.undo()
    assert command("train", *arguments) == 0 and "step-00000016" in command.err
    assert names(tmp_path / "run") == [16, 20]


def test_whatever_goes_wrong_while_writing_is_no_checkpoint(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake in a thread must not look like a checkpoint that was written."""
    monkeypatch.setattr(storage, "_digest", lambda files: files["nothing"])
    assert command("train", *settings(train__max_steps=5)) == 1
    assert "step 5: the checkpoint could not be written ('nothing')" in command.err
    assert not (tmp_path / "run" / "model").exists() and names(tmp_path / "run") == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_ends_no_run(
    command: Command,
    settings: Callable[..., list[str]],
    tmp_path: Path,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not even a line of the metrics has room for a while; when there is room again, all of it is there."""
    take, ballast = loop.train_step, small_disk / "ballast"
    saved = []

    def train_step(*arguments: Any, **named: Any) -> Any:
        step = arguments[2].index + 1
        if step in (25, 55):
            for thread in threading.enumerate():  # the checkpoint that was begun
                if thread.name == "checkpoint":
                    thread.join()
            saved.append(names(small_disk / "run"))
        if step == 25:
            with open(ballast, "wb", buffering=0) as file:
                for size in (4096, 1):
                    try:
                        while True:
                            file.write(bytes(size))
                    except OSError:
                        continue
        if step == 55:
            ballast.unlink()
        return take(*arguments, **named)

    monkeypatch.setattr(loop, "train_step", train_step)
    same = {"train__max_steps": 80, "checkpoint__every": 20, "evaluation__every": 80, "checkpoint__keep": 2}
    assert command("train", *settings(run__output_dir=small_disk / "run", **same)) == 0
    assert "step 40: the checkpoint could not be written" in command.err and "No space left" in command.err
    assert "metrics.jsonl: [Errno 28] No space left on device; its lines wait in memory" in command.err
    assert saved == [[20], [20]] and names(small_disk / "run") == [60, 80]
    monkeypatch.undo()
    assert command("train", *settings(run__output_dir=tmp_path / "elsewhere", **same)) == 0
    assert without_speeds(small_disk / "run") == without_speeds(tmp_path / "elsewhere")
    weights = [(each / "run" if each == small_disk else tmp_path / "elsewhere") for each in (small_disk, tmp_path)]
    assert len({(each / "model" / "model.safetensors").read_bytes() for each in weights}) == 1


def test_a_disk_that_is_full_from_the_start_is_one_line(
    command: Command, settings: Callable[..., list[str]], small_disk: Path
) -> None:
    with open(small_disk / "ballast", "wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(4096))
    (small_disk / "ballast").chmod(0o600)
    os.truncate(small_disk / "ballast", 2 * 2**20 - 8192)
    assert command("train", *settings(run__output_dir=small_disk / "run")) == 2
    assert command.err.splitlines()[-1].startswith(
        f"train-loop: run.output_dir {small_disk / 'run'}: cannot be written"
    )
