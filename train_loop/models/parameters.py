"""A model's weights: each by name once, what each of them is, and a hash of them all."""

import hashlib
import re

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

MATRIX, EMBEDDING, NORM, VECTOR, ADDED, ASKED = "matrix", "embedding", "norm", "vector", "bias or scale", "asked for"
"""What a parameter is; see `kind`."""

_LAYERS = nn.Linear | Conv1D | nn.modules.conv._ConvNd | nn.MultiheadAttention
_ADDS = {"bias", "biases", "scale", "scales", "log", "D", "time", "decay"}
_TABLE = {"embed", "embeds", "embedding", "embeddings", "emb", "pos", "position", "positions"}


def kind(owner: nn.Module, name: str, parameter: nn.Parameter) -> str:
    """What a parameter is to the model, from the type of the module that owns it; `name` is its full name.

    MATRIX: it multiplies, as in linear layers, convolutions and experts. EMBEDDING: a table of vectors to look up.
    NORM: a norm's. VECTOR: it has fewer than two dimensions, or all but one are 1 and no layer of torch owns it. ASKED:
    the model itself asks that it should not decay. ADDED: a matrix of biases, scales or rates, such as those of experts
    and of state-space models. The type of a module of the model's own says nothing: there, words in the name do.
    """
    if "norm" in type(owner).__name__.lower():
        return NORM
    if parameter.ndim < 2:
        return VECTOR
    if isinstance(owner, nn.Embedding):
        return EMBEDDING
    if getattr(parameter, "_no_weight_decay", False):
        return ASKED
    if isinstance(owner, _LAYERS):
        return MATRIX
    if parameter.squeeze().ndim < 2:
        return VECTOR
    last = name.rpartition(".")[2]
    words = set(re.split(r"[._]", name if last.isdigit() else last))  # a list has no names
    return EMBEDDING if words & _TABLE and "bias" not in words else ADDED if words & _ADDS else MATRIX


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
        memory = id(tensor) if isinstance(tensor, DTensor) or tensor.is_meta else tensor.data_ptr()
        if memory not in seen or tensor.numel() == 0:
            seen.add(memory)
            tensors[name] = tensor
    return tensors
