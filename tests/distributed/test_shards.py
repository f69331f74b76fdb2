"""Models in shards: made and loaded so that they start with the same bits as whole ones, on any number of processes."""

import json
from pathlib import Path

import pytest

from scripts.architectures import small
from tests.support import forked, initial
from tests.support.launch import CONFIGS, ON_CPU, launchers
from tests.support.runs import arguments_for
from train_loop.config.load import config_from_arguments
from train_loop.data import tokenizer
from train_loop.models import building

KINDS = ["gpt2", "llama", "gemma2", "mixtral", "mamba", "qwen3_next"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer_folder: Path) -> dict[str, list[str]]:
    """Arguments of runs by name: models from scratch, and the same ones from files."""
    root, found = tmp_path_factory.mktemp("shards"), {}
    for kind in KINDS:
        architecture = json.dumps({"model_type": kind} | small(kind))
        found[kind] = arguments_for(corpus, tokenizer_folder, root / kind, model__architecture=architecture)
        folder = root / f"{kind}-files"
        building.build(config_from_arguments(found[kind]), tokenizer.load(str(tokenizer_folder))).save_pretrained(
            folder
        )
        files = {"model__name_or_path": folder, "model__architecture": None}
        found[f"{kind}, loaded"] = arguments_for(corpus, tokenizer_folder, root / f"{kind}-loaded", **files)
    return found


@pytest.mark.parametrize("number", [2, 3, 4])
def test_a_sharded_model_starts_with_the_bits_of_a_whole_one(
    runs: dict[str, list[str]], tmp_path: Path, number: int
) -> None:
    todo, done = tmp_path / "todo.json", tmp_path / "done.json"
    runs = {name: arguments for name, arguments in runs.items() if number == 3 or "loaded" not in name}
    todo.write_text(json.dumps(runs))
    options = ["--config_file", str(CONFIGS / "fsdp2.yaml"), "--num_processes", str(number)]
    each = launchers(number, options, ON_CPU | {"TESTS_FSDP2_ON_CPU": "true"})
    ended = forked.together("tests.support.initial", (str(todo), str(done)), each, 300)
    assert not any(code for code, _ in ended), ended
    for name, arguments in runs.items():
        config = config_from_arguments(arguments)
        whole = initial.sums(building.build(config, tokenizer.load(str(config.tokenizer.name_or_path))))
        for rank in range(number):
            assert json.loads(Path(f"{done}.{rank}").read_text())[name] == whole, (name, rank)
