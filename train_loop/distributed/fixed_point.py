"""Sums whose bits don't depend on the order of the terms: gradients in fixed point.

Floating-point sums round after every addition. A different number of processes adds up the micro-batches in a
different order, and so gets different bits. Integers don't round. Each micro-batch's gradient g becomes the integer

    round(g * 2^s)      64 bits, s chosen so that the sum over all micro-batches cannot overflow

These integers are added up, first on each process and then over all processes, and the sum is turned back into a float
once. The gradient of a micro-batch has the same bits wherever it is computed, so the sum has the same bits, too (Demmel
and Nguyen, "Fast reproducible floating-point summation", 2013, has the general theory).

The scale depends only on the gradients of the step, never on which process computed them. Every step begins with room
for components below 2^20. If one is larger than that, or if all are so small that rounding to integers would matter,
the step is computed again with a scale that fits.
"""

import math
from collections.abc import Iterable

import torch
from accelerate import Accelerator

_BITS = 62  # of an int64, without its sign and one spare bit
_ROOM = 20  # at first, components below 2^20: those of a sum over tokens, in nats
_LEAST_ROOM = -60  # 2^s has to fit into fp32
TOLERANCE = 1e-6  # rounding to integers, relative to the gradient's norm: below the noise of fp32's own sums


class FixedPointSum:
    """The gradient of one step, summed over micro-batches and processes; their order changes no bit.

    It takes 8 bytes per parameter in addition to what training needs anyway. `rounding` is how far the last sum can be
    from the exact one, relative to its norm; 0 for a zero gradient.
    """

    def __init__(self, accelerator: Accelerator, parameters: Iterable[torch.nn.Parameter]) -> None:
        self.accelerator = accelerator
        self.parameters = list(parameters)
        sizes = [parameter.numel() for parameter in self.parameters]
        self.total = torch.zeros(sum(sizes), dtype=torch.int64, device=accelerator.device)
        self.parts = list(self.total.split(sizes))
        self.peak = torch.zeros((), device=accelerator.device)
        # On a CPU, chunks are small enough for intermediate numbers to stay in its cache.
        self.chunk = 2**18 if accelerator.device.type == "cpu" else 2**28
        self.rounding = 0.0
        self._room = _ROOM

    def begin(self, terms: int, room: int = _ROOM) -> None:
        """Start a sum of `terms` micro-batches (over all processes) with components below 2^room."""
        self.terms, self._room = terms, room
        self.scale = 2.0 ** (_BITS - room - math.ceil(math.log2(terms)))
        self.total.zero_()
        self.peak.zero_()

    @torch.no_grad()
    def add(self) -> None:
        """Add the gradient of a micro-batch to the sum, and remove it from the parameters."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        peak = torch.stack(torch._foreach_norm(gradients, ord=math.inf)).max().float()
        self.peak = torch.maximum(self.peak, torch.where(peak.isfinite(), peak, math.inf))
        for parameter, part in zip(self.parameters, self.parts, strict=True):
            if parameter.grad is not None:
                gradient = parameter.grad.flatten()
                for integers, values in zip(part.split(self.chunk), gradient.split(self.chunk), strict=True):
                    # The scale is a power of two, so this product is exact in fp32, too.
                    integers += (values * self.scale).round_().long()
                parameter.grad = None

    @torch.no_grad()
    def finish(self, targets: int) -> bool:
        """Write the sum over all processes, divided by `targets`, into the parameters' gradients; NaN if not finite.

        Returns whether the scale fitted. If it did not, this function has called `begin` with a better one, and all
        micro-batches have to be computed and added again.
        """
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(self.total)
            torch.distributed.all_reduce(self.peak, torch.distributed.ReduceOp.MAX)
        peak = float(self.peak)
        fitting = max(math.frexp(peak)[1], _LEAST_ROOM)  # the peak is below 2^fitting
        if math.isfinite(peak) and fitting > self._room:
            self.begin(self.terms, fitting)
            return False
        norms = []  # in units of 1 / scale, the step of the integers
        for parameter, part in zip(self.parameters, self.parts, strict=True):
            parameter.grad = torch.empty_like(parameter, memory_format=torch.contiguous_format)
            gradient = parameter.grad.flatten()
            for integers, values in zip(part.split(self.chunk), gradient.split(self.chunk), strict=True):
                exact = integers.double()
                norms.append(exact.norm())
                values.copy_(exact.div_(self.scale * targets))
            if not math.isfinite(peak):
                parameter.grad.fill_(math.nan)
        norm = float(torch.stack(norms).norm())
        # Each term was rounded by at most half a step; the mean squared error is a twelfth of the step's square.
        error = math.sqrt(len(self.total) * self.terms / 12)
        self.rounding = error / norm if norm else math.inf if peak else 0.0
        if self.rounding > TOLERANCE and fitting < self._room:
            for parameter in self.parameters:
                parameter.grad = None
            self.begin(self.terms, fitting)
            return False
        return True
