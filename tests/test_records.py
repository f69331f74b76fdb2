"""JSON that anybody can read, and logs that something has happened to."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train_loop.records import Places, complaints, event, plain, to_json

VALUES = st.recursive(
    st.sampled_from([math.nan, math.inf, -math.inf]) | st.none() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3) | st.tuples(inner),
    max_leaves=8,
)


def refuse(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


@given(VALUES)
def test_no_number_is_written_that_json_does_not_have(value: Any) -> None:
    written = to_json(value)
    assert json.loads(written, parse_constant=refuse) == json.loads(json.dumps(plain(value)))


@given(st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False) | st.integers()))
def test_what_is_finite_is_written_as_json_dumps_does(value: dict[str, Any]) -> None:
    assert to_json(value) == json.dumps(value) and to_json(value, indent=2) == json.dumps(value, indent=2)
    assert to_json(value, compact=True) == json.dumps(value, separators=(",", ":"))


NO_EVENTS = {
    "empty": b"\n",
    "half": b'{"event": "step", "step": 4, "lo',
    "two halves": b'{"event": "step", "step": 4, "lo{"event": "step", "step": 5}\n',
    "zeros": b"\0" * 4096 + b"\n",
    "not UTF-8": b'{"event": "step", "step": 4, "x": "\xff"}\n',
    "nested without end": b"[" * 200_000,
    "a list": b"[]",
    "a number": b"3",
    "no name": b'{"step": 4}',
    "another kind of name": b'{"event": 5, "step": 4}',
    "no step": b'{"event": "step"}',
    **{
        f"step {step}": b'{"event": "step", "step": %s}' % step.encode()
        for step in ("null", '"4"', "-1", "1.5", "true", "[4]", "NaN", "Infinity", "1e999", "1e300")
    },
    "more digits than Python reads": b'{"event": "step", "step": 4, "tokens": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("line", NO_EVENTS.values(), ids=NO_EVENTS)
def test_what_is_no_event(line: bytes) -> None:
    assert event(line) is None


def test_what_is_an_event() -> None:
    assert event(b'{"event": "step", "step": 4}\r\n') == {"event": "step", "step": 4}
    assert event(b'\xef\xbb\xbf{"step":4.0 ,"event":"step"}') == {"event": "step", "step": 4}
    written = json.dumps({"event": "evaluation", "step": 4, "loss": math.nan, "more": [math.inf, -math.inf]})
    assert event(written.encode()) == {"event": "evaluation", "step": 4, "loss": None, "more": [None, None]}


def test_damage_in_words() -> None:
    damaged = Places()
    for line in (3, 7, 8, 9, 12):
        damaged.add(line)
    assert complaints(damaged, [1, 2, 3], 3) == ["lines 3, 7 to 9 and 12 can't be read and are left out"]
    assert complaints(Places(), [1, 2, 4, 4, 4, 9], 10) == [
        "steps 3, 5 to 8 and 10 have no line",
        "step 4 has more than one line; the last one counts",
    ]
    assert complaints(Places(), [], 1_000_000_000_000) == ["steps 1 to 1,000,000,000,000 have no line"]
    assert complaints(Places(), [3, 1, 2], 3) == ["its lines are not in the order of their steps"]
    assert complaints(Places(), [0, 1, 2], 2) == complaints(Places(), [], 0) == []
    for line in range(20, 60, 2):
        damaged.add(line)
    assert damaged.named("line") == "lines 3, 7 to 9, 12, 20, 22 and 18 more"
