"""Find the checkpoint to continue from, and load it into a run's model, even if only the main process's host has it.

If the hosts share a disk, each process reads what it holds. If they don't, the main process reads the checkpoint and,
with DDP, sends it to the others, which hold the same. With FSDP2, no process holds the whole state, or could hold it.
That needs a shared disk, and a run without one stops before it trains.
"""

import socket
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from train_loop.checkpoint import storage
from train_loop.checkpoint.run_folder import RunFolder, json_of
from train_loop.config.load import differences
from train_loop.config.schema import Config
from train_loop.console import say
from train_loop.distributed.collectives import broadcast_from_main, run_on_all_ranks
from train_loop.errors import InputError

_SECONDS_TO_APPEAR = 30  # a network file system may show a new file late


def find(
    accelerator: Accelerator, folder: RunFolder, config: Config, fingerprint: str
) -> tuple[storage.CheckpointRef | None, dict[int, str]]:
    """The newest whole checkpoint of a run on some data, and what is wrong with each later one, by step.

    The main process looks, and all get the same. Raises InputError if there are checkpoints, but none is whole, or if
    the newest one is that of another run.
    """
    main = accelerator.is_main_process

    def look() -> tuple[storage.CheckpointRef | None, dict[int, str]]:
        found, damaged = storage.newest(folder.checkpoints)
        for line in damaged.values():
            say(f"{line}; skipped")
        if found is None and damaged:
            raise InputError(
                f"run.output_dir {folder.path}: no checkpoint is whole ({'; '.join(damaged.values())}); put one back "
                f"from a copy, or remove {folder.checkpoints} to start again from the first step"
            )
        if found is not None and (other := _differences(found, config, fingerprint)):
            cure = "remove it, or name another run.output_dir"
            raise InputError(f"checkpoint {found.folder}: belongs to a different run ({'; '.join(other)}); {cure}")
        return found, damaged

    # Other hosts' paths may differ, so their settings are not compared.
    looked = run_on_all_ranks(accelerator, "look", look if main else lambda: (None, {}))
    return broadcast_from_main(accelerator, looked)


def _differences(found: storage.CheckpointRef, config: Config, fingerprint: str) -> list[str]:
    """What a checkpoint says of its run that is not so of this one."""
    settings, data = found.state.get("config"), found.state.get("fingerprint", fingerprint)
    other = differences(settings, json_of(config)) if isinstance(settings, dict) else []
    return other + ([] if data == fingerprint else [f"data: fingerprint {str(data)[:12]} -> {fingerprint[:12]}"])


def check_step(found: storage.CheckpointRef | None, total_steps: int) -> None:
    """Refuse a checkpoint of a step that this run will never take."""
    if found is not None and found.step > total_steps:
        cure = "it is not this run's; remove it, or name another run.output_dir"
        raise InputError(f"checkpoint {found.folder}: is beyond the end of the run, at step {total_steps}; {cure}")


def restore(
    accelerator: Accelerator, found: storage.CheckpointRef, model: nn.Module, optimizer: storage.Optimizer | None = None
) -> None:
    """Load a checkpoint's weights into a model; with an optimizer, also its moments and fp16's loss scale.

    All processes must call this. Raises ValueError if the checkpoint belongs to another model; then nothing is changed.
    Raises InputError if FSDP2 shards the model and a host does not have the checkpoint.
    """

    def read() -> None:
        if optimizer is None:
            storage.load_weights(found, model)
        else:
            storage.load(found, model, optimizer)

    if optimizer is not None and accelerator.scaler is not None and found.state.get("loss_scale"):
        accelerator.scaler.load_state_dict(found.state["loss_scale"])
    blind = _hosts_without(accelerator, (found.folder / "manifest.json").is_file())
    if not blind:
        return read()
    if accelerator.is_fsdp2:
        raise InputError(
            f"checkpoint {found.folder} is missing on {', '.join(blind)}; with FSDP2 every host reads all of "
            "its files: put run.output_dir on a disk that all hosts share, or copy the whole folder to that path there"
        )
    problem = None
    if accelerator.is_main_process:
        try:
            read()
        except ValueError as error:
            problem = str(error)
    if problem := broadcast_from_main(accelerator, problem):
        raise ValueError(problem)
    with_moments = broadcast_from_main(accelerator, optimizer is not None and bool(optimizer.state))
    for tensor in storage.in_memory(model, optimizer, with_moments):
        torch.distributed.broadcast(tensor, src=0)


def check_disk(accelerator: Accelerator, path: Path) -> None:
    """Refuse FSDP2 if a host does not see a file that the main process has just written; all must call this."""
    if not accelerator.is_fsdp2:
        return
    content = broadcast_from_main(accelerator, path.read_bytes() if accelerator.is_main_process else b"")
    began = time.monotonic()
    while not (seen := path.is_file() and path.read_bytes() == content):
        if time.monotonic() - began > _SECONDS_TO_APPEAR or not path.parent.is_dir():
            break
        time.sleep(0.5)
    if blind := _hosts_without(accelerator, seen):
        raise InputError(
            f"run.output_dir {path.parent} is not the same folder on all hosts ({', '.join(blind)} lacks what process "
            "0 wrote): with FSDP2 every host writes its part of a checkpoint there; put it on a disk that all share"
        )


def _hosts_without(accelerator: Accelerator, seen: bool) -> list[str]:
    """The hosts of the processes whose `seen` is false."""
    if accelerator.num_processes == 1:
        return [] if seen else [socket.gethostname()]
    return sorted({host for host, saw in gather_object([(socket.gethostname(), seen)]) if not saw})
