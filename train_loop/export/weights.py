"""Writes a checkpoint's weights as `save_pretrained` of Transformers does, but with one tensor in memory at a time.

    names and shapes -> names, shapes and files of what will be written          without any values
    for each tensor, or one layer's experts:
        a checkpoint's parts -> tensor -> as Transformers writes it -> its place in its file

Transformers renames some weights and takes others apart when it saves them (experts that it has merged), and Hugging
Face's library says which goes into which file. Both are asked first, with tensors that have shapes, but no memory. So
every tensor's place is known before the first is read, and nothing has to be kept for later.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from train_loop.checkpoint import tensor_file
from train_loop.checkpoint.storage import Parts
from train_loop.config.parsing import bytes_of
from train_loop.models.parameters import tensors_once
from train_loop.signals import StopRequest

INDEX = "model.safetensors.index.json"

_LAYER = re.compile(r".*?\.\d+\.")


class Written(NamedTuple):
    """What was written, in SHA-256 of tensors' bytes.

    weights: by the names that tensors have in the model, as they were read; files: by file, and by the names in it.
    """

    weights: dict[str, str]
    files: dict[str, dict[str, str]]


def write(folder: Path, model: PreTrainedModel, parts: Parts, size: str, stop: StopRequest) -> Written | None:
    """Write the weights into a folder, in files of at most `size` unless a tensor is larger; None if asked to stop.

    Args:
        model: its weights' shapes are used, and how Transformers saves it; its weights may be anywhere.
        parts: the weights, by name, tied ones once. Their values are written.
    """
    # Tensors that hold nothing, like the weights.
    empty = {name: torch.empty(each.shape, dtype=each.dtype, device="meta") for name, each in _saved(model).items()}
    made, renamed, groups = _conversion(model, empty)
    split = split_state_dict_into_shards_factory(
        made,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=bytes_of(size),
    )
    places: dict[str, tuple[Path, int]] = {}
    for file, names in split.filename_to_tensors.items():
        firsts = tensor_file.begin(folder / file, {name: made[name] for name in names}, {"format": "pt"})
        places |= {name: (folder / file, first) for name, first in firsts.items()}
    if split.is_sharded:
        total = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": total, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    found = Written({}, {file: {} for file in split.filename_to_tensors})

    def move(group: list[str]) -> None:
        tensors = {name: parts.read(name) for name in group}
        found.weights.update({name: _sha256(tensor) for name, tensor in tensors.items()})
        alone = renamed.get(group[0])
        for name, tensor in ({alone: tensors.pop(group[0])} if alone else _reverted(model, tensors)).items():
            path, first = places[name]
            tensor = tensor.contiguous()
            found.files[path.name][name] = found.weights[group[0]] if alone else _sha256(tensor)
            with open(path, "r+b") as file:
                file.seek(first)
                file.write(tensor_file.bytes_of(tensor))

    for group in groups:
        if stop.asked:
            return None
        move(group)
    # What Transformers does not save, since it makes it anew, has to be right as well.
    found.weights.update({name: _sha256(parts.read(name)) for name in parts.shapes.keys() - empty.keys()})
    return found


def _saved(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights that Transformers saves; tied ones once."""
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    return {name: tensor for name, tensor in tensors_once(model).items() if name not in ignored}


def _conversion(
    model: PreTrainedModel, empty: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, str], list[list[str]]]:
    """What becomes of a model's weights when they are saved.

    Returns:
        the tensors as they will be, by name, without values; the new names of those that are only renamed; and groups
        of names, each of which can be converted by itself: a tensor alone, or else what is in one layer.
    """
    made = revert_weight_conversion(model, dict(empty))
    names = {id(tensor): name for name, tensor in made.items()}
    renamed = {name: names[id(tensor)] for name, tensor in empty.items() if id(tensor) in names}
    rest = [name for name in empty if name not in renamed]
    expected = {name: each.shape for name, each in made.items() if name not in renamed.values()}
    groups: list[list[str]] = []
    for key in (lambda name: name, _layer, lambda name: ""):
        groups = _grouped(rest, key)
        try:
            made_of_each = [revert_weight_conversion(model, {name: empty[name] for name in group}) for group in groups]
        except Exception:  # whatever the library raises if a part of what it puts together is missing
            continue
        pairs = sorted((name, each.shape) for found in made_of_each for name, each in found.items())
        if pairs == sorted(expected.items()):
            break
    order = {name: number for number, name in enumerate(empty)}
    return made, renamed, sorted([*([name] for name in renamed), *groups], key=lambda group: order[group[0]])


def _grouped(names: Iterable[str], key: Callable[[str], str]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return list(groups.values())


def _layer(name: str) -> str:
    found = _LAYER.match(name)
    return found[0] if found else ""


@torch.no_grad()
def _reverted(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(revert_weight_conversion(model, tensors))


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor_file.bytes_of(tensor.contiguous())).hexdigest()
