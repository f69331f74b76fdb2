"""A run's files as they are now. Each look at a log continues where the last one ended, so it only reads what is new.

Any file may be missing, damaged or half written (the run may be writing it right now). What can't be read is listed in
`notes`; it is not an error.
"""

import json
import math
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from train_loop.config.parsing import parse_yaml
from train_loop.errors import InputError
from train_loop.step_parts import STEP_PARTS

COLUMNS = (
    *("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "seconds", "mfu"),
    *("peak_memory_bytes", "loss_scale", "fixed_point_rounding", "skipped"),
    *(f"{part}_seconds" for part in STEP_PARTS),
)
"""What is kept of each step's line: numbers, with NaN for a missing one."""

SMALL_FILES = ("config.yaml", "truth.json", "ledger.json", "status.json")
LOGS = ("metrics.jsonl", "study.jsonl")


class RunFiles:
    """What the files of one run hold.

    Args:
        folder: the run's folder.

    Attributes:
        steps: the columns of the steps' lines; see `COLUMNS`.
        events: the other lines of both logs by kind (evaluation, sample, statistics, probe), in order.
        documents: config, truth, ledger and status; each is a dictionary, or None if it can't be read.

    Raises:
        InputError: if the folder does not hold a run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InputError(f"run {folder}: no such folder")
        if not any((self.folder / name).exists() for name in SMALL_FILES + LOGS):
            raise InputError(f"run {folder}: holds no run (none of {', '.join(SMALL_FILES + LOGS)})")
        self.steps: dict[str, array[float]] = {}
        self.events: dict[str, list[dict[str, Any]]] = {}
        self.documents: dict[str, dict[str, Any] | None] = {}
        self._logs = {name: _Followed(self.folder / name) for name in LOGS}
        self._damaged: list[str] = []
        self._forget()
        self.refresh()

    def _forget(self) -> None:
        """Drop what was read from the logs."""
        self.steps = {name: array("d") for name in COLUMNS}
        self.events = {}

    def refresh(self) -> None:
        """Read what is new."""
        if any(log.is_another() for log in self._logs.values()):
            self._forget()
            self._logs = {name: _Followed(self.folder / name) for name in LOGS}
        for log in self._logs.values():
            for event in log.more():
                self._take(event)
        self._damaged = []
        self.documents = {Path(name).stem: self._document(name) for name in SMALL_FILES}

    def _take(self, event: dict[str, Any]) -> None:
        """Add an event to the columns or to the other events."""
        if event["event"] == "step":
            for name, column in self.steps.items():
                column.append(number(event.get(name)))
        else:
            self.events.setdefault(event["event"], []).append(event)

    def _document(self, name: str) -> dict[str, Any] | None:
        """The contents of a small file; None if it is missing or can't be read."""
        path = self.folder / name
        try:
            text = path.read_text(encoding="utf-8")
            found = parse_yaml(text, "") if path.suffix == ".yaml" else json.loads(text)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError, InputError):
            found = None
        if not isinstance(found, dict):
            self._damaged.append(f"{name} can't be read: it is damaged, or is being written")
            return None
        return found

    @property
    def notes(self) -> list[str]:
        """What could not be read, one line for each."""
        lines = [
            f"{name}: {log.unreadable} damaged lines left out" for name, log in self._logs.items() if log.unreadable
        ]
        return self._damaged + lines

    def stamp(self) -> tuple[Any, ...]:
        """A value that changes whenever a file does."""
        return tuple(_stat(self.folder / name) for name in SMALL_FILES + LOGS)


class _Followed:
    """A growing file of JSON objects, one per line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.read, self.unreadable = 0, 0
        self._last = b""

    def is_another(self) -> bool:
        """Whether the file no longer holds what was read, because it was replaced or cut (and may have grown since)."""
        if not self.read:
            return False
        try:
            with self.path.open("rb") as file:
                file.seek(self.read - len(self._last))
                return file.read(len(self._last)) != self._last
        except OSError:
            return True

    def more(self) -> Iterable[dict[str, Any]]:
        """The events since the last look. An incomplete last line waits for the next look."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.read)
                added = file.read()
        except OSError:
            return
        whole = added[: added.rfind(b"\n") + 1].splitlines(keepends=True)
        self.read += sum(map(len, whole))
        self._last = whole[-1] if whole else self._last
        for line in whole:
            event = _event(line)
            if event is None:
                self.unreadable += 1
            else:
                yield event


def _event(line: bytes) -> dict[str, Any] | None:
    """The event on a line, which needs a kind and a step; None if the line is damaged."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str) or math.isnan(number(event.get("step"))):
        return None
    return event


def _stat(path: Path) -> tuple[int, int, int, int] | None:
    """What tells one version of a file from another; None if there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def number(value: Any) -> float:
    """A finite number as it is; anything else as NaN."""
    if isinstance(value, bool):
        return float(value)
    if not isinstance(value, int | float):
        return math.nan
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:
        return math.nan
