"""A step on trial: it allocates and computes what a step does, and changes nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_effect(optimizer: torch.optim.Optimizer) -> Iterator[Callable[[], None]]:
    """Within this context, the function it gives takes an optimizer step that changes no weight: with a gradient of
    zero, at a rate of zero. It allocates the moments, which are gone again afterwards, as are all gradients.
    """
    rates = [group["lr"] for group in optimizer.param_groups]

    def step() -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.zero_()
        optimizer.step()

    try:
        yield step
    finally:
        optimizer.state.clear()
        optimizer.zero_grad()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
