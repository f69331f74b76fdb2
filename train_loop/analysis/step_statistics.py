"""What a step does inside a model: norms of weights, gradients and updates, the gradient's noise, and what
`activations.py` sees. One line of study.jsonl for each step that is watched.

    before(step)     look at the step's windows with the weights as they are; watch the gradients that come
    train_step       as ever: it is the same step, to the bit, whether it is watched or not
    after(step)      put together what was seen

For a parameter w with gradient g (of the step's mean loss, over all processes, before clipping) and AdamW's second
moment v, after its update:

    weight_norm |w|, before the update      grad_norm |g|      update_ratio |w_after - w| / |w|
    second_moment sqrt(mean v): the size of gradient that the update is divided by

A layer's are those of all its parameters together. Where FSDP2 shards them, each process adds up its rows.

The gradient noise scale (McCandlish et al., "An empirical model of large-batch training", 2018, appendix A.1) compares
the gradients of micro-batches, of t_m targets each, with that of the step, of T:

    E |g_m|^2 = |G|^2 + S / t_m        E |g|^2 = |G|^2 + S / T

which is solved for the true gradient's |G|^2 ("signal") and the variance a token S ("noise"). S / |G|^2 is the number
of tokens at which a step's gradient is half noise. One step's estimate scatters widely, and signal may even come out
negative (then there is no scale): average signal and noise over steps before dividing. Tokens of one window are not
independent, so it is a yardstick, not a law.
"""

import math
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from train_loop.analysis.activations import POSITION_BINS, Sums, layers_of, of_step, over_processes
from train_loop.data.loader import IGNORED
from train_loop.data.order import permute
from train_loop.data.token_store import TokenStore
from train_loop.devices import exact
from train_loop.metrics.log import last_steps
from train_loop.models.parameters import tensors_once
from train_loop.training.step import StepResult

if TYPE_CHECKING:
    from train_loop.job import Run

_ROW = 4096  # numbers whose squares are added up in fp32: errors of 1e-7, where one sum over millions is off by 1e-3
_SAMPLED_TOKENS = 1 << 26  # of the training data that are counted; beyond, evenly spread pieces of it stand for all
_PIECES = 64


class _MicroBatch(NamedTuple):
    """Of one micro-batch: its targets [] int64, what its loss was multiplied by for fp16, |g|^2 of each parameter."""

    targets: torch.Tensor
    loss_scale: float
    squares: list[torch.Tensor]


class StepStatistics:
    """Watches a run's steps.

    Args:
        run: set up, before its first step.
        every: the steps whose number (from 1) this divides are watched.
    """

    def __init__(self, run: "Run", every: int) -> None:
        self.run, self.every = run, every
        trained = {id(each) for group in run.optimizer.param_groups for each in group["params"]}
        tensors = tensors_once(run.model)
        self.parameters = {name: tensor for name, tensor in tensors.items() if id(tensor) in trained}
        prefix, self.layers = layers_of(run.model)
        self.layer_of = {
            name: name.removeprefix(f"{prefix}.").split(".")[0]
            for name in self.parameters
            if self.layers and name.startswith(f"{prefix}.")
        }
        self._handles: list[Any] = []
        self._before: dict[str, torch.Tensor] = {}
        self._sums: Sums = {}
        self._seen: tuple[Sums, Sums] = ({}, {})
        self._micro_batches: list[_MicroBatch] = []
        self._rounds = 0
        self._frequency: tuple[torch.Tensor, list[str]] | None = None
        self._clipped: deque[bool] = deque(maxlen=every)

    def recall(self) -> None:
        """Go on with what the log knows of the steps before."""
        if self.run.accelerator.is_main_process:
            steps = last_steps(self.run.folder.metrics, self.every)
            self._clipped.extend(self._clips(event["grad_norm"]) for event in steps)

    def before(self, step: int) -> None:
        """Look at a step that is about to be taken, counted from 0, if it is one to watch. All processes call this."""
        self._release()
        if (step + 1) % self.every:
            return
        frequency, labels = self._frequencies()
        self._rounds = len(self.run.plan.share(step, 0, self.run.accelerator.num_processes))
        self._seen = of_step(self.run, step, self.layers, frequency, len(labels))
        inner = self.run.optimizer.optimizer
        # Told after the hooks of FSDP2, which put the whole weights there for the forward pass.
        self._handles = [
            self.run.objective.register_forward_pre_hook(self._begin_micro_batch),
            inner.register_step_pre_hook(lambda *_: self._before_update()),
            inner.register_step_post_hook(lambda *_: self._after_update()),
        ]
        sharded = [each for each in self.run.objective.modules() if isinstance(each, FSDPModule)]
        if sharded:
            hooked: set[int] = set()
            for module in sharded:
                self._handles.append(
                    module.register_forward_pre_hook(lambda module, _: self._watch_gradients(module, hooked))
                )
        else:
            self._watch_gradients(self.run.model, set())

    def after(self, step: int, result: StepResult) -> dict[str, Any] | None:
        """What was seen of the step; None if it was not watched, or not taken. All processes call this."""
        self._clipped.append(self._clips(result.grad_norm))
        watched = bool(self._sums) and result.taken
        values = self._values(step, result) if watched else None
        self._release()
        return values

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._before, self._sums, self._micro_batches = [], {}, {}, []

    def _clips(self, norm: float | None) -> bool:
        limit = self.run.config.optimizer.max_grad_norm
        return limit is not None and norm is not None and norm > limit

    # --- gradients and updates

    def _begin_micro_batch(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if not torch.is_grad_enabled():
            return
        if len(self._micro_batches) == self._rounds:  # the step is computed once more
            self._micro_batches = []
        scaler = self.run.accelerator.scaler
        loss_scale = 1.0 if scaler is None else scaler.get_scale()
        self._micro_batches.append(_MicroBatch((arguments[1] != IGNORED).sum(), loss_scale, []))

    def _watch_gradients(self, module: nn.Module, hooked: set[int]) -> None:
        """Be told each micro-batch's gradients, before they are added to others and sent to other processes."""
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
        state = self.run.optimizer.optimizer.state
        for name, parameter in self.parameters.items():
            share = self._share(parameter)
            self._sums[f"{name}/update"] = square_sum(_local(parameter).sub(self._before.pop(name))) * share
            if "exp_avg_sq" in state.get(parameter, {}):
                self._sums[f"{name}/moment"] = exact(_local(state[parameter]["exp_avg_sq"])).sum() * share

    def _share(self, tensor: torch.Tensor) -> float:
        """What to multiply a sum over what this process holds by, so that all processes' sum is the tensor's."""
        if not isinstance(tensor, DTensor):
            return 1 / self.run.accelerator.num_processes
        copies = 1
        for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
            copies *= size if isinstance(placement, Replicate) else 1
        return 1 / copies

    # --- what came of it

    def _values(self, step: int, result: StepResult) -> dict[str, Any]:
        sums = over_processes(self.run.accelerator, self._sums | self._noise_sums(step))
        limit = self.run.config.optimizer.max_grad_norm
        # What clip_grad_norm_ multiplied the gradients by.
        clip = 1.0 if limit is None else min(1.0, limit / (result.grad_norm + 1e-6))
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
            "tokens": trained_tokens(self.run, step + 1),
            "parameters": {name: norms([name]) for name in self.parameters},
            "layers": layers,
            "logits": {"entropy": entropy, "top_1_probability": top, "z": z},
            "clipped_share": sum(self._clipped) / len(self._clipped),
            **self._noise(found, sum(gradients.values()), self._targets(step)),
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

        block = self.run.config.data.block_size
        bins = min(POSITION_BINS, block)
        return {
            "loss_by_position": means("position"),
            "position_bins": [-(-number * block // bins) for number in range(bins)],
            "loss_by_frequency": means("frequency"),
            "frequency_bins": self._frequencies()[1],
        }

    # --- noise

    def _targets(self, step: int) -> int:
        return max(1, self.run.train.targets(self.run.plan.blocks(step)))

    def _noise_sums(self, step: int) -> Sums:
        """Over this process's micro-batches: |g_m|^2 of the mean loss of each, 1 / t_m, and how many there are."""
        accelerator, sums = self.run.accelerator, self.run.sums
        # What `train_step` multiplied their summed losses by.
        scale = accelerator.num_processes / self._targets(step) if sums is None else 1.0
        total = exact(torch.zeros(3, device=accelerator.device))
        for targets, loss_scale, squares in self._micro_batches:
            if count := int(targets):
                square = float(torch.stack(squares).sum()) / (scale * loss_scale * count) ** 2
                total += total.new_tensor([square, 1 / count, 1])
        return dict(zip(("noise/square", "noise/inverse", "noise/count"), total, strict=True))

    def _noise(self, found: dict[str, float], big: float, targets: int) -> dict[str, Any]:
        count = found["noise/count"]
        if count < 2:
            return {"gradient_noise_scale": None, "gradient_noise": None}
        signal, noise = noise_of(big, targets, found["noise/square"] / count, found["noise/inverse"] / count)
        scale = noise / signal if signal > 0 else None
        return {"gradient_noise_scale": scale, "gradient_noise": {"signal": signal, "noise": noise}}

    # --- frequency of tokens

    def _frequencies(self) -> tuple[torch.Tensor, list[str]]:
        """The bin of each token of the vocabulary by its count in the training data, and the bins' labels."""
        if self._frequency is None:
            vocabulary = len(self.run.model.get_input_embeddings().weight)
            bins = frequency_bins(token_counts(self.run.data.train, vocabulary))
            labels = ["0", *(f"{10**power:,}-{10 ** (power + 1) - 1:,}" for power in range(int(bins.max())))]
            self._frequency = torch.from_numpy(bins).to(self.run.accelerator.device), labels
        return self._frequency


def square_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor's squares [] float64, to 1e-7 or better; see `_ROW`."""
    flat = tensor.detach().flatten()
    whole = len(flat) // _ROW * _ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1, dtype=torch.float32)
    return exact(rows).square().sum() + exact(flat[whole:]).square().sum()


def noise_of(big: float, targets: float, small: float, inverse: float) -> tuple[float, float]:
    """|G|^2 and S of the module's docstring.

    Args:
        big: |g|^2 of the step.
        targets: T, its targets.
        small: mean of the micro-batches' |g_m|^2.
        inverse: mean of 1 / t_m.
    """
    noise = (small - big) / (inverse - 1 / targets)
    return big - noise / targets, noise


def trained_tokens(run: "Run", step: int) -> int:
    """Targets of the first `step` steps of a run."""
    plan = run.plan
    epochs, rest = divmod(step, plan.steps_per_epoch)
    places = np.arange(min(rest * plan.sequences_per_step, plan.blocks_per_epoch), dtype=np.uint64)
    begun = run.train.targets(permute(places, plan.blocks_per_epoch, plan.seed, epochs)) if rest else 0
    return epochs * run.data.train.ledger.trained_targets + begun


def token_counts(store: TokenStore, vocabulary: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """How often each token stands in a store [vocabulary]; estimated from evenly spread pieces where it is large."""
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
    # Not by logarithms, which may put 1,000 below 3.
    powers = 10.0 ** np.arange(1, 19)
    bins[some] = 1 + np.searchsorted(powers, np.maximum(counts[some], 1), side="right")
    return bins


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()
