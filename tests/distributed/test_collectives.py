"""What processes send each other."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train_loop.distributed import collectives

NUMBERS = st.lists(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e200, max_value=1e200), max_size=20)


@given(st.lists(NUMBERS, min_size=1, max_size=5))
def test_sums_are_exact_however_they_are_divided(shares: list[list[float]]) -> None:
    whole = math.fsum(value for share in shares for value in share)
    assert math.fsum(part for share in shares for part in collectives.exact_parts(share)) == whole


def test_few_numbers_are_sent_and_what_is_not_finite_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(collectives, "gather_object", lambda own: sent.append(own) or own * 3)
    accelerator: Any = SimpleNamespace(num_processes=3)
    column = [number / 7 for number in range(10_000)]
    sums = collectives.sum_exactly(accelerator, [column, [math.inf, 1.0], [math.nan], []])
    assert sums[:2] == [math.fsum(column * 3), math.inf] and math.isnan(sums[2]) and sums[3] == 0
    assert sum(map(len, sent[0][0])) < 10
