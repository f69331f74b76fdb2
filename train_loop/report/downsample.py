"""Shorten long curves without losing what readers look for in them: they are thinned, not cut off.

A curve is divided into buckets of steps. Each bucket keeps its lowest and its highest point, so a spike of one step
stays visible at any length. The first and the last point stay, and one NaN (such as a loss that was NaN) per bucket.
The buckets' means are kept as well, for drawing a smooth line.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MOST_POINTS = 2000


def kept(values: NDArray[np.float64], most: int = MOST_POINTS) -> NDArray[np.int64]:
    """The indices of the points to keep, in order: all of them if there are at most `most`, otherwise about `most`."""
    count = len(values)
    if count <= most:
        return np.arange(count)
    gaps = np.isnan(values)
    chosen = {0, count - 1}
    edges = _edges(count, (most - 2) // (3 if gaps.any() else 2))
    low, high = np.where(gaps, np.inf, values), np.where(gaps, -np.inf, values)
    for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        hole = gaps[start:end]
        if hole.any():
            chosen.add(start + int(hole.argmax()))
        if not hole.all():
            chosen |= {start + int(low[start:end].argmin()), start + int(high[start:end].argmax())}
    return np.array(sorted(chosen))


def means(values: NDArray[np.float64], buckets: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The last index and the mean of each bucket; the mean is NaN if the bucket has no number."""
    edges = _edges(len(values), min(buckets, len(values)))
    if len(edges) < 2:
        return np.zeros(0, np.int64), np.zeros(0)
    there = ~np.isnan(values)
    sums = np.add.reduceat(np.where(there, values, 0.0), edges[:-1])
    counts = np.add.reduceat(there.astype(np.float64), edges[:-1])
    return edges[1:] - 1, np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)


def extremes(table: NDArray[np.float64], columns: int, lowest: bool = False) -> NDArray[np.float64]:
    """A table [rows, times] reduced to at most `columns` times, with the highest (or lowest) value of each bucket."""
    edges = _edges(table.shape[1], min(columns, table.shape[1]))
    worst = np.inf if lowest else -np.inf
    filled = np.where(np.isnan(table), worst, table)
    reduced = (np.minimum if lowest else np.maximum).reduceat(filled, edges[:-1], axis=1)
    return np.where(np.isinf(reduced), np.nan, reduced)


def ends(count: int, buckets: int) -> NDArray[np.int64]:
    """The last index of each bucket, for at most `buckets` buckets."""
    return _edges(count, min(buckets, count))[1:] - 1


def evenly(count: int, most: int) -> list[int]:
    """At most `most` indices, evenly spread, with the first and the last among them."""
    return sorted({round(each) for each in np.linspace(0, count - 1, min(count, most))}) if count else []


def _edges(count: int, buckets: int) -> NDArray[np.int64]:
    """Where each bucket begins, and where the last one ends."""
    return np.linspace(0, count, max(buckets, 0) + 1).astype(np.int64)


def rounded(values: Sequence[float] | NDArray[np.float64], digits: int = 6) -> list[float | None]:
    """Plain numbers, rounded to `digits` significant digits; None for NaN."""
    return [None if value != value else float(f"{value:.{digits}g}") for value in map(float, values)]
