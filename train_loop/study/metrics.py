"""metrics.jsonl: one JSON object a line for each step, evaluation and sample; and Accelerate's trackers beside it."""

import json
import math
import os
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from train_loop.errors import InputError
from train_loop.settings import nearest


class MetricsLog:
    """Appends events to metrics.jsonl on the main process, and hands their numbers to the trackers.

    Args:
        accelerator: its trackers get every step and evaluation.
        path: the file.
        step: the run goes on after this step: later lines, of a run that was cut off, are removed, so that no step
            stands twice.
    """

    def __init__(self, accelerator: Accelerator, path: Path, step: int) -> None:
        self.accelerator = accelerator
        self.evaluations: list[dict[str, Any]] = []
        self.file = None
        if accelerator.is_main_process:
            kept = [event for event in read(path) if event["step"] <= step]
            self.evaluations = [event for event in kept if event["event"] == "evaluation"]
            temporary = path.with_name(f"{path.name}.tmp")
            temporary.write_text("".join(json.dumps(event) + "\n" for event in kept), encoding="utf-8")
            os.replace(temporary, path)
            self.file = open(path, "a", encoding="utf-8", buffering=1)  # line by line

    def write(self, event: str, step: int, **values: Any) -> None:
        """One line. Numbers that JSON doesn't know (NaN, infinity) become null."""
        line = {"event": event, "step": step} | {name: _plain(value) for name, value in values.items()}
        if self.file is not None:
            self.file.write(json.dumps(line) + "\n")
        if event == "evaluation":
            self.evaluations.append(line)
        if self.accelerator.trackers:
            prefix = "train" if event == "step" else event
            numbers = {f"{prefix}/{name}": value for name, value in line.items() if isinstance(value, int | float)}
            self.accelerator.log(numbers if event != "sample" else {}, step=step)

    def close(self) -> None:
        """Have the disk hold what was written."""
        if self.file is not None:
            os.fsync(self.file.fileno())
            self.file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The events of a metrics.jsonl; a last line that a killed process left half written is left out."""
    if not path.exists():
        return []
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return events


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_trackers(names: list[str]) -> None:
    """Refuse trackers that Accelerate would leave out without a word.

    Raises:
        InputError: for one that is unknown or not installed.
    """
    available = {str(each) for each in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise InputError(f"run.log_with: no tracker {name}; {nearest(name, sorted(LOGGER_TYPE_TO_CLASS))}")
        if name not in available:
            raise InputError(f"run.log_with: {name} is not installed; pip install {name}")
