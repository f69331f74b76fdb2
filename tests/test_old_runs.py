"""What a run left behind that 0.1.0 trained: today's commands go on with it, evaluate, sample, replay and report it.

How it was made tells `golden/run-0.1.0/make.py`. Only commands and files are used here, as a user has them. Numbers are
compared with those of 0.1.0 to rounding, 1e-5 where training has magnified it: another processor, or another version of
torch, multiplies matrices in another order. That they have the same bits on one machine, `scripts/same_numbers.py`
shows.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.support.runs import Command, events
from train_loop.checkpoint.run_folder import RunFolder

KEPT = Path(__file__).parent / "golden" / "run-0.1.0"
RUN = Path("run")
CHECKPOINTS = [RUN / "checkpoints" / f"step-{step:08d}" for step in (4, 8)]
TRAIN = ("train", "--config", "config.yaml")
OF_THE_MACHINE = {"tokens_per_second", "mfu", "peak_memory_bytes"}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder holds a copy of the run, of the texts it was trained on, and of its configuration."""
    monkeypatch.chdir(shutil.copytree(KEPT, tmp_path / "kept"))


@pytest.fixture
def answers() -> dict[str, Any]:
    """What 0.1.0 said of it."""
    return dict(json.loads(Path("answers.json").read_text(encoding="utf-8")))


def numbers(event: dict[str, Any]) -> dict[str, Any]:
    """An event of a log without what is measured of the machine, numbers to be compared to rounding."""
    return {
        key: pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
        for key, value in event.items()
        if key not in OF_THE_MACHINE and not key.endswith("seconds")
    }


def contents(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint is made of: of each file its tensors with type and shape, and what it says of itself."""
    found: dict[str, Any] = {path.name: None for path in checkpoint.iterdir()}
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            tensors = {name: (each.get_dtype(), each.get_shape()) for name, each in slices.items()}
            found[path.name] = (tensors, file.metadata())
    return found


def state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of the run, without what may differ between two of the same run."""
    values = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    return {key: value for key, value in values.items() if key not in ("step", "versions")}


def has(new: Any, old: Any) -> bool:
    """Whether all that was in an object is there, as it was; there may be more."""
    if isinstance(old, dict) and isinstance(new, dict):
        return all(key in new and has(new[key], value) for key, value in old.items())
    return bool(new == old)


def test_it_goes_on_to_the_end_as_it_would_have(command: Command) -> None:
    """The same lines in the log, and a checkpoint that 0.1.0 could go on with in its turn."""
    before = (RUN / "metrics.jsonl").read_text(encoding="utf-8")
    watched = (RUN / "study.jsonl").read_text(encoding="utf-8")
    assert command(*TRAIN) == 0, command.err
    assert f"resuming from {CHECKPOINTS[1]}" in command.err
    after = (RUN / "metrics.jsonl").read_text(encoding="utf-8")
    assert after.startswith(before)
    found = [json.loads(line) for line in after.removeprefix(before).splitlines()]
    expected = [json.loads(line) for line in Path("finished.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [each["step"] for each in expected if each["event"] == "step"] == [9, 10, 11, 12]
    assert [each.keys() for each in found] == [each.keys() for each in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert {key: mine[key] for key in numbers(theirs)} == numbers(theirs)
    assert (RUN / "study.jsonl").read_text(encoding="utf-8").startswith(watched)
    status = json.loads((RUN / "status.json").read_text(encoding="utf-8"))
    assert status == {"state": "complete", "step": 12, "reason": ""}
    assert (RUN / "model" / "model.safetensors").is_file()
    last = RUN / "checkpoints" / "step-00000012"
    assert contents(last) == contents(CHECKPOINTS[1]) and has(state(last), state(CHECKPOINTS[1]))
    assert command(*TRAIN) == 0, command.err  # nothing left to do
    assert len(events(RUN, "step")) == 12


def test_it_is_still_another_run_with_another_setting(command: Command) -> None:
    assert command(*TRAIN, "--optimizer.learning_rate", "2e-2") == 2
    assert "belongs to a different run (optimizer.learning_rate: 0.01 -> 0.02)" in command.err


@pytest.mark.parametrize(("name", "asked"), [("evaluate", RUN), ("evaluate step 4", CHECKPOINTS[0])])
def test_it_is_evaluated(command: Command, answers: dict[str, Any], name: str, asked: Path) -> None:
    assert command("evaluate", "--model", asked, "--config", "config.yaml") == 0, command.err
    assert json.loads(command.out) == pytest.approx(answers[name], rel=1e-6)


def test_it_is_sampled(command: Command, answers: dict[str, Any]) -> None:
    more = ("--max_new_tokens", 12, "--json", "--log_probabilities")
    assert command("sample", "--model", RUN, "--prompt", "The ", *more) == 0, command.err
    found, expected = json.loads(command.out), answers["sample"]
    tokens = [(each["id"], each["token"], each["log_probability"]) for each in expected.pop("tokens")]
    for each, (id_, token, log_probability) in zip(found.pop("tokens"), tokens, strict=True):
        expected_token = {"id": id_, "token": token, "log_probability": pytest.approx(log_probability, abs=1e-5)}
        assert each == expected_token
    assert found == expected


def test_its_steps_are_replayed(command: Command, answers: dict[str, Any]) -> None:
    """One after a checkpoint, and one before the first, from initial weights."""
    files = {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}
    assert command("inspect", "--run", RUN, "--step", 6, "--compare", 3, "--json") == 0, command.err
    found, early = map(json.loads, command.out.splitlines())
    assert found["verification"].pop("verdict") in ("bits", "rounding")
    assert early["verification"]["verdict"] in ("bits", "rounding") and early["from_step"] == 0
    expected = answers["inspect"]
    assert found["verification"]["logged"] == expected.pop("verification")["logged"]
    sequences = expected.pop("sequences")
    assert {key: found[key] for key in expected} == numbers(expected)
    for mine, theirs in zip(found["sequences"], sequences, strict=True):
        losses, logged = (each.pop("losses") for each in (mine, theirs))
        assert losses[1:] == pytest.approx(logged[1:], rel=1e-5) and losses[0] is logged[0] is None
        assert mine == theirs
    assert {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()} == files


def test_it_is_reported(command: Command) -> None:
    """The page has the log's losses, what was watched, how the run ended, and its sample."""
    assert command("report", "--run", RUN, "--output", "page.html") == 0, command.err
    page = Path("page.html").read_text(encoding="utf-8")
    (drawn,) = json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])["runs"]
    losses = [event["loss"] for event in events(RUN, "step")]
    assert drawn["curves"]["loss"]["step"] == list(range(1, 9))
    assert drawn["curves"]["loss"]["value"] == pytest.approx(losses, rel=1e-5)
    (evaluation,), (sample,) = events(RUN, "evaluation"), events(RUN, "sample")
    assert drawn["curves"]["validation_loss"]["value"] == pytest.approx([evaluation["loss"]], rel=1e-5)
    for told in ("SIGTERM", sample["continuation"], "transformer.h.0.mlp.c_fc.weight", "the cat"):
        assert json.dumps(told)[1:-1] in page, told


@pytest.mark.parametrize("damage", [None, "{", "[]", '{"parameters": 3}'])
def test_its_age_shows_without_its_truth_sheet(damage: str | None) -> None:
    """It left one row of its embeddings untrained, and goes on like that."""
    run = RunFolder(RUN)
    assert run.padded
    (RUN / "truth.json").unlink()
    if damage is not None:
        (RUN / "truth.json").write_text(damage, encoding="utf-8")
    assert run.padded
    for each in CHECKPOINTS:
        state = json.loads((each / "state.json").read_text(encoding="utf-8"))
        (each / "state.json").write_text(json.dumps(state | {"versions": {"train-loop": "0.2.0"}}), encoding="utf-8")
    assert not run.padded
