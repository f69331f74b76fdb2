"""GPU day: each part in a process of its own with a time limit, the whole in eight minutes, a table and a JSON of each.

    bash scripts/gpu_day.sh [--cpu] [--parts machine traps ...] [--python P] [--output runs/gpu_day]

    DIR/day.json          what ran, how it ended, how many checks said what
    DIR/PART.json         the part's rows; written after each check, so that a part that is killed keeps what it has
    DIR/PART.txt          the same as a table
    DIR/PART.log          all that the part and its child processes printed

A row is {"name", "verdict", "value", "expected", "unit", "why", "seconds"}. Its verdict is

    "yes"       a promise is kept: `value` is what was seen, `expected` what was promised
    "no"        it is broken
    "failed"    the check itself ended in an error; `why` is the error
    "skipped"   the check can't be made here; `why` says what is missing
    null        a figure in `unit`, neither right nor wrong

This file needs nothing but the standard library: whatever is wrong with the libraries is a part's to find out.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parent.parent.parent
DAY_SECONDS = 480.0
CPU_TIMES = 3  # as long may a part take on a CPU, as long as the day is not over
PATIENCE_SECONDS = 5.0  # for a part that was asked to end, before it is killed


class Part(NamedTuple):
    """A part: the module of its name, what it may take on a GPU, and what it does."""

    name: str
    seconds: float
    about: str


# All limits together stay below DAY_SECONDS, so that no part can take another one's time.
PARTS = (
    Part("machine", 30, "device, driver, versions; rates of matrix products and of memory"),
    Part("traps", 55, "what GPUs get wrong in silence: masks, seeds, recorded graphs, precision switches"),
    Part("isolation", 35, "packed documents against one document at a time, under each attention that is there"),
    Part("exactness", 60, "micro-batches, evaluation, dropout, kill -9 and resume, bitwise, replay"),
    Part("quickstart", 70, "the quickstart in fp32, TF32, bf16 and fp16, compiled and not"),
    Part("sampling", 55, "the sampler against generate: tokens, and tokens per second"),
    Part("sharding", 40, "FSDP2 on one process, two processes on one device"),
    Part("memory", 40, "what `train-loop estimate` says against what the allocator counts"),
    Part("training", 85, "training speed against a plain loop and Trainer (scripts/bench/gpu.py)"),
)
NEEDED = (
    "torch",
    "transformers",
    "accelerate",
    "tokenizers",
    "safetensors",
    "numpy",
    "yaml",
    "psutil",
    "threadpoolctl",
    "xxhash",
)
DONE = "done"

HELP = """parts:
{parts}

What a part does not use of its time is there for the parts after it.

The Python needs torch, Transformers, Accelerate and what they bring. Where it lacks `evaluate` or `datasets`, the
checks that need them are skipped. Wheels of pure Python, such as these two, need no installing: put the files on
PYTHONPATH, with those of what they need.

Exit codes: 0 all parts ended and no check said no, 1 a check said no or a part did not end, 2 a mistake in the input.
"""


class BadInput(Exception):
    """A mistake of the user's: one line says what."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise BadInput instead of printing the usage."""
        raise BadInput(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run GPU day; returns the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as Ctrl-C: the part under way ends with us
    ends = time.monotonic() + DAY_SECONDS
    try:
        given = read(arguments)
        parts = chosen(given.parts)
        if given.cpu:
            parts = [part._replace(seconds=CPU_TIMES * part.seconds) for part in parts]
        output = writable(Path(given.output))
        check_python(given.cpu)
    except BadInput as error:
        print(f"gpu_day: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="gpu-day-", ignore_cleanup_errors=True) as scratch:
        environment = surroundings(Path(scratch), given.cpu)
        extra = ["--cpu"] if given.cpu else []

        def command(part: Part) -> list[str]:
            return [sys.executable, "-m", f"gpu_day.{part.name}", "--folder", str(Path(scratch) / part.name), *extra]

        return day(parts, command, output, ends, environment)


def read(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        BadInput: for what it does not know.
    """
    listed = "\n".join(f"  {part.name:11} {part.about} ({part.seconds:.0f} s at most)" for part in PARTS)
    options = _Parser(
        prog="gpu_day.sh",
        usage="gpu_day.sh [--cpu] [--parts PART ...] [--python P] [--output DIR]",
        description="Checks on a GPU, in eight minutes, what can't be checked without one, and measures the rest.",
        epilog=HELP.format(parts=listed),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    options.add_argument("--cpu", action="store_true", help="run all of it on the CPU, with tiny shapes, to try it")
    options.add_argument("--parts", nargs="+", metavar="PART", help="only these (all)")
    # The script that starts this one has taken it; it stands here for --help.
    options.add_argument("--python", metavar="P", help="the Python that runs it ($PYTHON, else python3)")
    default = ROOT / "runs" / "gpu_day"
    options.add_argument("--output", metavar="DIR", default=str(default), help="where results go (runs/gpu_day)")
    return options.parse_args(arguments)


def chosen(names: Sequence[str] | None) -> list[Part]:
    """The parts of these names, in the day's order; all where none is named.

    Raises:
        BadInput: for a name that is none of them.
    """
    known = [part.name for part in PARTS]
    for name in names or []:
        if name not in known:
            raise BadInput(f"--parts {name}: there is no such part; parts: {', '.join(known)}")
    return [part for part in PARTS if names is None or part.name in names]


def writable(folder: Path) -> Path:
    """A folder, made if it is not there.

    Raises:
        BadInput: where nothing can be written to it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder.resolve()
    except OSError as error:
        raise BadInput(f"--output {folder}: can't be written to ({error.strerror})") from None


def check_python(cpu: bool) -> None:
    """Refuse a Python that can't run any part.

    Raises:
        BadInput: naming what is missing.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInput(f"--python {sys.executable}: lacks {', '.join(missing)}; name a Python that has torch")
    if cpu:
        return
    asked = [sys.executable, "-c", "import torch; print(torch.accelerator.is_available())"]
    told = subprocess.run(asked, capture_output=True, text=True, check=False)
    if told.returncode:
        last = (told.stderr.strip().splitlines() or [f"exit code {told.returncode}"])[-1]
        raise BadInput(f"--python {sys.executable}: can't load torch ({last})")
    if told.stdout.split()[-1:] != ["True"]:
        raise BadInput("there is no GPU here that torch can use; --cpu runs the parts on the CPU, to try them")


def surroundings(scratch: Path, cpu: bool) -> dict[str, str]:
    """The environment of the parts: this package found, no network, data prepared once for all of them."""
    theirs = [os.path.abspath(each) for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    found = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "scripts"), str(ROOT), *theirs]),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(scratch / "huggingface"),
        "TRAIN_LOOP_CACHE": str(scratch / "cache"),
        "TOKENIZERS_PARALLELISM": "true",
    }
    # On a CPU, shapes as tiny as these are fastest on one thread.
    on_cpu = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return found | (on_cpu if cpu else {})


def day(
    parts: Sequence[Part],
    command: Callable[[Part], list[str]],
    output: Path,
    ends: float,
    environment: dict[str, str],
) -> int:
    """Run parts one after the other, whatever becomes of each, and write down what came of them.

    Args:
        parts: in their order.
        command: of a part; --json FILE and --wait are added. It gets a line with its seconds when it is its turn, and
            is started while the part before it is at work, because on some hosts its libraries take half a minute.
        output: the folder that results go to.
        ends: the moment, of the monotonic clock, at which the day is over.
        environment: of the parts.

    Returns:
        The exit code.
    """
    began = due = time.monotonic()
    told = []
    for part in parts:
        for kind in ("json", "txt", "log"):  # an earlier day's
            (output / f"{part.name}.{kind}").unlink(missing_ok=True)

    def start(part: Part) -> subprocess.Popen[bytes]:
        started = [*command(part), "--json", str(output / f"{part.name}.json"), "--wait"]
        with open(output / f"{part.name}.log", "wb") as log:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": log, "stderr": subprocess.STDOUT}
            return subprocess.Popen(started, **pipes, cwd=ROOT, env=environment, start_new_session=True)

    processes = {part: start(part) for part in parts[:1]}
    try:
        for part, following in zip(parts, [*parts[1:], None], strict=True):
            if following is not None:
                processes[following] = start(following)
            due += part.seconds  # what a part leaves is there for those after it
            seconds = min(due, ends - PATIENCE_SECONDS) - time.monotonic()
            print(f"{part.name}: {part.about}", flush=True)
            told.append(run(part, processes.pop(part), output, seconds))
            print((output / f"{part.name}.txt").read_text(encoding="utf-8"), flush=True)
    finally:
        for process in processes.values():
            _end(process)
    whole = {"python": sys.executable, "seconds": round(time.monotonic() - began, 1), "parts": told}
    _write(output / "day.json", json.dumps(whole, indent=1))
    print(summary(told), flush=True)
    print(f"\n{whole['seconds']} s; all of it is in {output}", flush=True)
    return int(any(each["ended"] != DONE or each["no"] or each["failed"] for each in told))


def run(part: Part, process: subprocess.Popen[bytes], output: Path, seconds: float) -> dict[str, Any]:
    """Let one part begin, and tell how it ended and what its checks said."""
    file = output / f"{part.name}.json"
    began = time.monotonic()
    ended = _until(process, seconds)
    taken = round(time.monotonic() - began, 1)
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError):
        rows = []
    _write(file, json.dumps({"part": part.name, "ended": ended, "seconds": taken, "rows": rows}, indent=1))
    _write(output / f"{part.name}.txt", table(rows) + ("" if ended == DONE else f"\n{part.name}: {ended}\n"))
    counts = Counter(str(row["verdict"]) for row in rows)
    said = {verdict: counts[verdict] for verdict in ("yes", "no", "failed", "skipped")}
    return {"part": part.name, "ended": ended, **said, "figures": counts["None"], "seconds": taken}


def _until(process: subprocess.Popen[bytes], seconds: float) -> str:
    """Let a process begin; when it ends or its time is up, all that it started ends, too. Returns how it ended."""
    try:
        if seconds <= 1:
            return "no time was left for it"
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended
            process.stdin.write(f"{seconds:.1f}\n".encode())
            process.stdin.close()
        code = process.wait(seconds)
        return DONE if code == 0 else f"ended with exit code {code}; see its log"
    except subprocess.TimeoutExpired:
        return f"ran out of time ({seconds:.0f} s)"
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process's group: asked first, since launchers in it start groups of their own, and end them when asked."""
    ends = time.monotonic() + PATIENCE_SECONDS
    with contextlib.suppress(ProcessLookupError):  # nobody is left
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < ends:
            time.sleep(0.05)
            process.poll()
            os.killpg(process.pid, 0)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as lines to read."""
    lines = []
    for row in rows:
        value = shown(row["value"]) + (f" {row['unit']}" if row["unit"] and row["value"] is not None else "")
        expected = f"(expected {row['expected']})" if row["expected"] else ""
        rest = "  ".join(each for each in (value, expected, row["why"]) if each)
        lines.append(f"  {row['verdict'] or '':7}  {row['name']:58}  {rest}".rstrip())
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    """A value as short as it can be read."""
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value).lower()
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    return str(value)


def summary(told: Sequence[dict[str, Any]]) -> str:
    """A line a part."""
    names = ("yes", "no", "failed", "skipped", "figures", "seconds")
    lines = [f"{'':12}" + "".join(f"{name:>9}" for name in names)]
    for each in told:
        numbers = "".join(f"{each[name]:>9}" for name in names)
        lines.append(f"{each['part']:12}{numbers}" + ("" if each["ended"] == DONE else f"   {each['ended']}"))
    return "\n".join(lines)


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


if __name__ == "__main__":
    sys.exit(main())
