"""The command, started where Accelerate alone would not: `python -m gpu_day.launched WAY train ...`

one-device        several processes over gloo, all on the first device (NCCL refuses two on one)
fsdp2-on-a-cpu    FSDP2 over gloo on a CPU, which Accelerate has no branch for
"""

import sys
from typing import Any

from accelerate import DistributedType, PartialState

from train_loop.cli import main
from train_loop.distributed import preflight


def over_gloo() -> None:
    """Have Accelerate take gloo for what it takes to be a process a GPU."""

    def prepare_backend(*_: Any, **__: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = prepare_backend
    preflight.shared_device = lambda *_: None  # which is a mistake otherwise


def shard_on_cpu() -> None:
    """Have Accelerate take a CPU's processes for GPUs', which it shards."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


if __name__ == "__main__":
    way, *arguments = sys.argv[1:]
    {"one-device": over_gloo, "fsdp2-on-a-cpu": shard_on_cpu}[way]()
    sys.exit(main(arguments))
