"""Finds by trial how many sequences fit into memory at once (`batch.micro_batch_size: auto`).

The global batch stays the same, so this decides how fast a step is and nothing else. (Dropout masks belong to a
micro-batch, so another size means other masks; a resumed run keeps its size.)
"""

import gc
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import gather
from accelerate.utils.memory import clear_device_cache
from torch import nn
from torch.optim import Optimizer

from train_loop.analysis.trial_step import without_effect
from train_loop.config.schema import Config
from train_loop.console import say
from train_loop.devices import is_out_of_memory
from train_loop.errors import InputError
from train_loop.models.building import without_compile
from train_loop.training.state import Run


def fitting(
    config: Config, accelerator: Accelerator, objective: nn.Module, adamw: Optimizer, previous: int | None
) -> int:
    """The micro-batch size that batch.micro_batch_size auto stands for: what every process can train on at once.

    Tried are a process's share of a step (after resuming, the `previous` size), half of it, a quarter, ... Each process
    tries a forward and backward pass by itself, with moments and gradients in memory as in a step. All processes must
    call this, with the prepared `Objective` and its optimizer, which must not have moments yet. Raises InputError with
    FSDP2, or if not even one sequence fits.
    """
    if accelerator.is_fsdp2:
        raise InputError(
            "batch.micro_batch_size auto does not work with FSDP2, where a process that runs out of memory leaves the "
            "others waiting; give a number"
        )
    largest = -(-config.batch.sequences_per_step // accelerator.num_processes)
    if previous is not None:
        largest = min(config.batch.sequences_per_step, previous)
    size = largest
    with without_compile(objective):
        while size and not _fits(accelerator, objective, adamw, config.data.block_size, size):
            size //= 2
    if accelerator.num_processes > 1:
        size = int(gather(torch.tensor([size], device=accelerator.device)).min())
    if size == 0:
        raise InputError(
            "batch.micro_batch_size auto: not even one sequence fits into memory; lower data.block_size, or use "
            "--model.activation_checkpointing full"
        )
    if size < largest and accelerator.is_main_process:
        say(f"batch.micro_batch_size auto: {largest} sequences do not fit into memory, {size} do")
    return size


def halve(run: Run, error: RuntimeError) -> None:
    """Halve the micro-batches of a run that is out of memory; it goes on from the step in which it failed.

    Raises the error itself if memory is not the reason, or the size can't be halved: with several processes, the others
    wait for this one in the middle of the step.
    """
    size, automatic = run.batches.plan.micro_batch_size, run.config.batch.micro_batch_size == "auto"
    if not automatic or size == 1 or run.context.accelerator.num_processes > 1 or not is_out_of_memory(error):
        raise error
    run.batches.plan = replace(run.batches.plan, micro_batch_size=size // 2)
    run.state.optimizer.zero_grad()
    clear_device_cache(garbage_collection=True)
    say(f"batch.micro_batch_size auto: out of memory with {size} sequences; continuing with {size // 2}")


def _fits(accelerator: Accelerator, objective: nn.Module, adamw: Optimizer, block_size: int, size: int) -> bool:
    """Whether a trial step with one sequence, then with `size`, stays within this process's memory."""
    training = objective.training
    objective.train()
    try:
        with without_effect(adamw) as step, accelerator.no_sync(objective):
            for rows in (1, size):
                tokens = torch.zeros(rows, block_size, dtype=torch.int64, device=accelerator.device)
                accelerator.backward(objective(tokens, tokens))
                step()
        return True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        objective.train(training)
        gc.collect()
        clear_device_cache()
