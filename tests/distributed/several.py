"""Run by `launch.several` on each process: the commands of one file, their outcomes into another."""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

from train_loop.cli import main


def shard_on_cpu() -> None:
    """Make Accelerate use FSDP2 on gloo: it has no branch for it, and would fall back on DDP without a word."""
    from accelerate import DistributedType, PartialState

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def run(arguments: list[str]) -> tuple[int, str, str]:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    if os.environ.get("TESTS_FSDP2_ON_CPU"):
        shard_on_cpu()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return code, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    from accelerate import PartialState

    # The commands share one process group: a second one would find the first one's addresses in the launcher's store.
    destroy = PartialState.destroy_process_group
    PartialState.destroy_process_group = lambda *_: None  # type: ignore[method-assign]
    todo, done = map(Path, sys.argv[1:])
    outcomes = [run(arguments) for arguments in json.loads(todo.read_text())]
    if os.environ.get("RANK", "0") == "0":
        done.write_text(json.dumps(outcomes))
    destroy(PartialState())
