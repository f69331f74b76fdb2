"""The module that is trained: batch -> summed negative log-likelihood.

    nll = sum over targets t of -log softmax(W h_t)[t]

It returns the sum, not the mean: `step.py` divides by the number of targets in the whole step, in all its
micro-batches and on all processes. The loss is part of the module that Accelerate wraps, so wrappers see one number
come out, not a tensor of logits [batch, block, vocabulary] that mixed precision would copy to fp32.

Two paths lead to the same number. *fused*: the hidden states go through `linear_cross_entropy`, which computes logits
for one chunk of positions at a time and never holds them all.
*logits*: the model computes its own logits; this is for architectures that need more than one matrix product (scale,
cap). A measurement, not a list of models, decides which path a model takes.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from train_loop.data.loader import IGNORED
from train_loop.devices import exact
from train_loop.models.building import context_length
from train_loop.models.experts import Experts
from train_loop.ops.cross_entropy import TiedGradient, linear_cross_entropy

_CHUNK = 1024  # positions whose logits are held at once where nothing is trained
_LOGIT_BYTES = {"cpu": 2**25}  # their limit when nothing is trained, so that no vocabulary is too large
_LOGIT_BYTES_ELSEWHERE = 2**28  # GPUs want larger products


Visit = Callable[[torch.Tensor, torch.Tensor], None]
"""Called with logits [chunk, vocabulary] float32 and targets [chunk] of some positions."""


class Statistics(NamedTuple):
    """A batch's sums for exact evaluation: nll in nats [] float64, correct targets and all targets [] int64."""

    nll: torch.Tensor
    correct: torch.Tensor
    targets: torch.Tensor


class Objective(nn.Module):
    """A causal language model with its training loss.

    Args:
        model: any causal language model of Transformers.
        tied: see `TiedGradient`.
        experts: the model's, if it has some; the gradient of their balance joins that of the loss.

    Attributes:
        loss_path: "fused" or "logits".
        compiled: if layers are compiled, the (training, rows, tokens) of the inputs that they are compiled for. Others,
            such as a short last micro-batch, run uncompiled, because compiling again would take longer.
    """

    def __init__(
        self, model: PreTrainedModel, tied: TiedGradient | None = None, experts: Experts | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.tied, self.experts = tied, experts
        self.compiled: set[tuple[bool, int, int]] | None = None
        self.loss_path = "logits"
        if model.device.type != "meta":
            self.choose_path()

    def choose_path(self) -> None:
        """Measure which path leads to the model's own logits. A model without weights has to get them first."""
        self.loss_path = "logits"
        self.loss_path = "fused" if head_is_plain(self) else "logits"

    @property
    def _no_split_modules(self) -> list[str]:
        """Class names of the layers that FSDP shards one by one if its settings name none."""
        present = {type(each).__name__ for each in self.model.modules()}
        return sorted(present.intersection(self.model._no_split_modules or []))

    def forward(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        positions: torch.Tensor | None = None,
        statistics: bool = False,
        visit: Visit | None = None,
    ) -> Any:
        """Summed nll of a batch.

        Args:
            inputs: token ids [batch, block] int64.
            targets: the next token of each position [batch, block] int64, `IGNORED` where there is none.
            positions: the place of each input in its document [batch, block] int64. If given, attention stays inside
                stretches of rising positions; otherwise each row is one stretch.
            statistics: for evaluation, return `Statistics` instead.
            visit: for study, called with all logits, one chunk of positions at a time, in order; returns nothing then.

        Returns:
            The nll summed over all targets, in nats [] float32.
        """
        if self.compiled is None or (self.training, *inputs.shape) in self.compiled:
            return self._forward(inputs, targets, positions, statistics, visit)
        with torch.compiler.set_stance("force_eager"):
            return self._forward(inputs, targets, positions, statistics, visit)

    def _forward(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        positions: torch.Tensor | None,
        statistics: bool,
        visit: Visit | None,
    ) -> Any:
        targets = targets.flatten()
        if statistics:
            return self._statistics(inputs, targets, positions)
        if visit is not None:
            for logits, target in self._chunks(inputs, targets, positions):
                visit(logits, target)
            return None
        nll_sum = self._nll_sum(inputs, targets, positions)
        return nll_sum if self.experts is None else self.experts.attach(nll_sum, targets.view_as(inputs))

    def _nll_sum(self, inputs: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        if self.loss_path == "logits":
            logits = self._logits(inputs, positions).float()
            return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        hidden, head = self._hidden(inputs, positions), self._head()
        weight: torch.Tensor = head.weight
        bias: torch.Tensor | None = head.bias
        compiled = self.compiled is not None and (self.training, *inputs.shape) in self.compiled
        return linear_cross_entropy(hidden, weight, bias, targets, IGNORED, self.tied, compiled)

    def _hidden(self, inputs: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        """Last hidden states [batch * block, width]."""
        return self.model.base_model(**self._arguments(inputs, positions)).last_hidden_state.flatten(0, 1)

    def _logits(self, inputs: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        """The model's own logits [batch * block, vocabulary]."""
        return self.model(**self._arguments(inputs, positions)).logits.flatten(0, 1)

    def _arguments(self, inputs: torch.Tensor, positions: torch.Tensor | None) -> dict[str, Any]:
        """The arguments for a Transformers model.

        It keeps documents apart if positions restart and it gets neither a mask nor a cache. FlashAttention does so
        within one row only, so the rows become one; it treats a row boundary like a document boundary.
        """
        if positions is None:
            return {"input_ids": inputs, "use_cache": False}
        if "flash" in str(self.model.config._attn_implementation):
            inputs, positions = inputs.reshape(1, -1), positions.reshape(1, -1)
        return {"input_ids": inputs, "position_ids": positions, "use_cache": False}

    def _head(self) -> nn.Linear:
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        return head

    def _chunks(
        self, inputs: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Logits [chunk, vocabulary] float32 and targets [chunk], chunk by chunk."""
        plain = self.loss_path == "fused"
        states = self._hidden(inputs, positions) if plain else self._logits(inputs, positions)
        vocabulary = self._head().out_features if plain else states.shape[1]
        size = min(_CHUNK, max(1, _LOGIT_BYTES.get(inputs.device.type, _LOGIT_BYTES_ELSEWHERE) // (4 * vocabulary)))
        for state, target in zip(states.split(size), targets.split(size), strict=True):
            yield (self._head()(state) if plain else state).float(), target

    def _statistics(self, inputs: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor | None) -> Statistics:
        nll, correct = [], []
        for logits, target in self._chunks(inputs, targets, positions):
            likeliest = logits.argmax(-1)
            correct.append(likeliest == target)
            # Does what cross_entropy does, but in place instead of in a copy of the logits.
            logits -= logits.gather(1, likeliest[:, None])
            picked = logits.gather(1, target.clamp(min=0)[:, None])[:, 0]
            nll.append((logits.exp_().sum(-1).log() - picked).masked_fill(target == IGNORED, 0))
            del logits  # before the next chunk, so that only one is held
        return Statistics(exact(torch.cat(nll)).sum(), torch.cat(correct).sum(), (targets != IGNORED).sum())


@torch.no_grad()
def head_is_plain(objective: Objective) -> bool:
    """Whether the model's logits are one matrix product of its last hidden states, and nothing else.

    The test scales up hidden states until logits are in the hundreds: a cap such as Gemma 2's 30 tanh(x / 30) barely
    changes the small logits of a fresh model, but it matters once the model is trained.
    """
    model = objective.model
    base, head = model.base_model, model.get_output_embeddings()
    if base is model or not isinstance(head, nn.Linear):
        return False
    plain: list[torch.Tensor] = []
    found: list[torch.Tensor] = []

    def blow_up(module: nn.Module, arguments: Any, output: Any) -> Any:
        hidden = getattr(output, "last_hidden_state", None)
        if hidden is None or hidden.shape[-1] != head.in_features:
            return output
        output["last_hidden_state"] = hidden * (300 / head(hidden).abs().max().clamp(min=1e-6))
        plain.append(head(output["last_hidden_state"])[0])
        return output

    training = model.training
    model.eval()
    handle = base.register_forward_hook(blow_up)
    try:
        device = head.weight.device
        tokens = torch.arange(min(4, context_length(model) or 4), device=device)[None]
        flash = "flash" in str(model.config._attn_implementation)  # which needs half precision
        with torch.autocast(device.type, torch.bfloat16) if flash else nullcontext():
            objective(tokens, tokens, visit=lambda logits, targets: found.append(logits))
        return bool(plain) and torch.allclose(torch.cat(found), plain[0].float(), rtol=1e-3, atol=0.1)
    finally:
        handle.remove()
        model.train(training)
