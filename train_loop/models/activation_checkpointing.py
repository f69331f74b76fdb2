"""Layers whose activations are computed again in the backward pass instead of kept (Chen et al., 2016).

    none         keep all
    full         keep each layer's inputs, and compute the layer again
    2, 3, ...    the same in the 1st and then every 2nd, 3rd, ... layer only
    attention    keep each layer's inputs and the results of its matrix products with weights; compute again what lies
                 between them: attention, norms, activation functions, dropout (Korthikanti et al., 2022, section 5)

Dropout draws the same masks again, because each layer's generator starts where it started before. Layers keep their
names and hooks: only `forward` is replaced, inside of what shards, compiles and watches them.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from train_loop import compat
from train_loop.errors import InputError
from train_loop.ops import products

NONE, FULL, ATTENTION = "none", "full", "attention"
_KEY = "model.activation_checkpointing"

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
"""Contexts of the forward pass and of the recomputation."""


def recompute(model: PreTrainedModel, choice: int | str) -> None:
    """Let the layers that `choice` names recompute their activations in training, in place, and no others.

    No weight is read. Raises InputError for a model whose layers are unknown, or that has fewer than `choice`.
    """
    for layer in model.modules():
        if _chosen(layer) is not None:
            del layer.forward  # the class has its own
    if choice == NONE:
        return
    stacks = layers(model)
    if not stacks:
        raise InputError(
            f"{_KEY} {choice}: which parts of {type(model).__name__} are its layers is unknown; use none, and lower "
            "batch.micro_batch_size or data.block_size if memory is short"
        )
    longest = max(map(len, stacks))
    if isinstance(choice, int) and choice > longest:
        raise InputError(f"{_KEY} {choice}: the model has only {longest} layers; use at most {longest}, full or none")
    if compat.checkpoints_activations(model):  # by itself: a second time would be for nothing
        compat.stop_checkpointing(model)
    if choice == ATTENTION:  # torch warns of changes in place, which its compiler turns into others
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    for stack in stacks:
        for layer in stack[:: choice if isinstance(choice, int) else 1]:
            kind: Any = type(layer)
            layer.forward = MethodType(_forward_of(kind, choice), layer)


def recomputed(model: PreTrainedModel) -> int | str | None:
    """The choice that a model's layers follow; None if they keep all."""
    found = {_chosen(layer) for layer in model.modules()} - {None}
    return found.pop() if found else FULL if compat.checkpoints_activations(model) else None


def in_words(choice: int | str | bool) -> str:
    """What a truth sheet says of a choice, to follow what it says of the model; nothing if all is kept."""
    if not choice or choice == NONE:
        return ""
    one_in = f", of one layer in {choice}" if isinstance(choice, int) and choice > 1 else ""
    return f", activations recomputed{one_in}" if choice != ATTENTION else ", attention recomputed"


def layers(model: nn.Module) -> list[list[nn.Module]]:
    """A model's layers, by the list that they stand in; those inside of other layers are left out.

    Layers are what Transformers says can be recomputed, or what must stay on one device.
    """
    names = set(getattr(model, "_no_split_modules", None) or [])
    stacks: list[list[nn.Module]] = []
    inside: set[int] = set()
    for each in model.modules():  # from the outside to the inside
        if isinstance(each, nn.ModuleList):
            stack = [
                layer
                for layer in dict.fromkeys(each)
                if id(layer) not in inside
                and (isinstance(layer, GradientCheckpointingLayer) or type(layer).__name__ in names)
            ]
            inside |= {id(part) for layer in stack for part in layer.modules()}
            stacks += [stack] if stack else []
    return stacks


def _chosen(layer: nn.Module) -> Any:
    return getattr(layer.forward, "recomputes", None)


@functools.cache
def _forward_of(kind: Any, choice: int | str) -> Callable[..., Any]:
    """The forward pass of a layer's class, recomputed. All layers share it, so that they are compiled once."""
    forward = kind.forward

    @functools.wraps(forward)
    def forward_and_again(layer: nn.Module, *positional: Any, **named: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):
            return forward(layer, *positional, **named)
        names = tuple(named)

        def run(*values: Any) -> Any:
            first = len(values) - len(names)
            return forward(layer, *values[:first], **dict(zip(names, values[first:], strict=True)))

        more: dict[str, Any] = {}
        if choice == ATTENTION:
            more["context_fn"] = _contexts if torch.compiler.is_compiling() else _careful_contexts
        # All as positional arguments, because torch looks among these for the devices whose generators it keeps.
        values = (*positional, *named.values())
        return checkpoint(run, *values, use_reentrant=False, preserve_rng_state=True, **more)

    forward_and_again.recomputes = choice  # type: ignore[attr-defined]
    return forward_and_again


# --- attention


@functools.cache
def _kept() -> frozenset[Any]:
    """Products with weights, as torch's dispatcher sees them; those inside of attention are `bmm`."""
    names = ["aten::mm", "aten::addmm", "aten::_scaled_mm", "aten::_grouped_mm", "mkldnn::_linear_pointwise"]
    names.append(products.OPERATOR)
    spaces = [(getattr(torch.ops, space), name) for space, _, name in (each.partition("::") for each in names)]
    return frozenset(getattr(space, name).default for space, name in spaces if hasattr(space, name))


def _policy(context: Any, operator: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _kept() else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts() -> Contexts:
    return create_selective_checkpoint_contexts(_policy)


def _careful_contexts() -> Contexts:
    """The same for layers that may change a product's result in place, as compiled ones don't."""
    forward, again = create_selective_checkpoint_contexts(_policy, allow_cache_entry_mutation=True)
    originals: dict[int, torch.Tensor] = {}
    return _both(_CopyBeforeChange(originals), forward), _both(again, _Restore(originals))


@contextmanager
def _both(inner: AbstractContextManager[Any], outer: AbstractContextManager[Any]) -> Iterator[None]:
    caches = torch.is_autocast_cache_enabled()
    # A layer that occurs twice finds its rounded weights in autocast's cache, but not when it is recomputed; torch
    # takes that for another computation.
    torch.set_autocast_cache_enabled(False)
    try:
        with inner, outer:
            yield
    finally:
        torch.set_autocast_cache_enabled(caches)


class _CopyBeforeChange(TorchDispatchMode):
    """Copies what a product returned before it is changed in place: torch's policies would keep the changed one."""

    def __init__(self, originals: dict[int, torch.Tensor]) -> None:
        super().__init__()
        self._originals, self._products = originals, 0
        self._results: dict[int, tuple[int, torch.Tensor]] = {}  # by address: the product's number, its result

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = named or {}
        for place, name in _changed(operator) if self._results else ():
            changed = arguments[place] if place < len(arguments) else named.get(name)
            if isinstance(changed, torch.Tensor) and (address := _address(changed)) in self._results:
                number, result = self._results.pop(address)
                self._originals[number] = result.clone()
        output = operator(*arguments, **named)
        if operator in _kept():
            self._results[_address(output)] = self._products, output
            self._products += 1
        return output


class _Restore(TorchDispatchMode):
    """Returns the copies, each where it belongs."""

    def __init__(self, originals: dict[int, torch.Tensor]) -> None:
        super().__init__()
        self._originals, self._products = originals, 0

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        output = operator(*arguments, **(named or {}))
        if operator in _kept():
            output = self._originals.pop(self._products, output)
            self._products += 1
        return output


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@functools.cache
def _changed(operator: Any) -> list[tuple[int, str]]:
    """The places and names of the arguments that an operator changes."""
    schema = getattr(operator, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    each = enumerate(schema.arguments)
    return [(place, each.name) for place, each in each if each.alias_info is not None and each.alias_info.is_write]
