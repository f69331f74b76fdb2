"""Part "sampling": the sampler against Transformers' `generate`, GPT-2 of 124 million parameters and a Llama of 1 B.

Tokens are compared in fp32, where rounding does not choose between them; in bf16 two likely tokens are often closer
than its rounding, so there it is only told how far texts go together. Speeds are of bf16, with top-k 50 and top-p 0.95.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gpu_day.models import LARGE, device, large, quiet, recorder, settle, tokens
from gpu_day.rows import Finding, Rows, Skipped, figure, holds, part

_LENGTHS = (3, 9, 10, 17)  # of the prompts that are compared
_ROUNDS = 3
_RESERVE = 6.0  # seconds that are left for what comes after a round


def checks(rows: Rows, cpu: bool, folder: Path) -> None:
    """Tokens of each model, then its speeds."""
    quiet()
    torch.set_float32_matmul_precision("highest")
    new_tokens = 8 if cpu else 64
    for number, shape in enumerate(LARGE):
        share = rows.seconds_left / (len(LARGE) - number)
        ends = time.monotonic() + share - _RESERVE
        for dtype in (torch.float32, torch.bfloat16):
            compared = Compared(shape, dtype, new_tokens)
            name = "fp32" if dtype == torch.float32 else "bf16"
            rows.check(f"{shape}: fixed cache = growing cache, {name}", compared.caches)
            rows.check(f"{shape}: growing cache = generate, {name}", compared.theirs)
            compared.close()
        timed = Timed(shape, new_tokens)
        for batch in (1, 2) if cpu else (1, 8, 64):
            rows.check(f"{shape}: tokens per second, batch {batch}", timed.rates, batch, ends)
        timed.close()


class _WithModel:
    """Something about one model, which is made when it is first needed and given back in the end."""

    def __init__(self, shape: str, dtype: torch.dtype, new_tokens: int) -> None:
        self._shape, self._dtype, self._new_tokens = shape, dtype, new_tokens
        self._held: list[Any] = []

    @property
    def model(self) -> Any:
        """The model, in eval mode."""
        if not self._held:
            made = large(self._shape, self._dtype)
            made.generation_config.eos_token_id = None  # texts of one length
            self._held.append(made)
        return self._held[0]

    def close(self) -> None:
        """Give back its memory."""
        self._held.clear()
        settle()

    def feeds(self) -> dict[str, Any]:
        """A growing cache, and where there is one a fixed one, whose step is recorded where the device can."""
        from train_loop.generation.kv_cache import Decoder, StaticDecoder

        found: dict[str, Any] = {"growing cache": Decoder(self.model)}
        if StaticDecoder.fits(self.model):
            found["fixed cache"] = StaticDecoder(self.model, recorder())
        return found

    def generate(self, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        """New tokens [rows, new] of Transformers' own `generate`, as many as were asked for."""
        options |= {"max_new_tokens": self._new_tokens, "pad_token_id": 0}
        found = self.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        new: torch.Tensor = found[:, ids.shape[1] :]
        assert new.shape[1] == self._new_tokens
        return new


class Compared(_WithModel):
    """Greedy tokens of one model, made in several ways."""

    def _sampled(self, feed: Any) -> list[list[int]]:
        from train_loop.config.sampling import Sampling
        from train_loop.generation.decoding import generate

        prompts = [tokens(1, length, length)[0].tolist() for length in _LENGTHS]
        return [each.tokens for each in generate(feed, prompts, Sampling(self._new_tokens, temperature=0), None)]

    def caches(self) -> Finding:
        """Of the recorded step and of the growing cache, prompts of several lengths together.

        Raises:
            Skipped: where there is no fixed cache, whose step could be recorded.
        """
        feeds = self.feeds()
        if "fixed cache" not in feeds:
            raise Skipped("this Transformers has no cache of fixed size that can be recorded for this model")
        return self._beside(self._sampled(feeds["fixed cache"]), self._sampled(feeds["growing cache"]))

    def theirs(self) -> Finding:
        """Of the growing cache, and of `generate` given each prompt alone."""
        from train_loop.generation.kv_cache import Decoder

        alone = [self.generate(tokens(1, length, length), do_sample=False)[0].tolist() for length in _LENGTHS]
        return self._beside(self._sampled(Decoder(self.model)), alone)

    def _beside(self, mine: list[list[int]], theirs: list[list[int]]) -> Finding:
        together = [_together(x, y) for x, y in zip(mine, theirs, strict=True)]
        told = f"{sum(together)} of {len(_LENGTHS) * self._new_tokens} tokens before texts part"
        if self._dtype != torch.float32:
            return figure(told)
        kinds = len({token for text in theirs for token in text})
        return holds(mine == theirs, told, "all the same", f"{kinds} different ones")


def _together(mine: list[int], theirs: list[int]) -> int:
    """How many tokens two texts have in common before they part."""
    for count, (x, y) in enumerate(zip(mine, theirs, strict=False)):
        if x != y:
            return count
    return min(len(mine), len(theirs))


class Timed(_WithModel):
    """Speeds of one model in bf16."""

    def __init__(self, shape: str, new_tokens: int) -> None:
        super().__init__(shape, torch.bfloat16, new_tokens)
        self._feeds: dict[str, Any] = {}

    def close(self) -> None:
        """Give back its memory."""
        self._feeds.clear()
        super().close()

    def rates(self, batch: int, ends: float) -> Finding:
        """Tokens per second of each way, which take turns for as many rounds as there is time."""
        from train_loop.config.sampling import Sampling
        from train_loop.devices import synchronize
        from train_loop.generation.decoding import generate

        if not self._feeds:
            self._feeds = self.feeds()
        ids = tokens(1, 10).expand(batch, -1)
        prompts = ids.tolist()
        ways: dict[str, Callable[[], object]] = {
            "generate": lambda: self.generate(ids, do_sample=True, top_k=50, top_p=0.95)
        }
        for name, feed in self._feeds.items():
            ways[name] = lambda feed=feed: generate(  # type: ignore[misc]
                feed, prompts, Sampling(self._new_tokens), None, samples=range(batch)
            )
        taken: dict[str, list[float]] = {name: [] for name in ways}
        began = time.monotonic()
        for turn in range(_ROUNDS + 1):  # the first one warms up
            now = time.monotonic()
            if now + (now - began) / max(turn, 1) > ends:
                break
            for name, work in ways.items():
                synchronize(device())
                start = time.perf_counter()
                work()
                synchronize(device())
                taken[name].append(time.perf_counter() - start)
        rounds = min(map(len, taken.values())) - 1
        if rounds < 1:
            raise Skipped("no time was left for two rounds")
        rates = {name: batch * self._new_tokens / statistics.median(times[1:]) for name, times in taken.items()}
        why = ", ".join(f"{name} {rates[name] / rates['generate']:.2f} of generate's" for name in self._feeds)
        return figure(rates, "tokens/s", f"{rounds} rounds; {why}")


if __name__ == "__main__":
    part(checks)
