"""Which blocks a step sees: a pure function of (seed, step), with no sampler state to save.

    step -> epoch and position -> block ids -> micro-batches -> the share of one process

Every epoch visits the blocks in a new order: a keyed bijection, computed for any position without computing the
ones before it (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002: a Feistel network on a x b >= n
points, walked until it lands below n). So step one million is found as fast as step one, in constant memory.

A step's blocks are cut into micro-batches in a fixed order that does not depend on the processes. Process r of W takes
the micro-batches r, r + W, r + 2W, ... If they don't divide evenly, the last ones of some processes are empty, so all
processes run the same number of forward and backward passes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from train_loop.rng import key

Ids = npt.NDArray[np.int64]

_BLOCKS_AHEAD = 2048
_ROUNDS = 4  # Luby and Rackoff (1988): enough to be indistinguishable from a random permutation


def permute(positions: npt.ArrayLike, n: int, seed: int, epoch: int) -> Ids:
    """The block ids at `positions` [k] of an epoch's order: a bijection of 0..n-1 for each (seed, epoch).

    Raises:
        ValueError: if a position is outside 0..n-1.
    """
    walking = np.atleast_1d(np.asarray(positions, dtype=np.uint64))
    if walking.size and int(walking.max()) >= n:
        raise ValueError(f"position {int(walking.max())} outside 0..{n - 1}")
    keys = _mix(np.arange(_ROUNDS, dtype=np.uint64) + np.uint64(key("order", seed, epoch)))
    a = max(math.isqrt(n - 1) + 1, 1)
    b = -(-n // a)
    result = _feistel(walking, keys, a, b)
    # a x b exceeds n by less than a, so few points land outside. Each of them walks along its cycle until it is inside.
    while (outside := result >= n).any():
        result[outside] = _feistel(result[outside], keys, a, b)
    return result.astype(np.int64)


def _feistel(points: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint64], a: int, b: int) -> npt.NDArray[np.uint64]:
    """A bijection of 0..a*b-1: each round adds to one half a keyed hash of the other, modulo that half's size."""
    left, right = points // np.uint64(b), points % np.uint64(b)
    for number, round_key in enumerate(keys):
        if number % 2 == 0:
            left = (left + _mix(right ^ round_key) % np.uint64(a)) % np.uint64(a)
        else:
            right = (right + _mix(left ^ round_key) % np.uint64(b)) % np.uint64(b)
    return left * np.uint64(b) + right


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finalizer (Steele, Lea and Flood, 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class MicroBatch(NamedTuple):
    """One forward and backward pass: its number within the step, and its block ids [<= micro_batch_size]."""

    number: int
    blocks: Ids


@dataclass(frozen=True)
class Plan:
    """The order of a whole training run. Steps count from 0 here: `plan.blocks(0)` is the first step."""

    blocks_per_epoch: int
    sequences_per_step: int
    micro_batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch; the last one may be short."""
        return -(-self.blocks_per_epoch // self.sequences_per_step)

    def epoch(self, step: int) -> int:
        """The epoch of a step, counted from 0."""
        return step // self.steps_per_epoch

    def blocks(self, step: int) -> Ids:
        """The block ids of one step, in order [<= sequences_per_step]."""
        epoch, position = divmod(step, self.steps_per_epoch)
        first = position * self.sequences_per_step
        last = min(first + self.sequences_per_step, self.blocks_per_epoch)
        return permute(np.arange(first, last, dtype=np.uint64), self.blocks_per_epoch, self.seed, epoch)

    def steps(self, start: int, stop: int) -> Iterator[Ids]:
        """The block ids of steps start..stop-1, one step after the other: what `blocks` gives for each of them.

        The permutation is computed for many steps at once: for a step's few blocks, calls cost more than arithmetic.
        """
        size = self.sequences_per_step
        while start < stop:
            epoch, position = divmod(start, self.steps_per_epoch)
            count = min(max(1, _BLOCKS_AHEAD // size), self.steps_per_epoch - position, stop - start)
            places = np.arange(position * size, min((position + count) * size, self.blocks_per_epoch))
            blocks = permute(places, self.blocks_per_epoch, self.seed, epoch)
            yield from (blocks[first : first + size] for first in range(0, len(blocks), size))
            start += count


def cut(blocks: Ids, size: int, rank: int = 0, world_size: int = 1) -> list[MicroBatch]:
    """The micro-batches that one process runs in a step, at most `size` blocks each: as many as every other process.

    Micro-batches past the last block are empty. Their numbers are past the last real one, so they share a dropout key
    with no other micro-batch.
    """
    rounds = -(-len(blocks) // (size * world_size))
    own = range(rank, rounds * world_size, world_size)
    return [MicroBatch(number, blocks[number * size : (number + 1) * size]) for number in own]
