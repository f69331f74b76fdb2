"""One optimizer step, whole: micro-batches, normalisation, clipping, finite check, update.

What is minimised is the mean over *all* target tokens of the step, on all processes W and in all micro-batches m:

    loss = sum_m nll_m / T          T = targets of the whole step, known from the plan before the first forward pass

Each process backpropagates its micro-batches' sums; data parallelism then averages gradients over the processes,
that is, divides by W. So every sum is scaled by W / T, and the average comes out as the gradient of `loss`, also
when the last micro-batch is short or a process had an empty one. A mean per micro-batch or per process would not.
"""

import math
from collections.abc import Iterable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from train_loop.data.loader import Batch
from train_loop.randomness import seed_torch


class StepResult(NamedTuple):
    """What a step was: its loss in nats per target, the gradient's norm before clipping, whether it was taken."""

    loss: float
    grad_norm: float
    taken: bool


def train_step(
    accelerator: Accelerator,
    objective: nn.Module,
    optimizer: AcceleratedOptimizer,
    micro_batches: Iterable[Batch],
    count: int,
    targets: int,
    learning_rate: float,
    max_grad_norm: float | None,
    seed: tuple[int, int],
) -> StepResult:
    """Take one optimizer step.

    Args:
        accelerator: devices, processes, precision.
        objective: the prepared `Objective`.
        optimizer: the prepared optimizer.
        micro_batches: this process's share of the step.
        count: how many micro-batches that is, the same on every process.
        targets: target tokens of the whole step, over all processes.
        learning_rate: of this step.
        max_grad_norm: gradients are scaled down to this global norm; None leaves them.
        seed: (run's seed, step), from which with the micro-batch's number each dropout mask follows.
    """
    # Without a loss scaler Accelerate's wrapper only hands on, after looking for packages on disk each time.
    inner = optimizer if accelerator.scaler else optimizer.optimizer
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    nll = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(micro_batches, 1):
        seed_torch(accelerator.device, "dropout", *seed, batch.number)
        # Gradients of the processes are summed once, after the last micro-batch.
        with nullcontext() if number == count else accelerator.no_sync(objective):
            nll_sum = objective(
                batch.inputs.to(accelerator.device, non_blocking=True),
                batch.targets.to(accelerator.device, non_blocking=True),
            )
            accelerator.backward(nll_sum * (accelerator.num_processes / targets))
        nll += nll_sum.detach()
    if accelerator.num_processes > 1:
        nll = accelerator.reduce(nll, "sum")
    loss = float(nll) / targets
    if accelerator.is_fsdp2:  # each process holds shards of the gradients
        norm = float(accelerator.clip_grad_norm_(parameters, max_grad_norm or math.inf))
    else:
        accelerator.unscale_gradients()
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf))
    taken = math.isfinite(loss) and math.isfinite(norm)
    if taken:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        inner.step()
    inner.zero_grad()
    return StepResult(loss, norm, taken)
