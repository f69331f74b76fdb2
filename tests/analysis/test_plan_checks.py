"""Plans that can't be meant are remarked on, with both numbers; others are not."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.runs import Command
from train_loop.analysis.plan_checks import Amounts, remarks
from train_loop.config.load import load_config
from train_loop.training.schedule import learning_rate

HAS = Amounts(steps=40, blocks=100, steps_per_epoch=13, train_tokens=6400, validation_tokens=640)


def found(has: Amounts = HAS, **changes: object) -> list[str]:
    base = {"model.architecture": {"model_type": "gpt2"}, "tokenizer.train_vocab_size": 300, "data.block_size": 64}
    return remarks(load_config(None, base | {key.replace("__", "."): value for key, value in changes.items()}), has)


def test_a_plan_that_can_be_meant_gets_no_remark() -> None:
    assert found() == []
    edge = {"schedule__warmup_steps": 39, "evaluation__every": 40, "checkpoint__every": 40, "study__every": 40}
    assert found(**edge, batch__sequences_per_step=100, train__patience=2, evaluation__batch_size=99) == [
        "train.patience 2: the run has 1 evaluation, so it never ends early"
    ]
    assert found(schedule__name="wsd", schedule__warmup_steps=30, schedule__decay_steps=10) == []
    assert found(train__patience=3) == []  # evaluations after steps 13, 26, 39 and 40


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (
            "schedule__warmup_steps",
            80,
            "schedule.warmup_steps 80: the run has 40 steps, so it never reaches learning rate",
        ),
        ("schedule__warmup_steps", 40, "schedule.warmup_steps 40: the run has 40 steps"),
        ("evaluation__every", 41, "evaluation.every 41: the run has 40 steps, so only the last step is evaluated"),
        ("checkpoint__every", 10**6, "checkpoint.every 1000000: the run has 40 steps, so only the last step is saved"),
        ("study__every", 41, "study.every 41: the run has 40 steps, so no step is watched"),
        ("schedule__decay_steps", 10, "schedule.decay_steps 10: only wsd uses it, but schedule.name is linear"),
        (
            "batch__sequences_per_step",
            101,
            "batch.sequences_per_step 101: an epoch has 100 sequences, so every step is",
        ),
        ("data__block_size", 641, "data.block_size 641: the validation data has 640 tokens, so its one sequence is"),
        ("train__patience", 4, "train.patience 4: the run has 4 evaluations, so it never ends early"),
    ],
)
def test_each_plan_that_cannot_be_meant_gets_one(key: str, value: int, expected: str) -> None:
    lines = found(**{key: value})
    assert len(lines) == 1 and lines[0].startswith(expected)


def test_what_is_remarked_on_is_what_the_schedule_does() -> None:
    for decay, warmup in ((11, 30), (40, 1), (None, 37)):
        changes = {"schedule.name": "wsd", "schedule.warmup_steps": warmup, "schedule.decay_steps": decay}
        lines = found(**{key.replace(".", "__"): value for key, value in changes.items()})
        schedule = load_config(
            None, {"model.architecture": {"model_type": "gpt2"}, "tokenizer.train_vocab_size": 300} | changes
        ).schedule
        reached = max(learning_rate(step, 40, 1.0, schedule) for step in range(40))
        assert reached < 1 and len(lines) == 1 and f"warm-up leaves {40 - warmup} of 40 steps" in lines[0]


def test_a_tiny_training_split_is_remarked_on() -> None:
    lines = found(Amounts(3, 1, 1, 10, 9), batch__sequences_per_step=1, schedule__warmup_steps=0)
    assert [line.partition(" data has ")[0][-10:] for line in lines] == ["e training", "validation"]


def test_remarks_stand_on_the_truth_sheet_before_the_first_step(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path
) -> None:
    given = settings(schedule__warmup_steps=80, train__max_steps=2, evaluation__every=99)
    assert command("train", *given) == 0
    sheet = command.err.partition("training ")[0]
    assert "careful        schedule.warmup_steps 80: the run has 2 steps" in command.err
    assert "careful        evaluation.every 99: the run has 2 steps" in command.err
    assert "after 1 steps of warm-up" in command.err and "80 steps of warm-up" not in sheet
