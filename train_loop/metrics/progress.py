"""An observer that shows a run's progress on stderr: a bar or lines, and one line for each evaluation."""

import math
from typing import Any

from train_loop.console import Progress, say


class ProgressLines:
    """Shows steps and evaluations, but the one that was `evaluated` before the run resumed, if `progress` is shown."""

    def __init__(self, progress: Progress, evaluated: int | None) -> None:
        self.progress, self.evaluated = progress, evaluated

    def before_step(self, state: Any, batch: Any) -> None:
        """Do nothing: there is nothing to show yet."""

    def after_step(self, state: Any, record: dict[str, Any]) -> None:
        """Count the step, and show its loss and its speed."""
        loss = math.nan if record["loss"] is None else record["loss"]
        self.progress.update(1, f"loss {loss:.4f}, {record['tokens_per_second']:,.0f} tokens/s", curve=loss)

    def after_evaluation(self, state: Any, record: dict[str, Any]) -> None:
        """Print the evaluation's results."""
        if self.progress.shown and record["step"] != self.evaluated:
            numbers = {name: math.inf if value is None else value for name, value in record.items()}
            say(
                f"step {record['step']}, epoch {record['epoch']:.2f}: validation loss {numbers['loss']:.4f}, "
                f"perplexity {numbers['perplexity']:.3f}, {numbers['bits_per_byte']:.4f} bits per byte, "
                f"accuracy {record['accuracy']:.4f}"
            )
