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
        nothing = dict.fromkeys(("loss", "perplexity", "bits_per_byte", "accuracy"))
        lines = ProgressLines(progress, None)
        lines.after_evaluation(None, EVALUATION | nothing | {"reason": "the loss is nan"})
        lines.after_evaluation(None, EVALUATION | nothing)  # as older versions wrote it
        huge = {"loss": 2.5e30, "perplexity": None, "reason": "exp(loss) is too large for a float"}
        lines.after_evaluation(None, EVALUATION | huge)
        ProgressLines(progress, None).after_step(None, {"loss": None, "tokens_per_second": 1234.5})
    said = capsys.readouterr().err
    assert "epoch 0.50: validation: the loss is nan\n" in said and "validation: the loss is not finite\n" in said
    assert "loss 2.5e+30, perplexity not known" in said and "(exp(loss) is too large for a float)" in said
    assert "loss nan, 1,234 tokens/s" in said
