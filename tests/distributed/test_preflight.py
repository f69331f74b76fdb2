"""Who else trains: missing, different or lost, and named."""

import functools
import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import launch
from tests.support.launch import ON_CPU, ROOT, environment, free_port, processes, several
from tests.support.runs import Command, events
from train_loop.config.load import shared_settings
from train_loop.config.schema import Config
from train_loop.distributed import host_check, preflight

Settings = Callable[..., list[str]]


def reports(**changes: Any) -> list[dict[str, Any]]:
    """What three processes on two hosts say; the last one says something else."""
    made = [preflight.report(shared_settings(Config())) | {"host": host} for host in ("alpha", "alpha", "beta")]
    for kind, values in changes.items():
        made[2][kind] = made[2][kind] | values
    return made


def test_processes_that_agree_have_no_difference() -> None:
    assert preflight.difference(reports()) is None
    assert {"torch", "accelerate", "transformers", "python"} <= reports()[0]["versions"].keys()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"versions": {"torch": "1.0"}}, "the version of torch is"),
        (
            {"versions": {"nccl": "2.30.0"}},
            "the version of nccl is None on process 0 (alpha) and 2.30.0 on process 2",
        ),
        (
            {"settings": {"optimizer.eps": 0.5}},
            "the configuration differs: optimizer.eps is 1e-08 on process 0 (alpha)",
        ),
    ],
)
def test_a_difference_is_named_with_both_sides(changes: dict[str, Any], expected: str) -> None:
    found = preflight.difference(reports(**changes))
    assert found is not None and expected in found and "on process 2 (beta); " in found


def test_a_process_that_was_told_no_local_rank_counts_those_before_it() -> None:
    found = [{name: each[name] for name in ("host", "local", "beside")} for each in preflight.places(reports())]
    assert [tuple(each.values()) for each in found] == [("alpha", 0, 2), ("alpha", 1, 2), ("beta", 0, 1)]
    told = [each | {"local": 3} for each in reports()]
    assert [each["local"] for each in preflight.places(told)] == [3, 3, 3]


@pytest.mark.parametrize(
    ("devices", "local", "expected"),
    [
        ([["a", "b"], ["a", "b"], ["a", "b"]], [0, 1, 0], "processes 0 and 2 would share one device of beta"),
        ([["a", "b"], ["a", "b"], ["c"]], [0, 1, 0], None),
        ([["a", "b"], ["a", "b"], ["c"]], [0, 2, 0], "where process 1 has LOCAL_RANK 2 and sees 2"),
        ([["a", "b"], ["a", "b"], ["c"]], [None, None, None], None),
        ([["a"], ["b"], ["c"]], [0, 1, 7], None),  # a cluster that shows each process its own device alone
        ([[], [], []], [0, 0, 0], None),  # CPUs
    ],
)
def test_two_processes_on_one_device_are_named(
    devices: list[list[str]], local: list[int | None], expected: str | None
) -> None:
    told = [
        each | {"devices": seen, "local": number} for each, seen, number in zip(reports(), devices, local, strict=True)
    ]
    found = preflight.verdict(told)
    assert "roster" in found if expected is None else expected in found["mistake"]


def test_a_launcher_has_to_choose_the_same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("WORLD_SIZE", "3"),
        ("ACCELERATE_USE_FSDP", "true"),
        ("PARALLELISM_CONFIG_DP_SHARD_SIZE", "2"),
    ):
        plain = preflight.report({})
        monkeypatch.setenv(name, value)
        found = preflight.difference([plain, preflight.report({})])
        assert (
            found is not None and f"{name} is not set on process 0 (" in found and f"and {value} on process 1" in found
        )


def test_paths_may_differ_between_hosts_and_nothing_else() -> None:
    here, there = Config(), Config()
    there.run.output_dir, there.data.cache_dir, there.data.files = "elsewhere", "/scratch", ["/data/*.txt"]
    assert shared_settings(here) == shared_settings(there)
    there.batch.sequences_per_step += 1
    assert shared_settings(here) != shared_settings(there)


@pytest.mark.parametrize("absent", [(), (2,), (1, 3)])
def test_everybody_at_a_roll_call_is_told_who_is_missing(absent: tuple[int, ...]) -> None:
    port, told, seconds = free_port(), {}, 1.0

    def call(number: int) -> None:
        if number:
            told[number] = host_check.report("127.0.0.1", port, number, seconds)
        else:
            told[number] = host_check.listen(port, 4, seconds)

    callers = [threading.Thread(target=call, args=(number,)) for number in range(4) if number not in absent]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(20)
    assert told == {number: list(absent) for number in range(4) if number not in absent}


def test_a_roll_call_without_the_first_host_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    given = ["--port", str(free_port()), "--number", "1", "--seconds", "1", "127.0.0.1", "beta"]
    assert host_check.main(given) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "host 0 (127.0.0.1) of 2 did not report within 1 s" in said
    assert time.monotonic() - began < 5


def test_a_roll_call_loads_nothing() -> None:
    """It runs on every host before anything else, also where torch takes a minute to load."""
    code = "import sys, train_loop.distributed.host_check; sys.exit(bool({'torch', 'yaml'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def launched(settings: list[str], *launcher: str) -> subprocess.Popen[str]:
    start = launch.command([*processes(2), *launcher], ["train", *settings])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(start, cwd=ROOT, env=environment(ON_CPU), text=True, **pipes)


def kill_one(launcher: subprocess.Popen[str], run: Path, rank: int, step: int) -> None:
    """`kill -9` of one of the processes, after so many steps."""
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(events(run, "step")) < step:
        assert time.monotonic() < deadline and launcher.poll() is None
        time.sleep(0.02)
    workers = psutil.Process(launcher.pid).children()
    next(worker for worker in workers if worker.environ().get("RANK") == str(rank)).kill()


def names_the_lost(err: str, process: int) -> bool:
    """Whether the first thing said is one line of ours, about this process."""
    said = [line for line in err.splitlines() if line.startswith("train-loop: ")]
    assert len(said) == 1 and "Traceback" not in err.partition(said[0])[0], err
    return f"lost process {process} (" in said[0] and "it was killed, or ended" in said[0]


@pytest.mark.slow
def test_a_killed_process_is_named_by_the_other(settings: Settings, tmp_path: Path) -> None:
    """Also the first one, whose status.json the other does not write."""
    launcher = launched(settings(train__max_steps=2000, checkpoint__every=50, evaluation__every=1000))
    kill_one(launcher, tmp_path / "run", 0, 20)
    began = time.monotonic()
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode != 0 and time.monotonic() - began < 20
    assert names_the_lost(err, 0)


@pytest.mark.slow
def test_the_launchers_restart_resumes(settings: Settings, tmp_path: Path, command: Command) -> None:
    """The launcher hands its store on, in which the first attempt's addresses stand."""
    make = functools.partial(settings, train__max_steps=150, checkpoint__every=20, run__reproducible="bitwise")
    launcher = launched(make(), "--max_restarts", "1")
    kill_one(launcher, tmp_path / "run", 1, 50)
    _, err = launcher.communicate(timeout=100)
    assert launcher.returncode == 0 and err.count("resuming from") == 1, err
    assert names_the_lost(err, 1)
    assert command("train", *make(run__output_dir=tmp_path / "whole")) == 0  # bitwise: one process gives the same
    losses = [[(each["step"], each["loss"]) for each in events(tmp_path / name, "step")] for name in ("run", "whole")]
    assert losses[0] == losses[1] and len(losses[0]) == 150


@pytest.mark.slow
@pytest.mark.parametrize("fsdp2", [False, True])
def test_no_file_has_two_writers(settings: Settings, tmp_path: Path, fsdp2: bool) -> None:
    """On a disk that all share: what two processes open to write, or rename, has no file in common but the lock.

    Digests of files are remembered by whoever reads one: in a file that is replaced as a whole, and may be lost.
    """
    cache = tmp_path / "cache"
    arguments = settings(train__max_steps=12, checkpoint__every=5, data__cache_dir=cache, run__log_with="[tensorboard]")
    (outcome,) = several(2, [["train", *arguments]], fsdp2, TESTS_NOTE_WRITES=str(tmp_path))
    assert outcome.codes == [0, 0], outcome.err
    written = [set((tmp_path / f"written.{rank}").read_text().split("\n")) - {""} for rank in (0, 1)]
    both = {path for path in written[0] & written[1] if not path.endswith(".lock")} - {str(cache / "digests")}
    assert not both and any("metrics.jsonl" in path for path in written[0])
    # Written by a library that Python does not hear: the parts carry their process's number.
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    state = json.loads((kept / "state.json").read_text())
    parts = [f"{kind}-{part:05d}" for kind, part in itertools.product(("model", "optimizer"), (1, 2)[: state["parts"]])]
    assert sorted(path.name[:-21] for path in kept.glob("*.safetensors")) == sorted(parts)
    assert state["parts"] == (2 if fsdp2 else 1)
