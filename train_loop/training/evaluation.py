"""Exact evaluation: every target of the validation data counts once, whatever the batches or processes.

    loss = sum nll / sum targets          perplexity = exp(loss)          bits per byte = sum nll / ln 2 / sum bytes

Sums are float64, over per-token losses in fp32. Those of the batches are added up exactly (Shewchuk, 1997; Python's
fsum), so their order, and with it the number of processes, makes no difference. A mean of batch means would weigh the
tokens of a short last batch more; a gathered, padded last batch would count some twice. No logits are kept.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from train_loop.console import Progress
from train_loop.data.loader import Windows, loader
from train_loop.data.order import Ids, cut
from train_loop.devices import exact, pins_memory


def evaluate(
    accelerator: Accelerator,
    objective: nn.Module,
    windows: Windows,
    batch_size: int,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Metrics of a model on all windows of a store.

    Args:
        accelerator: devices and processes; each process takes every W-th batch.
        objective: the prepared `Objective`; its mode (train or eval) is put back afterwards.
        windows: the validation data.
        batch_size: windows of one forward pass.
        stop: asked after each batch, on all processes; True ends the evaluation.

    Returns:
        loss (nats per target), perplexity, bits_per_byte, accuracy, tokens (the number of targets); None if it was
        ended early.
    """
    # Imported here: the library takes seconds to load, and the first evaluation is late.
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
    """Summed nll in nats, correct and all targets of some windows; see `evaluate`."""
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
    local = [torch.stack(rows).tolist()]  # sent as Python's numbers: not every device has float64
    gathered = gather_object(local) if accelerator.num_processes > 1 else local
    nll, correct, targets = (math.fsum(column) for column in zip(*itertools.chain(*gathered), strict=True))
    return nll, correct, targets
