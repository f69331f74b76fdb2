"""One optimizer step, whole: micro-batches, normalisation, clipping, finite check, update.

What is minimised is the mean over *all* target tokens of the step, on all processes W and in all micro-batches m:

    loss = sum_m nll_m / T          T = targets of the whole step, known from the plan before the first forward pass

Each process backpropagates its micro-batches' sums; data parallelism then averages gradients over the processes,
that is, divides by W. So every sum is scaled by W / T, and the average comes out as the gradient of `loss`, also
when the last micro-batch is short or a process had an empty one. A mean per micro-batch or per process would not.

(With run.reproducible bitwise, the sums' gradients are added up in fixed point and divided by T at the end.)
"""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.distributed.tensor import DTensor

from train_loop.data.loader import Batch
from train_loop.rng import seed_torch
from train_loop.training.accumulators import FixedPointSums

_PIECE = 1 << 16  # numbers whose squares fp32 adds up to a millionth


class StepResult(NamedTuple):
    """What a step was.

    loss in nats per target; grad_norm, of the gradient before clipping; taken: whether the weights were updated;
    overflows: how often it was computed again because the scaled fp16 loss was too large; stop: whether a process had
    been asked to stop.
    """

    loss: float
    grad_norm: float
    taken: bool
    overflows: int = 0
    stop: bool = False


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
    sums: FixedPointSums | None = None,
    stop: Callable[[], bool] = lambda: False,
    lap: Callable[[str], None] = lambda part: None,
) -> StepResult:
    """Take one optimizer step.

    Whether it is taken is decided by all processes together, from the losses of all micro-batches and the norm of the
    summed gradient: the same numbers everywhere, read from the device at one time.

    Args:
        accelerator: devices, processes, precision.
        objective: the prepared `Objective`.
        optimizer: the prepared optimizer.
        micro_batches: this process's share of the step.
        count: how many micro-batches the step has, over all processes.
        targets: target tokens of the whole step, over all processes.
        learning_rate: of this step.
        max_grad_norm: gradients are scaled down to this global norm; None leaves them.
        seed: (run's seed, step), from which with the micro-batch's number each dropout mask follows.
        sums: where gradients are added up in fixed point.
        stop: whether this process was asked to stop, asked after its last micro-batch; all are told together with the
            losses.
        lap: told where each part of the step ends; see `metrics/throughput.py`.
    """
    # Accelerate's wrapper looks for packages on disk before each step.
    inner, scaler = optimizer.optimizer, accelerator.scaler
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    micro_batches = list(micro_batches)
    lap("data")
    limit = max_grad_norm or math.inf
    targets = max(targets, 1)  # where documents are isolated, blocks of first tokens alone have none
    overflows = 0
    if sums is not None:
        sums.begin(count)
    while True:
        told = _gradient(accelerator, objective, micro_batches, targets, seed, sums, stop, lap)
        if sums is not None:
            fitted = sums.finish(targets)
            lap("communication" if accelerator.num_processes > 1 else "backward")
            if not fitted:
                continue
        if scaler is not None:
            scaler.unscale_(inner)
        total = gradient_norm(parameters)
        # That of sharded gradients is the square root of a sum over the processes.
        whole = total.full_tensor() if isinstance(total, DTensor) else total
        *numbers, norm = torch.hstack([*told, whole]).tolist()
        stopping = any(numbers[len(micro_batches) :: len(micro_batches) + 1])
        del numbers[len(micro_batches) :: len(micro_batches) + 1]
        loss = math.fsum(numbers) / targets  # exact, so the order of processes makes no difference
        taken = math.isfinite(loss) and math.isfinite(norm)
        if taken or not math.isfinite(loss) or scaler is None or scaler.get_scale() <= 1:
            break
        # Only the scaled loss was too large for fp16: no fault of the step, so it is computed again at half the scale.
        overflows += 1
        scaler.update()
        inner.zero_grad()
    if taken:
        if norm + 1e-6 > limit:
            # As torch's clip_grads_with_norm_, which multiplies by 1 where there is nothing to clip.
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            torch._foreach_mul_(gradients, torch.clamp(limit / (total + 1e-6), max=1))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        inner.step() if scaler is None else scaler.step(inner)
    if scaler is not None:
        scaler.update()
    for parameter in parameters:  # as zero_grad, which is profiled
        parameter.grad = None
    lap("optimizer")
    return StepResult(loss, norm, taken, overflows, stopping)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """The 2-norm [] of all gradients together, before clipping; sharded where they are.

    On a CPU, torch adds up a tensor's squares in fp32, one after the other: of 40 million normal numbers the norm comes
    out 0.3 % too small. Of pieces that are added up in their turn it does not.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    pieces = [
        piece
        for each in gradients
        for piece in (each.flatten().split(_PIECE) if each.numel() > _PIECE and _is_plain(each) else [each])
    ]
    # As torch's get_total_norm, without sorting them by device and type.
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(pieces)))


def _is_plain(gradient: torch.Tensor) -> bool:
    return gradient.device.type == "cpu" and not isinstance(gradient, DTensor)


def _gradient(
    accelerator: Accelerator,
    objective: nn.Module,
    micro_batches: list[Batch],
    targets: int,
    seed: tuple[int, int],
    sums: FixedPointSums | None,
    stop: Callable[[], bool],
    lap: Callable[[str], None],
) -> list[torch.Tensor]:
    """Forward and backward of one step.

    Returns:
        Of each process, its micro-batches' nll and whether it was asked to stop: processes * (micro-batches + 1)
        numbers, in tensors [] or [numbers].
    """
    weight = accelerator.num_processes / targets if sums is None else 1
    nll = []
    for number, batch in enumerate(micro_batches, 1):
        seed_torch(accelerator.device, "dropout", *seed, batch.number)
        # Gradients of the processes are summed once, after the last micro-batch.
        last = number == len(micro_batches) and sums is None
        with nullcontext() if last else accelerator.no_sync(objective):
            batch = batch.to(accelerator.device)
            nll_sum = objective(batch.inputs, batch.targets, batch.positions)
            lap("forward")
            # What Accelerate's own would do, without a division by its count of accumulated steps, which is 1.
            scaled = nll_sum * weight
            (scaled if accelerator.scaler is None else accelerator.scaler.scale(scaled)).backward()
        if sums is not None:
            sums.add()
        lap("backward")
        nll.append(nll_sum.detach())
    mine = [*nll, torch.full_like(nll[0], stop())]
    if accelerator.num_processes == 1:
        return mine
    everyones = accelerator.gather(torch.stack(mine))
    lap("waiting")
    return [everyones]
