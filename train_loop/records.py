"""JSON that the package writes, and lines of logs that it reads back, whatever has become of them.

JSON has no NaN and no infinity: a number that is not finite is written as null. What is read may have been damaged (a
crash, a full disk, another program) or written by something that does know NaN; what is no event counts as damaged.
"""

import itertools
import json
import math
import operator
from collections.abc import Sequence
from functools import partial
from typing import Any

_MOST_STEPS = 1 << 53  # from here on, floats can't count
_DECODER = json.JSONDecoder(parse_constant=lambda name: None)  # NaN, Infinity and -Infinity, which Python writes


def plain(value: Any) -> Any:
    """The same value, with None in place of numbers that JSON doesn't support."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value: Any, indent: int | None = None, compact: bool = False) -> str:
    """A value as JSON (RFC 8259), with null in place of numbers that are not finite."""
    encode = partial(json.dumps, indent=indent, separators=(",", ":") if compact else None, allow_nan=False)
    try:
        return encode(value)
    except ValueError:
        return encode(plain(value))


def event(line: bytes) -> dict[str, Any] | None:
    """The event on a line of metrics.jsonl or study.jsonl: an object with a name and a step; None if it is no event.

    NaN and infinity become None.
    """
    try:
        found = _DECODER.decode(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or nested without end
        return None
    if not isinstance(found, dict) or not isinstance(found.get("event"), str):
        return None
    step = found.get("step")
    if isinstance(step, bool) or not isinstance(step, int | float) or step % 1 or not 0 <= step < _MOST_STEPS:
        return None
    return found | {"step": int(step)}


class Places:
    """Ascending numbers (lines, steps), kept as stretches without gaps, for a message."""

    def __init__(self) -> None:
        self.stretches: list[tuple[int, int]] = []  # first, last

    def __bool__(self) -> bool:
        return bool(self.stretches)

    def __len__(self) -> int:
        return sum(last - first + 1 for first, last in self.stretches)

    @property
    def are(self) -> str:
        """The verb for them."""
        return "is" if len(self) == 1 else "are"

    @property
    def have(self) -> str:
        """Another verb for them."""
        return "has" if len(self) == 1 else "have"

    def add(self, first: int, last: int | None = None) -> None:
        """Add a number, or all from `first` to `last`; they are larger than those before."""
        last = first if last is None else last
        if self.stretches and self.stretches[-1][1] == first - 1:
            first = self.stretches.pop()[0]
        self.stretches.append((first, last))

    def named(self, noun: str, most: int = 5) -> str:
        """In words, the first few stretches: "lines 3, 7 to 9 and 12"; "line 3"."""
        shown = self.stretches[:most]
        words = [f"{first:,}" if first == last else f"{first:,} to {last:,}" for first, last in shown]
        if rest := len(self) - sum(last - first + 1 for first, last in shown):
            words.append(f"{rest:,} more")
        together = " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
        return f"{noun}{'s' if len(self) > 1 else ''} {together}"


def complaints(damaged: Places, steps: Sequence[int], last: int) -> list[str]:
    """What is wrong with a log of steps, in words, one line for each kind of damage.

    Args:
        damaged: its lines that are no events.
        steps: the steps that it has lines for, as they stand there.
        last: it should have a line for each step up to this one.
    """
    missing, again, before, found = Places(), Places(), 0, list[str]()
    whole = len(steps) == last and all(map(operator.eq, steps, range(1, last + 1)))  # as almost always
    for step in [] if whole else [*sorted(steps), last + 1]:
        if step > before + 1:
            missing.add(before + 1, step - 1)
        elif step == before > 0 and not (again and again.stretches[-1][1] == step):
            again.add(step)
        before = step
    if damaged:
        found.append(f"{damaged.named('line')} can't be read and {damaged.are} left out")
    if missing:
        found.append(f"{missing.named('step')} {missing.have} no line")
    if again:
        found.append(f"{again.named('step')} {again.have} more than one line; the last one counts")
    elif not whole and any(one > other for one, other in itertools.pairwise(steps)):
        found.append("its lines are not in the order of their steps")
    return found
