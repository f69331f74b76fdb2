"""A run's own models: what is damaged in its folder is named, and never made up for with random weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.runs import ROOT
from train_loop.checkpoint import pretrained, storage
from train_loop.errors import InputError

RUN = ROOT / "tests" / "golden" / "run-0.1.0" / "run"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has been stopped: checkpoints, and no exported model."""
    return Path(shutil.copytree(RUN, tmp_path / "run"))


def change(run: Path, **settings: object) -> None:
    path = run / "architecture" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_a_run_gives_the_weights_of_its_newest_checkpoint(run: Path) -> None:
    model, _ = pretrained.load(str(run))
    found, _ = storage.newest(run / "checkpoints")
    assert found is not None
    expected = storage.tensors(found)
    weights = model.state_dict()
    assert all(bool((weights[name] == tensor).all()) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda run: shutil.rmtree(run / "architecture"), "has no architecture; start the run again to write it"),
        (lambda run: (run / "architecture" / "config.json").unlink(), "architecture is damaged"),
        (lambda run: (run / "architecture" / "config.json").write_text("{"), "config.json is damaged"),
        (lambda run: (run / "architecture" / "config.json").write_text("[]"), "holds no settings but a list"),
        (lambda run: (run / "architecture" / "tokenizer.json").write_text("[]"), "tokenizer"),
        (lambda run: change(run, n_layer=3), "holds another model's weights"),
        (lambda run: change(run, n_positions=7), "holds another model's weights"),
        (lambda run: change(run, n_embd=10**9), "its weights would take"),
        (lambda run: change(run, n_layer=10**9), "n_layer 1,000,000,000 is more than any model has"),
        (lambda run: change(run, n_embd="many"), "architecture is damaged"),
        (lambda run: change(run, model_type="vit"), "architecture is damaged"),
        (lambda run: change(run, auto_map={"AutoConfig": "own.Own"}, model_type="own"), "needs code of its own"),
    ],
)
def test_a_damaged_architecture_is_named(run: Path, damage: Callable[[Path], object], expected: str) -> None:
    damage(run)
    for name in (run, run / "checkpoints" / "step-00000008"):
        with pytest.raises(InputError, match=r"^[^\n]*$") as error:
            pretrained.load(str(name))
        assert expected in str(error.value) and str(run) in str(error.value)
