"""Polite stopping: a signal ends what can be started again; a run that trains finishes its step and saves first."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from train_loop.errors import EXIT_DONE, EXIT_STOPPED, Interrupted

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class StopRequest:
    """Within this context, signals don't end the process: SIGTERM, SIGINT, SIGUSR1, and SIGHUP unless under nohup.

    A signal raises `Interrupted` wherever the program is; code that leaves something half done cleans up after itself,
    as after any other error. After `defer`, a signal only sets `name`, and whoever called that looks at it.

    A second SIGINT raises KeyboardInterrupt in any case, for users at the keyboard who cannot wait. If an error
    `is_lost`, another process of the run is gone; then signals stay ignored, because this process still has to find out
    which one.
    """

    def __init__(self, is_lost: Callable[[BaseException], bool] = lambda error: False) -> None:
        self._is_lost = is_lost
        self.name: str | None = None
        self._before: dict[int, Any] = {}
        self._deferring = False

    @property
    def asked(self) -> bool:
        """Whether a signal has arrived, here or at another process."""
        return self.name is not None

    def hear(self, asked: bool) -> bool:
        """Record whether any process was asked to stop, and return `asked`."""
        if asked and self.name is None:
            self.name = "a signal to another process"
        return asked

    def defer(self) -> None:
        """From now on, signals raise nothing: there is something to finish and to save first."""
        self._deferring = True

    def ignore_from_now_on(self) -> None:
        """Keep ignoring the signals after this context ends.

        Launchers signal all processes as soon as the first one has ended, which would change the others' exit codes.
        """
        self._before = dict.fromkeys(self._before, signal.SIG_IGN)

    def __enter__(self) -> "StopRequest":
        # In Python, only the main thread can receive signals.
        for number in STOP_SIGNALS if threading.current_thread() is threading.main_thread() else ():
            # Under nohup, a terminal that is closed shall not matter.
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        interrupted = isinstance(error, Interrupted) and int(os.environ.get("WORLD_SIZE", "1")) > 1
        if interrupted or (error is not None and self._is_lost(error)):
            self.ignore_from_now_on()
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._receive:  # if not, a context within this one left them ignored
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.name is None:
            self.name = signal.Signals(number).name
            if not self._deferring:
                raise Interrupted(self.name)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        # Launchers, and terminals that are closed, send several signals; the first one is being answered.


def exit_code() -> int:
    """The exit code of a run that a signal stopped.

    A launcher that restarts failures would restart it, so there a stop counts as success. status.json says stopped.
    """
    restarts, so_far = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("MAX_RESTARTS", "RESTART_COUNT"))
    return EXIT_DONE if so_far < restarts else EXIT_STOPPED
