"""Read a model's `config.json` where `model.architecture` names one instead of spelling it out."""

import json
import os
from typing import Any

from train_loop.config import paths
from train_loop.errors import InputError, one_line

_KEY = "model.architecture"


def read_architecture(given: dict[str, Any] | str | None) -> dict[str, Any]:
    """The fields of an architecture: those given, or those of the JSON file (or of the folder with one) at a path.

    Raises InputError, which names the path, for a file that is missing or holds no JSON object, or a name in it twice.
    """
    if not isinstance(given, str):
        return dict(given or {})
    path = paths.expand(given, _KEY)
    path = os.path.join(path, "config.json") if os.path.isdir(path) else path
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file, object_pairs_hook=_once)
    except FileNotFoundError:
        cure = "give a mapping with model_type in it, or the path of a config.json"
        raise InputError(f"{_KEY}: {given}: no such file; {cure}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{_KEY}: {path}: cannot be read as JSON ({one_line(error)})") from None
    if not isinstance(found, dict):
        raise InputError(f"{_KEY}: {path}: holds no mapping but a {type(found).__name__}")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} is in it twice")
        found[name] = value
    return found
