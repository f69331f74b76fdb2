"""AdamW with decay groups, and the learning rate as a function of the step.

AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019), for each parameter w with gradient g:

    m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2
    w = w - lr * (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay * w)

Decay pulls matrices, which multiply, towards zero. It makes no sense for biases and norms, which add and scale.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from train_loop import devices
from train_loop.config.schema import OptimizerConfig


def decay_groups(module: nn.Module, decay_embeddings: bool) -> dict[str, dict[str, nn.Parameter]]:
    """The trainable parameters by whether they decay: {"decay": {name: parameter}, "no_decay": {...}}.

    Decided by the type of the module that owns a parameter, not by its name (which differs between architectures):
    norms have no decay, nor has anything with fewer than two dimensions; embeddings by choice. A tied weight counts
    once, as what it is first: an embedding.
    """
    groups: dict[str, dict[str, nn.Parameter]] = {"decay": {}, "no_decay": {}}
    seen: set[int] = set()
    for prefix, owner in module.named_modules():
        norm = "norm" in type(owner).__name__.lower()
        for name, parameter in owner.named_parameters(prefix, recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            exempt = (
                norm
                or parameter.ndim < 2
                or (isinstance(owner, nn.Embedding) and not decay_embeddings)
                or getattr(parameter, "_no_weight_decay", False)  # a state-space model's own wish
            )
            groups["no_decay" if exempt else "decay"][name] = parameter
    return groups


def build(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the decay groups of a module, with one fused kernel for all parameters where the device has it."""
    device = next(module.parameters()).device
    groups = decay_groups(module, config.decay_embeddings)
    decays: list[dict[str, Any]] = [
        {"params": list(groups["decay"].values()), "weight_decay": config.weight_decay},
        {"params": list(groups["no_decay"].values()), "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in decays if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=devices.has_fused_adamw(device),
    )


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
