"""The numbers of a handful of small runs are what they were when they were written down: golden/numbers.json.

Losses to rounding, everywhere; with the libraries that they were written down with, on a processor with AVX2, all of
it to the bit: metrics, statistics, weights and moments, what a resumed run, an evaluation, samples and a replayed step
come to. What the runs are, and how far their bits depend on the machine: golden/runs.py.
"""

import json
from typing import Any

import pytest

from tests.golden import runs

WRITTEN: dict[str, Any] = json.loads(runs.NUMBERS.read_text(encoding="utf-8"))
NAMES = [*runs.RUNS, *runs.ON_TWO]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """The same, measured here."""
    return runs.measure()


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_the_same_to_rounding(found: dict[str, Any], name: str) -> None:
    """bf16 has two or three digits, of which sums over a step's targets leave four."""
    mine, written = found["runs"][name]["losses"], WRITTEN["runs"][name]["losses"]
    tolerance = 1e-3 if "bf16" in name else 1e-6
    for kind in ("step", "evaluation"):
        assert mine[kind] == pytest.approx(written[kind], rel=tolerance), kind


@pytest.mark.parametrize("name", NAMES)
def test_all_of_it_is_the_same_to_the_bit(found: dict[str, Any], name: str) -> None:
    for what in ("kernels", "versions"):
        if found[what] != WRITTEN[what]:
            pytest.skip(f"written down with other {what}: {WRITTEN[what]}, here {found[what]}")
    assert found["runs"][name]["sha256"] == WRITTEN["runs"][name]["sha256"]


@pytest.mark.parametrize("name", runs.RUNS)
def test_runs_agree_with_themselves(found: dict[str, Any], name: str) -> None:
    """A resumed run with the whole one, a replayed step with the log, on any machine."""
    sums = found["runs"][name]["sha256"]
    assert sums["metrics, resumed"] == sums["metrics"] and sums["weights, resumed"] == sums["weights"]
    assert found["runs"][name]["replay"] == "bits"


def test_two_processes_agree_with_one_where_that_was_asked_for(found: dict[str, Any]) -> None:
    alone, on_two = (found["runs"][name]["sha256"] for name in ("gpt2, bitwise", "gpt2, two processes, bitwise"))
    assert on_two == {what: alone[what] for what in on_two}
