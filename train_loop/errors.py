"""The ways in which a command ends early on purpose, and the exit code of each."""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 3


class InputError(Exception):
    """A mistake in the user's input: one line that says what, where, and what would do. Exit code 2."""


class TrainingError(Exception):
    """A run that cannot go on although its input was fine (say, a loss that stays NaN). Exit code 1."""


class LostError(TrainingError):
    """A run that cannot go on because another process or host is gone.

    Args:
        speaks: whether this process says so: one of each host does; the first one where that lives.
    """

    def __init__(self, reason: str, speaks: bool | None = None) -> None:
        super().__init__(reason)
        self.speaks = speaks


def one_line(error: BaseException) -> str:
    """What an exception of a library says, on one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= 300 else f"{text[:297]}...").rstrip(". ")
