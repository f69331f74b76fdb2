"""A command in a process of its own, for the price of a fork: a server has imported everything already.

The process gets limits of time and memory, a home and a temporary folder below its own, and is watched: what it would
write outside of its folder is refused and listed.
"""

import errno
import functools
import importlib
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

IMPORTED = (
    *("train_loop.cli", "train_loop.job", "train_loop.generation.sampler", "train_loop.analysis.inspection"),
    *("train_loop.report.server", "train_loop.report.figures", "datasets", "yaml"),
    *("transformers.models.gpt2.modeling_gpt2", "transformers.models.auto.modeling_auto", "tests.support.forked"),
    *("transformers.models.llama.modeling_llama", "transformers.models.gpt2.tokenization_gpt2"),
    *("tests.support.several", "accelerate", "torch.distributed.fsdp", "evaluate", "transformers.pipelines"),
    "train_loop.metrics.language_model",
)
CLOSED = "closed"
ROOT = Path(__file__).parents[2]


class Outcome(NamedTuple):
    """How a command ended: its exit code (None if it was killed for taking too long), and what it printed."""

    code: int | None
    out: str
    err: str
    peak: int  # of memory beyond what the server had [bytes]
    outside: list[str]  # what it would have written, moved or removed outside of its folder

    @property
    def complaints(self) -> list[str]:
        """The lines in which the command says what is wrong."""
        return [line for line in self.err.splitlines() if line.startswith("train-loop: ")]

    def problem(self) -> str | None:
        """Why this is not how a command should end: it runs, or says in one line what is wrong; None if it is."""
        if self.code is None:
            return "hangs"
        if "Traceback" in self.err or "Exception ignored" in self.err or "Traceback" in self.out:
            return "a traceback"
        if self.code not in (0, 1, 2, 3, 141):
            return f"exit code {self.code}"
        if self.code == 2 and len(self.complaints) != 1:
            return f"exit code 2 with {len(self.complaints)} lines"
        if self.code == 1 and not self.complaints:
            return "exit code 1 without a word"
        return f"writes {self.outside[0]}" if self.outside else None


@functools.cache
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    return context


def run(
    arguments: Sequence[object], folder: Path, seconds: float = 60, memory: int = 4 << 30, **options: Any
) -> Outcome:
    """`train-loop ARGUMENTS` with `folder` as its own, in which it starts.

    Options are `stdin`, `stdout`, `stderr` (paths, or CLOSED), `encoding` of the output, `environment` (additions).
    """
    folder.mkdir(exist_ok=True)
    outputs = [folder / ".out", folder / ".err", folder / ".watch"]
    for path in outputs:
        path.unlink(missing_ok=True)
    child = _context().Process(target=_child, args=([str(each) for each in arguments], str(folder), memory, options))
    child.start()
    child.join(seconds)
    code = child.exitcode
    if code is None:
        child.kill()
        child.join()
    out, err, watched = (path.read_text("utf-8", "replace") if path.exists() else "" for path in outputs)
    notes = watched.splitlines()
    peak = int(notes.pop()) if notes and notes[-1].isdigit() else 0
    return Outcome(code, out, err, peak, sorted(set(notes)))


def together(
    module: str, arguments: Sequence[str], environments: Sequence[dict[str, str]], seconds: float
) -> list[tuple[int, str]]:
    """`MODULE.main(ARGUMENTS)` in a process for each environment, all at the same time: exit codes, what they printed.

    Where one fails, the others are killed: they would wait for it.
    """
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / str(number) for number in range(len(environments))]
        children = [
            _context().Process(target=_member, args=(module, list(arguments), each, str(path)))
            for each, path in zip(environments, said, strict=True)
        ]
        for child in children:
            child.start()
        deadline = time.monotonic() + seconds
        waiting = {child.sentinel: child for child in children}
        while waiting and (ended := multiprocessing.connection.wait(waiting, deadline - time.monotonic())):
            failed = [waiting.pop(each).exitcode for each in ended]
            if any(failed):
                break
        for child in waiting.values():
            child.kill()
        for child in children:
            child.join()
        printed = [path.read_text("utf-8", "replace") if path.exists() else "" for path in said]
        return [(child.exitcode or 0, each) for child, each in zip(children, printed, strict=True)]


class Popen:
    """Stands in for `subprocess.Popen` where that starts `python -m train_loop ...` in a session of its own.

    With `environments`, one for each process, it stands in for a launcher that does so.
    """

    def __init__(
        self,
        command: Sequence[str],
        stdout: IO[bytes],
        env: dict[str, str],
        environments: Sequence[dict[str, str]] = (),
        **options: Any,
    ) -> None:
        module, *arguments = command[len(command) - command[::-1].index("-m") :]
        assert module == "train_loop" and options == {"stderr": stdout, "start_new_session": True}
        told = [env | each for each in environments]
        target, given = (_launch, told) if told else (_led, env)
        self._process = _context().Process(target=target, args=(arguments, given, stdout.name))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, seconds: float | None = None) -> int | None:
        self._process.join(seconds)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("train-loop", seconds or 0)
        return self._process.exitcode


def _led(arguments: list[str], environment: dict[str, str], said: str) -> None:
    os.setsid()
    _settle(environment, said)
    sys.exit(importlib.import_module("train_loop.cli").main(arguments))


def _launch(arguments: list[str], environments: list[dict[str, str]], said: str) -> None:
    """What torch's launcher does: each process in a session of its own; when one fails, the others are asked to end."""
    os.setsid()
    processes = set()
    for environment in environments:
        process = os.fork()
        if not process:
            code = 1
            try:
                _led(arguments, environment, said)
            except SystemExit as exit:
                code = exit.code if isinstance(exit.code, int) else 0
            finally:
                os._exit(code)
        processes.add(process)
    failed = False
    while processes:
        process, status = os.wait()
        processes.discard(process)
        if status and not failed:
            failed = True
            for each in processes:
                os.kill(each, signal.SIGTERM)
    sys.exit(int(failed))


def _member(module: str, arguments: list[str], environment: dict[str, str], said: str) -> None:
    _settle(environment, said)
    os.chdir(ROOT)
    importlib.import_module(module).main(*arguments)


def _settle(environment: dict[str, str], said: str) -> None:
    opened = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(opened, number)
    os.close(opened)
    os.environ.clear()
    os.environ |= environment


def _child(arguments: list[str], folder: str, memory: int, options: dict[str, Any]) -> None:
    own = os.path.realpath(folder)
    watched = os.open(f"{own}/.watch", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    given = (
        options.get("stdin", os.devnull),
        options.get("stdout", f"{own}/.out"),
        options.get("stderr", f"{own}/.err"),
    )
    for number, path in enumerate(given):
        if path != CLOSED:
            opened = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(opened, number)
            os.close(opened)
    for number, path in enumerate(given):
        if path == CLOSED:
            os.close(number)
    encoding = options.get("encoding", "utf-8")
    sys.stdin, sys.stdout, sys.stderr = (
        None if path == CLOSED else open(number, "rw"[number > 0], encoding=encoding, errors=errors, closefd=False)
        for number, (path, errors) in enumerate(zip(given, ("strict", "strict", "backslashreplace"), strict=True))
    )
    os.chdir(own)
    for name in ("home", "tmp", "cache"):
        os.makedirs(name, exist_ok=True)
    os.environ |= {"HOME": f"{own}/home", "TMPDIR": f"{own}/tmp", "TRAIN_LOOP_CACHE": f"{own}/cache"}
    os.environ |= options.get("environment", {})
    tempfile.tempdir = None  # what the server found
    _watch(own, watched)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + memory, size + memory))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    from train_loop.cli import main

    try:
        code = main(arguments)
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
    except BaseException:
        if sys.stderr is not None:
            traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            code = 120  # as Python's own end
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    os.write(watched, f"{peak * 1024}\n".encode())
    os._exit(code)


def _watch(own: str, notes: int) -> None:
    """Refuse, and note, what Python would open for writing, make, move or remove outside of the folder.

    Refused, because tests may run as root: an output that is moved to the place of a device would replace the device.
    What libraries write from Rust or C++ is not seen here, so cases name nothing outside that must not be lost.
    """
    allowed = (f"{own}/", "/dev/shm/", f"{os.environ.get('HF_HOME', own)}/")
    sinks = ("/dev/null", "/dev/full", "/dev/tty")
    changing = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod")
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            opens = isinstance(arguments[2], int) and arguments[2] & writing
            paths = [path for path in arguments[:1] if opens and path not in sinks]
        elif event in changing or event == "shutil.rmtree":
            paths = list(arguments[: 2 if event in ("os.rename", "os.link") else 1])
            paths = paths[1:] if event == "os.symlink" else paths
        else:
            return
        for path in paths:
            if not isinstance(path, str | bytes):
                continue
            name = os.fsdecode(path)
            place = os.path.join(os.path.realpath(os.path.dirname(name) or "."), os.path.basename(name))
            if event == "open":
                place = os.path.realpath(name)  # opening follows links
            if place != own and not place.startswith(allowed):
                os.write(notes, ascii(f"{event} {name}").encode() + b"\n")
                raise PermissionError(errno.EACCES, "outside of the test's folder", name)

    sys.addaudithook(hook)
