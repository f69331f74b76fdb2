"""Matrices in the order in which a CPU multiplies them.

Text comes out token by token, so each token needs every weight once, for one or a few rows of activations: what takes
time is to fetch the weights from memory. A matrix product of general shapes fetches and rearranges them for every call;
rearranged once, with oneDNN, they are read in one stream. Two cores: products at 1.8 times the rate with one row, 3
times with eight (`scripts/bench/README.md`).
"""

from typing import Any

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from train_loop.ops import cpu

_ROWS = 8  # that the order is chosen for; others work, too


def pack(model: PreTrainedModel) -> bool:
    """Give a model's linear layers packed copies of their matrices, in place, for use without gradients.

    Its weights stay as they are and must not change any more. The copies need as much memory again.

    Returns:
        Whether it was done: on a CPU, for fp32, where torch has oneDNN and the memory has room.
    """
    layers: list[Any] = [module for module in model.modules() if type(module) in (nn.Linear, Conv1D)]
    needed = sum(4 * layer.weight.numel() for layer in layers)
    possible = (
        cpu.has_products()
        and all(layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32 for layer in layers)
        and psutil.virtual_memory().available > 1.5 * needed
    )
    if possible:
        for layer in layers:
            layer.forward = _Packed(layer)
    return possible


class _Packed:
    """What a linear layer computes, x W^T + b, with W [out, in] in oneDNN's order."""

    def __init__(self, layer: Any) -> None:
        weight = layer.weight.detach()
        weight = weight.t() if isinstance(layer, Conv1D) else weight
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
        self.bias = None if layer.bias is None else layer.bias.detach()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return cpu.product(x, self.weight, self.bias)
