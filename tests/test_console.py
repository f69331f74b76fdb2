"""The line that shows how far a run is: what it says, on a terminal and in a file, and what it costs."""

import io
import math
import sys
import time

import pytest

from train_loop.console import Progress, Sparkline, duration


def drawn(values: list[float], encoding: str = "utf-8", width: int = 16) -> str:
    """The sparkline of some values."""
    line = Sparkline(width)
    for value in values:
        line.add(value)
    return line.text(encoding)


def test_a_sparkline_is_the_curve() -> None:
    assert drawn([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert drawn([7, 0, 7]) == "█▁█" and drawn([3, 3, 3]) == "▁▁▁"
    assert drawn([0, 1, 2, 3, 4, 5], "ascii") == "_.-=*#" and drawn([0, 1], "latin-1") == "_#"
    assert drawn([]) == drawn([1]) == "" and drawn([0, math.nan, math.inf, 1]) == "▁█"


@pytest.mark.parametrize("count", [17, 31, 32, 33, 100, 1000, 12_345])
def test_a_long_curve_keeps_its_shape_in_few_characters(count: int) -> None:
    falling = drawn([float(-step) for step in range(count)])
    assert len(falling) == 16 and list(falling) == sorted(falling, reverse=True)
    assert falling[0] == "█" and falling[-1] == "▁"
    valley = drawn([abs(step / count - 0.5) for step in range(count)])
    assert valley[0] == "█" and valley[-1] in "▇█" and "▁" in valley[6:10]


def test_durations_are_read_at_a_glance() -> None:
    assert [duration(each) for each in (0.4, 59.4, 59.6, 187, 3600, 7500, 100_000)] == [
        *("0 s", "59 s", "1 min 00 s", "3 min 07 s", "1 h 00 min", "2 h 05 min", "1 d 3 h")
    ]


class Stream(io.StringIO):
    """Standard error, as a terminal or a file, in some encoding."""

    def __init__(self, terminal: bool, encoding: str) -> None:
        super().__init__()
        self._terminal, self._encoding = terminal, encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of what is written."""
        return self._encoding

    def isatty(self) -> bool:
        """Whether a person looks on."""
        return self._terminal


@pytest.mark.parametrize(("encoding", "curve"), [("utf-8", "█▆▅▃▁"), ("ascii", "#*-._")])
def test_a_log_file_gets_a_line_that_says_it_all(monkeypatch: pytest.MonkeyPatch, encoding: str, curve: str) -> None:
    stream, clock = Stream(False, encoding), [1000.0]
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Progress("training", "step", 20) as line:
        for step in range(5):
            clock[0] += 20
            line.update(1, f"loss {5 - step:.4f}, 6,800 tokens/s", curve=5.0 - step)
    lines = stream.getvalue().splitlines()
    assert lines[4] == f"training 5/20, 1 min 40 s, 5 min 00 s left, {curve} loss 1.0000, 6,800 tokens/s"


def test_a_terminal_gets_the_same_beside_its_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(True, "utf-8")
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress("training", "step", 8) as line:
        for step in range(8):
            line.update(1, f"loss {8 - step}.0, 6,800 tokens/s", curve=8.0 - step)
    assert "█▇▆▅▄▃▂▁ loss 1.0, 6,800 tokens/s" in stream.getvalue() and "8/8" in stream.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_step_costs_less_than_ten_microseconds(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    monkeypatch.setattr(sys, "stderr", Stream(terminal, "utf-8"))
    best = math.inf
    with Progress("training", "step", 10**9) as line:
        for _ in range(5):  # others use the processor, too
            began = time.perf_counter()
            for step in range(20_000):
                line.update(1, "loss 4.9127, 6,812 tokens/s", curve=float(step % 7))
            best = min(best, (time.perf_counter() - began) / 20_000)
    assert best < 10e-6
