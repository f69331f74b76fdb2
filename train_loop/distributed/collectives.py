"""What all processes do together: agree on a value, wait for work of unknown duration, gather a sharded model."""

import itertools
import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from torch.distributed.fsdp import FSDPModule

from train_loop import devices
from train_loop.errors import InputError, TrainingError

Result = TypeVar("Result")

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.01, 0.5


def run_on_all_ranks(accelerator: Accelerator, purpose: str, work: Callable[[], Result]) -> Result:
    """Do some work of unknown duration on every process, and continue when all of them are done; returns its result.

    No process waits in a collective, which would time out after minutes. Instead, each one checks the launcher's
    key-value store now and then, under `purpose`. An InputError or TrainingError on one process is raised on all of
    them.
    """
    if accelerator.num_processes == 1:
        return work()
    store, processes = torch.distributed.distributed_c10d._get_default_store(), accelerator.num_processes
    mistake, kind, result = "", "", None
    try:
        result = work()
    except (InputError, TrainingError) as error:
        mistake, kind = str(error), type(error).__name__
        if os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):  # which of the hosts?
            mistake += f" (on {socket.gethostname()})"
    round_ = store.add(f"{purpose}/done", 0) // processes  # the same work may come again later
    if mistake:
        store.set(f"{purpose}/{round_}/mistake", json.dumps([kind, mistake]))
    store.add(f"{purpose}/done", 1)
    pause = _FIRST_PAUSE_SECONDS
    while store.add(f"{purpose}/done", 0) < (round_ + 1) * processes:
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
    if store.check([f"{purpose}/{round_}/mistake"]):
        kind, mistake = json.loads(store.get(f"{purpose}/{round_}/mistake"))
        raise InputError(mistake) if kind == InputError.__name__ else TrainingError(mistake)
    return result  # type: ignore[return-value]


class KeyValueMailbox:
    """Messages in the launcher's key-value store, for threads that must not take part in the training's collectives.

    A `topic` is a name that is used only once.
    """

    def __init__(self, accelerator: Accelerator, topic: str) -> None:
        self.store = torch.distributed.distributed_c10d._get_default_store()
        self.keys = [f"{topic}/{process}" for process in range(accelerator.num_processes)]

    def write(self, process: int, text: str) -> None:
        """Post the text of a process."""
        self.store.set(self.keys[process], text)

    def read_all(self, pause: Callable[[float], bool], seconds: float) -> list[str]:
        """Wait for the texts of all processes, and remove them from the store.

        `pause` waits for a number of seconds, and returns True to stop waiting, which raises OSError.
        """
        while not self.store.check(self.keys):
            if pause(seconds):
                raise OSError("another process did not answer")
        texts = [self.store.get(key).decode() for key in self.keys]
        for key in self.keys:
            self.store.delete_key(key)
        return texts


def broadcast_from_main(accelerator: Accelerator, value: Result) -> Result:
    """The main process's value, on every process."""
    return broadcast_object_list([value])[0] if accelerator.num_processes > 1 else value


def reduce_exactly(accelerator: Accelerator, tensor: torch.Tensor, operation: Literal["sum", "max"]) -> torch.Tensor:
    """The sum or maximum of a float64 tensor over all processes, even if their devices have no float64.

    Then the tensor is on the CPU, and its values are sent as Python's numbers, which have 64 bits.
    """
    if accelerator.num_processes == 1:
        return tensor
    if tensor.device.type == accelerator.device.type:  # on a CPU, processes have numbered devices: cpu:0, cpu:1
        operations = {"sum": torch.distributed.ReduceOp.SUM, "max": torch.distributed.ReduceOp.MAX}
        torch.distributed.all_reduce(tensor, operations[operation])
        return tensor
    gathered = torch.tensor(gather_object([tensor.tolist()]), dtype=torch.float64)
    return gathered.sum(0) if operation == "sum" else gathered.amax(0)


def sum_exactly(accelerator: Accelerator, columns: Sequence[Sequence[float]]) -> list[float]:
    """The sum of each column over all processes, rounded once: their number and order make no difference.

    A process sends the few numbers that hold its own sums exactly, however long its columns are. They are sent as
    Python's numbers, because not every device has float64.
    """
    if accelerator.num_processes == 1:
        return list(map(math.fsum, columns))
    gathered = gather_object([list(map(exact_parts, columns))])
    return [math.fsum(itertools.chain(*parts)) for parts in zip(*gathered, strict=True)]


def exact_parts(values: Sequence[float]) -> list[float]:
    """A few numbers whose exact sum is that of the values: its rounded value, that of what is left, and so on."""
    parts: list[float] = []
    while rest := math.fsum(itertools.chain(values, (-part for part in parts))):
        parts.append(rest)
        if not math.isfinite(rest):
            break
    return parts


def check_same(accelerator: Accelerator, what: str, value: object, cure: str) -> None:
    """Raise InputError on all processes if two don't agree on something that they must share, naming both."""
    if accelerator.num_processes == 1:
        return
    values = gather_object([(str(value), socket.gethostname(), accelerator.process_index)])
    first, first_host, _ = values[0]
    for other, host, process in values:
        if other != first:
            raise InputError(
                f"{what} differs: {first} on process 0 ({first_host}), {other} on process {process} ({host}); {cure}"
            )


def describe_ranks(accelerator: Accelerator) -> list[dict[str, Any]]:
    """Host, device and CPU threads of every process, in order. All processes must call this."""
    local = {
        "process": accelerator.process_index,
        "host": socket.gethostname(),
        "device": str(accelerator.device),
        "name": devices.name(accelerator.device),
        "threads": torch.get_num_threads(),
    }
    return gather_object([local]) if accelerator.num_processes > 1 else [local]


@contextmanager
def unsharded(accelerator: Accelerator, objective: nn.Module) -> Iterator[None]:
    """Within this context, parts of a model can be called on their own, even if FSDP2 has sharded them.

    Outside the objective there is no mixed precision, which FlashAttention needs. So the context turns it on for it.
    Layers gather their weights when they are called; the weights outside them (embeddings, head) only when the whole
    model is, so they are gathered here. All processes must do the same within the context.
    """
    flash = "flash" in str(accelerator.unwrap_model(objective).model.config._attn_implementation)
    with accelerator.autocast() if flash else nullcontext():
        if not isinstance(objective, FSDPModule):
            yield
            return
        objective.unshard()
        try:
            yield
        finally:
            objective.reshard()
