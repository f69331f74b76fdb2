"""How the gradients of a step's micro-batches are added up: in floating point, scaled for fp16, or in fixed point.

    begin -> for each micro-batch: backward of `scaled(nll)`, `add` -> `finish` -> `accepts` -> `update`

`finish` and `accepts` say whether the step stands. If it doesn't, they have already changed the scale, and the same
micro-batches run again.
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
    """Adds up gradients in floating point, in the parameters themselves; data parallelism adds up the ranks' gradients.

    Attributes:
        weight: the factor for each micro-batch's summed nll. Data parallelism averages over the W ranks, so the factor
            W / T gives the gradient of the mean over the step's T targets.
        sums_ranks: whether a step's last backward pass adds up the gradients of all ranks.
    """

    sums_ranks = True

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.weight = 1.0

    def begin(self, targets: int, micro_batches: int) -> None:
        """Start the sum of a step; both numbers count over all ranks."""
        self.weight = self.accelerator.num_processes / targets

    def scaled(self, nll_sum: torch.Tensor) -> torch.Tensor:
        """The scalar [] to differentiate for a micro-batch's summed nll []."""
        return nll_sum * self.weight

    def add(self) -> None:
        """Add the gradient of a micro-batch to the sum."""

    def finish(self, clock: Throughput) -> bool:
        """Leave the complete sum in the parameters' gradients; returns whether the scale fitted."""
        return True

    def accepts(self, loss: float, norm: float) -> bool:
        """Whether the loss and the gradient norm come from the step itself, not from the scale."""
        return True

    def update(self, optimizer: torch.optim.Optimizer, applied: bool) -> None:
        """Update the weights if the step is applied."""
        if applied:
            optimizer.step()

    def record(self) -> dict[str, Any]:
        """What to log about the sum, if anything."""
        return {}


class LossScaled(Accumulator):
    """For fp16, whose smallest number is 6e-8: multiplies the loss by a scale and divides the gradient by it.

    If the gradient overflows only because the scale is too large, the step runs again at half the scale.
    """

    def __init__(self, accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(accelerator)
        self.scaler: torch.amp.GradScaler = accelerator.scaler
        self.optimizer = optimizer
        self.overflows = 0

    def begin(self, targets: int, micro_batches: int) -> None:
        """Start the sum of a step, which has not overflowed yet."""
        super().begin(targets, micro_batches)
        self.overflows = 0

    def scaled(self, nll_sum: torch.Tensor) -> torch.Tensor:
        """The weighted loss [] at the current scale."""
        return self.scaler.scale(super().scaled(nll_sum))

    def finish(self, clock: Throughput) -> bool:
        """Divide the gradients by the scale."""
        self.scaler.unscale_(self.optimizer)
        return True

    def accepts(self, loss: float, norm: float) -> bool:
        """Whether the gradient is finite, or the scale is not to blame: it is at most 1, or the loss is not finite."""
        if math.isfinite(norm) or not math.isfinite(loss) or self.scaler.get_scale() <= 1:
            return True
        self.overflows += 1
        self.scaler.update()
        self.optimizer.zero_grad()
        return False

    def update(self, optimizer: torch.optim.Optimizer, applied: bool) -> None:
        """Update the weights if the step is applied, and choose the next step's scale."""
        if applied:
            self.scaler.step(optimizer)
        self.scaler.update()

    def record(self) -> dict[str, Any]:
        """The scale of the next step, and how often this step overflowed and ran again."""
        return {"loss_scale": self.scaler.get_scale(), "overflows": self.overflows}


class FixedPoint(Accumulator):
    """For run.reproducible bitwise: adds up gradients as integers, so that their order makes no difference."""

    sums_ranks = False

    def __init__(self, accelerator: Accelerator, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(accelerator)
        self.sum = FixedPointSum(accelerator, parameters)
        self.targets = 1

    def begin(self, targets: int, micro_batches: int) -> None:
        """Start a sum with one term for each micro-batch; `finish` divides it by the targets."""
        self.targets = targets
        self.sum.begin(micro_batches)

    def add(self) -> None:
        """Move the gradient from the parameters into the sum."""
        self.sum.add()

    def finish(self, clock: Throughput) -> bool:
        """Put the gradient of the mean over all ranks back into the parameters."""
        with clock("communication" if self.accelerator.num_processes > 1 else "backward"):
            return self.sum.finish(self.targets)

    def record(self) -> dict[str, Any]:
        """How far the sum may be from exact, relative to its norm, if that is more than `TOLERANCE`."""
        return {"fixed_point_rounding": self.sum.rounding} if self.sum.rounding > TOLERANCE else {}


def build(
    accelerator: Accelerator, parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer, bitwise: bool
) -> Accumulator:
    """The accumulator for a run's precision and reproducibility."""
    if bitwise:
        return FixedPoint(accelerator, parameters)
    return Accumulator(accelerator) if accelerator.scaler is None else LossScaled(accelerator, optimizer)
