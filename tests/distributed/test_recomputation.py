"""Recomputed activations on several processes: what is trained is the same, sharded or not, with dropout."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.launch import several
from tests.support.runs import TINY_MODELS, events

Settings = Callable[..., list[str]]

SHAPES = {
    "gpt2": TINY_MODELS["gpt2"],  # its dropout is 0.1
    "llama": TINY_MODELS["llama"] | {"attention_dropout": 0.1},
}
CHOICES = ("none", "full", "2", "attention")


@pytest.mark.parametrize("fsdp2", [False, True], ids=["ddp", "fsdp2"])
def test_losses_and_gradients_are_those_without_recomputation(settings: Settings, tmp_path: Path, fsdp2: bool) -> None:
    def train(name: str, choice: str) -> list[str]:
        changes = {"model__architecture": json.dumps(SHAPES[name]), "model__activation_checkpointing": choice}
        changes |= {"batch__sequences_per_step": "6", "batch__micro_batch_size": "2", "sample__prompts": "[]"}
        changes |= {"train__max_steps": "4", "optimizer__learning_rate": "1e-3", "export__verify": "false"}
        return ["train", *settings(run__output_dir=tmp_path / f"{name}-{choice}", **changes)]

    names = SHAPES if fsdp2 else ["gpt2"]
    runs = {(name, choice): train(name, choice) for name in names for choice in CHOICES}
    for outcome in several(2, list(runs.values()), fsdp2):
        assert outcome.code == 0, outcome.err
    for name, choice in runs:
        plain, found = tmp_path / f"{name}-none", tmp_path / f"{name}-{choice}"
        for key in ("loss", "grad_norm"):
            expected = [event[key] for event in events(plain, "step")]
            assert [event[key] for event in events(found, "step")] == pytest.approx(expected, rel=1e-5) and expected
        weights, other = (load_file(folder / "model" / "model.safetensors") for folder in (plain, found))
        assert weights.keys() == other.keys()
        for weight in weights:
            torch.testing.assert_close(other[weight], weights[weight], rtol=1e-5, atol=1e-5)
        told = json.loads((found / "truth.json").read_text())["model"]["activation_checkpointing"]
        assert told == {"none": False, "2": 2}.get(choice, choice)
        assert "checkpointing" not in (found / "model" / "config.json").read_text()
