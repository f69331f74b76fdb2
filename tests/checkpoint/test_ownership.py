"""One run owns its folder: real processes that start at the same moment, are killed, stopped, forked, or elsewhere."""

import dataclasses
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import ROOT, Command
from train_loop.checkpoint import ownership
from train_loop.checkpoint.ownership import LOCK, RECORD, Owner, Ownership
from train_loop.errors import InputError

# What a process does: takes a folder, at a moment that it may be told, says so, and keeps it until it is told to go on.
PROGRAM = """
import os, sys, time
from pathlib import Path
from train_loop.checkpoint import ownership
from train_loop.errors import InputError
locks, folder, wait, child = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4]
ownership._PATIENCE_SECONDS, ownership._BEAT_SECONDS, ownership._POLL_SECONDS = 0.5, 0.1, 0.05
if not wait:
    ownership._SETTLE_SECONDS = 0.1
if locks == "no locks":
    def flock(*_):
        raise OSError(37, "No locks available")
    ownership.fcntl.flock = flock
if wait:
    print("ready", flush=True)
    begin = float(sys.stdin.readline())
    while time.time() < begin:
        pass
try:
    with ownership.Ownership(folder) as own:
        own.take()
        if child == "child" and not os.fork():
            time.sleep(20)
            os._exit(0)
        print("mine", flush=True)
        sys.stdin.readline()
except InputError as error:
    print(error, flush=True)
    sys.exit(2)
"""
LOCKS = pytest.mark.parametrize("locks", ["locks", "no locks"])
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a process that takes a folder."""
    begun: list[subprocess.Popen[str]] = []

    def process(folder: Path, locks: str = "locks", wait: str = "", child: str = "") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROGRAM, locks, str(folder), wait, child]
        pipe = subprocess.PIPE
        begun.append(
            subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
        )
        return begun[-1]

    yield process
    for each in begun:
        with suppress(ProcessLookupError):
            os.killpg(each.pid, signal.SIGKILL)  # its child, too
        each.communicate()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds are tenths."""
    for name, seconds in (
        ("PATIENCE", 0.3),
        ("LONG_PATIENCE", 4.0),
        ("BEAT", 0.1),
        ("STALE", 1.0),
        ("SETTLE", 0.1),
        ("POLL", 0.05),
    ):
        monkeypatch.setattr(ownership, f"_{name}_SECONDS", seconds)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def let_go(process: subprocess.Popen[str]) -> None:
    assert process.communicate("\n", timeout=20)[1] == "" and process.returncode == 0


@LOCKS
def test_of_several_that_start_at_the_same_moment_exactly_one_wins(tmp_path: Path, start: Start, locks: str) -> None:
    folder = tmp_path / "new" / "run"
    contenders = [start(folder, locks, "wait") for _ in range(5)]
    assert [said(each) for each in contenders] == ["ready"] * 5
    begin = time.time() + 0.2
    for each in contenders:
        assert each.stdin is not None
        each.stdin.write(f"{begin}\n")
        each.stdin.flush()
    answers = {each.pid: said(each) for each in contenders}
    (winner,) = (pid for pid, answer in answers.items() if answer == "mine")
    for pid, answer in answers.items():
        if pid != winner:
            assert answer.startswith(f"run.output_dir {folder}: in use by another run (host ")
            assert f", process {winner}, since 20" in answer and answer.endswith("stop it, or name another folder")
    for each in contenders:
        if each.pid == winner:
            let_go(each)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@LOCKS
def test_a_killed_run_never_blocks(tmp_path: Path, start: Start, locks: str, quick: None) -> None:
    first = start(tmp_path, locks)
    assert said(first) == "mine"
    with Ownership(tmp_path) as own, pytest.raises(InputError, match=f"process {first.pid}"):
        own.take()
    first.kill()
    first.wait()
    began = time.monotonic()
    with Ownership(tmp_path) as own:
        own.take()
        assert time.monotonic() - began < 0.9  # it does not wait until there has been no sign of life for long
    assert list(tmp_path.iterdir()) == []


def test_a_child_does_not_hold_the_lock_when_its_parent_is_killed(tmp_path: Path, start: Start, quick: None) -> None:
    first = start(tmp_path, child="child")
    assert said(first) == "mine"
    first.kill()
    first.wait()
    with Ownership(tmp_path) as own:
        own.take()


def test_a_run_that_is_suspended_keeps_its_folder(tmp_path: Path, start: Start, quick: None) -> None:
    first = start(tmp_path)
    assert said(first) == "mine"
    first.send_signal(signal.SIGSTOP)
    with Ownership(tmp_path) as own, pytest.raises(InputError, match="in use by another run"):
        own.take()
    first.send_signal(signal.SIGCONT)
    let_go(first)


def elsewhere(folder: Path, **changes: Any) -> Owner:
    """The record of an owner on another host, in a folder."""
    here = ownership._this_process(None)
    owner = dataclasses.replace(here, **{"token": "theirs", "host": "there", "kernel": "another boot", **changes})
    (folder / RECORD).write_text(json.dumps(dataclasses.asdict(owner)), encoding="utf-8")
    return owner


def silent_for(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_an_owner_on_another_host_is_alive_while_it_shows_it(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere(tmp_path)
    looks: list[float] = []

    def sleep(seconds: float) -> None:  # instead of waiting: the other host touches its record
        looks.append(seconds)
        os.utime(tmp_path / RECORD)
        wait(0.15)

    wait = time.sleep
    monkeypatch.setattr(ownership.time, "sleep", sleep)
    with Ownership(tmp_path) as own, pytest.raises(InputError, match=r"in use by another run \(host there, process"):
        own.take()
    assert len(looks) < 8 and json.loads((tmp_path / RECORD).read_text())["token"] == "theirs"
    assert capsys.readouterr().err.count("waiting to see whether the run that has it (host there") == 1


def test_an_owner_on_another_host_that_shows_no_life_is_replaced(tmp_path: Path, quick: None) -> None:
    elsewhere(tmp_path)
    began = time.monotonic()
    with Ownership(tmp_path) as own:
        own.take()
        assert time.monotonic() - began > 0.9
    elsewhere(tmp_path)
    silent_for(tmp_path / RECORD, 70)
    began = time.monotonic()
    with Ownership(tmp_path) as own:
        own.take()
        assert time.monotonic() - began < 0.9
    assert list(tmp_path.iterdir()) == []


def test_a_lock_counts_whatever_the_record_says(tmp_path: Path, quick: None) -> None:
    elsewhere(tmp_path)
    silent_for(tmp_path / RECORD, 70)
    handle = os.open(tmp_path / LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with Ownership(tmp_path) as own, pytest.raises(InputError, match="in use by another run"):
        own.take()
    os.close(handle)
    with Ownership(tmp_path) as own:
        own.take()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"token": 3}', "null", "\x00\x01"])
def test_a_damaged_record_blocks_no_longer_than_a_silent_owner(tmp_path: Path, quick: None, content: str) -> None:
    (tmp_path / RECORD).write_text(content, encoding="utf-8")
    silent_for(tmp_path / RECORD, 70)
    with Ownership(tmp_path) as own:
        own.take()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),  # this process
        ({"started": "1"}, False),  # its number, used again
        ({"pid": 2**22 + 5}, False),
        ({"pid": 10**30}, False),
        ({"numbers": "pid:[1]"}, None),  # in another container
        ({"kernel": "another"}, None),
        ({"lock": "1 2"}, False),  # of which `here` has the lock now
        ({"lock": "1 3"}, True),
    ],
)
def test_who_lives(changes: dict[str, Any], expected: bool | None) -> None:
    owner = ownership._this_process(None)
    assert dataclasses.replace(owner, **changes).lives(dataclasses.replace(owner, lock="1 2")) is expected


def test_a_run_whose_folder_was_taken_over_ends_at_once(tmp_path: Path, start: Start) -> None:
    """It was suspended for longer than others wait for a sign of life."""
    first = start(tmp_path, "no locks")
    assert said(first) == "mine"
    elsewhere(tmp_path)
    assert first.wait(10) == 1 and first.stderr is not None
    line = r"train-loop: run.output_dir .*: another run has taken it over \(host there, process \d+"
    assert re.search(line, first.stderr.read())
    assert json.loads((tmp_path / RECORD).read_text())["token"] == "theirs"


def test_a_record_that_somebody_removes_is_written_again(tmp_path: Path, quick: None) -> None:
    with Ownership(tmp_path) as own:
        own.take()
        (tmp_path / RECORD).unlink()
        deadline = time.monotonic() + 5
        while not (tmp_path / RECORD).exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_who_is_started_again_waits_for_the_attempt_before_to_end(
    tmp_path: Path,
    start: Start,
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    monkeypatch.setenv(name, "1")
    first = start(tmp_path)
    assert said(first) == "mine" and first.stdin is not None
    wait = time.sleep
    monkeypatch.setattr(
        ownership.time, "sleep", lambda seconds: (first.stdin.write("\n"), first.stdin.flush(), wait(1))
    )
    with Ownership(tmp_path) as own:
        own.take()
    assert f"waiting to see whether the run that has it (host {os.uname().nodename}" in capsys.readouterr().err
    first.wait()


def test_nothing_is_left_and_nothing_else_is_touched(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("x")
    for folder in (tmp_path, tmp_path / "a" / "b"):
        with Ownership(folder) as own:
            own.take()
            assert (folder / RECORD).exists() and (folder / LOCK).exists()
        assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    with Ownership(tmp_path / "a" / "b") as own:
        own.take()
        (tmp_path / "a" / "b" / "mine").write_text("x")
    assert (tmp_path / "a" / "b" / "mine").exists()


def test_what_a_killed_run_left_half_written_is_removed_and_nothing_else(tmp_path: Path) -> None:
    ours, theirs = f".train_loop-{'0' * 16}-model", ("model.tmp", ".train_loop-x", ".train_loop-0-y", "config.yaml.tmp")
    (tmp_path / ours / "deep").mkdir(parents=True)
    for name in theirs:
        (tmp_path / name).write_text("x")
    (tmp_path / f".train_loop-{'1' * 16}-link").symlink_to(tmp_path / "model.tmp")
    with Ownership(tmp_path) as own:
        own.take()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(theirs)
    assert (tmp_path / "model.tmp").read_text() == "x"


@pytest.mark.parametrize("name", [LOCK, RECORD])
def test_a_planted_link_is_not_written_through(tmp_path: Path, quick: None, name: str) -> None:
    precious = tmp_path / "precious"
    precious.write_text("x")
    silent_for(precious, 70)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(precious)
    with Ownership(tmp_path / "run") as own:
        if name == LOCK:
            with pytest.raises(InputError, match=r"run.output_dir .*: cannot be written to"):
                own.take()
        else:
            own.take()
    assert precious.read_text() == "x"


def test_a_second_run_in_the_folder_is_one_line_and_readers_need_no_lock(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, quick: None
) -> None:
    run = tmp_path / "run"
    assert command("train", *settings(train__max_steps=2)) == 0
    with Ownership(run) as own:
        own.take()
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        assert command("train", *settings(train__max_steps=2)) == 2
        assert command.err.count("\n") == 1 and f"in use by another run (host {os.uname().nodename}, " in command.err
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
        assert command("sample", "--model", run, "--prompt", "the", "--max_new_tokens", 2) == 0
        assert command("inspect", "--run", run, "--step", 1) == 0, command.err
        assert command("evaluate", "--model", run, *settings()) == 0
        assert command("report", "--run", run) == 0
    assert command("train", *settings(train__max_steps=2)) == 0
    assert not {LOCK, RECORD} & {path.name for path in run.iterdir()}
