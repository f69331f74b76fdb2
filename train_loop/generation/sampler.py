"""Samples text from a causal language model.

    from train_loop import Sampler
    print(Sampler.load("runs/quickstart/model")("    def __init__(self", temperature=0.4))

Prompts become tokens, `decoding.py` continues them together, and the tokens become text again as they arrive.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import accelerate
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from train_loop.checkpoint import pretrained
from train_loop.config.sampling import Sampling
from train_loop.console import say
from train_loop.data.tokenizer import encoder, pieces
from train_loop.errors import InputError, one_line
from train_loop.generation.decoding import Generated, check_prompt, check_tokens, generate
from train_loop.generation.kv_cache import Decoder, Feed, StaticDecoder, recorder, takes_positions
from train_loop.models import causality
from train_loop.models.ends import ends
from train_loop.models.loading import check_present
from train_loop.ops.packed_linear import pack
from train_loop.records import to_json


@dataclass(frozen=True)
class Continuation:
    """The continuation of a prompt, without the prompt: its text, and the tokens that it was decoded from.

    If a string ended the text, the tokens (which are whole) include it, but the text does not.
    """

    text: str
    generated: Generated


class Sampler:
    """A language model with its tokenizer, to sample texts from."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        feed: Feed | None = None,
        notice: Callable[[str], None] = say,
    ) -> None:
        """Sampler of a model that may be trained further: its mode (train or eval) is restored after use.

        Without a `feed`, the model is fed by a `Decoder`. `notice` is called with a line that the user should see.
        InputError for a model that sees the future.
        """
        check_present(model, f"the {type(model).__name__}")
        causality.check(model, f"the {type(model).__name__}")
        self.model, self.tokenizer = model, tokenizer
        self._feed = feed or Decoder(model)
        self._notice = notice
        self._encoder = encoder(tokenizer)
        self._ends = ends(model, tokenizer)

    @classmethod
    def load(cls, name: str) -> "Sampler":
        """Sampler of a model on disk or on the Hub (see `pretrained.load`), as fast as the device allows."""
        model, tokenizer = pretrained.load(name)
        model.eval().to(accelerate.PartialState().device)
        causality.check(model, f"model {name}")
        record = recorder(model.device)
        if record is not None and StaticDecoder.fits(model):
            return cls(model, tokenizer, StaticDecoder(model, record))
        pack(model)
        return cls(model, tokenizer)

    def __call__(self, prompt: str, **settings: Any) -> str:
        """The text that continues a prompt; settings are those of `Sampling`."""
        (continuations,) = self.sample([prompt], Sampling(**settings))
        return continuations[0].text

    def sample(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        batch_size: int = 8,
        on_text: Callable[[str], None] = lambda text: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[list[Continuation]]:
        """Continuations of each prompt, prompt by prompt, `batch_size` texts at a time.

        All prompts are checked before the first is continued; InputError for one that is longer than the model's
        context, no valid Unicode, or empty if the tokenizer has no token to begin with. Later, NotFiniteError if the
        model's logits are not finite. A text ends at any of the model's ends (see `models.ends`). `on_text` is called
        with each new stretch of text as soon as its characters are whole, which is useful for one text; `stop` after
        each token: True ends all texts there.
        """
        check_tokens(self.model, sampling, self._ends)
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size {batch_size}: must be a whole number, at least 1")
        size = min(batch_size, len(prompts) * sampling.samples)
        ids = []
        for number, prompt in enumerate(prompts, 1):
            try:
                ids.append(prompt_ids(self.tokenizer, prompt, self._encoder))
                check_prompt(self.model, ids[-1])
            except InputError as error:
                which = f"prompt {number} of {len(prompts)}" if len(prompts) > 1 else "prompt"
                raise InputError(f"{which}{str(error).removeprefix('prompt')}") from None

        def continuations() -> Iterator[list[Continuation]]:
            wanted = ((prompt, sample) for prompt in ids for sample in range(sampling.samples))
            # A model that takes no positions gets only rows of one length at a time.
            alike = (lambda each: 0) if takes_positions(self.model) else (lambda each: len(each[0]))
            done: list[Continuation] = []
            for _, group in itertools.groupby(wanted, alike):
                while batch := list(itertools.islice(group, size)):
                    done += self._together(batch, sampling, on_text, stop)
                    while len(done) >= sampling.samples:
                        yield done[: sampling.samples]
                        done = done[sampling.samples :]

        return continuations()

    def _together(
        self,
        batch: list[tuple[list[int], int]],
        sampling: Sampling,
        on_text: Callable[[str], None],
        stop: Callable[[], bool],
    ) -> list[Continuation]:
        """Continue one batch of (prompt, sample number)."""
        prompts, samples = zip(*batch, strict=True)
        texts = [Text(self.tokenizer, prompt, sampling.stop, on_text) for prompt in prompts]
        training = self.model.training
        self.model.eval()
        try:
            found = generate(
                self._feed,
                prompts,
                sampling,
                self._ends,
                samples,
                on_token=lambda row, token: texts[row].add(token) or stop(),
                notice=self._notice,
            )
        finally:
            self.model.train(training)
        return [Continuation(text.finish(), each) for text, each in zip(texts, found, strict=True)]


class Text:
    """Text that grows token by token, and is passed on as soon as no later token can change it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        prompt: Sequence[int],
        stop: Sequence[str] = (),
        on_text: Callable[[str], None] = lambda text: None,
    ) -> None:
        """A continuation that is still empty, of a prompt (some tokenizers treat a text's first word differently)."""
        self._tokenizer, self._stop, self._on_text = tokenizer, stop, on_text
        self._ids = list(prompt)
        self._from, self._read = 0, len(self._ids)  # decoded again for context, and already read
        self._text, self._handed_on, self._ended = "", 0, False

    def add(self, token: int) -> bool:
        """Add a token; returns whether a string has ended the text."""
        self._ids.append(token)
        self._decode(last=False)
        return self._ended

    def finish(self) -> str:
        """The whole text."""
        self._decode(last=True)
        self._hand_on(len(self._text))
        return self._text

    def _decode(self, last: bool) -> None:
        """Decode the new tokens, look for strings that end the text, and pass on what can no longer change."""
        if self._ended:
            return
        known, whole = (
            str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))
            for ids in (self._ids[self._from : self._read], self._ids[self._from :])
        )
        if whole.endswith("\ufffd") and not last:  # part of a character: wait for its other bytes
            return
        self._from, self._read = self._read, len(self._ids)
        before = len(self._text)
        self._text += whole[len(known) :]
        longest = max(map(len, self._stop), default=0)
        found = [at for string in self._stop if (at := self._text.find(string, max(0, before - longest))) >= 0]
        if found:
            self._text, self._ended = self._text[: min(found)], True
        # Text that may be the beginning of such a string waits.
        begun = [size for string in self._stop for size in range(1, len(string)) if self._text.endswith(string[:size])]
        self._hand_on(len(self._text) - (0 if self._ended else max(begun, default=0)))

    def _hand_on(self, end: int) -> None:
        """Pass on the text up to `end`."""
        if end > self._handed_on:
            self._on_text(self._text[self._handed_on : end])
            self._handed_on = end


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: str, core: Any = None) -> list[int]:
    """A prompt's token ids; the spelling of a special token counts as ordinary text.

    An empty prompt becomes the token that begins texts; InputError if there is none, and if the prompt is no valid
    Unicode. `core` is `encoder(tokenizer)`, if it already exists.
    """
    core = core or encoder(tokenizer)
    try:
        prompt.encode()
        # In pieces, so that Ctrl-C is heard between them.
        encoded = [core.encode(piece, add_special_tokens=False).ids for piece in pieces(core, [prompt])]
    except UnicodeEncodeError as error:
        problem = f"character {error.start + 1} is half of a surrogate pair, which is no text"
        raise InputError(f"prompt: {problem}") from None
    except Exception as error:  # the core raises plain exceptions
        raise InputError(f"prompt: cannot be encoded by the tokenizer ({one_line(error)})") from None
    ids = list(itertools.chain.from_iterable(encoded))
    start = tokenizer.bos_token_id
    if not ids and not isinstance(start, int):
        raise InputError("prompt: is empty, and the tokenizer has no token to begin a text with (bos_token)")
    return ids or [start]


def as_json(prompt: str, continuations: Sequence[Continuation], tokenizer: PreTrainedTokenizerFast) -> str:
    """One line of `train-loop sample --json`; several samples become a list."""
    shown: list[dict[str, Any]] = []
    for each in continuations:
        found = each.generated
        shown.append({"continuation": each.text, "text": prompt + each.text, "finish_reason": found.finish_reason})
        if found.log_probabilities:
            shown[-1]["tokens"] = [
                {"id": token, "token": tokenizer.decode([token]), "log_probability": log_p}
                for token, log_p in zip(found.tokens, found.log_probabilities, strict=True)
            ]
    return to_json({"prompt": prompt} | (shown[0] if len(shown) == 1 else {"samples": shown}))
