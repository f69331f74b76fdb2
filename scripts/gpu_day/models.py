"""What the parts compute with: the device, and models of random weights made on it."""

import gc
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gpu_day.rows import Skipped, one_line

ATTENTIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
FAMILIES = ("gpt2", "llama")
VOCABULARY = 512

# Weights five times as large as a fresh model's: what attention does to the logits must not drown in rounding.
_SPREAD = 0.1
_LARGE_SPREAD = 0.05  # enough that texts do not repeat one word, and attention does not look at one token alone
_TINY: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_embd": 128, "n_head": 4, "n_positions": 128},
    "llama": {
        "num_hidden_layers": 2,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 256,
        "max_position_embeddings": 128,
    },
}
LARGE: dict[str, dict[str, Any]] = {
    "gpt2-124m": {"model_type": "gpt2", "vocab_size": 50304},
    "llama-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
}
NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)


def device() -> torch.device:
    """Where the parts compute: the accelerator, or the CPU where `--cpu` was said."""
    found = torch.accelerator.current_accelerator()
    if found is None or not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU") == "true":
        return torch.device("cpu")
    return torch.device(found.type, torch.accelerator.current_device_index())


def only_on(kind: str) -> None:
    """Skip a check on other devices.

    Raises:
        Skipped: naming them.
    """
    if device().type != kind:
        raise Skipped(f"is a matter of {kind}, and this is {device().type}")


def settle() -> None:
    """Give back the device's memory that nobody holds any more."""
    gc.collect()
    if device().type != "cpu":
        torch.get_device_module(device()).empty_cache()


def tiny(
    family: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any
) -> PreTrainedModel:
    """A model of two layers on the device, without dropout unless `settings` say so, in eval mode.

    Raises:
        Skipped: where its attention is not there, or not for these numbers on this device.
    """
    on = device()
    if "flash" in attention and dtype == torch.float32:
        raise Skipped("flash attention takes half precision only")
    if attention == "flex_attention" and on.type == "cpu":
        raise Skipped("flex attention compiles for half a minute on a CPU, and can't be trained there")
    none = NO_DROPOUT if family == "gpt2" else {}
    config = AutoConfig.for_model(
        family, **({"vocab_size": VOCABULARY, "initializer_range": _SPREAD} | none | _TINY[family] | settings)
    )
    torch.manual_seed(seed)
    try:
        made = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    except (ImportError, OSError, ValueError) as error:
        raise Skipped(one_line(str(error))) from None
    return made.to(on).eval()


def large(shape: str, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """A model of a real size on the device, in eval mode; on a CPU a tiny one of its family."""
    settings = dict(LARGE[shape])
    family = settings.pop("model_type")
    if device().type == "cpu":
        return tiny(family, dtype=dtype, seed=seed)
    torch.manual_seed(seed)
    with device():  # a billion random numbers take ten seconds on a CPU
        config = AutoConfig.for_model(family, **settings, initializer_range=_LARGE_SPREAD)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def tokens(rows: int, length: int, seed: int = 0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """Made-up token ids [rows, length] on the device, never 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocabulary, (rows, length), generator=generator).to(device())


def changed(ids: torch.Tensor) -> torch.Tensor:
    """Other token ids than these, each of them."""
    return ids % (VOCABULARY - 1) + 1


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """The largest difference of two tensors, as a share of the largest number of the second."""
    return float((x.cpu().double() - y.cpu().double()).abs().max() / y.cpu().double().abs().max())


def relative(values: Sequence[float], expected: Sequence[float]) -> float:
    """The largest relative difference of two lists of numbers; infinite where they are not of one length."""
    if len(values) != len(expected) or not values:
        return float("inf")
    found = [abs(x / y - 1) for x, y in zip(values, expected, strict=True)]
    return max(found) if all(each == each for each in found) else float("nan")


def quiet() -> None:
    """Let libraries speak up only when something is wrong."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)


def forget_accelerator() -> None:
    """Accelerate keeps one state a process; the next run must not see the precision of the one before."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def recorder() -> Any:
    """What records a decoding step on this device; on one without graphs, the step itself is what is replayed."""
    from train_loop.generation import kv_cache

    return kv_cache.recorder(device()) or (lambda step, rewind: step)
