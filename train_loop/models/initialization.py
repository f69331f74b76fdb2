"""The weights that a model from scratch starts with: a function of (seed, names of its modules), made layer by layer.

A model's own `_init_weights` says how each kind of module begins. It is called here for one module after another, each
time with a generator that is keyed by the module's name. So no weight depends on which ones were made before it, and
the same weights come out whether a process keeps all of them or only its shards.

A layer is made whole, because some types scale the weights of a layer's parts in the layer itself; and children come
before their parents, as in Transformers.
"""

import math
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from train_loop import compat
from train_loop.rng import seed_torch

Place: TypeAlias = Callable[[str, torch.Tensor], None]
"""Takes a parameter or buffer: its name, and all of its values, on the CPU."""
Weights: TypeAlias = Callable[[Place], None]
"""Gives a place all weights and buffers of a model, one after another."""


class _Tensor(NamedTuple):
    """A parameter or buffer: its full name, the module that has it, and its name there."""

    name: str
    module: nn.Module
    key: str

    @property
    def value(self) -> torch.Tensor:
        return getattr(self.module, self.key)

    def put(self, value: torch.Tensor) -> None:
        tensors = self.module._parameters if self.key in self.module._parameters else self.module._buffers
        tensors[self.key] = value  # type: ignore[assignment]


def on_meta(config: PreTrainedConfig, attention: str | None = None) -> PreTrainedModel:
    """A causal language model on torch's meta device: its tensors have shapes, and are tied, but have no values."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
        )
    torch.nn.Module.to(model, "meta")  # some tensors are made without regard to the device
    model.tie_weights()
    return model


@torch.no_grad()
def initialise(
    model: PreTrainedModel, seed: int, place: Place | None = None, only: Collection[str] | None = None
) -> None:
    """Make the weights and buffers of a model that is `on_meta`.

    If `place` is given, it gets each of them (or `only` those of some names), tied ones once, and the model stays as it
    is. Otherwise they are the model's.
    """
    owners = _owners(model)
    made: dict[int, torch.Tensor] = {}
    unmade: list[_Tensor] = []
    with compat.residual_weights_scaled():
        for modules in _units(model):
            tensors = [each for name, module in modules for each in _tensors(name, module)]
            empty = {each.name: each.value for each in tensors}
            own = [each for each in tensors if owners[id(each.value)] == each.name]
            own = [each for each in own if only is None or each.name in only]
            if not own:
                continue
            for each in tensors:
                each.put(_blank(each.value))
            _make(model, modules, seed)
            whole = {each.name: each.value for each in own}
            for each in tensors:
                each.put(empty[each.name])
            for each in own:
                if not _is_made(whole[each.name]):
                    unmade.append(each)
                elif place is None:
                    made[id(each.value)] = whole[each.name]
                else:
                    place(each.name, whole[each.name].detach())
        for each, value in _constructed(model, seed, unmade):
            if place is None:
                made[id(each.value)] = value
            else:
                place(each.name, value.detach())
    if place is None:
        for module in model.modules():
            for each in _tensors("", module):
                each.put(made[id(each.value)])


def _owners(model: PreTrainedModel) -> dict[int, str]:
    """By its id, the name under which each parameter and buffer is made: of tied ones, that of the source."""
    targets = getattr(model, "all_tied_weights_keys", {})
    owners: dict[int, str] = {}
    for prefix, module in model.named_modules():
        for each in _tensors(prefix, module):
            if owners.get(id(each.value), each.name) in targets or id(each.value) not in owners:
                owners[id(each.value)] = each.name
    return owners


def _tensors(prefix: str, module: nn.Module) -> list[_Tensor]:
    """A module's own parameters and buffers."""
    keys = [key for own in (module._parameters, module._buffers) for key, value in own.items() if value is not None]
    return [_Tensor(f"{prefix}.{key}" if prefix else key, module, key) for key in keys]


def _units(model: PreTrainedModel) -> Iterator[list[tuple[str, nn.Module]]]:
    """A model's modules by name, in groups that are made at once; children come before their parents.

    A layer is a group, and so is each largest module without layers in it. What has layers in it comes after them.
    """
    layers = set(model._no_split_modules or [])

    def groups(name: str, module: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
        inside = [type(each).__name__ in layers for each in module.modules()]
        if inside[0] or not any(inside):
            yield list(module.named_modules(prefix=name))[::-1]
            return
        for key, child in module.named_children():
            yield from groups(f"{name}.{key}" if name else key, child)
        yield [(name, module)]

    yield from groups("", model)


def _blank(empty: torch.Tensor) -> torch.Tensor:
    """What a tensor on the meta device stands for, on the CPU, without values yet: floating-point numbers are NaN."""
    value = torch.empty_like(empty, device="cpu")
    if value.is_floating_point():
        value.fill_(math.nan)
    if isinstance(empty, nn.Parameter):
        value = nn.Parameter(value, requires_grad=empty.requires_grad)
    value.__dict__.update(empty.__dict__)  # what a model has noted on it, such as that it should not decay
    return value


def _is_made(value: torch.Tensor) -> bool:
    if not value.is_floating_point():
        return value._version > 0
    # A sum is ten times as fast; without NaN it is NaN only if there are infinities of both signs.
    return not bool(value.sum().isnan()) or not bool(value.isnan().any())


def _make(model: PreTrainedModel, modules: list[tuple[str, nn.Module]], seed: int) -> None:
    """Let the model initialise these modules, in this order; a module that it leaves out does so by itself."""
    for name, module in modules:
        seed_torch(torch.device("cpu"), f"weights of {name}", seed)
        _model_of(model, name)._init_weights(module)
        own = [each.value for each in _tensors(name, module)]
        if hasattr(module, "reset_parameters") and not all(map(_is_made, own)):
            module.reset_parameters()  # type: ignore[operator]


def _model_of(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The innermost model of Transformers that a module belongs to; it initialises the module."""
    innermost, module = model, model
    for part in filter(None, name.split(".")):
        module = getattr(module, part)
        if isinstance(module, PreTrainedModel):
            innermost = module
    return innermost


def _constructed(model: PreTrainedModel, seed: int, unmade: list[_Tensor]) -> Iterator[tuple[_Tensor, torch.Tensor]]:
    """Values that only a module's constructor gives, from a second model, of which nothing else is kept."""
    if not unmade:
        return
    kinds = {(type(each.module), each.key) for each in unmade}

    def drop(module: nn.Module, key: str, value: torch.Tensor | None) -> torch.Tensor | None:
        if value is None or (type(module), key) in kinds:
            return None  # it stays as it is
        meta = value.detach().to("meta")
        return nn.Parameter(meta, value.requires_grad) if isinstance(value, nn.Parameter) else meta

    register: list[Any] = [register_module_parameter_registration_hook, register_module_buffer_registration_hook]
    hooks = [each(drop) for each in register]
    try:
        seed_torch(torch.device("cpu"), "weights of constructors", seed)
        second = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32, trust_remote_code=False)
    finally:
        for hook in hooks:
            hook.remove()
    values = dict(second.named_parameters(remove_duplicate=False)) | dict(second.named_buffers(remove_duplicate=False))
    for each in unmade:
        yield each, values[each.name]
