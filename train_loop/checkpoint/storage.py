"""Durable checkpoints of the only state that a run has: weights, optimizer moments, step.

    checkpoints/step-00000100/
        model-00001-of-00002.safetensors       weights, each once (a tied one under its first name)
        optimizer-00001-of-00002.safetensors   per parameter: exp_avg, exp_avg_sq, and the number of its updates
        state.json                             step, data, configuration, processes, versions
        manifest.json                          size and SHA-256 of every file above, and of itself; written last

A single process, or several with DDP, write one part. If FSDP2 shards the state, each process writes the rows that it
holds, so no process ever gathers the whole; "rows" in a file's header says where they belong. A process that reads
takes the rows it needs out of the parts, so a checkpoint fits any number of processes, sharded or not.

A checkpoint is written into a private folder, synced, completed by the manifest and renamed. Only then are older ones
removed. Damaged checkpoints are named and skipped. Nothing is pickled, so reading a checkpoint cannot run any code.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from train_loop import files
from train_loop.checkpoint import tensor_file
from train_loop.files import sync
from train_loop.models.parameters import tensors_once
from train_loop.records import to_json

Optimizer: TypeAlias = torch.optim.Optimizer | AcceleratedOptimizer
Checksums = dict[str, dict[str, Any]]
"""Sizes and checksums of files: {name: {"bytes", "sha256"}}."""

KINDS = ("model", "optimizer")
_PREFIX = "step-"
_NAME = re.compile(r"step-\d{8,}")
_OLD_TEMPORARY = re.compile(r"tmp-(removed-)?step-\d{8,}")  # as 0.1.0 named what it had not finished
_FILE = re.compile(r"(model|optimizer)-\d{5}-of-\d{5}\.safetensors|state\.json|manifest\.json")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_MOST_SEEN_BYTES = 1 << 26  # of mapped files


class Shard(NamedTuple):
    """What a process holds of a tensor: some of its rows (all of them, unless it is sharded).

    values [rows, ...]; first: number of the first row; of: rows of the whole tensor, None if these are all of them.
    """

    values: torch.Tensor
    first: int = 0
    of: int | None = None


Shards = dict[str, dict[str, Shard]]
"""What a process writes: {"model": {name: shard}, "optimizer": {name: shard}}."""


@dataclass(frozen=True)
class CheckpointRef:
    """A whole checkpoint on disk: its folder and its state.json."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """The number of optimizer steps that led to it."""
        return int(self.state["step"])


def shards(model: nn.Module, optimizer: Optimizer, main: bool = True) -> Shards:
    """What this process has to write of the state; `main` writes what all processes hold. Nothing is copied or sent."""
    state = _inner(optimizer).state
    weights = tensors_once(model)
    moments: dict[str, torch.Tensor] = {}
    for name, parameter in weights.items():
        if parameter in state:
            moments |= {f"{name}.{moment}": state[parameter][moment] for moment in _MOMENTS}
            moments[f"{name}.step"] = state[parameter]["step"].reshape(1)  # the number of updates
    found: Shards = {"model": {}, "optimizer": {}}
    for kind, tensors in (("model", weights), ("optimizer", moments)):
        for name, tensor in tensors.items():
            piece = _shard(tensor.detach())
            if main if piece.of is None else _first_copy(tensor) and len(piece.values):
                found[kind][name] = piece
    return found


def write_part(folder: Path, part: int, parts: int, held: Shards) -> Checksums:
    """Write what one process holds as part number `part`, from 0, of `parts`, and sync it to disk."""
    folder.mkdir(parents=True, exist_ok=True)
    sums: Checksums = {}
    for kind in KINDS:
        rows = {name: [piece.first, piece.of] for name, piece in held[kind].items() if piece.of is not None}
        path = folder / _part_name(kind, part, parts)
        path.unlink(missing_ok=True)  # of an attempt that failed
        tensor_file.write(path, {name: piece.values for name, piece in held[kind].items()}, {"rows": json.dumps(rows)})
        files.share(path)
        sync(path)
        sums[path.name] = _sums(path)
    return sums


def commit(temporary: Path, state: dict[str, Any], sums: Checksums) -> Path:
    """Turn the private folder with all parts in it into the checkpoint beside it; OSError if a part is missing.

    In `state`, which holds plain values, "step" names the checkpoint and "parts" says how many there are.
    """
    final = folder_of(temporary.parent, state["step"])
    for name, expected in sums.items():
        if not (temporary / name).is_file() or (temporary / name).stat().st_size != expected["bytes"]:
            raise OSError(f"{name} is missing here; run.output_dir has to be on a disk that all hosts share")
    _write_json(temporary / "state.json", state)
    all_sums = sums | {"state.json": _sums(temporary / "state.json")}
    _write_json(temporary / "manifest.json", {"files": all_sums, "sha256": _digest(all_sums)})
    sync(temporary)
    files.replace(temporary, final)  # in place of a damaged one that was skipped
    return final


def folder_of(folder: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return folder / f"{_PREFIX}{step:08d}"


def state_of(checkpoint: Path) -> dict[str, Any]:
    """What state.json of a checkpoint holds; nothing if it is damaged."""
    try:
        return dict(json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def clear(folder: Path) -> None:
    """Remove what a killed process left half written or half removed. Only the run that owns the folder may do that."""
    files.clear(folder)
    for stale in folder.glob("tmp-*"):
        if _OLD_TEMPORARY.fullmatch(stale.name) and stale.is_dir() and not stale.is_symlink():
            if all(_FILE.fullmatch(each.name) for each in stale.iterdir()):
                files.remove(stale)


def prune(
    folder: Path, keep: int, step: int, protected_steps: Collection[int] = (), damaged: Collection[int] = ()
) -> None:
    """Remove all but the newest `keep` checkpoints of this run's past, which ends at `step`.

    Later checkpoints are not part of it; they are replaced when their step comes. Those of `protected_steps` stay as
    well, and those that were made for study; damaged ones are removed and don't count.
    """
    past = []
    for each in newest_first(folder):
        if _step_of(each) in damaged:
            _remove(each)
        elif _step_of(each) <= step:
            past.append(each)
    for old in past[keep:]:
        if _step_of(old) not in protected_steps and not state_of(old).get("for_study"):
            _remove(old)


def newest(folder: Path) -> tuple[CheckpointRef | None, dict[int, str]]:
    """The newest whole checkpoint, and what is wrong with each later one, by step."""
    passed: dict[int, str] = {}
    for candidate in newest_first(folder):
        if (damage := find_damage(candidate)) is None:
            return _found(candidate), passed
        passed[_step_of(candidate)] = f"checkpoint {candidate}: {damage}"
    return None, passed


def of_step(folder: Path, step: int) -> tuple[CheckpointRef | None, str]:
    """The checkpoint of a step if it is whole, otherwise what is wrong with it."""
    candidate = folder_of(folder, step)
    damage = find_damage(candidate) if candidate.is_dir() else "does not exist"
    return (_found(candidate), "") if damage is None else (None, f"checkpoint {candidate}: {damage}")


def find_damage(folder: Path) -> str | None:
    """The first thing that is wrong with a checkpoint, checked file by file; None if it is whole."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        listed = manifest["files"]
        if manifest["sha256"] != _digest(listed):
            return "manifest.json has changed since it was written (its checksum differs)"
        for name, expected in listed.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, expected {expected['bytes']}"
            if _sums(path) != expected:
                return f"{name} has changed since it was written (its checksum differs)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "manifest.json is missing or damaged"
    # The files that a manifest lists may still not be what their names say.
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        step, parts = _whole_number(state["step"], 0), _whole_number(state["parts"], 1)
        _whole_number(state.get("micro_batch_size", 1), 1)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "state.json is not the state of a run"
    if _NAME.fullmatch(folder.name) and step != _step_of(folder):
        return f"state.json is that of step {step}"
    for kind, part in ((kind, part) for kind in KINDS for part in range(parts)):
        if (name := _part_name(kind, part, parts)) not in listed:
            return f"manifest.json does not list {name}"
        try:
            with safe_open(folder / name, "pt") as file:
                json.loads((file.metadata() or {})["rows"])
                counts = [each for each in file.keys() if kind == "optimizer" and each.endswith(".step")]
                if counts and (updates := int(file.get_tensor(counts[0]).max())) > step:
                    return f"{name} is that of step {updates} or later"
        except (SafetensorError, ValueError, KeyError, RecursionError):
            return f"{name} is not a safetensors file"
    return None


def _whole_number(value: Any, least: int) -> int:
    if type(value) is not int or value < least:
        raise ValueError
    return int(value)


def load(found: CheckpointRef, model: nn.Module, optimizer: Optimizer) -> None:
    """Load a checkpoint's weights and moments, each process the rows it holds; ValueError if it is another model's."""
    load_weights(found, model)
    state = _inner(optimizer).state
    moments = opened(found, "optimizer")
    for name, parameter in tensors_once(model).items():
        if f"{name}.step" not in moments.shapes:
            continue
        # Fused AdamW counts its updates in a tensor on the parameter's device.
        state[parameter] = {"step": moments.read(f"{name}.step").reshape(()).to(parameter.device)}
        for moment in _MOMENTS:
            state[parameter][moment] = torch.zeros_like(parameter.detach())
            moments.read_into(state[parameter][moment], f"{name}.{moment}")


def load_weights(found: CheckpointRef, model: nn.Module) -> None:
    """Load a checkpoint's weights into a model; see `load`."""
    parts = opened(found)
    if {name: tuple(tensor.shape) for name, tensor in tensors_once(model).items()} != parts.shapes:
        raise ValueError(f"{found.folder} holds another model's weights")
    for name, tensor in tensors_once(model).items():
        parts.read_into(tensor.detach(), name)


def in_memory(model: nn.Module, optimizer: Optimizer | None, with_moments: bool) -> Iterator[torch.Tensor]:
    """An unsharded model's weights and, if asked for, AdamW's state: each once, in an order that the model decides."""
    weights = tensors_once(model)
    yield from (weight.detach() for weight in weights.values())
    if optimizer is None or not with_moments:
        return
    state = _inner(optimizer).state
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for parameter in (weight for weight in weights.values() if id(weight) in trained):
        if parameter not in state:
            state[parameter] = {moment: torch.zeros_like(parameter.detach()) for moment in _MOMENTS}
            state[parameter]["step"] = torch.zeros((), device=parameter.device)
        yield from (state[parameter][name] for name in ("step", *_MOMENTS))


def tensors(found: CheckpointRef, kind: str = "model") -> dict[str, torch.Tensor]:
    """All weights (or, for kind "optimizer", all moments) by name, as whole tensors on the CPU; tied ones once."""
    parts = opened(found, kind)
    return {name: parts.read(name) for name in parts.shapes}


class Parts:
    """The tensors of one kind, assembled from the files of all parts.

    Files are mapped, not read: what is looked at stays in memory until they are closed, which is done now and then.

    Attributes:
        shapes: of all tensors, by name.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._where: dict[str, list[tuple[int, int | None, Path]]] = {}  # first row, end, file
        self._open: dict[Path, Any] = {}
        self._seen_bytes = 0  # since files were last closed
        for path in paths:
            file = self._file(path)
            rows = json.loads((file.metadata() or {}).get("rows", "{}"))
            for name in file.keys():
                shape = tuple(file.get_slice(name).get_shape())
                first, of = rows.get(name, (0, None))
                self.shapes[name] = shape if of is None else (of, *shape[1:])
                self._where.setdefault(name, []).append((first, None if of is None else first + shape[0], path))

    def read(self, name: str, first: int = 0, end: int | None = None) -> torch.Tensor:
        """Rows `first` to `end` of a tensor; without an end, all rows."""
        if self._seen_bytes > _MOST_SEEN_BYTES:
            self._open, self._seen_bytes = {}, 0
        where = self._where[name]
        if where[0][1] is None:  # in one piece
            whole = self._file(where[0][2]).get_tensor(name)
            found = whole if end is None else whole[first:end]
        else:
            end = self.shapes[name][0] if end is None else end
            rows = [
                self._file(path).get_slice(name)[max(first, begins) - begins : min(end, ends) - begins]
                for begins, ends, path in sorted(where, key=lambda each: each[0])
                if begins < end and ends is not None and first < ends
            ]
            found = rows[0] if len(rows) == 1 else torch.cat(rows)
        self._seen_bytes += found.nbytes
        return found

    def read_into(self, tensor: torch.Tensor, name: str) -> None:
        """Fill a tensor, or the rows of it that this process holds."""
        piece = _shard(tensor)
        if piece.of is None:
            piece.values.copy_(self.read(name))
        elif len(piece.values):
            piece.values.copy_(self.read(name, piece.first, piece.first + len(piece.values)))

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = safe_open(path, "pt")
        return self._open[path]


def opened(found: CheckpointRef, kind: str = "model") -> Parts:
    """The tensors of one kind ("model" or "optimizer") of a checkpoint."""
    parts = found.state["parts"]
    return Parts([found.folder / _part_name(kind, part, parts) for part in range(parts)])


def _shard(tensor: torch.Tensor) -> Shard:
    """What this process holds of a tensor; FSDP2 shards along rows."""
    if not isinstance(tensor, DTensor):
        return Shard(tensor)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    assert tuple(shape[1:]) == tuple(tensor.shape[1:]), "sharded along a dimension other than rows"
    return Shard(tensor.to_local(), offset[0], len(tensor))


def _first_copy(tensor: torch.Tensor) -> bool:
    """Whether this process is the first of those that hold the same rows (with hybrid sharding, several do)."""
    assert isinstance(tensor, DTensor)
    places = zip(tensor.device_mesh.get_coordinate() or [], tensor.placements, strict=True)
    return not any(place for place, kind in places if isinstance(kind, Replicate))


def _inner(optimizer: Optimizer) -> torch.optim.Optimizer:
    """The optimizer without Accelerate's wrapper."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def _found(folder: Path) -> CheckpointRef:
    """The reference to the checkpoint in a folder."""
    return CheckpointRef(folder, json.loads((folder / "state.json").read_text(encoding="utf-8")))


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(_PREFIX))


def newest_first(folder: Path) -> list[Path]:
    """The folders of all checkpoints, damaged ones too."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=_step_of, reverse=True)


def _remove(folder: Path) -> None:
    """Remove a checkpoint. It disappears in one go, so no reader ever sees half of it."""
    hidden = files.private(folder)
    os.rename(folder, hidden)
    files.remove(hidden)


def _part_name(kind: str, part: int, parts: int) -> str:
    return f"{kind}-{part + 1:05d}-of-{parts:05d}.safetensors"


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.unlink(missing_ok=True)  # of an attempt that failed
    files.create(path, to_json(values, indent=2) + "\n")


def _digest(files: Checksums) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _sums(path: Path) -> dict[str, Any]:
    """A file's size and checksum."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
