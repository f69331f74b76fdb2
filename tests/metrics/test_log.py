"""metrics.jsonl as a run finds it that goes on: later steps cut off, and known what came before."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from train_loop.errors import InputError
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


DAMAGE: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "garbage": (lambda each: [*each[:3], b"garbage\n", *each[3:]], "line 4 can't be read and is left out"),
    "a half line": (lambda each: [each[0], each[1][:35], *each[2:]], "line 2 can't be read and is left out"),
    "half lines": (
        lambda each: [*each[:6], each[6][:30] + b"\n", each[5][:9] + b"\n", *each[7:]],
        "lines 7 to 8 can't",
    ),
    "zeros": (lambda each: [*each[:2], b"\0" * 512 + b"\n", *each[2:]], "line 3 can't be read"),
    "not UTF-8": (lambda each: [each[0].replace(b"4.0", b'"\xff"'), *each[1:]], "line 1 can't be read"),
    "no loss": (lambda each: [*each[:1], b'{"event": "evaluation", "step": 1}\n', *each[1:]], "line 2 can't be read"),
    "no number": (lambda each: [*each[:2], each[2].replace(b"2,", b"2x,", 1), *each[3:]], "line 3 can't be read"),
    "two in one": (lambda each: [each[0][:-2] + b", " + each[1], *each[2:]], "line 1 can't be read"),
    "a gap": (lambda each: [each[0], *each[5:]], "step 2 has no line"),
    "twice": (lambda each: [*each[:5], *each], "steps 1 to 2 have more than one line; the last one counts"),
    "another order": (lambda each: [*each[5:6], *each[:5], *each[6:]], "not in the order of their steps"),
    "all gone": (lambda each: [], "steps 1 to 5 have no line"),
    "of something else": (lambda each: [b"something\n", b"else\n"], "lines 1 to 2 can't be read"),
}


@pytest.mark.parametrize("bulk", [100, 1 << 18])  # one line at a time, all together
@pytest.mark.parametrize(("change", "expected"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_log_is_told_and_what_is_left_counts(
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[list[bytes]], list[bytes]],
    expected: str,
    bulk: int,
) -> None:
    monkeypatch.setattr(past, "_BULK", bulk)
    damaged = b"".join(change(file.read_bytes().splitlines(keepends=True)))
    file.write_bytes(damaged + b"\0" * 100)
    log = MetricsLog(Accelerator(), file, 5)
    said = capsys.readouterr().err
    assert f"{file}: " in said and expected in said
    before = file.read_bytes()
    assert damaged.startswith(before)  # nothing but later lines is removed
    evaluations = {each["step"]: each for each in map(event, before.splitlines()) if each and "loss" in each}
    evaluations = {step: each for step, each in evaluations.items() if each["event"] == "evaluation" and step <= 5}
    assert log.past.evaluations == [each for _, each in sorted(evaluations.items())]
    log.write({"event": "step", "step": 6, "loss": 1.0})
    log.close()
    assert file.read_bytes() == before + b'{"event": "step", "step": 6, "loss": 1.0}\n'
    assert [each["step"] for each in last_steps(file, 1)] == [6]


def test_what_older_versions_or_others_wrote_of_nan_is_none(file: Path) -> None:
    with file.open("a") as end:
        end.write('{"event": "evaluation", "step": 6, "loss": NaN, "perplexity": Infinity}\n')
    log = MetricsLog(Accelerator(), file, 6)
    history = History(log.past.evaluations, log.past.skipped)
    assert history.evaluations[-1]["loss"] is None and history.best is not None and history.best["step"] == 4
    assert history.since_best == 1
    log.write({"event": "evaluation", "step": 7, "loss": float("nan"), "more": [float("inf")]})
    log.close()
    assert file.read_text().endswith('{"event": "evaluation", "step": 7, "loss": null, "more": [null]}\n')


def test_a_log_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(InputError, match="cannot be read and written"):
        MetricsLog(Accelerator(), tmp_path / "metrics.jsonl", 3)


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """All lines that are parsed."""
    parsed: list[bytes] = []
    monkeypatch.setattr(past, "event", lambda line: parsed.append(line) or event(line))
    return parsed


def test_only_the_last_steps_are_parsed(file: Path, parsed: list[bytes]) -> None:
    assert find(file, 6, {"evaluation"}).skipped == 3
    assert len(parsed) == 3 + 6 + 1 + 3  # back to the third step, and each evaluation


@pytest.mark.parametrize("bulk", [1, 1000, 1 << 18])
def test_lines_that_are_judged_together_say_the_same_as_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parsed: list[bytes], bulk: int
) -> None:
    steps = [1, 2, 9, 10, 11, 99, 100, 101, 999_999, 1_000_000, 10**14, 10**15 - 1, 10**15, 5]
    written: list[dict[str, Any]] = [{"event": "step", "step": step, "loss": step / 3} for step in steps]
    written.insert(4, {"event": "sample", "step": 10, "continuation": '{} }\n{"event": '})
    written.insert(7, {"event": "evaluation", "step": 11, "loss": 2.0, "parts": {"a": 1}})
    written.append({"event": "step", "step": 9})  # a short one
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in written))
    monkeypatch.setattr(past, "_BULK", bulk)
    found = past._upto(path, path.stat().st_size, 10**15 - 1, {"evaluation"})
    assert list(found.steps) == [*steps[:-2], 5, 9] and found.events == [written[7]] and not found.damaged
    assert len(parsed) == (2 if bulk == 1 else len(written))  # what doesn't look as usual makes all of it be parsed


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
