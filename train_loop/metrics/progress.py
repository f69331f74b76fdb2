"""An observer that shows a run's progress on stderr: a bar or lines, and one line for each evaluation."""

import math
from typing import Any

from train_loop.console import Progress, say, shown


class ProgressLines:
    """Shows steps and evaluations, but the one that was `evaluated` before the run resumed, if `progress` is shown."""

    def __init__(self, progress: Progress, evaluated: int | None) -> None:
        self.progress, self.evaluated = progress, evaluated

    def before_step(self, state: Any, batch: Any) -> None:
        """Do nothing: there is nothing to show yet."""

    def after_step(self, state: Any, record: dict[str, Any]) -> None:
        """Count the step, and show its loss and its speed."""
        loss = math.nan if record["loss"] is None else record["loss"]
        self.progress.update(1, f"loss {shown(loss)}, {record['tokens_per_second']:,.0f} tokens/s", curve=loss)

    def after_evaluation(self, state: Any, record: dict[str, Any]) -> None:
        """Print the evaluation's results."""
        if not self.progress.shown or record["step"] == self.evaluated:
            return
        why = record.get("reason")
        found = (
            f"validation loss {shown(record['loss'])}, perplexity {shown(record['perplexity'], 3)}, "
            f"{shown(record['bits_per_byte'])} bits per byte, accuracy {shown(record['accuracy'])}"
            + (f" ({why})" if why else "")
        )
        if record["loss"] is None:
            found = f"validation: {why or 'the loss is not finite'}"
        say(f"step {record['step']}, epoch {record['epoch']:.2f}: {found}")
