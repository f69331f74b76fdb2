"""Environment variables: what a launcher says in them, checked before anything relies on it; what libraries read."""

import os
import sys

from train_loop import launchers
from train_loop.errors import InputError

_NUMBERS = dict.fromkeys(launchers.NUMBERS, (0, 10**6)) | {  # by name, the least and the most
    "WORLD_SIZE": (1, 10**6),
    "RANK": (0, 10**6),
    "LOCAL_RANK": (0, 10**6),
    "LOCAL_WORLD_SIZE": (1, 10**6),
    "MASTER_PORT": (0, 65535),
    "TORCHELASTIC_MAX_RESTARTS": (0, 10**9),
    "TORCHELASTIC_RESTART_COUNT": (0, 10**9),
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": (1, 10**6),
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": (1, 10**6),
    "PARALLELISM_CONFIG_TP_SIZE": (1, 10**6),
    "PARALLELISM_CONFIG_CP_SIZE": (1, 10**6),
    "PARALLELISM_CONFIG_SP_SIZE": (1, 10**6),
}


def check() -> None:
    """Refuse numbers that are none, or that contradict each other; InputError names the variable and its value.

    First, what other launchers say is said in torch's variables.
    """
    launchers.translate()
    numbers = {}
    for name, (least, most) in _NUMBERS.items():
        text = os.environ.get(name, "")
        if not text and name.startswith("PARALLELISM"):
            continue
        if name in os.environ:
            if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
                expected = f"expected a whole number from {least} to {most}, got {text!r}"
                raise InputError(f"environment variable {name}: {expected}; a launcher sets it, or unset it")
            numbers[name] = int(text)
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if rank in numbers and numbers[rank] >= numbers.get(size, numbers[rank] + 1):
            problem = f"{rank} is {numbers[rank]}, but {size} is {numbers[size]}"
            raise InputError(f"environment variables: {problem}; ranks count from 0")


_RESTS = "OPENBLAS_THREAD_TIMEOUT"  # 2^4 turns of a loop; without it, the threads go on turning for some 20 ms
_numpy_came_first = False


def let_openblas_rest() -> None:
    """Let OpenBLAS's threads sleep once a product is done, so that what follows has the cores; before numpy is loaded.

    OpenBLAS reads the variable when it is loaded. A value that the user has set stays.
    """
    global _numpy_came_first
    if "numpy" in sys.modules and _RESTS not in os.environ:
        _numpy_came_first = True
    os.environ.setdefault(_RESTS, "4")


def openblas_rests() -> bool:
    """Whether OpenBLAS's threads leave the cores to others between products."""
    return not _numpy_came_first
