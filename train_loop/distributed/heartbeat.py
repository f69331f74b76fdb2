"""Who else trains: called together before the first step, watched until the last one, named when lost.

    Peers(...)      every process reports its host, device, versions and settings; who is missing or different is named
    reaching()      within it a first collective has to succeed, in time
    named()         within it each says every second that it lives, and looks whether the others do; where one fails,
                    all stop with one line that says who was the first

All of it goes through the launcher's key-value store, over a connection of its own. A collective that waits for a lost
process does not return until it times out, and with some backends not even then; so a thread ends the process. Another
one watches the first, whose requests to the store have no time-out either.
"""

import json
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, TCPStore

from train_loop import devices, versions
from train_loop.config.schema import RunConfig
from train_loop.errors import EXIT_FAILED, InputError, LostError, one_line

_GOES_ON = "the same command goes on from the newest checkpoint"
_PROCESSES_A_SECOND = 64  # whose signs of life each process reads: the store has to answer all of them
_GRACE_SECONDS = 6.0  # from a failure that is known to the end of those who wait for it
_SILENCE_SECONDS = 4.0  # after which, once something has failed, silence means that it was this one
_LEFT = "left"


def report(settings: dict[str, Any]) -> dict[str, Any]:
    """What a process says about itself before it trains."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    kind = torch.accelerator.current_accelerator(check_available=True)
    device = torch.device("cpu") if kind is None else torch.device(kind.type, local)
    found = versions.installed() | {"python": ".".join(platform.python_version_tuple()[:2])}
    if torch.distributed.is_nccl_available() and device.type == "cuda":
        found["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "local": local,
        "device": devices.name(device),
        "versions": found,
        "settings": settings,
    }


def difference(reports: list[dict[str, Any]]) -> str | None:
    """The first thing that two processes must share and don't, named with both; None where there is none.

    Args:
        reports: of all processes, in their order.
    """
    first = reports[0]
    for process, other in enumerate(reports):
        for kind, what, cure in (
            ("versions", "the version of", "install the same on every host (pip install -c constraints.txt)"),
            ("settings", "the configuration differs:", "give every host the same settings"),
        ):
            for key in sorted(first[kind].keys() | other[kind].keys()):
                one, two = first[kind].get(key), other[kind].get(key)
                if one != two:
                    return (
                        f"{what} {key} is {one} on process 0 ({first['host']}) and {two} on process {process} "
                        f"({other['host']}); {cure}"
                    )
    return None


class Peers:
    """The processes of a run, called together.

    Where there is only one, nothing here does anything.

    Args:
        run: its two time-outs.
        settings: what all processes must share, by name.

    Attributes:
        step: says how far this process is; heard by the others.
        lost: called with the reason before this process ends because another one has.

    Raises:
        InputError: when two processes differ, naming what, and both.
        LostError: when somebody does not come within `run.preflight_timeout_seconds`, naming who.
    """

    def __init__(self, run: RunConfig, settings: dict[str, Any]) -> None:
        self.step: Callable[[], int] = lambda: 0
        self.lost: Callable[[str], None] = lambda reason: None
        self.processes = int(os.environ.get("WORLD_SIZE", "1"))
        if self.processes == 1 or not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            self.processes = 1
            return
        self.me = int(os.environ["RANK"])
        self._patience = float(run.preflight_timeout_seconds)
        self._long_patience = float(run.timeout_seconds)
        self._interval = max(1.0, self.processes / _PROCESSES_A_SECOND)
        self._deadline: float | None = None
        self._ended = threading.Event()
        self._failure: str | None = None  # who failed first, as soon as that is known
        self._failed_at = 0.0
        self._store, self._address, self._is_ours = self._connect()
        self._roster = self._call(report(settings))
        self._store_heard, self._heard = 0.0, [0.0] * self.processes
        self._texts = [""] * self.processes
        self._threads = [
            threading.Thread(target=target, name="peers", daemon=True) for target in (self._beat, self._watch_store)
        ]

    # Before the process group exists.

    def _connect(self) -> tuple[PrefixStore, str, bool]:
        """A connection of our own to the launcher's store, its address, and whether it ends with this process.

        A launcher that has restarted its processes may hand them the store of before, with the addresses of those who
        are gone; then the first process opens a new one.
        """
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        is_ours = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        try:
            store = self._open(host, port, is_ours)
            if attempt and not is_ours:
                key = f"attempt {attempt}"
                if self.me == 0:
                    with socket.socket() as free:
                        free.bind(("", 0))
                        store.set(key, str(free.getsockname()[1]))
                port = int(store.get(key))
                os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
                is_ours = True
                store = self._open(host, port, is_ours)
            number = store.add(f"peers/{self.me}", 1)  # a process may do several runs, one after the other
        except RuntimeError as error:
            raise LostError(
                f"pre-flight: {socket.gethostname()} cannot reach process 0 at {host}:{port} within "
                f"{self._patience:.0f} s ({one_line(error)[:100]}); {_GOES_ON}"
            ) from None
        return PrefixStore(f"peers/{number}", store), f"{host}:{port}", is_ours and self.me == 0

    def _open(self, host: str, port: int, is_ours: bool) -> TCPStore:
        patience = timedelta(seconds=self._patience)
        first = is_ours and self.me == 0
        return TCPStore(host, port, None, first, patience, wait_for_workers=False, multi_tenant=True)

    def _call(self, mine: dict[str, Any]) -> list[dict[str, Any]]:
        """Exchange reports; the first process compares them."""
        began = time.monotonic()
        self._store.set(f"alive/{self.me}", "0")
        self._store.set(f"report/{self.me}", json.dumps(mine))

        def there(process: int) -> bool:
            return bool(self._store.check([f"report/{process}"]))

        def wait(keys: list[str]) -> bool:
            while not all(self._store.check([key]) for key in keys):
                if time.monotonic() - began > self._patience:
                    return False
                time.sleep(0.1)
            return True

        everybody = range(self.processes)
        if self.me == 0:
            if wait([f"report/{process}" for process in everybody]):
                reports = [json.loads(self._store.get(f"report/{process}")) for process in everybody]
                roster = [{name: each[name] for name in ("host", "pid", "local")} for each in reports]
                mistake = difference(reports)
                verdict: dict[str, Any] = {"mistake": mistake} if mistake else {"roster": roster}
            else:
                verdict = {"lost": self._missing([process for process in everybody if not there(process)], mine)}
            self._store.set("verdict", json.dumps(verdict))
        else:
            if wait(["report/0"]):
                began = time.monotonic()  # the first process may have come a moment ago, and waits for others
            if wait(["verdict"]):
                verdict = json.loads(self._store.get("verdict"))
            else:
                verdict = {"lost": self._missing([process for process in everybody if not there(process)] or [0], mine)}
        if self._is_ours and "roster" not in verdict:
            time.sleep(1)  # let the others read it
        if "lost" in verdict:
            raise LostError(verdict["lost"])
        if "mistake" in verdict:
            raise InputError(verdict["mistake"])
        return list(verdict["roster"])

    def _missing(self, processes: list[int], mine: dict[str, Any]) -> str:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        machines = sorted({process // here for process in processes})
        return (
            f"pre-flight: {_list('process', processes)} of {self.processes} did not come within {self._patience:.0f} s "
            f"({_list('machine', machines)}, counted from 0 as in --machine_rank; this is {mine['host']}); see what is "
            f"wrong there; {_GOES_ON}"
        )

    # From then on.

    @contextmanager
    def reaching(self) -> Iterator[None]:
        """Within this context, in `preflight_timeout_seconds`, the processes have to reach each other.

        Raises:
            LostError: naming who was not reached.
        """
        if self.processes == 1:
            yield
            return
        self._deadline = time.monotonic() + self._patience
        self._start()
        try:
            yield
        except RuntimeError as error:
            if not is_communication_error(error):
                raise
            raise LostError(self._unreached() or f"pre-flight: {one_line(error)}; {_GOES_ON}") from None
        self._store.set(f"reached/{self.me}", "")
        self._deadline = None

    def _unreached(self) -> str | None:
        """Who did not get through the first collective, as far as the store tells."""
        others = [each for each in range(self.processes) if not self._store.check([f"reached/{each}"])]
        others = [each for each in others if each != self.me] or others
        named = ", ".join(self._name(each) for each in others)
        return f"pre-flight: no connection between {self._name(self.me)} and {named}; {_GOES_ON}" if others else None

    @contextmanager
    def named(self) -> Iterator[None]:
        """Within this context, a failure of any process becomes, on all others, a `LostError` that names it."""
        if self.processes == 1:
            yield
            return
        try:
            yield
        except RuntimeError as error:
            if not is_communication_error(error):
                self._tell(error)
                raise
            # This one has failed because another one has. Which?
            line = self._find_out(error)
            self._ended.set()
            self.lost(line)
            raise LostError(line, self._speaks()) from None
        except BaseException as error:
            self._tell(error)
            raise
        else:
            self._end()
            self._leave_together()

    def _tell(self, error: BaseException) -> None:
        """Put down that this process is the first to have failed."""
        try:
            self._record(f"{self._name(self.me)} failed: {one_line(error)}")
            if self._is_ours:
                time.sleep(2 * self._interval)  # let the others read it
        except RuntimeError:  # without a store
            pass
        self._end()

    def _leave_together(self) -> None:
        """Let nobody miss this process; it stays until the others have gone, where the store ends with it."""
        try:
            self._store.set(f"alive/{self.me}", _LEFT)
            began = time.monotonic()
            keys = [f"alive/{process}" for process in range(self.processes)]
            while self._is_ours and time.monotonic() - began < _GRACE_SECONDS:
                if all(text.decode() == _LEFT for text in self._store.multi_get(keys)):
                    return
                time.sleep(0.05)
        except RuntimeError:  # the store is gone, and with it those who had it
            pass

    def _start(self) -> None:
        self._store_heard = time.monotonic()
        self._heard = [self._store_heard] * self.processes
        for thread in self._threads:
            thread.start()

    def _end(self) -> None:
        """End the threads; one that waits for a store which does not answer is left."""
        self._ended.set()
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(2.0)

    def _beat(self) -> None:
        """A thread: say that this process lives, and look at the others."""
        keys = [f"alive/{process}" for process in range(self.processes)]
        number = 0
        while not self._ended.is_set():
            number += 1
            try:
                self._store.set(keys[self.me], f"{number} {self.step()}")
                texts = [text.decode() for text in self._store.multi_get(keys)]
                self._take_in(texts)
                if self._store.check(["failure"]) and self._failure is None:
                    self._failed_at, self._failure = time.monotonic(), self._store.get("failure").decode()
                if self._deadline is not None and time.monotonic() > self._deadline and (line := self._unreached()):
                    self._leave(line)
            except RuntimeError:  # the store is gone: its own thread sees to that
                self._ended.wait(self._interval)
                continue
            if self._failure is not None and time.monotonic() - self._failed_at > _GRACE_SECONDS:
                self._leave(self._failure)
            self._ended.wait(self._interval)

    def _take_in(self, texts: list[str]) -> None:
        now = time.monotonic()
        self._store_heard = now
        for process, text in enumerate(texts):
            if text != self._texts[process] or text == _LEFT:
                self._texts[process], self._heard[process] = text, now
        if self._failure is None and (line := self._silent(self._long_patience)):
            self._record(line)

    def _watch_store(self) -> None:
        """A thread: end the process when the store has not answered for too long."""
        while not self._ended.wait(self._interval / 2):
            patience = self._long_patience if self._deadline is None else self._patience
            if time.monotonic() - self._store_heard > patience:
                self._leave(self._no_store())

    def _no_store(self) -> str:
        seconds = time.monotonic() - self._store_heard
        return (
            f"lost {self._name(0)}, with the store at {self._address}: not reached from {socket.gethostname()} for "
            f"{seconds:.0f} s; {_GOES_ON}"
        )

    def _silent(self, seconds: float) -> str | None:
        """The line that names a process which has ended, or was not heard of for so long."""
        here, now = socket.gethostname(), time.monotonic()
        for process, each in enumerate(self._roster):
            if process == self.me or self._texts[process] == _LEFT:
                continue
            step = self._texts[process].partition(" ")[2]
            at = f" (last heard of at step {step})" if step else ""
            if each["host"] == here and not _lives(each["pid"]):
                # It may have left, or told why it ends, since the last look at the store.
                if self._store.check(["failure"]) or self._store.get(f"alive/{process}").decode() == _LEFT:
                    continue
                return f"lost {self._name(process)}{at}: it was killed, or ended without a word; {_GOES_ON}"
            if now - self._heard[process] > seconds:
                return f"lost {self._name(process)}{at}: silent for {now - self._heard[process]:.0f} s; {_GOES_ON}"
        return None

    def _find_out(self, error: BaseException) -> str:
        """Who has made a collective fail: looked for, for a moment, in what the threads have heard."""
        began = time.monotonic()
        while time.monotonic() - began < _GRACE_SECONDS + self._interval:
            if self._failure is not None:
                return self._failure
            # Long silence of the store, or a broken connection to it, which fails at once.
            if time.monotonic() - self._store_heard > _SILENCE_SECONDS + self._interval:
                return self._no_store()
            time.sleep(0.1)
            try:
                if line := self._silent(_SILENCE_SECONDS + self._interval):
                    return self._record(line)
            except RuntimeError:
                continue
        slow = ", ".join(f"{self._name(each)} {text.split()[-1]}" for each, text in enumerate(self._texts) if text)
        return f"no answer, though all processes live ({one_line(error)[:120]}; steps: {slow}); {_GOES_ON}"

    def _record(self, line: str) -> str:
        """Make this the first failure, unless there is one; returns the first."""
        found = self._store.compare_set("failure", "", line).decode()
        if self._failure is None:
            self._failed_at, self._failure = time.monotonic(), found
        return found

    def _leave(self, line: str) -> None:
        """End this process from a thread: the main one waits for somebody who does not come."""
        if self._ended.is_set():
            return
        self._ended.set()
        self.lost(line)
        if self._speaks():
            print(f"train-loop: {line}", file=sys.stderr, flush=True)
        os._exit(EXIT_FAILED)

    def _speaks(self) -> bool:
        """Whether this process is the first on its host that lives: one line for each host is enough."""
        here = socket.gethostname()
        living = [each["local"] for each in self._roster if each["host"] == here and _lives(each["pid"])]
        return int(os.environ.get("LOCAL_RANK", "0")) == min(living, default=0)

    def _name(self, process: int) -> str:
        return f"process {process} ({self._roster[process]['host']})"


def is_communication_error(error: RuntimeError) -> bool:
    """Whether this is what a process sees of another one's failure."""
    said = str(error)
    return isinstance(error, torch.distributed.DistError) or "gloo" in said.lower() or "NCCL" in said


def _lives(pid: int) -> bool:
    """Whether a process of this host runs; one that has ended and is not yet buried does not."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return not os.path.isdir("/proc/self")  # no /proc, no way to know


def _list(noun: str, numbers: list[int]) -> str:
    shown = ", ".join(str(number) for number in numbers[:8]) + (", ..." if len(numbers) > 8 else "")
    plural = "es" if noun.endswith("s") else "s"
    return f"{noun}{plural if len(numbers) > 1 else ''} {shown}"
