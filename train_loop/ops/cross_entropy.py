"""The loss of an output layer: summed nll of targets under softmax(W h + b), without ever holding all logits.

Logits are computed for one chunk of positions at a time. The forward pass does the work of both passes, as the gradient
needs only the probabilities, which are there anyway:

    d nll / d logits = softmax(logits) - onehot(target)

Products have the type of the hidden states, all sums are in fp32. In fp16 such a gradient would come to nothing,
because it is small and not yet scaled: there the backward pass computes each chunk's logits again.

Whatever is not a product spends its time on passes over memory. A CPU makes them in place and in fp32, a GPU in the
logits' own type, and half as many of them if this is compiled.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from train_loop.ops import products

_CPU_CHUNK = 256  # positions whose logits are held at once in fp32: fewer take more time, more take more memory
_CPU_LOGITS = 1 << 24  # and how many numbers these may be at most
_CHUNK = 4096  # the same on a GPU
_LOGITS = 1 << 27  # and how many numbers these may be at most, in fp32: half a gigabyte
_COMPILED = 1 << 29  # how many where they are held in 16 bits only: a gigabyte


class Memory(NamedTuple):
    """Bytes that are kept until the backward pass, and the most that are taken."""

    kept: int
    most: int


class TiedGradient:
    """Where an output layer's gradient waits for that of the embedding that shares its weight.

    In torch, the embedding's gradient is a second matrix of that size, with zeros except in the rows of a few tokens.
    Backpropagation reaches the embedding last, so here its rows are added to the gradient that is already there.
    """

    def __init__(self) -> None:
        self.waiting: torch.Tensor | None = None

    def take(self) -> torch.Tensor | None:
        """Hand out the waiting gradient, if there is one; nothing waits afterwards."""
        gradient, self.waiting = self.waiting, None
        return gradient


def linear_cross_entropy(  # noqa: PLR0913
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    ignored: int,
    tied: TiedGradient | None = None,
    compiled: bool = False,
) -> torch.Tensor:
    """The summed nll of targets under softmax(W h + b).

    Takes hidden [positions, width], weight W [vocabulary, width], bias b [vocabulary], targets int64 [positions], the
    value of targets that does not count, the `TiedGradient` of a weight that an embedding shares, and whether to
    compile what is not a product. Returns the sum in nats, [] float32.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    compiled = compiled and dtype == torch.bfloat16
    chunk = chunk_size(device, weight.shape[0], dtype, compiled)
    if not torch.is_grad_enabled():  # or torch would say of the weights that they need a gradient
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        hidden = hidden.detach()
    with torch.autocast(device, enabled=False):
        hidden = hidden.to(dtype)
        if dtype != torch.float16:
            return _LinearCrossEntropy.apply(hidden, weight, bias, targets, ignored, chunk, tied, compiled)

        def of_chunk(state: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            # Rounded here, so that the gradients of all chunks are added up in the weight's own type.
            with torch.autocast(device, enabled=False):
                logits = F.linear(state, weight.to(dtype), None if bias is None else bias.to(dtype))
                return F.cross_entropy(logits.float(), target, ignore_index=ignored, reduction="sum")

        parts = [
            checkpoint(of_chunk, *each, use_reentrant=False, preserve_rng_state=False)
            for each in zip(hidden.split(chunk), targets.split(chunk), strict=True)
        ]
        return torch.stack(parts).sum()


def chunk_size(device: str, vocabulary: int, dtype: torch.dtype, compiled: bool = False) -> int:
    """Positions whose logits are held at once.

    A power of two where chunks that are alike take less time: on a CPU, and if compiled.
    """
    if device == "cpu":
        return min(_CPU_CHUNK, _power_of_two(_CPU_LOGITS // vocabulary)) * 4 // dtype.itemsize
    return _power_of_two(_COMPILED // vocabulary) if compiled else max(1, min(_CHUNK, _LOGITS // vocabulary))


def _power_of_two(most: int) -> int:
    return 1 << max(1, most).bit_length() - 1


def memory(
    positions: int,
    weight: tuple[int, int],
    types: tuple[torch.dtype, torch.dtype],
    device: str,
    compiled: bool = False,
) -> Memory:
    """What a training pass takes for a weight [vocabulary, width], beside the hidden states and their gradient.

    `types` are those of the weight and of the products. Bytes are kept until the backward pass, and are taken at most.
    """
    (vocabulary, width), (held, computed) = weight, types
    compiled = compiled and computed == torch.bfloat16
    size, chunk = computed.itemsize, min(positions, chunk_size(device, vocabulary, computed, compiled))
    matrix, logits = vocabulary * width, vocabulary * chunk
    if computed == torch.float32 and device == "cpu":
        return Memory(held.itemsize * matrix, 4 * (matrix + logits))
    first = chunk == positions  # and only: there is no sum yet that its gradient is added to
    adding = (size if first and size == 4 else 4 + size) * matrix + size * logits
    rounded = size * matrix if held != computed else 0
    beside = 4 if device == "cpu" or size == 4 else 0 if compiled else 8  # bytes of a logit: copies in fp32
    waiting = 0 if first else 4 * matrix
    return Memory(held.itemsize * matrix, rounded + max(adding, waiting + (beside + size) * logits))


class _LinearCrossEntropy(torch.autograd.Function):
    """`linear_cross_entropy` in fp32 or bf16; the gradient of the weight is added up in fp32."""

    @staticmethod
    def forward(  # noqa: PLR0913
        context: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        ignored: int,
        chunk: int,
        tied: TiedGradient | None,
        compiled: bool = False,
    ) -> torch.Tensor:
        wanted = context.needs_input_grad
        dtype, cpu = hidden.dtype, hidden.device.type == "cpu"
        plain = cpu and dtype == torch.float32
        rounded, rounded_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        to_hidden = torch.empty_like(hidden) if wanted[0] else None
        to_weight: torch.Tensor | None = None
        to_bias = torch.zeros_like(bias, dtype=torch.float32) if wanted[2] and bias is not None else None
        of_logits = _in_place if cpu else _compiled if compiled and any(wanted) else _rounded
        nll = []
        for first in range(0, len(hidden), chunk):
            rows = slice(first, first + chunk)
            real = (targets[rows] != ignored).float()[:, None]
            target = targets[rows].clamp(min=0)[:, None]
            state = hidden[rows] if cpu else hidden[rows] * real.to(dtype)  # where nothing counts, no gradient comes
            logits = (products.forward if plain else F.linear)(hidden[rows], rounded, rounded_bias)
            found, gradient = of_logits(logits, target, real, any(wanted))
            nll.append((found * real)[:, 0])
            if gradient is None:
                continue
            if to_bias is not None:
                to_bias += (gradient if cpu else gradient.mul_(real)).sum(0, dtype=torch.float32)
            if to_hidden is not None:
                product = (products.to_inputs if plain else torch.mm)(gradient, rounded)
                to_hidden[rows] = product if cpu else product.mul_(real)
            if wanted[1]:
                to_weight = _added(to_weight, gradient, state, plain)
            del logits, gradient  # before the next chunk, so that only one is held
        context.tied = tied
        made = ((to_hidden, hidden), (to_weight, weight), (to_bias, bias))
        context.gradients = [None if each is None or of is None else each.to(of.dtype) for each, of in made]
        return torch.cat(nll).sum()

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = [None if each is None else each.mul_(gradients[0]) for each in context.gradients]
        context.gradients = []
        if context.tied is not None:
            context.tied.waiting = scaled[1]
        return (*scaled, None, None, None, None, None)


_Chunk = tuple[torch.Tensor, torch.Tensor | None]
"""A chunk's nll [positions, 1], and the gradient of its logits if it is wanted."""


def _in_place(logits: torch.Tensor, target: torch.Tensor, real: torch.Tensor, wanted: bool) -> _Chunk:
    """In fp32, and in memory that is there, and so in a CPU's cache."""
    exact = logits.float()
    exact -= exact.amax(dim=-1, keepdim=True)
    picked = exact.gather(1, target)
    total = exact.exp_().sum(dim=-1, keepdim=True)
    nll = total.log() - picked
    return nll, logits.copy_(exact.mul_(real / total).scatter_add_(1, target, -real)) if wanted else None


def _rounded(logits: torch.Tensor, target: torch.Tensor, real: torch.Tensor, wanted: bool) -> _Chunk:
    """In few passes over memory, since a GPU waits for nothing else; rows that don't count have a gradient, too."""
    log_p = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    picked = log_p.gather(1, target)
    if not wanted:
        return -picked, None
    gradient = torch.exp(log_p, out=logits)
    # p - 1 is rounded once: where p is almost 1, its rounded value would leave little of the difference.
    return -picked, gradient.scatter_(1, target, picked.expm1().to(gradient.dtype))


def _compiled(logits: torch.Tensor, target: torch.Tensor, real: torch.Tensor, wanted: bool) -> _Chunk:
    """As `_rounded`, in half as many passes and without a copy: the logits become their gradient."""
    return _compiler()(logits, target), logits


@functools.cache
def _compiler() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return torch.compile(_replaced, dynamic=False)


def _replaced(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """nll [positions, 1] of logits, which are replaced by their gradient."""
    exact = logits.float()
    total = torch.logsumexp(exact, dim=-1, keepdim=True)
    picked = logits.gather(1, target).float() - total
    at_target = torch.arange(logits.shape[1], device=logits.device) == target
    logits.copy_(torch.where(at_target, picked.expm1(), torch.exp(exact - total)))
    return -picked


def _added(total: torch.Tensor | None, gradient: torch.Tensor, rows: torch.Tensor, plain: bool) -> torch.Tensor:
    """A weight's gradient so far, in fp32, with that of a chunk."""
    if plain:
        if total is None:
            return products.to_weights(gradient, rows)
        products.add(total, gradient, rows)
        return total
    if gradient.device.type == "cpu":
        return products.add_rounded(total, gradient, rows)
    product = gradient.t() @ rows
    return product.float() if total is None else total.add_(product)
