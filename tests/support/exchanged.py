"""Run by `test_gloo.py` on each process: what gloo.py's collectives give, and what torch's own do.

Each process writes, by name of the case, whether what it gathered is torch's to the bit; how far its sum is from
float64's, in units of rounding; and whether a second sum has the same bits.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from train_loop.distributed import gloo

NUMBERS = 1000  # of a shard


def case(group: dist.ProcessGroup, dtype: torch.dtype, average: bool) -> dict[str, float | bool]:
    """One case; every process of the group has numbers of its own."""
    size, rank = group.size(), dist.get_rank()
    gather, scatter = gloo.Gather(), gloo.ReduceScatter()
    own = torch.randn(NUMBERS, generator=torch.Generator().manual_seed(rank)).to(dtype)
    whole = gather.allocate((size * NUMBERS,), dtype=dtype, device=own.device)
    place = whole.chunk(size)[group.rank()]
    place.copy_(own)  # FSDP2 gathers in place
    gather(output_tensor=whole, input_tensor=place, group=group)
    expected = torch.empty(size * NUMBERS, dtype=dtype)
    dist.all_gather_into_tensor(expected, own, group=group)

    parts = torch.randn(size * NUMBERS, generator=torch.Generator().manual_seed(100 + rank)).to(dtype)
    every = torch.empty(size * len(parts), dtype=dtype)
    dist.all_gather_into_tensor(every, parts, group=group)
    total = every.double().view(size, size, NUMBERS)[:, group.rank()].sum(0) / (size if average else 1)
    op, sums = dist.ReduceOp.AVG if average else dist.ReduceOp.SUM, []
    for _ in range(2):
        sums.append(scatter.allocate((NUMBERS,), dtype=dtype, device=own.device))
        scatter(output_tensor=sums[-1], input_tensor=parts.clone(), group=group, op=op)
    error = (sums[0].double() - total).abs().max() / total.abs().max() / torch.finfo(dtype).eps
    return {"gathered": torch.equal(whole, expected), "error": float(error), "same": torch.equal(*sums)}


def main(done: str) -> None:
    """All cases, with all processes and with the first and the last alone; the results go to `done.RANK`."""
    dist.init_process_group("gloo")
    world, rank = dist.get_world_size(), dist.get_rank()
    everyone = dist.group.WORLD
    some = dist.new_group([0, world - 1])
    assert everyone is not None
    found = {"all, fp32, average": case(everyone, torch.float32, average=True)}
    found["all, fp32, sum"] = case(everyone, torch.float32, average=False)
    found["all, bf16, average"] = case(everyone, torch.bfloat16, average=True)
    if rank in (0, world - 1):
        found["two, fp32, average"] = case(some, torch.float32, average=True)
    dist.barrier()
    Path(f"{done}.{rank}").write_text(json.dumps(found))
    dist.destroy_process_group()
    os._exit(0)  # it was forked; what its parent has is not its to clear away


if __name__ == "__main__":
    main(*sys.argv[1:])
