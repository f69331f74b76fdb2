"""A run's own models: what is damaged in its folder is named, and never made up for with random weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.support.runs import ROOT
from train_loop.checkpoint import pretrained, storage
from train_loop.distributed.shards import Shards
from train_loop.errors import InputError

RUN = ROOT / "tests" / "golden" / "run-0.1.0" / "run"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has been stopped: checkpoints, and no exported model."""
    return Path(shutil.copytree(RUN, tmp_path / "run"))


def change(run: Path, **settings: object) -> None:
    path = run / "architecture" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def in_shards(name: Path) -> PreTrainedModel:
    """The model, which gets its weights one by one, as a sharded one does."""
    model, _, weights = pretrained.outline(str(name))
    assert weights is not None
    model.to_empty(device="cpu")
    model.tie_weights()
    held = Shards(model)
    weights(held.place)
    held.digest()  # which misses nothing
    return model


def test_a_run_gives_the_same_model_weight_by_weight(run: Path) -> None:
    whole, _ = pretrained.load(str(run))
    model = in_shards(run)
    for found, expected in ((model.parameters(), whole.parameters()), (model.buffers(), whole.buffers())):
        assert all(map(torch.equal, found, expected))


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
        with pytest.raises(InputError) as one_by_one:
            in_shards(name)
        assert str(one_by_one.value) == str(error.value)


def test_weights_that_are_not_finite_are_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = storage.Parts.read
    monkeypatch.setattr(storage.Parts, "read", lambda *arguments: read(*arguments) * float("nan"))
    for load in (lambda: pretrained.load(str(run)), lambda: in_shards(run)):
        with pytest.raises(InputError, match="weights are not finite"):
            load()
