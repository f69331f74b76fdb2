"""The balance of a mixture of experts, in the record of each step; see `models/experts.py`."""

import math
from typing import Any

import torch
from accelerate import Accelerator

from train_loop.models.experts import Experts
from train_loop.records import plain


class BalanceLoss:
    """An observer that puts `balance_loss` into the records of steps, if experts are balanced. It comes before the log.

        balance_loss = sum_s t_s mean_l balance_sl / T          of the step's sequences s with t_s of its T targets

    It is not multiplied by the weight. All processes must call it: they exchange one number a micro-batch.
    """

    def __init__(self, accelerator: Accelerator, experts: Experts) -> None:
        self.accelerator, self.experts = accelerator, experts
        self._denominator = self._micro_batches = 0

    def before_step(self, state: Any, batch: Any) -> None:
        """Forget what ran before this step, such as a trial."""
        self.experts.sums.clear()
        self._denominator, self._micro_batches = batch.denominator, len(batch.micro_batches)

    def after_step(self, state: Any, record: dict[str, Any]) -> None:
        """Add up the micro-batches of all processes, exactly, so that their order makes no difference."""
        sums = torch.stack(self.experts.sums[-self._micro_batches :])[None]  # of a step that ran again, the last ones
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.gather(sums)
        record |= plain({"balance_loss": math.fsum(sums.flatten().tolist()) / self._denominator})

    def after_evaluation(self, state: Any, record: dict[str, Any]) -> None:
        """Do nothing: an evaluation has no balance."""
