"""Continues prompts together, one token of each at a time.

    prompts -> logits of the next tokens -> filters -> draw -> feed the drawn tokens -> logits ...

Every draw has its own random number, keyed by (seed, prompt, sample, position). So a prompt's continuation is the same
alone, in any batch and in any order, as long as rounding leaves the logits the same.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import PreTrainedModel

from train_loop.config.sampling import Sampling
from train_loop.errors import InputError
from train_loop.generation import logits_processors
from train_loop.generation.kv_cache import Feed
from train_loop.models.building import context_length
from train_loop.rng import key, uniform

NOT_FINITE = (
    "the model's logits are not finite numbers, so there is no next token; take weights from before it diverged"
)


class NotFiniteError(InputError):
    """A model whose training diverged, or whose numbers are too large, has no next token."""


@dataclass
class Generated:
    """Tokens that continue a prompt."""

    tokens: list[int] = field(default_factory=list)  # ids, without the one that ended the text
    log_probabilities: list[float] = field(default_factory=list)  # natural, before any filter (if asked for)
    finish_reason: Literal["stop", "length"] | None = None  # "length" after max_new_tokens


@torch.no_grad()
def generate(  # noqa: PLR0913  what a text needs to grow, each of it apart
    feed: Feed,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    eos: int | Collection[int] | None,
    samples: Sequence[int] | None = None,
    on_token: Callable[[int, int], bool] = lambda row, token: False,
    notice: Callable[[str], None] = lambda line: None,
) -> list[Generated]:
    """Continue each prompt until its text ends, whatever the others do.

    Args:
        feed: decoder of a model that is already in the right mode (train or eval).
        prompts: token ids, at least one each; InputError for one longer than the model's context.
        sampling: how tokens are chosen; InputError for tokens that are not in the model's vocabulary.
        eos: the token that ends a text, or several; None if there is none. `sampling.stop_tokens` end it, too.
        samples: each row's sample number, from 0, among those of its prompt; None: all are 0.
        on_token: called with each row's number and new token; True ends the text there.
        notice: called with a line that the user should see.

    Raises:
        NotFiniteError: if the model's logits are no numbers.
    """
    eos = () if eos is None else [eos] if isinstance(eos, int) else eos
    check_tokens(feed.model, sampling, eos)
    for prompt in prompts:
        check_prompt(feed.model, prompt)
    context = context_length(feed.model)
    ends = {*sampling.stop_tokens, *_drawable(feed.model, eos)}
    numbers = samples if samples is not None else [0] * len(prompts)
    rows = [_Row(*each, sampling) for each in zip(range(len(prompts)), prompts, numbers, strict=True)]
    active = rows
    logits, room = _start(feed, active, context, sampling.max_new_tokens)
    choice = _Choice(sampling, active, ends, logits)
    said = False
    while True:
        if not bool(logits.amax(dim=-1).isfinite().all()):  # NaN if there is one, else the largest
            raise NotFiniteError(NOT_FINITE)
        tokens, log_p = choice.make(logits, active)
        going = [
            place
            for place, (row, token, each) in enumerate(zip(active, tokens.tolist(), log_p, strict=True))
            if row.take(token, each, ends, on_token)
        ]
        if not going:
            return [row.result for row in rows]
        if len(going) < len(active):
            active, tokens = [active[place] for place in going], tokens[going]
            feed.select_rows(going)
            choice.keep(going)
        choice.seen(tokens)
        if not said and any(slid_out(len(row.ids), context) for row in active):
            notice(f"the model's context of {context} tokens is full: the oldest tokens slide out")
            said = True
        if room > 0:
            logits, room = feed.step(tokens), room - 1
        else:  # the longest row is full, or ended before it was
            logits, room = _start(feed, active, context, sampling.max_new_tokens)


def check_prompt(model: PreTrainedModel, prompt: Sequence[int]) -> None:
    """Refuse a prompt (token ids) that the model cannot take. Raises InputError with both lengths, or both ids."""
    vocabulary = model.config.get_text_config().vocab_size
    if prompt and max(prompt) >= vocabulary:
        problem = f"has the token {max(prompt)}, but the model knows only those from 0 to {vocabulary - 1}"
        raise InputError(f"prompt: {problem}; use the tokenizer that belongs to it")
    context = context_length(model)
    if context is not None and len(prompt) > context:
        raise InputError(f"prompt: {len(prompt)} tokens exceed the model's context of {context}; shorten it")


def check_tokens(model: PreTrainedModel, sampling: Sampling, ends: Collection[int] = ()) -> None:
    """Raise InputError for tokens to ban or to stop at that a model does not have, and if no other token is left."""
    vocabulary = model.config.get_text_config().vocab_size
    for name, ids in (("banned_tokens", sampling.banned_tokens), ("stop_tokens", sampling.stop_tokens)):
        if outside := [token for token in ids if not 0 <= token < vocabulary]:
            raise InputError(f"{name} {outside}: not in the vocabulary, whose ids are 0 to {vocabulary - 1}")
    if len({*sampling.banned_tokens}) == vocabulary:
        raise InputError("banned_tokens: leave no token to draw; ban fewer")
    early = {*sampling.banned_tokens, *sampling.stop_tokens, *_drawable(model, ends)}
    if sampling.min_new_tokens and len(early) == vocabulary:
        raise InputError(f"min_new_tokens {sampling.min_new_tokens}: every token is banned or ends the text; ban fewer")


def _drawable(model: PreTrainedModel, tokens: Collection[int]) -> set[int]:
    """Those tokens that are in a model's vocabulary. Some models name an end that is not: it never comes."""
    vocabulary = model.config.get_text_config().vocab_size
    return {token for token in tokens if 0 <= token < vocabulary}


def slid_out(length: int, context: int | None) -> int:
    """How many of a text's oldest tokens the model no longer sees.

    A quarter of the context slides out at a time, and the rest is fed again, at positions from 0. This works with every
    architecture, and costs about three extra tokens for each new one. It depends on the text's length only.
    """
    if context is None or length <= context:
        return 0
    hop = max(1, context // 4)
    return -(-(length - context) // hop) * hop


class _Row:
    """A growing text."""

    def __init__(self, number: int, prompt: Sequence[int], sample: int, sampling: Sampling) -> None:
        self.number, self.ids, self.sampling = number, list(prompt), sampling
        self.result = Generated()
        self._key = (sampling.seed, key("prompt", *prompt), sample)

    def uniform(self) -> float:
        """The random number for the next token."""
        return uniform("sample", *self._key, len(self.ids))

    def take(self, token: int, log_p: float, ends: set[int], on_token: Callable[[int, int], bool]) -> bool:
        """Add a token, unless it ends the text; returns whether the text goes on."""
        result, sampling = self.result, self.sampling
        if token in ends:
            result.finish_reason = "stop"
            return False
        self.ids.append(token)
        result.tokens.append(token)
        if sampling.log_probabilities:
            result.log_probabilities.append(log_p)
        if on_token(self.number, token):
            result.finish_reason = "stop"
        elif len(result.tokens) == sampling.max_new_tokens:
            result.finish_reason = "length"
        return result.finish_reason is None


def _start(feed: Feed, rows: list[_Row], context: int | None, max_new_tokens: int) -> tuple[torch.Tensor, int]:
    """Feed what the model sees of each text; returns the logits after it and how many more tokens may follow."""
    windows = [row.ids[slid_out(len(row.ids), context) :] for row in rows]
    room = max_new_tokens - len(rows[0].result.tokens) - 1
    if context is not None:
        room = min(room, context - max(map(len, windows)))
    return feed.start(windows, room), room


class _Choice:
    """Chooses the next tokens of a batch, and remembers what it needs of the texts so far."""

    def __init__(self, sampling: Sampling, rows: list[_Row], ends: set[int], logits: torch.Tensor) -> None:
        self._sampling = sampling
        self._banned, self._early = (
            torch.tensor(sorted(ids), dtype=torch.int64, device=logits.device)
            for ids in ({*sampling.banned_tokens}, {*sampling.banned_tokens} | ends)
        )
        self._seen: torch.Tensor | None = None
        if sampling.repetition_penalty != 1:
            self._seen = torch.zeros_like(logits, dtype=torch.bool)
            for place, row in enumerate(rows):
                self._seen[place, row.ids] = True

    def make(self, logits: torch.Tensor, rows: list[_Row]) -> tuple[torch.Tensor, list[float]]:
        """Tokens int64 [batch], and their log-probabilities, which are zeros unless they were asked for."""
        sampling = self._sampling
        filtered = logits
        if self._seen is not None:
            filtered = logits_processors.penalize_repetition(filtered, self._seen, sampling.repetition_penalty)
        banned = self._early if len(rows[0].result.tokens) < sampling.min_new_tokens else self._banned
        if len(banned):
            filtered = logits_processors.ban(filtered, banned)
        uniforms = [row.uniform() if sampling.temperature else 0.0 for row in rows]
        tokens = logits_processors.choose(sampling, filtered, torch.tensor(uniforms, dtype=torch.float64))
        if not sampling.log_probabilities:
            return tokens, [0.0] * len(rows)
        return tokens, logits.log_softmax(dim=-1).gather(-1, tokens[:, None])[:, 0].tolist()

    def seen(self, tokens: torch.Tensor) -> None:
        """Remember the new tokens, int64 [batch], of the rows that go on."""
        if self._seen is not None:
            self._seen.scatter_(1, tokens[:, None], True)

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        if self._seen is not None:
            self._seen = self._seen[rows]
