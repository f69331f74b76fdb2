"""All processes decide together whether to stop: a signal reaches one of them, and all stop after the same step."""

import time

import torch
from accelerate import Accelerator
from accelerate.utils import gather

from train_loop.signals import StopRequest

_SECONDS_BETWEEN_POLLS = 1.0


class StopPoll:
    """Finds out, about once a second, whether any process was asked to stop; if `alone`, only whether this one was.

    All processes must call it equally often. Most calls exchange nothing. The number of calls between two exchanges
    follows from the time that the slowest process took, so all processes agree on it.
    """

    def __init__(self, accelerator: Accelerator, stop: StopRequest, alone: bool = False) -> None:
        self.accelerator, self.stop = accelerator, stop
        self.alone = alone or accelerator.num_processes == 1
        self.answer = False
        self._every = self._left = 1
        self._last = time.monotonic()

    def __call__(self) -> bool:
        """Whether to stop, as far as this process knows. Once True, it stays True."""
        if self.answer:
            return True
        if self.alone:
            self.answer = self.stop.asked
            return self.answer
        self._left -= 1
        if self._left == 0:
            local = [float(self.stop.asked), time.monotonic() - self._last]
            slowest = gather(torch.tensor(local, device=self.accelerator.device)[None]).max(dim=0).values.tolist()
            self.answer = self.stop.hear(slowest[0] > 0)
            wanted = self._every * _SECONDS_BETWEEN_POLLS / max(slowest[1], 1e-6)
            self._every = self._left = max(1, min(int(wanted), 8 * self._every))
            self._last = time.monotonic()
        return self.answer


def any_rank_stopping(accelerator: Accelerator, stop: StopRequest) -> bool:
    """Whether any process was asked to stop. All processes must call this."""
    return StopPoll(accelerator, stop)()
