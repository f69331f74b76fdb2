"""A run's folder: which run it belongs to, and what state the run is in.

config.yaml     the resolved configuration; written first: whatever else is in a folder without it is not a run's
ledger.json     the data it trains on: its ledger and its fingerprint
truth.json      what was measured before the first step: processes, precision, decay groups, loss, documents
status.json     state (running | stopped | failed | complete), step and reason; launchers hide exit codes
architecture/   the model's configuration and its tokenizer: what a checkpoint's weights belong to
metrics.jsonl   study.jsonl (if steps are watched)   checkpoints/   model/

What is damaged is written again if it follows from the rest, which it says. Reading needs no lock: every file and every
folder appears whole, in one go.
"""

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from train_loop import files
from train_loop.checkpoint import storage
from train_loop.config.load import differences, to_dict, to_yaml
from train_loop.config.parsing import parse_yaml
from train_loop.config.schema import Config
from train_loop.console import say
from train_loop.errors import InputError, one_line
from train_loop.records import to_json

_SMALL = ("config.yaml", "ledger.json", "truth.json", "status.json")
_LOGS = ("metrics.jsonl", "study.jsonl", "report.html")
_FOLDERS = ("architecture", "checkpoints", "model")


class Savable(Protocol):
    """A model configuration or a tokenizer from Transformers."""

    def save_pretrained(self, save_directory: Any) -> Any:
        """Write it into a folder."""


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"  # the log of steps and evaluations
        self.architecture = path / "architecture"  # the model's configuration and tokenizer, without weights
        self.model = path / "model"  # the exported one
        self._status: tuple[str, int] = ("", 0)
        self._writing = threading.Lock()

    def check(self, config: Config) -> None:
        """Refuse a folder that this run must not write to: InputError names what differs, or what is in the way."""
        where = f"run.output_dir {self.path}"
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{where}: is a file; name a folder")
        for name in _SMALL + _LOGS + _FOLDERS:
            path = self.path / name
            if path.is_symlink():
                raise InputError(f"{where}: {name} is a link, and a run writes only into its own folder; name another")
            if path.exists() and path.is_dir() != (name in _FOLDERS):
                kind = "a file where a folder belongs" if name in _FOLDERS else "a folder where a file belongs"
                raise InputError(f"{where}: {name} is {kind}; move it away, or name another folder")
        old, there = self._settings(), [name for name in _SMALL + _LOGS + _FOLDERS if (self.path / name).exists()]
        if not there:
            return
        if old is None and "config.yaml" not in there:
            raise InputError(f"{where}: holds {there[0]} of something else; name another folder")
        if config.run.resume == "never":
            cure = "name another folder, or continue it with --run.resume auto"
            raise InputError(f"{where}: already holds a run, and run.resume is never; {cure}")
        if old is None:
            cure = "put it back, or name another folder"
            raise InputError(f"{where}: config.yaml is damaged, and no checkpoint says which run this was; {cure}")
        if changed := differences(old, json_of(config)):
            raise InputError(f"{where}: belongs to a different run ({'; '.join(changed)}); name another folder")

    def _settings(self) -> dict[str, Any] | None:
        """The settings of the run that this folder holds, from config.yaml or, if that is damaged, a checkpoint."""
        kept = (storage.state_of(each).get("config") for each in storage.newest_first(self.checkpoints))
        sections = ("run", "model", "data", "train")
        for found in (self.read("config.yaml"), *kept):
            if isinstance(found, dict) and all(isinstance(found.get(each), dict) for each in sections):
                return found
        return None

    def read(self, name: str) -> dict[str, Any] | None:
        """What one of the small files holds; None if it isn't there or is damaged."""
        path = self.path / name
        try:
            text = path.read_text(encoding="utf-8")
            found = parse_yaml(text, f"{path}: ") if path.suffix == ".yaml" else json.loads(text)
        except (OSError, ValueError, RecursionError, InputError):
            return None
        return found if isinstance(found, dict) and found else None

    @property
    def padded(self) -> bool:
        """Whether this run began before 0.2, which did not train the embedding of the end of a text in some models.

        It goes on like that: its first half would not be that of a run that does. Its truth sheet tells or, if that is
        damaged, its checkpoints: the first ones to name this package's version are those of 0.2.
        """
        parameters = (self.read("truth.json") or {}).get("parameters")
        if isinstance(parameters, dict):
            return bool(parameters.get("untrained_rows", True))
        versions = (storage.state_of(each).get("versions") for each in storage.newest_first(self.checkpoints))
        return any(isinstance(each, dict) and "train-loop" not in each for each in versions)

    def claim(
        self, config: Config, ledger: dict[str, Any], truth: dict[str, Any], architecture: Sequence[Savable]
    ) -> None:
        """Make this folder the run's own; InputError if it holds a run on other data, or can't be written to."""
        before = (self.read("ledger.json") or {}).get("fingerprint", ledger["fingerprint"])
        if (self.path / "config.yaml").exists() and before != ledger["fingerprint"]:
            raise InputError(
                f"run.output_dir {self.path}: belongs to a run on other data (fingerprint {str(before)[:12]}, now "
                f"{ledger['fingerprint'][:12]}): the documents or the tokenizer have changed since then; "
                "name another folder"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            fresh = not (self.path / "config.yaml").exists()
            for name in _SMALL if not fresh or self.checkpoints.exists() else ():
                if self.read(name) is None and ((self.path / name).exists() or name != "status.json"):
                    say(f"{self.path / name}: is damaged or missing; it is written again")
            for name, text in (
                ("config.yaml", to_yaml(config)),
                ("ledger.json", to_json(ledger, indent=2) + "\n"),
                ("truth.json", to_json(truth, indent=2) + "\n"),
            ):
                files.write_atomically(self.path / name, text)
            self._save_architecture(architecture)
        except OSError as error:
            problem = f"cannot be written to ({one_line(error)}); name another folder, or make room"
            raise InputError(f"run.output_dir {self.path}: {problem}") from None

    def _save_architecture(self, architecture: Sequence[Savable]) -> None:
        """Write architecture/, unless it is there and whole."""
        if (damage := self.damaged_architecture()) is None:
            return
        if self.architecture.exists():
            say(f"{self.architecture}: {damage}; it is written again")
        temporary = files.private(self.architecture)
        temporary.mkdir()
        try:
            for part in architecture:
                part.save_pretrained(temporary)
            for path in temporary.iterdir():
                files.share(path)
                files.sync(path)
            files.replace(temporary, self.architecture)
        finally:
            files.remove(temporary)

    def damaged_architecture(self) -> str | None:
        """What is wrong with architecture/; None if it is whole."""
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            path = self.architecture / name
            if not path.is_file():
                return f"{name} is missing"
            if self.read(f"{self.architecture.name}/{name}") is None:
                return f"{name} is damaged"
        return None

    def set_status(self, state: str, step: int, reason: str = "") -> None:
        """Write status.json. If that fails, for example on a full disk, print a line and go on."""
        with self._writing:
            self._write_status(state, step, reason)

    def move_status(self, step: int) -> None:
        """Write the step that a running run has reached; called from other threads."""
        with self._writing:
            if self._status[0] == "running" and step > self._status[1]:
                self._write_status("running", step, "")

    def _write_status(self, state: str, step: int, reason: str) -> None:
        self._status = (state, step)
        content = to_json({"state": state, "step": step, "reason": reason}) + "\n"
        try:
            files.write_atomically(self.path / "status.json", content)
        except OSError as error:
            say(f"status.json: {one_line(error)}; the run is {state} at step {step}")


def json_of(config: Config) -> dict[str, Any]:
    """The settings as a checkpoint keeps them."""
    return dict(json.loads(to_json(to_dict(config))))
