"""The DataLoader over packed blocks: block ids -> tensors, one vectorised gather per batch.

    tokens   t0 t1 t2 t3 t4 t5 t6 ...          block_size = 3
    window 0 [t0 t1 t2 t3]                     input t0 t1 t2   target t1 t2 t3
    window 1          [t3 t4 t5 t6]            input t3 t4 t5   target t4 t5 t6

There is nothing to collate and no sampler. `order.py` says which blocks make up a batch, and the DataLoader only
fetches them (ahead of time in other processes, if data.num_workers asks for it). Small micro-batches are gathered
several at a time, because a model's passes push everything that a gather needs out of the processor's caches.
"""

import itertools
import signal
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from train_loop.data.order import Ids, MicroBatch
from train_loop.data.token_store import TokenStore, window_count
from train_loop.signals import STOP_SIGNALS

IGNORED = -100
"""Target of a position that is not predicted, because it pads a short window or an empty micro-batch."""

_TOKENS_TOGETHER = 1 << 14  # the least that one gather fetches: a quarter of a megabyte


class Batch(NamedTuple):
    """One micro-batch: its number within the step, inputs and targets [batch, block] int64.

    If documents are isolated, positions [batch, block] int64 give the distance of each input from the start of its
    document (or of its window, if the document starts before it); else None.
    """

    number: int
    inputs: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on a device."""
        if self.inputs.device == device:
            return self
        inputs, targets = (each.to(device, non_blocking=True) for each in (self.inputs, self.targets))
        positions = None if self.positions is None else self.positions.to(device, non_blocking=True)
        return Batch(self.number, inputs, targets, positions)


class Windows(Dataset[Batch]):
    """The windows of a token store as a map from block ids to tensors.

    Args:
        store: the stream of tokens.
        block_size: tokens of context that a window gives the model.
        filler: token id that fills up a short window; its targets are ignored, and causal attention keeps it from
            reaching the tokens before it.
        isolate: whether documents are kept apart: no target is a document's first token, and batches have positions.
    """

    def __init__(self, store: TokenStore, block_size: int, filler: int, isolate: bool = False) -> None:
        self.store, self.block_size, self.filler = store, block_size, filler
        # Where documents begin in the stream, and where the last one ends [documents + 1].
        self.borders = np.concatenate([[0], store.document_ends.astype(np.int64)]) if isolate else None
        self._offsets = np.arange(block_size + 1)
        self.count = window_count(len(store), block_size)
        self.last_targets = len(store) - 1 - block_size * (self.count - 1)

    def __len__(self) -> int:
        """Number of windows."""
        return self.count

    def targets(self, blocks: Ids) -> int:
        """Number of targets in some windows, without reading them."""
        # Without numpy: its first call between two passes of a model takes five times as long for a step's few blocks.
        short = blocks.tolist().count(self.count - 1)
        targets = (len(blocks) - short) * self.block_size + short * self.last_targets
        if self.borders is not None:
            first = blocks * self.block_size
            last = np.minimum(first + self.block_size, len(self.store) - 1)
            begun = np.searchsorted(self.borders, last, "right") - np.searchsorted(self.borders, first, "right")
            targets -= int(begun.sum())  # documents that begin after a window's first token
        return targets

    def __getitem__(self, micro_batch: MicroBatch) -> Batch:
        """The windows of a micro-batch; for an empty one, a single row without targets."""
        return self.__getitems__([micro_batch])[0]

    def __getitems__(self, micro_batches: list[MicroBatch]) -> list[Batch]:
        """The same for several micro-batches, which costs little more than for one."""
        rows = self._gather(np.concatenate([blocks for _, blocks in micro_batches]))
        batches, first = [], 0
        for number, blocks in micro_batches:
            last = first + len(blocks)
            own = [None if each is None else each[first:last] for each in rows] if len(blocks) else self._nothing()
            batches.append(Batch(number, *own))
            first = last
        return batches

    def _nothing(self) -> list[Any]:
        """A row without targets: inputs, targets and positions."""
        shape = (1, self.block_size)
        positions = None if self.borders is None else torch.arange(self.block_size)[None]
        return [torch.full(shape, self.filler), torch.full(shape, IGNORED), positions]

    def _gather(self, blocks: Ids) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Inputs, targets and positions of some windows."""
        places: npt.NDArray[np.int64] = blocks[:, None] * self.block_size + self._offsets
        window = torch.from_numpy(self.store.tokens[np.minimum(places, len(self.store) - 1)].astype(np.int64))
        inputs, targets = window[:, :-1], window[:, 1:]
        if self.count - 1 in blocks:  # the last window may be short
            inputs, targets = inputs.clone(), targets.clone()
            missing = torch.from_numpy(places >= len(self.store))
            inputs[missing[:, :-1]] = self.filler
            targets[missing[:, 1:]] = IGNORED
        if self.borders is None:
            return inputs, targets, None
        begins = self.borders[np.searchsorted(self.borders, places, "right") - 1]
        first = torch.from_numpy(places == begins)
        targets = targets.masked_fill(first[:, 1:], IGNORED)
        positions = torch.from_numpy(places - np.maximum(begins, places[:, :1]))
        return inputs, targets, positions[:, :-1]


class _Together:
    """A sampler that passes on the micro-batches it is given, in groups that are gathered together.

    The DataLoader needs an iterable that it can restart.
    """

    def __init__(self, micro_batches: Iterable[MicroBatch], block_size: int) -> None:
        self.micro_batches, self.block_size = micro_batches, block_size

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        group: list[MicroBatch] = []
        tokens = 0
        for micro_batch in self.micro_batches:
            group.append(micro_batch)
            tokens += max(1, len(micro_batch.blocks)) * self.block_size
            if tokens >= _TOKENS_TOGETHER:
                yield group
                group, tokens = [], 0
        if group:
            yield group


def loader(
    windows: Windows, micro_batches: Iterable[MicroBatch], num_workers: int = 0, pin_memory: bool = False
) -> Iterator[Batch]:
    """One `Batch` for each micro-batch, in order, from a DataLoader."""
    groups: DataLoader[list[Batch]] = DataLoader(
        windows,  # type: ignore[arg-type]
        batch_sampler=_Together(micro_batches, windows.block_size),
        collate_fn=_as_they_are,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_training,
    )
    return itertools.chain.from_iterable(groups)


def _as_they_are(batches: list[Batch]) -> list[Batch]:
    return batches


def _leave_signals_to_training(worker: int) -> None:
    """Ignore stop signals: launchers and terminals signal every process, and a worker that ends stops the training."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
