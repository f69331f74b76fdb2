"""Durable checkpoints of the one state there is: weights, optimizer moments, step.

    checkpoints/step-00000100/
        model.safetensors       weights, each once (a tied one under its first name)
        optimizer.safetensors   per parameter: exp_avg, exp_avg_sq, and the number of its updates
        state.json              step, fingerprint of the data, processes, scale of an fp16 loss, versions
        manifest.json           size and SHA-256 of every file above; written last

Written into a temporary folder, synced, completed by the manifest, renamed; only then are older ones removed. What is
damaged is named and passed over. Nothing is pickled: to read a checkpoint can run no code.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from train_loop.data.store import sync

_PREFIX = "step-"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Found:
    """A whole checkpoint on disk: its folder and its state.json."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps that it holds."""
        return int(self.state["step"])


Tensors = dict[str, torch.Tensor]


def collect(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer | AcceleratedOptimizer, keep: bool = True
) -> tuple[Tensors, Tensors]:
    """Weights and moments by name, whole. Where they are sharded, all processes must call this.

    Args:
        model: unwrapped, so that its names are those of an exported model.
        optimizer: AdamW over the same parameters.
        keep: whether this process wants them; else it only lends its shards, and gets nothing.
    """
    return weights_of(model, keep), _moments(model, optimizer, keep)


def save(folder: Path, weights: Tensors, moments: Tensors, state: dict[str, Any]) -> Path:
    """Write a checkpoint below `folder`, whole or not at all.

    Args:
        folder: the run's `checkpoints`.
        weights, moments: from `collect`.
        state: plain values; "step" names the checkpoint.

    Returns:
        Where it is.
    """
    final = folder / f"{_PREFIX}{state['step']:08d}"
    temporary = folder / f"tmp-{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(weights, temporary / "model.safetensors")
    save_file(moments, temporary / "optimizer.safetensors")
    (temporary / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    manifest = {path.name: _sums(path) for path in sorted(temporary.iterdir())}
    for path in temporary.iterdir():
        sync(path)
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    sync(temporary / "manifest.json")
    sync(temporary)
    if final.exists():
        shutil.rmtree(final)
    os.rename(temporary, final)
    sync(folder)
    return final


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what a killed process left half written."""
    for stale in [*_newest_first(folder)[keep:], *folder.glob("tmp-*")]:
        shutil.rmtree(stale, ignore_errors=True)


def newest(folder: Path) -> tuple[Found | None, list[str]]:
    """The newest whole checkpoint, and a line about each damaged one that was passed over."""
    passed: list[str] = []
    for candidate in _newest_first(folder):
        if (damage := find_damage(candidate)) is None:
            return Found(candidate, json.loads((candidate / "state.json").read_text(encoding="utf-8"))), passed
        passed.append(f"checkpoint {candidate}: {damage}; passed over")
    return None, passed


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, file by file; None when it is whole."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, expected {expected['bytes']}"
            if _sums(path) != expected:
                return f"{name} has another checksum than when it was written"
        missing = {"model.safetensors", "optimizer.safetensors", "state.json"} - manifest.keys()
        return f"manifest.json does not list {', '.join(sorted(missing))}" if missing else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is missing or damaged"


def load(found: Found, model: PreTrainedModel, optimizer: torch.optim.Optimizer | AcceleratedOptimizer) -> None:
    """Put a checkpoint's weights and moments into a model and its optimizer.

    Raises:
        ValueError: when it belongs to another model; nothing was changed then.
    """
    weights = load_file(found.folder / "model.safetensors")
    moments = load_file(found.folder / "optimizer.safetensors")
    expected = {name: tensor.shape for name, tensor in _once(model).items()}
    if expected != {name: tensor.shape for name, tensor in weights.items()}:
        raise ValueError(f"{found.folder} holds another model's weights")
    with torch.no_grad():
        for name, tensor in _once(model).items():
            tensor.copy_(_like(tensor, weights[name]))
    state = _inner(optimizer).state
    for name, parameter in model.named_parameters():
        if f"{name}.exp_avg" in moments:
            exp_avg, exp_avg_sq, step = (moments[f"{name}.{moment}"] for moment in _MOMENTS)
            # Fused AdamW counts its updates in a tensor beside the parameter.
            state[parameter] = {
                "step": step.reshape(()).to(parameter.device),
                "exp_avg": _like(parameter, exp_avg),
                "exp_avg_sq": _like(parameter, exp_avg_sq),
            }


def weights_of(model: nn.Module, keep: bool = True) -> Tensors:
    """Parameters and buffers by name, whole, those that share memory once; see `collect`."""
    return _whole(_once(model), keep)


def _once(model: nn.Module) -> Tensors:
    """Parameters and buffers by name, those that share memory under their first."""
    tensors: Tensors = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        memory = id(tensor) if isinstance(tensor, DTensor) else tensor.data_ptr()
        if memory not in seen or tensor.numel() == 0:
            seen.add(memory)
            tensors[name] = tensor
    return tensors


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer | AcceleratedOptimizer, keep: bool) -> Tensors:
    state = _inner(optimizer).state
    return _whole(
        {
            f"{name}.{moment}": state[parameter][moment].reshape(1) if moment == "step" else state[parameter][moment]
            for name, parameter in model.named_parameters()
            if parameter in state
            for moment in _MOMENTS
        },
        keep,
    )


def _whole(tensors: Tensors, keep: bool) -> Tensors:
    """Tensors without their shards' boundaries, on the CPU where they had such."""
    kept: Tensors = {}
    for name, tensor in tensors.items():
        full = tensor.detach()
        if isinstance(full, DTensor):
            full = full.full_tensor()
            full = full.cpu() if keep else full
        if keep:
            kept[name] = full.contiguous()
    return kept


def _like(tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Values on the device, and with the sharding, of a tensor."""
    values = values.to(tensor.device)
    if isinstance(tensor, DTensor):  # every process has read all values and takes its own
        return distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)
    return values


def _inner(optimizer: torch.optim.Optimizer | AcceleratedOptimizer) -> torch.optim.Optimizer:
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def _newest_first(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob(f"{_PREFIX}*") if path.is_dir()), reverse=True)


def _sums(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def versions() -> dict[str, str]:
    """Versions of the libraries that decide what a run computes."""
    import accelerate
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "safetensors": safetensors.__version__,
    }
