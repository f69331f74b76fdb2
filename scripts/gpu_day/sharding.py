"""Part "sharding": FSDP2 on one process, and two processes that share the one device over gloo.

One GPU can't show how fast several are, but it shows that the code of several processes runs on a GPU, and that its
numbers are those of one process.
"""

import json
import os
import socket
from pathlib import Path
from typing import Any

from gpu_day import pair
from gpu_day.models import quiet, relative
from gpu_day.rows import Finding, Rows, Skipped, at_most, needs, one_line, part, same
from gpu_day.runs import Command, Training, settings

_ROOT = Path(__file__).resolve().parent.parent.parent
_LIMIT = 1e-5  # the project's own promise for any number of processes, in fp32


def checks(rows: Rows, cpu: bool, folder: Path) -> None:
    """All runs go on at once, while a tiny model is trained by two processes."""
    quiet()
    runs = Launched(cpu, folder)
    try:
        needs("evaluate", "datasets")
        runs.start()
    except Skipped as reason:
        rows.add("train_loop on several processes", Finding(None, "skipped", why=str(reason)))
    two = TwoProcesses(folder)
    rows.check("gloo adds up the device's tensors", two.sums)
    rows.check("DDP on two processes, one device", two.losses)
    if runs.started:
        rows.check("FSDP2 on one process: sharded", runs.sharded)
        for name, what in (("fsdp2", "FSDP2 on one process"), ("two", "train_loop on two processes, one device")):
            rows.check(f"{what}: losses", runs.beside_one, name, "loss", _LIMIT)
            # The norm of a sum of gradients, which cancel each other in part.
            rows.check(f"{what}: gradient norms", runs.beside_one, name, "grad_norm", 10 * _LIMIT)


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def _ranks(processes: int) -> list[dict[str, str]]:
    """What a launcher tells each of several processes, all of which have the first device."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(), "LOCAL_RANK": "0"}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [shared | {"RANK": str(rank)} for rank in range(processes)]


class TwoProcesses:
    """Two processes of `pair.py`."""

    def __init__(self, folder: Path) -> None:
        self._result = folder / "pair.json"
        self._commands = [
            Command(folder / f"pair-{ranks['RANK']}.log", [str(self._result)], ("-m", "gpu_day.pair"), ranks)
            for ranks in _ranks(2)
        ]
        self._told: list[dict[str, Any]] = []

    def sums(self) -> Finding:
        """Each has the sum of both."""
        for command in self._commands:
            command.finish()
        for rank, command in enumerate(self._commands):
            path = Path(f"{self._result}.{rank}")
            if not path.exists():
                raise RuntimeError(command.last_line)
            self._told.append(json.loads(path.read_text(encoding="utf-8")))
        if "sums" not in self._told[0]:
            raise Skipped(one_line(self._told[0]["error"]))
        return same([each["sums"] for each in self._told], [[3.0], [3.0]], f"tensors on {self._told[0]['device']}")

    def losses(self) -> Finding:
        """Those of one process."""
        if not self._told or "losses" not in self._told[0]:
            raise Skipped(one_line(self._told[0]["error"]) if self._told else "the processes did not meet")
        alone = pair.losses(0, 1)
        if alone[0] == alone[-1]:
            raise AssertionError("training changes nothing: this check would see nothing")
        off = max(relative(each["losses"], alone) for each in self._told)
        return at_most(off, _LIMIT, why=f"{len(alone)} steps, relative")


class Launched:
    """The real command on one process, sharded, and on two."""

    def __init__(self, cpu: bool, folder: Path) -> None:
        self._cpu, self._folder = cpu, folder
        self.started: dict[str, list[Training]] = {}

    def start(self) -> None:
        """Start them all; the first one prepares the data."""
        given = settings(self._cpu, train__max_steps=10)
        launcher = ["--config_file", str(_ROOT / "configs" / "accelerate" / "fsdp2.yaml"), "--num_processes", "1"]
        launcher += ["--main_process_port", _free_port(), "-m"]
        launcher += ["gpu_day.launched", "fsdp2-on-a-cpu"] if self._cpu else ["train_loop"]
        one_device = ("-m", "train_loop") if self._cpu else ("-m", "gpu_day.launched", "one-device")
        accelerate = ("-m", "accelerate.commands.launch", *launcher)
        self.started = {
            "one": [Training(self._folder / "one", given)],
            "fsdp2": [Training(self._folder / "fsdp2", given, before=accelerate)],
            "two": [
                Training(
                    self._folder / "two",
                    given,
                    before=one_device,
                    variables=ranks,
                    log=self._folder / f"two-{ranks['RANK']}.log",
                )
                for ranks in _ranks(2)
            ],
        }

    def _finish(self, name: str) -> Training:
        """The first process of a run that has ended well.

        Raises:
            Skipped: where it was refused, with the words of who refused it.
        """
        for process in self.started[name]:
            code = process.finish()
            text = process.log.read_text(encoding="utf-8", errors="replace")
            refusals = [line for line in text.splitlines() if line.startswith("train-loop: ")]
            if code and refusals and name != "one":
                raise Skipped(one_line(refusals[-1]))
            if code:
                raise RuntimeError(f"exit code {code}: {process.last_line}")
        return self.started[name][0]

    def sharded(self) -> Finding:
        """What the truth sheet says."""
        run = self._finish("fsdp2")
        sheet = json.loads((run.folder / "truth.json").read_text(encoding="utf-8"))
        return same(sheet["processes"]["parallelism"], "FSDP2", f"on {sheet['processes']['each'][0]['device']}")

    def beside_one(self, name: str, number: str, limit: float) -> Finding:
        """A number of each step beside that of one process alone."""
        one, other = ([event[number] for event in self._finish(each).events("step")] for each in ("one", name))
        return at_most(relative(other, one), limit, why=f"{len(one)} steps, relative")


if __name__ == "__main__":
    os.environ.pop("WORLD_SIZE", None)  # whatever started this, its runs are launched from here
    part(checks)
