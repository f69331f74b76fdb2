"""The processes of a run watch each other from the first step to the last, and name any process that is lost.

    connecting()        within it, a first collective has to succeed in time
    naming_failures()   within it, each process reports every second that it is alive, and checks the others; if one
                        fails, all stop with one line that says which one failed first

Everything goes through the launcher's key-value store, over a separate connection. A collective that waits for a lost
process does not return until it times out, and with some backends not even then. So a thread ends the process. A
second thread watches the first, because requests to the store have no time-out either.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from train_loop import environment, launchers
from train_loop.config.schema import RunConfig
from train_loop.distributed.preflight import GOES_ON, Preflight
from train_loop.errors import EXIT_FAILED, Interrupted, LostError, one_line
from train_loop.signals import exit_code

_PROCESSES_A_SECOND = 64  # whose heartbeats each process reads: the store has to answer all these requests
_GRACE_SECONDS = 6.0  # from the moment a failure is known until the waiting processes are ended
_SILENCE_SECONDS = 4.0  # once something has failed, a process that is silent for this long is the one that failed
_LEFT = "left"
_STOPPED = "stopped by "  # recorded in place of a failure: a signal interrupted a process, and all end as it does


class Heartbeat:
    """The heartbeats of a run's processes, which first meet in the pre-flight check; see `Preflight`, and its errors.

    With only one process, this class does nothing. `step` returns the step that this process has reached, which the
    others can see. `lost` is called with the reason before this process ends because another one has ended.
    """

    def __init__(self, run: RunConfig, settings: dict[str, Any]) -> None:
        self.step: Callable[[], int] = lambda: 0
        self.lost: Callable[[str], None] = lambda reason: None
        environment.check()
        launchers.check()
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if self.world_size == 1:
            return
        preflight = Preflight(run, settings)
        self.rank, self._roster = preflight.rank, preflight.roster
        self._store, self._address, self._owns_store = preflight.store, preflight.address, preflight.owns_store
        self._patience = float(run.preflight_timeout_seconds)
        self._long_patience = float(run.timeout_seconds)
        self._interval = max(1.0, self.world_size / _PROCESSES_A_SECOND)
        self._deadline: float | None = None
        self._ended = threading.Event()
        self._failure: str | None = None  # which process failed first, as soon as that is known
        self._failed_at = 0.0
        self._store_heard, self._heard = 0.0, [0.0] * self.world_size
        self._texts = [""] * self.world_size
        self._threads = [
            threading.Thread(target=target, name="heartbeat", daemon=True) for target in (self._beat, self._watch_store)
        ]

    @contextmanager
    def connecting(self) -> Iterator[None]:
        """Within this context, the processes have to reach each other in time; LostError names those not reached.

        A second time, they have.
        """
        if self.world_size == 1 or self._threads[0].is_alive():
            yield
            return
        self._store_heard = time.monotonic()
        self._heard = [self._store_heard] * self.world_size
        self._deadline = self._store_heard + self._patience
        for thread in self._threads:
            thread.start()
        try:
            yield
        except RuntimeError as error:
            if not is_communication_error(error):
                raise
            raise LostError(self._unreached() or f"pre-flight: {one_line(error)}; {GOES_ON}") from None
        self._store.set(f"reached/{self.rank}", "")
        self._deadline = None

    def _unreached(self) -> str | None:
        """The line that names the processes that the first collective did not reach, as far as the store knows."""
        others = [each for each in range(self.world_size) if not self._store.check([f"reached/{each}"])]
        others = [each for each in others if each != self.rank] or others
        named = ", ".join(self._name(each) for each in others)
        return f"pre-flight: no connection between {self._name(self.rank)} and {named}; {GOES_ON}" if others else None

    @contextmanager
    def naming_failures(self) -> Iterator[None]:
        """Within this context, if any process fails, all others raise a `LostError` that names it.

        If a signal interrupts one before it trains, it interrupts all.
        """
        if self.world_size == 1:
            yield
            return
        try:
            yield
        except RuntimeError as error:
            if not is_communication_error(error):
                self._tell(error)
                raise
            # This process failed because another one did. Which one?
            line = self._find_out(error)
            self._ended.set()
            self.lost(line)
            if line.startswith(_STOPPED):
                raise Interrupted(line.removeprefix(_STOPPED)) from None
            raise LostError(line, self._speaks()) from None
        except BaseException as error:
            self._tell(error)
            raise
        else:
            self._end()
            self._leave_together()

    def _tell(self, error: BaseException) -> None:
        """Record that this process was the first to fail."""
        try:
            failed = f"{self._name(self.rank)} failed: {one_line(error)}"
            self._record(f"{_STOPPED}{error.name}" if isinstance(error, Interrupted) else failed)
            if self._owns_store:
                time.sleep(2 * self._interval)  # give the others time to read it
        except RuntimeError:  # the store is gone
            pass
        self._end()

    def _leave_together(self) -> None:
        """Leave without being reported lost. A process that owns the store stays until the others have left."""
        try:
            self._store.set(f"alive/{self.rank}", _LEFT)
            began = time.monotonic()
            keys = [f"alive/{process}" for process in range(self.world_size)]
            while self._owns_store and time.monotonic() - began < _GRACE_SECONDS:
                if all(text.decode() == _LEFT for text in self._store.multi_get(keys)):
                    return
                time.sleep(0.05)
        except RuntimeError:  # the store is gone, and so is the process that owned it
            pass

    def _end(self) -> None:
        """End the threads. A thread that waits for a store that does not answer is left behind."""
        self._ended.set()
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(2.0)

    def _beat(self) -> None:
        """A thread that reports that this process is alive, and checks the others."""
        keys = [f"alive/{process}" for process in range(self.world_size)]
        number = 0
        while not self._ended.is_set():
            number += 1
            try:
                self._store.set(keys[self.rank], f"{number} {self.step()}")
                self._take_in([text.decode() for text in self._store.multi_get(keys)])
                if self._store.check(["failure"]) and self._failure is None:
                    self._failed_at, self._failure = time.monotonic(), self._store.get("failure").decode()
                    if self._failure.startswith(_STOPPED):
                        os.kill(os.getpid(), signal.SIGTERM)  # as if it had come here, too; a second one does nothing
                if self._deadline is not None and time.monotonic() > self._deadline and (line := self._unreached()):
                    self._leave(line)
                if self._failure is not None and time.monotonic() - self._failed_at > _GRACE_SECONDS:
                    self._leave(self._failure)
            except RuntimeError:  # the store is gone: the other thread handles that
                pass
            self._ended.wait(self._interval)

    def _take_in(self, texts: list[str]) -> None:
        """Note which processes have been heard from since the last look, and report one that is silent for too long."""
        now = time.monotonic()
        self._store_heard = now
        for process, text in enumerate(texts):
            if text != self._texts[process] or text == _LEFT:
                self._texts[process], self._heard[process] = text, now
        if self._failure is None and (line := self._silent(self._long_patience)):
            self._record(line)

    def _watch_store(self) -> None:
        """A thread that ends the process when the store has not answered for too long."""
        while not self._ended.wait(self._interval / 2):
            patience = self._long_patience if self._deadline is None else self._patience
            if time.monotonic() - self._store_heard > patience:
                self._leave(self._no_store())

    def _no_store(self) -> str:
        """The line that says that the store, and with it process 0, is lost."""
        seconds, here = time.monotonic() - self._store_heard, socket.gethostname()
        lost = f"lost {self._name(0)}, with the store at {self._address}"
        return f"{lost}: {here} has not reached it for {seconds:.0f} s; {GOES_ON}"

    def _silent(self, seconds: float) -> str | None:
        """The line that names a process that has ended or has been silent for this long; None if there is none."""
        here, now = socket.gethostname(), time.monotonic()
        for process, each in enumerate(self._roster):
            if process == self.rank or self._texts[process] == _LEFT:
                continue
            step = self._texts[process].partition(" ")[2]
            at = f" (last heard from at step {step})" if step else ""
            if each["host"] == here and not _lives(each["pid"]):
                # Since the last look at the store, it may have left, or recorded why it ended.
                if self._store.check(["failure"]) or self._store.get(f"alive/{process}").decode() == _LEFT:
                    continue
                return f"lost {self._name(process)}{at}: it was killed, or ended without a word; {GOES_ON}"
            if now - self._heard[process] > seconds:
                return f"lost {self._name(process)}{at}: silent for {now - self._heard[process]:.0f} s; {GOES_ON}"
        return None

    def _find_out(self, error: BaseException) -> str:
        """The line that says which process made a collective fail. Waits a moment for the threads to find out."""
        began = time.monotonic()
        while time.monotonic() - began < _GRACE_SECONDS + self._interval:
            if self._failure is not None:
                return self._failure
            # The store has been silent for long, or the connection to it is broken, which fails at once.
            if time.monotonic() - self._store_heard > _SILENCE_SECONDS + self._interval:
                return self._no_store()
            time.sleep(0.1)
            try:
                if line := self._silent(_SILENCE_SECONDS + self._interval):
                    return self._record(line)
            except RuntimeError:
                continue
        slow = ", ".join(f"{self._name(each)} {text.split()[-1]}" for each, text in enumerate(self._texts) if text)
        return f"no answer, though all processes are alive ({one_line(error)[:120]}; steps: {slow}); {GOES_ON}"

    def _record(self, line: str) -> str:
        """Record this as the first failure, unless there already is one; return the first one."""
        found = self._store.compare_set("failure", "", line).decode()
        if self._failure is None:
            self._failed_at, self._failure = time.monotonic(), found
        return found

    def _leave(self, line: str) -> None:
        """End this process from a thread, because the main thread waits for a process that never answers."""
        if self._ended.is_set():
            return
        self._ended.set()
        self.lost(line)
        if self._speaks():
            print(f"train-loop: {line}", file=sys.stderr, flush=True)
        os._exit(exit_code() if line.startswith(_STOPPED) else EXIT_FAILED)

    def _speaks(self) -> bool:
        """Whether this is the first living process on its host: one line per host is enough."""
        here = socket.gethostname()
        living = [each["local"] for each in self._roster if each["host"] == here and _lives(each["pid"])]
        return int(os.environ.get("LOCAL_RANK", "0")) == min(living, default=0)

    def _name(self, process: int) -> str:
        return f"process {process} ({self._roster[process]['host']})"


def is_communication_error(error: BaseException) -> bool:
    """Whether this error is how a process sees that another one has failed."""
    said = str(error) if isinstance(error, RuntimeError) else ""
    return isinstance(error, torch.distributed.DistError) or "gloo" in said.lower() or "NCCL" in said


def _lives(pid: int) -> bool:
    """Whether a process on this host is running. A process that has ended but still has an entry does not count."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return not os.path.isdir("/proc/self")  # without /proc there is no way to know, so assume that it is alive
