"""What is watched on several processes is the run's, not one process's: the same numbers as on one."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import several
from tests.support.runs import NO_DROPOUT, TINY_MODELS, arguments_for, events

SHAPES = {"gpt2": TINY_MODELS["gpt2"] | NO_DROPOUT, "llama": TINY_MODELS["llama"] | {"tie_word_embeddings": True}}
WORLDS = ["1", "2", "2-fsdp2", "4-hsdp"]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer_folder: Path) -> Path:
    """Runs of 6 steps on 1, 2 and 2 x 2 processes, with DDP, FSDP2 and HSDP: folders world-shape-kind."""
    root = tmp_path_factory.mktemp("studied")
    make = functools.partial(arguments_for, corpus, tokenizer_folder)
    for world in WORLDS:
        commands = []
        for name, shape in SHAPES.items():
            for kind, every in (("on", 2), ("off", None)):
                changes: dict[str, object] = {"study__every": every, "model__architecture": json.dumps(shape)}
                changes |= {"batch__sequences_per_step": 6, "batch__micro_batch_size": 2, "train__max_steps": 6}
                changes |= {"evaluation__every": 3, "sample__max_new_tokens": 3, "optimizer__learning_rate": 1e-3}
                commands.append(["train", *make(root / f"{world}-{name}-{kind}", **changes)])
        copies = 2 if world.endswith("hsdp") else 1
        for outcome in several(int(world[0]), commands, world.endswith(("fsdp2", "hsdp")), copies=copies):
            assert outcome.code == 0, outcome.err
    return root


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested values by their paths."""
    if isinstance(value, dict):
        return {key: each for inner, some in value.items() for key, each in flat(some, f"{name}/{inner}").items()}
    if isinstance(value, list):
        return flat(dict(enumerate(value)), name)
    return {name: value}


def study(folder: Path) -> dict[str, Any]:
    """All values of a run's study.jsonl by event, step and path."""
    found = [json.loads(line) for line in (folder / "study.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [each["step"] for each in found if each["event"] == "statistics"] == [2, 4, 6]
    assert [each["step"] for each in found if each["event"] == "probe"] == [3, 6]
    return flat({f"{each['event']} {each['step']}": each for each in found})


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("world", WORLDS[1:])
def test_statistics_do_not_depend_on_the_processes(runs: Path, world: str, name: str) -> None:
    one, other = (study(runs / f"{each}-{name}-on") for each in ("1", world))
    assert one.keys() == other.keys() and len(one) > 500
    for key, value in one.items():
        if not isinstance(value, int | float):
            assert other[key] == value, key
        elif "noise" not in key:
            assert other[key] == pytest.approx(value, rel=1e-4, abs=1e-7), key
    # Signal and noise are differences of the two numbers that are measured: compare these.
    for step in (2, 4, 6):
        signal, noise = (f"/statistics {step}/gradient_noise/{each}" for each in ("signal", "noise"))
        for size in (64, 192):  # targets of a micro-batch and of a step
            expected = one[signal] + one[noise] / size
            assert other[signal] + other[noise] / size == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("world", WORLDS)
def test_watching_changes_nothing_on_several_processes(runs: Path, world: str, name: str) -> None:
    on, off = (runs / f"{world}-{name}-{kind}" for kind in ("on", "off"))
    for key in ("loss", "grad_norm"):
        assert [each[key] for each in events(on, "step")] == [each[key] for each in events(off, "step")]
    assert events(on, "evaluation") == events(off, "evaluation")
    assert not (off / "study.jsonl").exists()
