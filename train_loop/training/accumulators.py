"""How the gradients of a step's micro-batches are added up: in floating point, scaled for fp16, or in fixed point.

    begin -> for each micro-batch: backward of `scaled(nll)`, `add` -> `finish` -> `accepts` -> `update`

`finish` and `accepts` say whether the step stands. Where it doesn't, they have chosen another scale, and the same
micro-batches are computed once more.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from train_loop.distributed.fixed_point import TOLERANCE, FixedPointSum
from train_loop.metrics.throughput import Throughput


class Accumulator:
    """Adds gradients up in floating point, in the parameters themselves; data parallelism adds up those of the ranks.

    Attributes:
        weight: what each micro-batch's summed nll is multiplied by. Data parallelism averages over the W ranks, so
            W / T makes the gradient that of the mean over the step's T targets.
        sums_ranks: whether the last backward pass of a step adds up the gradients of all ranks.
    """

    sums_ranks = True

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.weight = 1.0

    def begin(self, targets: int, micro_batches: int) -> None:
        """Start the sum of a step with so many targets and micro-batches, over all ranks."""
        self.weight = self.accelerator.num_processes / targets

    def scaled(self, nll_sum: torch.Tensor) -> torch.Tensor:
        """What to differentiate [] for a micro-batch's summed nll []."""
        return nll_sum * self.weight

    def add(self) -> None:
        """Take in the gradient of a micro-batch."""

    def finish(self, clock: Throughput) -> bool:
        """Complete the sum, in the parameters' gradients; returns whether the scale fitted."""
        return True

    def accepts(self, loss: float, norm: float) -> bool:
        """Whether the loss and the gradient's norm are the step's own, and not an effect of the scale."""
        return True

    def update(self, optimizer: torch.optim.Optimizer, applied: bool) -> None:
        """Change the weights, if the step is applied."""
        if applied:
            optimizer.step()

    def record(self) -> dict[str, Any]:
        """What the log says of the sum, where there is something to say."""
        return {}


class LossScaled(Accumulator):
    """For fp16, whose smallest number is 6e-8: the loss is multiplied by a scale, and the gradient divided by it.

    A scale that is too large is no fault of the step, which is computed again at half of it.
    """

    def __init__(self, accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(accelerator)
        self.scaler: torch.amp.GradScaler = accelerator.scaler
        self.optimizer = optimizer
        self.overflows = 0

    def begin(self, targets: int, micro_batches: int) -> None:
        """Start a sum that has not overflowed yet."""
        super().begin(targets, micro_batches)
        self.overflows = 0

    def scaled(self, nll_sum: torch.Tensor) -> torch.Tensor:
        """The weighted loss [] at the present scale."""
        return self.scaler.scale(super().scaled(nll_sum))

    def finish(self, clock: Throughput) -> bool:
        """Divide the gradients by the scale."""
        self.scaler.unscale_(self.optimizer)
        return True

    def accepts(self, loss: float, norm: float) -> bool:
        """Whether the gradient is finite; if it is not at a scale of 1 or with such a loss, that is the step's own."""
        if math.isfinite(norm) or not math.isfinite(loss) or self.scaler.get_scale() <= 1:
            return True
        self.overflows += 1
        self.scaler.update()
        self.optimizer.zero_grad()
        return False

    def update(self, optimizer: torch.optim.Optimizer, applied: bool) -> None:
        """Change the weights, and choose the next step's scale."""
        if applied:
            self.scaler.step(optimizer)
        self.scaler.update()

    def record(self) -> dict[str, Any]:
        """The scale of the next step, and how often this one was computed again."""
        return {"loss_scale": self.scaler.get_scale(), "overflows": self.overflows}


class FixedPoint(Accumulator):
    """For run.reproducible bitwise: adds gradients up as integers, so that their order makes no difference."""

    sums_ranks = False

    def __init__(self, accelerator: Accelerator, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(accelerator)
        self.sum = FixedPointSum(accelerator, parameters)
        self.targets = 1

    def begin(self, targets: int, micro_batches: int) -> None:
        """Start a sum of as many terms as there are micro-batches; it is divided by the targets at the end."""
        self.targets = targets
        self.sum.begin(micro_batches)

    def add(self) -> None:
        """Move the gradient out of the parameters, into the sum."""
        self.sum.add()

    def finish(self, clock: Throughput) -> bool:
        """Put the mean's gradient, over all ranks, back into the parameters."""
        with clock("communication" if self.accelerator.num_processes > 1 else "backward"):
            return self.sum.finish(self.targets)

    def record(self) -> dict[str, Any]:
        """How far the sum may be from the exact one, relative to its norm, where that would be felt."""
        return {"fixed_point_rounding": self.sum.rounding} if self.sum.rounding > TOLERANCE else {}


def build(
    accelerator: Accelerator, parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer, bitwise: bool
) -> Accumulator:
    """The way of adding up that a run's precision and reproducibility ask for."""
    if bitwise:
        return FixedPoint(accelerator, parameters)
    return Accumulator(accelerator) if accelerator.scaler is None else LossScaled(accelerator, optimizer)
