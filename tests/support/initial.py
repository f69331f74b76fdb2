"""Run by `test_shards.py` on each process: what runs would start with, without taking a step.

Memory for shards is filled with sevens first, so that what nobody fills shows. Each process writes SHA-256 of all
parameters, gathered, and of its buffers, by run.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tests.support.several import shard_on_cpu
from train_loop import job
from train_loop.config.load import config_from_arguments

EMPTY = nn.Module.to_empty


def sums(model: nn.Module) -> dict[str, str]:
    """SHA-256 of each parameter, whole, and of each buffer."""
    found = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        found[name] = hashlib.sha256(whole.detach().contiguous().numpy().data).hexdigest()
    return found


def with_sevens(module: nn.Module, **options: Any) -> nn.Module:
    emptied = EMPTY(module, **options)
    with torch.no_grad():
        for tensor in [*emptied.parameters(), *emptied.buffers()]:
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).fill_(7)
    return emptied


def main(todo: str, done: str) -> None:
    """`todo` has the arguments of each run by name; the sums are written into `done.RANK`."""
    import os

    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    PartialState.destroy_process_group = lambda *_: None  # type: ignore[method-assign]
    nn.Module.to_empty = with_sevens  # type: ignore[method-assign, assignment]
    found = {}
    for name, arguments in json.loads(Path(todo).read_text()).items():
        AcceleratorState._reset_state(reset_partial_state=True)
        shard_on_cpu()
        run = job.set_up(config_from_arguments(arguments)).run
        model = run.state.model
        shards = [each for each in model.parameters() if isinstance(each, DTensor)]
        assert len(shards) == len(list(model.parameters())) and not any(each.is_meta for each in model.buffers())
        trained = {id(each) for each in run.state.parameters}
        assert trained == {id(each) for each in shards if each.requires_grad}
        found[name] = sums(model)
    Path(f"{done}.{os.environ['RANK']}").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
