"""Polite stopping: a signal asks, the loop answers after the step it is in."""

import signal
import time
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather

from train_loop.peers import of_communication

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SECONDS_BETWEEN_QUESTIONS = 1.0


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
        if isinstance(error, RuntimeError) and of_communication(error):
            self.ignore_from_now_on()  # there is still to be found out which of the others is gone
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


class Question:
    """Asks all processes about once a second whether one of them was asked to stop.

    All have to ask equally often. How many times go by without an exchange follows from the time that the slowest
    process took, so all agree on it.

    Args:
        accelerator: the processes.
        stop: what this process was asked.
        alone: whether only this process asks, and only itself.
    """

    def __init__(self, accelerator: Accelerator, stop: StopRequest, alone: bool = False) -> None:
        self.accelerator, self.stop = accelerator, stop
        self.alone = alone or accelerator.num_processes == 1
        self.answer = False
        self._every = self._left = 1
        self._last = time.monotonic()

    def __call__(self) -> bool:
        """Whether to stop, as far as is known; once True, always True."""
        if self.answer:
            return True
        if self.alone:
            self.answer = self.stop.asked
            return self.answer
        self._left -= 1
        if self._left == 0:
            mine = [float(self.stop.asked), time.monotonic() - self._last]
            every = gather(torch.tensor(mine, device=self.accelerator.device)[None]).max(dim=0).values.tolist()
            self.answer = self.stop.hear(every[0] > 0)
            wanted = self._every * _SECONDS_BETWEEN_QUESTIONS / max(every[1], 1e-6)
            self._every = self._left = max(1, min(int(wanted), 8 * self._every))
            self._last = time.monotonic()
        return self.answer


def agree(accelerator: Accelerator, stop: StopRequest) -> bool:
    """Whether any process was asked to stop; all must call this."""
    return Question(accelerator, stop)()
