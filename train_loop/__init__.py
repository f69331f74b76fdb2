"""train_loop: a causal-language-model training loop to read, to trust and to run anywhere.

The one idea: the state of a run is (weights, optimizer moments, step). Everything else (the order of
the data, the dropout masks, the learning rate) is a pure function of (configuration, seed, step).

Where to start reading: `training/loop.py` (the run on one screen), `training/step.py` (one optimizer step on another),
`data/order.py` (which tokens a step sees), `training/objective.py` (the loss).

The names in `__all__` are public, and are imported when they are first used; everything else is private.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from train_loop import environment

environment.let_openblas_rest()

_HOMES = {
    "__version__": "versions",
    "Config": "config.schema",
    "load_config": "config.load",
    "Documents": "data.documents",
    "prepare": "data.documents",
    "train": "job",
    "evaluate": "job",
    "Summary": "job",
    "Sampler": "generation.sampler",
    "Sampling": "config.sampling",
    "TrainState": "training.state",
    "StepBatch": "training.state",
    "Observer": "training.state",
    "InputError": "errors",
    "TrainingError": "errors",
}

if TYPE_CHECKING:  # what `__getattr__` finds, for tools that read code and do not run it
    from train_loop.config.load import load_config
    from train_loop.config.sampling import Sampling
    from train_loop.config.schema import Config
    from train_loop.data.documents import Documents, prepare
    from train_loop.errors import InputError, TrainingError
    from train_loop.generation.sampler import Sampler
    from train_loop.job import Summary, evaluate, train
    from train_loop.training.state import Observer, StepBatch, TrainState
    from train_loop.versions import __version__

__all__ = [
    "Config",
    "Documents",
    "InputError",
    "Observer",
    "Sampler",
    "Sampling",
    "StepBatch",
    "Summary",
    "TrainState",
    "TrainingError",
    "__version__",
    "evaluate",
    "load_config",
    "prepare",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module train_loop has no attribute {name}")
    return getattr(import_module(f"train_loop.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
