"""Polite stopping: a signal asks, the loop answers after the step it is in."""

import signal
from types import FrameType, TracebackType
from typing import Any

from train_loop.distributed.heartbeat import is_communication_error

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Within this context SIGTERM, SIGINT and SIGUSR1 set `name` instead of ending the process.

    A second SIGINT ends it as usual, for somebody at the keyboard who cannot wait.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether a signal has come (or another process has told of one)."""
        return self.name is not None

    def hear(self, asked: bool) -> bool:
        """Take in that some process was asked to stop; returns `asked`."""
        if asked and self.name is None:
            self.name = "a signal to another process"
        return asked

    def ignore_from_now_on(self) -> None:
        """Let this context end with the signals ignored: who is leaving is not to be hurried.

        Launchers signal all processes as soon as the first one has left, which would change the others' exit code.
        """
        self._before = dict.fromkeys(STOP_SIGNALS, signal.SIG_IGN)

    def __enter__(self) -> "StopRequest":
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, RuntimeError) and is_communication_error(error):
            self.ignore_from_now_on()  # there is still to be found out which of the others is gone
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
