"""A trial step: it allocates and computes what a step does, but changes nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_effect(optimizer: torch.optim.Optimizer) -> Iterator[Callable[[], None]]:
    """A context whose function takes an optimizer step that changes no weight: its gradients and its rate are zero.
    The step allocates the moments; on leaving the context, they are gone, and so are all gradients.
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
