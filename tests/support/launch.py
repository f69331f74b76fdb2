"""Starts commands on several real processes of this machine, as a user would."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent.parent
CONFIGS = ROOT / "configs" / "accelerate"
# `--multi_gpu` together with this variable is how Accelerate starts several processes on a CPU.
ON_CPU = {"ACCELERATE_USE_CPU": "true"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def command(launcher: Sequence[str], arguments: Sequence[str], module: str = "train_loop") -> list[str]:
    """`accelerate launch LAUNCHER -m MODULE ARGUMENTS`."""
    start = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(free_port())]
    return [*start, *launcher, "-m", module, *arguments]


def run(
    launcher: Sequence[str],
    arguments: Sequence[str],
    module: str = "train_loop",
    seconds: float = 300,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """What a launched command printed, and its exit code.

    `variables` is all that is set of Accelerate's.
    """
    return subprocess.run(
        command(launcher, arguments, module),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        cwd=ROOT,
        env=environment(variables),
    )


def environment(variables: dict[str, str]) -> dict[str, str]:
    """The environment of this process, with no variables of Accelerate's but those given."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    return clean | {"OMP_NUM_THREADS": "1"} | variables


def processes(number: int) -> list[str]:
    """Options of the launcher for plain data parallelism."""
    return ["--num_processes", str(number), *(["--multi_gpu"] if number > 1 else ["--cpu"])]


class Outcome(NamedTuple):
    """What a command of `several` came to; `codes` are those of all processes, the rest is the first one's."""

    code: int
    out: str
    err: str
    codes: list[int]


def several(
    number: int, commands: Sequence[Sequence[Any]], fsdp2: bool = False, seconds: float = 500, **more: str
) -> list[Outcome]:
    """Runs commands one after the other in the same `number` processes: to start them takes longer than to train."""
    with tempfile.TemporaryDirectory() as folder:
        todo, done = Path(folder) / "todo.json", Path(folder) / "done.json"
        todo.write_text(json.dumps(commands))
        sharded = ["--config_file", str(CONFIGS / "fsdp2.yaml"), "--num_processes", str(number)]
        variables = ON_CPU | more | ({"TESTS_FSDP2_ON_CPU": "true"} if fsdp2 else {})
        launcher = sharded if fsdp2 else processes(number)
        result = run(launcher, [str(todo), str(done)], "tests.support.several", seconds, **variables)
        assert result.returncode == 0, result.stderr
        found = [json.loads(done.with_name(f"{done.name}.{rank}").read_text()) for rank in range(number)]
        return [Outcome(*each[0], codes=[code for code, _, _ in each]) for each in zip(*found, strict=True)]
