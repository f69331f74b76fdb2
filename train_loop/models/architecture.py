"""From `model.architecture`, which may be a pasted `config.json`, to the configuration of a model from scratch.

The file of an older model has names that Transformers reads in another way now (`rope_theta`, `n_embed`), and names
that no longer mean anything. The former are taken as Transformers takes them. The latter are left out, and a line says
so; in what somebody has written by hand, they are mistakes.
"""

import os
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from train_loop.config.parsing import nearest
from train_loop.console import say
from train_loop.errors import InputError
from train_loop.models.size import check_numbers
from train_loop.trust import check_implementations

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_PASTED = ("transformers_version", "architectures")  # nobody writes these by hand
_TYPES = ("dtype", "torch_dtype")  # weights are in fp32 in any case


def is_causal(model_type: str) -> bool:
    """Whether Transformers has a causal language model of this type."""
    return model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type] in MODEL_FOR_CAUSAL_LM_MAPPING


def configuration(
    architecture: dict[str, Any], tokenizer: PreTrainedTokenizerFast, block_size: int, padding: int | None = None
) -> PreTrainedConfig:
    """The configuration of a model from scratch; its vocabulary and context are the tokenizer's and one block's.

    An architecture may say otherwise. But the ids of special tokens are always the tokenizer's. Raises InputError for
    a type that is none, and for a name that the type does not have (unless the whole was pasted). `padding` is the id
    of the padding token, if there is one: its embedding would not be trained.
    """
    given = {name: value for name, value in architecture.items() if name not in _TYPES}
    model_type = str(given.pop("model_type"))
    # Ask about one type only: going through all of them loads a module for each, which takes longer than all else here.
    if not is_causal(model_type):
        close = nearest(model_type, [name for name in CONFIG_MAPPING if is_causal(name)])
        hint = close if close.startswith("did") else "for example gpt2, llama, qwen3 or gpt_neox"
        raise InputError(f"model.architecture.model_type: no causal language model {model_type}; {hint}")
    check_numbers(given, "model.architecture")
    check_implementations(given, "model.architecture")
    default = CONFIG_MAPPING[model_type]()
    fields = [*default.to_dict(), *default.attribute_map]
    notes, pasted = [], any(name in given for name in _PASTED)
    if unknown := [name for name in given if name not in fields and not _is_read(name, given, type(default))]:
        if not pasted:
            close = nearest(unknown[0], sorted(fields))
            raise InputError(f"model.architecture: {model_type} has no {unknown[0]}; {close}")
        given = {name: value for name, value in given.items() if name not in unknown}
        notes.append(f"{model_type} has no {', '.join(unknown)} (left out)")
    settings = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id}
    settings |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": padding}
    if other := [f"{name} {given.pop(name)}" for name in _IDS if given.get(name) not in (None, settings[name])]:
        notes.append(f"{', '.join(other)} give way to the tokenizer's own ids")
    given = {name: value for name, value in given.items() if name not in _IDS}
    size = given.get("vocab_size")
    if pasted and isinstance(size, int) and size > len(tokenizer):
        notes.append(f"vocab_size {size:,} is kept, but the tokenizer has {len(tokenizer):,} entries")
    context = default.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    if context in fields and not {context, "max_position_embeddings"} & given.keys():
        settings[context] = block_size
    if notes and os.environ.get("RANK", "0") == "0":
        say(f"model.architecture: {'; '.join(notes)}")
    return AutoConfig.for_model(model_type, **(settings | _copy(given)))


def _is_read(name: str, given: dict[str, Any], kind: type[PreTrainedConfig]) -> bool:
    """Whether a configuration makes something of a name that is none of its fields."""
    if name in vars(GenerationConfig()):
        return False  # settings of `generate`, which older versions kept there
    made = kind(**_copy(given))
    if name not in vars(made):
        return True
    without = kind(**_copy({each: value for each, value in given.items() if each != name}))
    return {**without.to_dict(), name: None} != {**made.to_dict(), name: None}


def _copy(value: Any) -> Any:
    """A copy; a configuration changes the dictionaries that it is given."""
    return {key: _copy(each) for key, each in value.items()} if isinstance(value, dict) else value
