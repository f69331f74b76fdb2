"""How text is sampled: the settings of `train-loop sample` and of a script's `Sampler`."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from train_loop.config.schema import Config
from train_loop.errors import InputError

# Numbers beyond these overflow fp32, or leave nothing of the logits.
_SMALLEST, _LARGEST = 1e-6, 1e6
_MOST_TOKENS, _MOST_SAMPLES = 2**31 - 1, 10**6


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when a text ends.

    Args:
        max_new_tokens: add at most this many tokens.
        temperature: divides the logits; 0 always takes the likeliest token, others are from 1e-6 to 1e6.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the fewest tokens whose probability reaches p, in (0, 1]; 1 keeps all.
        seed: seed of the random draws.
        min_p: keep tokens that are at least this many times as likely as the likeliest one, in [0, 1]; 0 keeps all.
        typical_p: keep the most typical tokens whose probability reaches this value, in (0, 1]; 1 keeps all.
        repetition_penalty: makes tokens that the text already contains less likely, from 1e-6 to 1e6; 1 does not.
        banned_tokens: ids of tokens that are never drawn.
        stop_tokens: ids of tokens that end a text, in addition to the end-of-text token; they are not part of the text.
        stop: strings that end a text; they are not part of it. On the command line, repeat the option for several.
        min_new_tokens: at least this many tokens come before a token may end the text.
        samples: number of continuations of each prompt.
        log_probabilities: with --json, also print each token's log-probability under the model, before any filtering.
    """

    max_new_tokens: int = 100
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 0.95
    seed: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    banned_tokens: tuple[int, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    min_new_tokens: int = 0
    samples: int = 1
    log_probabilities: bool = False

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if each.type in _KINDS:
                words, is_one = _KINDS[each.type]
                if not is_one(value):
                    raise InputError(f"{each.name} {value!r}: must be {words}")
            if isinstance(value, list):
                object.__setattr__(self, each.name, tuple(value))
        for name, holds, expected in (
            ("max_new_tokens", 1 <= self.max_new_tokens <= _MOST_TOKENS, f"from 1 to {_MOST_TOKENS:,}"),
            ("temperature", self.temperature == 0 or _within(self.temperature), f"0, or from {_SMALLEST} to 1e6"),
            ("top_k", self.top_k >= 0, "at least 0 (0 keeps all tokens)"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1] (1 keeps all tokens)"),
            ("seed", self.seed >= 0, "at least 0"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1] (0 keeps all tokens)"),
            ("typical_p", 0 < self.typical_p <= 1, "in (0, 1] (1 keeps all tokens)"),
            ("repetition_penalty", _within(self.repetition_penalty), f"from {_SMALLEST} to 1e6 (1 changes nothing)"),
            ("stop", all(self.stop), "strings of at least one character"),
            ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, "at most max_new_tokens"),
            ("samples", 1 <= self.samples <= _MOST_SAMPLES, f"from 1 to {_MOST_SAMPLES:,}"),
        ):
            if not holds:
                raise InputError(f"{name} {getattr(self, name)}: must be {expected}")
        if self.temperature == 0 and self.samples > 1:
            raise InputError(f"samples {self.samples}: at temperature 0 they would all be the same; use --samples 1")
        if self.temperature == 0 and self.typical_p < 1:
            raise InputError(
                f"typical_p {self.typical_p}: contradicts temperature 0, which takes the likeliest token, typical or "
                "not; drop one of the two"
            )
        if both := sorted({*self.banned_tokens} & {*self.stop_tokens}):
            raise InputError(f"stop_tokens {both}: are also in banned_tokens, so they could never end a text")


def sampling_of(config: Config) -> Sampling:
    """How a run samples; InputError, which names the setting, for what cannot be sampled with."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p")
    try:
        return Sampling(seed=config.run.seed, **{name: getattr(config.sample, name) for name in names})
    except InputError as error:
        raise InputError(f"{'run' if str(error).startswith('seed') else 'sample'}.{error}") from None


def _within(value: float) -> bool:
    return _SMALLEST <= value <= _LARGEST


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _all(holds: Callable[[object], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(map(holds, value))


# Settings come from scripts, too: what each type of field must be, in words and as a test.
_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    int: ("a whole number", _is_integer),
    float: ("a number", _is_number),
    bool: ("True or False", lambda value: isinstance(value, bool)),
    tuple[int, ...]: ("a list of token ids", _all(_is_integer)),
    tuple[str, ...]: ("a list of strings", _all(lambda value: isinstance(value, str))),
}
