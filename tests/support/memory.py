"""The peak of a real training step, counted in two ways; `forked.together` starts `main` on each process.

One process: what torch's profiler saw come and go. It does not see what gloo's own threads free, so several processes
add up the tensors that are alive, before each operation.
"""

import gc
import json
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support import forked, launch
from train_loop import job
from train_loop.config.load import config_from_arguments
from train_loop.training.step import train_step

STEP = "the step that is measured"


class Alive(TorchDispatchMode):
    """Notes the most bytes that tensors' storages have together, however they have come to their sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.storages: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        for each in gc.get_objects():
            if isinstance(each, torch.Tensor):
                self.see(each)

    def see(self, tensor: torch.Tensor) -> None:
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        if not local.is_meta:
            storage = local.untyped_storage()
            self.storages[storage._cdata] = storage

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for each in tree_leaves((args, output)):
            if isinstance(each, torch.Tensor):
                self.see(each)
        self.peak = max(self.peak, sum(each.nbytes() for each in list(self.storages.values())))
        return output


def step_peak(arguments: list[str], several: bool) -> int:
    """Bytes of all tensors of this process at most, in the second step of a run with these settings."""

    def steps(context: Any) -> None:
        run = job.set_up(config_from_arguments(arguments)).run
        run.context.objective.train()
        batches = run.batches.after(0)
        train_step(run.context, run.state, next(batches), 1e-3)
        with context():
            train_step(run.context, run.state, next(batches), 1e-3)

    if several:
        alive: list[Alive] = []
        steps(lambda: alive.append(Alive()) or alive[0])
        return alive[0].peak
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        steps(lambda: record_function(STEP))
    events = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    (step,) = [each for each in events if each.name() == STEP]
    held = peak = 0
    for when, change in sorted((each.start_ns(), each.nbytes()) for each in events if each.name() == "[memory]"):
        held += change
        peak = max(peak, held) if step.start_ns() <= when <= step.end_ns() else peak
    return peak


def step_peaks(folder: Path, commands: Sequence[Sequence[str]], number: int = 1, fsdp2: bool = False) -> list[int]:
    """The peak of each run, of that process of `number` which has the highest."""
    todo, done = folder / "todo.json", folder / "done.json"
    todo.write_text(json.dumps(commands))
    variables = launch.ON_CPU | ({"TESTS_FSDP2_ON_CPU": "true"} if fsdp2 else {})
    sharded = ["--config_file", str(launch.CONFIGS / "fsdp2.yaml"), "--num_processes", str(number)]
    options = sharded if fsdp2 else launch.processes(number)
    each = launch.launchers(number, options, variables) if number > 1 else [launch.environment(variables)]
    ended = forked.together("tests.support.memory", (str(todo), str(done)), each, 300)
    assert not any(code for code, _ in ended), ended
    found = [json.loads(done.with_name(f"done.json.{rank}").read_text()) for rank in range(number)]
    return [max(peaks) for peaks in zip(*found, strict=True)]


def main(*paths: str) -> None:
    """Writes the peaks of the commands in the first file beside the second one."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    from tests.support.several import shard_on_cpu

    todo, done = map(Path, paths)
    destroy = PartialState.destroy_process_group
    PartialState.destroy_process_group = lambda *_: None  # type: ignore[method-assign]
    peaks = []
    for arguments in json.loads(todo.read_text()):
        AcceleratorState._reset_state(reset_partial_state=True)
        if os.environ.get("TESTS_FSDP2_ON_CPU"):
            shard_on_cpu()
        peaks.append(step_peak(arguments, int(os.environ.get("WORLD_SIZE", "1")) > 1))
        gc.collect()
    done.with_name(f"{done.name}.{os.environ.get('RANK', '0')}").write_text(json.dumps(peaks))
    destroy(PartialState())
