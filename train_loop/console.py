"""Progress of long work on stderr: a tqdm bar on a terminal, otherwise a plain line now and then.

    training 400/1100, 1 min 02 s, 1 min 48 s left, ▇▅▄▃▃▂▂▂▁▂▁▁▁ loss 4.9127, 6,812 tokens/s

The blocks show the loss of the whole run so far, from its first step on the left to its last on the right.
"""

import math
import sys
import time
from contextlib import suppress
from typing import Any

# tqdm is imported when it is first used: that takes half as long as `--help` does in all.

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_LOOKS = 0.1  # between updates of the bar's values
_BLOCKS, _PLAIN = "▁▂▃▄▅▆▇█", "_.-=*#"  # low to high


class Sparkline:
    """A curve of any length in at most `width` characters.

    Values are kept as means of stretches. When there are twice as many stretches as characters, neighbours are merged.
    So adding a value costs the same at any length.
    """

    def __init__(self, width: int = 16) -> None:
        self.width = width
        self._means: list[float] = []
        self._stretch = 1  # values per mean
        self._sum, self._count = 0.0, 0

    def add(self, value: float) -> None:
        """Add a value; values that are not finite are left out."""
        if not math.isfinite(value):
            return
        self._sum += value
        self._count += 1
        if self._count < self._stretch:
            return
        self._means.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self._means) == 2 * self.width:
            self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
            self._stretch *= 2

    def text(self, encoding: str | None) -> str:
        """The curve, scaled from its lowest to its highest value; in ASCII if the encoding is not UTF-8."""
        signs = _BLOCKS if (encoding or "").lower().replace("-", "").startswith("utf8") else _PLAIN
        count, drawn = len(self._means), min(len(self._means), self.width)
        parts = [self._means[count * place // drawn : count * (place + 1) // drawn] for place in range(drawn)]
        means = [sum(part) / len(part) for part in parts]
        if len(means) < 2:
            return ""
        low, high = min(means), max(means)
        scale = (len(signs) - 1) / (high - low) if high > low else 0.0
        return "".join(signs[round((mean - low) * scale)] for mean in means)


class Progress:
    """A bar (or lines) with a count, a rate, a few named values and, if the total is known, the time left.

    A pipe or log file gets a line every ten seconds and one at the end, because a bar's control characters would fill
    it up. Nothing is printed if `shown` is false, as on every process except the first.
    """

    def __init__(self, title: str, unit: str, total: int | None, start: int = 0, shown: bool = True) -> None:
        self.title, self.unit, self.total, self.count, self.first = title, unit, total, start, start
        self.values, self.shown = "", shown
        self.curve = Sparkline()
        self.last_look = 0.0
        self.started = self.last_line = time.monotonic()
        self.bar: Any = None
        if shown and STDERR.isatty():
            from tqdm import tqdm

            scaled = unit == "B"
            amounts: dict[str, Any] = {"total": total, "initial": start, "unit": unit, "unit_scale": scaled}
            self.bar = tqdm(desc=title, dynamic_ncols=True, file=STDERR, **amounts)
        self.lines = shown and self.bar is None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self.bar is not None:
            if self.values:
                self.bar.set_postfix_str(self._values(), refresh=False)
            self.bar.close()
        elif self.lines and kind is None:
            self._line()

    def update(self, amount: int, values: str = "", curve: float | None = None) -> None:
        """Count `amount` more, and show `values` next to it, e.g. `loss 3.21`, after the curve with its next value."""
        self.count += amount
        self.values = values or self.values
        if curve is not None and (self.bar is not None or self.lines):
            self.curve.add(curve)
        if self.bar is not None:
            now = time.monotonic()
            if self.values and now - self.last_look > SECONDS_BETWEEN_LOOKS:
                self.last_look = now
                self.bar.set_postfix_str(self._values(), refresh=False)
            self.bar.update(amount)
        elif self.lines and time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self._line()

    def _values(self) -> str:
        return " ".join(each for each in (self.curve.text(STDERR.encoding), self.values) if each)

    def _line(self) -> None:
        """Print a line of progress."""
        self.last_line = time.monotonic()
        seconds = self.last_line - self.started
        of = f"/{_scaled(self.total, self.unit)}" if self.total else ""
        parts = [f"{self.title} {_scaled(self.count, self.unit)}{of}", duration(seconds)]
        if self.total and self.first < self.count < self.total:
            left = seconds / (self.count - self.first) * (self.total - self.count)
            parts.append(f"{duration(left)} left")
        STDERR.write(", ".join([*parts, self._values()] if self.values else parts) + "\n")


def shown(value: object, digits: int = 4) -> str:
    """A number with so many digits after the point, a very large one in powers of ten; what is none is "not known"."""
    if not isinstance(value, int | float):
        return "not known"
    return f"{value:.{digits}f}" if abs(value) < 1e9 or math.isnan(value) else f"{value:.6g}"


def duration(seconds: float) -> str:
    """Seconds in readable form: 42 s, 3 min 07 s, 2 h 05 min, 3 d 4 h."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def _scaled(count: int, unit: str) -> str:
    """A count with its unit; bytes in MB, steps without a unit."""
    return f"{count / 1e6:.1f} MB" if unit == "B" else f"{count} {unit}" if unit != "step" else str(count)


def say(message: str) -> None:
    """Print one line on stderr, above the bar if one is shown."""
    from tqdm import tqdm

    tqdm.write(message, file=STDERR)


class _Stderr:
    """Standard error as it is now. What can't be written there is lost, and ends nothing: the run matters more."""

    @property
    def encoding(self) -> str:
        """Of what is written."""
        return getattr(sys.stderr, "encoding", None) or "ascii"

    def write(self, text: str) -> None:
        """Write and flush text; characters that the encoding lacks are escaped."""
        # A full disk, a pipe or terminal that is gone; a closed stream; None.
        with suppress(OSError, ValueError, AttributeError):
            try:
                sys.stderr.write(text)
            except UnicodeEncodeError:
                sys.stderr.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
            sys.stderr.flush()

    def flush(self) -> None:
        """Nothing is held back."""

    def isatty(self) -> bool:
        """Whether a person looks on."""
        with suppress(ValueError, AttributeError):
            return sys.stderr.isatty()
        return False

    def fileno(self) -> int:
        """The descriptor, which tqdm asks for the width."""
        return sys.stderr.fileno()


STDERR = _Stderr()
