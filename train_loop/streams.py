r"""Standard input, output and error of a command, so that no full disk, closed pipe or plain terminal ends it badly.

Whatever a command or a library writes to standard error is lost if it can't be written. Results that can't be written
to standard output end a command that does nothing else; a run goes on to its end. Characters that a terminal's encoding
lacks are escaped: `caf\xe9`.
"""

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


class OutputError(OSError):
    """Standard output can't be written."""


class _Descriptor(io.FileIO):
    """A descriptor whose first failure is kept. Later output is dropped, so Python's own end finds nothing wrong."""

    failure: OSError | None = None
    strict = False

    def write(self, content: Any) -> int:
        """Write bytes, and return how many; OutputError if that fails for the first time and the output is strict."""
        size = memoryview(content).nbytes
        if self.failure is not None:
            return size
        try:
            written = super().write(content)
        except OSError as error:
            self.failure = error
            if self.strict:
                raise OutputError(*error.args) from None
            return size
        return size if written is None else written


@contextmanager
def unbreakable(strict: bool) -> Iterator[Callable[[], OSError | None]]:
    """Within this context, standard output and error take everything; if `strict`, a lost output is an OutputError.

    Yields what writes the rest of the output, and returns why it can't be written, or None. Streams without a
    descriptor, such as those of a notebook or a test, stay as they are.
    """
    before = sys.stdin, sys.stdout, sys.stderr
    for number in range(3):
        _fill(number)
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")
    output = _replace("stdout", 1, strict)
    _replace("stderr", 2, False)

    def rest() -> OSError | None:
        with suppress(OutputError):
            sys.stdout.flush()
        return None if output is None else output.failure

    try:
        yield rest
    finally:
        rest()
        sys.stderr.flush()
        sys.stdin, sys.stdout, sys.stderr = before


def _replace(name: str, number: int, strict: bool) -> _Descriptor | None:
    """Put an unbreakable stream in the place of one of `sys`, and return its descriptor; None if it has none."""
    stream = getattr(sys, name)
    try:
        if stream is not None:
            number = stream.fileno()
            stream.flush()
        raw = _Descriptor(number, "w", closefd=False)
    except (AttributeError, OSError, ValueError):
        return None
    raw.strict = strict
    at_once = name == "stderr" or raw.isatty() or getattr(stream, "write_through", False)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    text = io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=at_once)
    setattr(sys, name, text)
    return raw


def _fill(number: int) -> None:
    """Open a closed descriptor, for nothing; otherwise the next file would get its number, and others' output."""
    try:
        os.fstat(number)
    except OSError:
        opened = os.open(os.devnull, os.O_WRONLY if number == 0 else os.O_RDONLY)  # so that using it still fails
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)
