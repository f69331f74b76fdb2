"""The libraries that train_loop uses: which versions work, which are installed, and what to say if they don't fit.

Nothing here imports a library, so even a version that cannot be imported gets a clear message.
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
    "xxhash": ("3.2", "4.1.0"),
}
"""Each library's oldest version that works (as in pyproject.toml), and the newest that has passed all tests."""

_COMPUTE = ("torch", "accelerate", "transformers", "tokenizers", "safetensors", "numpy")


def installed() -> dict[str, str]:
    """The versions of the libraries that affect what a run computes."""
    return {"train-loop": __version__} | {name: version(name) or "unknown" for name in _COMPUTE}


def check() -> None:
    """Refuse libraries that are missing or older than their floor: InputError names the first, and its floor."""
    for name, (floor, _) in WORK.items():
        found = version(name)
        if found is None:
            raise InputError(f"{name} is not installed; pip install '{name}>={floor}'")
        if release(found) < release(floor):
            cure = f"train_loop needs {floor} or later: pip install '{name}>={floor}'"
            raise InputError(f"{name} {found} is too old; {cure}")


def too_new(error: BaseException) -> str | None:
    """The message for an error that may come from a library newer than any tested version; None if there is none.

    If a library has renamed or dropped something, the error is an AttributeError, an ImportError or a TypeError.
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
    return f"{said}; {what} is newer than the versions train_loop was tested with; pip install {cure}"


def _home(error: BaseException) -> str:
    """The package whose module or object lacks something; "builtins" if the error does not say."""
    if isinstance(error, ImportError) and error.name:
        where = error.name
    else:
        lacks = getattr(error, "obj", None)
        where = lacks.__name__ if isinstance(lacks, ModuleType) else type(lacks).__module__
    return where.partition(".")[0]


def version(name: str) -> str | None:
    """The installed version of a library; None if it is not installed."""
    import importlib.metadata  # imported here, because it takes a third of the time of `--help`

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with, without trailing zeros: (2, 9) for 2.9.0a0+50eac811."""
    found = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in found.group().split(".")] if found else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
