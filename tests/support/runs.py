"""Small runs, and what is needed to look at them: settings, models, commands in this process, logs."""

import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from train_loop.cli import main
from train_loop.config.schema import Config
from train_loop.data.loader import IGNORED
from train_loop.metrics.throughput import MEASURED
from train_loop.ops import products

ROOT = Path(__file__).parents[2]

WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were all her she there would their we him been has when who will no more if out so said what up its about"
).split()


TINY_MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2},
    "llama": {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 64,
    },
}


MIXTRAL = TINY_MODELS["llama"] | {"model_type": "mixtral", "num_local_experts": 4}


NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_GROUPED = _SMALL | {"num_key_value_heads": 2}


PATHS: dict[str, tuple[dict[str, Any], str]] = {
    "gpt2": (TINY_MODELS["gpt2"], "fused"),
    "llama": (TINY_MODELS["llama"], "fused"),
    "llama-tied": (TINY_MODELS["llama"] | {"tie_word_embeddings": True}, "fused"),
    "qwen3": ({"model_type": "qwen3", "head_dim": 16} | _GROUPED, "fused"),
    "gpt_neox": ({"model_type": "gpt_neox"} | _SMALL, "fused"),
    "bloom": ({"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 2}, "fused"),
    "phi": ({"model_type": "phi"} | _SMALL, "fused"),  # a head with a bias
    "gemma2": ({"model_type": "gemma2", "head_dim": 16} | _GROUPED, "logits"),  # caps its logits
    "granite": ({"model_type": "granite", "logits_scaling": 2.0} | _GROUPED, "logits"),  # scales them
    "cohere": ({"model_type": "cohere"} | _GROUPED, "logits"),
}


def text(words: int, seed: int) -> str:
    """Made-up prose: `words` common words in sentences."""
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) + ("." if draw.random() < 0.1 else "") for _ in range(words))


def forget_accelerator() -> None:
    """Accelerate keeps one state a process; a command must not see the precision or trackers of one before it."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def last_of_each(arguments: Iterable[object]) -> list[str]:
    """Arguments in which a setting's last value replaces earlier ones: a command refuses a setting given twice."""
    given: dict[str, list[str]] = {}
    texts = iter([str(argument) for argument in arguments])
    for text in texts:
        is_setting = re.fullmatch(r"--[a-z]+\.\w+", text)
        given[text if is_setting else f"{len(given)} {text}"] = [text, *([next(texts)] if is_setting else [])]
    return [part for pair in given.values() for part in pair]


class Command:
    """Runs `train-loop` in this process and keeps what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.out = self.err = ""

    def __call__(self, *arguments: object) -> int:
        """The exit code of `train-loop ARGUMENTS`."""
        forget_accelerator()
        self.capsys.readouterr()
        code = main(last_of_each(arguments))
        self.out, self.err = self.capsys.readouterr()
        return code


def arguments_for(corpus: Path, tokenizer_folder: Path, output: Path, **changes: object) -> list[str]:
    """Command-line settings of a run that takes a second, in `output`; keyword arguments change them (a__b for a.b)."""
    values: dict[str, object] = {
        "run.output_dir": output,
        "model.architecture": json.dumps(TINY_MODELS["gpt2"]),
        "tokenizer.name_or_path": tokenizer_folder,
        "data.source": "files",
        "data.files": f"{corpus}/*.txt",
        "data.test_size": 0.2,
        "data.block_size": 32,
        "batch.sequences_per_step": 8,
        "optimizer.learning_rate": 1e-2,
        "train.epochs": 2,
        "sample.max_new_tokens": 9,  # a hundred, the default, take as long as the rest of the run
        "export.verify": "false",  # takes five seconds
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return [part for key, value in values.items() if value is not None for part in (f"--{key}", str(value))]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind in a run's metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def without_speeds(folder: Path) -> list[dict[str, Any]]:
    """A run's metrics, but for the speeds."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in MEASURED} for line in lines]


def names(run: Path) -> list[int]:
    """Steps of a run's checkpoints."""
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


def configured(architecture: dict[str, Any] | None = None, block_size: int = 32, seed: int = 0, **keys: Any) -> Config:
    config = Config()
    config.model.architecture = architecture
    config.data.block_size = block_size
    config.run.seed = seed
    for key, value in keys.items():
        setattr(config.model, key, value)
    return config


def batch(rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randint(0, 320, (rows, 32), generator=generator) for _ in range(2))
    targets[0, 5:] = IGNORED
    return inputs, targets


needs_onednn = pytest.mark.skipif(products.ONEDNN not in products.available(), reason="torch was built without oneDNN")
