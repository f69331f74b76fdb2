"""The two ways in which a command ends early on purpose, and the exit code of each."""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 3


class InputError(Exception):
    """A mistake in the user's input: one line that says what, where, and what would do. Exit code 2."""


class TrainingError(Exception):
    """A run that cannot go on although its input was fine (say, a loss that stays NaN). Exit code 1."""
