"""Runs of the real command in processes of their own, several at a time: `python -m train_loop train ...`."""

import hashlib
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu_day.rows import LIBRARIES, one_line

STEPS = {True: 24, False: 60}  # on a CPU, and elsewhere
_PAUSE_SECONDS = 0.002  # a step on a GPU takes about ten milliseconds


def settings(cpu: bool, **changes: object) -> list[str]:
    """A small GPT-2 with dropout on a few files of the standard library; keyword arguments change them (a__b for a.b).

    All parts share its prepared data.
    """
    layers, width, block = (2, 64, 64) if cpu else (4, 256, 128)
    values: dict[str, object] = {
        "model.architecture": json.dumps({"model_type": "gpt2", "n_layer": layers, "n_embd": width, "n_head": 4}),
        "tokenizer.train_vocab_size": 512,
        "data.max_documents": 12,
        "data.test_size": 0.2,
        "data.block_size": block,
        "batch.sequences_per_step": 8,
        "batch.micro_batch_size": 2,
        "optimizer.learning_rate": 3e-4,
        "train.max_steps": STEPS[cpu],
        "evaluation.every": 10,
        "evaluation.batch_size": 16,
        "sample.prompts": "[]",
        "checkpoint.every": 5,
        "export.verify": "false",
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


class Command:
    """`train-loop ARGUMENTS` in a process of its own.

    Args:
        log: file that it prints to.
        arguments: of the command.
        before: how Python is started: -m train_loop, or a module in its place.
        variables: of the environment, beside this process's.
    """

    def __init__(
        self,
        log: Path,
        arguments: list[str],
        before: tuple[str, ...] = ("-m", "train_loop"),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.log = log
        self._process: subprocess.Popen[bytes] | _Fork
        if os.environ.get("ACCELERATE_USE_CPU") == "true":
            self._process = _Fork(before[1], [*before[2:], *arguments], log, dict(variables or {}))
            return
        with open(log, "ab") as printed:
            self._process = subprocess.Popen(
                [sys.executable, *before, *arguments],
                stdout=printed,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | (variables or {}),
            )

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def kill(self) -> None:
        """kill -9."""
        self._process.kill()
        self._process.wait()

    def finish(self, seconds: float = 300) -> int:
        """Wait for its exit code, and ask it to end where it takes longer than any part may."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            return self._process.wait()

    def finish_well(self) -> None:
        """Wait for its end.

        Raises:
            RuntimeError: with its last line, where it fails.
        """
        code = self.finish()
        if code:
            raise RuntimeError(f"exit code {code}: {self.last_line}")

    @property
    def last_line(self) -> str:
        """The last line that it printed."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        return one_line(next((line for line in reversed(lines) if line.strip()), "it printed nothing"))


class _Fork:
    """`python -m MODULE ARGUMENTS` with Popen's methods, of a process that has loaded all libraries.

    On a CPU a run takes less time than they do. A process that has seen a GPU cannot be forked.
    """

    def __init__(self, module: str, arguments: list[str], log: Path, variables: dict[str, str]) -> None:
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload([*LIBRARIES, __name__])
        self._process = processes.Process(target=_work, args=(module, arguments, str(log), variables))
        self._process.start()
        self.kill, self.terminate = self._process.kill, self._process.terminate

    def poll(self) -> int | None:
        """The exit code; None before the end."""
        return self._process.exitcode

    def wait(self, seconds: float | None = None) -> int:
        """The exit code at the end; TimeoutExpired where it takes longer."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("train-loop", seconds or 0)
        return self._process.exitcode


def _work(module: str, arguments: list[str], log: str, variables: dict[str, str]) -> None:
    opened = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    os.environ |= variables
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


class Training(Command):
    """A run, by its folder.

    Args:
        folder: of the run.
        arguments: settings, without the folder.
        log: file that it prints to; beside the folder if null.
        options: see `Command`.
    """

    def __init__(self, folder: Path, arguments: list[str], log: Path | None = None, **options: Any) -> None:
        self.folder = folder
        given = ["train", *arguments, "--run.output_dir", str(folder)]
        super().__init__(log or folder.with_suffix(".log"), given, **options)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The lines of one kind in metrics.jsonl that are whole."""
        try:
            lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        except OSError:
            return []
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    @property
    def losses(self) -> list[float]:
        """Of each step."""
        return [event["loss"] for event in self.events("step")]

    def kill_after(self, step: int, seconds: float) -> None:
        """kill -9 as soon as that step is in the log and a checkpoint is there.

        Raises:
            RuntimeError: where it ended before.
        """
        ends = time.monotonic() + seconds
        while time.monotonic() < ends and self.running:
            if len(self.events("step")) >= step and any((self.folder / "checkpoints").glob("step-*")):
                self.kill()
                if (self.folder / "model").exists():
                    break
                return
            time.sleep(_PAUSE_SECONDS)
        raise RuntimeError(f"it could not be killed in time: {self.last_line}")

    def computed(self) -> dict[str, Any]:
        """All that must be equal of two equal runs: what the log says, speeds left out, and the weights' SHA-256."""
        from train_loop.metrics.throughput import MEASURED

        logged = [event for kind in ("step", "evaluation") for event in self.events(kind)]
        kept = [{key: value for key, value in event.items() if key not in MEASURED} for event in logged]
        weights = (self.folder / "model" / "model.safetensors").read_bytes()
        return {"log": kept, "weights": hashlib.sha256(weights).hexdigest()}
