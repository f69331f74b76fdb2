"""Run by `launch.several` on each process: the commands of one file, their outcomes into another.

A command is its arguments; {"fault": name, "process": number, "at": step} of `faults.py` may come after them.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.support.runs import last_of_each
from train_loop import cli


def shard_on_cpu() -> None:
    """Make Accelerate use FSDP2 on gloo: it has no branch for it, and would fall back on DDP without a word."""
    from accelerate import DistributedType, PartialState

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def note_writes(root: str, written: set[str]) -> None:
    """From now on, note the files below a folder that Python code of this process opens to write, or renames."""

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        for path in arguments[:1] if writes else arguments[:2] if event == "os.rename" else ():
            if str(path).startswith(root):
                written.add(str(path))

    sys.addaudithook(hear)


def run(command: list[Any]) -> tuple[int, str, str]:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    if os.environ.get("TESTS_FSDP2_ON_CPU"):
        shard_on_cpu()
    *arguments, last = command
    broken: Any = contextlib.nullcontext()
    if isinstance(last, dict):
        from tests.support.faults import fault

        broken = fault(last["fault"], last["process"], last["at"])
    else:
        arguments.append(last)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), broken:
        code = cli.main(last_of_each(arguments))
    return code, out.getvalue(), err.getvalue()


def main(*paths: str) -> None:
    """Runs the commands in `todo`; what they come to is in `done.RANK`."""
    from accelerate import PartialState

    # The commands share one process group: a second one would find the first one's addresses in the launcher's store.
    todo, done = map(Path, paths)
    destroy = PartialState.destroy_process_group
    PartialState.destroy_process_group = lambda *_: None  # type: ignore[method-assign]
    written: set[str] = set()
    if root := os.environ.get("TESTS_NOTE_WRITES"):
        note_writes(root, written)
    outcomes = [run(arguments) for arguments in json.loads(todo.read_text())]
    done.with_name(f"{done.name}.{os.environ.get('RANK', '0')}").write_text(json.dumps(outcomes))
    if root:
        Path(root, f"written.{os.environ.get('RANK', '0')}").write_text("\n".join(sorted(written)))
    destroy(PartialState())


if __name__ == "__main__":
    main(*sys.argv[1:])
