"""Mixtures of experts: where a model's routers are, what they choose, and the loss that keeps all experts in use.

In each layer, a router scores all E experts for every token, and the K best of them compute. Without a counterweight,
the experts that win at first learn most and win ever more often. The balance of sequence s in layer l is

    balance_sl = E sum_e f_e P_e        f_e: share of the sequence's tokens that have expert e among the K best scores
                                        P_e: mean of the tokens' scores of expert e, where each token's add up to 1

(DeepSeek-V3, 2024, section 2.1.2, times K: then it is what Transformers' `load_balancing_loss_func` finds for one layer
and one sequence). It is K if all experts are used alike, up to E if the same K get all tokens. Only P has a gradient.

A step minimises sum nll / T + weight * sum_s t_s mean_l balance_sl / T, where t_s of the step's T targets are in
sequence s. A sequence is a row of the batch, whatever documents are packed into it, and its tokens are those with a
target. So each term belongs to one sequence: how they are cut into micro-batches and spread over processes makes no
difference. Each layer counts alone: two layers that each use one half of the experts would look balanced together.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from train_loop.data.loader import IGNORED
from train_loop.errors import InputError
from train_loop.models.routers import Routed, Router, routers_of

KEY = "model.balance_weight"


class Experts:
    """A model's routers, with what they put out in the forward pass of a training step; see `find`.

    Attributes:
        weight: of the balance in what a step minimises; 0 if experts are not balanced.
        routers: by name.
        sums: of each micro-batch since somebody emptied it, sum_s t_s mean_l balance_sl [] float32.
    """

    def __init__(self, model: PreTrainedModel, routers: dict[str, Router], weight: float) -> None:
        self.routers, self.weight = routers, weight
        self.sums: list[torch.Tensor] = []
        self._name = type(model).__name__
        self._top = _setting(model, "num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k_experts")
        self._hooks, self._learning = ExitStack(), ExitStack()
        self._listening = False
        self._inputs: torch.Tensor | None = None
        self._outputs: list[tuple[str, Any]] = []
        self._passed: list[Any] = []
        base = model.base_model
        hooks = [
            base.register_forward_pre_hook(self._begin, with_kwargs=True),
            base.register_forward_hook(self._end),
            *(each.module.register_forward_hook(partial(self._take, name)) for name, each in routers.items()),
        ]
        for hook in hooks:  # without a weight, nothing needs them after the first pass
            (self._hooks if weight else self._learning).callback(hook.remove)
        for name, module in model.named_modules():
            if name.rpartition(".")[2] == "experts":
                hook = module.register_forward_pre_hook(self._pass, with_kwargs=True)
                self._learning.callback(hook.remove)

    # Compiled layers leave their graph for hooks, so that one graph serves passes with and without them.

    @torch.compiler.disable
    def _begin(self, module: nn.Module, arguments: Any, named: dict[str, Any]) -> None:
        self._outputs, self._passed = [], []
        self._inputs = named.get("input_ids", arguments[0] if arguments else None)
        # Layers that run again in the backward pass, to recompute activations, come after `_end`.
        training = module.training and torch.is_grad_enabled() and self.weight > 0
        self._listening = training or not self.is_known

    @torch.compiler.disable
    def _take(self, name: str, module: nn.Module, arguments: Any, output: Any) -> None:
        if self._listening and name in self.routers:
            self._outputs.append((name, output))
            self._passed.append(None)

    @torch.compiler.disable
    def _pass(self, module: nn.Module, arguments: Any, named: dict[str, Any]) -> None:
        if self._listening and self._passed:
            self._passed[-1] = (*arguments, *named.values())

    @torch.compiler.disable
    def _end(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._listening = False
        if not self.is_known and self._inputs is not None and not self._inputs.is_meta:
            self._learn(self._inputs.numel())

    @property
    def is_known(self) -> bool:
        """Whether a forward pass has shown what the routers put out."""
        return all(router.place is not None for router in self.routers.values())

    def _learn(self, tokens: int) -> None:
        """Keep the routers that score experts. Raises InputError if they should be balanced and there is none."""
        seen: set[str] = set()
        for (name, output), passed in zip(self._outputs, self._passed, strict=True):
            if name not in seen and self.routers[name].learn(output, passed, tokens, self._top):
                seen.add(name)
        self._learning.close()
        self.routers = {name: router for name, router in self.routers.items() if name in seen}
        self._outputs = [each for each in self._outputs if each[0] in seen]
        if self.weight and not self.routers:
            raise InputError(_no_routers(self._name))

    def leave(self) -> None:
        """Remove all hooks from the model."""
        self._hooks.close()
        self._learning.close()

    def attach(self, nll_sum: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The summed nll [] of the forward pass before, unchanged, but with the gradient of its weighted balance, too.

        `targets` [batch, block] is `IGNORED` where a position has none. In evaluation nothing is attached.
        """
        outputs, self._outputs = self._outputs, []
        if self.weight and not self.is_known:
            raise InputError(_no_routers(self._name))
        if not self.weight or not outputs or not torch.is_grad_enabled():
            return nll_sum
        real = targets != IGNORED
        counts = real.sum(1)
        of_layers = [
            sequence_balance(router.scores(output).view(*real.shape, -1), real, router.top)
            for router, output in ((self.routers[name], output) for name, output in outputs)
        ]
        total = (torch.stack(of_layers).mean(0) * counts).sum()
        self.sums.append(total.detach())
        attached: torch.Tensor = _Attach.apply(nll_sum, total * self.weight)
        return attached

    @contextmanager
    def watched(self, see: Callable[[str, Routed], None]) -> Iterator[None]:
        """Within this context, `see` is called with the name of each router that runs, and what it has routed."""

        def told(name: str, router: Router, module: nn.Module, arguments: Any, output: Any) -> None:
            see(name, router.routed(output))

        with ExitStack() as stack:
            for name, router in self.routers.items():
                hook = router.module.register_forward_hook(torch.compiler.disable(partial(told, name, router)))
                stack.callback(hook.remove)
            yield


def facts(experts: Experts | None) -> dict[str, Any] | None:
    """What a model's experts are, as plain values; None if there are none. Known after a forward pass."""
    if experts is None or not experts.routers:
        return None
    routers = list(experts.routers.values())
    numbers = {name: sorted({getattr(each, name) for each in routers}) for name in ("experts", "top", "kind")}
    return {"weight": experts.weight, "routers": len(routers)} | numbers


def in_words(found: dict[str, Any] | None) -> str:
    """The facts in a line of text; empty if there are none."""
    if found is None:
        return ""
    top, number, kinds = (" or ".join(map(str, found[name])) for name in ("top", "experts", "kind"))
    balanced = f"balanced with weight {found['weight']:g}" if found["weight"] else "not balanced (model.balance_weight)"
    return f"{top} of {number} for each token, in each of {found['routers']} routers ({kinds}); {balanced}"


class _Attach(torch.autograd.Function):
    """The first of two scalars; the gradient is that of their sum."""

    @staticmethod
    def forward(context: Any, value: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradients[0], gradients[0].float()


def sequence_balance(scores: torch.Tensor, real: torch.Tensor, top: int) -> torch.Tensor:
    """The balance of each sequence in a layer [batch] (see the module), with a gradient to the scores.

    Args:
        scores: of each position and expert [batch, block, experts], adding up to 1.
        real: which positions count [batch, block] bool; a sequence without any has balance 0.
        top: how many experts a token gets.
    """
    counts = real.sum(1, keepdim=True).clamp(min=1)
    chosen = torch.zeros_like(scores).scatter_(-1, scores.detach().topk(top).indices, 1.0)
    frequency = (chosen * real[..., None]).sum(1) / counts
    probability = (scores * real[..., None]).sum(1) / counts
    return scores.shape[-1] * (frequency * probability).sum(-1)


def find(model: PreTrainedModel, asked: float | None = None) -> Experts | None:
    """A model's experts; None if it has none. The first forward pass of the model shows what its routers put out.

    `asked` is the weight of their balance; by default the configuration's own, if it asks for router logits, else 0.
    Raises InputError for a weight if there is no router, and for an own one that is no number.
    """
    for hook in list(model.base_model._forward_pre_hooks.values()):
        if isinstance(earlier := getattr(hook, "__self__", None), Experts):  # of a run before, with the same model
            earlier.leave()
    weight = _own_weight(model) if asked is None else asked
    routers = routers_of(model)
    if weight and not routers:
        raise InputError(_no_routers(type(model).__name__))
    return Experts(model, routers, weight) if routers else None


@contextmanager
def without_own_balance(model: PreTrainedModel) -> Iterator[None]:
    """Within this context, a model adds no balance of its own to its loss.

    Transformers takes that over all layers and sequences at once, and adds it if the configuration asks for router
    logits.
    """
    configs = {id(each.config): each.config for each in model.modules() if isinstance(each, PreTrainedModel)}
    asking = [each for each in configs.values() if getattr(each, "output_router_logits", None)]
    for each in asking:
        each.output_router_logits = False
    try:
        yield
    finally:
        for each in asking:
            each.output_router_logits = True


def _own_weight(model: PreTrainedModel) -> float:
    """The weight in a model's configuration; 0 unless it asks for router logits."""
    if not _setting(model, "output_router_logits"):
        return 0.0
    names = ("router_aux_loss_coef", "aux_loss_coef")
    own = next((each for name in names if (each := getattr(model, name, None)) is not None), _setting(model, *names))
    if own is None:
        return 0.0
    if isinstance(own, bool) or not isinstance(own, int | float) or not 0 <= own < float("inf"):
        raise InputError(f"router_aux_loss_coef {own} in the model's configuration: a number >= 0 is expected")
    return float(own)


def _setting(model: PreTrainedModel, *names: str) -> Any:
    """The first of some settings that a model's configuration, or the one for its text, has."""
    for config in (model.config.get_text_config(), model.config):
        for name in names:
            if getattr(config, name, None) is not None:
                return getattr(config, name)
    return None


def _no_routers(name: str) -> str:
    return (
        f"{KEY}: {name} has no router that scores experts for each token, so there is nothing to balance; leave it out "
        "(or set it to 0 if the model's configuration asks for router logits)"
    )
