"""Checkpoints: whole or not there, exact, and read without running anything."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from tests.support.faults import signal_in_step
from tests.support.runs import TINY_MODELS, Command, events, names, without_speeds
from train_loop import files, job
from train_loop.checkpoint import storage
from train_loop.config.load import config_from_arguments
from train_loop.metrics.log import MetricsLog
from train_loop.training import loop
from train_loop.training.evaluation import evaluate
from train_loop.training.state import Run
from train_loop.training.step import train_step


def save(folder: Path, run: Run, step: int) -> None:
    """A checkpoint in one part, as a run's saver writes it."""
    temporary = files.private(storage.folder_of(folder, step))
    sums = storage.write_part(temporary, 0, 1, storage.shards(run.state.model, run.state.optimizer))
    storage.commit(temporary, {"step": step, "parts": 1}, sums)


def take_steps(run: Run, first: int, last: int) -> list[float]:
    run.context.objective.train()
    losses = []
    for step in range(first, last):
        losses.append(train_step(run.context, run.state, run.batches[step], 1e-2).loss)
    return losses


@pytest.mark.parametrize("architecture", TINY_MODELS.values(), ids=TINY_MODELS)
def test_training_goes_on_to_the_bit(
    settings: Callable[..., list[str]], tmp_path: Path, architecture: dict[str, Any]
) -> None:
    arguments = settings(model__architecture=json.dumps(architecture))
    first = job.set_up(config_from_arguments(arguments)).run
    take_steps(first, 0, 5)
    save(tmp_path / "c", first, 5)
    expected = take_steps(first, 5, 10)
    second = job.set_up(config_from_arguments(arguments)).run
    found, passed = storage.newest(tmp_path / "c")
    assert found is not None and found.step == 5 and passed == {}
    storage.load(found, second.state.model, second.state.optimizer)
    assert take_steps(second, 5, 10) == expected
    for mine, theirs in zip(first.state.model.parameters(), second.state.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.fixture
def checkpoints(settings: Callable[..., list[str]], tmp_path: Path) -> tuple[Run, Path]:
    """A run with checkpoints of steps 1 and 2."""
    run = job.set_up(config_from_arguments(settings())).run
    for step in (1, 2):
        take_steps(run, step - 1, step)
        save(tmp_path / "c", run, step)
    return run, tmp_path / "c"


PARTS = ("model-00001-of-00001.safetensors", "optimizer-00001-of-00001.safetensors")
FILES = (*PARTS, "state.json", "manifest.json")


def hurt(path: Path, damage: str) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    if damage == "removed":
        path.unlink()
        return
    path.write_bytes(
        {
            "truncated": content[:-3],
            "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "emptied": b"",
            "pickled": pickle.dumps(Bomb()),
        }[damage]
    )


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied", "removed", "pickled"])
def test_a_damaged_checkpoint_is_named_and_passed_over(checkpoints: tuple[Run, Path], file: str, damage: str) -> None:
    _, folder = checkpoints
    hurt(folder / "step-00000002" / file, damage)
    found, passed = storage.newest(folder)
    assert found is not None and found.step == 1
    assert passed.keys() == {2} and "step-00000002" in passed[2] and file in passed[2]


def vouch(checkpoint: Path) -> None:
    """Write a manifest of the files as they are now."""
    sums = {path.name: storage._sums(path) for path in checkpoint.iterdir() if path.name != "manifest.json"}
    (checkpoint / "manifest.json").write_text(json.dumps({"files": sums, "sha256": storage._digest(sums)}))


class Bomb:
    """Runs code when unpickled."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("a checkpoint was unpickled",)


@pytest.mark.parametrize("file", FILES[:3])
def test_a_pickle_that_the_manifest_vouches_for_is_refused(checkpoints: tuple[Run, Path], file: str) -> None:
    """Somebody who can write the folder writes the manifest, too."""
    run, folder = checkpoints
    newest = folder / "step-00000002"
    (newest / file).write_bytes(pickle.dumps(Bomb()))
    vouch(newest)
    found, passed = storage.newest(folder)
    assert found is not None and found.step == 1
    assert f"{file} is not " in passed[2]
    with pytest.raises((SafetensorError, UnicodeDecodeError)):  # nor is it loaded by who doesn't look first
        loaded = storage.CheckpointRef(newest, {"parts": 1}) if file in PARTS else storage._found(newest)
        storage.load(loaded, run.state.model, run.state.optimizer)


def test_every_file_that_a_run_writes_can_be_read_without_running_anything(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path
) -> None:
    assert command("train", *settings(train__max_steps=3)) == 0
    readers = {
        ".safetensors": lambda path: load_file(path) and safe_open(path, "pt").keys(),
        ".json": lambda path: json.loads(path.read_text()),
        ".jsonl": lambda path: [json.loads(line) for line in path.read_text().splitlines()],
        ".yaml": lambda path: yaml.safe_load(path.read_text()),
        ".md": lambda path: path.read_text(),
    }
    kinds = set()
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            assert readers[path.suffix](path), path
            kinds.add(path.suffix)
    assert kinds == readers.keys()


def test_nothing_in_the_package_reads_pickles() -> None:
    import ast

    import train_loop

    readers = {"load", "loads", "Unpickler", "read_pickle"}
    for path in Path(train_loop.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
                assert not {"pickle", "dill", "cloudpickle", "joblib", "shelve"} & set(names), path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.attr in readers:
                assert node.value.id not in ("torch", "np", "numpy", "pickle"), (path, node.lineno)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_under_the_name_of_a_models_weights_is_refused(
    command: Command, settings: Callable[..., list[str]], model_folder: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Bomb()}, tmp_path / "model" / name)
    changes = {"model__name_or_path": tmp_path / "model", "model__architecture": "null"}
    assert command("train", *settings(**changes)) == 2
    assert f"train-loop: model {tmp_path / 'model'}: " in command.err and "safetensors" in command.err
    assert command("evaluate", "--model", tmp_path / "model", *settings()) == 2


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied", "removed"])
def test_a_run_goes_on_from_the_checkpoint_before_and_says_why(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, damage: str
) -> None:
    arguments = settings(train__max_steps=10, checkpoint__every=4, evaluation__every=5)
    assert command("train", *arguments) == 0
    run, whole = tmp_path / "run", tmp_path / "whole"
    shutil.copytree(run, whole)
    for file in FILES:
        hurt(run / "checkpoints" / "step-00000010" / file, damage)
        assert command("train", *arguments) == 0
        assert f"step-00000010: {file} " in command.err and "; skipped" in command.err
        assert f"resuming from {run / 'checkpoints' / 'step-00000008'}" in command.err
        assert without_speeds(run) == without_speeds(whole)
        assert (run / "model" / "model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
        assert storage.find_damage(run / "checkpoints" / "step-00000010") is None
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000008", "step-00000010"]


def test_when_no_checkpoint_is_whole_nothing_is_overwritten(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path
) -> None:
    assert command("train", *settings(train__max_steps=10, checkpoint__every=4)) == 0
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        hurt(folder / PARTS[0], "flipped")

    def content() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    before = content()
    # A setting that may change: not even that is written down.
    assert command("train", *settings(train__max_steps=10, checkpoint__every=5)) == 2
    complaint = [line for line in command.err.splitlines() if line.startswith("train-loop: ")]
    assert len(complaint) == 1 and "no checkpoint is whole" in complaint[0] and "remove" in complaint[0]
    assert complaint[0].count(PARTS[0]) == 2
    assert content() == before


def test_a_half_written_checkpoint_is_never_seen(
    checkpoints: tuple[Run, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = checkpoints
    monkeypatch.setattr(storage, "commit", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(folder, run, 3)
    assert len(list(folder.glob(".train_loop-*-step-00000003"))) == 1
    shutil.copytree(folder / "step-00000001", folder / "tmp-step-00000001")  # what 0.1.0 had not finished
    theirs = {"tmp-step-00000009", "tmp-notes", "step-00000003.tmp"}
    for name in theirs:
        (folder / name).mkdir()
        (folder / name / "precious").write_text("x")
    found, passed = storage.newest(folder)
    assert found is not None and found.step == 2 and passed == {}
    storage.clear(folder)
    storage.prune(folder, 1, 2)
    assert {path.name for path in folder.iterdir()} == {"step-00000002"} | theirs
    assert all((folder / name / "precious").read_text() == "x" for name in theirs)


def with_state(checkpoint: Path, **changes: Any) -> None:
    """Edit a checkpoint's state so that its manifest is right."""
    path = checkpoint / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    vouch(checkpoint)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"step": 7}, "state.json is that of step 7"),
        ({"step": "2"}, "state.json is not the state of a run"),
        ({"step": -1}, "state.json is not the state of a run"),
        ({"step": True}, "state.json is not the state of a run"),
        ({"parts": 0}, "state.json is not the state of a run"),
        ({"parts": 10**9}, "manifest.json does not list model-00001-of-1000000000"),
        ({"micro_batch_size": "four"}, "state.json is not the state of a run"),
        ({"micro_batch_size": 0}, "state.json is not the state of a run"),
    ],
)
def test_a_state_that_can_t_be_is_damage(checkpoints: tuple[Run, Path], changes: dict[str, Any], problem: str) -> None:
    """Also if the manifest vouches for it."""
    _, folder = checkpoints
    with_state(folder / "step-00000002", **changes)
    found, passed = storage.newest(folder)
    assert found is not None and found.step == 1 and problem in passed[2]


def test_a_checkpoint_under_an_earlier_step_s_name_is_damage(checkpoints: tuple[Run, Path]) -> None:
    _, folder = checkpoints
    shutil.rmtree(folder / "step-00000001")
    (folder / "step-00000002").rename(folder / "step-00000001")
    with_state(folder / "step-00000001", step=1)
    found, passed = storage.newest(folder)
    assert found is None and "optimizer-00001-of-00001.safetensors is that of step 2 or later" in passed[1]


def test_another_runs_checkpoint_is_refused_with_the_difference(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Copied, edited, or of a step that the run will never take; nothing is loaded and nothing is changed."""
    same = {"train__max_steps": 6, "checkpoint__every": 3, "evaluation__every": 6}
    for name, changes in (("mine", {}), ("other", {"optimizer__learning_rate": 5e-3, "run__seed": 1})):
        assert command("train", *settings(run__output_dir=tmp_path / name, **same, **changes)) == 0
    mine, theirs = (tmp_path / name / "checkpoints" / "step-00000006" for name in ("mine", "other"))

    def refused(*expected: str) -> None:
        before = {path: path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file()}
        assert command("train", *settings(run__output_dir=tmp_path / "mine", **same)) == 2
        assert command.err.splitlines()[-1].startswith(f"train-loop: checkpoint {mine.parent}")
        assert all(each in command.err for each in expected) and "Traceback" not in command.err, command.err
        assert {path: path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file()} == before

    kept = shutil.copytree(mine, tmp_path / "kept")
    shutil.rmtree(mine)
    shutil.copytree(theirs, mine)
    refused("belongs to a different run (optimizer.learning_rate: 0.005 -> 0.01; run.seed: 1 -> 0)")
    shutil.rmtree(mine)
    shutil.copytree(kept, mine)
    with_state(mine, fingerprint="f" * 64)
    refused("belongs to a different run (data: fingerprint ffffffffffff -> ")
    shutil.rmtree(mine)
    shutil.copytree(kept, beyond := mine.with_name("step-00000007"))
    with_state(beyond, step=7)
    refused("step-00000007: is beyond the end of the run, at step 6")
    shutil.rmtree(beyond)
    shutil.copytree(kept, mine)
    # Settings that may change between two starts may differ here, too.
    other = settings(run__output_dir=tmp_path / "mine", **same | {"checkpoint__every": 2}, checkpoint__keep=1)
    assert command("train", *other) == 0


def test_another_models_checkpoint_changes_nothing(
    checkpoints: tuple[Run, Path], settings: Callable[..., list[str]]
) -> None:
    _, folder = checkpoints
    other = job.set_up(config_from_arguments(settings(model__architecture=json.dumps(TINY_MODELS["llama"])))).run
    before = [parameter.clone() for parameter in other.state.model.parameters()]
    found, _ = storage.newest(folder)
    assert found is not None
    with pytest.raises(ValueError, match="another model"):
        storage.load(found, other.state.model, other.state.optimizer)
    assert all(map(torch.equal, before, other.state.model.parameters()))


def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off hard in the middle of an epoch, twice, with dropout on: metrics and weights equal to the bit."""
    whole, cut = (settings(run__output_dir=tmp_path / name, checkpoint__every=7) for name in ("whole", "cut"))
    assert command("train", *whole) == 0
    step_of_train = train_step

    def cut_at(*steps: int) -> None:
        def step(*arguments: Any, **named: Any) -> Any:
            if arguments[2].index in steps:
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
    assert without_speeds(tmp_path / "cut") == without_speeds(tmp_path / "whole")
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_only_the_newest_and_the_best_are_kept(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([5.0, 4.0, 4.5, 4.0, 4.6, 4.7])
    monkeypatch.setattr(loop, "evaluate", lambda *arguments: evaluate(*arguments) | {"loss": next(losses)})
    arguments = settings(train__max_steps=30, evaluation__every=5, checkpoint__every=7, checkpoint__keep=2)
    assert command("train", *arguments, "--export.from", "best") == 0
    # 28 and 30 are the newest; of 10 and 20, which are equally good, the first one is the best.
    assert names(tmp_path / "run") == [10, 28, 30]
    assert "best step        10 of 30" in command.out and "validation loss  4.0000" in command.out
    assert "those of step 10" in " ".join((tmp_path / "run" / "model" / "README.md").read_text().split())
    best, _ = storage.of_step(tmp_path / "run" / "checkpoints", 10)
    assert best is not None
    exported = load_file(tmp_path / "run" / "model" / "model.safetensors")
    kept = storage.tensors(best)
    assert all(torch.equal(exported[name], kept[name]) for name in exported.keys() & kept.keys()) and exported
    # The same command without it exports the last weights; with the best one damaged, the next best.
    assert command("train", *arguments) == 0 and "best step" not in command.out
    last = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert not all(torch.equal(exported[name], last[name]) for name in exported)
    hurt(best.folder / PARTS[0], "truncated")
    assert command("train", *arguments, "--export.from", "best") == 0
    assert "exporting the weights of step 30 instead" in command.err and "step-00000010: model-" in command.err


def test_training_ends_when_evaluations_bring_nothing_any_more(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a run that was cut off while it waited ends at the same step."""
    given = {4: 5.0, 8: 4.0, 12: 4.5, 16: 4.2, 20: 4.1, 24: 1.0}
    monkeypatch.setattr(
        loop, "evaluate", lambda *arguments: evaluate(*arguments) | {"loss": given[arguments[0].last_step]}
    )
    write = MetricsLog.write

    def remember(self: Any, record: dict[str, Any]) -> None:
        self.accelerator.last_step = record["step"]
        write(self, record)

    monkeypatch.setattr(MetricsLog, "write", remember)
    for name in ("whole", "cut"):
        arguments = settings(
            run__output_dir=tmp_path / name, train__max_steps=30, evaluation__every=4, train__patience=3
        )
        if name == "cut":
            with pytest.MonkeyPatch.context() as patch:
                signal_in_step(patch, 0, 14)
                assert command("train", *arguments) == 3
        assert command("train", *arguments) == 0
        assert [event["step"] for event in events(tmp_path / name, "step")] == list(range(1, 21))
        status = json.loads((tmp_path / name / "status.json").read_text())
        assert status == {"state": "complete", "step": 20, "reason": "no lower validation loss in 3 evaluations"}
        before = without_speeds(tmp_path / name)
        assert command("train", *arguments) == 0 and without_speeds(tmp_path / name) == before
    assert without_speeds(tmp_path / "whole") == without_speeds(tmp_path / "cut")
    arguments[arguments.index("--evaluation.every") + 1] = "5"
    assert command("train", *arguments) == 2  # with patience it decides about the end
    assert "evaluation.every: 4 -> 5" in command.err


def test_early_checkpoints_for_study_are_kept(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path
) -> None:
    arguments = settings(train__max_steps=20, checkpoint__every=6, checkpoint__keep=1, evaluation__every=20)
    assert command("train", *arguments, "--checkpoint.at", "log") == 0
    assert names(tmp_path / "run") == [0, 1, 2, 4, 8, 16, 20]
    first, _ = storage.of_step(tmp_path / "run" / "checkpoints", 0)
    assert first is not None and storage.tensors(first) and not storage.tensors(first, "optimizer")
    # A run that goes on from any of them is the same run; without the setting, they still are not removed.
    expected = without_speeds(tmp_path / "run")
    for step in (1, 2, 4, 8, 16, 20):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    assert command("train", *arguments) == 0 and "resuming from" in command.err
    assert without_speeds(tmp_path / "run") == expected and names(tmp_path / "run") == [0, 20]
