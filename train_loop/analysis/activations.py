"""Looks inside a model, from tokens to losses: activations, attention, logits, losses by position and by frequency.

    step's windows -> model before the update, without dropout or gradients -> sums over all positions

A separate forward pass looks at a step's windows and leaves the training pass alone: there, nothing that compiles the
model, saves memory or draws dropout masks sees a hook. It costs about a third of a step. All sums are float64 and are
added up over the processes, so they cover the whole step; a position counts if it has a target.

Definitions, for a layer with output x [positions, width]:

    activation_rms         root of the mean of x^2
    activation_outliers    max |x| / activation_rms
    attention_entropy      mean over queries of -sum_k p_k ln p_k, in nats, for each head; over at most 64 evenly spaced
                           queries per window, since all of them would need memory for a block x block matrix
    dead_units             share of the units of the layer's only activation function (in a gated layer, of the gate)
                           whose output is never above 0: ReLUs that are off, GELUs or SiLUs that never see a positive
                           number
    tokens, probability    for each expert of a router: the share of tokens that it computes, and their mean score of it
                           (`models/experts.py`)
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from train_loop import compat
from train_loop.analysis.trial_step import evaluating
from train_loop.data.loader import IGNORED, Batch
from train_loop.devices import exact
from train_loop.distributed.collectives import reduce_exactly
from train_loop.models.experts import Experts
from train_loop.models.routers import Routed
from train_loop.training.state import StepBatch, StepContext

Sums = dict[str, torch.Tensor]
"""Named float64 tensors to be summed, or maximised, over batches and processes."""

POSITION_BINS = 32
_QUERIES = 64  # queries per window whose attention is measured
_ROWS = 256  # rows of logits at a time: few enough to stay in a CPU's cache


def over_processes(accelerator: Accelerator, sums: Sums, maximum: bool = False) -> Sums:
    """Sums (or maxima) over all processes, in one exchange; names and shapes must be the same on all of them."""
    if accelerator.num_processes == 1 or not sums:
        return sums
    flat = torch.cat([each.flatten() for each in sums.values()])
    flat = reduce_exactly(accelerator, flat, "max" if maximum else "sum")
    parts = flat.split([each.numel() for each in sums.values()])
    return {name: part.view(each.shape) for (name, each), part in zip(sums.items(), parts, strict=True)}


def layers_of(model: PreTrainedModel) -> tuple[str, list[nn.Module]]:
    """The name and the layers of a model's list with the most weights; both are empty for a model without a list."""
    lists = {name: each for name, each in model.named_modules() if isinstance(each, nn.ModuleList)}
    name = max(lists, key=lambda name: sum(each.numel() for each in lists[name].parameters()), default="")
    return name, list(lists.get(name, ()))


class Look:
    """Sums and maxima over the positions of some windows, filled by `of_batch`.

    `attention` names the model's attention implementation; `frequency` is the bin of each token [vocabulary] int64.
    """

    def __init__(
        self,
        layers: list[nn.Module],
        attention: str,
        frequency: torch.Tensor,
        frequency_bins: int,
        experts: Experts | None = None,
    ) -> None:
        self.layers, self.attention, self.experts = layers, attention, experts
        self.frequency, self.frequency_bins = frequency, frequency_bins
        self.sums: Sums = {}
        self.maxima: Sums = {}
        self._layer: int | None = None

    def of_batch(self, objective: nn.Module, batch: Batch) -> None:
        """Run a batch through the prepared `Objective`, and add what it shows to the sums and maxima."""
        self._real = batch.targets != IGNORED
        self._packed = batch.positions is not None
        self._each: list[torch.Tensor] = []
        with ExitStack() as stack:
            for number, layer in enumerate(self.layers):
                stack.enter_context(layer.register_forward_pre_hook(partial(self._enter, number)))
                stack.enter_context(layer.register_forward_hook(self._of_layer))
                for each in _activation_functions(layer):
                    stack.enter_context(each.register_forward_hook(self._of_units))
            stack.enter_context(_attention(self.attention, self.layers, self._of_attention))
            if self.experts is not None:
                stack.enter_context(self.experts.watched(self._of_router))
            objective(batch.inputs, batch.targets, batch.positions, visit=self._of_logits)
        self._of_positions(batch, torch.cat(self._each, dim=1))

    def _add(self, name: str, value: torch.Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0) + exact(value)

    def _of_logits(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Keep nll, entropy, top-1 probability and z of each position."""
        for rows, target in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True):
            z = rows.logsumexp(-1)
            probability = (rows - z[:, None]).exp_()
            top = probability.amax(-1)
            entropy = z - probability.mul_(rows).sum(-1)
            nll = z - rows.gather(1, target.clamp(min=0)[:, None])[:, 0]
            self._each.append(torch.stack([nll, entropy, top, z]))

    def _of_positions(self, batch: Batch, each: torch.Tensor) -> None:
        """Add up nll, entropy, top-1 probability and z of each position [4, positions]."""
        real = self._real.flatten()
        values = exact(each[:, real])
        self._add("positions", real.sum())
        self._add("logits", values.sum(1))
        block = self._real.shape[1]
        bins = min(POSITION_BINS, block)
        place = (torch.arange(block, device=real.device) * bins // block).expand_as(self._real).flatten()[real]
        frequency = self.frequency[batch.targets.flatten()[real]]
        for name, number, index in (("position", bins, place), ("frequency", self.frequency_bins, frequency)):
            zeros, index = values.new_zeros(number), index.to(values.device)
            self._add(f"{name}_nll", zeros.index_add(0, index, values[0]))
            self._add(f"{name}_count", zeros.index_add(0, index, torch.ones_like(values[0])))

    def _enter(self, number: int, module: nn.Module, arguments: Any) -> None:
        """Note which layer runs."""
        self._layer = number

    def _of_layer(self, module: nn.Module, arguments: Any, output: Any) -> None:
        """Add up the size of a layer's output; the layer has run."""
        x = output[0] if isinstance(output, tuple) else output
        x = x.flatten(0, -2)[self._real.flatten()].float()
        self._add(f"{self._layer}/squares", exact(x.square().sum(1)).sum())
        self._add(f"{self._layer}/numbers", torch.tensor(x.numel(), device=x.device))
        peak = exact(x.abs().amax() if len(x) else x.new_zeros(()))
        self.maxima[f"{self._layer}/peak"] = torch.maximum(self.maxima.get(f"{self._layer}/peak", peak), peak)
        self._layer = None

    def _of_units(self, module: nn.Module, arguments: Any, output: Any) -> None:
        """Count at how many positions each unit's output is above 0."""
        if isinstance(output, torch.Tensor) and output.shape[:-1].numel() == self._real.numel():
            self._add(f"{self._layer}/above", (output.flatten(0, -2) > 0)[self._real.flatten()].sum(0))

    def _of_router(self, name: str, routed: Routed) -> None:
        """Count the tokens of each of a router's experts, and add up their scores."""
        real = self._real.flatten()
        chosen = torch.zeros_like(routed.scores).scatter_(-1, routed.chosen, 1.0)
        self._add(f"{name}/tokens", exact(chosen[real]).sum(0))
        self._add(f"{name}/probability", exact(routed.scores[real]).sum(0))

    def _of_attention(self, query: torch.Tensor, key: torch.Tensor, mask: Any, options: dict[str, Any]) -> None:
        """Add up a layer's entropies. query [batch, heads, block, width], key [batch, fewer heads, keys, width]."""
        flash = "flash" in self.attention
        known = mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 4)
        windows = query.shape[0::2] == self._real.shape
        sinks = options.get("s_aux") is not None  # which add to the sum without being keys
        packed = flash and self._packed  # FlashAttention learns of packed documents in other ways
        if self._layer is None or not known or not windows or sinks or packed:
            return
        block, keys = query.shape[2], key.shape[2]
        rows = torch.linspace(0, block - 1, min(block, _QUERIES), device=query.device).round().long()
        scaling = options.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        grouped = query[:, :, rows].unflatten(1, (key.shape[1], -1)).float()
        scores = grouped @ key[:, :, None].float().transpose(-1, -2) * scaling
        scores = scores.flatten(1, 2)  # [batch, heads, rows, keys]
        if options.get("softcap") and "sdpa" not in self.attention:  # sdpa leaves it out
            scores = options["softcap"] * (scores / options["softcap"]).tanh()
        if mask is None:
            later = torch.arange(keys, device=rows.device) - rows[:, None] - (keys - block)
            hidden = later > 0
            if flash and options.get("sliding_window"):
                hidden |= later <= -options["sliding_window"]
            scores = scores.masked_fill(hidden, -torch.inf)
        elif mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask[:, :, rows, :keys], -torch.inf)
        else:
            scores = scores + mask[:, :, rows, :keys]
        entropy = torch.special.entr(scores.softmax(-1)).sum(-1)  # [batch, heads, rows]
        real = self._real[:, rows]
        self._add(f"{self._layer}/entropy", exact(entropy.masked_fill(~real[:, None], 0)).sum((0, 2)))
        self._add(f"{self._layer}/queries", real.sum())


def _activation_functions(layer: nn.Module) -> list[nn.Module]:
    """A layer's activation function, if it has exactly one; otherwise an empty list."""
    homes = ("torch.nn.modules.activation", "transformers.activations")
    found = [each for each in layer.modules() if type(each).__module__ in homes and not list(each.parameters())]
    return found if len(found) == 1 else []


@contextmanager
def _attention(implementation: str, layers: list[nn.Module], see: Callable[..., None]) -> Iterator[None]:
    """A context in which `see` is called with all queries and keys before attention is computed as usual."""

    def attend(module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any = None, **options: Any) -> Any:
        see(query, key, attention_mask, options)
        usual = eager[type(module).__module__] if original is None else original
        return usual(module, query, key, value, attention_mask, **options)

    # Each model's file has its own eager attention.
    files = {type(each).__module__ for layer in layers for each in layer.modules()}
    found = {file: getattr(sys.modules[file], "eager_attention_forward", None) for file in files}
    eager = {file: function for file, function in found.items() if function is not None}
    original = ALL_ATTENTION_FUNCTIONS.get(implementation)
    ALL_ATTENTION_FUNCTIONS[implementation] = attend
    try:
        with compat.eager_attention(attend, eager) if implementation == "eager" else nullcontext():
            yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[implementation]


def of_step(context: StepContext, batch: StepBatch, look: Look) -> tuple[Sums, Sums]:
    """Sums and maxima over all positions of a step's windows, by a new look. All processes must call this."""
    with evaluating(context.objective):
        for micro_batch in batch.micro_batches:
            look.of_batch(context.objective, micro_batch.to(context.accelerator.device))
    sums = over_processes(context.accelerator, look.sums)
    return sums, over_processes(context.accelerator, look.maxima, maximum=True)
