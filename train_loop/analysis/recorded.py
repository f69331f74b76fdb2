"""What a run's folder says about the run, for a replay: its settings, its data, and the losses in its log.

A file that is missing or damaged is mended from the newest whole checkpoint, which knows the settings and the data, and
the user is told. Nothing is written.
"""

import json
import os
from pathlib import Path
from typing import Any

from train_loop.checkpoint import storage
from train_loop.checkpoint.run_folder import RunFolder
from train_loop.config.load import config_from_arguments, load_config
from train_loop.config.schema import Config
from train_loop.console import say
from train_loop.errors import InputError, one_line
from train_loop.metrics.past import read_events
from train_loop.records import complaints


class Recorded:
    """A run's folder. InputError if it holds no run, or too little of one.

    Attributes:
        steps: the log's lines about steps, by step.
        last: the last step that was trained, as far as is known.
        truth: the truth sheet, or None if it is damaged.
        fingerprint: of the data.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = RunFolder(path)
        self._state: dict[str, Any] | None = None
        if not (path / "config.yaml").is_file() and not self.folder.checkpoints.is_dir():
            raise InputError(f"--run {path}: holds no run (config.yaml is missing)")
        try:
            events, damaged = read_events(self.folder.metrics)
        except OSError as error:
            raise InputError(f"--run {path}: metrics.jsonl cannot be read ({error.strerror})") from None
        for line in complaints(damaged, [], 0):
            _say(f"{self.folder.metrics}: {line}")
        self.steps = {each["step"]: each for each in events if each["event"] == "step"}
        checkpoints = [each.name.removeprefix("step-") for each in self.folder.checkpoints.glob("step-*")]
        self.last = max([*self.steps, *(int(name) for name in checkpoints if name.isdecimal())], default=0)

    def check_step(self, step: int) -> None:
        """Refuse a step that the run has not taken: InputError. Say so if the log has lost it."""
        if not 1 <= step <= self.last:
            known = f"steps 1 to {self.last}" if self.last else "no step yet"
            raise InputError(f"--step {step}: the log of {self.path} has {known}")
        if step not in self.steps:
            _say(f"{self.folder.metrics}: has no line for step {step}, so there is no loss to compare with")

    def load(self) -> None:
        """Read what the settings and the data were."""
        self.truth = self._truth()
        ledger = self._json("ledger.json")
        fingerprint = ledger.get("fingerprint") if ledger is not None else None
        if not isinstance(fingerprint, str):
            _say(f"{self.path / 'ledger.json'}: missing or damaged; the rest says what the data was")
            fingerprint = (self.truth or {}).get("data") or self._from_checkpoint("fingerprint")
        self.fingerprint = str(fingerprint)

    def settings(self) -> Config:
        """The run's settings, with the values that "auto" led to."""
        try:
            found = config_from_arguments(["--config", str(self.path / "config.yaml")])
        except InputError as error:
            if self._checkpoint() is None:
                raise
            _say(f"{one_line(error)}; the newest checkpoint says what the settings were")
            found = load_config(None, self._from_checkpoint("config"))
        if self.truth is not None:
            found.batch.micro_batch_size = int(self.truth["batch"]["micro_batch_size"])
        elif self._checkpoint() is not None or found.batch.micro_batch_size == "auto":
            found.batch.micro_batch_size = int(self._from_checkpoint("micro_batch_size"))
        return found

    def _truth(self) -> dict[str, Any] | None:
        """The truth sheet, if it has what a replay needs."""
        found = self._json("truth.json")
        try:
            assert found is not None
            first = found["processes"]["each"][0]
            int(found["batch"]["micro_batch_size"]), int(first["threads"]), int(found["processes"]["present"])
            str(first["host"]), str(first["device"]), found["versions"].items()
        except (AssertionError, KeyError, IndexError, TypeError, ValueError, AttributeError):
            problem = "missing or damaged; how many threads and processes the run had is not known"
            _say(f"{self.path / 'truth.json'}: {problem}, so losses may be off by rounding")
            return None
        return found

    def _json(self, name: str) -> dict[str, Any] | None:
        """What a small file holds; None if it can't be read."""
        try:
            found = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def _from_checkpoint(self, name: str) -> Any:
        """A value from the newest whole checkpoint."""
        state = self._checkpoint()
        if state is None or name not in state:
            raise InputError(f"--run {self.path}: neither its files nor a checkpoint say its {name}")
        return state[name]

    def _checkpoint(self) -> dict[str, Any] | None:
        """What the newest whole checkpoint says about the run; None if there is none."""
        if self._state is None:
            found, _ = storage.newest(self.folder.checkpoints)
            self._state = {} if found is None else dict(found.state)
        return self._state or None


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # all processes read the same
        say(line)
