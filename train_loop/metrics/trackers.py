"""Accelerate's trackers (TensorBoard, Weights & Biases, ...), resumed so that no step appears in them twice."""

import hashlib
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from train_loop.config.parsing import nearest
from train_loop.errors import InputError


def start_trackers(accelerator: Accelerator, run: Path, step: int, settings: dict[str, Any]) -> None:
    """Let Accelerate's trackers continue after a step, if they can, so that no step appears in them twice.

    TensorBoard drops what it has of later steps. Weights & Biases continues the same run and keeps what it has.
    `settings` are flat, plain values, for trackers that show them.
    """
    identity = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
    wandb = {"id": identity, "name": run.name, "resume": "allow"}
    options = {"tensorboard": {"purge_step": step + 1}, "wandb": wandb}
    accelerator.init_trackers("train_loop", config=settings, init_kwargs=options)


def check_trackers(names: list[str]) -> None:
    """Refuse trackers that Accelerate would silently leave out: InputError if one is unknown or not installed."""
    available = {str(each) for each in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise InputError(f"run.log_with: no tracker {name}; {nearest(name, sorted(LOGGER_TYPE_TO_CLASS))}")
        if name not in available:
            raise InputError(f"run.log_with: {name} is not installed; pip install {name}")
