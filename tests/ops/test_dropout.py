"""Cheap dropout on a CPU: keeps what its bits say, in every pass, and on the average changes nothing."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, set_seed
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.support.runs import TINY_MODELS
from train_loop import job
from train_loop.config.load import config_from_arguments
from train_loop.ops import dropout

SHAPE = (4, 4, 32, 32)  # of attention probabilities; enough numbers for what is tested here


def drawn(shape: tuple[int, ...], p: float, seed: int) -> torch.Tensor:
    """What is kept of numbers of that shape, read off the result for ones."""
    torch.manual_seed(seed)
    return dropout.drop(torch.ones(shape), p) > 0


@pytest.mark.parametrize("p", [0.1, 0.37, 0.5])
def test_a_share_of_p_is_dropped_whatever_the_place(p: float) -> None:
    kept = drawn((1000, 1024), p, 0)
    rounded = round(p * 65536) / 65536
    deviation = math.sqrt(rounded * (1 - rounded))
    assert abs(kept.double().mean() - (1 - rounded)) < 4 * deviation / math.sqrt(kept.numel())
    # Numbers are drawn four at a time, from 64 bits: each of the four places, and neighbours, are independent.
    for place in range(4):
        share = kept.flatten()[place::4].double().mean()
        assert abs(share - (1 - rounded)) < 5 * deviation / math.sqrt(kept.numel() / 4)
    centred = kept.flatten().double() - (1 - rounded)
    for distance in (1, 2, 3, 4, 1024):
        correlation = (centred[:-distance] * centred[distance:]).mean() / deviation**2
        assert abs(correlation) < 5 / math.sqrt(kept.numel())


def test_the_mean_stays() -> None:
    x = torch.randn(128, 128)
    mean = torch.stack([dropout.drop(x, 0.3) for _ in range(400)]).double().mean(0)
    error = (mean - x) / (x.abs() * math.sqrt(0.3 / 0.7 / 400))
    assert abs(error.mean()) < 5 / math.sqrt(x.numel()) and error.square().mean() == pytest.approx(1, abs=0.05)


def test_gradients_go_where_numbers_went() -> None:
    kept = drawn((64, 256), 0.25, 3)
    x = torch.randn(64, 256, requires_grad=True)
    torch.manual_seed(3)
    found = dropout.drop(x, 0.25)
    (gradient,) = torch.autograd.grad(found, x, arriving := torch.randn(64, 256))
    torch.testing.assert_close(found.detach(), x.detach() * kept / 0.75)
    torch.testing.assert_close(gradient, arriving * kept / 0.75)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_numbers_meet_the_same_mask(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    found = dropout.drop(torch.ones(64, 256, dtype=dtype), 0.25)
    assert found.dtype == dtype and torch.equal(found > 0, drawn((64, 256), 0.25, 5))


def test_nothing_and_everything_can_be_dropped() -> None:
    x = torch.randn(64, 256)
    assert torch.equal(dropout.drop(x, 0.0), x)
    assert torch.equal(dropout.drop(x, 1.0), torch.zeros_like(x))


def test_few_numbers_are_left_to_torch() -> None:
    x = torch.randn(10)
    torch.manual_seed(0)
    found = dropout.drop(x, 0.5)
    torch.manual_seed(0)
    assert torch.equal(found, F.dropout(x, 0.5))


def masks() -> dict[str, Any]:
    causal = torch.ones(32, 32).tril().bool()
    blocks = torch.arange(32) // 12
    apart = (causal & (blocks[:, None] == blocks))[None, None].expand(4, 1, 32, 32)
    numbers = torch.zeros(32, 32).masked_fill(~causal, -1e9)[None, None] + torch.randn(1, 4, 32, 32)
    return {"causal": None, "documents apart": apart, "numbers": numbers}


@pytest.mark.parametrize("kind", masks())
@pytest.mark.parametrize("heads", [4, 2])
def test_attention_is_that_of_the_bits(kind: str, heads: int) -> None:
    """Against float64 by hand, with the mask that the same seed gives; and against Transformers' without dropout."""
    torch.manual_seed(1)
    mask, module = masks()[kind], torch.nn.Module()
    query = torch.randn(4, 4, 32, 64, requires_grad=True)
    key, value = (torch.randn(4, heads, 32, 64, requires_grad=True) for _ in range(2))
    module.num_key_value_groups = 4 // heads
    arriving = torch.randn(4, 32, 4, 64)

    def passes(function: Callable[..., Any], share: float) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(7)
        output, weights = function(module, query, key, value, mask, dropout=share, scaling=0.2)
        assert weights is None
        return (output.detach(), *torch.autograd.grad(output, (query, key, value), arriving))

    torch.manual_seed(7)
    bits = torch.ops.train_loop.random_bits(torch.empty(SHAPE))
    kept = bits >= round(0.25 * 65536) - 32768

    def by_hand(_: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **__: Any) -> Any:
        k, v = (each.repeat_interleave(4 // heads, 1) for each in (k, v))
        scores = 0.2 * q.double() @ k.double().transpose(-2, -1)
        if mask is None:
            mask = torch.ones(32, 32).tril().bool()
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        return ((scores.softmax(-1) * kept / 0.75) @ v.double()).transpose(1, 2).float(), None

    for mine, theirs in zip(passes(dropout.attention, 0.25), passes(by_hand, 0.25), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(passes(dropout.attention, 0.25)[0], passes(dropout.attention, 0.0)[0])
    for mine, theirs in zip(passes(dropout.attention, 0.0), passes(sdpa_attention_forward, 0.0), strict=True):
        assert torch.equal(mine, theirs)


def test_attention_under_autocast_rounds_as_it_does_without_dropout() -> None:
    """Queries and keys that were rotated are fp32 there, values bf16."""
    torch.manual_seed(1)
    query, key = (torch.randn(4, 4, 32, 64, requires_grad=True) for _ in range(2))
    value = torch.randn(4, 4, 32, 64, dtype=torch.bfloat16, requires_grad=True)

    def computed() -> torch.Tensor:
        torch.manual_seed(7)
        return dropout.attention(torch.nn.Module(), query, key, value.to(query.dtype), None, dropout=0.25)[0]

    exact = computed()
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(7)
        found = dropout.attention(torch.nn.Module(), query, key, value, None, dropout=0.25)[0]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=0.1, atol=0.1)
    found.float().sum().backward()
    assert all(each.grad is not None and bool(each.grad.isfinite().all()) for each in (query, key, value))


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_model_without_dropout_is_not_changed(name: str) -> None:
    built = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**TINY_MODELS[name] | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})
    )
    before = built.config._attn_implementation
    dropout.use_cheap_dropout(built)
    assert built.config._attn_implementation == before


@pytest.mark.parametrize("isolated", [False, True])
def test_a_model_with_it_is_the_same_in_evaluation_and_another_in_training(isolated: bool) -> None:
    set_seed(0)
    built = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", n_layer=2, n_embd=64, n_head=4, vocab_size=200)
    ).eval()
    tokens = torch.randint(0, 200, (8, 64))
    arguments = {"input_ids": tokens, "use_cache": False}
    if isolated:
        arguments["position_ids"] = (torch.arange(64) % 24).expand(8, 64)
    expected = built(**arguments).logits
    dropout.use_cheap_dropout(built)
    assert torch.equal(built(**arguments).logits, expected)
    built.train()
    torch.manual_seed(0)
    found = built(**arguments).logits
    assert not torch.allclose(found, expected)
    torch.manual_seed(0)
    assert torch.equal(built(**arguments).logits, found)
    # No layer draws with another's bits, and the average over masks comes near what no dropout gives.
    mean = torch.stack([built(**arguments).logits.detach() for _ in range(64)]).mean(0)
    assert (mean - expected).norm() < 0.5 * (found - expected).norm()


def test_a_run_uses_it(settings: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[torch.Size] = []
    draw = dropout._random_bits
    monkeypatch.setattr(dropout, "_random_bits", lambda like: drawn.append(like.shape) or draw(like))
    monkeypatch.setattr(dropout, "_SMALL", 1)
    job.train(config_from_arguments(settings(model__architecture=json.dumps(TINY_MODELS["gpt2"]), train__max_steps=1)))
    layers = TINY_MODELS["gpt2"]["n_layer"]
    assert len(drawn) % (1 + 3 * layers) == 0 and drawn  # of the embeddings, attention, and two of each layer
