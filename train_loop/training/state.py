"""The types of the one idea: the state of a run is (weights, optimizer moments, step), and all else follows from it.

    StepBatches --(seed, step)--> StepBatch --train_step(context, state, batch, learning_rate)--> the next TrainState

Steps are counted by those that are finished: the state before the first step has step 0, and the step under way is
always `state.step + 1`.
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
    """All that a step changes, and all that a checkpoint holds.

    Attributes:
        model: the language model itself, without what Accelerate wraps around it.
        optimizer: AdamW over its parameters, with their moments.
        step: finished optimizer steps.
    """

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    step: int = 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


@dataclass(frozen=True)
class StepBatch:
    """What one step reads.

    Attributes:
        index: steps finished before it.
        blocks: ids of its blocks, over all ranks [<= sequences_per_step].
        micro_batches: those that this rank runs.
        micro_batch_count, targets: how many the step has, over all ranks.
    """

    index: int
    blocks: Ids
    micro_batches: list[Batch]
    micro_batch_count: int
    targets: int

    @property
    def denominator(self) -> int:
        """What the summed loss is divided by: isolated documents may leave blocks of first tokens without a target."""
        return max(self.targets, 1)


@dataclass
class StepBatches:
    """What every step of a run reads: a function of (seed, step), computed without the steps before it.

    Attributes:
        windows: the training data.
        plan: the order of its blocks.
        total_steps: of the run.
        rank, world_size: whose micro-batches are loaded.
        num_workers, pin_memory: of the DataLoader.
    """

    windows: Windows
    plan: Plan
    total_steps: int
    rank: int = 0
    world_size: int = 1
    num_workers: int = 0
    pin_memory: bool = False

    def __getitem__(self, index: int) -> StepBatch:
        """The batch of the step after `index` finished ones."""
        blocks = self.plan.blocks(index)
        return self._batch(index, blocks, list(loader(self.windows, self._share(blocks))))

    def after(self, step: int) -> Iterator[StepBatch]:
        """The batches of all steps after `step` finished ones, the next ones read ahead."""
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
    """What a step works with; built once.

    Attributes:
        accelerator: devices, processes, precision.
        objective: the prepared `Objective`, whose `model` is the state's.
        accumulator: how gradients are added up.
        max_grad_norm: gradients are scaled down to this global norm; None leaves them.
        seed: the run's; each dropout mask follows from it, the step and the number of the micro-batch.
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
    """Watches a run, on every process, and changes nothing of what is computed. Override what you need.

    A record is what metrics.jsonl says of the step or the evaluation, as a dictionary; a number that is not finite is
    None in it. A resumed run may show its last evaluation once more.
    """

    def before_step(self, state: TrainState, batch: StepBatch) -> None:
        """The step after `state.step` is about to be taken."""
        return

    def after_step(self, state: TrainState, record: dict[str, Any]) -> None:
        """`state.step` steps are finished; gradients are gone already."""
        return

    def after_evaluation(self, state: TrainState, record: dict[str, Any]) -> None:
        """The weights after `state.step` steps were evaluated."""
        return


@dataclass
class Run:
    """What a run is made of once it is set up, beside those who watch it."""

    config: Config
    data: Prepared
    batches: StepBatches
    validation: Windows
    context: StepContext
    state: TrainState

    @property
    def evaluation_batch_size(self) -> int:
        """Sequences of one forward pass in evaluation."""
        return self.config.evaluation.batch_size or self.batches.plan.micro_batch_size
