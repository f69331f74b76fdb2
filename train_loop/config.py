"""Every setting of a run: nested dataclasses that a YAML file fills and the command line overrides.

    file.yaml  ->  load(["--config", "file.yaml", "--optimizer.learning_rate", "3e-4"])  ->  Config

The dataclasses are the one description of the settings: their types are what a value is checked against, their
docstrings what `train-loop train --help` prints, with units. An unknown key or a wrong type is an `InputError` that
names the file and the nearest valid key.
"""

import dataclasses
import difflib
import os
import re
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml

from train_loop.errors import InputError


class Range(NamedTuple):
    """A condition on a number, in words for the error and as a test."""

    words: str
    holds: Callable[[float], bool]


PositiveInt = Annotated[int, Range("> 0", lambda value: value > 0)]
NonNegativeInt = Annotated[int, Range(">= 0", lambda value: value >= 0)]
PositiveFloat = Annotated[float, Range("> 0", lambda value: 0 < value < float("inf"))]
NonNegativeFloat = Annotated[float, Range(">= 0", lambda value: 0 <= value < float("inf"))]
Share = Annotated[float, Range("between 0 and 1, both excluded", lambda value: 0 < value < 1)]
Probability = Annotated[float, Range("> 0 and <= 1", lambda value: 0 < value <= 1)]
Beta = Annotated[float, Range(">= 0 and < 1", lambda value: 0 <= value < 1)]


@dataclass
class RunConfig:
    """The run as a whole.

    Args:
        output_dir: folder of the run; by default runs/ and the configuration file's name.
        seed: the one seed of the run: order of the data, initial weights, dropout, samples.
        resume: "auto" continues from the newest whole checkpoint; "never" refuses a folder that holds a run.
        mixed_precision: precision of the forward and backward pass; weights and moments stay in fp32.
        log_with: trackers of Accelerate to log to (tensorboard, wandb, mlflow, ...), beside metrics.jsonl.
    """

    output_dir: str | None = None
    seed: NonNegativeInt = 0
    resume: Literal["auto", "never"] = "auto"
    mixed_precision: Literal["no", "bf16"] = "no"
    log_with: list[str] = field(default_factory=list)


@dataclass
class ModelConfig:
    """The causal language model: exactly one of name_or_path and architecture.

    Args:
        name_or_path: a model's name on the Hub, or a local folder.
        architecture: model_type (gpt2, llama, ...) and that configuration's own fields, to train from scratch.
        attention: attention implementation (sdpa, eager, flash_attention_2, ...); Transformers' choice when null.
        activation_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
    """

    name_or_path: str | None = None
    architecture: dict[str, Any] | None = None
    attention: str | None = None
    activation_checkpointing: bool = False


@dataclass
class TokenizerConfig:
    """The tokenizer; by default that of model.name_or_path.

    Args:
        name_or_path: a tokenizer's name on the Hub, or a local folder.
        train_vocab_size: train a byte-level BPE with this many entries on the training documents.
    """

    name_or_path: str | None = None
    train_vocab_size: PositiveInt | None = None


@dataclass
class DataConfig:
    """The documents, their split into train and validation, and their packing into blocks.

    Args:
        source: "stdlib" (this Python's own standard library), "files", or "hub" (Hugging Face Datasets).
        files: (files) paths or glob patterns: .txt (one document a file), .jsonl, .json, .csv, .parquet (one a row).
        validation_files: (files) likewise; without them a part of `files` is split off.
        name: (hub) name of the data set, or a local folder that `datasets.load_dataset` reads.
        subset: (hub) name of its configuration.
        split: (hub) split to train on, also a slice such as train[:5000].
        validation_split: (hub) split to validate on; without it a part of `split` is split off.
        text_field: field with the text of a row; dotted for nested fields (answers.text).
        join: what joins the strings of a field that is a list.
        test_size: share of the documents that is split off for validation when no validation data is named.
        split_seed: seed of that split, apart from run.seed so that runs can share their validation set.
        block_size: tokens a sequence that the model sees at once.
        streaming: (hub) read without downloading everything first; goes with max_documents.
        max_documents: read at most this many documents (rows) of each split of the source.
        cache_dir: where prepared token stores are kept; by default $TRAIN_LOOP_CACHE, else ~/.cache/train_loop.
        num_workers: processes that read ahead; 0 reads in the training process, which is rarely slower.
    """

    source: Literal["stdlib", "files", "hub"] = "stdlib"
    files: list[str] = field(default_factory=list)
    validation_files: list[str] = field(default_factory=list)
    name: str | None = None
    subset: str | None = None
    split: str = "train"
    validation_split: str | None = None
    text_field: str = "text"
    join: str = " "
    test_size: Share = 0.1
    split_seed: NonNegativeInt = 0
    block_size: PositiveInt = 128
    streaming: bool = False
    max_documents: PositiveInt | None = None
    cache_dir: str | None = None
    num_workers: NonNegativeInt = 0


@dataclass
class BatchConfig:
    """How many sequences an optimizer step sees, and how many of them fit in memory at once.

    Args:
        sequences_per_step: sequences of one optimizer step, over all processes: a training decision.
        micro_batch_size: sequences of one forward pass: a memory decision that does not change the result;
            all of sequences_per_step when null.
    """

    sequences_per_step: PositiveInt = 8
    micro_batch_size: PositiveInt | None = None


@dataclass
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, 2019).

    Args:
        learning_rate: peak learning rate, after warm-up.
        weight_decay: decoupled weight decay of the matrices; norms and biases have none.
        decay_embeddings: whether embedding matrices decay too.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        max_grad_norm: gradients are scaled down to this global norm; null does not clip.
    """

    learning_rate: NonNegativeFloat = 5e-5
    weight_decay: NonNegativeFloat = 0.01
    decay_embeddings: bool = True
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    max_grad_norm: PositiveFloat | None = 1.0


@dataclass
class ScheduleConfig:
    """The learning rate as a function of the step.

    Args:
        name: shape after warm-up: linear to 0, half a cosine to 0, constant, or wsd (constant, then linear to 0).
        warmup_steps: steps over which the rate rises linearly from 0.
        decay_steps: (wsd) length of the final decay in steps; a tenth of all steps when null.
    """

    name: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    warmup_steps: NonNegativeInt = 0
    decay_steps: PositiveInt | None = None


@dataclass
class TrainConfig:
    """How long to train.

    Args:
        epochs: passes over the training data.
        max_steps: optimizer steps; where given, it decides and epochs does not.
        max_bad_steps: steps in a row with a non-finite loss or gradient, each skipped, after which the run fails.
    """

    epochs: PositiveInt = 3
    max_steps: PositiveInt | None = None
    max_bad_steps: PositiveInt = 10


@dataclass
class EvaluationConfig:
    """Exact evaluation on the whole validation data; the last step is always evaluated.

    Args:
        every: "epoch", or a number of optimizer steps.
        batch_size: sequences of one forward pass; does not change the result. micro_batch_size when null.
    """

    every: PositiveInt | Literal["epoch"] = "epoch"
    batch_size: PositiveInt | None = None


@dataclass
class SampleConfig:
    """Text sampled after each evaluation, and the defaults saved with the exported model.

    Args:
        prompts: what to continue; an empty list samples nothing.
        max_new_tokens: tokens to add at most.
        temperature: logits are divided by it; 0 always takes the likeliest token.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the fewest tokens whose probability reaches p; 1 keeps all.
    """

    prompts: list[str] = field(default_factory=list)
    max_new_tokens: PositiveInt = 100
    temperature: NonNegativeFloat = 1.0
    top_k: NonNegativeInt = 50
    top_p: Probability = 0.95


@dataclass
class CheckpointConfig:
    """Checkpoints of (weights, moments, step), from which the same command resumes.

    Args:
        every: "epoch", or a number of optimizer steps; the last step is always kept.
        keep: how many of the newest to keep.
    """

    every: PositiveInt | Literal["epoch"] = "epoch"
    keep: PositiveInt = 2


@dataclass
class ExportConfig:
    """What happens to the finished model beside being written to output_dir/model.

    Args:
        push_to_hub: upload it to the Hugging Face Hub (needs a login).
        hub_model_id: repository to push to (name or user/name); the name of output_dir when null.
    """

    push_to_hub: bool = False
    hub_model_id: str | None = None


@dataclass
class Config:
    """All settings of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    @property
    def output_dir(self) -> Path:
        """The run's folder; `load` has made sure that there is one."""
        assert self.run.output_dir is not None
        return Path(self.run.output_dir)

    @property
    def micro_batch_size(self) -> int:
        """Sequences of one forward pass in training."""
        return min(self.batch.micro_batch_size or self.batch.sequences_per_step, self.batch.sequences_per_step)

    @property
    def evaluation_batch_size(self) -> int:
        """Sequences of one forward pass in evaluation."""
        return self.evaluation.batch_size or self.micro_batch_size


# Settings that do not change what a run computes. A run may be continued with other values of these; any other
# difference means that the folder belongs to a different run.
FREE_KEYS = (
    "run.output_dir",
    "run.resume",
    "run.log_with",
    "batch.micro_batch_size",
    "data.cache_dir",
    "data.num_workers",
    "train.max_bad_steps",
    "evaluation",
    "sample",
    "checkpoint",
    "export",
    "model.activation_checkpointing",
)


class _YamlLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML 1.2's scalars: `no` is the word no (as in mixed_precision: no), 1e-3 a number, 2024-01-01 text."""


_CHANGED_TAGS = tuple(f"tag:yaml.org,2002:{name}" for name in ("bool", "float", "timestamp"))
_YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _CHANGED_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"),
    list("-+.0123456789"),
)


def load(arguments: Sequence[str]) -> Config:
    """Read `--config FILE --section.key value ...` into a checked `Config`.

    Raises:
        InputError: for a missing file, an unknown key, a wrong type, or settings that contradict each other.
    """
    path, overrides = _split_arguments(arguments)
    config = Config()
    if path:
        _fill(config, _read_yaml(path), f"{path}: ")
    for key, text in overrides:
        _override(config, key, text)
    if config.run.output_dir is None:
        config.run.output_dir = str(Path("runs") / (Path(path).stem if path else "train"))
    check(config)
    return config


def _split_arguments(arguments: Sequence[str]) -> tuple[str | None, list[tuple[str, str]]]:
    """`--config FILE --a.b 1 --c.d=2` -> (FILE, [("a.b", "1"), ("c.d", "2")])."""
    path, overrides, queue = None, [], iter(arguments)
    for argument in queue:
        if not argument.startswith("--"):
            raise InputError(f"command line: unexpected {argument!r}; settings are given as --section.key value")
        option, equals, value = argument.removeprefix("--").partition("=")
        if not equals:
            following = next(queue, None)
            if following is None:
                raise InputError(f"command line: --{option} needs a value")
            value = following
        if option == "config":
            path = value
        else:
            overrides.append((option, value))
    return path, overrides


def parse_yaml(text: str, where: str) -> Any:
    """YAML text as plain values, with the scalars of YAML 1.2.

    Raises:
        InputError: with `where`, line and column of the mistake.
    """
    try:
        return yaml.load(text, _YamlLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise InputError(f"{where}{place}not valid YAML ({getattr(error, 'problem', error)})") from None


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"--config {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--config {path}: is not UTF-8 at byte {error.start}") from None
    values = parse_yaml(text, f"{path}: ")
    if not isinstance(values, dict | None):
        raise InputError(f"{path}: expected sections such as `run:` and `data:`, found a {type(values).__name__}")
    return values or {}


def keys(cls: Any = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted name and type of every setting: ("optimizer.learning_rate", float), ..."""
    for each in dataclasses.fields(cls):
        if dataclasses.is_dataclass(each.type):
            yield from keys(each.type, f"{prefix}{each.name}.")
        else:
            yield f"{prefix}{each.name}", each.type


def nearest(name: str, valid: Sequence[str]) -> str:
    """`did you mean X?` for the valid name nearest to `name`; the valid names themselves when none is near."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"valid here: {', '.join(valid)}"


def _fill(section: Any, values: dict[str, Any], where: str, prefix: str = "") -> None:
    """Set the fields of a section (a dataclass) from a mapping, section by section."""
    kinds = {each.name: each.type for each in dataclasses.fields(section)}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in kinds:
            elsewhere = [other for other, _ in keys() if other.endswith(f".{name}")]
            hint = f"did you mean {elsewhere[0]}?" if len(elsewhere) == 1 else nearest(str(name), list(kinds))
            raise InputError(f"{where}unknown key {key}; {hint}")
        if not dataclasses.is_dataclass(kinds[name]):
            setattr(section, name, _convert(value, kinds[name], f"{where}{key}"))
        elif isinstance(value, dict):
            _fill(getattr(section, name), value, where, f"{key}.")
        elif value is not None:
            raise InputError(f"{where}{key} is a section, expected `{name}:` with keys below it")


def _override(config: Config, key: str, text: str) -> None:
    """Set one setting from the command line."""
    where = "command line: "
    kinds: dict[str, Any] = dict(keys())
    if key.startswith("model.architecture."):
        architecture = dict(config.model.architecture or {})
        architecture[key.removeprefix("model.architecture.")] = parse_yaml(text, f"{where}--{key}: ")
        config.model.architecture = architecture
        return
    if key not in kinds:
        raise InputError(f"{where}unknown option --{key}; {nearest(key, list(kinds))}")
    section, _, name = key.partition(".")
    value: Any = text
    # Text stays as it was typed ("def f(x):" would be a mapping to YAML); everything else is a YAML value.
    if str not in _plain_types(kinds[key]) or text == "null" or (list in _plain_types(kinds[key]) and text[:1] == "["):
        value = parse_yaml(text, f"{where}--{key}: ")
    setattr(getattr(config, section), name, _convert(value, kinds[key], f"{where}--{key}"))


def _plain_types(kind: Any) -> set[Any]:
    """The plain types in a type: {list, str} of list[str], {int, "epoch" literal's str} of int | Literal[...]."""
    if get_origin(kind) is None:
        return {kind}
    if get_origin(kind) is Annotated:
        return _plain_types(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return {Literal}
    if get_origin(kind) in (dict, tuple):
        return {get_origin(kind)}
    inner = set().union(*(_plain_types(each) for each in get_args(kind)))
    return inner | ({list} if get_origin(kind) is list else set())


def _convert(value: Any, kind: Any, where: str) -> Any:
    """`value` as the type `kind`; a whole number also passes as float, one string also as a list of strings.

    Raises:
        InputError: that says what was expected and what was found.
    """
    problem = InputError(f"{where}: expected {describe(kind)}, got {value!r}")
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        for each in inner:
            try:
                return _convert(value, each, where)
            except InputError:
                continue
    elif origin is Annotated:
        try:
            number = _convert(value, inner[0], where)
        except InputError:
            raise problem from None
        if inner[1].holds(number):
            return number
    elif (origin is Literal and value in inner) or (kind is types.NoneType and value is None):
        return value
    elif origin is list and isinstance(value, list | str):
        return [_convert(each, inner[0], where) for each in ([value] if isinstance(value, str) else value)]
    elif origin is tuple and isinstance(value, list) and len(value) == len(inner):
        return tuple(_convert(each, type_, where) for each, type_ in zip(value, inner, strict=True))
    elif isinstance(value, bool) or kind is bool:  # Python takes True for the number 1
        if isinstance(value, bool) and kind is bool:
            return value
    elif kind is int and isinstance(value, int | float) and float(value).is_integer():
        return int(value)
    elif kind in (float, str) and isinstance(value, int | float):
        return kind(value)
    elif (kind is str and isinstance(value, str)) or (origin is dict and isinstance(value, dict)):
        return value
    raise problem


def describe(kind: Any) -> str:
    """A type in words: `an integer > 0, or epoch`."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return ", or ".join(describe(each) for each in inner)
    if origin is Annotated:
        return f"{describe(inner[0])} {inner[1].words}"
    if origin is Literal:
        return " | ".join(str(each) for each in inner)
    if origin is list:
        return f"a list of {describe(inner[0])}"
    if origin is tuple:
        return f"a list of {len(inner)}: {', '.join(describe(each) for each in inner)}"
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text", types.NoneType: "null"}
    return names.get(kind, "a mapping")


def help_text() -> str:
    """Every setting with its type, default and meaning, from the dataclasses and their docstrings."""
    lines = []
    for section in dataclasses.fields(Config):
        kind: Any = section.type
        summary, _, described = (kind.__doc__ or "").partition("Args:")
        meanings = dict(re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", described, re.MULTILINE))
        lines.append(f"\n{section.name}: {' '.join(summary.split())}")
        for each in dataclasses.fields(kind):
            default = getattr(kind(), each.name)
            shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
            lines.append(f"  --{section.name}.{each.name}  ({describe(each.type)}; default {shown})")
            lines.append(f"      {' '.join(meanings[each.name].split())}")
    return "\n".join(lines)


def check(config: Config) -> None:
    """Refuse settings that contradict each other.

    Raises:
        InputError: naming the keys and what would do.
    """
    model, tokenizer, data, batch = config.model, config.tokenizer, config.data, config.batch
    if (model.name_or_path is None) == (model.architecture is None):
        raise InputError("model: give exactly one of model.name_or_path and model.architecture")
    if model.architecture is not None and "model_type" not in model.architecture:
        raise InputError("model.architecture: model_type is missing, e.g. {model_type: gpt2, n_layer: 4}")
    if tokenizer.name_or_path is not None and tokenizer.train_vocab_size is not None:
        raise InputError("tokenizer: give only one of tokenizer.name_or_path and tokenizer.train_vocab_size")
    if model.architecture is not None and tokenizer.name_or_path is None and tokenizer.train_vocab_size is None:
        raise InputError("tokenizer: a model from scratch needs tokenizer.train_vocab_size or tokenizer.name_or_path")
    if tokenizer.train_vocab_size is not None and tokenizer.train_vocab_size < 257:
        raise InputError("tokenizer.train_vocab_size: at least 257 (256 bytes and the end of text)")
    if data.source == "files" and not data.files:
        raise InputError("data.files: data.source is files, but no file is named")
    if data.source == "hub" and not data.name:
        raise InputError("data.name: data.source is hub, but no data set is named")
    for key, source, value in (
        ("data.files", "files", data.files),
        ("data.validation_files", "files", data.validation_files),
        ("data.name", "hub", data.name),
        ("data.validation_split", "hub", data.validation_split),
        ("data.streaming", "hub", data.streaming),
    ):
        if value and data.source != source:
            raise InputError(f"{key} goes with data.source {source}, but data.source is {data.source}")
    if data.streaming and "[" in data.split + (data.validation_split or ""):
        raise InputError("data.split: a stream has no slices; use data.max_documents, or data.streaming false")
    if batch.micro_batch_size and batch.micro_batch_size > batch.sequences_per_step:
        raise InputError(
            f"batch.micro_batch_size {batch.micro_batch_size} is larger than "
            f"batch.sequences_per_step {batch.sequences_per_step}"
        )
    if config.export.hub_model_id and not config.export.push_to_hub:
        raise InputError("export.hub_model_id goes with export.push_to_hub true")


def to_dict(config: Config) -> dict[str, Any]:
    """The settings as plain nested dictionaries."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """The resolved settings as YAML that `load` reads back to the same."""
    values = to_dict(config)
    values["optimizer"]["betas"] = list(config.optimizer.betas)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two configurations beyond `FREE_KEYS`, as lines `key: old -> new`."""
    flat_old, flat_new = dict(_flatten(old)), dict(_flatten(new))
    return [
        f"{key}: {flat_old.get(key)} -> {flat_new.get(key)}"
        for key in sorted(flat_old.keys() | flat_new.keys())
        if not any(key == free or key.startswith(free + ".") for free in FREE_KEYS)
        and flat_old.get(key) != flat_new.get(key)
    ]


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def cache_dir(config: Config) -> Path:
    """Where prepared token stores live."""
    chosen = config.data.cache_dir or os.environ.get("TRAIN_LOOP_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "train_loop"
