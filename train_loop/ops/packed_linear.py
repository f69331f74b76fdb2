"""Matrices in the order in which a CPU multiplies them.

Generation goes token by token, and each token needs every weight once, for one or a few rows of activations: most of
the time goes into fetching the weights from memory. A general matrix product fetches and rearranges them in every call;
once oneDNN has rearranged them, they are read in one stream. On two cores, products are 1.8 times as fast with one row,
3 times with eight (`scripts/bench/README.md`).
"""

from typing import Any

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from train_loop.ops import products

_ROWS = 8  # rows that the order is chosen for; other numbers work, too


def pack(model: PreTrainedModel) -> bool:
    """Give a model's linear layers packed copies of their matrices, in place, for use without gradients.

    The weights stay as they are and must not change afterwards. The copies need as much memory again. Returns whether
    it was done: only on a CPU, for fp32, if torch has oneDNN and there is enough memory.
    """
    layers: list[Any] = [module for module in model.modules() if type(module) in (nn.Linear, Conv1D)]
    needed = sum(4 * layer.weight.numel() for layer in layers)
    possible = (
        products.ONEDNN in products.available()
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
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
