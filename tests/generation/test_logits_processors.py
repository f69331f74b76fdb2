"""The filters are Transformers' warpers, and what is drawn follows the probabilities that they leave."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from train_loop.config.sampling import Sampling
from train_loop.errors import InputError
from train_loop.generation import logits_processors

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
        "filtered": random.masked_fill(random < 0.5, -float("inf")).index_fill(1, torch.tensor([7]), 1.0),
    }[kind]


CASES = st.builds(
    logits, st.sampled_from(["random", "tied", "peaked", "flat", "one-hot", "filtered"]), st.integers(0, 999)
)
SHARES = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1e-30, 1e-9, 0.95, 0.999999, 1.0]))


def same(found: torch.Tensor, oracle: Any, given_: torch.Tensor, ids: torch.Tensor | None = None) -> None:
    """To the bit what the oracle makes of it, with a token left in every row."""
    assert torch.equal(found, oracle(ids, given_))
    assert found.isfinite().any(-1).all()


@given(CASES, st.sampled_from([1, 2, 5, VOCABULARY - 1, VOCABULARY, VOCABULARY + 1, 10**9]))
def test_top_k_is_transformers(given_: torch.Tensor, k: int) -> None:
    same(logits_processors.keep_top_k(given_, k), TopKLogitsWarper(k), given_)
    assert torch.equal(logits_processors.keep_top_k(given_, 0), given_)


@given(CASES, SHARES)
def test_top_p_is_transformers(given_: torch.Tensor, p: float) -> None:
    same(logits_processors.keep_top_p(given_, p), TopPLogitsWarper(p), given_)


@given(CASES, SHARES)
def test_min_p_is_transformers(given_: torch.Tensor, p: float) -> None:
    same(logits_processors.keep_min_p(given_, p), MinPLogitsWarper(p), given_)


@given(CASES, SHARES.filter(lambda p: 0 < p < 1))
def test_typical_is_transformers(given_: torch.Tensor, p: float) -> None:
    same(logits_processors.keep_typical(given_, p), TypicalLogitsWarper(p), given_)


@given(CASES, st.floats(0.05, 20))
def test_temperature_is_transformers(given_: torch.Tensor, temperature: float) -> None:
    same(logits_processors.scale_by_temperature(given_, temperature), TemperatureLogitsWarper(temperature), given_)


@given(CASES, st.floats(0.1, 10), st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9))
def test_repetition_penalty_is_transformers(given_: torch.Tensor, penalty: float, text: list[int]) -> None:
    ids = torch.tensor([text] * 3 + [text[:1] * len(text)])
    seen = torch.zeros(4, VOCABULARY, dtype=torch.bool).scatter(1, ids, True)
    same(
        logits_processors.penalize_repetition(given_, seen, penalty),
        RepetitionPenaltyLogitsProcessor(penalty),
        given_,
        ids,
    )


@given(CASES, st.sets(st.integers(0, VOCABULARY - 1), min_size=1, max_size=VOCABULARY - 1))
def test_bans_are_transformers(given_: torch.Tensor, banned: set[int]) -> None:
    found = logits_processors.ban(given_, torch.tensor(sorted(banned)))
    assert torch.equal(found, SuppressTokensLogitsProcessor(sorted(banned))(None, given_))


@given(
    given_=CASES,
    temperature=st.floats(0.3, 3),
    top_k=st.sampled_from([0, 1, 3, 10, VOCABULARY, 99]),
    top_p=st.sampled_from([0.3, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    typical_p=st.sampled_from([0.2, 0.9, 1.0]),
)
def test_choosing_draws_from_transformers_chain(
    given_: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float, typical_p: float
) -> None:
    """At any random number, the drawn token is the one that inverting the oracle's cumulative distribution gives."""
    chain = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    chain += [TopKLogitsWarper(top_k)] if top_k else []
    chain += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    chain += [MinPLogitsWarper(min_p)] if min_p else []
    chain += [TypicalLogitsWarper(typical_p)] if typical_p < 1 else []
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p)
    reached = chain(None, given_).double().softmax(-1).cumsum(-1)  # type: ignore[arg-type]
    for number in (0.0, 0.1, 0.5, 0.9, 1 - 2**-53):
        found = logits_processors.choose(sampling, given_, torch.full((4,), number, dtype=torch.float64))
        upper = reached.gather(1, found[:, None])[:, 0]
        lower = torch.where(found > 0, reached.gather(1, (found - 1).clamp(min=0)[:, None])[:, 0], 0.0)
        # Of equally likely tokens, one sort may keep another one than another sort: allowed where there are ties.
        tied = given_.shape[1] > torch.tensor([len(row.unique()) for row in given_])
        assert ((upper > lower) | tied).all()
        assert (((lower <= number + 1e-6) & (upper >= number - 1e-6)) | tied).all()


def test_draws_follow_the_distribution() -> None:
    """Chi-squared of 100,000 draws against the exact probabilities: 99.9 % quantile for 6 degrees of freedom."""
    one = torch.tensor([[2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -9.0, -9.0, -9.0]])[:, [7, 0, 1, 8, 2, 3, 4, 5, 9, 6]]
    uniforms = torch.rand(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = (one[0].double() / 1.3).softmax(-1)
    expected = torch.where(expected >= expected.topk(7).values[-1], expected, 0.0)
    expected *= 100_000 / expected.sum()
    for sampling in (Sampling(temperature=1.3, top_k=7, top_p=1.0), Sampling(temperature=1.3, top_k=0, top_p=0.997)):
        chosen = logits_processors.choose(sampling, one.expand(100_000, -1), uniforms)
        counts = torch.bincount(chosen, minlength=10).double()
        real = expected > 0
        assert counts[~real].sum() == 0
        assert ((counts - expected)[real] ** 2 / expected[real]).sum() < 22.5


def test_ties_with_the_last_one_of_top_k_can_be_drawn() -> None:
    uniforms = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    drawn = logits_processors.choose(Sampling(top_k=5, top_p=1.0), torch.zeros(3, VOCABULARY), uniforms)
    assert drawn.tolist() == [0, VOCABULARY // 2, VOCABULARY - 1]


def test_ties_that_the_temperature_makes_can_be_drawn() -> None:
    """Two numbers side by side, whose third parts are rounded to the same."""
    least = torch.tensor(1.5)  # from here to 2, third parts of numbers lie closer together than numbers there can be
    while least / 3 != least.nextafter(torch.tensor(2.0)) / 3:
        least = least.nextafter(torch.tensor(2.0))
    one = torch.tensor([[float(least.nextafter(torch.tensor(2.0))), -9.0, float(least)]])
    drawn = logits_processors.choose(Sampling(temperature=3.0, top_k=1, top_p=1.0), one, torch.tensor([0.9]).double())
    assert drawn.tolist() == [2]


def test_a_draw_inverts_the_cumulative_distribution() -> None:
    one = torch.tensor([[0.25, 0.0, 0.5, 0.25, 0.0]]).log().expand(6, -1)
    uniforms = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-53], dtype=torch.float64)
    assert logits_processors.draw(one, uniforms).tolist() == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.1}, "top_p 1.1"),
        ({"min_p": -0.1}, "min_p -0.1"),
        ({"typical_p": 0.0}, "typical_p 0.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"min_new_tokens": 101}, "min_new_tokens 101: must be at most max_new_tokens"),
        ({"seed": -1}, "seed -1"),
        ({"samples": 0}, "samples 0"),
        ({"stop": ("",)}, "stop"),
        ({"samples": 2, "temperature": 0}, "samples 2: at temperature 0"),
        ({"typical_p": 0.5, "temperature": 0}, "typical_p 0.5: contradicts temperature 0"),
        ({"stop_tokens": (1, 2), "banned_tokens": (2, 3)}, r"stop_tokens \[2\]: are also in banned_tokens"),
    ],
)
def test_settings_out_of_range_or_contradictory(wrong: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        Sampling(**wrong)
