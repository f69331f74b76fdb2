"""metrics.jsonl, with one JSON object per line for each step, evaluation and sample; and Accelerate's trackers.

What is watched inside the model (`analysis/`) goes into study.jsonl, which is written the same way.
"""

import os
import threading
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from train_loop.console import say
from train_loop.distributed.collectives import broadcast_from_main, run_on_all_ranks
from train_loop.errors import InputError, one_line
from train_loop.files import sync
from train_loop.metrics.past import Found, Past, find
from train_loop.records import complaints, to_json

STUDY = "study.jsonl"


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
        """Append one line."""
        with self._writing:
            self._waiting += (to_json(line) + "\n").encode()
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
        past = run_on_all_ranks(accelerator, "log", lambda: self._open(path, step, study))
        self.past: Past = broadcast_from_main(accelerator, past)
        self._evaluated = self.past.evaluations[-1]["step"] if self.past.evaluations else None

    def _open(self, path: Path, step: int, study: bool) -> Past:
        """Read what the files say, and open them; only the main process does."""
        kept = watched = Found()
        if self.accelerator.is_main_process:
            beside = path.with_name(STUDY)
            try:
                kept = find(path, step, {"evaluation", "sample"})
                self._events = EventFile(path, kept.end)
                if study and step and not beside.exists():
                    say(f"{beside}: is not there, and begins after step {step}")
                if study or beside.exists():
                    watched = find(beside, step, {"probe"})
                    self._study = EventFile(beside, watched.end)
            except OSError as error:
                raise InputError(f"{error.filename or path}: cannot be read and written ({error.strerror})") from None
            for file, found, last in ((path, kept, step), (beside, watched, 0)):
                for line in complaints(found.damaged, found.steps, last):
                    say(f"{file}: {line}")
        return Past.of(kept, watched, step)

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
        """Write one line; event and step come first."""
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
            self._study.append({"event": event, "step": step} | values)

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
