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
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from train_loop import compat
from train_loop.data.loader import IGNORED, Batch
from train_loop.devices import exact
from train_loop.distributed.collectives import reduce_exactly
from train_loop.models.building import without_compile
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
    """The name of a model's list of layers, and the layers: of all its lists, the one with the most weights.

    Both are empty for a model without a list.
    """
    lists = [(name, each) for name, each in model.named_modules() if isinstance(each, nn.ModuleList)]
    if not lists:
        return "", []
    name, found = max(lists, key=lambda each: sum(parameter.numel() for parameter in each[1].parameters()))
    return name, list(found)


class Look:
    """Sums over the positions of some windows, filled by `of_batch`.

    Args:
        layers: the model's layers.
        attention: the name of its attention implementation.
        frequency: the bin of each token of the vocabulary [vocabulary] int64; see `StepStatistics`.
        frequency_bins: the number of bins.

    Attributes:
        sums, maxima: see `of_step`.
    """

    def __init__(self, layers: list[nn.Module], attention: str, frequency: torch.Tensor, frequency_bins: int) -> None:
        self.layers, self.attention = layers, attention
        self.frequency, self.frequency_bins = frequency, frequency_bins
        self.sums: Sums = {}
        self.maxima: Sums = {}
        self._layer: int | None = None
        self._real = torch.empty(0)
        self._packed = False
        self._each: list[torch.Tensor] = []

    def of_batch(self, objective: nn.Module, batch: Batch) -> None:
        """Run a batch through the prepared `Objective`, and add what it shows to the sums and maxima."""
        self._real = batch.targets != IGNORED
        self._packed = batch.positions is not None
        self._each = []
        with self._hooks():
            objective(batch.inputs, batch.targets, batch.positions, visit=self._of_logits)
        self._of_positions(batch, torch.cat(self._each, dim=1))

    def _add(self, name: str, value: torch.Tensor) -> None:
        value = exact(value)
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _raise(self, name: str, value: torch.Tensor) -> None:
        """Raise a maximum to `value` where that is larger."""
        value = exact(value)
        self.maxima[name] = torch.maximum(self.maxima[name], value) if name in self.maxima else value

    # --- losses and logits

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
        target = batch.targets.flatten()[real]
        for name, number, index in (
            ("position", bins, place),
            ("frequency", self.frequency_bins, self.frequency[target]),
        ):
            index = index.to(values.device)
            zeros = values.new_zeros(number)
            self._add(f"{name}_nll", zeros.index_add(0, index, values[0]))
            self._add(f"{name}_count", zeros.index_add(0, index, torch.ones_like(values[0])))

    # --- layers

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        with ExitStack() as stack:
            for number, layer in enumerate(self.layers):
                for handle in (
                    layer.register_forward_pre_hook(self._enter(number)),
                    layer.register_forward_hook(self._of_layer),
                    *(each.register_forward_hook(self._of_units) for each in _activation_functions(layer)),
                ):
                    stack.callback(handle.remove)
            stack.enter_context(_attention(self.attention, self.layers, self._of_attention))
            yield

    def _enter(self, number: int) -> Callable[..., None]:
        """A hook that notes which layer runs."""

        def enter(module: nn.Module, arguments: Any) -> None:
            self._layer = number

        return enter

    def _of_layer(self, module: nn.Module, arguments: Any, output: Any) -> None:
        """Add up the size of a layer's output; the layer has run."""
        x = output[0] if isinstance(output, tuple) else output
        x = x.flatten(0, -2)[self._real.flatten()].float()
        self._add(f"{self._layer}/squares", exact(x.square().sum(1)).sum())
        self._add(f"{self._layer}/numbers", torch.tensor(x.numel(), device=x.device))
        self._raise(f"{self._layer}/peak", x.abs().amax() if len(x) else x.new_zeros(()))
        self._layer = None

    def _of_units(self, module: nn.Module, arguments: Any, output: Any) -> None:
        """Count at how many positions each unit's output is above 0."""
        if isinstance(output, torch.Tensor) and output.shape[:-1].numel() == self._real.numel():
            above = (output.flatten(0, -2) > 0)[self._real.flatten()].sum(0)
            self._add(f"{self._layer}/above", above)

    def _of_attention(self, query: torch.Tensor, key: torch.Tensor, mask: Any, options: dict[str, Any]) -> None:
        """Add up a layer's entropies. query [batch, heads, block, width], key [batch, fewer heads, keys, width]."""
        flash = "flash" in self.attention
        known = mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 4)
        windows = query.shape[0::2] == self._real.shape
        # FlashAttention learns of packed documents in other ways; sinks add to the sum without being keys.
        if self._layer is None or not known or not windows or options.get("s_aux") is not None:
            return
        if flash and self._packed:
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


@torch.no_grad()
def of_step(context: StepContext, model: PreTrainedModel, batch: StepBatch, look: Look) -> tuple[Sums, Sums]:
    """Sums and maxima over all positions of a step's windows, on all processes. All processes must call this.

    Args:
        context: the run's.
        model: has the weights to look at.
        batch: the step's.
        look: a new one, still empty.
    """
    accelerator, objective = context.accelerator, context.objective
    training = objective.training
    objective.eval()
    try:
        with without_compile(model):
            for micro_batch in batch.micro_batches:
                look.of_batch(objective, micro_batch.to(accelerator.device))
    finally:
        objective.train(training)
    return over_processes(accelerator, look.sums), over_processes(accelerator, look.maxima, maximum=True)
