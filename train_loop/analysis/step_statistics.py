"""What a step does inside a model: norms of weights, gradients and updates, the gradient's noise, and what
`activations.py` sees. Each watched step becomes one line in study.jsonl.

    before_step      look at the step's windows with the weights as they are; start to watch gradients
    train_step       runs as usual: the step is the same, to the bit, watched or not
    after_step       put the results together

For a parameter w with gradient g (of the step's mean loss, over all processes, before clipping) and AdamW's second
moment v, after its update:

    weight_norm |w|, before the update      grad_norm |g|      update_ratio |w_after - w| / |w|
    second_moment sqrt(mean v): the gradient size that the update is divided by

A layer's values cover all its parameters together. If FSDP2 shards them, each process adds up its own rows.

The gradient noise scale (McCandlish et al., "An empirical model of large-batch training", 2018, appendix A.1) compares
the gradients of micro-batches, with t_m targets each, to that of the step, with T targets:

    E |g_m|^2 = |G|^2 + S / t_m        E |g|^2 = |G|^2 + S / T

Both equations together give the true gradient's |G|^2 ("signal") and the variance per token S ("noise"). S / |G|^2 is
the number of tokens at which a step's gradient is half noise. One step's estimates scatter widely, and the signal may
even be negative (then there is no scale): average signal and noise over steps before dividing. The tokens of a window
are not independent, so the scale is a yardstick, not a law.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from train_loop.analysis.activations import POSITION_BINS, Look, Sums, layers_of, of_step, over_processes
from train_loop.data.loader import IGNORED
from train_loop.data.order import permute
from train_loop.data.token_store import TokenStore
from train_loop.devices import exact
from train_loop.models.parameters import tensors_once
from train_loop.training.state import Observer, Run, StepBatch, StepBatches, TrainState

_ROW = 4096  # squares added up in fp32 at a time: errors of 1e-7, while one sum over millions is off by 1e-3
_SAMPLED_TOKENS = 1 << 26  # training tokens that are counted; of more data, evenly spread pieces stand for all
_PIECES = 64


class _MicroBatch(NamedTuple):
    """What is known of a micro-batch: its targets [] int64, its fp16 loss scale, |g|^2 of each parameter."""

    targets: torch.Tensor
    loss_scale: float
    squares: list[torch.Tensor]


class StepStatistics(Observer):
    """Watches a run's steps, and records each one that was applied. All processes must call it.

    Args:
        run: a run that is set up.
        every: the observer watches steps whose number is a multiple of this.
        write: called with the event, the step and the values of each record.
        norms: gradient norms from before the run was resumed, as far as they count for `clipped_share`.
    """

    def __init__(
        self,
        run: Run,
        every: int,
        write: Callable[[str, int, dict[str, Any]], None],
        norms: Iterable[float | None] = (),
    ) -> None:
        self.context, self.batches, self.state = run.context, run.batches, run.state
        self.every, self.write = every, write
        trained = {id(each) for each in run.state.parameters}
        tensors = tensors_once(run.state.model)
        self.parameters = {name: tensor for name, tensor in tensors.items() if id(tensor) in trained}
        prefix, self.layers = layers_of(run.state.model)
        self.layer_of = {
            name: name.removeprefix(f"{prefix}.").split(".")[0]
            for name in self.parameters
            if self.layers and name.startswith(f"{prefix}.")
        }
        self._batch: StepBatch | None = None
        self._handles: list[Any] = []
        self._before: dict[str, torch.Tensor] = {}
        self._sums: Sums = {}
        self._seen: tuple[Sums, Sums] = ({}, {})
        self._micro_batches: list[_MicroBatch] = []
        self._frequency: tuple[torch.Tensor, list[str]] | None = None
        self._clipped = deque((self._clips(norm) for norm in norms), maxlen=every)

    def before_step(self, state: TrainState, batch: StepBatch) -> None:
        """Look at the coming step, if it is one to watch."""
        self._release()
        if (state.step + 1) % self.every:
            return
        frequency, labels = self._frequencies()
        self._batch = batch
        attention = str(state.model.config._attn_implementation)
        self._seen = of_step(self.context, state.model, batch, Look(self.layers, attention, frequency, len(labels)))
        # Called after FSDP2's hooks, which put the whole weights in place for the forward pass.
        self._handles = [
            self.context.objective.register_forward_pre_hook(self._begin_micro_batch),
            state.optimizer.register_step_pre_hook(lambda *_: self._before_update()),
            state.optimizer.register_step_post_hook(lambda *_: self._after_update()),
        ]
        sharded = [each for each in self.context.objective.modules() if isinstance(each, FSDPModule)]
        if sharded:
            hooked: set[int] = set()
            for module in sharded:
                self._handles.append(
                    module.register_forward_pre_hook(lambda module, _: self._watch_gradients(module, hooked))
                )
        else:
            self._watch_gradients(state.model, set())

    def after_step(self, state: TrainState, record: dict[str, Any]) -> None:
        """Record the step, if it was applied."""
        self._clipped.append(self._clips(record["grad_norm"]))
        if self._sums and self._batch is not None and not record.get("skipped"):
            self.write("statistics", state.step, self._values(self._batch, record["grad_norm"]))
        self._release()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._before, self._sums, self._micro_batches, self._batch = [], {}, {}, [], None

    def _clips(self, norm: float | None) -> bool:
        """Whether a step with this gradient norm is clipped."""
        limit = self.context.max_grad_norm
        return limit is not None and norm is not None and norm > limit

    # --- gradients and updates

    def _begin_micro_batch(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if not torch.is_grad_enabled():
            return
        if self._batch is not None and len(self._micro_batches) == len(
            self._batch.micro_batches
        ):  # the step runs again
            self._micro_batches = []
        scaler = self.context.accelerator.scaler
        loss_scale = 1.0 if scaler is None else scaler.get_scale()
        self._micro_batches.append(_MicroBatch((arguments[1] != IGNORED).sum(), loss_scale, []))

    def _watch_gradients(self, module: nn.Module, hooked: set[int]) -> None:
        """Hook each micro-batch's gradients, before they are added to others and sent to other processes."""
        for parameter in module.parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor) and id(parameter) not in hooked:
                hooked.add(id(parameter))
                self._handles.append(parameter.register_hook(self._of_gradient))

    def _of_gradient(self, gradient: torch.Tensor) -> None:
        if self._micro_batches:
            self._micro_batches[-1].squares.append(square_sum(gradient))

    def _before_update(self) -> None:
        for name, parameter in self.parameters.items():
            self._before[name] = _local(parameter).clone()
            share = self._share(parameter)
            self._sums[f"{name}/weight"] = square_sum(self._before[name]) * share
            if parameter.grad is not None:
                self._sums[f"{name}/gradient"] = square_sum(_local(parameter.grad)) * share

    def _after_update(self) -> None:
        state = self.state.optimizer.state
        for name, parameter in self.parameters.items():
            share = self._share(parameter)
            self._sums[f"{name}/update"] = square_sum(_local(parameter).sub(self._before.pop(name))) * share
            if "exp_avg_sq" in state.get(parameter, {}):
                self._sums[f"{name}/moment"] = exact(_local(state[parameter]["exp_avg_sq"])).sum() * share

    def _share(self, tensor: torch.Tensor) -> float:
        """The factor for this process's sum over its part of a tensor, so that all processes' sums add up right."""
        if not isinstance(tensor, DTensor):
            return 1 / self.context.accelerator.num_processes
        copies = 1
        for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
            copies *= size if isinstance(placement, Replicate) else 1
        return 1 / copies

    # --- results

    def _values(self, batch: StepBatch, grad_norm: float) -> dict[str, Any]:
        """The record of a watched step."""
        sums = over_processes(self.context.accelerator, self._sums | self._noise_sums())
        limit = self.context.max_grad_norm
        # What clipping multiplied the gradients by.
        clip = 1.0 if limit is None else min(1.0, limit / (grad_norm + 1e-6))
        found = {name: float(value) for name, value in sums.items()}
        gradients = {name: found.get(f"{name}/gradient", 0.0) / clip**2 for name in self.parameters}

        def norms(names: list[str]) -> dict[str, float]:
            weight, update = (
                math.sqrt(sum(found[f"{name}/{what}"] for name in names)) for what in ("weight", "update")
            )
            numbers = sum(self.parameters[name].numel() for name in names)
            moments = sum(found.get(f"{name}/moment", 0.0) for name in names)
            return {
                "weight_norm": weight,
                "grad_norm": math.sqrt(sum(gradients[name] for name in names)),
                "update_ratio": update / weight if weight else math.inf if update else 0.0,
                "second_moment": math.sqrt(moments / max(1, numbers)),
            }

        layers = {
            str(number): norms([name for name, layer in self.layer_of.items() if layer == str(number)])
            | self._activations(str(number))
            for number in range(len(self.layers))
        }
        seen, _ = self._seen
        _, entropy, top, z = (seen["logits"] / seen["positions"]).tolist()
        return {
            "tokens": targets_until(self.batches, batch.index + 1),
            "parameters": {name: norms([name]) for name in self.parameters},
            "layers": layers,
            "logits": {"entropy": entropy, "top_1_probability": top, "z": z},
            "clipped_share": sum(self._clipped) / len(self._clipped),
            **self._noise(found, sum(gradients.values()), batch.denominator),
            **self._losses(),
        }

    def _activations(self, layer: str) -> dict[str, Any]:
        sums, maxima = self._seen
        rms = math.sqrt(float(sums[f"{layer}/squares"] / sums[f"{layer}/numbers"]))
        entropy = dead = None
        if f"{layer}/entropy" in sums:
            entropy = (sums[f"{layer}/entropy"] / sums[f"{layer}/queries"]).tolist()
        if f"{layer}/above" in sums:
            dead = float(exact(sums[f"{layer}/above"] == 0).mean())
        return {
            "activation_rms": rms,
            "activation_outliers": float(maxima[f"{layer}/peak"]) / rms if rms else 0.0,
            "attention_entropy": entropy,
            "dead_units": dead,
        }

    def _losses(self) -> dict[str, Any]:
        sums, _ = self._seen

        def means(name: str) -> list[float | None]:
            pairs = zip(sums[f"{name}_nll"].tolist(), sums[f"{name}_count"].tolist(), strict=True)
            return [nll / count if count else None for nll, count in pairs]

        block = self.batches.windows.block_size
        bins = min(POSITION_BINS, block)
        return {
            "loss_by_position": means("position"),
            "position_bins": [-(-number * block // bins) for number in range(bins)],
            "loss_by_frequency": means("frequency"),
            "frequency_bins": self._frequencies()[1],
        }

    # --- noise

    def _noise_sums(self) -> Sums:
        """Sums over this process's micro-batches: |g_m|^2 of each one's mean loss, 1 / t_m, and their number."""
        weight = self.context.accumulator.weight  # the factor for their summed losses
        total = exact(torch.zeros(3, device=self.context.accelerator.device))
        for targets, loss_scale, squares in self._micro_batches:
            if count := int(targets):
                square = float(torch.stack(squares).sum()) / (weight * loss_scale * count) ** 2
                total += total.new_tensor([square, 1 / count, 1])
        return dict(zip(("noise/square", "noise/inverse", "noise/count"), total, strict=True))

    def _noise(self, found: dict[str, float], big: float, targets: int) -> dict[str, Any]:
        """The gradient noise scale and its two parts; None if the step has fewer than two micro-batches."""
        count = found["noise/count"]
        if count < 2:
            return {"gradient_noise_scale": None, "gradient_noise": None}
        signal, noise = noise_of(big, targets, found["noise/square"] / count, found["noise/inverse"] / count)
        scale = noise / signal if signal > 0 else None
        return {"gradient_noise_scale": scale, "gradient_noise": {"signal": signal, "noise": noise}}

    # --- frequency of tokens

    def _frequencies(self) -> tuple[torch.Tensor, list[str]]:
        """The bin of each token of the vocabulary, by its count in the training data, and the bins' labels."""
        if self._frequency is None:
            vocabulary = len(self.state.model.get_input_embeddings().weight)  # type: ignore[arg-type]
            bins = frequency_bins(token_counts(self.batches.windows.store, vocabulary))
            labels = ["0", *(f"{10**power:,}-{10 ** (power + 1) - 1:,}" for power in range(int(bins.max())))]
            self._frequency = torch.from_numpy(bins).to(self.context.accelerator.device), labels
        return self._frequency


def square_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor's squares [] float64, to 1e-7 or better; see `_ROW`."""
    flat = tensor.detach().flatten()
    whole = len(flat) // _ROW * _ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1, dtype=torch.float32)
    return exact(rows).square().sum() + exact(flat[whole:]).square().sum()


def noise_of(big: float, targets: float, small: float, inverse: float) -> tuple[float, float]:
    """|G|^2 and S as in the module's docstring.

    Args:
        big: |g|^2 of the step.
        targets: T, its targets.
        small: mean of the micro-batches' |g_m|^2.
        inverse: mean of 1 / t_m.
    """
    noise = (small - big) / (inverse - 1 / targets)
    return big - noise / targets, noise


def targets_until(batches: StepBatches, step: int) -> int:
    """The number of targets in the first `step` steps of a run."""
    plan, windows = batches.plan, batches.windows
    epochs, rest = divmod(step, plan.steps_per_epoch)
    places = np.arange(min(rest * plan.sequences_per_step, plan.blocks_per_epoch), dtype=np.uint64)
    begun = windows.targets(permute(places, plan.blocks_per_epoch, plan.seed, epochs)) if rest else 0
    return epochs * windows.store.ledger.trained_targets + begun


def token_counts(store: TokenStore, vocabulary: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """How often each token occurs in a store [vocabulary]; estimated from evenly spread pieces of a large store."""
    size = len(store)
    counts = np.zeros(vocabulary)
    length = -(-min(size, _SAMPLED_TOKENS) // _PIECES)
    starts = range(0, size, length) if size <= _SAMPLED_TOKENS else range(0, size - length, size // _PIECES)
    seen = 0
    for start in starts:
        piece = store.tokens[start : start + length]
        counts += np.bincount(piece, minlength=vocabulary)
        seen += len(piece)
    return counts * (size / max(seen, 1))


def frequency_bins(counts: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The bin of each count: 0 for 0, 1 for 1 to 9, 2 for 10 to 99, ..."""
    bins = np.zeros(len(counts), dtype=np.int64)
    some = counts > 0
    # Not by logarithms: rounding may put that of 1,000 below 3.
    powers = 10.0 ** np.arange(1, 19)
    bins[some] = 1 + np.searchsorted(powers, np.maximum(counts[some], 1), side="right")
    return bins


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()
