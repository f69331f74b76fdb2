"""How a run ended, in one object: what `train_loop.train` returns and `train-loop train` prints."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_loop.checkpoint.run_folder import RunFolder
from train_loop.export.finalize import Finished
from train_loop.training.state import Run


@dataclass(frozen=True)
class Summary:
    """How a run ended.

    Attributes:
        step: finished steps, out of `total_steps`.
        stopped: the signal that ended it early, or None.
        evaluation: of the exported weights, or else the last one: loss, perplexity, bits_per_byte, accuracy, tokens.
        exported_step: the step of the exported weights, or None.
        hub: the model's address on the Hub, if it was uploaded.
        is_main_process: whether this process speaks for the run.
    """

    step: int
    total_steps: int
    stopped: str | None
    evaluation: dict[str, Any] | None
    exported_step: int | None
    hub: str | None
    folder: Path
    model_folder: Path
    ledger: dict[str, Any]
    is_main_process: bool


def summarize(run: Run, folder: RunFolder, evaluations: list[dict[str, Any]], finished: Finished | None) -> Summary:
    """The summary of a run, from all its evaluations and what it exported, if it came to that."""
    if finished is not None:
        evaluations = [record for record in evaluations if record["step"] == finished.step]
    return Summary(
        step=run.state.step,
        total_steps=run.batches.total_steps,
        stopped=None if finished is not None else run.context.stop.name,
        evaluation=evaluations[-1] if evaluations else None,
        exported_step=None if finished is None else finished.step,
        hub=None if finished is None else finished.hub,
        folder=folder.path,
        model_folder=folder.model,
        ledger=run.data.ledger(),
        is_main_process=run.context.accelerator.is_main_process,
    )
