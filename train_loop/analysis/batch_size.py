"""How many sequences fit into memory at once, found by trying (`batch.micro_batch_size: auto`).

The global batch stays what it is, so this decides how fast a step is and nothing else. (Dropout masks belong to a
micro-batch, so they are other masks at another size; a run keeps its size when it is resumed.)
"""

import gc

import torch
from accelerate import Accelerator
from accelerate.utils import gather
from accelerate.utils.memory import clear_device_cache
from torch import nn

from train_loop.console import say
from train_loop.devices import is_out_of_memory
from train_loop.errors import InputError
from train_loop.training import optimizer


def largest_micro_batch(
    accelerator: Accelerator, objective: nn.Module, adamw: torch.optim.Optimizer, block_size: int, largest: int
) -> int:
    """The first of largest, half of it, a quarter, ... sequences that every process can train on at once.

    Each process tries a forward and backward pass by itself, with moments and gradients in memory as in a step. All
    processes must call this.

    Args:
        accelerator: the processes, without FSDP2: there a pass needs all of them, and one that runs out of memory
            leaves the others waiting.
        objective: the prepared `Objective`.
        adamw: its optimizer; it must not have moments yet.
        block_size: tokens a sequence.
        largest: what to begin with, at least 1.

    Raises:
        InputError: when not even one sequence fits.
    """
    size = largest
    while size and not _fits(accelerator, objective, adamw, block_size, size):
        size //= 2
    sizes = gather(torch.tensor([size], device=accelerator.device)) if accelerator.num_processes > 1 else [size]
    size = min(int(each) for each in sizes)
    if size == 0:
        raise InputError(
            "batch.micro_batch_size auto: not even one sequence fits into memory; lower data.block_size, or say "
            "--model.activation_checkpointing true"
        )
    if size < largest and accelerator.is_main_process:
        say(f"batch.micro_batch_size auto: {largest} sequences do not fit into memory, {size} do")
    return size


def _fits(
    accelerator: Accelerator, objective: nn.Module, adamw: torch.optim.Optimizer, block_size: int, size: int
) -> bool:
    training = objective.training
    objective.train()
    try:
        with optimizer.without_effect(adamw) as step, accelerator.no_sync(objective):
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
