"""Paths from settings, arguments and the environment: `~` and `$VAR` in them, and what no path can be.

A path is read as if the shell had expanded it, so a run's config.yaml holds the expanded path: the run that goes on,
or is looked at, from another home still means the same files.
"""

import os
import re

from train_loop.errors import InputError

_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes, on all usual file systems
_ENDS = ("/", ".json", ".jsonl", ".txt", ".csv", ".parquet", ".yaml", ".safetensors", ".bin", ".pt", ".gguf")
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", re.ASCII)


def expand(path: str, where: str) -> str:
    """`path` with `~`, `~user`, `$VAR` and `${VAR}` replaced, unless a file or folder has just this name.

    Raises InputError, which begins with `where`, for a variable or user that is unknown, and for what cannot be a path.
    """
    check(path, where)
    if ("$" not in path and not path.startswith("~")) or os.path.lexists(path):
        return path

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name not in os.environ:
            raise InputError(f"{where} {path}: the environment variable {name} is not set")
        return os.environ[name]

    expanded = os.path.expanduser(_VARIABLE.sub(value, path))
    if expanded.startswith("~") and path.startswith("~"):
        raise InputError(f"{where} {path}: no user {path[1:].partition('/')[0] or 'has a home here'}")
    check(expanded, f"{where} {path}:")
    return expanded


def check(path: str, where: str) -> None:
    """Refuse what no file system takes as a path: InputError, which begins with `where`."""
    if not path.strip():
        raise InputError(f"{where} {path!r}: is empty; name a path")
    if "\0" in path:
        raise InputError(f"{where} {path!r}: a path cannot hold the character NUL")
    names = [os.fsencode(name) for name in path.split("/")]
    if max(map(len, names)) > _LONGEST_NAME or sum(map(len, names)) + len(names) > _LONGEST_PATH:
        raise InputError(f"{where} {path[:40]}...: longer than a path can be")


def looks_local(name: str) -> bool:
    """Whether a name can only be a path here, and not a repository `name` or `user/name` on the Hub."""
    if "://" in name:
        return False
    return name.startswith((".", "/", "~")) or name.endswith(_ENDS) or name.count("/") > 1 or "\\" in name


def find(name: str, where: str) -> str:
    """The folder, or the name on the Hub, that a name means; InputError for a path that isn't there.

    `where` begins the message, such as "model.name_or_path". Whoever asks the Hub for the name then ends an error with
    `no_folder`.
    """
    name = expand(name, where)
    if os.path.isdir(name):
        return name
    if os.path.lexists(name):
        problem = "is a file; name the folder that it is in" if os.path.isfile(name) else "is no folder"
        raise InputError(f"{where} {name}: {problem}")
    if looks_local(name):
        raise InputError(f"{where} {name}: no such folder")
    return name


def no_folder(name: str) -> str:
    """The end of a message about a name that the Hub does not know: it may have been meant as a folder here."""
    return "" if os.path.isdir(name) else f"; there is no folder {name} here, either"
