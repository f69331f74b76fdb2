"""Starts commands on several real processes of this machine, as a user would."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.support import forked

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


def launchers(number: int, options: Sequence[str], variables: dict[str, str]) -> list[dict[str, str]]:
    """The environments that `accelerate launch OPTIONS` and torch's launcher below it give to `number` processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    port = str(free_port())
    given = launch_command_parser().parse_args([*options, "--main_process_port", port, "-m", "train_loop"])
    theirs = prepare_multi_gpu_env(_validate_launch_command(given)[0])
    common = environment(variables) | {
        name: theirs[name] for name in theirs if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_"))
    }
    common |= variables | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(number)}
    common |= {"LOCAL_WORLD_SIZE": str(number), "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0"}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]


class Outcome(NamedTuple):
    """What a command of `several` came to: `codes` of all processes, `others` is what all but the first printed."""

    code: int
    out: str
    err: str
    codes: list[int]
    others: str


def several(
    number: int,
    commands: Sequence[Sequence[Any]],
    fsdp2: bool = False,
    seconds: float = 500,
    copies: int = 1,
    **more: str,
) -> list[Outcome]:
    """Runs commands one after the other in the same `number` processes: to start them takes longer than to train.

    They are forked, from one that has imported everything, instead of launched. With several `copies` of what FSDP2
    shards, it is HSDP.
    """
    sharded = ["--config_file", str(CONFIGS / f"{'fsdp2' if copies == 1 else 'hsdp'}.yaml")]
    sharded += ["--num_machines", "1", "--num_processes", str(number)]
    if copies > 1:
        for name, size in (("replicate", copies), ("shard", number // copies)):
            sharded += [f"--parallelism_config_dp_{name}_size", str(size)]
    variables = ON_CPU | more | ({"TESTS_FSDP2_ON_CPU": "true"} if fsdp2 else {})
    alone = number == 1 and not fsdp2
    each = [environment(variables)] if alone else launchers(number, sharded if fsdp2 else processes(number), variables)

    def start(*paths: str) -> None:
        ended = forked.together("tests.support.several", paths, each, seconds)
        assert not any(code for code, _ in ended), ended

    return _outcomes(number, commands, start)


def under(told: Sequence[dict[str, str]], commands: Sequence[Sequence[Any]], seconds: float = 200) -> list[Outcome]:
    """The same for processes that are told nothing but these variables, each its own."""
    each = [environment(variables) for variables in told]

    def start(*paths: str) -> None:
        ended = forked.together("tests.support.several", paths, each, seconds)
        assert not any(code for code, _ in ended), ended

    return _outcomes(len(told), commands, start)


def fresh(number: int, commands: Sequence[Sequence[Any]], **more: str) -> list[Outcome]:
    """The same in new processes: `more` has what libraries read when they are loaded."""

    def start(*paths: str) -> None:
        program, pipes = [sys.executable, "-m", "tests.support.several", *paths], {"stderr": subprocess.PIPE}
        started = [
            subprocess.Popen(program, env=each, cwd=ROOT, text=True, **pipes)
            for each in launchers(number, processes(number), ON_CPU | more)
        ]
        ended = [(each.communicate(timeout=300)[1], each.returncode) for each in started]
        assert not any(code for _, code in ended), ended

    return _outcomes(number, commands, start)


def _outcomes(number: int, commands: Sequence[Sequence[Any]], start: Callable[..., None]) -> list[Outcome]:
    with tempfile.TemporaryDirectory() as folder:
        todo, done = Path(folder) / "todo.json", Path(folder) / "done.json"
        todo.write_text(json.dumps(commands))
        start(str(todo), str(done))
        found = [json.loads(done.with_name(f"{done.name}.{rank}").read_text()) for rank in range(number)]
        return [
            Outcome(*each[0], codes=[code for code, _, _ in each], others="".join(out for _, out, _ in each[1:]))
            for each in zip(*found, strict=True)
        ]
