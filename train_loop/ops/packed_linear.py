"""Linear layers for a few rows at a time, as in generation.

Generation goes token by token, and each token needs every weight once, for one or a few rows of activations: most of
the time goes into fetching the weights from memory. Which way is fastest depends on the processor and on the number of
rows: the matrices as they lie, or copies in another order. oneDNN's order, for one, is read in a single stream. Copies
are made when they are first needed, and no prompt is a reason to: its many rows are multiplied as they lie.
"""

from typing import Any, NamedTuple

import psutil
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from train_loop import devices
from train_loop.ops import products

_ROWS = 8  # rows that oneDNN's order is chosen for; other numbers work, too
_FEW = 16  # rows from which on any order is as good


class Way(NamedTuple):
    """How a processor multiplies: up to so many rows as the matrices lie, more by a library, with its copies.

    oneDNN has an order of its own; torch's is [out, in], which an `nn.Linear` has already, but a `Conv1D` has not.
    """

    lying: int
    copies: str


# By the processor's maker and torch's name for what it can do. Beside them, milliseconds for all matrices of DistilGPT2
# (328 MB, from memory), with one row and with eight: as they lie / in oneDNN's order / as [out, in].
_TABLE = {
    ("GenuineIntel", "AVX512"): Way(2, products.ONEDNN),  # 13 / 17 / 14; 27 / 20 / 41; with two rows 16 / 17 / 12
    ("GenuineIntel", "AVX2"): Way(1, products.TORCH),  # 14 / 18 / 16; 36 / 31 / 29: a newer one that did without more
    ("AuthenticAMD", "AVX512"): Way(0, products.ONEDNN),  # 23 / 13; 45 / 15
    ("AuthenticAMD", "AVX2"): Way(1, products.ONEDNN),  # 23 (by OpenBLAS) / 25; 58 / 40
}
_ELSEWHERE = Way(0, products.ONEDNN)


def pack(model: PreTrainedModel) -> bool:
    """Let a model's linear layers multiply few rows in the fastest way, in place, for use without gradients.

    The weights stay as they are and must not change afterwards. Copies in oneDNN's order need as much memory again, 4
    bytes a number; those as [out, in] only where the layers are `Conv1D`, as in GPT-2. Returns whether it was done:
    only on a CPU, for fp32, if there is enough memory for the copies, and the libraries multiply right.
    """
    layers: list[Any] = [module for module in model.modules() if type(module) in (nn.Linear, Conv1D)]
    fp32 = all(layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32 for layer in layers)
    if not fp32:
        return False
    way = choice()
    copied = [layer for layer in layers if way.copies == products.ONEDNN or isinstance(layer, Conv1D)]
    needed = sum(4 * layer.weight.numel() for layer in copied)
    possible = products.proven(way.copies) and psutil.virtual_memory().available > 1.5 * needed
    if possible:
        for layer in layers:
            layer.forward = _Few(layer, way)
    return possible


def choice() -> Way:
    """The way of this machine's processor."""
    processor = devices.processor()
    way = _TABLE.get(processor, _ELSEWHERE)
    # What lies is multiplied by the library of long products, and there it must be OpenBLAS.
    if processor == ("AuthenticAMD", "AVX2") and products.choice().forward != products.OPENBLAS:
        return _ELSEWHERE
    return way


class _Few:
    """What a linear layer computes, x W^T + b for x [..., in], W [out, in], b [out]."""

    def __init__(self, layer: Any, way: Way) -> None:
        weight = layer.weight.detach()
        self.weight = weight.t() if isinstance(layer, Conv1D) else weight
        self.bias = None if layer.bias is None else layer.bias.detach()
        self._way = way
        self._copy: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // x.shape[-1]
        one_token_each = x.dim() == 2 or x.shape[-2] == 1
        if not (one_token_each and self._way.lying < rows <= _FEW):
            return products.forward(x, self.weight, self.bias)
        if self._copy is None:
            self._copy = (
                torch.ops.mkldnn._reorder_linear_weight(self.weight, _ROWS)
                if self._way.copies == products.ONEDNN
                else self.weight.contiguous()  # itself, if it lies like this
            )
        if self._way.copies == products.ONEDNN:
            return torch.ops.mkldnn._linear_pointwise(x, self._copy, self.bias, "none", [], "")
        return F.linear(x, self._copy, self.bias)
