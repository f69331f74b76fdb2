"""The libraries that train_loop stands on: which versions work, which are here, and what to say when they don't fit.

Nothing here imports a library, so that a version that cannot even be imported gets its line.
"""

import re
from types import ModuleType

from train_loop.errors import InputError, one_line

__version__ = "0.2.0.dev0"

WORK: dict[str, tuple[str, str]] = {
    "torch": ("2.9", "2.15.0"),
    "accelerate": ("1.10", "1.15.0"),
    "transformers": ("5.0", "5.24.0"),
    "tokenizers": ("0.22.1", "0.23.3"),
    "datasets": ("4.0", "5.2.0"),
    "evaluate": ("0.4.2", "0.4.6"),
    "huggingface_hub": ("1.3", "2.4.0"),
    "safetensors": ("0.4.5", "0.8.0"),
    "tqdm": ("4.66.3", "4.70.1"),
    "numpy": ("1.26", "2.5.5"),
    "pyarrow": ("15.0", "26.0.1"),
    "pyyaml": ("6.0", "6.0.4"),
    "psutil": ("5.9", "7.2.2"),
    "filelock": ("3.13", "4.3.1"),
}
"""Each library's floor (that of pyproject.toml) and the newest version that all tests have passed with."""

_COMPUTE = ("torch", "accelerate", "transformers", "tokenizers", "safetensors", "numpy")


def installed() -> dict[str, str]:
    """Versions of what decides what a run computes."""
    return {"train-loop": __version__} | {name: version(name) or "unknown" for name in _COMPUTE}


def check() -> None:
    """Refuse libraries that are missing or older than their floor.

    Raises:
        InputError: naming the first one, its version and the floor.
    """
    for name, (floor, _) in WORK.items():
        found = version(name)
        if found is None:
            raise InputError(f"{name} is not installed; pip install '{name}>={floor}'")
        if release(found) < release(floor):
            cure = f"train_loop needs {floor} or later: pip install '{name}>={floor}'"
            raise InputError(f"{name} {found} is too old; {cure}")


def too_new(error: BaseException) -> str | None:
    """What to say of an error that a library newer than any that was tried may explain; None where there is none.

    A library that renames or drops something shows itself as an AttributeError, an ImportError or a TypeError.
    """
    newer = {
        name: newest
        for name, (_, newest) in WORK.items()
        if (found := version(name)) is not None and release(found) > release(newest)
    }
    if (home := _home(error)) in WORK or home == "train_loop":
        newer = {name: newest for name, newest in newer.items() if name == home}
    if not newer:
        return None
    import traceback

    where = traceback.extract_tb(error.__traceback__)[-1]
    what = ", ".join(f"{name} {version(name)}" for name in newer)
    cure = " ".join(f"'{name}<={newest}'" for name, newest in newer.items())
    said = f"{type(error).__name__}: {one_line(error)} ({where.filename}:{where.lineno})"
    return f"{said}; {what} is newer than what train_loop was tried with; pip install {cure}"


def _home(error: BaseException) -> str:
    """The package whose module or object lacks something; "builtins" where the error does not say."""
    if isinstance(error, ImportError) and error.name:
        where = error.name
    else:
        lacks = getattr(error, "obj", None)
        where = lacks.__name__ if isinstance(lacks, ModuleType) else type(lacks).__module__
    return where.partition(".")[0]


def version(name: str) -> str | None:
    """The version of a library that is installed; None where it is not."""
    import importlib.metadata  # here, since it takes a third of what `--help` does

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with, zeros at the end left out: of 2.9.0a0+50eac811 (2, 9)."""
    found = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in found.group().split(".")] if found else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
