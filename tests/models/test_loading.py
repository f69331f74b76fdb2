"""Loading: every weight of a model is in its files, and every one in its files is in the model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, GPT2Model, PreTrainedModel

import train_loop
from scripts.architectures import small
from tests.support.runs import PATHS, TINY_MODELS, configured
from train_loop.config.load import load_config
from train_loop.data import tokenizer
from train_loop.distributed.shards import Shards
from train_loop.errors import InputError
from train_loop.models import building, loading, parameters

Tensors = dict[str, torch.Tensor]
TINY = {"vocab_size": 320, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, whose output layer is its own."""
    folder = tmp_path_factory.mktemp("llama")
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY_MODELS["llama"], **TINY)).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def change(folder: Path, tensors: Callable[[Tensors], Tensors] | None = None, **settings: Any) -> Path:
    """Change the weights' file and settings in config.json."""
    if tensors is not None:
        path = folder / "model.safetensors"
        changed = tensors(load_file(path))
        save_file(changed, path, {"format": "pt"})
    if settings:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def refusal(folder: Path) -> str:
    """Why a folder's model is not loaded, whole or weight by weight."""
    with pytest.raises(InputError, match=r"^[^\n]*$") as error:
        loading.load(str(folder))
    assert str(error.value).startswith(f"model {folder}: ")
    with pytest.raises(InputError) as in_shards:
        one_by_one(folder)
    assert str(in_shards.value) == str(error.value)
    return str(error.value)


def one_by_one(folder: Path) -> tuple[PreTrainedModel, str]:
    """A model that gets its weights as a sharded one does, and their digest."""
    model, weights = loading.outline_of(str(folder))
    assert all(each.is_meta for each in [*model.parameters(), *model.buffers()])
    model.to_empty(device="cpu")
    model.tie_weights()
    held = Shards(model)
    weights(held.place)
    return model, held.digest()


def only(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: value(tensors[name]).contiguous()}


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {each: tensor for each, tensor in tensors.items() if each != name}


NORM, QUERY, HEAD = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("tensors", "settings", "expected"),
    [
        (without(NORM), {}, [f"1 missing ({NORM})", "saved together"]),
        (without(HEAD), {}, [f"1 missing ({HEAD})", "tie_word_embeddings"]),
        (lambda found: {"foo": torch.zeros(1)}, {}, ["21 missing (lm_head.weight, ", " and 18 more)", "model (foo)"]),
        (lambda found: found | {"model.extra": torch.zeros(2)}, {}, ["1 not in the model (model.extra)"]),
        (lambda found: {f"module.{k}": v for k, v in found.items()}, {}, ["begin with module. as a wrapper's do"]),
        (lambda found: {f"_orig_mod.{k}": v for k, v in found.items()}, {}, ["begin with _orig_mod. "]),
        (lambda found: {f"base_model.model.{k}": v for k, v in found.items()}, {}, ["begin with base_model.model. "]),
        (None, {"num_hidden_layers": 3}, ["9 missing (model.layers.2."]),
        (None, {"num_hidden_layers": 1}, ["9 not in the model (model.layers.1."]),
        (None, {"intermediate_size": 48}, ["6 of another shape (model.layers.0.mlp.down_proj.weight 32x64, not 32x48"]),
        (None, {"vocab_size": 300}, ["2 of another shape (lm_head.weight 320x32, not 300x32"]),
        (None, {"tie_word_embeddings": True}, [f"config.json ties {HEAD} to the embeddings"]),
        (only(NORM, lambda norm: norm * torch.nan), {}, [f"1 weights are not finite ({NORM})"]),
        (only(QUERY, lambda query: query / 0), {}, [f"1 weights are not finite ({QUERY})"]),
        (only(QUERY, lambda query: (query * 99).to(torch.int8)), {}, [f"no floating-point numbers ({QUERY} I8)"]),
        (lambda found: {k: v.long() for k, v in found.items()}, {}, ["21 weights are no floating-point numbers"]),
        (None, {"quantization_config": {"quant_method": "mxfp4"}}, ["its weights are quantised (mxfp4)"]),
        (None, {"vocab_size": 10**10}, ["its weights would take 1,280 GB or more in fp32 (weight alone is 1000"]),
        (None, {"num_hidden_layers": 10**9}, ["num_hidden_layers 1,000,000,000 is more than any model has"]),
        (None, {"hidden_size": "many"}, ["cannot be loaded"]),
        (None, {"hidden_size": -1}, ["cannot be loaded"]),
        (None, {"num_attention_heads": 0}, ["cannot be loaded"]),
        (None, {"model_type": "vit"}, ["no causal language model of type vit"]),
        (None, {"model_type": "no-such-type"}, ["cannot be loaded", "no-such-type"]),
    ],
)  # fmt: skip
def test_weights_that_are_not_the_configuration_s_are_named(
    copy: Path, tensors: Callable[[Tensors], Tensors] | None, settings: dict[str, Any], expected: list[str]
) -> None:
    found = refusal(change(copy, tensors, **settings))
    assert all(each in found for each in expected), found


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "model.safetensors (0 bytes) cannot be read"),
        (b"<!DOCTYPE html>", "model.safetensors (15 bytes) cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer, not the file"),
        (-1, "cannot be read"),
        (1000, "cannot be read"),
        (None, "cannot be loaded from safetensors"),
    ],
)
def test_a_damaged_file_is_named(copy: Path, content: bytes | int | None, expected: str) -> None:
    path = copy / "model.safetensors"
    whole = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(whole[:content] if isinstance(content, int) else content)
    assert expected in refusal(copy)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "config.json is damaged"),
        ("[1]", "config.json holds no settings but a list"),
        ("{" * 100_000, "config.json is damaged"),
        ("version https://git-lfs.github.com/spec/v1\n", "config.json is a Git LFS pointer"),
        ("{}", "cannot be loaded"),
        ('{"model_type": 7}', "cannot be loaded"),
    ],
)
def test_a_damaged_configuration_is_named(copy: Path, content: str, expected: str) -> None:
    (copy / "config.json").write_text(content)
    assert expected in refusal(copy)


def shards(folder: Path) -> dict[str, Any]:
    """Save a model in several files; returns the index."""
    loading.load(str(folder)).save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    index: dict[str, Any] = json.loads((folder / "model.safetensors.index.json").read_text())
    return index


def test_an_index_is_followed_only_to_safetensors_in_its_folder(copy: Path) -> None:
    index = shards(copy)
    first = min(index["weight_map"].values())
    loading.load(str(copy))
    for name, expected in (
        ("pytorch_model.bin", "not a safetensors file"),
        ("../other/model.safetensors", "outside its folder"),
        (str(copy / first), "outside its folder"),
        ("model-9.safetensors", "model-9.safetensors is missing"),
        (7, "does not say which file"),
    ):
        changed = {"metadata": {}, "weight_map": index["weight_map"] | {NORM: name}}
        (copy / "model.safetensors.index.json").write_text(json.dumps(changed))
        assert expected in refusal(copy)
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    again = load_file(copy / first)
    save_file(again | {NORM: torch.ones(32)}, copy / first, {"format": "pt"})
    assert f"{NORM} is in two files" in refusal(copy)
    save_file(again, copy / "model.safetensors")
    assert "has both model.safetensors and model.safetensors.index.json" in refusal(copy)


def test_one_process_s_share_is_no_model(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "shard-00001-model-00001-of-00002.safetensors")
    assert "is one process's share of a model" in refusal(copy)


@pytest.mark.parametrize("kind", PATHS)
def test_what_was_saved_is_loaded(kind: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    built = building.build(configured(PATHS[kind][0]), tokenizer.load(str(tokenizer_folder)))
    built.save_pretrained(tmp_path)
    loaded = loading.load(str(tmp_path)).state_dict()
    assert loaded.keys() == built.state_dict().keys()
    assert all(torch.equal(weight, loaded[name]) for name, weight in built.state_dict().items())


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mixtral", "qwen3_moe", "gemma2", "mamba"])
def test_weight_by_weight_it_is_the_same_model(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Transformers converts it (experts are merged), and none of it stays in the model that Transformers fills."""
    config = CONFIG_MAPPING[kind](**{"vocab_size": 300, "pad_token_id": 0} | small(kind))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    whole = loading.load(str(tmp_path))
    model, digest = one_by_one(tmp_path)
    assert digest == parameters.digest(whole)
    for found, expected in (
        (model.named_parameters(), whole.named_parameters()),
        (model.named_buffers(), whole.named_buffers()),
    ):
        assert all(one[0] == two[0] and torch.equal(one[1], two[1]) for one, two in zip(found, expected, strict=True))
    assert model.generation_config.to_dict() == whole.generation_config.to_dict()
    left = loading.load(str(tmp_path), place=lambda name, values: None)
    assert all(each.is_meta for each in left.parameters())
    model.save_pretrained(tmp_path / "again")
    again, saved = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", tmp_path))
    assert again.keys() == saved.keys() and all(torch.equal(again[name], saved[name]) for name in saved)


def test_a_model_without_a_head_is_whole_if_the_head_is_tied(copy: Path, model_folder: Path, tmp_path: Path) -> None:
    inner = GPT2Model.from_pretrained(model_folder)
    inner.save_pretrained(tmp_path / "inner")
    assert "wte.weight" in load_file(tmp_path / "inner" / "model.safetensors")
    assert torch.equal(loading.load(str(tmp_path / "inner")).lm_head.weight, inner.wte.weight)
    without = change(copy, lambda found: {k.removeprefix("model."): v for k, v in found.items() if k != HEAD})
    assert f"1 missing ({HEAD})" in refusal(without)


def test_rounding_is_said(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loading.load(str(change(copy, only(NORM, lambda norm: norm.double()))))
    assert f"1 weights are float64 ({NORM}), and are rounded to float32" in capsys.readouterr().err


def test_a_damaged_generation_config_is_named(copy: Path) -> None:
    (copy / "generation_config.json").write_text("{")
    assert "generation_config.json is damaged" in refusal(copy)


def test_tables_of_older_versions_are_no_weights(model_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "older"))
    mask = torch.ones(1, 1, 8, 8, dtype=torch.uint8).tril()
    tables = {"h.0.attn.attention.bias": mask, "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
    change(folder, lambda found: found | tables | {"transformer.h.0.attn.bias": mask.clone()})
    loading.load(str(folder))


@pytest.fixture
def given() -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY_MODELS["gpt2"], **TINY))
    return model


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda model: model.to("meta"), "has no values (it is on torch's meta device)"),
        (lambda model: model.half(), "is float16, but weights are trained in float32; give model.float()"),
        (lambda model: model.double(), "is float64"),
        (lambda model: model.transformer.h[1].bfloat16() and model, "transformer.h.1.ln_1.weight is bfloat16"),
        (lambda model: model.lm_head.weight.data[0].fill_(torch.inf) is None or model, "not finite (transformer.wte"),
    ],
)
def test_a_given_model_is_finite_and_in_fp32(
    given: PreTrainedModel, spoil: Callable[[Any], Any], expected: str, tokenizer_folder: Path
) -> None:
    with pytest.raises(InputError, match=r"^the GPT2LMHeadModel: [^\n]*$") as error:
        building.build(configured(), tokenizer.load(str(tokenizer_folder)), spoil(given))
    assert expected in str(error.value)


def test_a_model_without_values_or_with_spoilt_ones_is_neither_evaluated_nor_sampled(
    given: PreTrainedModel, tokenizer_folder: Path, corpus: Path
) -> None:
    loaded, settings = tokenizer.load(str(tokenizer_folder)), load_config(None, {
        "data.source": "files", "data.files": f"{corpus}/*.txt", "tokenizer.name_or_path": str(tokenizer_folder)
    })  # fmt: skip
    given.lm_head.weight.data[0] = torch.nan
    with pytest.raises(InputError, match="the GPT2LMHeadModel: 1 weights are not finite"):
        train_loop.evaluate(given, settings)
    with pytest.raises(InputError, match=r"the GPT2LMHeadModel: .* has no values"):
        train_loop.evaluate(given.to("meta"), settings)
    with pytest.raises(InputError, match=r"the GPT2LMHeadModel: .* has no values"):
        train_loop.Sampler(given, loaded)
