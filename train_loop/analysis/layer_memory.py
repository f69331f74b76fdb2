"""What a model's layers keep in memory in a training step, measured: a model of a few real layers is trained.

The model is cut to its first layers, as many as have one of each kind (Gemma's two kinds of attention, a hybrid's,
mixtures of experts in every other layer), with a small vocabulary. It sees one sequence, then two. Where a block would
take long, it sees three shorter ones: what is kept is a polynomial of the length (its square, for attention that keeps
all its probabilities), so that the block's follows.
"""

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from train_loop.config.schema import Config
from train_loop.data.tokenizer import placeholder
from train_loop.devices import free_memory, has_peak_memory
from train_loop.errors import InputError
from train_loop.models import building, experts
from train_loop.ops import cpu, cross_entropy
from train_loop.training.objective import Objective

VOCABULARY = 256
"""Entries of the vocabulary of a model that is measured."""
_OPERATIONS = 1e12  # of the longest text that is measured; longer ones follow from shorter ones


EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_top_k", "top_k_experts", "moe_k")
"""Names of settings: how many experts a layer has, and how many of them each token has."""


class Bytes(NamedTuple):
    """Memory that grows with the sequences of a micro-batch: called with their number, it gives bytes."""

    fixed: float
    each: float

    def __call__(self, rows: int) -> float:
        """Bytes for so many sequences."""
        return self.fixed + self.each * rows

    def plus(self, more: "Bytes", times: float) -> "Bytes":
        """What this is, and so many times what another one is beyond it."""
        return Bytes(self.fixed + times * (more.fixed - self.fixed), self.each + times * (more.each - self.each))


class Layer(NamedTuple):
    """What a layer takes.

    kept: from its forward pass until its backward pass, with its output; forward, backward: the peak of each pass
    beyond what there was at its beginning, the latter with the gradients of its weights.
    """

    kept: Bytes
    forward: Bytes
    backward: Bytes


class Measured(NamedTuple):
    """What a model takes in a training pass.

    before: what comes before its layers, such as embeddings and masks; kept: what comes after them, and is kept for the
    backward pass; loss: the most that is there until the loss is. If the loss is `fused`, the output layer's own part
    (`cross_entropy.memory`) is not in them.
    """

    before: Bytes
    layers: list[Layer]
    kept: Bytes
    loss: Bytes
    fused: bool


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers that FSDP2 shards one by one: outermost modules of the classes that the model names."""
    names = set(getattr(model, "_no_split_modules", None) or [])
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if type(module).__name__ in names and id(module) not in inside:
            found.append(module)
            inside |= {id(each) for each in module.modules()}
    return found


def kinds(model: PreTrainedModel, recomputed: object = "none") -> list[int]:
    """The kind of each layer, as the number of the first layer that is like it in its weights and its type.

    `recomputed` is `model.activation_checkpointing`; if it is a number, layers whose number it divides are a kind.
    """
    settings = model.config.get_text_config()
    every = recomputed if isinstance(recomputed, int) and recomputed > 1 else 1
    types = getattr(settings, "layer_types", None) or []
    first: dict[Any, int] = {}
    found = []
    for number, layer in enumerate(layers_of(model)):
        shapes = tuple((name, tuple(each.shape)) for name, each in layer.named_parameters())
        like = (type(layer), shapes, types[number] if number < len(types) else None, number % every == 0)
        found.append(first.setdefault(like, number))
    return found


class Passes(NamedTuple):
    """How the passes of a model are computed: on which device, in which type.

    plain: whether the weights themselves have that type, as under FSDP2; else autocast rounds copies of them.
    accumulates: whether there are gradients of an earlier micro-batch.
    """

    device: torch.device
    dtype: torch.dtype
    plain: bool
    accumulates: bool


def measure(config: Config, outline: PreTrainedModel, passes: Passes) -> Measured:
    """Train a few layers of a model, of which `outline` has no values (on torch's meta device)."""
    of_kind = kinds(outline, config.model.activation_checkpointing)
    lengths = _lengths(config.data.block_size, outline)
    cut = max(of_kind, default=-1) + 1

    left_out: list[int] = []  # bytes of gradients, by layer, of experts that are not there

    def runs(entries: int) -> tuple[list[tuple[_Run, _Run]], bool]:
        objective = _cut(config, outline, (cut, entries), passes)
        left_out[:] = _missing(outline, objective, passes)
        if passes.device.type != "cpu":
            _run(objective, config, (1, lengths[0]), passes)  # its libraries take memory when they are first used
        one, two = ([_run(objective, config, (rows, length), passes) for length in lengths] for rows in (1, 2))
        return list(zip(one, two, strict=True)), objective.loss_path == "fused"

    def bytes_of(found: list[tuple[_Run, _Run]], part: Callable[[Any], float]) -> Bytes:
        one, two = (_extrapolated(lengths, [part(pair[rows]) for pair in found], config) for rows in (0, 1))
        each = min(one, max(0.0, two - one))
        return Bytes(one - each, each)

    def after(found: list[tuple[_Run, _Run]], part: int) -> Bytes:
        return bytes_of(found, lambda run: run.after[part])

    small, fused = runs(VOCABULARY)
    kept, loss = after(small, 0), after(small, 1)
    if not fused:  # the model's own logits: each entry of the vocabulary takes as much as any other
        more, _ = runs(2 * VOCABULARY)
        times = building.vocabulary(outline) / VOCABULARY - 1
        kept, loss = (less.plus(after(more, part), times) for part, less in enumerate((kept, loss)))

    def layer(number: int) -> Layer:
        kept, forward, backward = (
            bytes_of(small, partial(lambda part, run: run.layers[number][part], part)) for part in range(3)
        )
        return Layer(kept, forward, backward._replace(fixed=backward.fixed + left_out[number]))

    layers = {kind: layer(kind) for kind in {*of_kind}}
    return Measured(bytes_of(small, lambda run: run.before), [layers[kind] for kind in of_kind], kept, loss, fused)


def _missing(outline: nn.Module, objective: nn.Module, passes: Passes) -> list[int]:
    """Bytes by which each layer's gradients are less than the model's, which may all be there at the peak."""
    found = []
    for real, made in zip(layers_of(outline), layers_of(objective), strict=False):
        less = [a.numel() - b.numel() for a, b in zip(real.parameters(), made.parameters(), strict=True)]
        numbers = max(less, default=0) if passes.accumulates else sum(less)  # added to what is there, one by one
        found.append(numbers * (passes.dtype.itemsize if passes.plain else 4))
    return found


def _lengths(block: int, outline: PreTrainedModel) -> list[int]:
    """The block's length, or three shorter ones if that would take long."""
    every = layers_of(outline)
    weights = sum(each.numel() for kind in {*kinds(outline)} for each in every[kind].parameters()) or 1
    longest = max(64, int(_OPERATIONS / (18 * weights)))  # in one sequence and in two, forward and backward
    return [block] if block <= longest else [longest // 4, longest // 2, longest]


def _extrapolated(lengths: Sequence[int], values: list[float], config: Config) -> float:
    """The value for a block, by the polynomial through the values at other lengths."""
    powers = np.polyfit(lengths, values, len(lengths) - 1)
    return max(0.0, float(np.polyval(powers, config.data.block_size)))


# ----- the model that is measured


def _cut(config: Config, outline: PreTrainedModel, sizes: tuple[int, int], passes: Passes) -> Objective:
    """A model's first layers with a small vocabulary (`sizes`), with random weights, made ready as for a run."""
    settings = shortened(outline.config, len(layers_of(outline)), *sizes)
    _fewer_experts(settings.get_text_config())
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
    takes = 12.0 * sum(each.numel() for each in made.parameters())  # with gradients, and those of one more pass
    if takes > (free := free_memory(passes.device)):
        raise InputError(
            f"estimate: to measure the layers takes {takes / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free on the "
            f"{passes.device.type}; run it on a machine with more memory"
        )
    attention = config.model.attention
    if passes.device.type == "cpu" and "flash" in (attention or ""):
        attention = "sdpa"  # which keeps as much
    model: Any = AutoModelForCausalLM.from_config(
        settings, dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
    )
    changed = copy.deepcopy(config)
    changed.model.compile = False
    changed.data.block_size = 1
    model = building.build(changed, placeholder(1), model)
    if passes.plain:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(passes.dtype)
    model.to(passes.device)
    tied = cpu.speed_up(model, training=True, linear=not config.model.compile, keep_memory=False)
    return Objective(model, tied, experts.find(model, config.model.balance_weight)).train()


def _fewer_experts(settings: PreTrainedConfig) -> None:
    """Leave experts out, in place, beyond those that a token has: each token keeps what it has by the chosen ones."""
    if (getattr(settings, "n_group", None) or 1) > 1:  # which are chosen from groups
        return
    chosen = first_number(settings, CHOSEN)
    for name in EXPERTS if chosen else ():
        if isinstance(number := getattr(settings, name, None), int) and number > 2 * (chosen or 1):
            setattr(settings, name, 2 * (chosen or 1))


def first_number(settings: PreTrainedConfig, names: tuple[str, ...]) -> int | None:
    """The value of the first of some settings that is there."""
    values = (getattr(settings, name, None) for name in names)
    return next((each for each in values if isinstance(each, int)), None)


def shortened(config: PreTrainedConfig, layers: int, most: int, vocabulary: int) -> PreTrainedConfig:
    """A copy of a configuration with fewer layers, of which lists say as much as before, and a small vocabulary."""
    config = copy.deepcopy(config)
    for settings in {id(each): each for each in (config, config.get_text_config())}.values():
        for name, value in list(vars(settings).items()):
            if isinstance(value, list) and len(value) == layers:
                setattr(settings, name, value[:most])
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if hasattr(settings, name):
                setattr(settings, name, 0 if name == "eos_token_id" else None)
        if getattr(settings, "num_hidden_layers", None) == layers:
            settings.num_hidden_layers = most
        if hasattr(settings, "vocab_size"):
            settings.vocab_size = vocabulary
    return config


# ----- measuring


class _Run(NamedTuple):
    before: float
    layers: list[tuple[float, float, float]]
    after: tuple[float, float]


def _run(objective: Objective, config: Config, shape: tuple[int, int], passes: Passes) -> _Run:
    """A training pass of some sequences of a length; of two, the second one, if gradients are to be there before it."""
    device, dtype = passes.device, passes.dtype
    places = torch.arange(shape[1], device=device).repeat(shape[0], 1)
    tokens, positions = places % VOCABULARY, places % max(1, shape[1] // 2)
    given = (tokens, tokens, positions if config.data.isolate_documents else None)
    rounding = nullcontext() if passes.plain or dtype == torch.float32 else torch.autocast(device.type, dtype)
    for parameter in objective.parameters():
        parameter.grad = None
    for _ in range(1 + passes.accumulates):
        with meter(objective, device) as memory, _Watched(objective, memory) as watched:
            with rounding:
                loss = objective(*given)
            after = memory.now() - watched.after_layers, memory.peak() - watched.after_layers
            watched.backward = True
            loss.backward()
            watched.close()
    if objective.loss_path == "fused":
        head = objective.model.get_output_embeddings().weight
        own = cross_entropy.memory(tokens.numel(), tuple(head.shape), (head.dtype, dtype), device.type)
        after = after[0] - own.kept, after[1] - own.most
    return _Run(watched.before, watched.layers, after)


class _Watched:
    """Notes the memory wherever a layer begins or ends, in both passes."""

    def __init__(self, objective: Objective, memory: Any) -> None:
        self._memory = memory
        self._modules = layers_of(objective)
        self._handles: list[Any] = []
        self._forward: dict[int, tuple[float, float]] = {}
        self._peaks: dict[int, float] = {}
        self._open: tuple[int, float] | None = None
        self.backward = False
        self.start = self._level = self.before = self.after_layers = 0.0

    def __enter__(self) -> "_Watched":
        for number, module in enumerate(self._modules):
            self._handles += [
                module.register_forward_pre_hook(self._begin(number), with_kwargs=True),
                module.register_forward_hook(self._end(number)),
            ]
        self.start = self.after_layers = self._memory.now()
        self._memory.reset()
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def layers(self) -> list[tuple[float, float, float]]:
        """(kept, peak forward, peak backward) of each layer."""
        return [(*self._forward[number], self._peaks.get(number, 0.0)) for number in range(len(self._modules))]

    def _begin(self, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, named: Any) -> None:
            if self.backward:  # recomputed
                return
            self._level = self._memory.now()
            if number == 0:
                self.before = self._level - self.start
                for each in _differentiable((arguments, named)):
                    each.register_hook(lambda gradient: self._moves(None))
                    break
            self._memory.reset()

        return hook

    def _end(self, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            if self.backward:
                return
            self.after_layers = self._memory.now()
            self._forward[number] = self.after_layers - self._level, self._memory.peak() - self._level
            self._memory.reset()
            for each in _differentiable(output):
                each.register_hook(lambda gradient: self._moves(number))
                break

        return hook

    def _moves(self, number: int | None) -> None:
        """The backward pass has come to a layer, or has left the first one."""
        self.close()
        if number is not None:
            self._memory.reset()
            self._open = number, self._memory.now()

    def close(self) -> None:
        """The layer whose backward pass was under way is done."""
        if self._open is not None:
            number, level = self._open
            self._peaks[number] = self._memory.peak() - level
            self._open = None


def _differentiable(given: Any) -> Iterator[torch.Tensor]:
    return (each for each in tree_leaves(given) if isinstance(each, torch.Tensor) and each.requires_grad)


@contextmanager
def meter(module: nn.Module, device: torch.device) -> Iterator[Any]:
    """A meter of tensors' bytes on a device, with `now()`, `peak()` since the last `reset()`.

    On a CPU, it counts what operations make within the context; what the module has already does not count.
    """
    if has_peak_memory(device):
        yield _Allocator(device)
        return
    gradients = [each.grad for each in module.parameters() if each.grad is not None]
    with _Live([*module.parameters(), *module.buffers(), *gradients]) as live:
        yield live


class _Allocator:
    """The counters of a device's own allocator."""

    def __init__(self, device: torch.device) -> None:
        self._device: Any = torch.get_device_module(device)

    def now(self) -> float:
        """Bytes of tensors at this moment."""
        return float(self._device.memory_allocated())

    def peak(self) -> float:
        """The most bytes since the last reset."""
        return float(self._device.max_memory_allocated())

    def reset(self) -> None:
        """Begin a new peak."""
        self._device.reset_peak_memory_stats()


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages that operations return, for as long as anybody holds them."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._bytes: dict[int, int] = dict.fromkeys((each.untyped_storage()._cdata for each in known), 0)
        self._now = self._peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for each in tree_leaves(output):
            if isinstance(each, torch.Tensor):
                self._see(each.untyped_storage())
        return output

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._bytes:
            return
        self._bytes[key] = storage.nbytes()
        self._now += self._bytes[key]
        self._peak = max(self._peak, self._now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self._now -= self._bytes.pop(key, 0)

    def now(self) -> float:
        """Bytes of tensors at this moment."""
        return float(self._now)

    def peak(self) -> float:
        """The most bytes since the last reset."""
        return float(self._peak)

    def reset(self) -> None:
        """Begin a new peak."""
        self._peak = self._now
