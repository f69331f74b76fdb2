"""Output that can't be written: no traceback, no run that ends of it, and an exit code that says so."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.support.forked import CLOSED, Outcome, run
from train_loop import streams
from train_loop.console import Progress, say

FULL, CAFE = "/dev/full", "caf\xe9 \u2603"


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a shell, in which `train-loop` is the command."""
    line = line.replace("train-loop", f"{sys.executable} -m train_loop")
    given = os.environ | {"PYTHONPATH": os.getcwd()} | environment
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=given, check=False)


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("train-loop --help > /dev/full", 1, "standard output cannot be written (No space left on device)"),
        ("train-loop train --help > /dev/full", 1, "standard output cannot be written"),
        ("train-loop sample --help > /dev/full", 1, "standard output cannot be written"),
        ("train-loop --help >&-", 1, "standard output cannot be written (Bad file descriptor)"),
        ("train-loop --version > /dev/full 2>&1", 1, ""),
        ("train-loop train --config nowhere 2> /dev/full", 2, ""),
        ("train-loop train --config nowhere 2>&-", 2, ""),
        ("train-loop train --config nowhere <&- >&- 2>&-", 2, ""),
        ("set -o pipefail; train-loop train --help | true", 141, ""),
        ("set -o pipefail; (sleep 0.1; exec train-loop sample --help) | true", 141, ""),
        ("train-loop --help 2>&- | cat > /dev/null", 0, ""),
    ],
)
def test_pythons_own_end_finds_nothing_wrong(line: str, code: int, said: str) -> None:
    if "| true" in line:  # the reader has to be gone by the time that there is something to read
        line = line.replace("; train-loop", "; (sleep 0.1; exec train-loop").replace("--help |", "--help) |", 1)
        line = line.replace("))", ")")
    found = shell(line)
    assert (found.returncode, found.stdout) == (code, "")
    assert found.stderr.count("\n") == bool(said) and said in found.stderr


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"PYTHONIOENCODING": "utf-8"}, CAFE),
        ({"PYTHONIOENCODING": "latin-1"}, None),
        ({"PYTHONIOENCODING": "ascii"}, r"caf\xe9 \u2603"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "is no text in"),
    ],
)
def test_text_that_a_terminal_lacks_is_escaped(environment: dict[str, str], shown: str | None) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "train_loop", "train", "--config", CAFE],
        capture_output=True,
        env=os.environ | environment,
        check=False,
    )
    assert found.returncode == 2 and found.stderr.count(b"\n") == 1
    assert (shown.encode() if shown else b"caf\xe9 \\u2603") in found.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer_folder: Path) -> tuple[Outcome, Path]:
    """How a run ended whose standard error is a full disk, and its folder."""
    from tests.support.runs import arguments_for

    folder = tmp_path_factory.mktemp("full")
    return run(["train", *arguments_for(corpus, tokenizer_folder, folder / "run")], folder, stderr=FULL), folder / "run"


def test_a_run_goes_on_without_its_standard_error(trained: tuple[Outcome, Path]) -> None:
    outcome, folder = trained
    assert outcome.code == 0 and outcome.problem() is None and "validation loss" in outcome.out
    assert json.loads((folder / "status.json").read_text())["state"] == "complete"


def test_a_run_goes_on_without_its_standard_output(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    from tests.support.runs import arguments_for

    arguments = ["train", *arguments_for(corpus, tokenizer_folder, tmp_path / "run", train__max_steps=2)]
    full = run(arguments, tmp_path, stdout=FULL)
    assert full.code == 0 and full.complaints == [
        "train-loop: standard output cannot be written (No space left on device)"
    ]
    for closed in ({"stdout": CLOSED}, {"stdout": CLOSED, "stderr": CLOSED, "stdin": CLOSED}):
        again = run([*arguments, "--run.output_dir", "x"][: len(arguments)], tmp_path, **closed)
        assert again.code == 0 and again.problem() is None


def test_every_command_takes_a_full_disk_and_a_closed_output(
    trained: tuple[Outcome, Path], corpus: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    from tests.support.runs import arguments_for

    folder = trained[1]
    data = arguments_for(corpus, tokenizer_folder, tmp_path / "run")
    commands = [
        ["prepare", *data],
        ["evaluate", "--model", folder, *data],
        ["sample", "--model", folder, "--prompt", CAFE, "--max_new_tokens", 4],
        ["sample", "--model", folder, "--prompt", CAFE, "--prompt", "b", "--json", "--max_new_tokens", 4],
        ["inspect", "--run", folder, "--step", 1],
        ["report", "--run", folder, "--output", tmp_path / "page.html"],
    ]
    for command in commands:
        whole = run(command, tmp_path)
        assert whole.code == 0 and whole.out and whole.problem() is None, (command, whole)
        for broken in ({"stdout": FULL}, {"stdout": CLOSED, "stderr": FULL})[: 2 if command is commands[0] else 1]:
            lost = run(command, tmp_path, **broken)
            assert lost.code == 1, (command, broken, lost)
            assert len(lost.complaints) == ("stderr" not in broken)
        plain = run(command, tmp_path, encoding="ascii", stderr=FULL)
        assert plain.code == 0 and plain.out.isascii(), (command, plain)
        assert plain.out == whole.out.encode("ascii", "backslashreplace").decode()


def test_a_sampler_stops_when_nobody_reads(trained: tuple[Outcome, Path], tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = threading.Thread(target=lambda: open(fifo, "rb").read(1))
    reader.start()
    left = run(
        ["sample", "--model", trained[1], "--prompt", "the", "--max_new_tokens", 100_000],
        tmp_path,
        30,
        stdout=str(fifo),
    )
    reader.join()
    assert left.code == 141 and "Traceback" not in left.err and left.complaints == []


class Broken:
    """A stream on which everything fails."""

    encoding = "utf-8"

    def __init__(self, error: Exception, terminal: bool) -> None:
        self.error, self.isatty = error, lambda: terminal

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error

    def fileno(self) -> int:
        raise self.error


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("error", [OSError(28, "full"), BrokenPipeError(), OSError(5, "gone"), ValueError("closed")])
def test_what_a_script_shows_may_be_lost(monkeypatch: pytest.MonkeyPatch, error: Exception, terminal: bool) -> None:
    for stream in (Broken(error, terminal), None):
        monkeypatch.setattr(sys, "stderr", stream)
        with Progress("training", "step", 3) as line:
            for _ in range(3):
                line.update(1, CAFE, curve=1.0)
            say(CAFE)


def test_a_scripts_ascii_terminal_sees_escapes(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(2, "w", encoding="ascii", closefd=False) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        say(CAFE)
    assert capfd.readouterr().err == "caf\\xe9 \\u2603\n"


def test_a_tests_or_notebooks_streams_stay_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with streams.unbreakable(strict=True) as rest:
        assert (sys.stdout, sys.stderr) == before and rest() is None


@pytest.mark.parametrize("strict", [True, False])
def test_a_lost_output_is_told_once(monkeypatch: pytest.MonkeyPatch, strict: bool) -> None:
    with open(FULL, "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with streams.unbreakable(strict) as rest:
            lost = 0
            for _ in range(3):
                try:
                    print("a", flush=True)
                except streams.OutputError:
                    lost += 1
            assert lost == strict
            failure = rest()
            assert failure is not None and failure.strerror == "No space left on device"
        assert sys.stdout is full


def test_a_case_can_write_only_into_its_folder(tmp_path: Path, trained: tuple[Outcome, Path]) -> None:
    """What tests of commands rely on: as root, too, nothing outside is made, moved or replaced."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for place in (victim, tmp_path / "new"):
        found = run(["report", "--run", trained[1], "--output", place], tmp_path / "case")
        assert found.code == 2 and found.outside and "outside of the test's folder" in found.err, found
    os.symlink(victim, tmp_path / "case" / "link")
    run(["report", "--run", trained[1], "--output", "link"], tmp_path / "case")
    assert victim.read_text() == "mine" and sorted(path.name for path in tmp_path.iterdir()) == ["case", "victim"]
