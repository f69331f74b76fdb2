"""One of several processes that share one device over gloo: `python -m gpu_day.pair RESULT`

Each process takes part in a sum over all of them, then trains a tiny Llama on its share of each batch, with DDP. The
launcher's variables tell it its rank; what it finds goes into RESULT.RANK as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gpu_day.models import device, quiet, tiny, tokens

_STEPS, _ROWS, _LENGTH = 5, 4, 32


def losses(rank: int, processes: int) -> list[float]:
    """Mean loss over all rows, step by step, of which each process has its share; by plain gradient descent."""
    from train_loop.training.objective import Objective

    objective: Any = Objective(tiny("llama")).train()
    if processes > 1:
        objective = DistributedDataParallel(objective)
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    found = []
    for step in range(_STEPS):
        ids = tokens(_ROWS, _LENGTH + 1, step)[rank::processes]
        nll = objective(ids[:, :-1], ids[:, 1:])
        (nll * processes / (_ROWS * _LENGTH)).backward()  # DDP divides by the processes
        optimizer.step()
        optimizer.zero_grad()
        whole = nll.detach().clone()
        if processes > 1:
            dist.all_reduce(whole)
        found.append(float(whole) / (_ROWS * _LENGTH))
    return found


def main() -> None:
    """Meet the others, and do it."""
    quiet()
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    path = Path(f"{sys.argv[1]}.{rank}")
    told: dict[str, Any] = {"device": str(device())}
    try:
        number = torch.full((1000,), rank + 1.0, device=device())
        dist.all_reduce(number)
        told["sums"] = sorted(set(number.tolist()))
        told["losses"] = losses(rank, processes)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        told["error"] = f"{type(error).__name__}: {error}"
    path.write_text(json.dumps(told), encoding="utf-8")
    if "error" not in told:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
