"""AdamW with decay groups.

AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019), for each parameter w with gradient g:

    m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2
    w = w - lr * (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay * w)

Decay pulls matrices, which multiply, towards zero. It makes no sense for biases and norms, which add and scale. What a
parameter is, tells `parameters.kind`: the type of the module that owns it, and not how many dimensions it has. So the
biases of experts, the rates of state-space models and what RWKV mixes time with do not decay, though some are matrices.
"""

from typing import Any

import torch
from torch import nn

from train_loop import devices
from train_loop.config.schema import OptimizerConfig
from train_loop.models.parameters import EMBEDDING, MATRIX, kind


def decay_groups(module: nn.Module, decay_embeddings: bool) -> dict[str, dict[str, nn.Parameter]]:
    """The trainable parameters, by whether they decay: {"decay": {name: parameter}, "no_decay": {...}}.

    Matrices decay, and embeddings on request. A tied weight counts once, where it comes first: as an embedding.
    """
    groups: dict[str, dict[str, nn.Parameter]] = {"decay": {}, "no_decay": {}}
    seen: set[int] = set()
    for prefix, owner in module.named_modules():
        for name, parameter in owner.named_parameters(prefix, recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            decays = kind(owner, name, parameter) in ((MATRIX, EMBEDDING) if decay_embeddings else (MATRIX,))
            groups["decay" if decays else "no_decay"][name] = parameter
    return groups


def build(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the decay groups of a module, with one fused kernel for all parameters if the device has one."""
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
