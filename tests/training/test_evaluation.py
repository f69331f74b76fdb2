"""Exact evaluation: the same at every batch size, and a float64 sum over the model's own log-probabilities."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from tests.support.runs import TINY_MODELS, Command
from train_loop import job
from train_loop.config.load import config_from_arguments
from train_loop.data.loader import IGNORED, loader
from train_loop.data.order import cut
from train_loop.metrics.language_model import LanguageModelMetric
from train_loop.training.evaluation import evaluate
from train_loop.training.state import Run


@pytest.fixture(params=["gpt2", "llama"])
def run(request: pytest.FixtureRequest, settings: Callable[..., list[str]]) -> Run:
    architecture = json.dumps(TINY_MODELS[request.param])
    return job.set_up(config_from_arguments(settings(model__architecture=architecture, data__test_size=0.5))).run


def test_the_same_at_every_batch_size_and_as_a_float64_sum(run: Run) -> None:
    import numpy as np

    run.state.model.eval()
    nll, correct, count = 0.0, 0, 0
    with torch.no_grad():
        for batch in loader(run.validation, cut(np.arange(len(run.validation)), 5)):
            logits = run.state.model(input_ids=batch.inputs).logits
            real = batch.targets != IGNORED
            picked = logits.double().log_softmax(-1).gather(2, batch.targets.clamp(min=0)[..., None])[..., 0]
            nll -= float(picked[real].sum())
            correct += int((logits.argmax(-1) == batch.targets)[real].sum())
            count += int(real.sum())
    assert len(run.validation) > 64
    found = {
        size: evaluate(run.context.accelerator, run.context.objective, run.validation, size) for size in (1, 3, 7, 64)
    }
    books = run.data.validation.ledger
    for metrics in found.values():
        assert metrics["loss"] == pytest.approx(nll / count, rel=1e-7)
        assert metrics["tokens"] == count == books.trained_targets == len(run.data.validation) - 1
        assert metrics["accuracy"] == pytest.approx(correct / count, abs=1.5 / count)  # a tie may fall either way
        assert metrics["perplexity"] == math.exp(metrics["loss"])
        bits = metrics["loss"] * count / math.log(2)
        assert metrics["bits_per_byte"] == pytest.approx(bits / books.predicted_bytes, rel=1e-12)
    losses = [metrics["loss"] for metrics in found.values()]
    assert max(losses) / min(losses) - 1 < 1e-7


def test_positions_without_a_target_count_nothing(run: Run) -> None:
    inputs = torch.arange(12).reshape(2, 6)
    targets = inputs.roll(-1, 1)
    targets[:, -2:] = IGNORED
    with torch.no_grad():
        found = run.context.objective.eval()(inputs, targets, statistics=True)
        expected = (
            run.state.model(input_ids=inputs).logits.double().log_softmax(-1)[:, :4].gather(2, targets[:, :4, None])
        )
    assert float(found.nll) == pytest.approx(-float(expected.sum()), rel=1e-6) and int(found.targets) == 8


def test_dropout_is_off_and_the_mode_is_put_back(run: Run) -> None:
    run.context.objective.train()
    first, second = (evaluate(run.context.accelerator, run.context.objective, run.validation, 8) for _ in range(2))
    assert first == second and run.context.objective.training


def test_the_metric_adds_rows_and_needs_no_hub() -> None:
    metric = LanguageModelMetric(keep_in_memory=True)
    whole = metric.compute(nll=[12.0], correct=[3], targets=[6], utf8_bytes=[20])
    parts = LanguageModelMetric(keep_in_memory=True)
    parts.add(nll=10.0, correct=1, targets=1, utf8_bytes=12)
    parts.add_batch(nll=[1.5, 0.5], correct=[1, 1], targets=[2, 3], utf8_bytes=[4, 4])
    assert parts.compute() == whole
    assert whole == {
        "loss": 2.0,
        "perplexity": math.exp(2.0),
        "bits_per_byte": 12 / math.log(2) / 20,
        "accuracy": 0.5,
        "tokens": 6,
    }
    huge = LanguageModelMetric(keep_in_memory=True).compute(nll=[1e9], correct=[0], targets=[1], utf8_bytes=[1])
    assert huge is not None and huge["perplexity"] is None and huge["loss"] == 1e9
    assert huge["reason"] == "exp(loss) is too large for a float"
    for value in (math.nan, math.inf):
        lost = LanguageModelMetric(keep_in_memory=True).compute(
            nll=[1.0, value], correct=[1, 1], targets=[2, 2], utf8_bytes=[4, 4]
        )
        assert lost == dict.fromkeys(("loss", "perplexity", "bits_per_byte", "accuracy")) | {
            "tokens": 4,
            "reason": f"the loss is {value}",
        }


@pytest.mark.parametrize("bound", ["positions", "bytes"])
def test_no_logits_are_kept(settings: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    """At most a chunk's logits exist at once: the head never sees more positions than that, fewer of more words."""
    from train_loop.training import objective

    run = job.set_up(config_from_arguments(settings())).run
    expected = evaluate(Accelerator(), run.context.objective, run.validation, 8)
    if bound == "positions":
        monkeypatch.setattr(objective, "_CHUNK", 50)
    else:
        monkeypatch.setattr(objective, "_LOGIT_BYTES", {"cpu": 4 * 50 * run.state.model.config.vocab_size})
    seen: list[int] = []
    run.state.model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[0]))
    found = evaluate(Accelerator(), run.context.objective, run.validation, 8)
    assert max(seen) == 50
    assert expected is not None and found == pytest.approx(expected, rel=1e-9)


def test_the_command_agrees_with_the_run(command: Command, settings: Callable[..., list[str]], tmp_path: Path) -> None:
    assert command("train", *settings()) == 0
    model = tmp_path / "run" / "model"
    printed = []
    for size in (1, 3, 7, 64):
        assert command("evaluate", "--model", model, *settings(evaluation__batch_size=size)) == 0
        printed.append(json.loads(command.out))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    last = [json.loads(line) for line in lines if '"evaluation"' in line][-1]
    for metrics in printed:
        assert list(metrics) == ["loss", "perplexity", "bits_per_byte", "accuracy", "tokens"]
        assert metrics["loss"] == pytest.approx(last["loss"], rel=1e-7)
        assert metrics["tokens"] == last["tokens"]
