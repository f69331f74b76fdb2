"""What launchers other than torch's say of their processes, in torch's words: RANK, WORLD_SIZE, MASTER_ADDR and so on.

    torchrun, accelerate launch, Kubeflow's PyTorchJob    torch's own variables
    mpirun (Open MPI, MVAPICH, MPICH, Intel MPI)          their own ranks and sizes
    srun with several tasks                               SLURM_PROCID and those of its step
    an indexed Job, a JobSet                              JOB_COMPLETION_INDEX, beside torch's WORLD_SIZE

A process is one of several only if a launcher says so of this very process. A batch script or an interactive shell
knows how many tasks its job may have (SLURM_NTASKS), but is alone all the same; only srun sets SLURM_STEP_NUM_TASKS.
Where WORLD_SIZE is 1, nobody else is asked.
"""

import os
import re
import zlib
from typing import NamedTuple

from train_loop.errors import InputError


class Launcher(NamedTuple):
    """The names of the variables in which a launcher numbers its processes; "" for what it doesn't say."""

    rank: str
    size: str
    local_rank: str = ""
    local_size: str = ""


# In a job of SLURM, mpirun starts a helper on each host with srun, and its processes inherit the helper's numbers. So
# MPI's come before SLURM's, and torch's before all.
_INDEXED = Launcher("JOB_COMPLETION_INDEX", "WORLD_SIZE")
_SLURM = Launcher("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
_LAUNCHERS = (
    Launcher("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    Launcher(*(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),
    Launcher(*(f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),
    Launcher("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    _SLURM,
    _INDEXED,
)
_SOMETIMES_ALONE = (_SLURM, _INDEXED)  # their ranks say nothing by themselves
NUMBERS = sorted({name for launcher in _LAUNCHERS for name in launcher if name})
"""All these variables."""

PREFIXES = ("OMPI_", "MV2_", "PMI", "MPI_LOCAL", "SLURM_", "PET_", "JOB_COMPLETION_INDEX")
"""How launchers' own variables begin, beside torch's and Accelerate's."""

_PORT = 29500  # torch's own
_PORTS = range(10_000, 30_000)  # below those that Linux hands out by itself


def translate() -> None:
    """Set those of torch's variables that are missing, from what the launcher says; raises nothing.

    MASTER_ADDR is known from SLURM (the step's first host), and where all processes are on this host.
    """
    given = os.environ
    for each in _LAUNCHERS:
        rank, size = _number(each.rank), _number(each.size)
        # What the user has set counts, and another launcher's numbers complete it only if they are the same.
        if rank is not None and size is not None and size > 1 and _agrees(rank, size):
            break
    else:
        return
    given["RANK"], given["WORLD_SIZE"] = str(rank), str(size)
    speaking = [each for each in _LAUNCHERS if (_number(each.rank), _number(each.size)) == (rank, size)]
    for own, names in (
        ("LOCAL_RANK", [each.local_rank for each in speaking]),
        ("LOCAL_WORLD_SIZE", [each.local_size for each in speaking]),
    ):
        if told := [number for name in names if (number := _number(name)) is not None]:
            given.setdefault(own, str(told[0]))
    if _SLURM in speaking and (nodes := given.get("SLURM_STEP_NODELIST")):
        given.setdefault("MASTER_ADDR", first_host(nodes))
        step = f"{given.get('SLURM_JOB_ID')}.{given.get('SLURM_STEP_ID')}"
        given.setdefault("MASTER_PORT", str(_PORTS[zlib.crc32(step.encode()) % len(_PORTS)]))
    elif each.size != "WORLD_SIZE":  # who sets torch's variables sets all of them
        if given.get("LOCAL_WORLD_SIZE") == str(size):
            given.setdefault("MASTER_ADDR", "127.0.0.1")
        given.setdefault("MASTER_PORT", str(_PORT))


def _agrees(rank: int, size: int) -> bool:
    """Whether torch's own variables, as far as they are set, are these."""
    return os.environ.get("RANK", str(rank)) == str(rank) and os.environ.get("WORLD_SIZE", str(size)) == str(size)


def _number(name: str) -> int | None:
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def first_host(nodes: str) -> str:
    """The first host of SLURM's list: `rack2n07` of `rack[2,4]n[07-11,13],login`."""
    found = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", found[0] if found else nodes)


def check() -> None:
    """Refuse variables of which some are missing, or that are meant for a torchrun that isn't there.

    Training and evaluation call it, after `translate`. Raises InputError, which names the variable.
    """
    given = os.environ
    if "TORCHELASTIC_RUN_ID" not in given and given.get("WORLD_SIZE") != "1":
        for name, missing, what in (
            ("PET_NPROC_PER_NODE", "LOCAL_WORLD_SIZE", "processes on each host"),
            ("PET_NNODES", "WORLD_SIZE", "hosts"),
        ):
            number = given.get(name, "").rpartition(":")[2]
            if missing not in given and number.isdigit() and int(number) > 1:
                problem = f"{name} asks torchrun for {number} {what}, but torchrun did not start this process"
                raise InputError(f"environment variables: {problem}; start it with: torchrun -m train_loop ...")
    for each in _LAUNCHERS if "WORLD_SIZE" not in given else ():
        if each.rank in given and each.size not in given and each not in _SOMETIMES_ALONE:
            _refuse(each.rank, each.size)
        if each.rank not in given and (_number(each.size) or 1) > 1:
            _refuse(each.size, each.rank)
    if "LOCAL_RANK" in given and "WORLD_SIZE" not in given:
        _refuse("LOCAL_RANK", "WORLD_SIZE")
    if _number("WORLD_SIZE") not in (None, 1):
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not given.get(name):
                _refuse("WORLD_SIZE", name)
    if (_number("LOCAL_WORLD_SIZE") or 0) > (size := _number("WORLD_SIZE") or 10**9):
        problem = f"LOCAL_WORLD_SIZE is {given['LOCAL_WORLD_SIZE']}, but WORLD_SIZE is {size}"
        raise InputError(f"environment variables: {problem}; it counts those on this host")


def _refuse(name: str, missing: str) -> None:
    cures = {"MASTER_ADDR": "export the first host's name or address", "MASTER_PORT": "export a free port of that host"}
    cure = cures.get(missing, f"start it with a launcher, or unset {name}; see docs/clusters.md")
    raise InputError(f"environment variables: {name} is {os.environ[name]}, but {missing} is not set; {cure}")
