"""The order of the blocks: a permutation, keyed, independent of the processes, found at once for any step."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train_loop.data.order import MicroBatch, Plan, cut, permute

SEEDS = st.integers(0, 2**40)


def share(plan: Plan, step: int, rank: int = 0, world_size: int = 1) -> list[MicroBatch]:
    """The micro-batches of a step that one rank runs."""
    return cut(plan.blocks(step), plan.micro_batch_size, rank, world_size)


@given(n=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    assert sorted(permute(np.arange(n), n, seed, epoch)) == list(range(n))


@given(n=st.integers(1, 10**10), seed=SEEDS, data=st.data())
def test_any_position_is_found_alone_as_among_others(n: int, seed: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20))
    together = permute(positions, n, seed, 5)
    assert all(0 <= block < n for block in together)
    assert [int(permute(position, n, seed, 5)[0]) for position in positions] == together.tolist()


def test_orders_differ_between_epochs_and_seeds() -> None:
    orders = {
        (seed, epoch): tuple(permute(np.arange(100), 100, seed, epoch)) for seed in range(8) for epoch in range(8)
    }
    assert len(set(orders.values())) == 64
    assert orders[0, 2] != orders[1, 1]  # no sum of seed and epoch


def test_the_order_looks_random() -> None:
    """Every place is as likely as any other for a block: chi-squared over 4,000 keys, 99.9 % quantile for 9 d.o.f."""
    places = np.array([np.flatnonzero(permute(np.arange(10), 10, seed, 0) == 3)[0] for seed in range(4000)])
    counts = np.bincount(places, minlength=10)
    assert ((counts - 400) ** 2 / 400).sum() < 27.9
    order = permute(np.arange(100_000), 100_000, 0, 0)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02


def test_a_position_outside_is_refused() -> None:
    with pytest.raises(ValueError, match=r"outside 0\.\.9"):
        permute(10, 10, 0, 0)


PLANS = st.builds(
    Plan,
    blocks_per_epoch=st.integers(1, 200),
    sequences_per_step=st.integers(1, 40),
    micro_batch_size=st.integers(1, 40),
    seed=SEEDS,
)


@given(plan=PLANS, epoch=st.integers(0, 5))
def test_the_steps_of_an_epoch_see_every_block_once(plan: Plan, epoch: int) -> None:
    first = epoch * plan.steps_per_epoch
    steps = [plan.blocks(step) for step in range(first, first + plan.steps_per_epoch)]
    assert sorted(np.concatenate(steps)) == list(range(plan.blocks_per_epoch))
    assert all(len(blocks) == plan.sequences_per_step for blocks in steps[:-1])
    assert {plan.epoch(step) for step in range(first, first + plan.steps_per_epoch)} == {epoch}


@given(plan=PLANS, start=st.integers(0, 300), count=st.integers(0, 150))
def test_steps_in_a_row_are_those_found_one_by_one(plan: Plan, start: int, count: int) -> None:
    in_a_row = list(plan.steps(start, start + count))
    assert len(in_a_row) == count
    for step, blocks in enumerate(in_a_row, start):
        assert np.array_equal(blocks, plan.blocks(step))


@given(plan=PLANS, step=st.integers(0, 500), processes=st.integers(1, 9))
def test_the_processes_share_one_plan(plan: Plan, step: int, processes: int) -> None:
    shares = [share(plan, step, process, processes) for process in range(processes)]
    assert len(set(map(len, shares))) == 1  # equally many passes, so collectives match
    numbers = [batch.number for each in shares for batch in each]
    assert len(set(numbers)) == len(numbers)  # no two share a dropout key
    real = sorted((batch for each in shares for batch in each if len(batch.blocks)), key=lambda batch: batch.number)
    whole = share(plan, step)
    assert [batch.number for batch in real] == [batch.number for batch in whole]
    assert all(np.array_equal(mine.blocks, other.blocks) for mine, other in zip(real, whole, strict=True))
    assert np.array_equal(np.concatenate([batch.blocks for batch in real]), plan.blocks(step))
    for process, own in enumerate(shares):
        assert all(batch.number % processes == process for batch in own)
    assert all(1 <= len(batch.blocks) <= plan.micro_batch_size for batch in whole)


def test_any_step_of_a_huge_corpus_takes_under_a_millisecond() -> None:
    """Not a benchmark: computing the steps before it would take minutes. Best of many, since machines are shared."""
    plan = Plan(blocks_per_epoch=10**10, sequences_per_step=256, micro_batch_size=8, seed=1)
    times = []
    for step in range(10**9, 10**9 + 50):
        began = time.perf_counter()
        share(plan, step, 3, 64)
        times.append(time.perf_counter() - began)
    assert min(times) < 1e-3
