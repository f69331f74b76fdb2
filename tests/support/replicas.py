"""Run on each process of an HSDP run: what it holds of the weights before and after training; a gradient's norm."""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tests.support.several import shard_on_cpu
from train_loop import job
from train_loop.config.load import config_from_arguments
from train_loop.training import step
from train_loop.training.loop import History, Loop


def held(parameters: dict[str, DTensor]) -> dict[str, str]:
    """SHA-256 of this process's rows of each parameter."""
    found = {}
    for name, parameter in parameters.items():
        found[name] = hashlib.sha256(parameter.to_local().detach().contiguous().numpy().tobytes()).hexdigest()
    return found


def main(settings: str, output: str) -> None:
    """Writes what it found to OUTPUT.RANK."""
    shard_on_cpu()
    run = job.set_up(config_from_arguments(json.loads(Path(settings).read_text()))).run
    named: Any = dict(run.state.model.named_parameters())
    found: dict[str, Any] = {"start": held(named)}
    mesh = next(iter(named.values())).device_mesh
    found["units"] = sum(isinstance(each, FSDPModule) for each in run.context.objective.modules())
    found["copy"], found["share"] = mesh.get_coordinate()
    Loop(run, History([], 0), [], lambda state, wait=False: None).train()
    found["end"] = held(named)

    # 3 in the first share of a copy and 4 in the second one.
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    first = next(iter(named.values()))
    first.grad.to_local().view(-1)[0] = 3.0 + found["share"]
    norm = step.gradient_norm(named.values())
    found["norm"] = step.reduce_scalars(run.context, [torch.zeros(())], norm)[1]
    step.clip(named.values(), norm, found["norm"], 1.0)
    found["clipped"] = float(first.grad.to_local().view(-1)[0])
    Path(f"{output}.{os.environ['RANK']}").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
