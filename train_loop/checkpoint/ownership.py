"""One run owns its folder for its life: on local and on shared disks, on one host and on several.

    .owner.lock   locked with flock; the kernel lets go of it when the process ends, in whatever way
    .owner.json   who owns the folder (host, process, since when); touched every two seconds, as a sign of life

Some network disks can't lock, or lock only within a host. So the second file counts as well: exactly one process makes
it, and it stays until the run ends. If the run was killed, the next one sees that: the kernel would still hold the
lock, or the process would still be there. Of an owner on another host all there is to see is the sign of life. If there
has been none for a minute, the next run takes the folder over, and an owner that comes back to life after that finds
another one and ends at once.
"""

import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import NoReturn

import psutil

from train_loop import files
from train_loop.console import say
from train_loop.errors import EXIT_FAILED, InputError, one_line

LOCK, RECORD = ".owner.lock", ".owner.json"

_BEAT_SECONDS = 2.0
_STALE_SECONDS = 60.0  # without a sign of life from another host
_SETTLE_SECONDS = 1.0  # until another host that took the folder over at the same moment has been seen
_PATIENCE_SECONDS = 3.0  # with an owner that may be just ending
_LONG_PATIENCE_SECONDS = 40.0  # if a launcher or a queue starts this run again: they kill after 30 s
_POLL_SECONDS = 0.2

_held: set[int] = set()  # handles of locked files


def _let_go_in_child() -> None:
    """A forked child, such as a worker that loads data, must not hold a lock for longer than its parent lives."""
    for handle in _held:
        with suppress(OSError):
            os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


@dataclass(frozen=True)
class Owner:
    """Who owns a folder.

    `kernel` (a boot of a machine), `numbers` (a namespace of process numbers), `pid` and `started` name a process for
    good: containers share host names, and numbers are used again. `lock` names the file that it has locked, as its
    kernel knows it; empty if the disk has no locks.
    """

    token: str
    host: str
    pid: int
    since: str
    kernel: str
    numbers: str
    started: str
    lock: str

    def __str__(self) -> str:
        return f"host {self.host}, process {self.pid}, since {self.since}"

    def lives(self, here: "Owner") -> bool | None:
        """Whether it is running, as far as a process `here` can tell, which has the lock if there is one; else None."""
        if self.kernel != here.kernel:
            return None
        if self.lock and self.lock == here.lock:  # it would have it still
            return False
        return _runs(self.pid, self.started) if self.numbers == here.numbers else None


class Ownership:
    """Owns a folder from `take` to the end of this context.

    `beat` is called every two seconds, from a thread.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.beat: Callable[[], None] = lambda: None
        self._lock, self._record = folder / LOCK, folder / RECORD
        self._made: list[Path] = []  # the folders that were made for it, the innermost first
        self._handle: int | None = None
        self._mine: Owner | None = None
        self._seen: tuple[str, int, float] | None = None  # a sign of life: whose, its time on the disk, seen when
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="ownership", daemon=True)

    def take(self) -> None:
        """Take the folder, and make it if it isn't there; InputError if another run owns it, or it can't be written."""
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"run.output_dir {self.folder}: is a file; name a folder")
        restarts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
        again = any(os.environ.get(name, "0") != "0" for name in restarts)
        patience = time.monotonic() + (_LONG_PATIENCE_SECONDS if again else _PATIENCE_SECONDS)
        said = False
        try:
            while (other := self._try()) is not None:
                owner, lives = other
                name = owner or "it has just begun"
                if lives and time.monotonic() > patience:
                    cure = "wait for it, stop it, or name another folder"
                    raise InputError(f"run.output_dir {self.folder}: in use by another run ({name}); {cure}")
                if not said and (again or lives is None):
                    said = True
                    say(f"run.output_dir {self.folder}: waiting to see whether the run that has it ({name}) ends")
                time.sleep(_POLL_SECONDS)
            files.clear(self.folder)
        except OSError as error:
            problem = f"cannot be written to ({one_line(error)}); name another folder, or make room"
            raise InputError(f"run.output_dir {self.folder}: {problem}") from None
        self._thread.start()

    def __enter__(self) -> "Ownership":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """End the ownership. Folders that were made for it and hold nothing are removed."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._mine is not None:
            with suppress(OSError):
                if (found := _read(self._record)) is not None and found.token == self._mine.token:
                    self._record.unlink()
        if self._mine is not None or self._handle is not None:
            with suppress(OSError):
                if not os.path.lexists(self._record):
                    self._lock.unlink()
        if self._handle is not None:
            self._unlock(self._handle)
        for folder in self._made:
            with suppress(OSError):
                folder.rmdir()
        self._mine = None
        self._made = []

    def _try(self) -> tuple[Owner | None, bool | None] | None:
        """Try to take the folder: None if that worked, else its owner, and whether that lives; see `Owner.lives`."""
        if not self.folder.is_dir():
            missing = [each for each in (self.folder, *self.folder.parents) if not each.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            self._made = self._made or missing
        if not self._take_lock():
            with suppress(FileNotFoundError):
                return _read(self._record), True
            return None, True
        here, stale = _this_process(self._handle), False
        for _ in range(3):
            with suppress(FileExistsError):
                files.create(self._record, json.dumps(asdict(here)) + "\n")
                break
            try:
                owner = _read(self._record)
                lives = None if owner is None else owner.lives(here)
                if lives is None:
                    lives = self._shows_life(owner)
                    stale = True
            except FileNotFoundError:  # it has just ended
                continue
            if lives is not False:
                return owner, lives
            self._put_aside(owner)
        else:
            return None, True
        if stale or not here.lock:
            time.sleep(_SETTLE_SECONDS)
        if (found := _read(self._record)) != here:
            return found, True
        self._mine = here
        return None

    def _take_lock(self) -> bool:
        """Lock the file, if this disk can; False if another process has it."""
        if self._handle is not None:
            return True
        try:
            handle = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # another run, which had made the folder, has just removed it
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return False
        except OSError:  # no locks here
            os.close(handle)
            return True
        self._handle = handle
        _held.add(handle)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(self._lock)):
                return True
        self._unlock(handle)  # its last owner has just removed it
        return False

    def _unlock(self, handle: int) -> None:
        _held.discard(handle)
        os.close(handle)
        self._handle = None

    def _shows_life(self, owner: Owner | None) -> bool | None:
        """Whether an owner on another host has shown a sign of life since the last look; False if it has stopped to."""
        token = "" if owner is None else owner.token
        with open(self._record, "rb") as file:  # opened, because network disks remember the times of closed files
            sign = os.fstat(file.fileno()).st_mtime_ns
        if self._seen is None or self._seen[0] != token:
            self._seen = (token, sign, time.monotonic())
        _, first, since = self._seen
        if sign != first:
            return True
        silent = max(self._disk_time() - sign / 1e9, time.monotonic() - since)
        return False if silent > _STALE_SECONDS else None

    def _disk_time(self) -> float:
        """What time it is for the disk: the clocks of two hosts may differ."""
        try:
            os.utime(self._lock)
            return os.stat(self._lock).st_mtime
        except OSError:
            return time.time()

    def _put_aside(self, owner: Owner | None) -> None:
        """Remove the record of a dead owner, and nothing that another process has put in its place."""
        aside = files.private(self._record)
        with suppress(FileNotFoundError):
            os.rename(self._record, aside)
            with suppress(FileExistsError):
                if _read(aside) != owner:
                    os.link(aside, self._record)
            aside.unlink()

    def _keep(self) -> None:
        """A thread that shows that this run lives, and ends the process if the folder is no longer its own."""
        assert self._mine is not None
        while not self._ended.wait(_BEAT_SECONDS):
            with suppress(OSError):  # a disk may be away for a while
                try:
                    owner = _read(self._record)
                    if owner is not None and owner.token != self._mine.token:
                        self._give_way(owner)
                    os.utime(self._record)
                except FileNotFoundError:
                    files.create(self._record, json.dumps(asdict(self._mine)) + "\n")
                self.beat()

    def _give_way(self, owner: Owner) -> NoReturn:
        """End this process: another run writes to the folder now."""
        why = f"because this one showed no sign of life for {_STALE_SECONDS:.0f} s"
        line = f"train-loop: run.output_dir {self.folder}: another run has taken it over ({owner}), {why}"
        print(line, file=sys.stderr, flush=True)
        os._exit(EXIT_FAILED)


def _this_process(lock: int | None) -> Owner:
    """This process as an owner, with the lock file that it has locked."""
    host, pid = socket.gethostname(), os.getpid()
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        numbers = os.readlink("/proc/self/ns/pid")
    except OSError:
        kernel, numbers = f"{host} {psutil.boot_time():.0f}", ""
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    status = None if lock is None else os.fstat(lock)
    name = "" if status is None else f"{status.st_dev} {status.st_ino}"
    return Owner(secrets.token_hex(16), host, pid, since, kernel, numbers, _started(pid), name)


def _started(pid: int) -> str:
    """What tells a process from another one that had or will have its number; empty if it isn't running."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return "" if stat[0] in "ZX" else stat[19]  # the time since the kernel's start, in its ticks
    except (OSError, IndexError):
        with suppress(psutil.Error):
            return f"{psutil.Process(pid).create_time():.0f}"
        return ""


def _runs(pid: int, started: str) -> bool:
    """Whether a process of this host runs."""
    try:
        os.kill(pid, 0)
    except PermissionError:  # somebody else's, of which nothing more may be visible
        return _started(pid) in ("", started)
    except (OSError, OverflowError):
        return False
    return _started(pid) == started


def _read(path: Path) -> Owner | None:
    """The owner that a file names; None if it is damaged, or being written."""
    try:
        found = Owner(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError):
        return None
    return found if all(isinstance(getattr(found, each.name), each.type) for each in fields(found)) else None  # type: ignore[arg-type]
