"""Who holds which part of a model: all of it (DDP), one share of it (FSDP2), or one share of a copy (HSDP).

With HSDP, processes 0 to S - 1 share one copy of weights, gradients and moments among them, the next S another one, R
copies in all:

    process          0  1  2  3        S = dp_shard_size = 2: they exchange weights in every layer, so they should be
    copy             0  0  1  1            on one host
    share of it      0  1  0  1        R = dp_replicate_size = 2: they exchange gradients once a step

Each process computes micro-batches of its own, as with DDP. So gradients are averages over all R S processes, and what
is true of W processes elsewhere is true here.
"""

import os
import warnings

from accelerate import Accelerator, ParallelismConfig

from train_loop.errors import InputError

SIZES = ("dp_replicate_size", "dp_shard_size")
"""How many copies there are, and how many processes share one: Accelerate's names."""


def mesh() -> ParallelismConfig | None:
    """The copies and shares that the launcher asks for in its environment variables; None if there is one copy.

    Raises InputError if they are not as many as the processes.
    """
    copies, shares = (int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}") or 1) for name in SIZES)
    os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] = "false"  # Accelerate need not look for itself
    if copies == shares == 1:
        return None
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    sizes = f"dp_replicate_size {copies} x dp_shard_size {shares}"
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        cure = "set ACCELERATE_USE_FSDP=true and FSDP_VERSION=2, or see configs/accelerate/hsdp.yaml"
        raise InputError(f"the launcher asks for {sizes}, but not for FSDP2; {cure}")
    if copies * shares != processes:
        cure = f"choose two sizes whose product is {processes}, or start {copies * shares} processes"
        wanted = f"{processes} process" + ("es" if processes > 1 else "")
        raise InputError(f"the launcher asks for {sizes} = {copies * shares}, but for {wanted}; {cure}")
    if shares == 1:
        raise InputError(f"the launcher asks for {sizes}, so nothing would be sharded; use plain DDP (--multi_gpu)")
    if copies == 1:
        return None
    warnings.filterwarnings("ignore", "Slicing a flattened dim")  # Accelerate 1.15 does, and torch would say so
    return ParallelismConfig(dp_replicate_size=copies, dp_shard_size=shares)


def parallelism(accelerator: Accelerator) -> str:
    """What the processes do, in a word."""
    if accelerator.is_fsdp2:
        return "FSDP2" if accelerator.parallelism_config is None else "HSDP"
    return "DDP" if accelerator.num_processes > 1 else "one process"


def sizes(accelerator: Accelerator) -> dict[str, int]:
    """With HSDP, both sizes by Accelerate's names; otherwise nothing."""
    found = accelerator.parallelism_config
    return {} if found is None else {name: getattr(found, name) for name in SIZES}
