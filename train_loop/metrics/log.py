"""metrics.jsonl, with one JSON object per line for each step, evaluation and sample; and Accelerate's trackers.

What is watched inside the model (`analysis/`) goes into study.jsonl, which is written the same way.
"""

import itertools
import json
import math
import mmap
import os
import re
import threading
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator

from train_loop.console import say
from train_loop.distributed.collectives import broadcast_from_main
from train_loop.errors import one_line
from train_loop.files import sync

STUDY = "study.jsonl"
_BEGIN = re.compile(rb'{"event": "(\w+)", ')  # the beginning of a line, as json.dumps writes it


class EventFile:
    """Appends events to a file, one JSON object per line, after its first `end` bytes; what follows them is removed.

    A full disk does not end the run: lines wait in memory until there is room.
    """

    def __init__(self, path: Path, end: int) -> None:
        self._name = path.name
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.truncate(self._file, end)
        os.fsync(self._file)
        sync(path.parent)
        self._waiting = b""
        self._writing = threading.Lock()
        self._full = False

    def append(self, line: dict[str, Any]) -> None:
        """Append one line, of values that JSON supports."""
        with self._writing:
            self._waiting += (json.dumps(line) + "\n").encode()
            self._write()

    def _write(self) -> None:
        """Write the waiting lines. The caller holds the lock."""
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._file, self._waiting) :]
            self._full = False
        except OSError as error:
            if not self._full:
                say(f"{self._name}: {one_line(error)}; its lines wait in memory")
            self._full = True

    def flush(self) -> None:
        """Sync what was written to disk, or raise OSError. This may be called from another thread."""
        with self._writing:
            self._write()
        if self._waiting:
            raise OSError(f"no room for the lines of {self._name}")
        os.fsync(self._file)

    def close(self) -> None:
        """Write the waiting lines and sync them to disk. Raises OSError if that is not possible."""
        self.flush()
        os.close(self._file)


class MetricsLog:
    """An observer that appends records to metrics.jsonl on the main process, and passes their numbers to the trackers.

    The run continues after `step`. Later lines, from a run that was cut off, are removed, so that no step appears
    twice. `past` is what the file says about the steps so far; the same on all processes.
    """

    def __init__(self, accelerator: Accelerator, path: Path, step: int, study: bool = False) -> None:
        self.accelerator = accelerator
        self._events: EventFile | None = None
        self._study: EventFile | None = None
        kept = watched = Found()
        if accelerator.is_main_process:
            kept = find(path, step, {"evaluation", "sample"})
            self._events = EventFile(path, kept.end)
            beside = path.with_name(STUDY)
            if study or beside.exists():
                watched = find(beside, step, {"probe"})
                self._study = EventFile(beside, watched.end)
        past = Past(
            evaluations=[event for event in kept.events if event["event"] == "evaluation"],
            samples=sum(event["event"] == "sample" and event["step"] == step for event in kept.events),
            probed=max((event["step"] for event in watched.events), default=0),
            skipped=kept.skipped,
        )
        self.past = broadcast_from_main(accelerator, past)
        self._evaluated = self.past.evaluations[-1]["step"] if self.past.evaluations else None

    def before_step(self, state: Any, batch: Any) -> None:
        """Do nothing: there is nothing to write yet."""

    def after_step(self, state: Any, record: dict[str, Any]) -> None:
        """Write the step's line."""
        self.write(record)

    def after_evaluation(self, state: Any, record: dict[str, Any]) -> None:
        """Write the evaluation's line, unless it was already there when the run resumed."""
        if record["step"] != self._evaluated:
            self.write(record)
        self._evaluated = record["step"]

    def write(self, record: dict[str, Any]) -> None:
        """Write one line, of values that JSON supports; event and step come first."""
        event, step = record["event"], record["step"]
        if self._events is not None:
            self._events.append(record)
        if self.accelerator.trackers:
            prefix = "train" if event == "step" else event
            numbers = {f"{prefix}/{name}": value for name, value in record.items() if isinstance(value, int | float)}
            self.accelerator.log(numbers if event != "sample" else {}, step=step)

    def write_study(self, event: str, step: int, values: dict[str, Any]) -> None:
        """Write one line of study.jsonl."""
        if self._study is not None:
            self._study.append(plain({"event": event, "step": step} | values))

    def flush(self) -> None:
        """Sync what was written to disk, or raise OSError. This may be called from another thread."""
        for file in (self._events, self._study):
            if file is not None:
                file.flush()

    def close(self) -> None:
        """Write the waiting lines and sync them to disk. Raises OSError if that is not possible."""
        for file in (self._events, self._study):
            if file is not None:
                file.close()
        self._events = self._study = None


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a metrics.jsonl or study.jsonl, without a last line that a killed process left half written."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return events


class Past(NamedTuple):
    """What a run's log says about the steps so far."""

    evaluations: list[dict[str, Any]]  # their records
    samples: int  # how many texts were sampled after the last step
    probed: int  # the last step after which a probe was recorded, or 0
    skipped: int  # how many steps in a row, up to and including the last, were skipped


class Found(NamedTuple):
    """What was found in a file of events."""

    events: Sequence[dict[str, Any]] = ()  # those that were asked for
    skipped: int = 0  # how many steps in a row, up to and including the last, were skipped
    end: int = 0  # where the lines of later steps begin [bytes]


def find(path: Path, step: int, names: Container[str]) -> Found:
    """Read a metrics.jsonl or study.jsonl up to the events of a step; those of later steps come after them in the file.

    Only the last lines and the events with these names are parsed, because a million steps would take half a minute.
    """
    skipped, end, last = 0, 0, 0
    for line, line_end in _backwards(path):
        event = _parsed(line)
        if event is None or event["step"] > step:
            continue
        if not end:
            end, last = line_end, event["step"]
        if event["step"] < last - skipped:  # steps have no lines here
            break
        if event["event"] == "step":
            if not event.get("skipped"):
                break
            skipped += 1
    events = []
    if end:
        with open(path, "rb") as file:
            for line in file:
                event = _parsed(line) if _may_be(line, names) else None
                if event is not None and event["step"] <= step and event["event"] in names:
                    events.append(event)
    return Found(events, skipped, end)


def last_steps(path: Path, count: int) -> list[dict[str, Any]]:
    """The last `count` steps of a metrics.jsonl."""
    events = (_parsed(line) for line, _ in _backwards(path) if _may_be(line, {"step"}))
    steps = (event for event in events if event is not None and event["event"] == "step")
    return list(itertools.islice(steps, count))[::-1]


def _may_be(line: bytes, names: Container[str]) -> bool:
    """Whether a line may hold one of these events, judged by its beginning."""
    begin = _BEGIN.match(line)
    return begin is None or begin[1].decode() in names


def _backwards(path: Path) -> Iterator[tuple[bytes, int]]:
    """The last line of a file and where it ends [bytes], then the line before it, and so on.

    Text after the last line break, which a killed process has left half written, does not count as a line.
    """
    if not path.exists() or path.stat().st_size == 0:
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        end = content.rfind(b"\n") + 1
        while end:
            start = content.rfind(b"\n", 0, end - 1) + 1
            yield content[start:end], end
            end = start


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The event on a line; None if the line is damaged."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def plain(value: Any) -> Any:
    """The same value, with None in place of numbers that JSON doesn't support."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
