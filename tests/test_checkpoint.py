"""Checkpoints: whole or not there, exact, and read without running anything."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TINY_MODELS, Command, events
from train_loop import checkpoint, config, loop
from train_loop.data.loader import loader
from train_loop.step import train_step


def take_steps(run: loop.Run, first: int, last: int) -> list[float]:
    run.objective.train()
    losses = []
    for step in range(first, last):
        batches = list(loader(run.train, run.plan.share(step, 0, 1)))
        targets = run.train.targets(run.plan.blocks(step))
        arguments = (run.accelerator, run.objective, run.optimizer, batches, len(batches), targets)
        losses.append(train_step(*arguments, 1e-2, 1.0, (0, step)).loss)
    return losses


@pytest.mark.parametrize("architecture", TINY_MODELS.values(), ids=TINY_MODELS)
def test_training_goes_on_to_the_bit(
    settings: Callable[..., list[str]], tmp_path: Path, architecture: dict[str, Any]
) -> None:
    arguments = settings(model__architecture=json.dumps(architecture))
    first = loop.set_up(config.load(arguments))
    take_steps(first, 0, 5)
    checkpoint.save(tmp_path / "c", checkpoint.pieces(first.model, first.optimizer), {"step": 5})
    expected = take_steps(first, 5, 10)
    second = loop.set_up(config.load(arguments))
    found, passed = checkpoint.newest(tmp_path / "c")
    assert found is not None and found.step == 5 and passed == {}
    checkpoint.load(found, second.model, second.optimizer)
    assert take_steps(second, 5, 10) == expected
    for mine, theirs in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.fixture
def checkpoints(settings: Callable[..., list[str]], tmp_path: Path) -> tuple[loop.Run, Path]:
    """A run with checkpoints of steps 1 and 2."""
    run = loop.set_up(config.load(settings()))
    for step in (1, 2):
        take_steps(run, step - 1, step)
        checkpoint.save(tmp_path / "c", checkpoint.pieces(run.model, run.optimizer), {"step": step})
    return run, tmp_path / "c"


PARTS = ("model-00001-of-00001.safetensors", "optimizer-00001-of-00001.safetensors")
FILES = (*PARTS, "state.json", "manifest.json")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied", "removed", "pickled"])
def test_a_damaged_checkpoint_is_named_and_passed_over(
    checkpoints: tuple[loop.Run, Path], file: str, damage: str
) -> None:
    _, folder = checkpoints
    path = folder / "step-00000002" / file
    content = path.read_bytes()
    if damage == "removed":
        path.unlink()
    elif damage == "pickled":
        path.write_bytes(pickle.dumps(Bomb()))
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"truncated": content[:-3], "flipped": flipped, "emptied": b""}[damage])
    found, passed = checkpoint.newest(folder)
    assert found is not None and found.step == 1
    assert passed.keys() == {2} and "step-00000002" in passed[2] and file in passed[2]


class Bomb:
    """Runs code when unpickled."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("a checkpoint was unpickled",)


def test_none_is_whole(checkpoints: tuple[loop.Run, Path]) -> None:
    _, folder = checkpoints
    for manifest in folder.glob("*/manifest.json"):
        manifest.unlink()
    found, passed = checkpoint.newest(folder)
    assert found is None and len(passed) == 2


def test_a_half_written_checkpoint_is_never_seen(
    checkpoints: tuple[loop.Run, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = checkpoints
    monkeypatch.setattr(checkpoint, "complete", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(folder, checkpoint.pieces(run.model, run.optimizer), {"step": 3})
    assert (folder / "tmp-step-00000003").is_dir()
    found, passed = checkpoint.newest(folder)
    assert found is not None and found.step == 2 and passed == {}
    checkpoint.clear(folder)
    checkpoint.prune(folder, 1, 2)
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]


def test_another_models_checkpoint_changes_nothing(
    checkpoints: tuple[loop.Run, Path], settings: Callable[..., list[str]]
) -> None:
    _, folder = checkpoints
    other = loop.set_up(config.load(settings(model__architecture=json.dumps(TINY_MODELS["llama"]))))
    before = [parameter.clone() for parameter in other.model.parameters()]
    found, _ = checkpoint.newest(folder)
    assert found is not None
    with pytest.raises(ValueError, match="another model"):
        checkpoint.load(found, other.model, other.optimizer)
    assert all(map(torch.equal, before, other.model.parameters()))


def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off hard in the middle of an epoch, twice, with dropout on: metrics and weights equal to the bit."""
    whole, cut = (settings(run__output_dir=tmp_path / name, checkpoint__every=7) for name in ("whole", "cut"))
    assert command("train", *whole) == 0
    step_of_train = train_step

    def cut_at(*steps: int) -> None:
        def step(*arguments: Any, **named: Any) -> Any:
            if named["seed"][1] in steps:
                raise SystemError("the machine is gone")
            return step_of_train(*arguments, **named)

        monkeypatch.setattr(loop, "train_step", step)

    for fatal in (10, 17):
        cut_at(fatal)
        with pytest.raises(SystemError):
            command("train", *cut)
    assert json.loads((tmp_path / "cut" / "status.json").read_text())["state"] == "failed"
    monkeypatch.undo()
    assert command("train", *cut) == 0 and "resuming from" in command.err
    for kind in ("step", "evaluation"):
        expected, found = (events(tmp_path / name, kind) for name in ("whole", "cut"))
        for event in [*expected, *found]:
            event.pop("tokens_per_second", None)
        assert found == expected
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_only_the_newest_are_kept(command: Command, settings: Callable[..., list[str]], tmp_path: Path) -> None:
    assert command("train", *settings(checkpoint__every=5, checkpoint__keep=2)) == 0
    total = len(events(tmp_path / "run", "step"))
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == [f"step-{total // 5 * 5:08d}", f"step-{total:08d}"]
