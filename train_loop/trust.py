"""What a folder of somebody else, or a repository on the Hub, may bring: data, never code.

Whatever loads a model or a tokenizer asks here first, and tells Transformers `trust_remote_code=False`; so nobody is
asked on the terminal either. What needs its own code is refused. Code that is only offered, beside a type that
Transformers itself knows, is left alone. A setting may also name code elsewhere (a kernel on the Hub), other files than
safetensors, or an adapter that would change the model in passing. Those are refused, too.
"""

import json
import os
from collections.abc import Iterator
from typing import Any

import transformers
from transformers.utils import cached_file

from train_loop.disguises import POINTER, refuse_pointers
from train_loop.errors import InputError, one_line

_GENERATE = "custom_generate/generate.py"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
"""The files that weights are read from: all of them, or where to find each."""
# Settings that choose an implementation; one with a slash in it is downloaded from the Hub and run.
_IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation")


def check_model(name: str) -> None:
    """Refuse a model that needs code of its own, or is not a model by itself. Raises InputError, which says why."""
    where = f"model {name}"
    if os.path.isfile(name):
        raise InputError(f"{where}: is a file; name the folder that holds it with its config.json")
    refuse_pointers(where, name)
    settings = read_json(where, name, "config.json") or {}
    read_json(where, name, "generation_config.json")  # which Transformers would pass over if it is damaged
    if (adapter := read_json(where, name, "adapter_config.json")) is not None:
        base = adapter.get("base_model_name_or_path")
        cure = f"merge it into its base{f' {base}' if base else ''} (peft's merge_and_unload), and save the result"
        raise InputError(f"{where}: brings an adapter (adapter_config.json), which would change the model; {cure}")
    if settings.get("quantization_config") is not None:
        method = settings["quantization_config"]
        method = method.get("quant_method", "unknown method") if isinstance(method, dict) else method
        raise InputError(
            f"{where}: its weights are quantised ({method}), and train_loop computes with whole ones; "
            "use the model that it was made from"
        )
    if (weights := settings.get("transformers_weights")) not in (None, *WEIGHTS):
        raise InputError(f"{where}: config.json names {weights} as its weights; only {' and '.join(WEIGHTS)} are read")
    check_implementations(settings, where)
    if str(settings.get("model_type")) not in transformers.CONFIG_MAPPING:  # which brings torch along
        _refuse_code(where, settings.get("auto_map"), "config.json")


def check_implementations(settings: dict[str, Any], where: str) -> None:
    """Refuse settings that choose an implementation on the Hub. Raises InputError, which names it."""
    for key, value in _implementations(settings):
        if "/" in value:
            problem = f"asks for code from the Hub ({key}: {value}), which is never run"
            raise InputError(f"{where}: {problem}; remove {key} from the configuration")


def unused_code(name: str) -> str | None:
    """The code that a model's folder offers beside a type that Transformers knows; None if there is none."""
    settings = read_json(f"model {name}", name, "config.json") or {}
    found = [*_named(settings.get("auto_map")), *(each for each in (_GENERATE,) if find(name, each) is not None)]
    return ", ".join(found) or None


def check_tokenizer(name: str) -> None:
    """Refuse a tokenizer that needs code of its own. Raises InputError, which names the code."""
    where = f"tokenizer {name}"
    refuse_pointers(where, name)
    settings = read_json(where, name, "tokenizer_config.json") or {}
    code, kind = settings.get("auto_map"), settings.get("tokenizer_class")
    if not (isinstance(kind, str) and hasattr(transformers, kind)):
        _refuse_code(where, code.get("AutoTokenizer") if isinstance(code, dict) else code, "tokenizer_config.json")


def find(name: str, file: str) -> str | None:
    """The path of a file of a local folder or of a repository on the Hub; None if there is none, or no such place."""
    if os.path.isdir(name):
        path = os.path.join(name, file)
        return path if os.path.isfile(path) else None
    try:
        found: str | None = cached_file(
            name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_gated_repo=False
        )
    except (OSError, ValueError):  # there is no such repository, or no network: whoever loads it says so
        return None
    return found


def read_json(where: str, name: str, file: str) -> dict[str, Any] | None:
    """The settings in a JSON file of a folder or repository; None if there is no such file.

    Raises InputError, which begins with `where`, if it is no JSON object.
    """
    path = find(name, file)
    if path is None:
        return None
    refuse_pointer(where, path)
    try:
        with open(path, encoding="utf-8") as opened:
            found = json.load(opened)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: {file} is damaged ({one_line(error)}); get it anew") from None
    if not isinstance(found, dict):
        raise InputError(f"{where}: {file} holds no settings but a {type(found).__name__}; get it anew")
    return found


def refuse_pointer(where: str, path: str) -> None:
    """Refuse what Git LFS leaves in place of a file that it has not downloaded. Raises InputError with the cure."""
    with open(path, "rb") as opened:
        if opened.read(len(POINTER)) == POINTER:
            raise InputError(
                f"{where}: {os.path.basename(path)} is a Git LFS pointer, not the file itself; git lfs pull"
            )


def _refuse_code(where: str, code: object, file: str) -> None:
    """Refuse code that a file names, if it names any."""
    if names := ", ".join(_named(code)):
        problem = f"needs code of its own ({names} in {file}), which train_loop never runs"
        raise InputError(f"{where}: {problem}; choose one that Transformers loads by itself")


def _named(code: object) -> list[str]:
    """The classes that an `auto_map` names."""
    parts = code.values() if isinstance(code, dict) else code if isinstance(code, list) else [code]
    return [str(name) for part in parts for name in (part if isinstance(part, list) else [part]) if name]


def _implementations(settings: Any) -> Iterator[tuple[str, str]]:
    """Each setting that chooses an implementation, in parts of the settings too, with its value."""
    if not isinstance(settings, dict):
        return
    for key, value in settings.items():
        chosen = value.values() if isinstance(value, dict) else [value]
        if key in _IMPLEMENTATIONS:
            yield from ((key, each) for each in chosen if isinstance(each, str))
        yield from _implementations(value)
