"""Replays any step of a run: the state is (weights, moments, step), and all else follows from the configuration.

    newest whole checkpoint before the step (else the initial weights) -> train the steps between, in memory
        -> the step's windows, each token's loss -> the step itself, watched -> is its loss the one in the log?

A replay writes nothing to the run's folder. On one process of the same kind, the replayed loss equals the logged one
to the bit, which shows that the replay is what happened. If the run had several processes, or another machine, the two
are equal up to rounding, and the output says how far apart they are.

Under a launcher, the processes share the work as in training, and may shard the model. All of them must call the same
methods, and all get the same results.

With other settings for that one step (`Replay.instead`), the same state shows how the step would have gone.
"""

import gc
import math
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, gather_object
from safetensors import SafetensorError

from train_loop import files, versions
from train_loop.analysis.recorded import Recorded
from train_loop.analysis.step_statistics import StepStatistics
from train_loop.analysis.trial_step import evaluating
from train_loop.checkpoint import storage
from train_loop.checkpoint.restore import restore
from train_loop.config.load import check_config, shared_settings
from train_loop.config.parsing import override
from train_loop.config.schema import Config
from train_loop.console import Progress, say
from train_loop.data.loader import IGNORED
from train_loop.data.token_store import Prepared, TokenStore
from train_loop.data.tokenizer import strings
from train_loop.distributed.collectives import broadcast_from_main, run_on_all_ranks, sum_exactly
from train_loop.distributed.heartbeat import Heartbeat
from train_loop.errors import InputError, one_line
from train_loop.models.building import without_compile
from train_loop.models.parameters import tensors_once
from train_loop.ops import products
from train_loop.precision import PRECISIONS
from train_loop.records import plain
from train_loop.rng import seed_torch
from train_loop.training.schedule import learning_rate
from train_loop.training.state import Run, StepBatch
from train_loop.training.step import StepResult, train_step

_SURPRISING = 10
_CONTEXT = 12  # tokens shown before a surprising one
# Another value of one of these would mean another run, with nothing to compare.
_FIXED = ("data.", "tokenizer.", "model.name_or_path", "run.output_dir", "run.resume", "run.log_with")


class Replay:
    """A run's steps, counted from 1, replayed one by one; `set_up` makes a run from a configuration.

    Raises InputError if there is no such run or step, or it can't be replayed. `heartbeat` names a lost process.
    """

    def __init__(self, folder: Path, steps: Sequence[int], set_up: Callable[[Config, Heartbeat], Run]) -> None:
        self.recorded = Recorded(folder)
        self.folder = self.recorded.folder
        for step in steps:
            self.recorded.check_step(step)
        self.recorded.load()
        self.set_up = set_up
        self.config = self._settings()
        self.heartbeat = Heartbeat(self.config.run, shared_settings(self.config))
        self._run: Run | None = None
        self.at: int | None = None  # how many steps the state of `run` has finished; None if it can't go on
        self.from_step = 0  # of the checkpoint that the state came from

    @property
    def run(self) -> Run:
        """The run's parts, in the state that has been reached."""
        if self._run is None:
            self._run = self._built(self.config)
        return self._run

    def _settings(self) -> Config:
        if self.recorded.truth is not None:
            each = self.recorded.truth["processes"]["each"]
            own = each[min(int(os.environ.get("RANK", "0")), len(each) - 1)]
            torch.set_num_threads(int(own.get("threads", each[0]["threads"])))
        return self.recorded.settings()

    def _built(self, settings: Config) -> Run:
        """The run's parts, on the same data, with a folder of its own that is never created."""
        settings.run.resume, settings.run.log_with, settings.sample.prompts = "auto", [], []
        settings.study.every, settings.study.probe = None, None
        settings.run.output_dir = str(files.private(self.folder.path / "replayed"))
        run = self.set_up(settings, self.heartbeat)
        expected = self.recorded.fingerprint
        if run.data.fingerprint != expected:
            raise InputError(
                f"--run {self.folder.path}: was trained on other data (fingerprint {expected[:12]}, now "
                f"{run.data.fingerprint[:12]}): the documents or the tokenizer have changed since; put them back"
            )
        run.context.objective.train()
        return run

    def go_before(self, step: int) -> None:
        """Bring `run` to the state before a step; InputError if checkpoints before it are damaged and none is whole."""
        done, accelerator = step - 1, self.run.context.accelerator
        main = accelerator.is_main_process
        looked = run_on_all_ranks(accelerator, "look", lambda: self._newest(done) if main else (None, []))
        found, damaged = broadcast_from_main(accelerator, looked)
        if found is not None:
            self._load(found)
        if self.at is None or self.at > done:
            if damaged:
                raise InputError(f"no checkpoint before step {step} is whole ({'; '.join(damaged)})")
            if self.at is not None:
                self._run = None  # made anew when it is used
            self.at = self.from_step = 0
        with Progress("replaying", "step", done, self.at, main and done > self.at) as progress:
            while self.at < done:
                take(self.run)
                self.at += 1
                progress.update(1)

    def _newest(self, done: int) -> tuple[storage.CheckpointRef | None, list[str]]:
        """The newest whole checkpoint of at most `done` steps that is beyond the state, and what is wrong with others.

        None if there is no such checkpoint.
        """
        damaged: list[str] = []
        names = [each.name.removeprefix("step-") for each in self.folder.checkpoints.glob("step-*")]
        for known in sorted((int(name) for name in names if name.isdigit()), reverse=True):
            if known > done or (self.at is not None and known <= self.at <= done):
                continue
            found, problem = storage.of_step(self.folder.checkpoints, known)
            if found is not None:
                return found, damaged
            damaged.append(problem)
            say(f"{problem}; skipped")
        return None, damaged

    def _load(self, found: storage.CheckpointRef) -> None:
        state = self.run.state
        state.optimizer.state.clear()
        try:
            restore(self.run.context.accelerator, found, state.model, state.optimizer)
        except ValueError as error:
            raise InputError(f"{error}; model.name_or_path has changed since") from None
        except (OSError, SafetensorError) as error:  # a run that is still going removes old ones
            raise InputError(f"checkpoint {found.folder}: {one_line(error)}; try again") from None
        self.at = self.from_step = state.step = found.step

    def step(self, step: int) -> dict[str, Any]:
        """Replay a step, counted from 1; returns everything about it as plain values, see `inspected`."""
        self.go_before(step)
        found = inspected(self.run, step)
        self.at = step
        return found | {"from_step": self.from_step, "verification": self._verified(step, found["loss"])}

    def instead(self, step: int, changes: Sequence[str]) -> list[dict[str, Any]]:
        """A step as it was and as it would have been with other settings, from the same state.

        Changes are KEY=VALUE for keys of the configuration; dropout=0 turns off all kinds of dropout.
        """
        other, dropout = self._changed(changes)
        self.go_before(step)
        state = _state(self.run)
        first = self.step(step)
        if other.run.mixed_precision != self.config.run.mixed_precision:
            sharded = self.run.context.accelerator.is_fsdp2
            AcceleratorState._reset_state()
            if sharded:  # this says FSDP now, and Accelerate would take that for processes that it can't shard over
                PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        self._run = None
        gc.collect()
        self._run = self._built(other)
        self.at = None
        _put_back(self.run, state)
        self.run.state.step = step - 1
        self.run.context.objective.train(dropout)
        second = inspected(self.run, step)
        return [first, second | {"from_step": self.from_step, "set": list(changes), "verification": None}]

    def _changed(self, changes: Sequence[str]) -> tuple[Config, bool]:
        """The settings with changes, and whether dropout stays on."""
        other, dropout = self._settings(), True
        for change in changes:
            key, equals, text = change.partition("=")
            if not equals:
                raise InputError(f"--set {change}: give section.key=value, e.g. --set optimizer.learning_rate=1e-4")
            if key.startswith(_FIXED):
                raise InputError(f"--set {key}: would mean another run, not another version of this step")
            if key == "dropout":
                if text not in ("0", "0.0", "off", "false"):
                    raise InputError(f"--set dropout={text}: dropout can only be turned off, with dropout=0")
                dropout = False
            else:
                override(other, key, text)
        check_config(other)
        return other, dropout

    def _verified(self, step: int, loss: float | None) -> dict[str, Any] | None:
        """Whether the replayed loss equals the logged one, how far apart they are, and how this process differs.

        None if the log has no loss for this step.
        """
        logged, difference = self.recorded.steps.get(step, {}).get("loss", "none"), None
        if not isinstance(logged, int | float | None):
            return None
        if loss is not None and logged is not None:  # both finite
            difference = abs(loss / logged - 1) if logged else abs(loss)
        close = difference is not None and difference <= PRECISIONS[self.config.run.mixed_precision].same_loss
        verdict = "bits" if loss == logged else "rounding" if close else "different"
        return {"verdict": verdict, "logged": logged, "difference": difference, "kind": self._another_kind()}

    def _another_kind(self) -> list[str]:
        """How the run differs from this process, in words."""
        truth, kind = self.recorded.truth, list[str]()
        if truth is None:
            return kind
        sheet = truth["processes"]
        first = sheet["each"][0]
        accelerator = self.run.context.accelerator
        if sheet["present"] != accelerator.num_processes and self.config.run.reproducible != "bitwise":
            kind.append(f"{sheet['present']} process{'es' if sheet['present'] > 1 else ''}")
        if first["host"] != socket.gethostname():
            kind.append(f"host {first['host']}")
        device = accelerator.device
        if first["device"].split(":")[0] != device.type:
            kind.append(f"device {first['device']}")
        if truth.get("products", now_by := products.told(device)) != now_by:
            kind.append(f"products {products.in_words(truth['products'])}")
        now = versions.installed()
        kind += [f"{name} {then}" for name, then in truth["versions"].items() if now.get(name) != then]
        return kind


def inspected(run: Run, step: int) -> dict[str, Any]:
    """Take a step with a run that is in the state before it, and return everything about it.

    Returns:
        step, epoch, loss (as trained, dropout included), targets, learning_rate, grad_norm, clipped, taken;
        loss_before and loss_after: on the step's own windows, without dropout, before and after the update;
        sequences: each window's block, documents (name, offset in tokens, tokens), tokens (text) and their losses as
        trained (null for a token that is not predicted); surprising: the tokens with the highest losses; statistics:
        see `step_statistics.py`, null if the update was skipped.
    """
    seen: list[dict[str, Any]] = []
    watch = StepStatistics(run, 1, lambda event, number, values: seen.append(values))
    batch, rate = run.batches[step - 1], _rate(run, step - 1)
    sequences = _sequences(run.data, batch, run.batches.windows.block_size)
    losses = iter(_token_losses(run, batch))
    for each in sequences:
        each["losses"] = [None, *(next(losses) for _ in range(run.config.data.block_size))][: len(each["tokens"])]
    before = _loss(run, batch)
    watch.before_step(run.state, batch)
    result = train_step(run.context, run.state, batch, rate)
    watch.after_step(run.state, {"grad_norm": result.grad_norm, "skipped": not result.applied})
    limit = run.context.max_grad_norm
    found = {
        "step": step,
        "epoch": step / run.batches.plan.steps_per_epoch,
        "loss": result.loss,
        "targets": batch.targets,
        "learning_rate": rate,
        "grad_norm": result.grad_norm,
        "clipped": limit is not None and result.grad_norm > limit,
        "taken": result.applied,
        "loss_before": before,
        "loss_after": _loss(run, batch),
        "sequences": sequences,
        "surprising": _surprising(sequences),
        "statistics": seen[0] if seen else None,
    }
    return dict(plain(found))


def take(run: Run) -> StepResult:
    """Take the next step, as the loop does."""
    index = run.state.step
    return train_step(run.context, run.state, run.batches[index], _rate(run, index))


def _rate(run: Run, index: int) -> float:
    config = run.config
    return learning_rate(index, run.batches.total_steps, config.optimizer.learning_rate, config.schedule)


def _loss(run: Run, batch: StepBatch) -> float:
    """The mean loss on a step's windows, of all processes, without dropout."""
    nll = targets = 0.0
    with evaluating(run.context.objective):
        for each in batch.micro_batches:
            each = each.to(run.context.accelerator.device)
            found = run.context.objective(each.inputs, each.targets, each.positions, statistics=True)
            nll, targets = nll + float(found.nll), targets + int(found.targets)
    nll, targets = sum_exactly(run.context.accelerator, [[nll], [targets]])
    return nll / max(targets, 1)


@torch.no_grad()
def _token_losses(run: Run, batch: StepBatch) -> list[float | None]:
    """The loss at each position of a step's windows, in order, with the dropout masks of its training."""
    accelerator, size = run.context.accelerator, run.batches.plan.micro_batch_size
    device, found = accelerator.device, list[float | None]()
    own: list[tuple[int, list[float | None]]] = []  # of each of this process's micro-batches

    def visit(logits: torch.Tensor, targets: torch.Tensor) -> None:
        nll = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
        real = (targets != IGNORED).tolist()
        found.extend(loss if each else None for loss, each in zip(nll.tolist(), real, strict=True))

    with without_compile(run.state.model):
        for micro_batch in batch.micro_batches:
            seed_torch(device, "dropout", run.context.seed, batch.index, micro_batch.number)
            micro_batch = micro_batch.to(device)
            run.context.objective(micro_batch.inputs, micro_batch.targets, micro_batch.positions, visit=visit)
            windows = max(0, min(size, len(batch.blocks) - micro_batch.number * size))  # one past the end has none
            own.append((micro_batch.number, found[: windows * run.batches.windows.block_size]))
            found.clear()
    every = gather_object(own) if accelerator.num_processes > 1 else own
    return [loss for _, losses in sorted(every, key=lambda each: each[0]) for loss in losses]


def _sequences(data: Prepared, batch: StepBatch, size: int) -> list[dict[str, Any]]:
    """The windows of a step: where their tokens come from, and their text."""
    store, found = data.train, []
    for block in batch.blocks.tolist():
        first, end = block * size, min((block + 1) * size + 1, len(store))
        tokens = strings(data.tokenizer, store.tokens[first:end].tolist())
        found.append({"block": block, "documents": _documents(store, first, end), "tokens": tokens})
    return found


def _documents(store: TokenStore, first: int, end: int) -> list[dict[str, Any]]:
    """The documents that the tokens first..end-1 of a store belong to; offset counts tokens from a document's start."""
    ends, found = store.document_ends, []
    while first < end:
        name, offset = store.document_at(first)
        until = min(end, int(ends[ends.searchsorted(first, side="right")]))
        found.append({"name": name, "offset": offset, "tokens": until - first})
        first = until
    return found


def _surprising(sequences: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tokens with the highest losses, the text before them, and where they are."""
    places = [
        (loss, row, column)
        for row, each in enumerate(sequences)
        for column, loss in enumerate(each["losses"])
        if loss is not None and math.isfinite(loss)
    ]
    found = []
    for loss, row, column in sorted(places, reverse=True)[:_SURPRISING]:
        tokens = sequences[row]["tokens"]
        origins = [
            {"document": each["name"], "offset": each["offset"] + place}
            for each in sequences[row]["documents"]
            for place in range(each["tokens"])
        ]
        before = "".join(tokens[max(0, column - _CONTEXT) : column])
        found.append({"token": tokens[column], "loss": loss, "before": before} | origins[column])
    return found


def _state(run: Run) -> dict[str, Any]:
    """A copy of weights, moments and loss scale."""
    state, scaler = run.state.optimizer.state, run.context.accelerator.scaler
    tensors = tensors_once(run.state.model)
    held = {name: state[tensor] for name, tensor in tensors.items() if tensor in state}
    return {
        "weights": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "moments": {name: {key: each.clone() for key, each in moments.items()} for name, moments in held.items()},
        "loss_scale": None if scaler is None else scaler.state_dict(),
    }


@torch.no_grad()
def _put_back(run: Run, state: dict[str, Any]) -> None:
    """Put weights, moments and loss scale, as `_state` copied them, into a run."""
    tensors = tensors_once(run.state.model)
    shapes = {name: tensor.shape for name, tensor in state["weights"].items()}
    if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
        raise InputError("--set: makes another model, and the run's weights don't fit it")
    for name, tensor in tensors.items():
        tensor.copy_(state["weights"][name])
    run.state.optimizer.state.clear()
    for name, moments in state["moments"].items():
        run.state.optimizer.state[tensors[name]] = moments
    if run.context.accelerator.scaler is not None and state["loss_scale"] is not None:
        run.context.accelerator.scaler.load_state_dict(state["loss_scale"])
