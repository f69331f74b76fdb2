"""Durable checkpoints of the one state there is: weights, optimizer moments, step.

    checkpoints/step-00000100/
        model.safetensors       weights, each once (a tied one under its first name)
        optimizer.safetensors   per parameter: exp_avg, exp_avg_sq, and the number of its updates
        state.json              step, fingerprint of the data, versions
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


def save(
    folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer | AcceleratedOptimizer, state: dict[str, Any]
) -> Path:
    """Write a checkpoint below `folder`, whole or not at all.

    Args:
        folder: the run's `checkpoints`.
        model: unwrapped, so that its names are those of an exported model.
        optimizer: AdamW over the same parameters.
        state: plain values; "step" names the checkpoint.

    Returns:
        Where it is.
    """
    final = folder / f"{_PREFIX}{state['step']:08d}"
    temporary = folder / f"tmp-{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(_weights(model), temporary / "model.safetensors")
    save_file(_moments(model, optimizer), temporary / "optimizer.safetensors")
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
    parameters = dict(model.named_parameters())
    weights = load_file(found.folder / "model.safetensors")
    moments = load_file(found.folder / "optimizer.safetensors")
    expected = {name: tensor.shape for name, tensor in _weights(model).items()}
    if expected != {name: tensor.shape for name, tensor in weights.items()}:
        raise ValueError(f"{found.folder} holds another model's weights")
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in weights:
                tensor.copy_(weights[name])
    state = _inner(optimizer).state
    for name, parameter in parameters.items():
        if f"{name}.exp_avg" in moments:
            exp_avg, exp_avg_sq, step = (moments[f"{name}.{moment}"] for moment in _MOMENTS)
            device = parameter.device
            # Fused AdamW counts its updates in a tensor beside the parameter.
            state[parameter] = {
                "step": step.reshape(()).to(device),
                "exp_avg": exp_avg.to(device),
                "exp_avg_sq": exp_avg_sq.to(device),
            }


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, those that share memory once."""
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.contiguous()
    return tensors


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer | AcceleratedOptimizer) -> dict[str, torch.Tensor]:
    state = _inner(optimizer).state
    return {
        f"{name}.{moment}": state[parameter][moment].reshape(-1 if moment == "step" else parameter.shape)
        for name, parameter in model.named_parameters()
        if parameter in state
        for moment in _MOMENTS
    }


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
