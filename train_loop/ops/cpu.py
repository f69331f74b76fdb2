"""What makes training on a CPU fast: matrix products by the fastest library, and memory that stays with the process.

The arithmetic is that of torch, rounded differently. `products.py` knows which library is the fastest here.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from train_loop.ops import products
from train_loop.ops.cross_entropy import TiedGradient
from train_loop.ops.dropout import use_cheap_dropout

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of malloc.h


def fits(*tensors: torch.Tensor | None) -> bool:
    """Whether `products` takes these tensors: fp32 on the CPU, outside of autocast."""
    return not torch.is_autocast_enabled("cpu") and all(
        each is None or (each.device.type == "cpu" and each.dtype == torch.float32) for each in tensors
    )


def use_products(model: PreTrainedModel) -> None:
    """Let a model's linear layers multiply by `products`, in place.

    If the output of a GELU or of a layer norm goes into one of them, the backward pass recomputes it from that one's
    input, which is kept anyway. This saves a quarter of GPT-2's activations, for a percent of a step.
    """
    for layer in model.modules():
        if type(layer) in (nn.Linear, Conv1D):
            layer.forward = _Linear(layer)
        elif type(layer) is nn.GELU:
            gelu = functools.partial(F.gelu, approximate=layer.approximate)
            layer.forward = _Remade(gelu)  # type: ignore[assignment, method-assign]
        elif type(layer) is nn.LayerNorm:
            layer.forward = _Remade(layer.forward)  # type: ignore[assignment, method-assign]


_MadeFrom = tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]


class _Remade:
    """The forward pass of a cheap layer; its output carries what is needed to recompute it."""

    def __init__(self, forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._forward = forward

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        output = self._forward(x)
        if output.requires_grad:  # then torch keeps the input, too, and refuses one that was changed in place
            output.made_from = (self._forward, x.detach())  # type: ignore[attr-defined]
        return output


class _Linear:
    """The forward pass of a linear layer."""

    def __init__(self, layer: Any) -> None:
        self._layer, self._forward, self._transposed = layer, layer.forward, isinstance(layer, Conv1D)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self._layer.weight, self._layer.bias
        if not fits(x, weight, bias):
            return self._forward(x)
        made_from = getattr(x, "made_from", None) if x._version == 0 else None  # as it came out of the GELU
        return _Product.apply(x, weight.t() if self._transposed else weight, bias, made_from)


class _Product(torch.autograd.Function):
    """`products.forward` with its gradients."""

    @staticmethod
    def forward(
        context: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, made_from: _MadeFrom | None
    ) -> torch.Tensor:
        context.remake, kept = (None, x) if made_from is None else made_from
        context.save_for_backward(kept, weight)
        output = products.forward(x, weight, bias)
        # It may be a view, which autograd would not let a model change in place.
        return torch.ops.aten._unsafe_view(output, output.shape)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = context.saved_tensors
        (gradient,) = gradients
        to_x = products.to_inputs(gradient, weight) if context.needs_input_grad[0] else None
        to_weight = to_bias = None
        rows = gradient.flatten(0, -2)
        if context.needs_input_grad[1]:
            flat = (x if context.remake is None else context.remake(x)).flatten(0, -2)
            # Laid out in memory like the weight, so that adding it up rearranges nothing.
            to_weight = (
                products.to_weights(rows, flat) if weight.is_contiguous() else products.to_weights(flat, rows).t()
            )
        if context.needs_input_grad[2]:
            to_bias = rows.sum(0)
        return to_x, to_weight, to_bias, None


def tie_gradients(model: PreTrainedModel) -> TiedGradient | None:
    """Let a tied embedding add its gradient to that of `cross_entropy`, in place.

    Returns its argument; None if weights are not tied, or the embedding does more than look up.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    plain = type(embedding) is nn.Embedding and embedding.max_norm is None and not embedding.scale_grad_by_freq
    if not plain or head is None or head.weight is not embedding.weight:
        return None
    tied = TiedGradient()
    embedding.forward = lambda ids: _Rows.apply(embedding.weight, ids, embedding.padding_idx, tied)
    return tied


class _Rows(torch.autograd.Function):
    """The rows of an embedding [vocabulary, width] at ids [...]."""

    @staticmethod
    def forward(
        context: Any, weight: torch.Tensor, ids: torch.Tensor, padding: int | None, tied: TiedGradient
    ) -> torch.Tensor:
        context.save_for_backward(ids)
        context.shape, context.padding, context.tied = weight.shape, padding, tied
        return F.embedding(ids, weight)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (ids,), (gradient,) = context.saved_tensors, gradients
        waiting = context.tied.take()
        to_weight = gradient.new_zeros(context.shape) if waiting is None else waiting
        if context.padding is not None:  # torch leaves that row without a gradient
            gradient = gradient.masked_fill((ids == context.padding)[..., None], 0)
        to_weight.index_add_(0, ids.flatten(), gradient.flatten(0, -2))
        return to_weight if waiting is None else None, None, None, None


def keep_freed_memory() -> bool:
    """Let the C library, if it is glibc, keep freed memory for the next step instead of handing it back to the kernel.

    Big buffers come and go many times in a step, and the kernel fills each one that it hands out again with zeros, page
    by page. The process then keeps as much memory as a step needs at most. Returns whether it was done.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return bool(library.mallopt(_M_MMAP_MAX, 0) and library.mallopt(_M_TRIM_THRESHOLD, -1))


def hand_back_freed_memory() -> None:
    """Let the C library, if it is glibc, hand the memory of a tensor back to the kernel as soon as it is freed.

    Otherwise it keeps what several threads have freed in pieces, of which none may be large enough for the next tensor:
    a sharded step, which gathers and lets go of one layer after another, would take twice the memory that it needs.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def speed_up(
    model: PreTrainedModel, training: bool, linear: bool = True, keep_memory: bool = True
) -> TiedGradient | None:
    """Do all of this for a model on a CPU, in place; a model on another device stays as it is.

    `training` says whether gradients and dropout masks will be needed, `linear` whether linear layers are to be
    replaced, which compiled ones must not be. Returns what `cross_entropy` needs to know about a tied embedding.
    """
    if model.device.type != "cpu":
        return None
    if keep_memory:
        keep_freed_memory()
    if training:
        use_cheap_dropout(model)
    if not linear:
        return None
    products.follow_threads()
    use_products(model)
    return tie_gradients(model) if training else None
