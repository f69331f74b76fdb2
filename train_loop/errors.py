"""The ways in which a command ends early on purpose, each with its exit code."""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 3
EXIT_NO_READER = 141  # 128 + SIGPIPE, as of other commands whose output nobody reads any more


class InputError(Exception):
    """A mistake in the user's input: one line that says what is wrong, where, and what would fix it. Exit code 2."""

    def __str__(self) -> str:
        return printable(super().__str__())


class TrainingError(Exception):
    """A run cannot go on although its input was fine (for example, the loss stays NaN). Exit code 1."""


class LostError(TrainingError):
    """A run cannot go on because another process or host is gone. The first living process of each host `speaks`."""

    def __init__(self, reason: str, speaks: bool | None = None) -> None:
        super().__init__(reason)
        self.speaks = speaks


class Interrupted(KeyboardInterrupt):
    """A signal came while there was nothing to save: the same command starts again. Exit code 3.

    No `except Exception` on its way catches it. `name` is the signal's.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"stopped by {name}")
        self.name = name


def one_line(error: BaseException) -> str:
    """The message of a library's exception, on one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= 300 else f"{text[:297]}...").rstrip(". ")


def printable(text: str) -> str:
    """A text on one line, with escapes in place of whatever might move a terminal's cursor: names can hold anything."""
    line = " ".join(text.splitlines())
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
