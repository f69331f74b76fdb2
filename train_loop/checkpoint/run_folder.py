"""A run's folder: which run it belongs to, and what state the run is in.

config.yaml     the resolved configuration
ledger.json     the data it trains on: its ledger and its fingerprint
truth.json      what was measured before the first step: processes, precision, decay groups, loss, documents
status.json     state (running | stopped | failed | complete), step and reason; launchers hide exit codes
architecture/   the model's configuration and its tokenizer: what a checkpoint's weights belong to
metrics.jsonl   study.jsonl (if steps are watched)   checkpoints/   model/
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from train_loop.config.load import differences, to_dict, to_yaml
from train_loop.config.parsing import parse_yaml
from train_loop.config.schema import Config
from train_loop.console import say
from train_loop.errors import InputError, one_line
from train_loop.files import write_atomically


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

    def check(self, config: Config) -> None:
        """Refuse a folder that this run must not write to: InputError names what differs, or what is in the way."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"run.output_dir {self.path}: is a file; name a folder")
        stored = self.path / "config.yaml"
        if not stored.exists():
            for name in (self.model, self.checkpoints, self.metrics):
                if name.exists():
                    raise InputError(
                        f"run.output_dir {self.path}: holds {name.name} of something else; name another folder"
                    )
            return
        if config.run.resume == "never":
            cure = "name another folder, or continue it with --run.resume auto"
            raise InputError(f"run.output_dir {self.path}: already holds a run, and run.resume is never; {cure}")
        old = parse_yaml(stored.read_text(encoding="utf-8"), f"{stored}: ")
        changed = differences(old, to_dict(config)) if isinstance(old, dict) else ["config.yaml is damaged"]
        if changed:
            raise InputError(
                f"run.output_dir {self.path}: belongs to a different run ({'; '.join(changed)}); name another folder"
            )

    @property
    def padded(self) -> bool:
        """Whether this run began before 0.2, which did not train the embedding of the end of a text in some models.

        It goes on like that: its first half would not be that of a run that does. Its truth sheet tells.
        """
        try:
            parameters = json.loads((self.path / "truth.json").read_text(encoding="utf-8"))["parameters"]
            return bool(parameters.get("untrained_rows", True))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return False

    def claim(
        self, config: Config, ledger: dict[str, Any], truth: dict[str, Any], architecture: Sequence[Savable]
    ) -> None:
        """Make this folder the run's own; InputError if it holds a run on other data, or can't be written to."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._claim(config, ledger, truth)
            if not self.architecture.exists():
                temporary = self.path / "architecture.tmp"
                shutil.rmtree(temporary, ignore_errors=True)
                for part in architecture:
                    part.save_pretrained(temporary)
                os.rename(temporary, self.architecture)
        except OSError as error:
            problem = f"cannot be written to ({one_line(error)}); name another folder, or make room"
            raise InputError(f"run.output_dir {self.path}: {problem}") from None

    def _claim(self, config: Config, ledger: dict[str, Any], truth: dict[str, Any]) -> None:
        """Write the small files, unless the folder holds a run on other data."""
        path = self.path / "ledger.json"
        if (self.path / "config.yaml").exists() and path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))["fingerprint"]
            if before != ledger["fingerprint"]:
                raise InputError(
                    f"run.output_dir {self.path}: belongs to a run on other data (fingerprint {before[:12]}, now "
                    f"{ledger['fingerprint'][:12]}): the documents or the tokenizer have changed since then; "
                    "name another folder"
                )
        write_atomically(path, json.dumps(ledger, indent=2) + "\n")
        write_atomically(self.path / "truth.json", json.dumps(truth, indent=2) + "\n")
        write_atomically(self.path / "config.yaml", to_yaml(config))

    def set_status(self, state: str, step: int, reason: str = "") -> None:
        """Write status.json. If that fails, for example on a full disk, print a line and go on."""
        content = json.dumps({"state": state, "step": step, "reason": reason}) + "\n"
        try:
            write_atomically(self.path / "status.json", content)
        except OSError as error:
            say(f"status.json: {one_line(error)}; the run is {state} at step {step}")
