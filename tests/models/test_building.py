"""Models: any causal LM of Transformers, checked against tokenizer and block size."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.runs import TINY_MODELS, configured
from train_loop.data import tokenizer
from train_loop.errors import InputError
from train_loop.models import building


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
