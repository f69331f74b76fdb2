"""A run's folder: what in it is not ours, what is damaged, who may read it, and what it says while the run goes on."""

import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import Command, events, without_speeds
from train_loop.checkpoint import ownership, run_folder
from train_loop.checkpoint.run_folder import RunFolder
from train_loop.config.load import config_from_arguments
from train_loop.errors import InputError
from train_loop.training import loop

Settings = Callable[..., list[str]]


@pytest.fixture
def empty(settings: Settings, tmp_path: Path) -> Callable[[], None]:
    """Checks the folder of a run that has not begun."""
    (tmp_path / "run").mkdir()
    config = config_from_arguments(settings())
    return lambda: RunFolder(tmp_path / "run").check(config)


@pytest.mark.parametrize("name", [*run_folder._SMALL[1:], *run_folder._LOGS])
def test_files_of_unknown_origin_are_not_written_over(empty: Callable[[], None], tmp_path: Path, name: str) -> None:
    empty()
    (tmp_path / "run" / "notes.txt").write_text("mine")  # whatever a run never writes does not matter
    (tmp_path / "run" / "model.tmp").mkdir()
    empty()
    (tmp_path / "run" / name).write_text("{}")
    with pytest.raises(InputError, match=f"holds {name} of something else; name another folder"):
        empty()


@pytest.mark.parametrize("target", ["somewhere", "nowhere"])
@pytest.mark.parametrize("name", [*run_folder._SMALL, *run_folder._LOGS, *run_folder._FOLDERS])
def test_a_planted_link_is_refused(empty: Callable[[], None], tmp_path: Path, name: str, target: str) -> None:
    (tmp_path / "somewhere").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / target)
    with pytest.raises(InputError, match=f"{name} is a link, and a run writes only into its own folder"):
        empty()


@pytest.mark.parametrize("name", [*run_folder._SMALL, *run_folder._LOGS, *run_folder._FOLDERS])
def test_a_folder_in_a_file_s_place_is_one_line(empty: Callable[[], None], tmp_path: Path, name: str) -> None:
    path = tmp_path / "run" / name
    path.mkdir() if name not in run_folder._FOLDERS else path.write_text("x")
    with pytest.raises(InputError, match=f"{name} is a (file|folder) where a (file|folder) belongs; move it away"):
        empty()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"root": tmp_path_factory.mktemp("made")}


@pytest.fixture
def stopped(command: Command, settings: Settings, made: dict[str, Path], tmp_path: Path) -> Iterator[list[str]]:
    """The command of a run that has done two steps of four; its folder is a copy of one that was made once."""
    arguments = settings(train__max_steps=4, checkpoint__every=2, evaluation__every=4)
    if "run" not in made:
        with pytest.MonkeyPatch.context() as patch:
            from tests.support.faults import signal_in_step

            signal_in_step(patch, 0, 2)
            assert command("train", *arguments) == 3
        made["run"] = shutil.copytree(tmp_path / "run", made["root"] / "run")
    else:
        shutil.copytree(made["run"], tmp_path / "run")
    yield arguments


DAMAGE = {"empty": b"", "cut": b'{"sta', "another type": b"[1, 2]", "binary": b"\x00\xff\xfe", "deep": b"[" * 100_000}


@pytest.mark.parametrize("name", [*run_folder._SMALL, "architecture/config.json", "architecture/tokenizer.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_what_follows_from_the_rest_is_mended(stopped: list[str], tmp_path: Path, name: str, damage: str) -> None:
    """Without a run: what it does with the folder before the first step."""
    run = RunFolder(tmp_path / "run")
    config = config_from_arguments(stopped)
    ledger, truth = run.read("ledger.json"), run.read("truth.json")
    assert ledger is not None and truth is not None
    whole = {path: path.read_bytes() for path in run.path.rglob("*.json") if path.name != "status.json"}
    parts = [Saved(run.architecture, "*config.json"), Saved(run.architecture, "tokenizer*.json")]
    (run.path / name).write_bytes(DAMAGE[damage])
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "say", lines.append)
        run.check(config)
        run.claim(config, ledger, truth, parts)
    assert len(lines) == 1 and name.split("/")[-1] in lines[0] and "written again" in lines[0]
    run.set_status("running", 2)
    assert all(path.read_bytes() == content for path, content in whole.items())
    assert run.read("config.yaml") == run_folder.json_of(config)
    assert not [path for path in run.path.rglob("*") if ".train_loop" in path.name]


class Saved:
    """Saves again what stood in a folder."""

    def __init__(self, folder: Path, pattern: str) -> None:
        self.files = {path.name: path.read_bytes() for path in folder.glob(pattern)}

    def save_pretrained(self, save_directory: Any) -> None:
        for name, content in self.files.items():
            (Path(save_directory) / name).write_bytes(content)


def test_a_run_with_a_damaged_folder_goes_on_to_the_same_end(
    command: Command, stopped: list[str], made: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert command("train", *stopped) == 0
    expected, weights = without_speeds(run), (run / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(run)
    shutil.copytree(made["run"], run)
    for name in (*run_folder._SMALL, "architecture/tokenizer_config.json"):
        (run / name).write_bytes(b"\xff")
    assert command("train", *stopped) == 0, command.err
    assert command.err.count("written again") == 5
    assert without_speeds(run) == expected and (run / "model" / "model.safetensors").read_bytes() == weights
    assert json.loads((run / "status.json").read_text())["state"] == "complete"


def test_a_lost_configuration_is_that_of_the_checkpoints(command: Command, stopped: list[str], tmp_path: Path) -> None:
    """Where they say another, it is another run; where there are none, nobody knows."""
    run = tmp_path / "run"
    (run / "config.yaml").write_text("")
    changed = [*stopped]
    changed[changed.index("--optimizer.learning_rate") + 1] = "0.5"
    assert command("train", *changed) == 2
    assert "belongs to a different run (optimizer.learning_rate: 0.01 -> 0.5)" in command.err
    shutil.rmtree(run / "checkpoints")
    assert command("train", *stopped) == 2
    assert "config.yaml is damaged, and no checkpoint says which run this was" in command.err
    (run / "config.yaml").unlink()
    assert command("train", *stopped) == 2 and "holds ledger.json of something else" in command.err


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_files_and_folders_follow_the_umask(command: Command, settings: Settings, tmp_path: Path, umask: int) -> None:
    """Colleagues on a cluster may read a model, if the umask lets them."""
    before = os.umask(umask)
    try:
        changes = {"train__max_steps": 2, "sample__prompts": "[the]", "study__every": 1}
        assert command("train", *settings(**changes)) == 0
        assert command("report", "--run", tmp_path / "run") == 0
    finally:
        os.umask(before)
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run").rglob("*")}
    assert len(found) > 20 and {path.suffix for path in found} >= {".safetensors", ".json", ".jsonl", ".html", ".yaml"}
    for path, mode in found.items():
        assert mode == (0o777 if path.is_dir() else 0o666) & ~umask, f"{path}: {mode:o}"


def test_a_model_folder_with_something_of_somebody_else_s_is_kept(
    command: Command, settings: Settings, tmp_path: Path
) -> None:
    arguments, run = settings(train__max_steps=2), tmp_path / "run"
    assert command("train", *arguments) == 0
    for number in ("model-before", "model-before-2"):
        (run / "model" / "notes.txt").write_text("precious")
        assert command("train", *arguments) == 0
        assert f"holds notes.txt, which this run did not write; it is kept as {number}" in command.err
        assert (run / number / "notes.txt").read_text() == "precious"
        assert not (run / "model" / "notes.txt").exists()
    assert command("train", *arguments) == 0 and "is kept as" not in command.err


def test_the_status_moves_while_the_run_trains(
    command: Command, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says nothing that is not so: the state is written by the run alone."""
    take, seen = loop.train_step, []

    def train_step(*arguments: Any, **named: Any) -> Any:
        time.sleep(0.1)
        seen.append(json.loads((tmp_path / "run" / "status.json").read_text()))
        return take(*arguments, **named)

    monkeypatch.setattr(loop, "train_step", train_step)
    monkeypatch.setattr(ownership, "_BEAT_SECONDS", 0.05)
    assert command("train", *settings(train__max_steps=8, checkpoint__every=8, evaluation__every=8)) == 0
    assert {each["state"] for each in seen} == {"running"}
    assert [each["step"] for each in seen] == sorted(each["step"] for each in seen)
    assert all(number - 2 <= each["step"] <= number for number, each in enumerate(seen)) and seen[-1]["step"] >= 6
    assert json.loads((tmp_path / "run" / "status.json").read_text()) == {"state": "complete", "step": 8, "reason": ""}
    assert len(events(tmp_path / "run", "step")) == 8


def test_a_status_that_has_ended_does_not_move(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.move_status(3)
    assert not (tmp_path / "status.json").exists()
    run.set_status("running", 3)
    run.move_status(2)
    assert run.read("status.json") == {"state": "running", "step": 3, "reason": ""}
    run.move_status(5)
    assert run.read("status.json") == {"state": "running", "step": 5, "reason": ""}
    run.set_status("stopped", 6, "SIGTERM")
    run.move_status(7)
    assert run.read("status.json") == {"state": "stopped", "step": 6, "reason": "SIGTERM"}
