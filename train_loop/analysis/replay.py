"""Any step of a run, again: the state is (weights, moments, step), and all else follows from the configuration.

    newest whole checkpoint before the step (else the initial weights) -> train the steps between, in memory
        -> the step's windows, each token's loss -> the step itself, watched -> is its loss the one in the log?

Nothing is written to the run's folder. On one process of the same kind, the replayed loss is the logged one to the bit,
which shows that what one sees is what happened; where the run had several processes, or another machine, it is the same
to rounding, and how far it is off is said.

With other settings for that one step (`Replay.instead`), the same state shows what the step would have been.
"""

import gc
import json
import os
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from safetensors import SafetensorError

from train_loop import versions
from train_loop.analysis import truth_sheet
from train_loop.analysis.step_statistics import StepStatistics
from train_loop.checkpoint import storage
from train_loop.checkpoint.run_folder import RunFolder
from train_loop.config.load import check_config, config_from_arguments
from train_loop.config.parsing import override
from train_loop.config.schema import Config
from train_loop.console import Progress, say
from train_loop.data.loader import IGNORED, loader
from train_loop.data.token_store import TokenStore
from train_loop.data.tokenizer import strings
from train_loop.errors import InputError, one_line
from train_loop.job import Run, set_up
from train_loop.metrics.log import plain, read_events
from train_loop.models import building
from train_loop.models.parameters import tensors_once
from train_loop.rng import seed_torch
from train_loop.training.schedule import learning_rate
from train_loop.training.step import StepResult, train_step

_SURPRISING = 10
_CONTEXT = 12  # tokens before a surprising one that are shown
# What another value of would make another step of another run: nothing to compare with.
_FIXED = ("data.", "tokenizer.", "model.name_or_path", "run.output_dir", "run.resume", "run.log_with")


class Replay:
    """A run's steps, replayed one by one.

    Args:
        folder: of the run.
        steps: numbers, from 1, of those that will be asked for.

    Raises:
        InputError: where there is no such run or step, or it can't be replayed.
    """

    def __init__(self, folder: Path, steps: Sequence[int]) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError("inspect: replays on one process; start it without a launcher")
        self.folder = RunFolder(folder)
        if not (folder / "config.yaml").is_file():
            raise InputError(f"--run {folder}: holds no run (config.yaml is not there)")
        self.logged = {each["step"]: each for each in read_events(self.folder.metrics) if each["event"] == "step"}
        for step in steps:
            if step not in self.logged:
                known = f"steps 1 to {max(self.logged)}" if self.logged else "no step yet"
                raise InputError(f"--step {step}: the log of {folder} has {known}")
        self.truth = self._read("truth.json")
        self.config = self._settings()
        self.run = self._built(self.config)
        self.at: int | None = None
        """How many steps the state of `run` has behind it."""
        self.from_step = 0
        """That of the checkpoint it came from."""

    def _read(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads((self.folder.path / name).read_text(encoding="utf-8"))
            return dict(found)
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"--run {self.folder.path}: {name} cannot be read ({one_line(error)})") from None

    def _settings(self) -> Config:
        found = config_from_arguments(["--config", str(self.folder.path / "config.yaml")])
        try:  # what "auto" came to
            found.batch.micro_batch_size = int(self.truth["batch"]["micro_batch_size"])
            torch.set_num_threads(int(self.truth["processes"]["each"][0]["threads"]))
        except (KeyError, IndexError, TypeError, ValueError):
            raise InputError(f"--run {self.folder.path}: truth.json is damaged") from None
        return found

    def _built(self, settings: Config) -> Run:
        """The run's parts, on the same data, with a folder of its own that is never made."""
        settings.run.resume, settings.run.log_with, settings.sample.prompts = "auto", [], []
        settings.study.every, settings.study.probe = None, None
        with tempfile.TemporaryDirectory() as empty:
            settings.run.output_dir = str(Path(empty) / "none")
            run = set_up(settings)
        expected = self._read("ledger.json").get("fingerprint")
        if run.data.fingerprint != expected:
            raise InputError(
                f"--run {self.folder.path}: was trained on other data (fingerprint {str(expected)[:12]}, now "
                f"{run.data.fingerprint[:12]}): documents or tokenizer have changed since; put them back"
            )
        run.objective.train()
        return run

    def go_before(self, step: int) -> None:
        """Have the state before a step, counted from 1.

        Raises:
            InputError: where checkpoints before it are damaged and none is whole.
        """
        done = step - 1
        damaged: list[str] = []
        for known in sorted(_steps_on_disk(self.folder.checkpoints), reverse=True):
            if known > done or (self.at is not None and known <= self.at <= done):
                continue
            found, problem = storage.of_step(self.folder.checkpoints, known)
            if found is None:
                damaged.append(problem)
                say(f"{problem}; passed over")
                continue
            self._load(found)
            break
        if self.at is None or self.at > done:
            if damaged:
                raise InputError(f"no checkpoint before step {step} is whole ({'; '.join(damaged)})")
            if self.at is not None:
                self.run = self._built(self.config)
            self.at = self.from_step = 0
        with Progress("replaying", "step", done, self.at, done > self.at) as progress:
            while self.at < done:
                take(self.run, self.at)
                self.at += 1
                progress.update(1)

    def _load(self, found: storage.CheckpointRef) -> None:
        self.run.optimizer.optimizer.state.clear()
        try:
            storage.load(found, self.run.model, self.run.optimizer)
        except ValueError as error:
            raise InputError(f"{error}; model.name_or_path has changed since") from None
        except (OSError, SafetensorError) as error:  # a run that goes on removes old ones
            raise InputError(f"checkpoint {found.folder}: {one_line(error)}; try again") from None
        if self.run.accelerator.scaler is not None and found.state.get("loss_scale"):
            self.run.accelerator.scaler.load_state_dict(found.state["loss_scale"])
        self.at = self.from_step = found.step

    def step(self, step: int) -> dict[str, Any]:
        """Everything about a step, counted from 1, as plain values; see `inspected`."""
        self.go_before(step)
        found = inspected(self.run, step)
        self.at = step
        return found | {"from_step": self.from_step, "verification": self._verified(found)}

    def instead(self, step: int, changes: Sequence[str]) -> list[dict[str, Any]]:
        """A step as it was and as it would have been with other settings, from the same state.

        Args:
            step: counted from 1.
            changes: KEY=VALUE for keys of the configuration; dropout=0 turns dropout off whatever its kind.
        """
        other, dropout = self._changed(changes)
        self.go_before(step)
        state = _state(self.run)
        first = self.step(step)
        if other.run.mixed_precision != self.config.run.mixed_precision:
            AcceleratorState._reset_state()
        del self.run
        gc.collect()
        self.run = self._built(other)
        self.at = None
        _put_back(self.run, state)
        self.run.objective.train(dropout)
        second = inspected(self.run, step)
        return [first, second | {"from_step": self.from_step, "set": list(changes), "verification": None}]

    def _changed(self, changes: Sequence[str]) -> tuple[Config, bool]:
        other, dropout = self._settings(), True
        for change in changes:
            key, equals, text = change.partition("=")
            if not equals:
                raise InputError(f"--set {change}: give section.key=value, e.g. --set optimizer.learning_rate=1e-4")
            if key.startswith(_FIXED):
                raise InputError(f"--set {key}: would be another run, not another step of this one")
            if key == "dropout":
                if text not in ("0", "0.0", "off", "false"):
                    raise InputError(f"--set dropout={text}: it can be turned off, with dropout=0")
                dropout = False
            else:
                override(other, key, text)
        check_config(other)
        return other, dropout

    def _verified(self, found: dict[str, Any]) -> dict[str, Any]:
        """Whether the replayed loss is the logged one; how far it is off, and what is another kind of run here."""
        logged = self.logged[found["step"]]["loss"]
        kind = self._another_kind()
        if logged is None or found["loss"] is None:  # not finite
            same = logged is None and found["loss"] is None
            return {"verdict": "bits" if same else "different", "logged": logged, "difference": None, "kind": kind}
        difference = abs(found["loss"] / logged - 1) if logged else abs(found["loss"])
        tolerance = truth_sheet.SAME_LOSS[self.config.run.mixed_precision]
        verdict = "bits" if found["loss"] == logged else "rounding" if difference <= tolerance else "different"
        return {"verdict": verdict, "logged": logged, "difference": difference, "kind": kind}

    def _another_kind(self) -> list[str]:
        """In what the run differs from this process, in words."""
        sheet, kind = self.truth["processes"], []
        first = sheet["each"][0]
        if sheet["present"] > 1 and self.config.run.reproducible != "bitwise":
            kind.append(f"{sheet['present']} processes")
        if first["host"] != socket.gethostname():
            kind.append(f"host {first['host']}")
        if first["device"].split(":")[0] != self.run.accelerator.device.type:
            kind.append(f"device {first['device']}")
        now = versions.installed()
        kind += [f"{name} {then}" for name, then in self.truth["versions"].items() if now.get(name) != then]
        return kind


def inspected(run: Run, step: int) -> dict[str, Any]:
    """Take a step, counted from 1, with a run that is in the state before it, and tell all about it.

    Returns:
        step, epoch, loss (as trained, dropout included), targets, learning_rate, grad_norm, clipped, taken;
        loss_before and loss_after: of the step's own windows, dropout off, before and after the update;
        sequences: of each window its block, documents (name, offset in tokens, tokens), tokens (text) and their losses
        as trained (null for what is not predicted); surprising: the tokens with the highest; statistics: see
        `statistics.py`, null where the update was skipped.
    """
    watch = StepStatistics(run, every=1)
    sequences = _sequences(run, step - 1)
    losses = iter(_token_losses(run, step - 1))
    for each in sequences:
        each["losses"] = [None, *(next(losses) for _ in range(run.config.data.block_size))][: len(each["tokens"])]
    before = _loss(run, step - 1)
    watch.before(step - 1)
    result = take(run, step - 1)
    statistics = watch.after(step - 1, result)
    limit = run.config.optimizer.max_grad_norm
    found = plain(
        {
            "step": step,
            "epoch": step / run.plan.steps_per_epoch,
            "loss": result.loss,
            "targets": run.train.targets(run.plan.blocks(step - 1)),
            "learning_rate": _rate(run, step - 1),
            "grad_norm": result.grad_norm,
            "clipped": limit is not None and result.grad_norm > limit,
            "taken": result.taken,
            "loss_before": before,
            "loss_after": _loss(run, step - 1),
            "sequences": sequences,
            "surprising": _surprising(sequences),
            "statistics": statistics,
        }
    )
    return dict(found)


def take(run: Run, step: int) -> StepResult:
    """Take one step, counted from 0, as the loop does."""
    blocks = run.plan.blocks(step)
    micro_batches = run.plan.share(step, 0, 1)
    return train_step(
        run.accelerator,
        run.objective,
        run.optimizer,
        loader(run.train, micro_batches),
        count=len(micro_batches),
        targets=run.train.targets(blocks),
        learning_rate=_rate(run, step),
        max_grad_norm=run.config.optimizer.max_grad_norm,
        seed=(run.config.run.seed, step),
        sums=run.sums,
    )


def _rate(run: Run, step: int) -> float:
    return learning_rate(step, run.total_steps, run.config.optimizer.learning_rate, run.config.schedule)


@torch.no_grad()
def _loss(run: Run, step: int) -> float:
    """Mean loss of a step's windows, dropout off."""
    nll = targets = 0.0
    training = run.objective.training
    run.objective.eval()
    with building.without_compile(run.config):
        for batch in loader(run.train, run.plan.share(step, 0, 1)):
            batch = batch.to(run.accelerator.device)
            found = run.objective(batch.inputs, batch.targets, batch.positions, statistics=True)
            nll, targets = nll + float(found.nll), targets + int(found.targets)
    run.objective.train(training)
    return nll / max(targets, 1)


@torch.no_grad()
def _token_losses(run: Run, step: int) -> list[float | None]:
    """The loss of each position of a step's windows in their order, with the dropout masks that it is trained with."""
    found: list[float | None] = []

    def visit(logits: torch.Tensor, targets: torch.Tensor) -> None:
        nll = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
        real = (targets != IGNORED).tolist()
        found.extend(loss if each else None for loss, each in zip(nll.tolist(), real, strict=True))

    with building.without_compile(run.config):
        for batch in loader(run.train, run.plan.share(step, 0, 1)):
            seed_torch(run.accelerator.device, "dropout", run.config.run.seed, step, batch.number)
            batch = batch.to(run.accelerator.device)
            run.objective(batch.inputs, batch.targets, batch.positions, visit=visit)
    return found


def _sequences(run: Run, step: int) -> list[dict[str, Any]]:
    """The windows of a step: where their tokens come from, and their text."""
    store, size = run.data.train, run.config.data.block_size
    found = []
    for block in run.plan.blocks(step).tolist():
        first, end = block * size, min((block + 1) * size + 1, len(store))
        ids = store.tokens[first:end].tolist()
        documents = _documents(store, first, end)
        found.append({"block": block, "documents": documents, "tokens": strings(run.data.tokenizer, ids)})
    return found


def _documents(store: TokenStore, first: int, end: int) -> list[dict[str, Any]]:
    """The documents that the tokens first..end-1 of a store belong to; offset: in tokens, from the document's first."""
    ends = store.document_ends
    found = []
    while first < end:
        name, offset = store.document_at(first)
        until = min(end, first - offset + _length(ends, first))
        found.append({"name": name, "offset": offset, "tokens": until - first})
        first = until
    return found


def _length(ends: Any, token: int) -> int:
    """Tokens of the document that a token belongs to."""
    index = int(ends.searchsorted(token, side="right"))
    return int(ends[index]) - (int(ends[index - 1]) if index else 0)


def _surprising(sequences: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tokens with the highest losses, with what stood before them and where."""
    places = [
        (loss, row, column)
        for row, each in enumerate(sequences)
        for column, loss in enumerate(each["losses"])
        if loss is not None
    ]
    found = []
    for loss, row, column in sorted(places, reverse=True)[:_SURPRISING]:
        each, passed = sequences[row], 0
        for document in each["documents"]:
            if column < passed + document["tokens"]:
                break
            passed += document["tokens"]
        found.append(
            {
                "token": each["tokens"][column],
                "loss": loss,
                "before": "".join(each["tokens"][max(0, column - _CONTEXT) : column]),
                "document": document["name"],
                "offset": document["offset"] + column - passed,
            }
        )
    return found


def _steps_on_disk(folder: Path) -> list[int]:
    return [int(each.name.removeprefix("step-")) for each in folder.glob("step-*") if each.name[5:].isdigit()]


def _state(run: Run) -> dict[str, Any]:
    """A copy of weights, moments and loss scale."""
    state, scaler = run.optimizer.optimizer.state, run.accelerator.scaler
    tensors = tensors_once(run.model)
    return {
        "weights": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "moments": {
            name: {key: value.clone() for key, value in state[tensor].items()}
            for name, tensor in tensors.items()
            if tensor in state
        },
        "loss_scale": None if scaler is None else scaler.state_dict(),
    }


@torch.no_grad()
def _put_back(run: Run, state: dict[str, Any]) -> None:
    tensors = tensors_once(run.model)
    shapes = {name: tensor.shape for name, tensor in state["weights"].items()}
    if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
        raise InputError("--set: makes another model, which the run's weights don't fit")
    for name, tensor in tensors.items():
        tensor.copy_(state["weights"][name])
    run.optimizer.optimizer.state.clear()
    for name, moments in state["moments"].items():
        run.optimizer.optimizer.state[tensors[name]] = moments
    if run.accelerator.scaler is not None and state["loss_scale"] is not None:
        run.accelerator.scaler.load_state_dict(state["loss_scale"])
