"""Weights from a seed: keyed by (seed, module), as Transformers draws them, whole or handed on one by one."""

import hashlib
import math
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from scripts.architectures import small
from train_loop.models import initialization
from train_loop.models.initialization import initialise, on_meta

KINDS = ["gpt2", "llama", "gemma2", "mixtral", "mamba", "qwen3_next"]
# Tied across a whole model; values that only a constructor gives; a head of several layers; shared layers; no layers.
ODD = ["camembert", "openai-gpt", "reformer", "modernbert-decoder", "zamba", "zamba2", "xlnet", "diffllama", "apertus"]
OLDER = {"apertus"}  # whose configuration older versions cannot make on the meta device


def outline(kind: str, **sizes: Any) -> PreTrainedModel:
    settings = {"vocab_size": 300, "pad_token_id": 0} | small(kind) | sizes
    try:
        return on_meta(CONFIG_MAPPING[kind](**settings))
    except NotImplementedError:
        if kind in OLDER:
            pytest.skip("this version of Transformers cannot")
        raise


def tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


@pytest.mark.parametrize("kind", KINDS + ODD)
def test_handed_on_one_by_one_they_are_the_same_bits(kind: str) -> None:
    whole, placed = outline(kind), outline(kind)
    initialise(whole, 5)
    names = dict(placed.named_parameters(remove_duplicate=False)) | dict(placed.named_buffers(remove_duplicate=False))
    found: dict[int, torch.Tensor] = {}

    def place(name: str, values: torch.Tensor) -> None:
        assert id(names[name]) not in found  # tied ones come once
        found[id(names[name])] = values.clone()

    initialise(placed, 5, place)
    assert all(each.is_meta for each in names.values())
    assert len(list(whole.parameters())) == len(list(placed.parameters()))  # as many are tied
    for name, tensor in tensors(whole).items():
        assert torch.equal(tensor, found[id(names[name])]), name


@pytest.mark.parametrize("kind", KINDS + ODD)
def test_they_are_distributed_as_transformers_draws_them(kind: str) -> None:
    model = outline(kind)
    initialise(model, 5)
    torch.manual_seed(0)
    with initialization.compat.residual_weights_scaled():
        theirs = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    assert tensors(model).keys() == tensors(theirs).keys()
    for name, buffer in theirs.named_buffers():  # rotary frequencies and the like
        torch.testing.assert_close(tensors(model)[name], buffer, rtol=0, atol=0, equal_nan=True)
    for name, weight in theirs.named_parameters():
        mine = tensors(model)[name]
        assert mine.requires_grad == weight.requires_grad and mine.isfinite().all()
        if weight.numel() < 2 or weight.std() == 0:
            assert torch.equal(mine, weight), name
        elif weight.numel() > 500:  # GPT-2's residual layers and Mamba's are scaled down by their parents
            assert 0.75 < mine.std() / weight.std() < 1.33, name


def test_a_weight_depends_on_the_seed_and_its_module_alone() -> None:
    two, three, other = (outline("llama", num_hidden_layers=layers) for layers in (2, 3, 2))
    initialise(two, 5)
    initialise(three, 5)
    initialise(other, 6)
    for name, weight in two.named_parameters():
        assert torch.equal(weight, dict(three.named_parameters())[name]), name  # though more is made before it
        if weight.ndim > 1:
            assert not torch.equal(weight, dict(other.named_parameters())[name]), name
    drawn = [hashlib.sha256(weight.detach().numpy().data).digest() for weight in three.parameters() if weight.ndim > 1]
    assert len(set(drawn)) == len(drawn)  # layers of equal shape start differently


@pytest.mark.parametrize(("kind", "table"), [("gpt2", "transformer.wte"), ("gemma2", "model.embed_tokens")])
def test_a_tied_weight_is_that_of_the_embedding(kind: str, table: str) -> None:
    """As in Transformers, which ties the output layer after both were made."""
    found: dict[str, torch.Tensor] = {}
    initialise(outline(kind), 5, lambda name, values: found.update({name: values.clone()}))
    assert "lm_head.weight" not in found
    alone = outline(kind, tie_word_embeddings=False)
    initialise(alone, 5)
    assert torch.equal(found[f"{table}.weight"], alone.get_input_embeddings().weight)
    assert not torch.equal(found[f"{table}.weight"], alone.get_output_embeddings().weight)


def test_some_of_them_can_be_made() -> None:
    model, found = outline("llama"), []
    buffers = [name for name, _ in model.named_buffers()]
    initialise(model, 0, lambda name, values: found.append(name), only=buffers)
    assert found == buffers


def test_at_most_a_layer_is_whole_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = outline("llama", num_hidden_layers=6)
    alive: list[int] = []
    make = initialization._make

    def watched(*arguments: Any) -> None:
        make(*arguments)
        alive.append(sum(each.numel() for each in tensors(model).values() if not each.is_meta))

    monkeypatch.setattr(initialization, "_make", watched)
    initialise(model, 0, lambda name, values: None)
    largest = max(sum(each.numel() for each in layer.parameters()) for layer in model.model.layers)
    assert max(alive) <= max(largest, 300 * model.config.hidden_size)


def test_what_has_a_value_everywhere_counts_as_made() -> None:
    infinite = torch.tensor([1.0, math.inf, -math.inf])  # its sum is NaN
    assert initialization._is_made(infinite) and initialization._is_made(torch.full((3,), 3e38))
    assert not initialization._is_made(torch.tensor([1.0, math.nan, math.inf]))
