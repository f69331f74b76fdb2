"""The same run on one and on several processes, started by `accelerate launch`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import TINY_MODELS, events
from tests.distributed.launch import launch


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY_MODELS)
def test_losses_and_evaluation_do_not_depend_on_the_processes(
    settings: Callable[..., list[str]], tmp_path: Path, name: str
) -> None:
    """Dropout on, three micro-batches a step on two processes, short last steps, two epochs."""
    changes = {"model__architecture": json.dumps(TINY_MODELS[name]), "batch__micro_batch_size": 3}
    steps, evaluations = [], []
    for processes in (1, 2):
        folder = tmp_path / f"on-{processes}"
        result = launch(processes, ["train", *settings(run__output_dir=folder, **changes)])
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("perplexity") == 1  # one process speaks
        steps.append(events(folder, "step"))
        evaluations.append(events(folder, "evaluation"))
    assert [event["learning_rate"] for event in steps[0]] == [event["learning_rate"] for event in steps[1]]
    assert [event["tokens"] for event in steps[0]] == [event["tokens"] for event in steps[1]]
    losses = [[event["loss"] for event in each] for each in steps]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for one, two in zip(*evaluations, strict=True):
        assert one["tokens"] == two["tokens"]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)


def test_a_mistake_is_one_line_on_several_processes(settings: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")
    result = launch(2, ["train", *settings(data__files=tmp_path / "a.txt")])
    assert result.returncode != 0
    ours = [line for line in result.stderr.splitlines() if "train-loop: " in line]
    assert len(ours) == 1 and "not UTF-8 at byte 0" in ours[0]
    assert not (tmp_path / "run").exists()
