"""Ways to run a model that change nothing: evaluation, and a trial step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from train_loop.models.building import without_compile


@contextmanager
def evaluating(objective: nn.Module) -> Iterator[None]:
    """A context without dropout, gradients and compiled layers; afterwards the module's mode is what it was."""
    training = objective.training
    objective.eval()
    try:
        with torch.no_grad(), without_compile(objective):
            yield
    finally:
        objective.train(training)


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
