"""Exact evaluation: every target of the validation data counts once, whatever the batches or processes.

    loss = sum nll / sum targets          perplexity = exp(loss)          bits per byte = sum nll / ln 2 / sum bytes

Sums are float64, over per-token losses in fp32. Those of the batches are added up exactly (Shewchuk, 1997; Python's
fsum), so their order, and with it the number of processes, makes no difference. A mean of batch means would weigh the
tokens of a short last batch more; a gathered, padded last batch would count some twice. No logits are kept.
"""

import math
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from train_loop.data.loader import Windows, loader
from train_loop.data.order import cut, share
from train_loop.progress import Progress


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, objective: nn.Module, windows: Windows, batch_size: int, shown: bool = True
) -> dict[str, Any]:
    """Metrics of a model on all windows of a store.

    Args:
        accelerator: devices and processes; each process takes every W-th batch.
        objective: the prepared `Objective`; its mode (train or eval) is put back afterwards.
        windows: the validation data.
        batch_size: windows of one forward pass.
        shown: whether progress is printed.

    Returns:
        loss (nats per target), perplexity, bits_per_byte, accuracy, tokens (the number of targets).
    """
    # Imported here: the library takes seconds to load, and the first evaluation is late.
    from train_loop.metric import LanguageModelMetric

    batches = share(cut(np.arange(len(windows)), batch_size), accelerator.process_index, accelerator.num_processes)
    training = objective.training
    objective.eval()
    rows = []
    with Progress("evaluating", "batch", len(batches), shown=shown and accelerator.is_main_process) as progress:
        for batch in loader(windows, batches, pin_memory=accelerator.device.type == "cuda"):
            batch = batch.to(accelerator.device)
            statistics = objective(batch.inputs, batch.targets, batch.positions, statistics=True)
            rows.append(torch.stack([each.double() for each in statistics]))  # counts are exact up to 2^53 tokens
            progress.update(1)
    objective.train(training)
    sums = accelerator.gather(torch.stack(rows)) if accelerator.num_processes > 1 else torch.stack(rows)
    nll, correct, targets = (math.fsum(column) for column in sums.T.tolist())
    metrics = LanguageModelMetric(keep_in_memory=True).compute(
        nll=[nll], correct=[int(correct)], targets=[int(targets)], utf8_bytes=[windows.store.ledger.predicted_bytes]
    )
    assert metrics is not None
    return metrics
