"""A run whose numbers are no longer finite: it says so everywhere, writes no NaN anywhere, and is never complete."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import Command, events
from train_loop.cli import _print_summary
from train_loop.config.schema import Config
from train_loop.job import Summary

EVERYTHING = {
    "optimizer__learning_rate": 1e30,
    "schedule__warmup_steps": 4,
    "evaluation__every": 1,
    "checkpoint__every": 1,
    "checkpoint__keep": 9,
    "study__every": 1,
    "sample__prompts": '["the of", "and"]',
    "sample__max_new_tokens": 4,
    "run__log_with": "[tensorboard]",
}


def refuse(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


def check_json(folder: Path) -> None:
    """Every JSON file and every line of a log can be read by anybody."""
    found = [path for path in folder.rglob("*.json*") if path.is_file()]
    assert {"metrics.jsonl", "study.jsonl", "truth.json", "status.json", "state.json"} <= {each.name for each in found}
    for path in found:
        text = path.read_text(encoding="utf-8")
        for part in text.splitlines() if path.suffix == ".jsonl" else [text]:
            json.loads(part, parse_constant=refuse)


def test_a_model_without_a_finite_loss_is_never_complete(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = settings(train__max_steps=4, **EVERYTHING)
    assert command("train", *arguments) == 1 and command.out == ""
    assert "step 4: the model's loss on the validation data is not finite" in command.err.splitlines()[-1]
    assert "validation: the loss is nan" in command.err and "  sample: skipped" in command.err
    first, *others = events(run, "evaluation")
    assert first["loss"] > 0 and len(others) == 3
    for each in others:
        assert [each[name] for name in ("loss", "perplexity", "bits_per_byte", "accuracy")] == [None] * 4
        assert each["reason"] == "the loss is nan"
    assert [each["step"] for each in events(run, "sample")] == [1, 1]
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed" and not (run / "model").exists()
    check_json(run)
    # Again, it is the same; an earlier model may be exported; it can be reported and looked at.
    assert command("train", *arguments) == 1 and "is not finite" in command.err.splitlines()[-1]
    assert command("report", "--run", run) == 0
    assert command("inspect", "--run", run, "--step", 3) == 0 and "neither the replayed loss" in command.out
    assert command("inspect", "--run", run, "--step", 3, "--json") == 0
    json.loads(command.out, parse_constant=refuse)
    assert command("train", *arguments, "--export.from", "best") == 0
    assert command.out.startswith("best step        1 of 4\nvalidation loss  ")
    card = (run / "model" / "README.md").read_text()
    assert "| 1 | " in card and "| 4 | " in card and card.count("| not finite |") == 3
    check_json(run)


def test_training_steps_decide_when_to_give_up(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path
) -> None:
    arguments = settings(train__max_steps=9, train__max_bad_steps=3, **EVERYTHING)
    assert command("train", *arguments) == 1
    assert "not finite for 3 steps in a row; the weights are those of step 2" in command.err.splitlines()[-1]
    assert [each["step"] for each in events(tmp_path / "run", "step")] == [1, 2, 3, 4, 5]
    check_json(tmp_path / "run")


def test_a_loss_that_is_huge_but_finite_is_a_result(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path
) -> None:
    changes = EVERYTHING | {"optimizer__learning_rate": 1e3}
    assert command("train", *settings(train__max_steps=6, **changes)) == 0, command.err
    last = events(tmp_path / "run", "evaluation")[-1]
    assert last["loss"] > 1000 and last["perplexity"] is None
    assert last["reason"] == "exp(loss) is too large for a float" and last["reason"] in command.err
    assert "perplexity       not known\n" in command.out
    check_json(tmp_path / "run")


def test_the_smallest_limit_of_a_gradient_is_studied(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path
) -> None:
    changes = EVERYTHING | {"optimizer__learning_rate": 1e-3, "optimizer__max_grad_norm": 1e-30}
    assert command("train", *settings(train__max_steps=1, **changes)) == 0, command.err
    written = [json.loads(line) for line in (tmp_path / "run" / "study.jsonl").read_text().splitlines()]
    assert written[0]["event"] == "statistics" and written[0]["layers"]["0"]["grad_norm"] > 0
    check_json(tmp_path / "run")


def test_a_model_that_is_not_finite_is_neither_evaluated_nor_trained(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, model_folder: Path
) -> None:
    from transformers import AutoModelForCausalLM

    broken = tmp_path / "broken"
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.get_input_embeddings().weight.data[:, 0] = float("nan")
    model.save_pretrained(broken)
    for path in model_folder.glob("tokenizer*"):
        (broken / path.name).write_bytes(path.read_bytes())
    assert command("evaluate", "--model", broken, *settings()) == 2
    assert "1 weights are not finite (transformer.wte.weight)" in command.err.splitlines()[-1] and command.out == ""
    arguments = settings(model__architecture=None, tokenizer__name_or_path=None, model__name_or_path=broken)
    assert command("train", *arguments) == 2
    assert "1 weights are not finite (transformer.wte.weight)" in command.err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_stopped_run_whose_last_evaluation_is_not_finite_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    last = dict.fromkeys(("loss", "perplexity", "bits_per_byte", "accuracy")) | {"tokens": 7}
    ledger = {"validation": {"gzip_bytes": 3, "bytes": 8}}
    _print_summary(Summary(2, 4, "SIGTERM", last, None, None, Path(), Path(), ledger, True), Config())
    assert "validation loss  not known nats per token, over 7 tokens" in capsys.readouterr().out
    lost = {"loss": 2.5, "accuracy": "?"}  # in a log that was damaged
    _print_summary(Summary(2, 4, "SIGTERM", lost, None, None, Path(), Path(), ledger, True), Config())
    told = capsys.readouterr().out
    assert "validation loss  2.5000 nats per token, over an unknown number of tokens" in told
    assert told.count("not known") == 3
