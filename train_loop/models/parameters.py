"""A model's weights by name, each once, and a hash of them."""

import hashlib

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


def digest(model: PreTrainedModel) -> str:
    """A hash of a model's weights, to compare them between processes."""
    hashes = [int(torch.hash_tensor(parameter.detach()).item()) for parameter in model.parameters()]
    return hashlib.sha256(repr(hashes).encode()).hexdigest()[:16]


def tensors_once(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name; those that share memory come once, under their first name.

    They come from the state dict, because FSDP2 puts its shards back before it makes one: just after a forward pass,
    the parameters of its outermost group are whole tensors, which the optimizer does not know.
    """
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        memory = id(tensor) if isinstance(tensor, DTensor) else tensor.data_ptr()
        if memory not in seen or tensor.numel() == 0:
            seen.add(memory)
            tensors[name] = tensor
    return tensors
