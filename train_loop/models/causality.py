"""Whether a model sees the future. It is measured, since neither its name nor its configuration tells.

    change the later half of a row of tokens -> no logit of the earlier half may move

Of most models not a bit moves. Mixtures of experts multiply other groups of rows then, and round otherwise: by 1e-7 of
what the later logits move. A fresh BERT's earlier logits move by 1e-3 of it, a trained one's by far more.
"""

from collections.abc import Callable
from weakref import WeakSet

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from train_loop.errors import InputError
from train_loop.models.building import context_length, vocabulary

_TOKENS = 32
_SETTINGS = {
    "is_decoder": (False, "is_decoder: true"),
    "is_causal": (False, "is_causal: true"),
    "causal": (False, "causal: true"),
    "attn_type": ("bi", "attn_type: uni"),
    "use_bidirectional_attention": ("all", "use_bidirectional_attention: null"),
}
"""Settings of Transformers' configurations: what lets a model see the future, and what ends it."""

_causal: WeakSet[PreTrainedModel] = WeakSet()


def movement(logits: Callable[[torch.Tensor], torch.Tensor], tokens: int, length: int) -> float:
    """How far the earlier logits of a row move if its later tokens change, as a share of how far the later ones do.

    `logits` takes token ids int64 [1, length], on the CPU, each below `tokens`. It returns logits [length, tokens], and
    has the same dropout each time. What a device computes differently twice does not count, nor what is not finite.
    """
    border = length // 2
    if border == 0:
        return 0.0
    ids = torch.randint(0, tokens, (1, length), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, border:] = (changed[:, border:] + 1) % tokens

    def distances(ids: torch.Tensor) -> tuple[float, float]:
        moved = (logits(ids) - first).abs().nan_to_num(0, 0, 0)
        return float(moved[:border].max()), float(moved[border:].max())

    first = logits(ids)
    earlier, later = distances(changed)
    if earlier > 0 and earlier <= 2 * max(distances(ids)):
        return 0.0
    return earlier / later if later else float(earlier > 0)


def tolerance(dtype: torch.dtype) -> float:
    """The movement that rounding explains, if a model computes in this type."""
    return max(1e-4, 3 * torch.finfo(dtype).eps)


def refusal(model: PreTrainedModel, source: str) -> str:
    """The error message for a model that sees the future, with the cure."""
    config: PreTrainedConfig = model.config.get_text_config()
    place = "model.architecture" if source == "model.architecture" else "its configuration (config.json)"
    cures = [cure for name, (wrong, cure) in _SETTINGS.items() if getattr(config, name, None) == wrong]
    cure = f"set {cures[0]} in {place}" if cures else "choose a causal language model"
    name = type(model).__name__
    return f"{source}: {name} is not causal: a later token changes what it predicts for earlier ones; {cure}"


def passed(model: PreTrainedModel) -> None:
    """Note that a model was measured and does not see the future: `check` need not look again."""
    _causal.add(model)


@torch.no_grad()
def check(model: PreTrainedModel, source: str) -> None:
    """Refuse a model that sees the future, before it is used as a causal one. Raises InputError with the cure."""
    if model in _causal:
        return
    training = model.training
    model.eval()
    try:
        moved = movement(
            lambda ids: model(input_ids=ids.to(model.device), use_cache=False).logits[0].float(),
            vocabulary(model),
            min(_TOKENS, context_length(model) or _TOKENS),
        )
    finally:
        model.train(training)
    if moved > tolerance(model.dtype):
        raise InputError(refusal(model, source))
    passed(model)
