"""What a step does inside a model: norms of weights, gradients and updates, the gradient's noise.

Each watched step becomes one line in study.jsonl, together with what `activations.py` sees.

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
from typing import Any

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

Write = Callable[[str, int, dict[str, Any]], None]
"""Is called with the event, the step and the values of each record."""


class StepStatistics(Observer):
    """Watches a run's steps, and records each one that was applied. All processes must call it.

    Args:
        every: the observer watches steps whose number is a multiple of this.
        norms: gradient norms from before the run was resumed, as far as they count for `clipped_share`.
    """

    def __init__(self, run: Run, every: int, write: Write, norms: Iterable[float | None] = ()) -> None:
        self.context, self.batches, self.state = run.context, run.batches, run.state
        self.every, self.write = every, write
        trained = {id(each) for each in run.state.parameters}
        self.parameters = {name: each for name, each in tensors_once(run.state.model).items() if id(each) in trained}
        self.list_of_layers, self.layers = layers_of(run.state.model)
        self.experts = run.context.accelerator.unwrap_model(run.context.objective).experts
        self._batch: StepBatch | None = None
        self._handles: list[Any] = []
        self._before: dict[str, torch.Tensor] = {}
        self._sums: Sums = {}
        self._seen: tuple[Sums, Sums] = ({}, {})
        # Of each micro-batch: its targets [] int64, its fp16 loss scale, |g|^2 of each parameter.
        self._micro_batches: list[tuple[torch.Tensor, float, list[torch.Tensor]]] = []
        self._frequency: tuple[torch.Tensor, list[str]] | None = None
        self._clipped = deque((self._clips(norm) for norm in norms), maxlen=every)

    def before_step(self, state: TrainState, batch: StepBatch) -> None:
        """Look at the coming step, if it is one to watch."""
        self._release()
        if (state.step + 1) % self.every:
            return
        self._batch = batch
        frequency, labels = self._frequencies()
        attention = str(state.model.config._attn_implementation)
        look = Look(self.layers, attention, frequency, len(labels), self.experts)
        self._seen = of_step(self.context, batch, look)
        # Called after FSDP2's hooks, which put the whole weights in place for the forward pass.
        self._handles = [
            self.context.objective.register_forward_pre_hook(self._begin_micro_batch),
            state.optimizer.register_step_pre_hook(lambda *_: self._before_update()),
            state.optimizer.register_step_post_hook(lambda *_: self._after_update()),
        ]
        hooked: set[int] = set()
        sharded = [each for each in self.context.objective.modules() if isinstance(each, FSDPModule)]
        for module in sharded:
            watch = module.register_forward_pre_hook(lambda module, _: self._watch_gradients(module, hooked))
            self._handles.append(watch)
        if not sharded:
            self._watch_gradients(state.model, hooked)

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
        if not torch.is_grad_enabled() or self._batch is None:
            return
        if len(self._micro_batches) == len(self._batch.micro_batches):  # the step runs again
            self._micro_batches = []
        scaler = self.context.accelerator.scaler
        loss_scale = 1.0 if scaler is None else scaler.get_scale()
        self._micro_batches.append(((arguments[1] != IGNORED).sum(), loss_scale, []))

    def _watch_gradients(self, module: nn.Module, hooked: set[int]) -> None:
        """Hook each micro-batch's gradients, before they are added to others and sent to other processes."""
        for parameter in module.parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor) and id(parameter) not in hooked:
                hooked.add(id(parameter))
                self._handles.append(parameter.register_hook(self._of_gradient))

    def _of_gradient(self, gradient: torch.Tensor) -> None:
        if self._micro_batches:
            _, _, squares = self._micro_batches[-1]
            squares.append(square_sum(gradient))

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
        axes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
        return 1 / math.prod(size for size, placement in axes if isinstance(placement, Replicate))

    # --- results

    def _values(self, batch: StepBatch, grad_norm: float) -> dict[str, Any]:
        """The record of a watched step."""
        sums = over_processes(self.context.accelerator, self._sums | self._noise_sums())
        found = {name: float(value) for name, value in sums.items()}
        limit = self.context.max_grad_norm
        clip = 1.0 if limit is None else min(1.0, limit / (grad_norm + 1e-6))  # what clipping multiplied by
        clipped = clip**2 or math.nan  # a limit so low that nothing is left of the gradient
        gradients = {name: found.get(f"{name}/gradient", 0.0) / clipped for name in self.parameters}

        def norms(names: list[str]) -> dict[str, float]:
            weight = math.sqrt(sum(found[f"{name}/weight"] for name in names))
            update = math.sqrt(sum(found[f"{name}/update"] for name in names))
            numbers = sum(self.parameters[name].numel() for name in names)
            moments = sum(found.get(f"{name}/moment", 0.0) for name in names)
            return {
                "weight_norm": weight,
                "grad_norm": math.sqrt(sum(gradients[name] for name in names)),
                "update_ratio": update / weight if weight else math.inf if update else 0.0,
                "second_moment": math.sqrt(moments / max(1, numbers)),
            }

        layers = {}
        for number in range(len(self.layers)):
            inside = f"{self.list_of_layers}.{number}."
            names = [name for name in self.parameters if name.startswith(inside)]
            layers[str(number)] = norms(names) | self._activations(number)
        seen, _ = self._seen

        def means(name: str) -> list[float | None]:
            pairs = zip(seen[f"{name}_nll"].tolist(), seen[f"{name}_count"].tolist(), strict=True)
            return [nll / count if count else None for nll, count in pairs]

        _, entropy, top, z = (seen["logits"] / seen["positions"]).tolist()
        block = self.batches.windows.block_size
        bins = min(POSITION_BINS, block)
        return {
            "tokens": targets_until(self.batches, batch.index + 1),
            "parameters": {name: norms([name]) for name in self.parameters},
            "layers": layers,
            **self._experts(),
            "logits": {"entropy": entropy, "top_1_probability": top, "z": z},
            "clipped_share": sum(self._clipped) / len(self._clipped),
            **self._noise(found, sum(gradients.values()), batch.denominator),
            "loss_by_position": means("position"),
            "position_bins": [-(-number * block // bins) for number in range(bins)],
            "loss_by_frequency": means("frequency"),
            "frequency_bins": self._frequencies()[1],
        }

    def _activations(self, layer: int) -> dict[str, Any]:
        sums, maxima = self._seen
        rms = math.sqrt(float(sums[f"{layer}/squares"] / sums[f"{layer}/numbers"]))
        entropy, above = sums.get(f"{layer}/entropy"), sums.get(f"{layer}/above")
        return {
            "activation_rms": rms,
            "activation_outliers": float(maxima[f"{layer}/peak"]) / rms if rms else 0.0,
            "attention_entropy": None if entropy is None else (entropy / sums[f"{layer}/queries"]).tolist(),
            "dead_units": None if above is None else float(exact(above == 0).mean()),
        }

    def _experts(self) -> dict[str, Any]:
        """The share of tokens and of probability of each expert, by layer; by router if a layer has several."""
        if self.experts is None or not self.experts.routers:
            return {}
        sums, _ = self._seen
        names = [name.removeprefix(f"{self.list_of_layers}.") for name in self.experts.routers]
        layers = [name.partition(".")[0] for name in names]
        shown = layers if len(set(layers)) == len(layers) else names
        found = {}
        for router, name in zip(self.experts.routers, shown, strict=True):
            shares = {each: sums[f"{router}/{each}"] / sums["positions"] for each in ("tokens", "probability")}
            found[name] = {each: [round(share, 6) for share in shares[each].tolist()] for each in shares}
        return {"experts": found}

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
        if (count := found["noise/count"]) < 2:
            return {"gradient_noise_scale": None, "gradient_noise": None}
        signal, noise = noise_of(big, targets, found["noise/square"] / count, found["noise/inverse"] / count)
        scale = noise / signal if signal > 0 else None
        return {"gradient_noise_scale": scale, "gradient_noise": {"signal": signal, "noise": noise}}

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
    """|G|^2 and S of the module's docstring, from |g|^2, T, and the micro-batches' mean |g_m|^2 and mean 1 / t_m."""
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
    size, counts = len(store), np.zeros(vocabulary)
    length = -(-min(size, _SAMPLED_TOKENS) // _PIECES)
    for start in range(0, size, length) if size <= _SAMPLED_TOKENS else range(0, size - length, size // _PIECES):
        counts += np.bincount(store.tokens[start : start + length], minlength=vocabulary)
    return counts * (size / max(counts.sum(), 1))


def frequency_bins(counts: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The bin of each count: 0 for 0, 1 for 1 to 9, 2 for 10 to 99, ..."""
    powers = 10.0 ** np.arange(1, 19)  # not logarithms: rounding may put that of 1,000 below 3
    return np.where(counts > 0, 1 + np.searchsorted(powers, counts, side="right"), 0)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()
