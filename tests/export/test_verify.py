"""The exported model is the trained one to a process that has nothing but its folder."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from tests.support.runs import TINY_MODELS, Command
from train_loop import devices
from train_loop.export import model_folder, verify


@pytest.mark.parametrize("name", ["gpt2", "llama", "isolated", "bf16", "one token a block"])
def test_a_good_model_passes(command: Command, settings: Callable[..., list[str]], tmp_path: Path, name: str) -> None:
    changes: dict[str, object] = {"train__max_steps": 40, "export__verify": "true"}
    changes |= {
        "llama": {"model__architecture": json.dumps(TINY_MODELS["llama"] | {"tie_word_embeddings": True})},
        "isolated": {"data__isolate_documents": "true"},
        "bf16": {"run__mixed_precision": "bf16"},
        "one token a block": {"data__block_size": 1},
    }.get(name, {})
    assert command("train", *settings(**changes)) == 0
    assert "exported model verified in a clean process" in command.err
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_what_is_changed_after_the_export_is_found(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that fails in that is finished by the same command, once nothing changes the model any more."""
    from safetensors.torch import load_file, save_file

    write = model_folder.write
    changes = {
        "weight": "1 weights differ, first transformer.h.0.mlp.c_proj.weight",
        "shard": "1 problems with its files, first model-00002-of-00003.safetensors: is missing",
        "setting": "its loss is ",
        "tokenizer": "cannot be loaded and run by itself",
    }

    def spoil(folder: Path, *rest: Any) -> Any:
        written = write(folder, *rest)
        if what == "weight":
            index = json.loads((folder / "model.safetensors.index.json").read_text())
            path = folder / index["weight_map"]["transformer.h.0.mlp.c_proj.weight"]
            weights = load_file(path)
            changed = weights["transformer.h.0.mlp.c_proj.weight"]
            changed[3, 5] = torch.nextafter(changed[3, 5], torch.tensor(9.0))  # by its last bit
            save_file(weights, path, {"format": "pt"})
        elif what == "shard":
            sorted(folder.glob("*.safetensors"))[1].unlink()
        elif what == "setting":
            settings = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(settings | {"activation_function": "relu"}))
        else:
            (folder / "tokenizer.json").write_text("{}")
        return written

    monkeypatch.setattr(model_folder, "write", spoil)
    arguments = settings(train__max_steps=3, export__verify="true", export__max_shard_size="60KB")
    for each, expected in changes.items():
        what = each
        assert command("train", *arguments) == 1
        assert expected in command.err.splitlines()[-1]
        status = json.loads((tmp_path / "run" / "status.json").read_text())
        assert status["state"] == "failed" and not (tmp_path / "run" / "model").exists()
    monkeypatch.undo()
    assert command("train", *arguments) == 0
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "complete"


def test_a_model_that_does_not_fit_has_its_weights_compared(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line at the end and the model card say that loss and tokens are the training processes' own."""
    write, spoilt = model_folder.write, True

    def spoil(folder: Path, *rest: Any) -> Any:
        written = write(folder, *rest)
        if spoilt:
            path = sorted(folder.glob("*.safetensors"))[1]
            whole = path.read_bytes()
            path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        return written

    monkeypatch.setattr(model_folder, "write", spoil)
    monkeypatch.setattr(devices, "free_memory", lambda device: 5e5)
    arguments = settings(train__max_steps=3, export__verify="true", export__max_shard_size="60KB")
    assert command("train", *arguments) == 1
    assert "is not the model that was trained: 1 weights differ, first " in command.err.splitlines()[-1]
    spoilt = False
    assert command("train", *arguments) == 0
    said = "all weights, but not loss and greedy tokens, because the model needs 0.0 GB of memory, and 0.0 GB were free"
    assert f"exported model verified in a clean process: {said}" in command.err
    assert f"## Verification\n\nVerified in a clean process: {said}" in (tmp_path / "run/model/README.md").read_text()


def test_a_signal_during_the_verification_of_the_model(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = settings(train__max_steps=3, export__verify="true")
    popen = verify.subprocess.Popen

    def start(*rest: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return popen(*rest, **named)

    monkeypatch.setattr(verify.subprocess, "Popen", start)
    began = time.monotonic()
    assert command("train", *arguments) == 3 and time.monotonic() - began < 60
    assert not (tmp_path / "run" / "model").exists()
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "stopped"
    monkeypatch.undo()
    assert command("train", *arguments) == 0 and (tmp_path / "run" / "model").is_dir()
    assert "exported model verified in a clean process" in command.err


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: no space")])
def test_a_model_that_cannot_be_exported_is_one_line_and_the_run_goes_on_there(
    command: Command,
    settings: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def write(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(model_folder, "write", write)
    assert command("train", *settings(train__max_steps=5)) == 1
    assert command.err.splitlines()[-1].startswith("train-loop: export: ") and "to go on from here" in command.err
    monkeypatch.undo()
    assert command("train", *settings(train__max_steps=5)) == 0 and (tmp_path / "run" / "model").is_dir()


def test_a_folder_whose_tokenizer_others_misread_says_so(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path
) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    qwen2 = json.dumps({"model_type": "qwen2", "num_key_value_heads": 1} | small)
    assert command("train", *settings(model__architecture=qwen2, train__max_steps=2)) == 0
    assert "Transformers reads its tokenizer as Qwen2Tokenizer, which gives other tokens" in command.err
    assert "`AutoTokenizer` of Transformers 5 takes Qwen2Tokenizer" in (tmp_path / "run/model/README.md").read_text()
    assert command("sample", "--model", tmp_path / "run", "--prompt", "the ", "--max_new_tokens", 3) == 0
