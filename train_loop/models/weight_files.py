"""The safetensors files of a model folder: which they are, and what their headers say is in them.

    model.safetensors                 one file, or
    model.safetensors.index.json      {"weight_map": {name of a tensor: name of the file that has it}}

An index can name any file, so it is read here, before Transformers follows it: a pickle could run code. A link may lead
out of the folder, as those in the Hub's cache do.
"""

import os
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from train_loop.errors import InputError, one_line
from train_loop.trust import WEIGHTS, find, read_json, refuse_pointer

_ONE, _INDEX = WEIGHTS


class Stored(NamedTuple):
    """A tensor in a file: its shape, and its type in safetensors' words (F32, BF16, I8, ...)."""

    shape: tuple[int, ...]
    dtype: str


def stored(name: str) -> dict[str, Stored]:
    """What the files of a model's folder or repository hold, by name; nothing if it has no safetensors files.

    Raises InputError for a file that is missing, damaged or none that may be loaded, and for a tensor in two files.
    """
    where = f"model {name}"
    found: dict[str, Stored] = {}
    homes: dict[str, str] = {}
    for file in _files(where, name):
        path = find(name, file)
        if path is None:
            raise InputError(f"{where}: {file} is missing, but {_INDEX} names it; copy all files of the model")
        for tensor, what in _header(where, path).items():
            if tensor in homes:
                raise InputError(f"{where}: {tensor} is in two files, {homes[tensor]} and {file}; get the files anew")
            found[tensor], homes[tensor] = what, file
    return found


def _files(where: str, name: str) -> list[str]:
    """The names of a model's files."""
    if os.path.isdir(name):
        # Transformers would prefer them to model.safetensors.
        shards = [file for file in os.listdir(name) if file.startswith("shard-") and file.endswith(".safetensors")]
        if shards:
            raise InputError(f"{where}: {min(shards)} is one process's share of a model; save the model as a whole")
    index = read_json(where, name, _INDEX)
    one = find(name, _ONE) is not None
    if index is None:
        if not one and os.path.isdir(name):
            cure = "load it once with Transformers where you trust it, and save it with save_pretrained"
            raise InputError(f"{where}: cannot be loaded from safetensors, since there are none in it; {cure}")
        return [_ONE] if one else []
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise InputError(f"{where}: {_INDEX} does not say which file has which weight; get it anew")
    files = sorted(set(places.values()))
    for file in files:
        if os.path.isabs(file) or ".." in file.replace("\\", "/").split("/"):
            raise InputError(f"{where}: {_INDEX} names {file}, outside its folder; get the model anew")
        if not file.endswith(".safetensors"):
            raise InputError(f"{where}: {_INDEX} names {file}, which is not a safetensors file; others may run code")
    if one and files != [_ONE]:
        raise InputError(f"{where}: has both {_ONE} and {_INDEX}; remove the one that is not meant")
    return files


def _header(where: str, path: str) -> dict[str, Stored]:
    """The tensors of a file."""
    refuse_pointer(where, path)
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: Stored(tuple(each.get_shape()), each.get_dtype()) for name, each in slices.items()}
    except (SafetensorError, OSError) as error:
        size = os.path.getsize(path)
        cure = "it is empty or cut off, or no safetensors file; get it anew"
        raise InputError(
            f"{where}: {os.path.basename(path)} ({size:,} bytes) cannot be read ({one_line(error)}); {cure}"
        ) from None
