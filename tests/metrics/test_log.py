"""metrics.jsonl as a run finds it that goes on: later steps cut off, and known what came before."""

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from train_loop.metrics import past
from train_loop.metrics.log import MetricsLog
from train_loop.metrics.past import find, last_steps, read_events
from train_loop.records import event
from train_loop.training.loop import History

STEPS = [1, 2, 3, 4, 5, 6]


def lines(step: int) -> list[dict[str, Any]]:
    """A step, the second and those from the fourth on not taken; every other one with an evaluation and two samples."""
    skipped = {"skipped": True} if step in (2, 4, 5, 6) else {}
    found: list[dict[str, Any]] = [
        {"event": "step", "step": step, "loss": 5.0 - step, "grad_norm": step * 0.5} | skipped
    ]
    if step % 2 == 0:
        found.append({"event": "evaluation", "step": step, "loss": abs(4.0 - step)})
        found += [{"event": "sample", "step": step, "continuation": 'a "step": 9, "skipped": true'}] * 2
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for step in STEPS for line in lines(step)))
    return path


@pytest.mark.parametrize("step", [0, *STEPS, 9])
@pytest.mark.parametrize(
    "torn", ["", '{"event": "step", "step": 7, "lo', '{"event": "step", "step": 2', '{"event": "step", "step": 0}']
)
def test_a_run_goes_on_with_what_was_up_to_its_step(file: Path, step: int, torn: str) -> None:
    with file.open("a") as end:
        end.write(torn)
    log = MetricsLog(Accelerator(), file, step)
    kept = [line for each in STEPS if each <= step for line in lines(each)]
    assert read_events(file)[0] == kept and (not kept or file.read_text().endswith("\n"))
    assert log.past.evaluations == [line for line in kept if line["event"] == "evaluation"]
    assert log.past.skipped == [0, 0, 1, 0, 1, 2, 3][min(step, 6)]
    assert log.past.samples == (2 if step in (2, 4, 6) else 0)
    log.write({"event": "step", "step": step + 1, "loss": 1.0})
    log.close()
    assert read_events(file)[0] == [*kept, {"event": "step", "step": step + 1, "loss": 1.0}]
    assert [each["step"] for each in last_steps(file, 3)] == [*range(1, min(step, 6) + 1), step + 1][-3:]


def test_lines_that_something_else_has_written_are_read_as_well(file: Path) -> None:
    spaced = [json.dumps(line, separators=(" ,", ":")) for step in STEPS for line in lines(step)]
    file.write_text("\n".join(spaced) + "\n")
    log = MetricsLog(Accelerator(), file, 4)
    log.close()
    assert [line["step"] for line in read_events(file)[0]] == [1, 2, 2, 2, 2, 3, 4, 4, 4, 4]
    assert [line["step"] for line in last_steps(file, 3)] == [2, 3, 4]
    best = History(log.past.evaluations).best
    assert best is not None and best["step"] == 4 and log.past.skipped == 1


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """All lines that are parsed."""
    parsed: list[bytes] = []
    monkeypatch.setattr(past, "event", lambda line: parsed.append(line) or event(line))
    return parsed


def test_only_the_last_steps_are_parsed(file: Path, parsed: list[bytes]) -> None:
    assert find(file, 6, {"evaluation"}).skipped == 3
    assert len(parsed) == 3 + 6 + 1 + 3  # back to the third step, and each evaluation


def test_of_what_was_watched_only_the_end_and_the_probes_are_parsed(tmp_path: Path, parsed: list[bytes]) -> None:
    path = tmp_path / "study.jsonl"
    names = ["statistics", "probe", "statistics", "statistics"]
    events = [{"event": name, "step": step} for step, name in enumerate(names, 1)]
    written = [json.dumps(event) + "\n" for event in events]
    path.write_text("".join(written))
    found = find(path, 3, {"probe"})
    assert (found.events, found.end) == ([events[1]], len("".join(written[:3])))
    assert len(parsed) == 3 + 1  # the last one, the last two that are kept, the probe


def test_there_is_nothing_before_the_first_step(tmp_path: Path) -> None:
    log = MetricsLog(Accelerator(), tmp_path / "metrics.jsonl", 0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    evaluations, *counts = log.past
    assert (evaluations, counts) == ([], [0, 0, 0]) and History(evaluations).best is None
    log.close()
