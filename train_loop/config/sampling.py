"""How text is sampled: the settings of `train-loop sample` and of a script's `Sampler`."""

from dataclasses import dataclass

from train_loop.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when a text ends.

    Args:
        max_new_tokens: add at most this many tokens.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the fewest tokens whose probability reaches p, in (0, 1]; 1 keeps all.
        seed: seed of the random draws.
        min_p: keep tokens that are at least this many times as likely as the likeliest one, in [0, 1]; 0 keeps all.
        typical_p: keep the most typical tokens whose probability reaches this value, in (0, 1]; 1 keeps all.
        repetition_penalty: makes tokens that the text already contains less likely, above 0; 1 changes nothing.
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
        for name, holds, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0 (0 keeps all tokens)"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1] (1 keeps all tokens)"),
            ("seed", self.seed >= 0, "at least 0"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1] (0 keeps all tokens)"),
            ("typical_p", 0 < self.typical_p <= 1, "in (0, 1] (1 keeps all tokens)"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0 (1 changes nothing)"),
            ("stop", all(self.stop), "strings of at least one character"),
            ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, "at most max_new_tokens"),
            ("samples", self.samples >= 1, "at least 1"),
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
