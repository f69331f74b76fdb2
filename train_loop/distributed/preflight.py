"""Before the first step, all processes report what they are, and any process that is missing or different is named.

Everything goes through the launcher's key-value store, over a separate connection.
"""

import json
import os
import platform
import socket
import time
from datetime import timedelta
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from torch.distributed import PrefixStore, TCPStore

from train_loop import devices, versions
from train_loop.config.schema import RunConfig
from train_loop.errors import InputError, LostError, one_line

GOES_ON = "the same command resumes from the newest checkpoint"


# Variables in which a launcher chooses how many processes there are, and what they share.
_CHOICES = ("WORLD_SIZE", "ACCELERATE_USE_FSDP", "FSDP_", "PARALLELISM_CONFIG_")


def report(settings: dict[str, Any]) -> dict[str, Any]:
    """What a process reports about itself before it trains."""
    chosen = {name: value for name, value in os.environ.items() if name.startswith(_CHOICES)}
    told, kind = os.environ.get("LOCAL_RANK"), torch.accelerator.current_accelerator(check_available=True)
    found = versions.installed() | {"python": ".".join(platform.python_version_tuple()[:2])}
    if torch.distributed.is_nccl_available() and kind is not None and kind.type == "cuda":
        found["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "local": None if told is None else int(told),
        "devices": [] if kind is None or parse_flag_from_env("ACCELERATE_USE_CPU") else devices.identities(kind),
        "versions": found,
        "settings": settings | chosen,
    }


def difference(reports: list[dict[str, Any]]) -> str | None:
    """The first thing that two processes must share but don't, as a line that names both; None if all agree."""
    first = reports[0]
    for process, other in enumerate(reports):
        for kind, what, cure, absent in (
            ("versions", "the version of", "install the same on every host (pip install -c constraints.txt)", None),
            ("settings", "the configuration differs:", "give every host the same settings", "not set"),
        ):
            for key in sorted(first[kind].keys() | other[kind].keys()):
                one, two = (each[kind].get(key, absent) for each in (first, other))
                if one != two:
                    return (
                        f"{what} {key} is {one} on process 0 ({first['host']}) and {two} on process {process} "
                        f"({other['host']}); {cure}"
                    )
    return None


def places(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Host, pid and local rank of each process, and how many there are on its host.

    Where the launcher told no local rank, it is the number of earlier processes on that host.
    """
    hosts = [each["host"] for each in reports]
    found = []
    for process, each in enumerate(reports):
        local = hosts[:process].count(each["host"]) if each["local"] is None else each["local"]
        found.append({"host": each["host"], "pid": each["pid"], "local": local, "beside": hosts.count(each["host"])})
    return found


def shared_device(reports: list[dict[str, Any]], roster: list[dict[str, Any]]) -> str | None:
    """Two processes that would use the same device, as a line; None if each has its own.

    A process takes the visible device with its local rank's number; if there are fewer, Accelerate counts round.
    """
    taken: dict[str, int] = {}
    for process, (each, place) in enumerate(zip(reports, roster, strict=True)):
        if visible := each["devices"]:
            other = taken.setdefault(visible[place["local"] % len(visible)], process)
            if other != process:
                return (
                    f"processes {other} and {process} would share one device of {place['host']}, where process "
                    f"{process} has LOCAL_RANK {place['local']} and sees {len(visible)}; start one process for each "
                    "device, and give each a LOCAL_RANK of its own, from 0"
                )
    return None


def verdict(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """What the first process answers to the reports of all: {"roster": ...}, or {"mistake": line}."""
    roster = places(reports)
    mistake = difference(reports) or shared_device(reports, roster)
    return {"mistake": mistake} if mistake else {"roster": roster}


class Preflight:
    """The meeting of a run's processes, started by a launcher, before it begins. `settings` are what all must share.

    `store` and `address` are the connection, which ends with this process if `owns_store`; `roster` has the place of
    each process (`places`). LOCAL_RANK and LOCAL_WORLD_SIZE are set from it if the launcher did not. Raises InputError
    if two processes differ, naming both and what differs, and LostError naming a process that does not arrive within
    `run.preflight_timeout_seconds`.
    """

    def __init__(self, run: RunConfig, settings: dict[str, Any]) -> None:
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._patience = float(run.preflight_timeout_seconds)
        self.store, self.address, self.owns_store = self._connect()
        self.roster = self._exchange(report(settings))
        own = self.roster[self.rank]
        os.environ.setdefault("LOCAL_RANK", str(own["local"]))
        os.environ.setdefault("LOCAL_WORLD_SIZE", str(own["beside"]))

    def _connect(self) -> tuple[PrefixStore, str, bool]:
        """A separate connection to the launcher's store, its address, and whether the store ends with this process.

        A launcher that restarts its processes may give them the old store, with the addresses of processes that are
        gone. In that case the first process opens a new store.
        """
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        is_ours = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        attempt, patience = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")), timedelta(seconds=self._patience)

        def connect() -> TCPStore:
            first = is_ours and self.rank == 0
            return TCPStore(host, port, None, first, patience, wait_for_workers=False, multi_tenant=True)

        try:
            store = connect()
            if attempt and not is_ours:
                key = f"attempt {attempt}"
                if self.rank == 0:
                    with socket.socket() as free:
                        free.bind(("", 0))
                        store.set(key, str(free.getsockname()[1]))
                port = int(store.get(key))
                os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
                is_ours = True
                store = connect()
            number = store.add(f"peers/{self.rank}", 1)  # one process may do several runs, one after the other
        except RuntimeError as error:
            raise LostError(
                f"pre-flight: {socket.gethostname()} cannot reach process 0 at {host}:{port} within "
                f"{self._patience:.0f} s ({one_line(error)[:100]}); {GOES_ON}"
            ) from None
        return PrefixStore(f"peers/{number}", store), f"{host}:{port}", is_ours and self.rank == 0

    def _exchange(self, own: dict[str, Any]) -> list[dict[str, Any]]:
        """Exchange reports, which the first process compares; return the roster."""
        began = time.monotonic()
        self.store.set(f"alive/{self.rank}", "0")
        self.store.set(f"report/{self.rank}", json.dumps(own))

        def wait(*keys: str) -> bool:
            """Wait for some keys; False if they don't all come in time."""
            while not all(self.store.check([key]) for key in keys):
                if time.monotonic() - began > self._patience:
                    return False
                time.sleep(0.1)
            return True

        keys = [f"report/{process}" for process in range(self.world_size)]
        if self.rank and wait(keys[0]):
            began = time.monotonic()  # the first process may only just have come, and waits for others
        if not wait(*(["verdict"] if self.rank else keys)):
            missing = [process for process, key in enumerate(keys) if not self.store.check([key])]
            answer: dict[str, Any] = {"lost": self._missing(missing or [0], own)}
        elif self.rank:
            answer = json.loads(self.store.get("verdict"))
        else:
            answer = verdict([json.loads(self.store.get(key)) for key in keys])
        if self.rank == 0:
            self.store.set("verdict", json.dumps(answer))
        if self.owns_store and "roster" not in answer:
            time.sleep(1)  # give the others time to read it
        if "lost" in answer:
            raise LostError(answer["lost"])
        if "mistake" in answer:
            raise InputError(answer["mistake"])
        return list(answer["roster"])

    def _missing(self, processes: list[int], own: dict[str, Any]) -> str:
        """The line that names the processes that did not report, and their machines."""
        where = ""
        if here := int(os.environ.get("LOCAL_WORLD_SIZE", "0")):
            machines = sorted({process // here for process in processes})
            where = f"{_list('machine', machines)}, counted from 0 as in --machine_rank; "
        return (
            f"pre-flight: {_list('process', processes)} of {self.world_size} did not report within "
            f"{self._patience:.0f} s ({where}this is {own['host']}); check what is wrong there; {GOES_ON}"
        )


def _list(noun: str, numbers: list[int]) -> str:
    """A noun with its numbers: `processes 1, 3`; at most eight of them."""
    shown = ", ".join(str(number) for number in numbers[:8]) + (", ..." if len(numbers) > 8 else "")
    plural = ("es" if noun.endswith("s") else "s") if len(numbers) > 1 else ""
    return f"{noun}{plural} {shown}"
