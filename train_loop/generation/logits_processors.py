"""Filters on logits: small pure functions that decide which tokens may be drawn.

    logits [batch, vocabulary] -> penalty, bans -> / temperature -> top-k -> top-p -> min-p -> typical -> draw

Removed tokens get the logit minus infinity, so filters chain; every filter except `ban` leaves at least one token.
Each filter gives the same result as its counterpart in Transformers, to the bit.
"""

import torch

from train_loop.config.sampling import Sampling
from train_loop.devices import exact

_REMOVED = -float("inf")


def penalize_repetition(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Make tokens `seen` in a row's text, bool [batch, vocabulary], less likely (Keskar et al., 2019, section 4.1).

    Positive logits [batch, vocabulary] are divided by the penalty, > 0, negative ones multiplied. 1 changes nothing.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def ban(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Remove tokens, int64 [tokens], from logits [batch, vocabulary]."""
    return logits.index_fill(-1, tokens, _REMOVED)


def scale_by_temperature(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logits [batch, vocabulary] divided by a temperature > 0: below 1 sharpens, above 1 flattens."""
    return logits / temperature


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Remove all but the k likeliest, and ties, from logits [batch, vocabulary] (Fan et al., 2018); 0 keeps all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    kth = logits.topk(k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < kth, _REMOVED)


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Remove all but the nucleus from logits [batch, vocabulary] (Holtzman et al., 2020).

    The nucleus is the smallest set of likeliest tokens whose probability reaches p, in [0, 1]. From the least likely
    upwards, tokens are removed as long as the removed ones together have at most 1 - p.
    """
    ascending, indices = logits.sort(dim=-1)
    removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    removed[:, -1] = False  # the likeliest token stays, however small p is
    return logits.masked_fill(removed.scatter(-1, indices, removed), _REMOVED)


def keep_min_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Remove tokens less likely than p, in [0, 1], times the likeliest one from logits [batch, vocabulary].

    (Nguyen et al., 2024.) Where the model is sure, few tokens pass; where it is not, many.
    """
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(dim=-1, keepdim=True), _REMOVED)


def keep_typical(logits: torch.Tensor, mass: float) -> torch.Tensor:
    """Remove all but the locally typical tokens from logits [batch, vocabulary] (Meister et al., 2022).

    The closer a token's information, -log p, is to the distribution's entropy, the more typical the token. The most
    typical ones stay, until their probability reaches `mass`, in (0, 1); the likeliest token may be removed.
    """
    log_p = logits.log_softmax(dim=-1)
    entropy = -(log_p.exp() * log_p).nansum(dim=-1, keepdim=True)  # a removed token's 0 * -inf counts as 0
    distance = (-log_p - entropy).abs()
    ascending, indices = distance.sort(dim=-1)
    reached = logits.gather(-1, indices).softmax(dim=-1).cumsum(dim=-1)
    last = (reached < mass).sum(dim=-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    return logits.masked_fill(distance > ascending.gather(-1, last), _REMOVED)


def draw(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw tokens, int64 [batch], from logits [batch, vocabulary] with random numbers, float64 [batch] in [0, 1).

    A token is the first whose cumulative probability exceeds the number, whatever the other rows and the device are.
    """
    reached = exact(logits).softmax(dim=-1).cumsum(dim=-1)
    # The last sum is 1, up to rounding. Even times 1 - 2^-53, the largest of these numbers, it is less than itself.
    bounds = uniform.to(reached.device)[:, None] * reached[:, -1:]
    return torch.searchsorted(reached, bounds, right=True)[:, 0].to(logits.device)


def choose(sampling: Sampling, logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The next tokens, int64 [batch], from logits [batch, vocabulary] and random numbers, float64 [batch] in [0, 1)."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    kept, tokens = _likeliest(logits, sampling.top_k, sampling.temperature)
    if sampling.top_p < 1:
        kept = keep_top_p(kept, sampling.top_p)
    if sampling.min_p > 0:
        kept = keep_min_p(kept, sampling.min_p)
    if sampling.typical_p < 1:
        kept = keep_typical(kept, sampling.typical_p)
    drawn = draw(kept, uniforms)
    return drawn if tokens is None else tokens.gather(-1, drawn[:, None])[:, 0]


def _likeliest(logits: torch.Tensor, k: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `keep_top_k` keeps of scaled logits, and the ids, both [batch, k]: what follows goes over k tokens only.

    The ids are None, and the logits [batch, vocabulary], if k = 0 or ties leave more. Scaling keeps the order, but may
    round two logits to the same: so the next one after the k likeliest is looked at, too.
    """
    if k == 0 or k >= logits.shape[-1]:
        return scale_by_temperature(logits, temperature), None
    values, tokens = logits.topk(k + 1, dim=-1)
    values = scale_by_temperature(values, temperature)
    if bool((values[:, k] == values[:, k - 1]).any()):
        return keep_top_k(scale_by_temperature(logits, temperature), k), None
    # In the vocabulary's order: if rounding makes two nearly equal logits change places, no draw changes.
    tokens, order = tokens[:, :k].sort(dim=-1)
    return values.gather(-1, order), tokens
