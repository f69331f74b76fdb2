"""The libraries made ready for a run or a command: their versions are checked, and they print nothing but errors."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from train_loop import versions


@contextmanager
def ready() -> Iterator[None]:
    """Check the libraries' versions; within this, they print nothing but errors, since their notes drown out ours."""
    versions.check()
    # Datasets reads this when it is loaded; loading it takes a second and is not always needed.
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    import transformers

    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
