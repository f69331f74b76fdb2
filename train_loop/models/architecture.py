"""From `model.architecture` to the configuration of a model from scratch."""

from typing import Any

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from train_loop.config.parsing import nearest
from train_loop.errors import InputError


def _is_causal(model_type: str) -> bool:
    """Whether Transformers has a causal language model of this type."""
    return model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type] in MODEL_FOR_CAUSAL_LM_MAPPING


def configuration(
    architecture: dict[str, Any], tokenizer: PreTrainedTokenizerFast, block_size: int
) -> PreTrainedConfig:
    """The configuration of a model from scratch, whose context is one block unless it says otherwise."""
    model_type = architecture.pop("model_type")
    # Ask about one type only: going through all of them loads a module for each, which takes longer than all else here.
    if not _is_causal(str(model_type)):
        close = nearest(str(model_type), [name for name in CONFIG_MAPPING if _is_causal(name)])
        hint = close if close.startswith("did") else "for example gpt2, llama, qwen3 or gpt_neox"
        raise InputError(f"model.architecture.model_type: no causal language model {model_type}; {hint}")
    default = CONFIG_MAPPING[model_type]()
    fields = [*default.to_dict(), *default.attribute_map]
    for name in architecture:
        if name not in fields:
            raise InputError(f"model.architecture: {model_type} has no {name}; {nearest(name, sorted(fields))}")
    context = default.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    settings = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id}
    settings |= dict.fromkeys(("eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    if context in fields and not {context, "max_position_embeddings"} & architecture.keys():
        settings[context] = block_size
    return AutoConfig.for_model(model_type, **(settings | architecture))
