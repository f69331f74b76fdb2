"""Polite stopping: a signal asks, the loop answers after the step it is in."""

import signal
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Within this context SIGTERM, SIGINT and SIGUSR1 set `name` instead of ending the process.

    A second SIGINT ends it as usual, for somebody at the keyboard who cannot wait.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
