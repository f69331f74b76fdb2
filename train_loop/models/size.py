"""How large a model would be, found without allocating it, so that no mistake in a number fills the memory."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from train_loop.errors import InputError

_MOST_TENSORS = 100_000
"""More than any model has; the largest have some 10,000, as an expert's matrices are in one tensor with the others'."""
_MOST_LAYERS = 10_000
_BYTES = 4  # of a weight, in fp32


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


def check_size(config: PreTrainedConfig, where: str) -> None:
    """Refuse a model without layers, or whose weights alone exceed this machine's memory. InputError with both sizes.

    The model is made on torch's meta device, and only up to the limit.
    """
    _check_layers(config, where)
    memory = psutil.virtual_memory().total + psutil.swap_memory().total
    with _counted(memory // _BYTES, where, memory), torch.device("meta"):
        _made(config)


def _check_layers(config: PreTrainedConfig, where: str) -> None:
    for name in ("num_hidden_layers", "hidden_size"):
        value = getattr(config.get_text_config(), name, None)
        if isinstance(value, int) and value < 1:
            raise InputError(f"{where}: {name} is {value}; a model has at least 1")


def _made(config: PreTrainedConfig) -> PreTrainedModel:
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    return made


@contextmanager
def _counted(most: float, where: str, memory: int) -> Iterator[None]:
    """Within this context, no more than `most` weights can be made."""
    weights = tensors = 0

    def count(module: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        nonlocal weights, tensors
        if tensor is None:
            return
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
