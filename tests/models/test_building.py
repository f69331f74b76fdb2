"""Models: any causal LM of Transformers, checked against tokenizer and block size."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.runs import TINY_MODELS, Command, configured
from train_loop.checkpoint.run_folder import RunFolder
from train_loop.data import tokenizer
from train_loop.errors import InputError
from train_loop.generation.kv_cache import takes_positions
from train_loop.models import building
from train_loop.rng import seed_torch


@pytest.mark.parametrize("architecture", TINY_MODELS.values(), ids=TINY_MODELS)
def test_a_model_from_scratch_takes_vocabulary_and_context_from_the_data(
    architecture: dict[str, Any], tokenizer_folder: Path
) -> None:
    loaded = tokenizer.load(str(tokenizer_folder))
    built = building.build(configured(architecture), loaded)
    assert built.config.vocab_size == len(loaded) == 320
    assert building.context_length(built) == 32
    assert built.config.eos_token_id == loaded.eos_token_id
    assert {parameter.dtype for parameter in built.parameters()} == {torch.float32}
    longer = building.build(configured(architecture | {"max_position_embeddings": 64}), loaded)
    assert building.context_length(longer) == 64


def test_the_seed_decides_the_weights_and_nothing_else_does(tokenizer_folder: Path) -> None:
    loaded = tokenizer.load(str(tokenizer_folder))

    def weights(seed: int) -> torch.Tensor:
        return building.build(configured(TINY_MODELS["gpt2"], seed=seed), loaded).lm_head.weight

    first = weights(0)
    torch.rand(7)  # whatever was drawn before
    assert torch.equal(first, weights(0)) and not torch.equal(first, weights(1))


def test_a_folder_is_loaded_in_fp32(model_folder: Path, tmp_path: Path) -> None:
    loaded = tokenizer.load(str(model_folder))
    half = building.load(str(model_folder)).to(torch.bfloat16)
    half.save_pretrained(tmp_path)
    built = building.build(configured(name_or_path=str(tmp_path), attention="eager"), loaded)
    assert {parameter.dtype for parameter in built.parameters()} == {torch.float32}
    assert built.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ({"model_type": "gtp2"}, "no causal language model gtp2; did you mean gpt2?"),
        ({"model_type": "zzzz"}, "for example gpt2"),
        ({"model_type": ["gpt2"]}, "no causal language model ['gpt2']"),
        ({"model_type": "vit"}, "no causal language model vit"),
        ({"model_type": "gpt2", "n_layers": 2}, "gpt2 has no n_layers; did you mean n_layer?"),
        ({"model_type": "gpt2", "n_embd": 33, "n_head": 2}, "no such model can be built"),
        ({"model_type": "gpt2", "n_embd": "many"}, "no such model can be built"),
        ({"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 1, "vocab_size": 300}, "320 entries, but"),
        ({"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 1, "n_positions": 31}, "block_size 32 exceeds"),
    ],
)
def test_mistakes_in_an_architecture(tokenizer_folder: Path, architecture: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=r"^[^\n]*$") as error:
        building.build(configured(architecture), tokenizer.load(str(tokenizer_folder)))
    assert expected in str(error.value)


def test_mistakes_in_a_folder(model_folder: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    loaded = tokenizer.load(str(tokenizer_folder))
    with pytest.raises(InputError, match=r"block_size 65 exceeds the context of model .*, 64 tokens; use at most 64"):
        building.build(configured(name_or_path=str(model_folder), block_size=65), loaded)
    with pytest.raises(InputError, match="cannot be loaded"):
        building.build(configured(name_or_path=str(tmp_path)), loaded)
    loaded.add_tokens(["<one more>"])
    with pytest.raises(InputError, match=r"the tokenizer has 321 entries, but model .* only 320 embeddings"):
        building.build(configured(name_or_path=str(model_folder)), loaded)


ROBERTA = {"model_type": "camembert", "is_decoder": True, "hidden_size": 32, "num_hidden_layers": 1}
ROBERTA |= {"num_attention_heads": 2, "intermediate_size": 64}


@pytest.mark.parametrize("architecture", [TINY_MODELS["llama"], ROBERTA], ids=["llama", "camembert"])
def test_every_row_of_an_embedding_is_trained(tokenizer_folder: Path, architecture: dict[str, Any]) -> None:
    """That of the end of a text, too, which many models take for padding."""
    loaded = tokenizer.load(str(tokenizer_folder))
    end = loaded.eos_token_id
    assert isinstance(end, int)
    built = building.build(configured(architecture), loaded)
    embedding = built.get_input_embeddings().weight
    built(input_ids=torch.full((1, 32), end), use_cache=False).logits[..., :7].sum().backward()
    assert embedding.grad[end].any()
    if architecture["model_type"] == "llama":
        assert embedding[end].any() and built.config.pad_token_id is None
        padded = building.build(configured(architecture), loaded, padded=True)  # as before 0.2
        assert not padded.get_input_embeddings().weight[end].any() and padded.config.pad_token_id == end
        seed_torch(torch.device("cpu"), "weights", configured(architecture).run.seed)
        drawn = AutoModelForCausalLM.from_config(padded.config, dtype=torch.float32)
        assert all(map(torch.equal, padded.parameters(), drawn.parameters()))


def test_a_pretrained_models_padding_is_trained_where_it_ends_texts(tokenizer_folder: Path, tmp_path: Path) -> None:
    loaded = tokenizer.load(str(tokenizer_folder))
    end = loaded.eos_token_id
    building.build(configured(TINY_MODELS["llama"]), loaded, padded=True).save_pretrained(tmp_path)
    built = building.build(configured(name_or_path=str(tmp_path)), loaded)
    assert built.config.pad_token_id == end
    built(input_ids=torch.full((1, 3), end), use_cache=False).logits[..., :7].sum().backward()
    assert built.get_input_embeddings().weight.grad[end].any()


def test_a_run_that_began_before_goes_on_as_it_began(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 0.2 the row of the end of a text stayed as it was, and truth.json did not tell."""
    run, shape = tmp_path / "run", json.dumps(TINY_MODELS["llama"])
    arguments = settings(model__architecture=shape, train__max_steps=4, checkpoint__every=2, checkpoint__keep=9)

    def row() -> torch.Tensor:
        weights = load_file(run / "model" / "model.safetensors")["model.embed_tokens.weight"]
        return weights[tokenizer.load(str(run / "model")).eos_token_id]

    assert command("train", *arguments) == 0, command.err
    assert row().any()
    sheet = json.loads((run / "truth.json").read_text())
    assert sheet["parameters"]["untrained_rows"] == {}
    shutil.rmtree(run)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "padded", True)
        assert command("train", *arguments) == 0, command.err
    whole = [path.read_bytes() for path in sorted(run.rglob("model.safetensors"))]
    assert not row().any()
    for told in (False, True):  # as 0.1.0 wrote it, and as it is written when it goes on
        sheet = json.loads((run / "truth.json").read_text())
        assert list(sheet["parameters"]["untrained_rows"]) == ["model.embed_tokens"]
        if not told:
            del sheet["parameters"]["untrained_rows"]
            (run / "truth.json").write_text(json.dumps(sheet))
        shutil.rmtree(run / "checkpoints" / "step-00000004")
        shutil.rmtree(run / "model")
        assert command("train", *arguments) == 0, command.err
        assert command("inspect", "--run", run, "--step", 4, "--compare", 1, "--json") == 0, (
            command.err
        )  # 1: another loss
        assert not row().any() and [path.read_bytes() for path in sorted(run.rglob("model.safetensors"))] == whole


def test_what_could_not_be_loaded_again_is_not_trained(tokenizer_folder: Path) -> None:
    """Of Emu 3's configuration Transformers makes its text part, whose type has no causal model."""
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    text = small | {"intermediate_size": 64, "vocab_size": 320, "pad_token_id": 0}
    with pytest.raises(InputError, match="of type emu3_text_model of it, which it could not load again"):
        building.build(configured({"model_type": "emu3", "text_config": text}), tokenizer.load(str(tokenizer_folder)))


def test_positions_that_begin_after_a_padding_tokens_id_are_the_models_own_business() -> None:
    """As RoBERTa's pretrained relatives count them: others than theirs would be given to documents and to batches."""
    sizes = {"vocab_size": 320, "max_position_embeddings": 34, "pad_token_id": 1}
    built = AutoModelForCausalLM.from_config(AutoConfig.for_model(**(ROBERTA | sizes)))
    assert building.first_position(built) == 2 and building.context_length(built) == 32
    assert not takes_positions(built)
    with pytest.raises(InputError, match="takes no positions that count from 0"):
        building.check_positions(built)
