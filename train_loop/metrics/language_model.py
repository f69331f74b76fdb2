"""The metric of the evaluation, as a module of the `evaluate` library that needs no access to the Hub.

    >>> from train_loop.metrics.language_model import LanguageModelMetric
    >>> LanguageModelMetric(keep_in_memory=True).compute(nll=[12.0], correct=[3], targets=[6], utf8_bytes=[20])

Each row holds the sums over some part of the validation data (a batch, a file, a process). So any number of rows can be
added, in any order. The result is always that of all targets together, never a mean of means.
"""

import math
from typing import Any

import datasets
import evaluate


class LanguageModelMetric(evaluate.Metric):
    """Loss, perplexity, bits per byte and next-token accuracy from sums.

    What is not finite is None, as in JSON; then `reason` says why.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Exact language-modelling metrics from summed negative log-likelihoods.",
            citation="",
            inputs_description=(
                "nll: summed negative log-likelihood in nats; correct: targets that were the likeliest token; "
                "targets: number of targets; utf8_bytes: bytes of text that the targets stand for."
            ),
            features=datasets.Features(
                {"nll": datasets.Value("float64")}
                | {name: datasets.Value("int64") for name in ("correct", "targets", "utf8_bytes")}
            ),
        )

    def _compute(
        self, nll: list[float], correct: list[int], targets: list[int], utf8_bytes: list[int]
    ) -> dict[str, Any]:
        tokens, loss = sum(targets), math.fsum(nll) / sum(targets)
        if not math.isfinite(loss):  # then the likeliest tokens mean nothing, either
            unknown = dict.fromkeys(("loss", "perplexity", "bits_per_byte", "accuracy"))
            return unknown | {"tokens": tokens, "reason": f"the loss is {loss}"}
        found = {
            "loss": loss,
            "perplexity": perplexity(loss),
            "bits_per_byte": math.fsum(nll) / math.log(2) / sum(utf8_bytes),
            "accuracy": sum(correct) / tokens,
            "tokens": tokens,
        }
        return found if found["perplexity"] is not None else found | {"reason": "exp(loss) is too large for a float"}


def perplexity(loss: float) -> float | None:
    """exp(loss); None if that is too large for a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return None
