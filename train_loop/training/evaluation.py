"""Exact evaluation: every target of the validation data counts once, however it is split into batches and processes.

    loss = sum nll / sum targets          perplexity = exp(loss)          bits per byte = sum nll / ln 2 / sum bytes

Each batch adds up its fp32 per-token losses in float64. Sums of batches are added up exactly (Shewchuk, 1997; Python's
fsum), so neither their order nor the number of processes makes a difference. A mean of batch means would overweight the
tokens of a short last batch; a gathered, padded last batch would count some tokens twice. No logits are kept.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from train_loop.console import Progress
from train_loop.data.loader import Windows, loader
from train_loop.data.order import Ids, cut
from train_loop.devices import exact, pins_memory
from train_loop.distributed.collectives import sum_exactly


def evaluate(
    accelerator: Accelerator,
    objective: nn.Module,
    windows: Windows,
    batch_size: int,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Compute the metrics of a model on all windows of a store.

    Args:
        accelerator: devices and processes; each process takes every W-th batch.
        objective: the prepared `Objective`; its mode (train or eval) is restored afterwards.
        windows: the validation data.
        batch_size: windows in one forward pass.
        stop: called after each batch, on all processes; True ends the evaluation.

    Returns:
        loss (nats per target), perplexity, bits_per_byte, accuracy, tokens (the number of targets); what is not finite
        is None, and then there is a reason. None if the evaluation ended early.
    """
    # Imported here because the library takes seconds to load and the first evaluation comes late.
    from train_loop.metrics.language_model import LanguageModelMetric

    sums = measure(accelerator, objective, windows, np.arange(len(windows)), batch_size, stop)
    if sums is None:
        return None
    nll, correct, targets = sums
    metrics = LanguageModelMetric(keep_in_memory=True).compute(
        nll=[nll], correct=[int(correct)], targets=[int(targets)], utf8_bytes=[windows.store.ledger.predicted_bytes]
    )
    assert metrics is not None
    return metrics


@torch.no_grad()
def measure(
    accelerator: Accelerator,
    objective: nn.Module,
    windows: Windows,
    blocks: Ids,
    batch_size: int,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[float, float, float] | None:
    """Summed nll in nats, correct targets and all targets of some windows; see `evaluate`."""
    batches = cut(blocks, batch_size, accelerator.process_index, accelerator.num_processes)
    training = objective.training
    objective.eval()
    rows = []
    stopped = False
    with Progress("evaluating", "batch", len(batches), shown=accelerator.is_main_process) as progress:
        for batch in loader(windows, batches, pin_memory=pins_memory(accelerator.device)):
            batch = batch.to(accelerator.device)
            statistics = objective(batch.inputs, batch.targets, batch.positions, statistics=True)
            rows.append(torch.stack([exact(each) for each in statistics]))  # counts are exact up to 2^53 tokens
            progress.update(1)
            if stopped := stop():
                break
    objective.train(training)
    if stopped:
        return None
    nll, correct, targets = sum_exactly(accelerator, torch.stack(rows).T.tolist())
    return nll, correct, targets
