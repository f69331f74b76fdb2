"""Load any causal language model that Transformers has, from the Hub or a folder, and account for every weight.

Transformers fills what a file lacks with random numbers, and leaves out what it has no place for. Here both are errors,
but for what a model's class declares: weights that are tied to others, and names that may be missing or left over.
"""

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    core_model_loading,
)

from train_loop.config import paths
from train_loop.console import say
from train_loop.devices import is_out_of_memory
from train_loop.errors import InputError, one_line
from train_loop.models import ends
from train_loop.models.initialization import Place, Weights, on_meta
from train_loop.models.parameters import tensors_once
from train_loop.models.size import check_numbers, check_size
from train_loop.models.weight_files import Stored, stored
from train_loop.trust import check_model, read_json, unused_code

_SHOWN = 3  # names of weights in a message
# Tables in files of older versions, which were never learned: causal masks, rotary frequencies, positions.
_TABLE = re.compile(r"(^|\.)(masked_bias|inv_freq|position_ids)$")
_FLOATS = re.compile(r"B?F\d")  # F32, BF16, F8_E4M3, ...


def load(
    name_or_path: str, attention: str | None = None, place: Place | None = None, trained: bool = False
) -> PreTrainedModel:
    """A model from the Hub or a local folder, in fp32, with exactly the weights that its files hold.

    If `place` is given, it gets each of them, converted as Transformers converts them, and the model that is returned
    has none: it stays on torch's meta device. Neither code nor pickles, which may be code, are read. Raises InputError
    if a file is damaged, is not what the configuration says, or holds what is no weight; or if the model cannot fit
    into memory, with gradients and moments if it is to be `trained`.
    """
    where = f"model {name_or_path}"
    settings = _settings(name_or_path)
    held = stored(name_or_path)
    placing = Placing(place, where)

    def build(attention: str | None) -> tuple[PreTrainedModel, dict[str, Any]]:
        check_size(settings, where, trained)
        with placing.instead() if place is not None else nullcontext():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name_or_path,
                dtype=torch.float32,
                attn_implementation=attention,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `_account` names them
            )
        return loaded[0], loaded[1]

    try:
        model, found = build(attention)
    except InputError:
        raise
    except Exception as error:  # whatever a library raises if files and numbers don't fit together
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        blame_attention(attention, build, error)
        raise InputError(_unloadable(name_or_path, error)) from None
    if place is not None:
        model.tie_weights()
    _account(model, found, held, where)
    if place is None:
        check_finite(model, where)
    else:
        placing.refuse_infinite()
        placing.rest(model)
    notes = []
    if (code := unused_code(name_or_path)) is not None:
        if hasattr(model.config, "auto_map"):
            del model.config.auto_map  # an export has no such code
        notes.append(f"brings code of its own ({code}), which is not run; Transformers' own is used")
    if rounded := [name for name, each in held.items() if each.dtype == "F64"]:
        notes.append(f"{len(rounded)} weights are float64 ({_some(rounded)}), and are rounded to float32")
    for note in notes if os.environ.get("RANK", "0") == "0" else []:
        say(f"{where}: {note}")
    return model


def _unloadable(name: str, error: Exception) -> str:
    return f"model {name}: cannot be loaded from safetensors ({one_line(error)}){paths.no_folder(name)}"


def outline_of(
    name_or_path: str, attention: str | None = None, trained: bool = False
) -> tuple[PreTrainedModel, Weights]:
    """Like `load`, but on torch's meta device, to be sharded before it gets its weights; and what gives it those."""
    settings = _settings(name_or_path)
    try:
        check_size(settings, f"model {name_or_path}", trained)
        model = on_meta(settings, attention)
    except InputError:
        raise
    except Exception as error:  # whatever a library raises if numbers don't fit together
        raise InputError(_unloadable(name_or_path, error)) from None
    with suppress(OSError):  # then it keeps what its configuration says, as in Transformers
        model.generation_config = GenerationConfig.from_pretrained(name_or_path)
    if hasattr(model.config, "auto_map"):
        del model.config.auto_map

    def weights(place: Place) -> None:
        loaded: Any = load(name_or_path, attention, place)
        if hasattr(loaded, "_weight_conversions"):  # which Transformers reverses on saving
            model._weight_conversions = loaded._weight_conversions

    return model, weights


def _settings(name_or_path: str) -> PreTrainedConfig:
    """The configuration of a model that may be loaded."""
    where = f"model {name_or_path}"
    check_model(name_or_path)
    ends.check(name_or_path)
    settings = configuration(name_or_path, where)
    if type(settings) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"{where}: Transformers has no causal language model of type {settings.model_type}")
    return settings


class Placing:
    """Takes each weight from Transformers as soon as it is converted, instead of the model that it is meant for.

    Transformers can load into shards by itself, but only into those of its own FSDP2 setup, in its newest versions; and
    it replaces the parameters, which FSDP2 then would not know.
    """

    def __init__(self, place: Place | None, where: str) -> None:
        self._place, self._where = place, where
        self._placed: set[str] = set()
        self._infinite: list[str] = []

    def take(self, name: str, value: torch.Tensor) -> None:
        """Hand a weight on. Raises InputError if it is tied to one that had other values."""
        assert self._place is not None
        if value.is_floating_point() and value.numel() and not all(each.isfinite() for each in value.aminmax()):
            self._infinite.append(name)
        self._placed.add(name)
        try:
            self._place(name, value)
        except InputError as error:
            raise InputError(f"{self._where}: {error}") from None

    @contextmanager
    def instead(self) -> Iterator[None]:
        """Within this context, `from_pretrained` reads and converts one weight at a time, and keeps none."""
        library: Any = core_model_loading
        original = library.set_param_for_module

        def take(model: PreTrainedModel, name: str, value: torch.Tensor, *rest: Any, **more: Any) -> None:
            wanted = getattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], None)
            if wanted is not None and wanted.shape == value.shape:
                self.take(name, value.detach())
            original(model, name, value.detach().to("meta"), *rest, **more)

        one_by_one = {"HF_DEACTIVATE_ASYNC_LOAD": "1"}
        kept = {name: os.environ.get(name) for name in one_by_one}
        library.set_param_for_module = take
        os.environ.update(one_by_one)
        try:
            yield
        finally:
            library.set_param_for_module = original
            for name, value in kept.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})

    def refuse_infinite(self) -> None:
        """Refuse weights that were NaN or infinite. Raises InputError, which names some."""
        _refuse_infinite(self._infinite, self._where)

    def rest(self, model: PreTrainedModel) -> None:
        """Place the buffers that are in no file; the model has made them."""
        for name, buffer in model.named_buffers():
            if name not in self._placed:
                self.take(name, buffer)


def configuration(folder: str, where: str) -> PreTrainedConfig:
    """The configuration in a folder or repository; InputError, which begins with `where`, if it is damaged."""
    check_numbers(read_json(where, folder, "config.json"), where)
    try:
        found: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a library raises if values don't fit together
        raise InputError(f"{where}: cannot be loaded ({one_line(error)}){paths.no_folder(folder)}") from None
    return found


def check_finite(model: PreTrainedModel, where: str) -> None:
    """Refuse weights that are NaN or infinite. Raises InputError, which names some."""
    bad = [
        name
        for name, weight in tensors_once(model).items()
        if weight.is_floating_point() and weight.numel() and not all(each.isfinite() for each in weight.aminmax())
    ]
    _refuse_infinite(bad, where)


def _refuse_infinite(bad: Collection[str], where: str) -> None:
    if bad:
        problem = f"{len(bad)} weights are not finite ({_some(bad)})"
        raise InputError(f"{where}: {problem}; use weights from before they were spoilt")


def check_present(model: PreTrainedModel, where: str) -> None:
    """Refuse a model whose weights have shapes, but no values. Raises InputError, which names one."""
    if (empty := next((name for name, weight in model.named_parameters() if weight.is_meta), None)) is not None:
        raise InputError(f"{where}: {empty} has no values (it is on torch's meta device); load or initialise it")


def check_given(model: PreTrainedModel, where: str) -> None:
    """Refuse a model that a script gives to be trained, but whose weights are no finite fp32 numbers. InputError."""
    check_present(model, where)
    for name, weight in model.named_parameters():
        if weight.dtype != torch.float32:
            kind = str(weight.dtype).removeprefix("torch.")
            cure = "give model.float(), and choose the precision of the passes with run.mixed_precision"
            raise InputError(f"{where}: {name} is {kind}, but weights are trained in float32; {cure}")
    check_finite(model, where)


def _account(model: PreTrainedModel, found: dict[str, Any], held: dict[str, Stored], where: str) -> None:
    """Refuse a model whose weights are not those of its files. Raises InputError, which names some."""
    missing = sorted(found["missing_keys"])
    extra = [name for name in sorted(found["unexpected_keys"]) if not _is_table(name, held)]
    shapes = [f"{name} {_shape(has)}, not {_shape(wants)}" for name, has, wants in sorted(found["mismatched_keys"])]
    problems = [
        f"{len(names)} {what} ({_some(names)})"
        for names, what in ((missing, "missing"), (extra, "not in the model"), (shapes, "of another shape"))
        if names
    ]
    if problems:
        problem = f"the weights in its files don't fit its config.json: {', '.join(problems)}"
        raise InputError(f"{where}: {problem}; {_cure(model, missing, extra)}")
    if wrong := _no_floats(model, found["unexpected_keys"], held):
        problem = f"{len(wrong)} weights are no floating-point numbers ({_some(wrong)})"
        raise InputError(f"{where}: {problem}; use the weights from before they were quantised")
    if (head := _parted(model)) is not None:
        problem = f"config.json ties {head} to the embeddings, but the files hold other values for it"
        raise InputError(f"{where}: {problem}; set tie_word_embeddings to false in config.json")


def _no_floats(model: PreTrainedModel, left_out: Collection[str], held: dict[str, Stored]) -> list[str]:
    """The tensors in files that should be floating-point numbers and are not, each with its type."""
    # Names may begin otherwise in a file: an older version's, or those of the model inside.
    tables = {name.rpartition(".")[2] for name, tensor in model.state_dict().items() if not tensor.is_floating_point()}
    return [
        f"{name} {each.dtype}"
        for name, each in held.items()
        if not _FLOATS.match(each.dtype)
        and name not in left_out
        and name.rpartition(".")[2] not in tables
        and not _is_table(name, held)
    ]


def _parted(model: PreTrainedModel) -> str | None:
    """The name of the output layer's weight if it should be the embeddings' and is not."""
    tied = type(model)._tied_weights_keys and getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not tied or head is None or head.weight is embedding.weight:
        return None
    return next((name for name, weight in model.named_parameters() if weight is head.weight), None)


def _is_table(name: str, held: dict[str, Stored]) -> bool:
    """Whether a tensor in a file is a table of an older version of its model, which was never learned."""
    shape = held[name].shape if name in held else ()
    mask = name.endswith(".bias") and len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return mask or _TABLE.search(name) is not None


def _cure(model: PreTrainedModel, missing: Collection[str], extra: Collection[str]) -> str:
    """What would make a file fit its configuration."""
    prefixes = {name.removesuffix(known) for name in extra for known in missing if name.endswith(f".{known}")}
    if prefixes:
        prefix = min(prefixes, key=len)
        return f"names in the file begin with {prefix} as a wrapper's do: save the model without its wrapper"
    head = model.get_output_embeddings()
    heads = {name for name, weight in model.named_parameters() if head is not None and weight is head.weight}
    if missing and set(missing) <= heads and not extra:
        return (
            "save the causal language model with its output layer; or, if that is tied to the embeddings, set "
            "tie_word_embeddings to true in config.json"
        )
    return "use the config.json and all files that were saved together"


def _some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    every = list(names)
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return f"{', '.join(every[:_SHOWN])}{more}"


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "a single number"


def blame_attention(attention: str | None, build: Callable[[str | None], Any], error: Exception) -> None:
    """Blame the attention implementation for an error if the model can be built without it. Raises InputError if so."""
    if attention is None:
        return
    try:
        build(None)
    except Exception:
        return
    problem = f"fails with this model, device or installation ({one_line(error)})"
    raise InputError(f"model.attention {attention}: {problem}; use sdpa or eager, or leave it out") from None
