"""The routers of a mixture of experts: which modules they are, and what they put out.

Transformers says of most models which module's output are the router's logits. The rest is seen in the first forward
pass: how many experts there are, how many of them a token gets, and how scores follow from logits, which the weights of
the chosen experts show. So no list of architectures is needed.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

_NAMES = re.compile(r"Router|(TopK|Topk|MoE\w*|Moe\w*)Gat(e|ing)$")
_EQUAL = 1e-4  # what differs by less may do so by rounding
_ROUNDING = 1e-3  # of probabilities, which need not add up to exactly 1 in half precision

_SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": lambda logits: logits.sigmoid(),
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
    "probabilities": lambda scores: scores,
}
"""How routers make scores of what they put out."""


class Routed(NamedTuple):
    """A router's output for all tokens of a batch, in order.

    scores: [tokens, experts] float32, each token's add up to 1; chosen: ids of experts [tokens, K] int64.
    """

    scores: torch.Tensor
    chosen: torch.Tensor


@dataclass
class Router:
    """A router, and what one forward pass of the model has shown of it.

    Attributes:
        module: the module that scores experts.
        recorded: which of its outputs Transformers calls its logits, if it says so.
        place: which of its outputs are the scores or logits [tokens, experts]; None until it was seen.
        chooses: which of its outputs are the ids of the experts that it chose, if there is one.
        top: how many experts a token gets.
        kind: how scores follow from that output: a key of `_SCORES`.
        experts: how many there are.
    """

    module: nn.Module
    recorded: int | None
    place: int | None = None
    chooses: int | None = None
    top: int = 0
    kind: str = "softmax"
    experts: int = 0

    def scores(self, output: Any) -> torch.Tensor:
        """The scores [tokens, experts] float32 of an output, with a gradient if it has one."""
        assert self.place is not None
        found = _SCORES[self.kind](_parts(output)[self.place].flatten(0, -2).float())
        return found if self.kind in ("softmax", "probabilities") else found / found.sum(-1, keepdim=True)

    def routed(self, output: Any) -> Routed:
        """What an output says, with the router's own choice where it tells: a bias may decide that, too."""
        scores = self.scores(output)
        own = None if self.chooses is None else _parts(output)[self.chooses]
        return Routed(scores, scores.topk(self.top).indices if own is None else own.flatten(0, -2))

    def learn(self, output: Any, passed: Any, tokens: int, top: int | None) -> bool:
        """Find out what the output of a forward pass over some tokens means; returns whether it scores experts.

        `passed` is what the experts were given, `top` how many of them a token gets according to the configuration.
        """
        parts = _parts(output)
        sizes = {size for each in self.module.parameters() for size in each.shape}
        fits = [number for number, each in enumerate(parts) if _is_table(each, tokens)]
        if self.recorded is None:
            fits = [number for number in fits if parts[number].shape[-1] in sizes]
        else:
            fits = [number for number in fits if number == min(self.recorded, len(parts) - 1)]
        if not fits:
            return False
        # Where only the chosen ones have scores, too, the others have none.
        place = max(fits, key=lambda number: (parts[number].shape[-1], int(parts[number].count_nonzero())))
        logits = parts[place].detach().flatten(0, -2).float()
        known = bool((logits >= 0).all()) and bool(((logits.sum(-1) - 1).abs() < _ROUNDING).all())
        if not known and 0 < int(logits.count_nonzero()) < logits.numel() and bool((logits >= 0).all()):
            return False  # weights of the chosen experts alone
        self.place = place
        self.experts = logits.shape[-1]
        others = [each for number, each in enumerate(parts) if number != self.place]
        chosen, weights = _choice(others, self.experts, tokens)
        self.chooses = next((number for number, each in enumerate(parts) if each is chosen), None)
        if chosen is None:
            chosen, weights = _choice(_parts(passed), self.experts, tokens)
        given = getattr(self.module, "top_k", None) or top if chosen is None else chosen.shape[-1]
        self.top = min(given, self.experts) if isinstance(given, int) and given > 0 else 0
        if known:
            self.kind = "probabilities"
        elif chosen is not None and weights is not None:
            found = _kind(logits, chosen.flatten(0, -2), weights.detach().flatten(0, -2).float())
            self.kind = found or ("sigmoid" if _says_sigmoid(self.module) else "softmax")
        return self.top > 0


def routers_of(model: PreTrainedModel) -> dict[str, Router]:
    """The routers of a model: the modules whose logits Transformers records, else those that are called routers.

    Older versions record those of a whole block, in which the router is.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[int, Router] = {}
    for module, place in _recorded(model):
        inside = [each for each in module.modules() if _NAMES.search(type(each).__name__)]
        if module in inside or not inside:
            found[id(module)] = Router(module, place)
        else:
            found |= {id(each): Router(each, None) for each in inside if id(each) not in found}
    if not any("router_logits" in (getattr(each, "_can_record_outputs", None) or ()) for each in model.modules()):
        found = {id(each): Router(each, None) for each in model.modules() if _NAMES.search(type(each).__name__)}
    return {names[key]: router for key, router in found.items()}


def _recorded(model: PreTrainedModel) -> Iterator[tuple[nn.Module, int]]:
    """The modules whose outputs Transformers records as router logits, and which of their outputs."""
    for owner in model.modules():
        recorders = getattr(owner, "_can_record_outputs", None) if isinstance(owner, PreTrainedModel) else None
        given = (recorders or {}).get("router_logits", ())
        for recorder in given if isinstance(given, list | tuple) else [given]:
            kind: Any = getattr(recorder, "target_class", None) or recorder  # before, only the class was given
            inside = getattr(recorder, "layer_name", None) or ""
            for name, module in owner.named_modules():
                if isinstance(kind, type) and isinstance(module, kind) and f".{inside}".rstrip(".") in f".{name}":
                    yield module, getattr(recorder, "index", 1)


def _parts(output: Any) -> tuple[Any, ...]:
    return tuple(output) if isinstance(output, tuple | list) else (output,)


def _is_table(value: Any, tokens: int) -> bool:
    """Whether this is a floating-point tensor with more than one number for each token."""
    floating = isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1
    return floating and value.shape[-1] > 1 and value.shape[:-1].numel() == tokens


def _choice(parts: Any, experts: int, tokens: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The ids of the chosen experts [..., K] and their weights [..., K] among some values; None for what is missing."""
    tables = [
        each for each in parts if isinstance(each, torch.Tensor) and each.ndim > 1 and each.shape[:-1].numel() == tokens
    ]
    for ids in tables:
        if ids.dtype == torch.int64 and ids.shape[-1] <= experts:
            same = [each for each in tables if each.is_floating_point() and each.shape[-1] == ids.shape[-1]]
            return ids, same[0] if same else None
    for full in tables:  # weights of all experts, 0 for those that are not chosen
        if full.is_floating_point() and full.shape[-1] == experts:
            count = int(full.reshape(-1, experts).count_nonzero(-1).amax())
            if 0 < count < experts:
                weights, ids = full.topk(count)
                return ids, weights
    return None, None


def _kind(logits: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> str | None:
    """How a router makes scores of logits, seen from the weights of the chosen experts; None if they don't show it.

    They are the scores, up to a factor: one for each token, or one for all. If nothing fits, it is softmax, which
    Transformers' function assumes.
    """
    errors = {}
    for kind in ("softmax", "sigmoid", "sqrtsoftplus"):
        ratio = weights / _SCORES[kind](logits).gather(-1, chosen)
        alone = ratio.shape[-1] == 1
        if alone and float(weights.std()) < _ROUNDING:
            return None  # a single expert's weight is always the same, or all logits are
        errors[kind] = float((ratio / ratio.mean(None if alone else -1, keepdim=not alone) - 1).square().mean().sqrt())
    best = min(errors, key=lambda kind: errors[kind])
    if max(errors.values()) < _EQUAL:
        return None  # all logits are the same, as in a new router that begins with zeros
    return best if errors["softmax"] > _EQUAL and errors[best] < 0.3 * errors["softmax"] else "softmax"


def _says_sigmoid(module: nn.Module) -> bool:
    """Whether a router's code names a sigmoid, or a bias that corrects its scores, and no softmax."""
    names = type(module).forward.__code__.co_names
    return "softmax" not in names and ("sigmoid" in names or hasattr(module, "e_score_correction_bias"))
