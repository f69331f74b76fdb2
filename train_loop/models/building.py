"""The model of a run: loaded, or initialised from scratch, and checked against tokenizer and block size.

Weights are fp32 whatever `run.mixed_precision` says: autocast rounds copies, the optimizer changes the originals.
"""

import inspect
import textwrap
from contextlib import AbstractContextManager, nullcontext, suppress

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.activations import NewGELUActivation

from train_loop import compat
from train_loop.config import paths
from train_loop.config.architecture import read_architecture
from train_loop.config.load import ONE_MODEL
from train_loop.config.schema import Config
from train_loop.data.tokenizer import highest_id
from train_loop.errors import InputError, one_line
from train_loop.models.activation_checkpointing import recompute
from train_loop.models.architecture import configuration, is_causal
from train_loop.models.initialization import Place, Weights, initialise, on_meta
from train_loop.models.loading import blame_attention, check_given, load, outline_of
from train_loop.models.size import check_size
from train_loop.rng import seed_torch


def build(
    config: Config, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel | None = None, padded: bool = False
) -> PreTrainedModel:
    """The model of a configuration, or a given one, in fp32, checked against tokenizer and block size.

    All rows of its embeddings are trained. (If `padded`, those of the padding token are not, as before 0.2.)
    Raises InputError if the model cannot be loaded or built, or its vocabulary or context is too small.
    """
    if model is not None:
        source = f"the {type(model).__name__}"
        check_given(model, source)
    elif config.model.name_or_path is not None:
        name = paths.find(config.model.name_or_path, "model.name_or_path")
        model = load(name, config.model.attention, trained=True)
        source = f"model {config.model.name_or_path}"
    else:
        model, source = _from_scratch(config, tokenizer, padded), "model.architecture"
    return _ready(model, config, tokenizer, source, padded)


def outline(config: Config, tokenizer: PreTrainedTokenizerFast) -> tuple[PreTrainedModel, Weights]:
    """Like `build`, but on torch's meta device, to be sharded before it gets its weights; and what gives it those."""
    weights: Weights
    if config.model.name_or_path is not None:
        source = f"model {config.model.name_or_path}"
        name = paths.find(config.model.name_or_path, "model.name_or_path")
        model, weights = outline_of(name, config.model.attention, trained=True)
    else:
        model, source = _from_scratch(config, tokenizer, whole=False), "model.architecture"

        def weights(place: Place) -> None:
            initialise(on_meta(model.config, config.model.attention), config.run.seed, place)

    return _ready(model, config, tokenizer, source), weights


def _ready(
    model: PreTrainedModel, config: Config, tokenizer: PreTrainedTokenizerFast, source: str, padded: bool = False
) -> PreTrainedModel:
    """A model that has been checked, and prepared to be trained."""
    check_fits(model, tokenizer, config.data.block_size, source)
    if config.data.isolate_documents:
        check_positions(model)
    if not padded:
        train_padding(model)
    fuse_activations(model)
    recompute(model, config.model.activation_checkpointing)
    if config.model.compile:
        compile_layers(model)
    return model


def fuse_activations(model: PreTrainedModel) -> None:
    """Replace GPT-2's activation, in place: torch computes the same function in one kernel instead of eight.

    gelu(x) = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) (Hendrycks and Gimpel, 2016)
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, torch.nn.GELU(approximate="tanh"))


def train_padding(model: PreTrainedModel) -> None:
    """Let the embedding of the padding token have gradients, in place.

    Training pads with nothing that counts, and many models call the end of a text, which they must know, padding too.
    """
    for module in model.modules():
        # (One type's positions are counted from this number.)
        if isinstance(module, torch.nn.Embedding) and "Position" not in type(module).__name__:
            module.padding_idx = None


def check_positions(model: PreTrainedModel) -> None:
    """Refuse a model that cannot be told where documents begin. Raises InputError, which names the model."""
    if "position_ids" not in inspect.signature(model.forward).parameters or first_position(model) > 0:
        raise InputError(
            f"data.isolate_documents: {type(model).__name__} takes no positions that count from 0, so it cannot be "
            "told where documents begin; choose another model, or set --data.isolate_documents false"
        )


def compile_layers(model: PreTrainedModel) -> None:
    """Compile a model's layers in place, so that no weight is renamed.

    Layers are alike, so one is compiled for all of them, and FSDP2 can still shard them one by one. Dropout draws its
    masks from torch's own generator, as it does uncompiled. `Objective.compiled` says which shapes are compiled.
    """
    names = set(model._no_split_modules or [])
    for layer in [each for each in model.modules() if type(each).__name__ in names] or [model]:
        layer.compile(dynamic=False, options={"fallback_random": True})


def without_compile(model: torch.nn.Module) -> AbstractContextManager[object]:
    """A context in which compiled layers run uncompiled, for odd shapes that are not worth compiling."""
    # If nothing is compiled, the compiler need not even be loaded, which takes a second.
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _from_scratch(
    config: Config, tokenizer: PreTrainedTokenizerFast, padded: bool = False, whole: bool = True
) -> PreTrainedModel:
    """A model of `model.architecture`; by default its context is one block.

    Its weights are keyed by `run.seed` (if `padded`, drawn as before 0.2); unless it is to be `whole`, it has none yet,
    and is on torch's meta device.
    """
    if config.model.architecture is None:
        raise InputError(ONE_MODEL)
    attention, architecture = config.model.attention, read_architecture(config.model.architecture)
    end = tokenizer.eos_token_id
    assert isinstance(end, int)

    def made(attention: str | None, padding: int | None) -> PreTrainedModel:
        model_config = configuration(architecture, tokenizer, config.data.block_size, padding)
        check_size(model_config, "model.architecture", trained=True)
        model = _as_before(model_config, config) if padded else on_meta(model_config, attention)
        if whole and not padded:
            initialise(model, config.run.seed)
        if "flash" not in (attention or ""):  # FlashAttention is for GPUs only
            _try(model, min(2, config.data.block_size))
        return model

    def build(attention: str | None) -> PreTrainedModel:
        # RoBERTa's kind needs a padding token, counts positions from its id, and skips it where it occurs.
        for padding in () if padded else (None, -1):
            with suppress(Exception):
                return made(attention, padding)
        return made(attention, end)

    try:
        model = build(attention)
    except InputError:
        raise
    except Exception as error:  # whatever a library raises if numbers don't fit together
        blame_attention(attention, build, error)
        shown = textwrap.shorten(str(architecture), 200, placeholder=" ...")
        raise InputError(f"model.architecture: {shown}: no such model can be built ({one_line(error)})") from None
    if not is_causal(model.config.model_type):
        problem = f"Transformers makes a model of type {model.config.model_type} of it, which it could not load again"
        raise InputError(f"model.architecture: {problem}; choose another model_type")
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)
    model.generation_config = GenerationConfig(**ids)
    return model


def _try(model: PreTrainedModel, tokens: int) -> None:
    """Run a model: sizes that don't fit together fail only in use, some with the second token.

    On the meta device, an operation that has to know values cannot be tried, and neither can what comes after it.
    """
    try:
        model(torch.zeros(1, tokens, dtype=torch.long, device=model.device), use_cache=False)  # it may ask for more
    except (NotImplementedError, RuntimeError) as error:
        if model.device.type != "meta" or "meta" not in str(error):
            raise


def _as_before(model_config: PreTrainedConfig, config: Config) -> PreTrainedModel:
    """A model with the weights that a run of 0.1.0 began with: drawn one after another by a single generator."""
    seed_torch(torch.device("cpu"), "weights", config.run.seed)
    with compat.residual_weights_scaled():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            model_config, dtype=torch.float32, attn_implementation=config.model.attention, trust_remote_code=False
        )
    return model


def context_length(model: PreTrainedModel) -> int | None:
    """How many tokens the model can see at once; None if its architecture sets no limit."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if context is None or context <= 0 else context - first_position(model)


def first_position(model: PreTrainedModel) -> int:
    """The position of a row's first token: 0, but RoBERTa's kind begins to count after the id of its padding token."""
    embeddings = getattr(model.base_model, "embeddings", None)
    padding = getattr(embeddings, "padding_idx", None) if hasattr(embeddings, "position_embeddings") else None
    return 0 if padding is None else padding + 1


def vocabulary(model: PreTrainedModel) -> int:
    """How many tokens the model knows. Some keep more than tokens in the same table."""
    rows = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    return min(rows, getattr(model.config.get_text_config(), "vocab_size", rows))


def check_fits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, block_size: int, source: str) -> None:
    """Refuse a tokenizer or a block size that the model cannot take. Raises InputError with both numbers."""
    context, known = context_length(model), vocabulary(model)
    if context is not None and block_size > context:
        beyond = f"exceeds the context of {source}, {context} tokens; use at most {context}"
        raise InputError(f"data.block_size {block_size} {beyond}")
    if (highest := highest_id(tokenizer)) >= known:
        entries = len(tokenizer) if highest < len(tokenizer) else f"ids up to {highest} in its {len(tokenizer)}"
        problem = f"has {entries} entries, but {source} has only {known} embeddings"
        cure = (
            "leave vocab_size out" if source == "model.architecture" else "use the tokenizer that belongs to the model"
        )
        raise InputError(f"the tokenizer {problem}; {cure}")
