"""The end of a sharded run: its export, and the replay of its steps on as many processes, or on one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.launch import several
from tests.support.runs import TINY_MODELS, Command, arguments_for
from train_loop.checkpoint import storage

MIXTRAL = TINY_MODELS["llama"] | {"model_type": "mixtral", "num_local_experts": 4, "attention_dropout": 0.1}


def losses(found: dict[str, Any]) -> list[float]:
    return [loss for sequence in found["sequences"] for loss in sequence["losses"] if loss is not None]


def test_a_sharded_run_is_exported_and_replayed(
    command: Command, tmp_path: Path, corpus: Path, tokenizer_folder: Path
) -> None:
    run, page = tmp_path / "run", tmp_path / "page.html"
    changes = {"model__architecture": json.dumps(MIXTRAL), "export__verify": "true", "export__max_shard_size": "40KB"}
    changes |= {"batch__sequences_per_step": 5, "batch__micro_batch_size": 2, "checkpoint__every": 5}
    changes |= {"train__max_steps": 9, "sample__prompts": "[]", "optimizer__learning_rate": "1e-3"}
    inspect = ["inspect", "--run", str(run), "--step", "8"]
    trained, replayed, changed = several(
        2,
        [
            ["train", *arguments_for(corpus, tokenizer_folder, run, **changes)],
            [*inspect, "--compare", "3", "--json", "--html", str(page)],
            [*inspect, "--set", "optimizer.learning_rate=2e-3", "--set", "run.mixed_precision=bf16", "--json"],
        ],
        fsdp2=True,
    )
    assert [trained.codes, replayed.codes, changed.codes] == [[0, 0]] * 3, (trained, replayed, changed)

    assert "exported model verified in a clean process: all weights, loss " in trained.err
    assert "export         files of at most 40KB; a clean process compares all weights, and loss and" in trained.err
    assert len(list((run / "model").glob("model-*.safetensors"))) > 3
    weights = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).state_dict()
    found, _ = storage.newest(run / "checkpoints")
    assert found is not None and found.step == 9 and found.state["parts"] == 2
    parts = storage.opened(found)
    assert all(torch.equal(weights[name], parts.read(name)) for name in parts.shapes)

    at_8, at_3 = map(json.loads, replayed.out.splitlines())
    assert replayed.others == changed.others == ""
    assert "bit for bit" in page.read_text()
    for each in (at_8, at_3):
        assert each["verification"]["verdict"] == "bits" and each["verification"]["kind"] == []
        assert len(losses(each)) == each["targets"] and each["statistics"]["layers"]["1"]["grad_norm"] > 0
    was, would = map(json.loads, changed.out.splitlines())
    assert was == at_8 and would["learning_rate"] == 2 * was["learning_rate"]
    assert would["loss"] == pytest.approx(was["loss"], rel=2e-2)

    assert command(*inspect, "--compare", 3, "--json") == 0  # on one process
    for each, alone in zip((at_8, at_3), map(json.loads, command.out.splitlines()), strict=True):
        assert alone["verification"]["kind"] == ["2 processes"]
        for key in ("loss", "loss_before", "loss_after", "grad_norm"):
            assert each[key] == pytest.approx(alone[key], rel=1e-5), key
        for layer, values in alone["statistics"]["layers"].items():
            assert each["statistics"]["layers"][layer]["grad_norm"] == pytest.approx(values["grad_norm"], rel=1e-4)
        assert losses(each) == pytest.approx(losses(alone), rel=1e-4)
