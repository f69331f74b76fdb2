"""Load any causal language model that Transformers has, from the Hub or a folder."""

from collections.abc import Callable

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from train_loop.errors import InputError, one_line


def load(name_or_path: str, attention: str | None = None) -> PreTrainedModel:
    """A model from the Hub or a local folder, or InputError. Neither code nor pickles, which may be code, are read."""

    def build(attention: str | None) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(
            name_or_path, dtype=torch.float32, attn_implementation=attention, use_safetensors=True
        )

    try:
        return build(attention)
    except (OSError, ValueError, KeyError, ImportError, StrictDataclassError, SafetensorError) as error:
        blame_attention(attention, build, error)
        raise InputError(f"model {name_or_path}: cannot be loaded from safetensors ({one_line(error)})") from None


def blame_attention(attention: str | None, build: Callable[[str | None], PreTrainedModel], error: Exception) -> None:
    """Blame the attention implementation for an error if the model can be built without it. Raises InputError if so."""
    if attention is None:
        return
    try:
        build(None)
    except Exception:
        return
    problem = f"fails with this model, device or installation ({one_line(error)})"
    raise InputError(f"model.attention {attention}: {problem}; use sdpa or eager, or leave it out") from None
