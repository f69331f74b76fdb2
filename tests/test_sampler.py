"""The sampler: its filters are Transformers' warpers, its greedy text is `generate`'s."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tests.test_model import configured
from tests.test_objective import PATHS
from train_loop import model, sampler
from train_loop.data import tokenizer
from train_loop.errors import InputError
from train_loop.sampler import Sampling

VOCABULARY = 50


def logits(kind: str, seed: int) -> torch.Tensor:
    """[4, VOCABULARY]"""
    random = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    return {
        "random": random,
        "tied": (random * 2).round() / 2,
        "peaked": random * 50,
        "flat": torch.zeros(4, VOCABULARY),
        "one-hot": torch.full((4, VOCABULARY), -1e4).index_fill(1, torch.tensor([seed % VOCABULARY]), 1e4),
    }[kind]


KINDS = st.sampled_from(["random", "tied", "peaked", "flat", "one-hot"])


@given(kind=KINDS, seed=st.integers(0, 999), k=st.sampled_from([1, 2, 5, VOCABULARY - 1, VOCABULARY, VOCABULARY + 1]))
def test_top_k_is_transformers(kind: str, seed: int, k: int) -> None:
    given_ = logits(kind, seed)
    assert torch.equal(sampler.keep_top_k(given_, k), TopKLogitsWarper(k)(None, given_))  # type: ignore[arg-type]
    assert torch.equal(sampler.keep_top_k(given_, 0), given_)


@given(
    kind=KINDS, seed=st.integers(0, 999), p=st.one_of(st.floats(1e-9, 1), st.sampled_from([1e-30, 0.95, 0.999999, 1.0]))
)
def test_top_p_is_transformers(kind: str, seed: int, p: float) -> None:
    given_ = logits(kind, seed)
    expected = given_ if p == 1 else TopPLogitsWarper(p)(None, given_)  # type: ignore[arg-type]
    found = sampler.keep_top_p(given_, p)
    assert torch.equal(found, expected)
    assert found.isfinite().any(-1).all()  # at least one token survives


@given(kind=KINDS, seed=st.integers(0, 999), temperature=st.floats(0.05, 20))
def test_the_chain_is_transformers(kind: str, seed: int, temperature: float) -> None:
    given_ = logits(kind, seed)
    expected = given_
    for warper in (TemperatureLogitsWarper(temperature), TopKLogitsWarper(10), TopPLogitsWarper(0.9)):
        expected = warper(None, expected)  # type: ignore[arg-type]
    found = sampler.keep_top_p(sampler.keep_top_k(sampler.scale_by_temperature(given_, temperature), 10), 0.9)
    assert torch.equal(found, expected)


def test_draws_follow_the_distribution() -> None:
    """Chi-squared of 100,000 draws against the exact probabilities: 99.9 % quantile for 6 degrees of freedom."""
    one = torch.tensor([[2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -9.0, -9.0, -9.0]]).expand(100_000, -1)
    chosen = Sampling(temperature=1.3, top_k=7, top_p=1.0).choose(one, torch.Generator().manual_seed(0))
    counts = torch.bincount(chosen[:, 0], minlength=10).double()
    expected = 100_000 * (one[0, :7].double() / 1.3).softmax(-1)
    assert counts[7:].sum() == 0
    assert ((counts[:7] - expected) ** 2 / expected).sum() < 22.5


GREEDY = ("gpt2", "llama", "qwen3", "gpt_neox")


@pytest.fixture(params=GREEDY)
def built(request: pytest.FixtureRequest, tokenizer_folder: Path) -> Any:
    return model.build(configured(PATHS[request.param][0]), tokenizer.load(str(tokenizer_folder))).eval()


PROMPT = [5, 17, 300, 42, 8]


def test_greedy_is_generates(built: Any) -> None:
    mine = list(sampler.generate(built, PROMPT, Sampling(max_new_tokens=20, temperature=0), eos=None))
    theirs = built.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=20, eos_token_id=None)
    assert mine == theirs[0, len(PROMPT) :].tolist()


def test_cached_is_uncached(built: Any) -> None:
    for sampling in (Sampling(20, temperature=0), Sampling(20, seed=3)):
        cached, uncached = (
            list(sampler.generate(built, PROMPT, sampling, eos=None, use_cache=cache)) for cache in (True, False)
        )
        assert cached == uncached and len(cached) == 20


def test_a_continuation_depends_on_seed_and_prompt_alone(built: Any) -> None:
    def continued(seed: int, prompt: list[int] = PROMPT) -> list[int]:
        return list(sampler.generate(built, prompt, Sampling(20, seed=seed), eos=None))

    first = continued(0)
    torch.manual_seed(99)
    other = continued(0, PROMPT[:2])
    assert continued(0) == first != continued(1) and other != first


def test_the_text_ends_at_the_end_of_text_and_at_the_context(built: Any) -> None:
    free = list(sampler.generate(built, PROMPT, Sampling(20, seed=1), eos=None))
    stopped = list(sampler.generate(built, PROMPT, Sampling(20, seed=1), eos=free[4]))
    assert stopped == free[: free.index(free[4])]
    assert len(list(sampler.generate(built, PROMPT, Sampling(1000), eos=None))) == 32 - len(PROMPT)
    with pytest.raises(InputError, match="32 tokens leave no room in the model's context of 32"):
        list(sampler.generate(built, [1] * 32, Sampling(), eos=None))


def test_streamed_text_is_the_text(model_folder: Path) -> None:
    built, loaded = model.load(str(model_folder)), tokenizer.load(str(model_folder))
    built.train()
    stretches: list[str] = []
    text = sampler.sample(built, loaded, "the ü ", Sampling(40, seed=2), stretches.append)
    assert "".join(stretches) == text and len(stretches) > 5
    assert text == sampler.sample(built, loaded, "the ü ", Sampling(40, seed=2))  # no dropout
    assert built.training  # the mode is put back


def test_an_empty_prompt_begins_a_text(model_folder: Path) -> None:
    built, loaded = model.load(str(model_folder)), tokenizer.load(str(model_folder))
    assert sampler.prompt_ids(loaded, "") == [loaded.bos_token_id]
    assert loaded.bos_token_id not in sampler.prompt_ids(loaded, "<|endoftext|>")
    loaded.bos_token = None
    with pytest.raises(InputError, match="prompt: is empty"):
        sampler.sample(built, loaded, "", Sampling(5))


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.1}, "top_p 1.1"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_settings_out_of_range(wrong: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        Sampling(**wrong)
