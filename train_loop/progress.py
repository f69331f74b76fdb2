"""Progress of long work on stderr: a tqdm bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A bar (or lines) with a count, a rate, the time left where a total is known, and a few named values.

    A closed pipe or log file gets a line every ten seconds and one at the end: a bar's control characters would fill
    it. Silent where `shown` is false, as on every process but the first.
    """

    def __init__(self, title: str, unit: str, total: int | None, start: int = 0, shown: bool = True) -> None:
        self.title, self.unit, self.total, self.count, self.first = title, unit, total, start, start
        self.values = ""
        self.started = self.last_line = time.monotonic()
        terminal = shown and sys.stderr.isatty()
        scaled = unit == "B"
        self.bar = (
            tqdm(total=total, initial=start, desc=title, unit=unit, unit_scale=scaled, dynamic_ncols=True)
            if terminal
            else None
        )
        self.lines = shown and not terminal

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.lines and kind is None:
            self._line()

    def update(self, amount: int, values: str = "") -> None:
        """Count `amount` more; `values` is shown beside the count, e.g. `loss 3.21`."""
        self.count += amount
        self.values = values or self.values
        if self.bar is not None:
            if values:
                self.bar.set_postfix_str(values, refresh=False)
            self.bar.update(amount)
        elif self.lines and time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self._line()

    def _line(self) -> None:
        self.last_line = time.monotonic()
        seconds = self.last_line - self.started
        of = f"/{_scaled(self.total, self.unit)}" if self.total else ""
        parts = [f"{self.title} {_scaled(self.count, self.unit)}{of}", f"{seconds:.0f} s"]
        if self.total and self.first < self.count < self.total:
            left = seconds / (self.count - self.first) * (self.total - self.count)
            parts.append(f"{left:.0f} s left")
        print(", ".join([*parts, self.values] if self.values else parts), file=sys.stderr, flush=True)


def _scaled(count: int, unit: str) -> str:
    return f"{count / 1e6:.1f} MB" if unit == "B" else f"{count} {unit}" if unit != "step" else str(count)


def say(message: str) -> None:
    """One line on stderr, above a bar where one is shown."""
    tqdm.write(message, file=sys.stderr)
    sys.stderr.flush()
