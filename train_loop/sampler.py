"""Sampling text from a causal language model: filters on logits, and generation with a key-value cache.

    logits [vocabulary] -> / temperature -> top-k -> top-p -> softmax -> draw

A filter sets the logits of the tokens it removes to minus infinity, so filters can be chained; each always leaves at
least one token. The random numbers are keyed by (seed, prompt, position): a prompt's continuation is the same
whichever prompts were sampled before it.
"""

import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from train_loop.data.tokenizer import encoder
from train_loop.errors import InputError
from train_loop.model import context_length
from train_loop.randomness import key

_REMOVED = -float("inf")


def scale_by_temperature(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logits [batch, vocabulary] divided by a temperature > 0: below 1 sharpens, above 1 flattens."""
    return logits / temperature


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Remove all but the k likeliest tokens from logits [batch, vocabulary] (Fan et al., 2018); 0 keeps all.

    Tokens that tie with the k-th are kept too.
    """
    if k == 0 or k >= logits.shape[-1]:
        return logits
    kth = logits.topk(k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < kth, _REMOVED)


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Remove all but the nucleus from logits [batch, vocabulary] (Holtzman et al., 2020); 1 keeps all.

    The nucleus is the smallest set of likeliest tokens whose probability reaches p. From the least likely upwards,
    tokens go as long as all that have gone so far sum to at most 1 - p.
    """
    if p >= 1:
        return logits
    ascending, indices = logits.sort(dim=-1)
    removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    removed[:, -1] = False  # the likeliest token stays, however small p is
    return logits.masked_fill(removed.scatter(-1, indices, removed), _REMOVED)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        max_new_tokens: tokens to add at most.
        temperature: 0 always takes the likeliest token.
        top_k: 0 keeps all.
        top_p: in (0, 1]; 1 keeps all.
        seed: of the draws.
    """

    max_new_tokens: int = 100
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0 (0 keeps all tokens)"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1] (1 keeps all tokens)"),
            ("seed", self.seed >= 0, "at least 0"),
        ):
            if not holds:
                raise InputError(f"{name} {getattr(self, name)}: must be {expected}")

    def choose(self, logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The next tokens [batch, 1] for logits [batch, vocabulary]."""
        if self.temperature == 0:
            return logits.argmax(dim=-1, keepdim=True)
        logits = keep_top_p(keep_top_k(scale_by_temperature(logits, self.temperature), self.top_k), self.top_p)
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)


@torch.no_grad()
def generate(
    model: PreTrainedModel, prompt: list[int], sampling: Sampling, eos: int | None, use_cache: bool = True
) -> Iterator[int]:
    """Token ids that continue a prompt, one by one, up to and without the end-of-text token.

    Each step feeds the model the last token alone: keys and values of those before it are in the cache.

    Args:
        model: in the mode (train or eval) it is to be used in; `sample` puts it in eval.
        prompt: token ids, at least one.
        sampling: how tokens are chosen.
        eos: id that ends the text; None never does.
        use_cache: False computes all positions again for every token, for comparison.

    Raises:
        InputError: for a prompt that fills the model's context.
    """
    check_prompt(model, prompt)
    context = context_length(model)
    room = sampling.max_new_tokens if context is None else min(sampling.max_new_tokens, context - len(prompt))
    options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    ids = torch.tensor([prompt], device=model.device)
    fresh, cache = ids, None
    generator = torch.Generator(device=model.device)
    prompt_key = key("prompt", *prompt)
    for position in range(len(prompt), len(prompt) + room):
        output: Any = model(input_ids=fresh, past_key_values=cache, use_cache=use_cache, **options)
        cache = output.get("past_key_values") if use_cache else None
        generator.manual_seed(key("sample", sampling.seed, prompt_key, position))
        token = sampling.choose(output.logits[:, -1].float(), generator)
        if token.item() == eos:
            return
        yield int(token.item())
        ids = torch.cat([ids, token], dim=1)
        fresh = ids if cache is None else token


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """A prompt's token ids, special tokens' spellings as ordinary text.

    An empty prompt becomes the token that begins texts.

    Raises:
        InputError: when there is no such token.
    """
    ids = encoder(tokenizer).encode(prompt, add_special_tokens=False).ids
    start = tokenizer.bos_token_id
    if not ids and not isinstance(start, int):
        raise InputError("prompt: is empty, and the tokenizer has no token to begin a text with (bos_token)")
    return ids or [start]


def check_prompt(model: PreTrainedModel, prompt: list[int]) -> None:
    """Refuse a prompt (token ids) that leaves no room for a token in the model's context.

    Raises:
        InputError: with both lengths.
    """
    context = context_length(model)
    if context is not None and len(prompt) >= context:
        raise InputError(f"prompt: {len(prompt)} tokens leave no room in the model's context of {context}")


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    sampling: Sampling,
    on_text: Callable[[str], None] = lambda text: None,
    stop: Callable[[], bool] = lambda: False,
) -> str:
    """The text that continues a prompt, without the prompt.

    Args:
        model, tokenizer: what to sample from.
        prompt: the beginning of the text.
        sampling: how tokens are chosen.
        on_text: called with each new stretch of text as soon as its characters are whole.
        stop: asked after each token; True ends the text there.
    """
    ids = prompt_ids(tokenizer, prompt)
    given = tokenizer.decode(ids)
    new: list[int] = []
    written = 0
    text = ""
    training = model.training
    model.eval()
    try:
        for token in generate(model, ids, sampling, _eos(tokenizer)):
            new.append(token)
            # Decoded with the prompt before it: some tokenizers drop a leading space.
            text = str(tokenizer.decode(ids + new))[len(given) :]
            if not text.endswith("\ufffd"):  # half a character: wait for its other bytes
                on_text(text[written:])
                written = len(text)
            if stop():
                break
    finally:
        model.train(training)
    on_text(text[written:])
    return text


def _eos(tokenizer: PreTrainedTokenizerFast) -> int | None:
    eos = tokenizer.eos_token_id
    return eos if isinstance(eos, int) else None


def as_json(prompt: str, continuation: str) -> str:
    """One line of `train-loop sample --json`."""
    return json.dumps({"prompt": prompt, "continuation": continuation, "text": prompt + continuation})
