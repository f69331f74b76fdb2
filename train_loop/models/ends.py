"""Which tokens end a text: the tokenizer's own, with which data ends its documents, and those that the model names.

A chat model ends a turn with another token than a document, and its generation_config.json lists both.
"""

from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from train_loop.errors import InputError, one_line
from train_loop.trust import read_json

_FILE = "generation_config.json"


def ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokens that end a text, the tokenizer's own first; also those that are not in the vocabulary.

    They are in the model's generation settings or, as for `generate` of Transformers, if those name none, in its
    configuration. Raises InputError for what is no id.
    """
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if named is None:
        named = getattr(model.config.get_text_config(), "eos_token_id", None)
    listed = [*named] if isinstance(named, list | tuple) else [] if named is None else [named]
    if wrong := [each for each in listed if not isinstance(each, int) or isinstance(each, bool)]:
        raise InputError(f"the {type(model).__name__}: eos_token_id {wrong[0]!r}: is no token id; mend {_FILE}")
    own = tokenizer.eos_token_id
    return list(dict.fromkeys(([own] if isinstance(own, int) else []) + listed))


def settings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Generation settings that name all tokens that end a text, and nothing else."""
    found = ends(model, tokenizer)
    return GenerationConfig(eos_token_id=found if len(found) > 1 else next(iter(found), None))


def check(name: str) -> None:
    """Refuse a folder or repository whose generation settings are damaged: Transformers would silently go without.

    Raises InputError, which names the file.
    """
    read_json(f"model {name}", name, _FILE)


def restore(model: PreTrainedModel, folder: Path) -> None:
    """Give a model the generation settings in a folder, if there are any; InputError if they are damaged."""
    if (folder / _FILE).is_file():
        check(str(folder))
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{folder / _FILE}: is damaged ({one_line(error)})") from None
