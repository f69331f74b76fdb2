"""The lines about a run's evaluations: each is shown once."""

from typing import Any

import pytest

from train_loop.console import Progress
from train_loop.metrics.progress import ProgressLines

EVALUATION: dict[str, Any] = {
    "step": 8,
    "epoch": 0.5,
    "loss": 1.0,
    "perplexity": 2.718,
    "bits_per_byte": 0.4,
    "accuracy": 0.5,
}


@pytest.mark.parametrize(
    ("shown", "evaluated", "lines"), [(True, None, 1), (True, 4, 1), (True, 8, 0), (False, None, 0)]
)
def test_an_evaluation_from_before_the_resume_is_not_shown_again(
    capsys: pytest.CaptureFixture[str], shown: bool, evaluated: int | None, lines: int
) -> None:
    with Progress("training", "step", 9, 8, shown) as progress:
        ProgressLines(progress, evaluated).after_evaluation(None, EVALUATION)
        assert capsys.readouterr().err.count("validation loss 1.0000, perplexity 2.718") == lines


def test_what_is_not_finite_is_shown_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("training", "step", 9, 8) as progress:
        ProgressLines(progress, None).after_evaluation(None, EVALUATION | {"loss": None, "perplexity": None})
        ProgressLines(progress, None).after_step(None, {"loss": None, "tokens_per_second": 1234.5})
    said = capsys.readouterr().err
    assert "validation loss inf, perplexity inf" in said and "loss nan, 1,234 tokens/s" in said
