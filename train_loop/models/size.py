"""How large a model would be, found without allocating it, so that no mistake in a number fills the memory."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from train_loop import devices
from train_loop.errors import InputError

_MOST_TENSORS = 100_000
"""More than any model has; the largest have some 10,000, as an expert's matrices are in one tensor with the others'."""
_MOST_LAYERS = 10_000
_BYTES, _TRAINED_BYTES = 4, 16  # of a weight in fp32: alone, and with its gradient and both moments


def check_numbers(settings: Any, where: str) -> None:
    """Refuse numbers that would fill the memory with lists already when a configuration is made. Raises InputError."""
    if not isinstance(settings, dict):
        return
    for key, value in settings.items():
        counts = ("layer" in str(key) or "label" in str(key)) and "size" not in str(key)  # vocab_size_per_layer_input
        if counts and isinstance(value, int | float) and value > _MOST_LAYERS:
            raise InputError(f"{where}: {key} {value:,} is more than any model has; use at most {_MOST_LAYERS:,}")
        check_numbers(value, where)


def outline(config: PreTrainedConfig, where: str) -> PreTrainedModel:
    """A model on torch's meta device, where tensors have shapes but no memory; InputError if it has no layers."""
    _check_layers(config, where)
    with _counted(math.inf, where, 0), torch.device("meta"):
        return _made(config)


class Room(NamedTuple):
    """Memory that a model has to fit into: of a device, or (as `where` says) of this machine.

    `processes` have it together. Each holds one of `shards` parts of a weight.
    """

    bytes: int
    where: str
    processes: int
    shards: int

    def takes(self, bytes_: float) -> float:
        """What is taken of it if the whole model takes so many bytes."""
        return bytes_ * self.processes / self.shards


def check_size(config: PreTrainedConfig, where: str, trained: bool = False) -> None:
    """Refuse a model without layers, or one that cannot fit into memory. Raises InputError with both sizes.

    What has to fit are weights or, if it is to be `trained`, weights, gradients and moments: what this process holds of
    them, and on this machine all its processes together. Whatever else a run takes, only `train-loop estimate` tells.
    The model is made on torch's meta device, and not far beyond the limit.
    """
    _check_layers(config, where)
    device, host = _rooms()
    # What is tied later counts twice here, so that only what is far too large is not made to its end.
    with _counted(4 * host.bytes / host.takes(_BYTES), where, host.bytes), torch.device("meta"):
        weights = sum(each.numel() for each in _made(config).parameters())
    for room in {device, host}:
        trains = trained and room is device
        if (takes := room.takes(weights * (_TRAINED_BYTES if trains else _BYTES))) > room.bytes:
            what = "weights, gradients and moments" if trains else "weights"
            cure = "choose a smaller model, or let more GPUs share it (configs/accelerate/fsdp2.yaml)"
            sizes = f"take {takes / 1e9:,.1f} GB {room.where}, which has {room.bytes / 1e9:,.1f} GB"
            raise InputError(f"{where}: the {what} of its {weights:,} parameters {sizes}; {cure}")


def _rooms() -> tuple[Room, Room]:
    """The memory of this process's device and that of this machine, which are the same on a CPU."""
    local = shards = 1
    device = torch.device("cpu")
    if AcceleratorState._shared_state:  # else no processes were started
        state = AcceleratorState()
        local, device = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes)), state.device
        if state.is_fsdp2:
            mesh = getattr(state, "parallelism_config", None)
            shards = state.num_processes // (1 if mesh is None else mesh.dp_replicate_size)
    host = Room(devices.memory(torch.device("cpu")), "on this machine", local, shards)
    if device.type == "cpu":
        return host, host
    return Room(devices.memory(device), f"on {devices.name(device)}", 1, shards), host


def _check_layers(config: PreTrainedConfig, where: str) -> None:
    for name in ("num_hidden_layers", "hidden_size"):
        value = getattr(config.get_text_config(), name, None)
        if isinstance(value, int) and value < 1:
            raise InputError(f"{where}: {name} is {value}; a model has at least 1")


def _made(config: PreTrainedConfig) -> PreTrainedModel:
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    made.tie_weights()  # Transformers 5.0 leaves that to whoever fills a model without values
    return made


@contextmanager
def _counted(most: float, where: str, memory: int) -> Iterator[None]:
    """Within this context, no more than `most` weights can be made."""
    weights = tensors = 0
    counted: dict[int, torch.Tensor] = {}  # holds them, so that no other gets the same id

    def count(module: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        nonlocal weights, tensors
        if tensor is None or id(tensor) in counted:  # it is registered once more to be tied
            return
        counted[id(tensor)] = tensor
        weights, tensors = weights + tensor.numel(), tensors + 1
        if weights > most or tensors > _MOST_TENSORS:
            size = f"{weights * _BYTES / 1e9:,.0f} GB or more in fp32"
            if weights <= most:
                size = f"more than {_MOST_TENSORS:,} tensors"
            alone = f"{name} alone is {'x'.join(map(str, tensor.shape))}"
            room = f"this machine's memory is {memory / 1e9:,.0f} GB; choose smaller numbers"
            raise InputError(f"{where}: its weights would take {size} ({alone}); {room}")

    hooks = [register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
