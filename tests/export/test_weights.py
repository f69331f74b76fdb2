"""Weights are written one tensor at a time, and are what Transformers would have written with all of them at once."""

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from train_loop.checkpoint import storage
from train_loop.export import verify_subprocess, weights
from train_loop.models.parameters import tensors_once
from train_loop.signals import StopRequest

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
SMALL |= {"intermediate_size": 24, "vocab_size": 64}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64}
MODELS = {
    "gpt2": GPT2,
    "llama": SMALL,
    "gemma": SMALL | {"head_dim": 8},
    "mixtral": SMALL | {"num_local_experts": 4},
    "qwen3_moe": SMALL | {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8},
}
MERGED = ("mixtral", "qwen3_moe")


def made(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    settings = AutoConfig.for_model(name, **MODELS[name])
    model: PreTrainedModel = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    return model


def parts_of(model: PreTrainedModel, folder: Path, parts: int = 3) -> storage.Parts:
    """A checkpoint's weights as three processes write them: each has some rows of each tensor, or none."""
    paths = []
    for part in range(parts):
        held = {}
        for name, tensor in tensors_once(model).items():
            rows = -(-len(tensor) // parts)
            piece = tensor.detach()[part * rows : (part + 1) * rows]
            if len(piece):
                held[name] = storage.Shard(piece, part * rows, len(tensor))
        storage.write_part(folder, part, parts, {"model": held, "optimizer": {}})
        paths.append(folder / f"model-{part + 1:05d}-of-{parts:05d}.safetensors")
    return storage.Parts(paths)


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if "safetensors" in path.name}


def written(model: PreTrainedModel, tmp_path: Path, size: str) -> tuple[Path, weights.Written]:
    folder = tmp_path / "written"
    folder.mkdir(parents=True)
    model.save_pretrained(folder, state_dict={})
    found = weights.write(folder, model, parts_of(model, tmp_path / "parts"), size, StopRequest())
    assert found is not None
    return folder, found


@pytest.mark.parametrize("name", MODELS)
def test_files_are_those_of_save_pretrained(name: str, tmp_path: Path) -> None:
    """One file has the same bytes. Several have the same tensors; where none is converted, the same bytes, too."""
    model = made(name)
    for size in ("5GB", "10KB"):
        here, theirs = tmp_path / size, tmp_path / size / "theirs"
        folder, found = written(model, here, size)
        model.save_pretrained(theirs, max_shard_size=size)
        assert (len(found.files) > 2) == (size == "10KB")
        if size == "5GB" or name not in MERGED:
            assert bytes_in(folder) == bytes_in(theirs)
        read = [AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32) for each in (folder, theirs)]
        ours, expected = (each.state_dict() for each in read)
        assert ours.keys() == expected.keys() and all(torch.equal(ours[key], expected[key]) for key in expected)
        assert all(torch.equal(ours[key], tensor) for key, tensor in model.state_dict().items())
        assert verify_subprocess.misplaced(folder, found.files) == []
        assert verify_subprocess.other_in_files(folder, found.files) == []
        assert {key: verify_subprocess.sha256(ours[key]) for key in found.weights} == found.weights
        sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
        if size == "10KB" and name in MERGED:  # experts are split, too
            assert max(sizes) < 10_000 + 8_000  # and a header
            total = sum(tensor.nbytes for tensor in tensors_once(model).values())
            assert json.loads((folder / weights.INDEX).read_text())["metadata"]["total_size"] == total
            assert len(sizes) < 2 * total / 10_000


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_one_tensor_is_in_memory_at_a_time(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = most = 0
    read = storage.Parts.read

    def tracked(*arguments: Any) -> torch.Tensor:
        nonlocal alive, most
        found = read(*arguments)
        alive += found.nbytes
        most = max(most, alive)
        weakref.finalize(found, gone, found.nbytes)
        return found

    def gone(size: int) -> None:
        nonlocal alive
        alive -= size

    monkeypatch.setattr(storage.Parts, "read", tracked)
    model = made(name)
    written(model, tmp_path, "10KB")
    sizes = [tensor.nbytes for tensor in tensors_once(model).values()]
    assert most == max(sizes) < sum(sizes) / 3 and alive == 0


def test_what_is_put_together_of_several_is_written_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file's tensor consists of several of the model's, those of a layer are read together."""

    def revert(model: PreTrainedModel, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made = dict(given)
        for name in [name for name in given if name.endswith("q_proj.weight")]:
            parts = [made.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
            made[name.replace("q_proj", "qkv")] = torch.cat(parts)
        if any("_proj.weight" in name and "self_attn.k" in name for name in made):
            raise ValueError("a part is missing")
        return made

    monkeypatch.setattr(weights, "revert_weight_conversion", revert)
    model = made("llama")
    _, _, groups = weights._conversion(model, {name: each.to("meta") for name, each in tensors_once(model).items()})
    assert sorted(map(len, groups)) == [1] * 15 + [3] * 2
    _, found = written(model, tmp_path, "5GB")
    attention = model.model.layers[1].self_attn
    expected = torch.cat([getattr(attention, f"{part}_proj").weight for part in "qkv"]).detach()
    assert found.files["model.safetensors"]["model.layers.1.self_attn.qkv.weight"] == verify_subprocess.sha256(expected)


def test_what_is_changed_in_a_file_or_in_the_index_is_found(tmp_path: Path) -> None:
    folder, found = written(made("mixtral"), tmp_path, "10KB")
    index = folder / weights.INDEX
    second, third = sorted(found.files)[1:3]

    def problems() -> list[str]:
        return verify_subprocess.misplaced(folder, found.files)

    whole = (folder / second).read_bytes()
    (folder / second).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert problems() == [] and len(verify_subprocess.other_in_files(folder, found.files)) == 1
    (folder / second).unlink()
    assert problems() == [f"{second}: is missing"]
    (folder / second).write_bytes(whole)
    text = index.read_text()
    swapped = text.replace(second, "swap").replace(third, second).replace("swap", third)
    index.write_text(swapped)
    assert len(problems()) == 2 and "should hold, says the index, other tensors" in problems()[0]
    one = json.loads(text)
    moved = next(name for name, file in one["weight_map"].items() if file == second)
    one["weight_map"][moved] = third
    index.write_text(json.dumps(one))
    assert [each.partition(":")[0] for each in problems()] == [second, third] and moved in problems()[0]
    index.write_text(text)
    (folder / "model-00099-of-00099.safetensors").write_bytes(whole)
    assert problems() == ["model-00099-of-00099.safetensors: was not written"]


def test_a_signal_ends_the_writing(tmp_path: Path) -> None:
    stop = StopRequest()
    stop.hear(True)
    (tmp_path / "folder").mkdir()
    model = made("gpt2")
    assert weights.write(tmp_path / "folder", model, parts_of(model, tmp_path / "parts"), "5GB", stop) is None
