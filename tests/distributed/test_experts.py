"""The balance of experts on one, two and three processes, with DDP and FSDP2, in micro-batches of any size."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import several
from tests.support.runs import MIXTRAL, arguments_for, events

WORLDS = ["1", "2", "3", "2-fsdp2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer_folder: Path) -> Path:
    """Runs of 4 steps with short documents and a short last window; folders world-kind."""
    root = tmp_path_factory.mktemp("experts")
    for world in WORLDS:
        kinds: dict[str, dict[str, Any]] = {"of-2": {"study__every": 2}}
        if world in "12":
            kinds |= {"of-1": {"batch__micro_batch_size": 1}, "of-4": {"batch__micro_batch_size": 4}}
        if "fsdp2" in world:
            kinds["recomputed"] = {"model__activation_checkpointing": "true"}
        else:
            kinds["bitwise"] = {"run__reproducible": "bitwise"}
        commands = []
        for kind, changes in kinds.items():
            base = {"model__architecture": json.dumps(MIXTRAL), "model__balance_weight": 0.5, "train__max_steps": 4}
            base |= {"batch__sequences_per_step": 7, "batch__micro_batch_size": 2, "data__isolate_documents": "true"}
            base |= {"evaluation__every": 4, "sample__max_new_tokens": 1}
            commands.append(
                ["train", *arguments_for(corpus, tokenizer_folder, root / f"{world}-{kind}", **base | changes)]
            )
        for outcome in several(int(world[0]), commands, world.endswith("fsdp2")):
            assert outcome.code == 0, outcome.err
    return root


def of_steps(runs: Path, name: str, key: str) -> list[float]:
    return [each[key] for each in events(runs / name, "step")]


def test_losses_and_balance_do_not_depend_on_processes_and_micro_batches(runs: Path) -> None:
    folders = list(runs.iterdir())
    assert len(folders) == 12
    for folder in folders:
        for key in ("loss", "balance_loss", "grad_norm"):
            expected = of_steps(runs, "1-of-4", key)
            assert len(expected) == 4
            assert of_steps(runs, folder.name, key) == pytest.approx(expected, rel=1e-5), (folder.name, key)


def test_bitwise_balance_has_the_same_bits_on_any_number_of_processes(runs: Path) -> None:
    for key in ("loss", "balance_loss", "grad_norm"):
        one, two, three = (of_steps(runs, f"{world}-bitwise", key) for world in "123")
        assert one == two == three


@pytest.mark.parametrize("world", WORLDS[1:])
def test_shares_of_experts_do_not_depend_on_processes(runs: Path, world: str) -> None:
    def shares(world: str) -> list[float]:
        lines = map(json.loads, (runs / f"{world}-of-2" / "study.jsonl").read_text(encoding="utf-8").splitlines())
        found = [each["experts"] for each in lines if each["event"] == "statistics"]
        return [share for each in found for layer in each.values() for one in layer.values() for share in one]

    assert len(shares("1")) == 2 * 2 * 2 * 4  # steps, layers, kinds, experts
    assert shares(world) == pytest.approx(shares("1"), abs=1e-5)


def test_a_weight_for_a_model_without_experts_is_one_line(settings: Callable[..., list[str]]) -> None:
    (outcome,) = several(2, [["train", *settings(model__balance_weight=0.1)]])
    assert outcome.codes == [2, 2]
    lines = [line for line in outcome.err.splitlines() if line.startswith("train-loop: ")]
    assert len(lines) == 1 and "model.balance_weight: GPT2LMHeadModel has no router" in lines[0]
