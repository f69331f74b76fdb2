"""Dropout on a CPU with cheaper random numbers (Srivastava et al., 2014).

    keep = bits >= 65,536 p        y = x keep / (1 - p)        16 random bits for each number

torch's own dropout draws from MKL, whose random numbers took 4 % of a training step. Here they come from torch's
generator, cut into 16 bits each. p is rounded to 1/65,536, and the rounded p scales what is kept: the mean stays x.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import library, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_STEPS = 1 << 16
_SMALL = 1 << 13  # for fewer numbers, torch's dropout is as fast
_ATTENTION = "sdpa_cheap_dropout"

# An operator, so that a compiler takes its numbers as given and never draws them twice.
_operators = library.Library("train_loop", "FRAGMENT")
_operators.define("random_bits(Tensor like) -> Tensor", tags=[torch.Tag.nondeterministic_seeded])


def _random_bits(like: torch.Tensor) -> torch.Tensor:
    """16 random bits for each number of `like`, as int16 of the same shape."""
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device="cpu").random_(-(2**63), None)
    return words.view(torch.int16)[: like.numel()].view(like.shape)


_operators.impl("random_bits", _random_bits, "CPU")
library.register_fake(
    "train_loop::random_bits", lambda like: torch.empty(like.shape, dtype=torch.int16, device=like.device)
)


def use_cheap_dropout(model: PreTrainedModel) -> None:
    """Let a model use this dropout on a CPU, in place; its attention, too, if torch's sdpa computes it."""
    drops = bool(getattr(model.config, "attention_dropout", 0))
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p).train(child.training))
                drops |= child.p > 0
    if drops and model.config._attn_implementation == "sdpa":
        AttentionInterface.register(_ATTENTION, attention)
        AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
        model.set_attn_implementation(_ATTENTION)


class Dropout(nn.Dropout):
    """`drop` as a layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [...] with a share p of it dropped in training, unchanged otherwise."""
        return drop(x, self.p) if self.training else x


def drop(x: torch.Tensor, p: float) -> torch.Tensor:
    """x [...] with each number set to 0 with probability p, and the others divided by 1 - p."""
    return _Dropout.apply(x, round(p * _STEPS)) if _is_worth_it(x, p) else F.dropout(x, p)


def _is_worth_it(x: torch.Tensor, p: float) -> bool:
    return x.device.type == "cpu" and x.numel() >= _SMALL and 0 < round(p * _STEPS) < _STEPS


class _Dropout(torch.autograd.Function):
    """Keeps the bits for the backward pass; they take half the memory of a mask of numbers."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, threshold: int) -> torch.Tensor:
        bits = torch.ops.train_loop.random_bits(x) if torch.compiler.is_compiling() else _random_bits(x)
        context.save_for_backward(bits)
        context.threshold = threshold
        return _dropped(x, bits, threshold)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (bits,) = context.saved_tensors
        return _dropped(gradients[0], bits, context.threshold), None


def _dropped(x: torch.Tensor, bits: torch.Tensor, threshold: int) -> torch.Tensor:
    """x without the numbers whose bits are below the threshold; the others are scaled."""
    if torch.compiler.is_compiling():  # torch 2.11 compiles what follows into a gradient of zeros
        return torch.where(bits >= threshold - _STEPS // 2, x, 0) * (_STEPS / (_STEPS - threshold))
    return _factors(x, bits, threshold).mul_(x)


def _factors(like: torch.Tensor, bits: torch.Tensor, threshold: int) -> torch.Tensor:
    """What dropout multiplies each number by: 0, or the scale."""
    # The comparison writes numbers, because converting a mask of booleans takes four times as long.
    keep = torch.ge(bits, threshold - _STEPS // 2, out=torch.empty_like(like))
    return keep.mul_(_STEPS / (_STEPS - threshold))


def attention(  # noqa: PLR0913  Transformers' own signature
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(Q K^T scaling + mask) V with dropout of the probabilities; Transformers calls it.

    Without dropout, or on a device other than a CPU, it is torch's scaled_dot_product_attention. The query is [batch,
    heads, queries, width], key and value [batch, heads or fewer, keys, width], the mask bool, True where to attend, or
    numbers to add [batch, 1 or heads, queries, keys]. Returns [batch, queries, heads, width], and None instead of
    weights.
    """
    more = any(others.get(name) is not None for name in ("position_bias", "cache", "softcap"))
    if more or not _is_worth_it(query, dropout):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **others
        )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        shape = (query.shape[2], key.shape[2])
        attention_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    if attention_mask is not None and attention_mask.dtype == torch.bool:  # adding is faster than filling in
        hidden = torch.zeros_like(attention_mask, dtype=query.dtype)
        attention_mask = hidden.masked_fill_(~attention_mask, torch.finfo(query.dtype).min)
    rounds = torch.is_autocast_enabled("cpu") or {query.dtype, key.dtype, value.dtype} != {torch.float32}
    if not rounds and not torch.compiler.is_compiling():
        return _Attention.apply(query, key, value, attention_mask, scaling, round(dropout * _STEPS)), None
    scores = (query * scaling) @ key.transpose(-2, -1)
    if attention_mask is not None:
        scores = scores.add_(attention_mask)
    probabilities = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    return (drop(probabilities, dropout) @ value).transpose(1, 2).contiguous(), None


class _Attention(torch.autograd.Function):
    """The same in fp32, row by row of the batch, so that a row's scores stay in a cache from one operation to the next.

    The backward pass computes probabilities again, and drops some of them by the bits of the forward pass.
    """

    @staticmethod
    def forward(  # noqa: PLR0913
        context: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        threshold: int,
    ) -> torch.Tensor:
        batch, heads, queries, width = query.shape
        bits = _random_bits(torch.empty(batch, heads, queries, key.shape[2], device="meta"))
        masks = [None] * batch if mask is None else list(mask.expand(batch, *mask.shape[-3:]))
        output = query.new_empty(batch, queries, heads, width)
        for row in range(batch):
            probabilities = _probabilities(query[row], key[row], masks[row], scaling)
            probabilities *= _factors(probabilities, bits[row], threshold)
            output[row] = torch.bmm(probabilities, value[row]).transpose(0, 1)
        context.save_for_backward(query, key, value, bits, *([] if mask is None else masks))
        context.scaling, context.threshold = scaling, threshold
        return output

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, bits, *masks = context.saved_tensors
        # Laid out like a projection's output, [batch, tokens, heads, width].
        to_query, to_key, to_value = (
            torch.empty_like(each.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
            for each in (query, key, value)
        )
        for row, gradient in enumerate(gradients[0].transpose(1, 2)):
            probabilities = _probabilities(query[row], key[row], masks[row] if masks else None, context.scaling)
            factors = _factors(probabilities, bits[row], context.threshold)
            to_probabilities = torch.bmm(gradient, value[row].transpose(1, 2)).mul_(factors)
            to_value[row] = torch.bmm(factors.mul_(probabilities).transpose(1, 2), gradient)
            to_scores = torch._softmax_backward_data(to_probabilities, probabilities, -1, torch.float32)
            to_scores *= context.scaling
            to_query[row] = torch.bmm(to_scores, key[row])
            to_key[row] = torch.bmm(to_scores.transpose(1, 2), query[row])
        return to_query, to_key, to_value, None, None, None


def _probabilities(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scaling: float) -> torch.Tensor:
    """softmax(Q K^T scaling + mask) [heads, queries, keys] of a row of the batch."""
    scores = torch.bmm(query, key.transpose(1, 2)).mul_(scaling)
    if mask is not None:
        scores += mask
    return torch._softmax(scores, -1, False, out=scores)
