"""The training loop: take a step, record it, then do what is due (an evaluation, a checkpoint, the end).

Observers watch it (log, progress, statistics, samples, a user's callbacks); it does not know which ones there are.
Its `History` steers it; a resumed run reads the history from the log.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from train_loop.distributed.agreement import StopPoll, any_rank_stopping
from train_loop.errors import TrainingError
from train_loop.records import plain
from train_loop.training.evaluation import evaluate
from train_loop.training.schedule import learning_rate
from train_loop.training.state import Observer, Run, StepBatch, TrainState
from train_loop.training.step import StepResult, train_step


@dataclass
class History:
    """The results of the steps so far.

    Attributes:
        evaluations: the records of all evaluations.
        skipped: how many of the latest steps in a row changed nothing because they were not finite.
        best: the evaluation with the lowest loss, the first in a tie; None until one has a finite loss.
        since_best: how many evaluations have followed the best one.
    """

    evaluations: list[dict[str, Any]] = field(default_factory=list)
    skipped: int = 0
    best: dict[str, Any] | None = field(default=None, init=False)
    since_best: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        past, self.evaluations = self.evaluations, []
        for record in past:
            self.add(record)

    def add(self, record: dict[str, Any]) -> None:
        """Take an evaluation in."""
        self.evaluations.append(record)
        self.since_best += 1
        if record["loss"] is not None and (self.best is None or record["loss"] < self.best["loss"]):
            self.best, self.since_best = record, 0


class Save(Protocol):
    """Saves a state that has no checkpoint yet; with `wait`, returns when the checkpoint is whole on disk."""

    def __call__(self, state: TrainState, wait: bool = False) -> None: ...  # noqa: D102


@dataclass
class Loop:
    """Takes a run from its current step to its last one."""

    run: Run
    history: History
    observers: Sequence[Observer]
    save: Save

    def train(self) -> bool:
        """Train to the end; returns whether a signal came first."""
        state, context = self.run.state, self.run.context
        config, total_steps = self.run.config, self.run.batches.total_steps
        context.objective.train()
        batches = self.run.batches.after(state.step)
        stopping = self._between_steps(stopping=False)  # what a signal or a crash left undone
        while not (stopping or self._is_done()):
            with context.clock("data"):
                batch = next(batches)
            for observer in self.observers:
                observer.before_step(state, batch)
            rate = learning_rate(batch.index, total_steps, config.optimizer.learning_rate, config.schedule)
            with context.clock("step"):
                result = train_step(context, state, batch, rate)
            self.history.skipped = 0 if result.applied else self.history.skipped + 1
            record = self._record(batch, result, rate)
            for observer in self.observers:
                observer.after_step(state, record)
            if self.history.skipped >= config.train.max_bad_steps:
                self._fail(result)
            stopping = self._between_steps(context.stop.hear(result.stop))
        return stopping

    def _is_done(self) -> bool:
        """Whether this was the last step, or the last `train.patience` evaluations brought no lower loss."""
        patience = self.run.config.train.patience
        exhausted = patience is not None and self.history.since_best >= patience
        return exhausted or self.run.state.step >= self.run.batches.total_steps

    def _record(self, batch: StepBatch, result: StepResult, rate: float) -> dict[str, Any]:
        """A step's line in metrics.jsonl."""
        step, context = self.run.state.step, self.run.context
        record: dict[str, Any] = {"event": "step", "step": step, "epoch": step / self.run.batches.plan.steps_per_epoch}
        record |= {"loss": result.loss, "learning_rate": rate, "grad_norm": result.grad_norm, "tokens": batch.targets}
        record |= context.clock.of_step(batch.targets)
        if not result.applied:
            record |= {"skipped": True, "blocks": batch.blocks.tolist()}
        return plain(record | context.accumulator.record())

    def _between_steps(self, stopping: bool) -> bool:
        """Evaluate and save if due; returns whether to stop. A stopping run leaves evaluation to the resumed run."""
        step, settings = self.run.state.step, self.run.config.checkpoint
        if not stopping and self._is_due(self.run.config.evaluation.every):
            stopping = self._evaluate()
        is_best = self.history.best is not None and self.history.best["step"] == step
        if stopping or is_best or self._is_due(settings.every) or for_study(settings.at, step) or self._is_done():
            self.save(self.run.state)
        return stopping

    def _is_due(self, every: int | str) -> bool:
        """Whether something with the period `every` ("epoch" or a number of steps) is due after this step."""
        step, period = self.run.state.step, self.run.batches.plan.steps_per_epoch if every == "epoch" else int(every)
        return step > 0 and (step % period == 0 or step == self.run.batches.total_steps)

    def _evaluate(self) -> bool:
        """Evaluate, unless the log has this evaluation; returns whether any process was asked to stop meanwhile."""
        run, state, context = self.run, self.run.state, self.run.context
        if not self.history.evaluations or self.history.evaluations[-1]["step"] != state.step:
            poll = StopPoll(context.accelerator, context.stop)
            metrics = evaluate(context.accelerator, context.objective, run.validation, run.evaluation_batch_size, poll)
            if metrics is None:
                return True
            epoch = state.step / run.batches.plan.steps_per_epoch
            self.history.add(plain({"event": "evaluation", "step": state.step, "epoch": epoch, **metrics}))
        for observer in self.observers:
            observer.after_evaluation(state, self.history.evaluations[-1])
        return any_rank_stopping(context.accelerator, context.stop)

    def _fail(self, result: StepResult) -> None:
        """End a run whose steps are no longer finite. Its checkpoint is from before them, as they changed nothing."""
        state, skipped = self.run.state, self.history.skipped
        failed, state.step = state.step, state.step - skipped
        if state.step:
            self.save(state, wait=True)
        raise TrainingError(
            f"step {failed}: loss {result.loss}, gradient norm {result.grad_norm}, not finite for {skipped} steps in a "
            f"row; the weights are those of step {state.step}; try a lower optimizer.learning_rate or more warm-up"
        )


def for_study(at: str | None, step: int) -> bool:
    """Whether checkpoint.at asks for a checkpoint after `step` steps; "log" means 0, 1, 2, 4, 8, ..."""
    return at == "log" and step & (step - 1) == 0
