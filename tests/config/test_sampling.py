"""Settings of sampling that cannot be meant are refused before anything is loaded; the others do what they say."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

from tests.support.runs import Command
from train_loop.config.sampling import Sampling
from train_loop.errors import InputError
from train_loop.generation import logits_processors

BAD: list[tuple[str, Any]] = [
    *(("temperature", value) for value in (1e-45, 1e-7, 1e7, -1, math.inf, math.nan, "hot", True, None)),
    *(("repetition_penalty", value) for value in (1e-300, 0, -1, 1e300, math.inf, math.nan, "x")),
    *(("top_p", value) for value in (0, -1, 1.1, math.nan, math.inf, "0.5")),
    *(("min_p", value) for value in (math.nan, math.inf, -0.1, 1.1)),
    *(("typical_p", value) for value in (0, math.nan, 2)),
    *(("top_k", value) for value in (-1, 1.5, True, "5")),
    *(("max_new_tokens", value) for value in (0, -1, 10**20, 1.0)),
    *(("samples", value) for value in (0, 10**20)),
    *(("seed", value) for value in (-1, 0.5)),
    *(("min_new_tokens", value) for value in (-1, 101)),
    *(("stop", value) for value in ("end", ("",), (5,))),
    *(("stop_tokens", value) for value in (5, ("a",), (True,), (0.5,))),
    *(("banned_tokens", value) for value in (5, ("a",))),
    ("log_probabilities", 1),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_value_that_cannot_be_meant_names_its_setting(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"^{name} "):
        Sampling(**{name: value})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--temperature", "1e-45"], "temperature 1e-45: must be 0, or from 1e-06 to 1e6"),
        (["--repetition_penalty", "1e-300"], "repetition_penalty 1e-300: must be from"),
        (["--max_new_tokens", "1" + "0" * 20], "max_new_tokens"),
        (["--seed", "-1"], "seed"),
        (["--min_p", "nan"], "min_p"),
    ],
)
def test_the_command_refuses_them_before_it_looks_for_a_model(
    command: Command, options: list[str], expected: str
) -> None:
    assert command("sample", "--model", "nowhere", "--prompt", "a", *options) == 2
    assert expected in command.err and command.err.count("\n") == 1


def test_a_run_refuses_them_before_it_prepares_data(command: Command, settings: Callable[..., list[str]]) -> None:
    assert command("train", *settings(sample__temperature="1e-10", data__files="nowhere.txt")) == 2
    assert "sample.temperature 1e-10: must be 0, or from" in command.err


def test_extremes_that_are_allowed_do_what_transformers_does() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 30
    ids = torch.tensor([[1, 2], [3, 4], [5, 5]])
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
    uniforms = torch.tensor([0.1, 0.5, 0.99], dtype=torch.float64)
    for temperature in (1e-6, 1e6):
        theirs = TemperatureLogitsWarper(temperature)(ids, logits)
        assert torch.equal(logits_processors.scale_by_temperature(logits, temperature), theirs)
        assert theirs.isfinite().all()
    for penalty in (1e-6, 1e6):
        theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
        assert torch.equal(logits_processors.penalize_repetition(logits, seen, penalty), theirs)
    theirs = TopPLogitsWarper(1e-300)(ids, logits)
    assert torch.equal(logits_processors.keep_top_p(logits, 1e-300), theirs)
    nearly_greedy = Sampling(temperature=1e-6, top_k=10**20, top_p=1e-300, seed=2**70)
    assert torch.equal(logits_processors.choose(nearly_greedy, logits, uniforms), logits.argmax(dim=-1))


def test_lists_are_taken_as_tuples() -> None:
    assert Sampling(stop=["a"], banned_tokens=[3]) == Sampling(stop=("a",), banned_tokens=(3,))  # type: ignore[arg-type]
