"""Turn a YAML file and a command line (or a script's values) into a checked `Config`, and back.

config_from_arguments(["--config", "file.yaml", "--optimizer.learning_rate", "3e-4"])  ->  Config
load_config("file.yaml", {"optimizer.learning_rate": 3e-4})                           ->  the same
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from train_loop.config import paths
from train_loop.config.architecture import read_architecture
from train_loop.config.parsing import bytes_of, fill, key_of, override, split_arguments
from train_loop.config.sampling import sampling_of
from train_loop.config.schema import Config, DataConfig
from train_loop.config.yaml_core import dump_yaml, read_yaml
from train_loop.errors import InputError

ONE_MODEL = "model: give exactly one of model.name_or_path and model.architecture"

# Settings that do not change what a run computes. A run may resume with different values of these. Any other difference
# means that the folder belongs to a different run.
KEYS_FREE_ON_RESUME = (
    *("run.output_dir", "run.resume", "run.log_with", "run.keep_memory"),
    *("run.preflight_timeout_seconds", "run.timeout_seconds"),
    *("batch.micro_batch_size", "data.cache_dir", "data.num_workers", "train.max_bad_steps"),
    *("model.activation_checkpointing", "model.compile"),
    *("evaluation", "sample", "checkpoint", "export", "study"),
)

PATHS = (
    *("run.output_dir", "model.name_or_path", "tokenizer.name_or_path", "data.name"),
    *("data.files", "data.validation_files", "data.cache_dir"),
)
"""Settings that are paths, or may be. They may differ between the hosts of a run."""


def config_from_arguments(arguments: Sequence[str]) -> Config:
    """Read `--config FILE --section.key value ...` into a checked `Config`; raises InputError as `load_config` does."""
    path, overrides = split_arguments(arguments)
    config = Config() if path is None else _read(path)
    for key, text in overrides:
        override(config, key, text)
        _read_architecture(config)
    if config.model.name_or_path is None and config.model.architecture is None:  # a script may bring its own
        raise InputError(ONE_MODEL)
    return _completed(config, path)


def load_config(file: str | os.PathLike[str] | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """The settings of a YAML file (the defaults if there is no file), changed by dotted keys and their values.

    Args:
        file: the same file that `train-loop train --config` takes.
        overrides: such as {"optimizer.learning_rate": 3e-4, "train.epochs": 1}; values as in Python or as in YAML.

    Raises:
        InputError: for a missing file, an unknown key, a wrong type, or settings that contradict each other.
    """
    path = None if file is None else os.fspath(file)
    config = Config() if path is None else _read(path)
    for key, value in (overrides or {}).items():
        section, _, name = key.partition(".")
        fill(config, {section: {name: list(value) if isinstance(value, tuple) else value} if name else value}, "")
    return _completed(config, path)


def checked(config: Config) -> Config:
    """A copy of what a script has made or changed: checked, and its paths expanded, as `load_config` does."""
    copy = Config()
    fill(copy, to_dict(config), "config: ")
    return _completed(copy, None)


def _read(path: str) -> Config:
    config = Config()
    fill(config, read_yaml(paths.expand(path, "--config")), f"{path}: ")
    _read_architecture(config)
    return config


def _read_architecture(config: Config) -> None:
    """Put the fields of a config.json in place of its path, so that a run's own configuration has them all."""
    if isinstance(config.model.architecture, str):
        config.model.architecture = read_architecture(config.model.architecture)


def _completed(config: Config, path: str | None) -> Config:
    """Expand paths, read the architecture, fill in the default output folder, and check the settings."""
    for key in PATHS:
        section_name, _, name = key.partition(".")
        section = getattr(config, section_name)
        match getattr(section, name):
            case str(given):
                setattr(section, name, paths.expand(given, key))
            case list(several):
                setattr(section, name, [paths.expand(each, key) for each in several])
    _read_architecture(config)
    if isinstance(recompute := config.model.activation_checkpointing, bool):
        config.model.activation_checkpointing = "full" if recompute else "none"
    if config.run.output_dir is None:
        config.run.output_dir = str(Path("runs") / (Path(path).stem if path else "train"))
    check_config(config)
    return config


def check_config(config: Config) -> None:
    """Raise InputError for settings that contradict each other: it names the keys, and says what would work."""
    model, tokenizer, data, batch = config.model, config.tokenizer, config.data, config.batch
    if model.name_or_path is not None and model.architecture is not None:
        raise InputError(ONE_MODEL)
    if model.architecture is not None and "model_type" not in model.architecture:
        raise InputError("model.architecture: model_type is missing, e.g. {model_type: gpt2, n_layer: 4}")
    if tokenizer.name_or_path is not None and tokenizer.train_vocab_size is not None:
        raise InputError("tokenizer: give only one of tokenizer.name_or_path and tokenizer.train_vocab_size")
    if model.architecture is not None and tokenizer.name_or_path is None and tokenizer.train_vocab_size is None:
        raise InputError("tokenizer: a model from scratch needs tokenizer.train_vocab_size or tokenizer.name_or_path")
    if tokenizer.train_vocab_size is not None and tokenizer.train_vocab_size < 257:
        raise InputError("tokenizer.train_vocab_size: must be at least 257 (256 bytes and the end-of-text token)")
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
            raise InputError(f"{key} only works with data.source {source}, but data.source is {data.source}")
    if data.streaming and "[" in data.split + (data.validation_split or ""):
        raise InputError("data.split: a stream cannot be sliced; use data.max_documents, or data.streaming false")
    size, whole = batch.micro_batch_size, batch.sequences_per_step
    if isinstance(size, int) and size > whole:
        raise InputError(f"batch.micro_batch_size {size} is larger than batch.sequences_per_step {whole}")
    if "flash" in (config.model.attention or "") and config.run.mixed_precision not in ("bf16", "fp16"):
        raise InputError(
            f"model.attention {config.model.attention}: needs half precision; say --run.mixed_precision bf16, or "
            "--model.attention sdpa"
        )
    if config.run.reproducible == "bitwise":
        precision = config.run.mixed_precision
        for key, chosen in (
            (f"run.mixed_precision {precision}", precision in ("fp16", "fp8")),
            ("model.compile", model.compile),
        ):
            if chosen:
                raise InputError(f"run.reproducible bitwise does not work with {key}; drop one of the two")
    sampling_of(config)  # refuses what cannot be sampled with
    bytes_of(config.export.max_shard_size, "export.max_shard_size")
    if config.export.hub_model_id and not config.export.push_to_hub:
        raise InputError("export.hub_model_id only works with export.push_to_hub true")


def to_dict(config: Config) -> dict[str, Any]:
    """The settings as plain nested dictionaries."""
    values = dataclasses.asdict(config, dict_factory=lambda pairs: {key_of(name): value for name, value in pairs})
    recompute = values["model"]["activation_checkpointing"]
    # As older versions call it, so that they can go on with a run.
    values["model"]["activation_checkpointing"] = {"none": False, "full": True}.get(recompute, recompute)
    return values


def to_yaml(config: Config) -> str:
    """The resolved settings as YAML. `load_config` reads them back unchanged."""
    values = to_dict(config)
    values["optimizer"]["betas"] = list(config.optimizer.betas)
    return dump_yaml(values)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two configurations, except `KEYS_FREE_ON_RESUME`, as lines `key: old -> new`."""
    # A setting that the older version did not have yet had, in effect, its default.
    flat_old, flat_new = dict(flatten(to_dict(Config()))) | dict(flatten(old)), dict(flatten(new))
    free = set(KEYS_FREE_ON_RESUME)
    if flat_new.get("train.patience"):  # then evaluations decide when the run ends
        free = free - {"evaluation"} | {"evaluation.batch_size"}
    return [
        f"{key}: {flat_old.get(key)} -> {flat_new.get(key)}"
        for key in sorted(flat_old.keys() | flat_new.keys())
        if not any(key == each or key.startswith(f"{each}.") for each in free)
        and flat_old.get(key) != flat_new.get(key)
    ]


def shared_settings(config: Config) -> dict[str, Any]:
    """The settings that all processes of a run must share, by key. Paths may differ between hosts."""
    per_host = (*PATHS, "data.num_workers")
    return {key: value for key, value in flatten(to_dict(config)) if key not in per_host}


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested dictionaries as pairs of a dotted key and a value."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def cache_dir(data: DataConfig) -> Path:
    """The folder that holds prepared token stores. Raises InputError if none is named and there is no home folder."""
    if chosen := data.cache_dir or os.environ.get("TRAIN_LOOP_CACHE"):
        return Path(data.cache_dir or paths.expand(chosen, "$TRAIN_LOOP_CACHE"))
    try:
        return Path.home() / ".cache" / "train_loop"
    except RuntimeError:
        raise InputError("data.cache_dir: there is no home folder to put it in; set data.cache_dir or $HOME") from None
