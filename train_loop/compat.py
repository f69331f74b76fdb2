"""What older libraries lack. Each entry names the version of the library that makes it unnecessary.

If a library is new enough, its own function is used; otherwise a fallback gives the same numbers. No other module of
train_loop checks for versions or for names that may be missing.
"""

import inspect
import math
import os
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import StaticLayer

from train_loop.versions import release


def stop_checkpointing(model: PreTrainedModel) -> None:
    """Let a model no longer recompute its activations by itself; Transformers 5.23 has this name."""
    name = "activation" if hasattr(model, "activation_checkpointing_disable") else "gradient"
    getattr(model, f"{name}_checkpointing_disable")()


def checkpoints_activations(model: PreTrainedModel) -> bool:
    """Whether a model recomputes its activations by itself; Transformers 5.23 has this name."""
    newer = hasattr(model, "is_activation_checkpointing")
    return bool(model.is_activation_checkpointing if newer else model.is_gradient_checkpointing)


def cache_name(model: PreTrainedModel) -> str:
    """The name of the cache that a model takes and returns: "cache" from Transformers 5.24 on."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def static_cache_counts() -> bool:
    """Whether fixed-size caches know how full they are, so that a step can be recorded: from Transformers 5.4 on."""
    return hasattr(StaticLayer(max_cache_len=1), "cumulative_length")


@contextmanager
def residual_weights_scaled() -> Iterator[None]:
    """Within this context, a new GPT-2 has its residual layers' weights scaled by 1 / sqrt(2 layers), as it should.

    Transformers 5 before 5.15 tries to do so, but looks for a name that no parameter has.
    """
    if release(transformers.__version__) >= (5, 15):
        yield
        return
    from transformers import initialization
    from transformers.models.gpt2 import modeling_gpt2

    gpt2: Any = modeling_gpt2.GPT2PreTrainedModel
    original = gpt2._init_weights

    def initialise(self: Any, module: Any) -> None:
        original(self, module)
        if isinstance(module, modeling_gpt2.GPT2Attention | modeling_gpt2.GPT2MLP):
            deviation = self.config.initializer_range / math.sqrt(2 * self.config.n_layer)
            initialization.normal_(module.c_proj.weight, mean=0.0, std=deviation)

    gpt2._init_weights = initialise
    try:
        yield
    finally:
        gpt2._init_weights = original


@contextmanager
def eager_attention(attend: Callable[..., Any], files: Collection[str]) -> Iterator[None]:
    """Within this context, `attend` is the "eager" attention of models in these files (names of modules).

    From Transformers 5.1 on, it is looked up in the same place as other implementations. Before, each file had its own.
    """
    if hasattr(AttentionInterface, "get_interface"):
        yield
        return
    modules: dict[str, Any] = {file: sys.modules[file] for file in files}
    original = {file: module.eager_attention_forward for file, module in modules.items()}
    for module in modules.values():
        module.eager_attention_forward = attend
    try:
        yield
    finally:
        for file, function in original.items():
            modules[file].eager_attention_forward = function


@contextmanager
def stdout_kept_clean() -> Iterator[None]:
    """Within this context, output from C++ goes to stderr: before torch 2.11, gloo reports connections on stdout."""
    if release(torch.__version__) >= (2, 11):
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
