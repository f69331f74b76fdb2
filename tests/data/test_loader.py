"""Windows over a store: every token but the first is predicted once."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train_loop.data.loader import IGNORED, Windows, loader
from train_loop.data.order import MicroBatch, Plan, cut


@dataclass
class Stream:
    """A store that holds 1, 2, 3, ..., so that a token's value says where it stands."""

    tokens: Any

    def __len__(self) -> int:
        return len(self.tokens)


def share(plan: Plan, step: int, rank: int = 0, world_size: int = 1) -> list[MicroBatch]:
    """The micro-batches of a step that one rank runs."""
    return cut(plan.blocks(step), plan.micro_batch_size, rank, world_size)


def stream(tokens: int) -> Any:
    return Stream(np.arange(1, tokens + 1, dtype=np.uint16))


@given(tokens=st.integers(2, 300), block_size=st.integers(1, 50), size=st.integers(1, 9), seed=st.integers(0, 9))
def test_every_token_but_the_first_is_predicted_once(tokens: int, block_size: int, size: int, seed: int) -> None:
    windows = Windows(stream(tokens), block_size, filler=0)
    plan = Plan(len(windows), size, max(1, size // 2), seed)
    predicted: Counter[int] = Counter()
    for step in range(plan.steps_per_epoch):
        targets = 0
        for batch in loader(windows, share(plan, step, 0, 1)):
            real = batch.targets != IGNORED
            # A target is the token after its input, and stands at the same place.
            assert torch.equal(batch.targets[real], batch.inputs[real] + 1)
            assert batch.inputs.shape == batch.targets.shape and batch.inputs.dtype == torch.int64
            predicted.update(batch.targets[real].tolist())
            targets += int(real.sum())
        assert windows.targets(plan.blocks(step)) == targets
    assert predicted == Counter(range(2, tokens + 1))


def test_the_last_window_is_filled_up() -> None:
    windows = Windows(stream(6), 4, filler=0)
    batch = windows[MicroBatch(0, np.array([1, 0]))]
    assert batch.inputs.tolist() == [[5, 6, 0, 0], [1, 2, 3, 4]]
    assert batch.targets.tolist() == [[6, IGNORED, IGNORED, IGNORED], [2, 3, 4, 5]]


def test_an_empty_micro_batch_has_no_targets() -> None:
    batch = Windows(stream(6), 4, filler=7)[MicroBatch(3, np.empty(0, dtype=np.int64))]
    assert batch.number == 3 and batch.inputs.tolist() == [[7] * 4] and batch.targets.tolist() == [[IGNORED] * 4]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_keep_the_order(workers: int) -> None:
    windows = Windows(stream(100), 5, filler=0)
    plan = Plan(len(windows), 4, 2, seed=1)
    batches = [batch for step in range(5) for batch in share(plan, step, 0, 1)]
    found = list(loader(windows, batches, num_workers=workers))
    assert [batch.inputs[:, 0].tolist() for batch in found] == [(blocks * 5 + 1).tolist() for _, blocks in batches]


@pytest.mark.parametrize("together", [1, 12, 10_000])
@pytest.mark.parametrize("isolate", [False, True])
def test_gathered_together_is_gathered_one_by_one(
    together: int, isolate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train_loop.data.loader._TOKENS_TOGETHER", together)
    store = stream(63)
    store.document_ends = np.array([3, 20, 21, 63])
    windows = Windows(store, 5, filler=0, isolate=isolate)
    plan = Plan(len(windows), 5, 2, seed=1)
    batches = [batch for step in range(plan.steps_per_epoch) for batch in share(plan, step, 1, 2)]
    assert any(len(blocks) == 0 for _, blocks in batches)
    found = list(loader(windows, batches))
    assert len(found) == len(batches)
    for batch, micro_batch in zip(found, batches, strict=True):
        alone = windows[micro_batch]
        assert batch.number == alone.number and (batch.positions is None) == (not isolate)
        for mine, expected in zip(batch[1:], alone[1:], strict=True):
            assert mine is expected or torch.equal(mine, expected)
