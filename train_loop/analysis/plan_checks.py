"""Plans that can't be meant, found before the first step: each is a line with both numbers, on the truth sheet.

The run goes on, because any of them may be a test of a few steps. What can't work at all is refused elsewhere.
"""

from typing import NamedTuple

from train_loop.config.schema import Config
from train_loop.training.state import Run


class Amounts(NamedTuple):
    """How much there is of what a plan uses up."""

    steps: int  # of the whole run
    blocks: int  # of an epoch
    steps_per_epoch: int
    train_tokens: int
    validation_tokens: int


def of_run(run: Run) -> list[str]:
    """The remarks on a run that is set up."""
    batches = run.batches
    blocks, per_epoch = batches.plan.blocks_per_epoch, batches.plan.steps_per_epoch
    tokens = len(run.data.train), len(run.data.validation)
    return remarks(run.config, Amounts(batches.total_steps, blocks, per_epoch, *tokens))


def remarks(config: Config, has: Amounts) -> list[str]:
    """What a plan asks for and can't get."""
    lines = [*_schedule(config, has.steps), *_never(config, has), *_amounts(config, has)]
    patience, every = config.train.patience, config.evaluation.every
    each = has.steps_per_epoch if every == "epoch" else int(every)
    evaluations = -(-has.steps // each)
    if patience is not None and patience >= evaluations:
        lines.append(
            f"train.patience {patience}: the run has {_count(evaluations, 'evaluation')}, so it never ends early"
        )
    return lines


def _schedule(config: Config, steps: int) -> list[str]:
    """What is wrong with the learning rate's plan."""
    schedule = config.schedule
    warmup, decay = schedule.warmup_steps, schedule.decay_steps
    length = decay or max(1, steps // 10)  # as in training/schedule.py
    lines = []
    if warmup >= steps:
        lines.append(
            f"schedule.warmup_steps {warmup}: the run has {_count(steps, 'step')}, so it never reaches "
            f"learning rate {config.optimizer.learning_rate:g}"
        )
    elif schedule.name == "wsd" and warmup + length > steps:
        left = f"warm-up leaves {steps - warmup} of {_count(steps, 'step')}, so the rate falls at once when it ends"
        lines.append(f"schedule.decay_steps {length}: {left}")
    if decay is not None and schedule.name != "wsd":
        lines.append(f"schedule.decay_steps {decay}: only wsd uses it, but schedule.name is {schedule.name}")
    return lines


def _never(config: Config, has: Amounts) -> list[str]:
    """What is planned for steps beyond the end."""
    numbers = {
        "evaluation.every": (config.evaluation.every, "only the last step is evaluated"),
        "checkpoint.every": (config.checkpoint.every, "only the last step is saved"),
        "study.every": (config.study.every, "no step is watched"),
    }
    return [
        f"{key} {every}: the run has {_count(has.steps, 'step')}, so {outcome}"
        for key, (every, outcome) in numbers.items()
        if isinstance(every, int) and every > has.steps
    ]


def _amounts(config: Config, has: Amounts) -> list[str]:
    """Where a step or a block is larger than what it is filled with."""
    lines, block, whole = [], config.data.block_size, config.batch.sequences_per_step
    if whole > has.blocks:
        only = f"an epoch has {_count(has.blocks, 'sequence')}, so every step is a whole epoch and smaller than asked"
        lines.append(f"batch.sequences_per_step {whole}: {only}")
    for split, tokens in (("training", has.train_tokens), ("validation", has.validation_tokens)):
        if tokens < block:
            few = f"the {split} data has {_count(tokens, 'token')}, so its one sequence is partly filler"
            lines.append(f"data.block_size {block}: {few}")
    return lines


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"
