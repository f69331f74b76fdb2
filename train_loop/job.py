"""A run: everything that it is made of, set up and checked before anything is written."""

from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from train_loop.analysis import batch_size, probe
from train_loop.analysis.step_statistics import StepStatistics
from train_loop.checkpoint import storage
from train_loop.checkpoint.run_folder import RunFolder
from train_loop.config.load import shared_settings
from train_loop.config.schema import Config
from train_loop.console import say
from train_loop.data.loader import Windows
from train_loop.data.order import Plan
from train_loop.data.preparation import prepare
from train_loop.data.token_store import Prepared
from train_loop.distributed import launch
from train_loop.distributed.collectives import broadcast_from_main, check_same, run_on_all_ranks
from train_loop.distributed.heartbeat import Peers
from train_loop.errors import InputError
from train_loop.generation.sampler import check_prompt, prompt_ids
from train_loop.metrics.throughput import Throughput
from train_loop.metrics.trackers import check_trackers
from train_loop.models import building
from train_loop.models.parameters import digest
from train_loop.ops import cpu
from train_loop.ops.dropout import use_cheap_dropout
from train_loop.training import optimizer
from train_loop.training.accumulators import FixedPointSums
from train_loop.training.objective import Objective


@dataclass
class Run:
    """Everything a run is made of, after setting up.

    Its state is in `objective` and `optimizer`. The rest is fixed, except that the plan's micro-batches may get smaller
    where memory is scarce.
    """

    config: Config
    folder: RunFolder
    accelerator: Accelerator
    peers: Peers
    data: Prepared
    train: Windows
    validation: Windows
    plan: Plan
    total_steps: int
    objective: nn.Module
    optimizer: AcceleratedOptimizer
    sums: FixedPointSums | None
    speed: Throughput
    found: storage.CheckpointRef | None
    damaged: dict[int, str]
    watch: StepStatistics | None = None

    @property
    def model(self) -> Any:
        """The language model itself, without what was wrapped around it."""
        return self.accelerator.unwrap_model(self.objective).model

    @property
    def evaluation_batch_size(self) -> int:
        """Sequences of one forward pass in evaluation."""
        return self.config.evaluation.batch_size or self.plan.micro_batch_size

    def choose_compiled(self) -> None:
        """Have those shapes compiled, where any are, that come in every step and in every evaluation."""
        if not self.config.model.compile:
            return
        length, size = self.config.data.block_size, self.plan.micro_batch_size
        training = {size, self.plan.sequences_per_step % size} - {0}
        shapes = {(True, rows, length) for rows in training} | {(False, self.evaluation_batch_size, length)}
        self.accelerator.unwrap_model(self.objective).compiled = shapes

    def due(self, every: int | str, step: int) -> bool:
        """Whether something that happens every `every` ("epoch" or steps) happens after `step` finished steps."""
        period = self.plan.steps_per_epoch if every == "epoch" else int(every)
        return step > 0 and (step % period == 0 or step == self.total_steps)


def set_up(config: Config, peers: Peers | None = None) -> Run:
    """Data, model, optimizer and processes of a run, checked; nothing is written to the run's folder.

    Args:
        config: the settings.
        peers: its processes, called together; called here where nobody watches over them.

    Raises:
        InputError: for whatever doesn't fit.
    """
    folder = RunFolder(config.output_dir)
    check_trackers(config.run.log_with)
    peers = peers or Peers(config.run, shared_settings(config))
    accelerator = launch.start(config.run, peers, folder.path)
    run_on_all_ranks(accelerator, "check", lambda: folder.check(config))
    data = run_on_all_ranks(accelerator, "prepare", lambda: prepare(config, shown=accelerator.is_local_main_process))
    language_model = run_on_all_ranks(accelerator, "build", lambda: building.build(config, data.tokenizer))
    check_same(accelerator, "the data", data.fingerprint, "give every host the same documents and tokenizer")
    found, damaged = _to_resume(accelerator, folder)
    weights = digest(language_model)
    check_same(accelerator, "the initial weights' digest", weights, "give every host the same model")
    filler = data.tokenizer.eos_token_id
    assert isinstance(filler, int)
    windows, validation = (
        Windows(side, config.data.block_size, filler, config.data.isolate_documents)
        for side in (data.train, data.validation)
    )
    objective = Objective(language_model.to(accelerator.device))
    if accelerator.device.type == "cpu":
        if config.run.keep_memory:
            cpu.keep_freed_memory()
        use_cheap_dropout(language_model)
        if not config.model.compile:
            cpu.use_products(language_model)
            objective.tied = cpu.tie_gradients(language_model)
    if config.study.probing:
        probe.check(objective.model, data.tokenizer, config)
    for prompt in config.sample.prompts or []:
        check_prompt(objective.model, prompt_ids(data.tokenizer, prompt))
    prepared, adamw = accelerator.prepare(objective, optimizer.build(objective, config.optimizer))
    sums = FixedPointSums(accelerator, objective.parameters()) if config.run.reproducible == "bitwise" else None
    size = config.micro_batch_size
    if config.batch.micro_batch_size == "auto":
        size = _fitting(config, accelerator, prepared, adamw, found)
    plan = Plan(len(windows), config.batch.sequences_per_step, size, config.run.seed)
    run = Run(
        config,
        folder,
        accelerator,
        peers,
        data,
        windows,
        validation,
        plan,
        total_steps=config.train.max_steps or config.train.epochs * plan.steps_per_epoch,
        objective=prepared,
        optimizer=adamw,
        sums=sums,
        speed=Throughput(accelerator, prepared, language_model, config.data.block_size),
        found=found,
        damaged=damaged,
    )
    run.choose_compiled()
    if config.study.every is not None:
        run.watch = StepStatistics(run, config.study.every)
    return run


def _to_resume(accelerator: Accelerator, folder: RunFolder) -> tuple[storage.CheckpointRef | None, dict[int, str]]:
    """The newest whole checkpoint, and which later ones are damaged; the main process looks, all get the same.

    Raises:
        InputError: when there are checkpoints, but none is whole.
    """
    main = accelerator.is_main_process
    looked = run_on_all_ranks(accelerator, "look", lambda: storage.newest(folder.checkpoints) if main else None)
    found, damaged = broadcast_from_main(accelerator, looked) or (None, {})
    if main:
        for line in damaged.values():
            say(f"{line}; passed over")
    if found is None and damaged:
        raise InputError(
            f"run.output_dir {folder.path}: no checkpoint is whole ({'; '.join(damaged.values())}); put one back from "
            f"a copy, or remove {folder.checkpoints} to start again from the first step"
        )
    return found, damaged


def _fitting(
    config: Config,
    accelerator: Accelerator,
    objective: nn.Module,
    adamw: AcceleratedOptimizer,
    found: storage.CheckpointRef | None,
) -> int:
    """The size that batch.micro_batch_size auto comes to; that of the checkpoint, if it fits."""
    if accelerator.is_fsdp2:
        raise InputError(
            "batch.micro_batch_size auto does not go with FSDP2, where a process that runs out of memory leaves the "
            "others waiting; give a number"
        )
    largest = -(-config.batch.sequences_per_step // accelerator.num_processes)
    if found is not None:
        largest = min(config.batch.sequences_per_step, int(found.state["micro_batch_size"]))
    with building.without_compile(config):
        return batch_size.largest_micro_batch(accelerator, objective, adamw.optimizer, config.data.block_size, largest)
