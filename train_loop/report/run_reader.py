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
from train_loop.errors import InputError, one_line
from train_loop.records import Places, complaints, event
from train_loop.step_parts import STEP_PARTS

COLUMNS = (
    *("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "seconds", "mfu"),
    *("peak_memory_bytes", "loss_scale", "fixed_point_rounding", "balance_loss", "skipped"),
    *(f"{part}_seconds" for part in STEP_PARTS),
)
"""What is kept of each step's line: numbers, with NaN for a missing one."""

CLAIMED = ("config.yaml", "truth.json", "ledger.json")  # written together, when a run begins
SMALL_FILES = (*CLAIMED, "status.json")
LOGS = ("metrics.jsonl", "study.jsonl")


class RunFiles:
    """What the files in a run's folder hold; InputError if it does not hold a run.

    Attributes:
        steps: the columns of the steps' lines; see `COLUMNS`.
        events: the other lines of both logs by kind (evaluation, sample, statistics, probe), in order.
        documents: config, truth, ledger and status; each is a dictionary, or None if it can't be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if self.folder.is_file():
            raise InputError(f"run {folder}: is a file; name the folder of a run")
        if not self.folder.is_dir():
            raise InputError(f"run {folder}: no such folder")
        if not any((self.folder / name).exists() for name in SMALL_FILES + LOGS):
            raise InputError(f"run {folder}: holds no run (none of {', '.join(SMALL_FILES + LOGS)})")
        self._start_over()
        self.refresh()

    def _start_over(self) -> None:
        self.steps = {name: array("d") for name in COLUMNS}
        self.events: dict[str, list[dict[str, Any]]] = {}
        self._logs = {name: _Followed(self.folder / name) for name in LOGS}

    def refresh(self) -> None:
        """Read what is new."""
        if any(log.is_another() for log in self._logs.values()):
            self._start_over()
        for log in self._logs.values():
            for each in log.more():
                if each["event"] == "step":
                    for name, column in self.steps.items():
                        column.append(number(each.get(name)))
                else:
                    self.events.setdefault(each["event"], []).append(each)
        self._damaged: list[str] = []
        self.documents = {Path(name).stem: self._document(name) for name in SMALL_FILES}

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
        """What could not be read, and what is missing, one line for each."""
        if not self.folder.is_dir():
            return ["the run's folder is gone"]
        found = list(self._damaged)
        for name, log in self._logs.items():
            steps = [int(step) for step in self.steps["step"]] if name == "metrics.jsonl" else []
            found += [f"{name}: {each}" for each in complaints(log.damaged, steps, max(steps, default=0))]
            if log.problem:
                found.append(f"{name} can't be read: {log.problem}")
        return found + self._missing()

    def _missing(self) -> list[str]:
        """What is not there although the rest says that it was."""
        there = {name: (self.folder / name).exists() for name in (*CLAIMED, *LOGS)}
        found = [f"{name} is missing" for name in CLAIMED if not there[name] and any(there[each] for each in CLAIMED)]
        status, last = self.documents["status"] or {}, max(self.steps["step"], default=0)
        if status.get("state") != "running" and (reached := number(status.get("step"))) > last:
            found.append(f"metrics.jsonl: ends at step {last:,.0f}, and status.json says {reached:,.0f}")
        study = (self.documents["config"] or {}).get("study")
        every = number(study.get("every")) if isinstance(study, dict) else math.nan
        if every <= last and not there["study.jsonl"]:
            found.append("study.jsonl is missing")
        return found

    def stamp(self) -> tuple[Any, ...]:
        """A value that changes whenever a file does."""
        return tuple(_stat(self.folder / name) for name in SMALL_FILES + LOGS)


class _Followed:
    """A growing file of JSON objects, one per line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.read, self.lines = 0, 0  # bytes and lines that were read
        self.damaged = Places()
        self.problem = ""  # why the file can't be read
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
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self.read, self.lines, self._last = self.read + len(line), self.lines + 1, line
                    if (found := event(line)) is not None:
                        yield found
                    else:
                        self.damaged.add(self.lines)
            self.problem = ""
        except FileNotFoundError:
            self.problem = ""
        except OSError as error:
            self.problem = error.strerror or one_line(error)


def _stat(path: Path) -> tuple[int, int, int, int] | None:
    """What tells one version of a file from another; None if there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def number(value: Any) -> float:
    """A finite number as it is; anything else as NaN."""
    try:
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan
    except OverflowError:
        return math.nan
