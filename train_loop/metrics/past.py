"""What the logs of a run say about the steps so far: read when a run goes on, when it is sampled, replayed, or studied.

A log may have been damaged since: half lines after a crash, lines of something else, steps that are missing or stand
there twice. Each of these is said, and the rest counts.
"""

import itertools
import mmap
import re
from array import array
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from train_loop.records import Places, event

Steps = npt.NDArray[np.int64]

_BULK = 1 << 18  # bytes of lines that are judged together; they fit into a processor's cache
_EVENT, _STEP = b'{"event": ', b'{"event": "step", "step": '
_NUMBER = 16  # letters of a step's number of at most 15 digits, and what follows it
_BEGIN = re.compile(rb'{"event": "(\w+)", "step": (\d{1,15})[,}]')  # the beginning of a line, as we write it


class Found(NamedTuple):
    """What was found in a file of events, up to those of a step."""

    events: Sequence[dict[str, Any]] = ()  # those that were asked for
    skipped: int = 0  # how many steps in a row, up to and including the last, were skipped
    end: int = 0  # where the lines of later steps begin [bytes]
    steps: Sequence[int] = ()  # of the lines about steps, as they stand there
    damaged: Places = Places()  # lines that are no events


class Past(NamedTuple):
    """What a run's logs say about the steps so far."""

    evaluations: list[dict[str, Any]]  # their records, in order of steps, each step once
    samples: int  # how many texts were sampled after the last step
    probed: int  # the last step after which a probe was recorded, or 0
    skipped: int  # how many steps in a row, up to and including the last, were skipped

    @classmethod
    def of(cls, kept: Found, watched: Found, step: int) -> "Past":
        """From metrics.jsonl and study.jsonl up to a step."""
        evaluations = {each["step"]: each for each in kept.events if each["event"] == "evaluation"}
        return cls(
            evaluations=[each for _, each in sorted(evaluations.items())],
            samples=sum(each["event"] == "sample" and each["step"] == step for each in kept.events),
            probed=max((each["step"] for each in watched.events), default=0),
            skipped=kept.skipped,
        )


def find(path: Path, step: int, names: Container[str]) -> Found:
    """Read a metrics.jsonl or study.jsonl up to the events of a step; those of later steps come after them in the file.

    Only the last lines and the events with these names are parsed, because a million steps would take half a minute.
    """
    skipped, end, last, foreign = 0, 0, 0, 0
    for line, line_end in _backwards(path):
        found = event(line)
        foreign = foreign or line_end if found is None else -1
        if found is None or found["step"] > step:
            continue
        if not end:
            end, last = line_end, found["step"]
        if found["step"] < last - skipped:  # steps have no lines here
            break
        if found["event"] == "step":
            if not found.get("skipped"):
                break
            skipped += 1
    if step and foreign > 0:  # not one event: it is not ours to remove
        end = foreign
    return _upto(path, end, step, names)._replace(skipped=skipped, end=end)


def _upto(path: Path, end: int, step: int, names: Container[str]) -> Found:
    """What stands before a place in a file: the events with these names, the steps, the damaged lines."""
    events, steps, damaged, before = [], array("q"), Places(), 0
    for text in _bulks(path, end):
        numbers, lines, count = _sorted_out(text, names)
        steps.frombytes(numbers[numbers <= step].tobytes())
        for number, line in lines:
            found = event(line)
            if found is None or (found["event"] == "evaluation" and not _has_loss(found)):
                damaged.add(before + number)
            elif found["step"] <= step and found["event"] == "step":
                steps.append(found["step"])
            elif found["step"] <= step and found["event"] in names:
                events.append(found)
        before += count
    return Found(events, steps=steps, damaged=damaged)


def _bulks(path: Path, end: int) -> Iterator[bytes]:
    """What stands before a place in a file, many whole lines at once."""
    if not end:
        return
    with open(path, "rb") as file:
        while end > 0 and (text := file.read(min(end, _BULK))):
            text += b"" if len(text) == end else file.readline()
            end -= len(text)
            yield text


def _sorted_out(text: bytes, names: Container[str]) -> tuple[Steps, list[tuple[int, bytes]], int]:
    """The numbers of the steps that lines are about, the lines to parse with their places, how many lines there are.

    If each line is one event from its first to its last letter, as far as can be told unparsed, only those with these
    names are parsed; else all are. In a whole line, a quote inside a text is escaped, so the beginning of an event is
    nowhere else.
    """
    letters = np.frombuffer(text, np.uint8)
    ends = np.flatnonzero(letters == ord("\n"))
    count = len(ends)
    once = np.count_nonzero(letters == ord("{")) == count or text.count(_EVENT) == count
    ascii_ = letters.view(np.int8).min() > 0  # and none is NUL
    if once and ascii_ and text.endswith(b"\n") and (letters[ends - 1] == ord("}")).all():
        starts = np.append(0, ends[:-1] + 1)
        width = len(_STEP) + _NUMBER
        padded = text if len(text) - starts[-1] >= width else text + bytes(width)
        heads = np.ndarray(len(padded) - width + 1, f"V{width}", padded, strides=(1,))[starts]
        heads = heads.view(np.uint8).reshape(count, width)
        about_step = (heads[:, : len(_STEP)] == np.frombuffer(_STEP, np.uint8)).all(axis=1)
        numbers = _numbers(heads[about_step, len(_STEP) :])
        others = [(place + 1, text[starts[place] : ends[place]]) for place in np.flatnonzero(~about_step).tolist()]
        begins = [_BEGIN.match(line) for _, line in others]
        if numbers is not None and all(begin is not None and begin[1] != b"step" for begin in begins):
            asked = [begin is not None and begin[1].decode() in names for begin in begins]
            return numbers, list(itertools.compress(others, asked)), count
    lines = text.removesuffix(b"\n").split(b"\n")
    return np.zeros(0, np.int64), list(enumerate(lines, 1)), len(lines)


def _numbers(rows: npt.NDArray[np.uint8]) -> Steps | None:
    """The numbers at the beginning of rows [rows, letters], each before a comma or a brace; None if one is missing."""
    digits = rows - np.uint8(ord("0"))  # what is none is 10 or more
    length = (digits < 10).argmin(axis=1)
    after = rows[np.arange(len(rows)), length]
    if not ((length > 0) & ((after == ord(",")) | (after == ord("}")))).all():
        return None
    numbers = np.zeros(len(rows), np.int64)
    for place in range(length.max(initial=0)):
        numbers = np.where(place < length, 10 * numbers + digits[:, place], numbers)
    return numbers


def _has_loss(evaluation: dict[str, Any]) -> bool:
    """Whether an evaluation says what it found; a loss that was not finite is None."""
    loss = evaluation.get("loss", "")
    return loss is None or (isinstance(loss, int | float) and not isinstance(loss, bool))


def read_events(path: Path) -> tuple[list[dict[str, Any]], Places]:
    """The events of a metrics.jsonl or study.jsonl, and which lines hold none.

    The last line does not count if it has no end: a killed process has left it half written.
    """
    events, damaged = [], Places()
    if path.exists():
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if (found := event(line)) is not None:
                    events.append(found)
                elif line.endswith(b"\n"):
                    damaged.add(number)
    return events, damaged


def last_steps(path: Path, count: int) -> list[dict[str, Any]]:
    """The last `count` steps of a metrics.jsonl."""
    lines = (line for line, _ in _backwards(path))
    may_be = (line for line in lines if (begin := _BEGIN.match(line)) is None or begin[1] == b"step")
    steps = (found for found in map(event, may_be) if found is not None and found["event"] == "step")
    return list(itertools.islice(steps, count))[::-1]


def _backwards(path: Path) -> Iterator[tuple[bytes, int]]:
    """The last line of a file and where it ends [bytes], then the line before it, and so on.

    Text after the last line break, which a killed process has left half written, does not count as a line.
    """
    if not path.exists() or path.stat().st_size == 0:
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        end = content.rfind(b"\n") + 1
        while end:
            start = content.rfind(b"\n", 0, end - 1) + 1
            yield content[start:end], end
            end = start
