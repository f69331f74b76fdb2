"""The two collectives of FSDP2 over gloo, for shards on CPUs: without the copies that gloo's own make.

To gather n numbers, gloo allocates n more and copies them over; to sum them by shards, it copies n, sums all of them
everywhere, and keeps a shard. Here each process sends its shard, or what it has for another's, to each of the others:

    round k of W - 1:    process r sends to r + k and receives from r - k, modulo W

Each sum is added up in a fixed order, so the same run gives the same bits.
"""

import math
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule


def use(module: nn.Module) -> None:
    """Let a sharded module's units communicate in this way, in place."""
    gather, scatter = Gather(), ReduceScatter()
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.set_custom_all_gather(gather)  # type: ignore[arg-type]  # torch's base class is private
            each.set_custom_reduce_scatter(scatter)  # type: ignore[arg-type]


class Gather:
    """Gathers shards [n] to [processes * n] on each process.

    The memory of units that have been used is kept for the next ones. Otherwise the kernel would have to fill as much
    with zeros, page by page, each time.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[torch.Tensor, weakref.ref[torch.Tensor]]] = []

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A tensor without values, in memory that nobody uses any more."""
        count = math.prod(size)
        free = [memory for memory, user in self._kept if user() is None and memory.dtype == dtype]
        self._kept = [(memory, user) for memory, user in self._kept if user() is not None]
        memory = next((each for each in free if len(each) >= count), None)
        if memory is None:
            del free  # before more is taken
            memory = torch.empty(count, dtype=dtype, device=device)
        tensor = memory[:count].view(*size)
        self._kept.append((memory, weakref.ref(tensor)))
        return tensor

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Fill the output; the names are torch's."""
        parts = output_tensor.chunk(group.size())
        parts[group.rank()].copy_(input_tensor)  # where FSDP2 itself has put it
        for to, source in _rounds(group):
            _exchange(input_tensor, to, parts[source], source, group)


class ReduceScatter:
    """Adds up tensors [processes * n] of which each process keeps its [n], or averages them."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A tensor without values."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Fill the output; the names are torch's."""
        assert op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG), op
        parts = input_tensor.chunk(group.size())
        output_tensor.copy_(parts[group.rank()])
        received = torch.empty_like(output_tensor)
        for to, source in _rounds(group):
            _exchange(parts[to], to, received, source, group)
            output_tensor += received
        if op == dist.ReduceOp.AVG:
            output_tensor /= group.size()


def _rounds(group: dist.ProcessGroup) -> Iterator[tuple[int, int]]:
    """Whom this process sends to, and whom it receives from, at a time."""
    rank, size = group.rank(), group.size()
    for distance in range(1, size):
        yield (rank + distance) % size, (rank - distance) % size


def _exchange(sent: torch.Tensor, to: int, received: torch.Tensor, source: int, group: dist.ProcessGroup) -> None:
    for work in (
        dist.isend(sent, group=group, group_dst=to),
        dist.irecv(received, group=group, group_src=source),
    ):
        assert work is not None  # it is for processes outside of the group
        work.wait()
