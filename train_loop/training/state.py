"""The types behind the one idea: a run's state is (weights, optimizer moments, step); all else follows from it.

    StepBatches --(seed, step)--> StepBatch --train_step(context, state, batch, learning_rate)--> the next TrainState

A state's step is the number of finished steps: before the first step it is 0, and the step under way is always
`state.step + 1`.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from train_loop.config.schema import Config
from train_loop.data.loader import Batch, Windows, loader
from train_loop.data.order import Ids, MicroBatch, Plan, cut
from train_loop.data.token_store import Prepared
from train_loop.metrics.throughput import Throughput
from train_loop.signals import StopRequest
from train_loop.training.accumulators import Accumulator


@dataclass
class TrainState:
    """Everything that a step changes, and everything that a checkpoint holds.

    Attributes:
        model: the language model itself, without Accelerate's wrappers.
        optimizer: AdamW over its parameters, with their moments.
        step: finished optimizer steps.
    """

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    step: int = 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


@dataclass(frozen=True)
class StepBatch:
    """The data of one step.

    Attributes:
        index: the number of steps finished before it.
        blocks: ids of its blocks, over all ranks [<= sequences_per_step].
        micro_batches: the ones that this rank runs.
        micro_batch_count, targets: how many the step has, over all ranks.
    """

    index: int
    blocks: Ids
    micro_batches: list[Batch]
    micro_batch_count: int
    targets: int

    @property
    def denominator(self) -> int:
        """What the summed loss is divided by: if documents are isolated, a block of first tokens has no target."""
        return max(self.targets, 1)


@dataclass
class StepBatches:
    """The data of every step of a run: a function of (seed, step), computed without the steps before it.

    Attributes:
        windows: the training data.
        plan: the order of its blocks.
        total_steps: how many steps the run has.
        rank, world_size: the rank whose micro-batches are loaded, and the number of ranks.
        num_workers, pin_memory: settings of the DataLoader.
    """

    windows: Windows
    plan: Plan
    total_steps: int
    rank: int = 0
    world_size: int = 1
    num_workers: int = 0
    pin_memory: bool = False

    def __getitem__(self, index: int) -> StepBatch:
        """The batch of the step that follows `index` finished steps."""
        blocks = self.plan.blocks(index)
        return self._batch(index, blocks, list(loader(self.windows, self._share(blocks))))

    def after(self, step: int) -> Iterator[StepBatch]:
        """The batches of all steps that follow `step` finished steps; it reads ahead."""
        ahead: deque[tuple[int, Ids, int]] = deque()

        def micro_batches() -> Iterator[MicroBatch]:
            for index, blocks in enumerate(self.plan.steps(step, self.total_steps), step):
                share = self._share(blocks)
                ahead.append((index, blocks, len(share)))
                yield from share

        batches = loader(self.windows, micro_batches(), self.num_workers, self.pin_memory)
        for first in batches:
            index, blocks, count = ahead.popleft()
            yield self._batch(index, blocks, [first, *(next(batches) for _ in range(count - 1))])

    def _share(self, blocks: Ids) -> list[MicroBatch]:
        return cut(blocks, self.plan.micro_batch_size, self.rank, self.world_size)

    def _batch(self, index: int, blocks: Ids, micro_batches: list[Batch]) -> StepBatch:
        count = -(-len(blocks) // self.plan.micro_batch_size)
        return StepBatch(index, blocks, micro_batches, count, self.windows.targets(blocks))


@dataclass
class StepContext:
    """What every step works with; built once.

    Attributes:
        accelerator: devices, processes, precision.
        objective: the prepared `Objective`, whose `model` is the state's.
        accumulator: how gradients are added up.
        max_grad_norm: gradients are scaled down to this global norm; None leaves them as they are.
        seed: the run's seed; each dropout mask follows from it, the step and the number of the micro-batch.
        clock: measures the parts of a step.
        stop: whether this process was asked to stop.
    """

    accelerator: Accelerator
    objective: nn.Module
    accumulator: Accumulator
    max_grad_norm: float | None
    seed: int
    clock: Throughput
    stop: StopRequest


class Observer(Protocol):
    """Watches a run, on every process, and does not change what it computes. Override the methods that you need.

    A record is the line in metrics.jsonl for the step or the evaluation, as a dictionary; numbers that are not finite
    are None in it. A resumed run may show its last evaluation again.
    """

    def before_step(self, state: TrainState, batch: StepBatch) -> None:
        """Called before the step that follows `state.step` finished steps."""
        return

    def after_step(self, state: TrainState, record: dict[str, Any]) -> None:
        """Called when `state.step` steps are finished; the gradients are already gone."""
        return

    def after_evaluation(self, state: TrainState, record: dict[str, Any]) -> None:
        """Called when the weights after `state.step` steps have been evaluated."""
        return


@dataclass
class Run:
    """The parts of a run that is set up, without its observers."""

    config: Config
    data: Prepared
    batches: StepBatches
    validation: Windows
    context: StepContext
    state: TrainState

    @property
    def evaluation_batch_size(self) -> int:
        """Sequences in one forward pass of an evaluation."""
        return self.config.evaluation.batch_size or self.batches.plan.micro_batch_size
