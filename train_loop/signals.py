"""Polite stopping: a signal asks, and the loop stops after the current step."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Within this context, SIGTERM, SIGINT and SIGUSR1 set `name` instead of ending the process.

    A second SIGINT ends it as usual, for users at the keyboard who cannot wait. If an error `is_lost`, another process
    is gone; then signals stay ignored, because this process still has to find out which one.
    """

    def __init__(self, is_lost: Callable[[BaseException], bool] = lambda error: False) -> None:
        self._is_lost = is_lost
        self.name: str | None = None
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether a signal has arrived, here or at another process."""
        return self.name is not None

    def hear(self, asked: bool) -> bool:
        """Record whether any process was asked to stop, and return `asked`."""
        if asked and self.name is None:
            self.name = "a signal to another process"
        return asked

    def ignore_from_now_on(self) -> None:
        """Keep ignoring the signals after this context ends.

        Launchers signal all processes as soon as the first one has ended, which would change the others' exit codes.
        """
        self._before = dict.fromkeys(STOP_SIGNALS, signal.SIG_IGN)

    def __enter__(self) -> "StopRequest":
        # In Python, only the main thread can receive signals.
        for number in STOP_SIGNALS if threading.current_thread() is threading.main_thread() else ():
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and self._is_lost(error):
            self.ignore_from_now_on()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
