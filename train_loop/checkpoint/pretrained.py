"""Load models with their tokenizers: from a model folder, the Hub, a run, or one of its checkpoints."""

import re
from pathlib import Path
from typing import TypeAlias

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from train_loop import trust
from train_loop.checkpoint import storage
from train_loop.checkpoint.run_folder import RunFolder
from train_loop.config import paths
from train_loop.data import tokenizer
from train_loop.errors import InputError, one_line
from train_loop.models import ends, loading
from train_loop.models.initialization import Place, Weights, initialise, on_meta
from train_loop.models.parameters import tensors_once
from train_loop.models.size import check_size

Loaded: TypeAlias = tuple[PreTrainedModel, PreTrainedTokenizerFast, Weights | None]
"""A model in fp32, its tokenizer, and what gives the model its weights if it is on torch's meta device."""


def load(name: str, attention: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A model in fp32 on the CPU, and its tokenizer; InputError if there is none.

    `name` is a model's folder, a name on the Hub, a run's folder (which gives its exported model or, as long as there
    is none, its newest checkpoint), or a checkpoint's folder. Without `attention`, Transformers chooses its
    implementation.
    """
    model, its_tokenizer, _ = _load(name, attention, in_shards=False)
    return model, its_tokenizer


def outline(name: str, attention: str | None = None) -> Loaded:
    """Like `load`, but the model is to be sharded before it gets its weights."""
    return _load(name, attention, in_shards=True)


def _load(name: str, attention: str | None, in_shards: bool) -> Loaded:
    path = Path(name)
    if re.fullmatch(r"step-\d{8,}", path.name) and path.absolute().parent.name == "checkpoints":
        step = int(path.name.removeprefix("step-"))
        return _from_run(RunFolder(path.absolute().parent.parent), step, attention, in_shards)
    run = RunFolder(path)
    if (path / "config.yaml").is_file() and not (path / "config.json").exists():
        if not run.model.exists():
            return _from_run(run, None, attention, in_shards)
        name = str(run.model)
    name = paths.find(name, "model")
    if in_shards:
        model, weights = loading.outline_of(name, attention)
        return model, tokenizer.load(name), weights
    return loading.load(name, attention), tokenizer.load(name), None


def _from_run(run: RunFolder, step: int | None, attention: str | None, in_shards: bool) -> Loaded:
    """The model with the weights of a step, or of the newest whole checkpoint."""
    for _ in range(3):  # a run that is still training may remove what was just found
        if step is None:
            found, damaged = storage.newest(run.checkpoints)
            problem = "; ".join(damaged.values()) or f"run {run.path}: has no checkpoint yet; wait for the first one"
        else:
            found, problem = storage.of_step(run.checkpoints, step)
        if found is None:
            raise InputError(problem)
        built = _untrained(run, attention).eval()
        ends.restore(built, run.architecture)
        if in_shards:
            return built, tokenizer.load(str(run.architecture)), _weights(run, found, built, attention)
        initialise(built, 0)  # for the buffers that are in no file
        try:
            storage.load_weights(found, built)
        except (OSError, SafetensorError):
            continue
        except ValueError:
            raise InputError(_another(run, found)) from None
        loading.check_finite(built, f"checkpoint {found.folder}")
        return built, tokenizer.load(str(run.architecture)), None
    raise InputError(f"run {run.path}: new checkpoints replace old ones faster than they can be read; try again")


def _weights(run: RunFolder, found: storage.CheckpointRef, model: PreTrainedModel, attention: str | None) -> Weights:
    """What gives a model the weights of a checkpoint."""
    config, names = model.config, {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors_once(model).items()}

    def weights(place: Place) -> None:
        placing = loading.Placing(place, f"checkpoint {found.folder}")
        saved = storage.opened(found)
        if saved.shapes != shapes:
            raise InputError(_another(run, found))
        for name in saved.shapes:
            placing.take(name, saved.read(name))
        placing.refuse_infinite()
        initialise(on_meta(config, attention), 0, place, only=names - saved.shapes.keys())

    return weights


def _another(run: RunFolder, found: storage.CheckpointRef) -> str:
    """The error message for a checkpoint whose weights are not those of the run's architecture."""
    problem = f"{found.folder} holds another model's weights"
    return f"run {run.path}: {problem}: they don't fit {run.architecture.name}/config.json"


def _untrained(run: RunFolder, attention: str | None) -> PreTrainedModel:
    """The model that a run's architecture/ describes, on torch's meta device."""
    where = f"run {run.path}"
    if not run.architecture.is_dir():
        raise InputError(f"{where}: has no {run.architecture.name}; start the run again to write it")
    try:
        trust.check_model(str(run.architecture))
        config = loading.configuration(str(run.architecture), where)
        check_size(config, where)
        built = on_meta(config, attention)
    except Exception as error:  # whatever a library raises if values don't fit together
        cure = f"remove {run.architecture}, and start the run again to write it"
        raise InputError(f"{where}: {run.architecture.name} is damaged ({one_line(error)}); {cure}") from None
    return built
