"""Generation: greedy text is `generate`'s, and a prompt's continuation is the same however it is computed."""

import copy
import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tests.support.runs import PATHS, configured, needs_onednn
from train_loop import compat, devices
from train_loop.config.sampling import Sampling
from train_loop.data import tokenizer
from train_loop.errors import InputError
from train_loop.generation.decoding import Generated, NotFiniteError, generate, slid_out
from train_loop.generation.kv_cache import Decoder, StaticDecoder, recorder, takes_positions
from train_loop.models import building
from train_loop.ops import packed_linear
from train_loop.ops.packed_linear import Way, pack
from train_loop.ops.products import ONEDNN, TORCH

CONTEXT = 32
NARROW = 12  # takes less until older tokens slide out
LONG = 26  # beyond the narrow context, twice
PROMPT = [5, 17, 300, 42, 8]
RAGGED = [PROMPT, [9], [11, 50, 51, 52, 53, 54, 60, 7], [250] * 3]


KINDS = ["gpt2", "llama", "qwen3", "gpt_neox"]


def build(kind: str, tokenizer_folder: Path, context: int = CONTEXT) -> Any:
    return building.build(configured(PATHS[kind][0], context), tokenizer.load(str(tokenizer_folder))).eval()


@pytest.fixture(scope="module", params=KINDS)
def built(request: pytest.FixtureRequest, tokenizer_folder: Path) -> Any:
    """A model that all tests share, and none changes."""
    return build(request.param, tokenizer_folder)


@pytest.fixture
def gpt2(tokenizer_folder: Path) -> Any:
    return build("gpt2", tokenizer_folder)


def tokens(found: list[Generated]) -> list[list[int]]:
    return [each.tokens for each in found]


def one(built: Any, prompt: list[int], sampling: Sampling, eos: int | None = None, **options: Any) -> list[int]:
    return generate(Decoder(built, **options), [prompt], sampling, eos)[0].tokens


def alone(built: Any, prompts: list[list[int]], sampling: Sampling, eos: int | None = None) -> list[list[int]]:
    return [one(built, prompt, sampling, eos) for prompt in prompts]


class Narrow:
    """A model with a small context; what it says to a prompt alone is worked out once for all tests."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._one = functools.cache(lambda prompt, sampling, eos: one(model, list(prompt), sampling, eos))

    def alone(self, prompts: list[list[int]], sampling: Sampling, eos: int | None = None) -> list[list[int]]:
        return [self._one(tuple(prompt), sampling, eos) for prompt in prompts]


@pytest.fixture(scope="module", params=KINDS)
def narrow(request: pytest.FixtureRequest, tokenizer_folder: Path) -> Narrow:
    return Narrow(build(request.param, tokenizer_folder, NARROW))


def test_greedy_is_generates(built: Any) -> None:
    mine = one(built, PROMPT, Sampling(max_new_tokens=20, temperature=0))
    theirs = built.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=20, eos_token_id=None)
    assert mine == theirs[0, len(PROMPT) :].tolist()


def test_greedy_with_penalty_bans_and_late_end_is_generates(built: Any) -> None:
    banned = tuple(one(built, PROMPT, Sampling(max_new_tokens=3, temperature=0)))
    sampling = Sampling(
        max_new_tokens=20, temperature=0, repetition_penalty=1.7, banned_tokens=banned, min_new_tokens=9
    )
    eos = one(built, PROMPT, Sampling(20, temperature=0, repetition_penalty=1.7, banned_tokens=banned))[4]
    mine = one(built, PROMPT, sampling, eos)
    theirs = built.generate(
        torch.tensor([PROMPT]),
        do_sample=False,
        max_new_tokens=20,
        min_new_tokens=9,
        repetition_penalty=1.7,
        suppress_tokens=list(banned),
        eos_token_id=eos,
    )
    # Theirs ends in the end-of-text token where there is one.
    assert len(mine) >= 9 and not {*banned, eos} & {*mine}
    assert mine == [token for token in theirs[0, len(PROMPT) :].tolist() if token != eos]


def test_log_probabilities_are_the_models(built: Any) -> None:
    found = generate(Decoder(built), [PROMPT], Sampling(20, seed=5, log_probabilities=True), None)[0]
    logits = built(torch.tensor([PROMPT + found.tokens])).logits[0].detach().double().log_softmax(-1)
    expected = [float(logits[len(PROMPT) - 1 + place, token]) for place, token in enumerate(found.tokens)]
    assert found.log_probabilities == pytest.approx(expected, abs=1e-5)
    assert generate(Decoder(built), [PROMPT], Sampling(20, seed=5), None)[0].log_probabilities == []


@pytest.mark.parametrize("new", [10, LONG])
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"seed": 3}], ids=["greedy", "sampled"])
def test_cached_is_uncached(narrow: Narrow, sampling: dict[str, Any], new: int) -> None:
    settings = Sampling(new, **sampling)
    cached, uncached = (one(narrow.model, PROMPT, settings, use_cache=cache) for cache in (True, False))
    assert cached == uncached and len(cached) == new


@pytest.mark.parametrize("new", [10, pytest.param(LONG, marks=pytest.mark.slow)])
def test_a_ragged_batch_is_each_alone(narrow: Narrow, new: int) -> None:
    model = narrow.model
    for sampling in (Sampling(new, seed=7), Sampling(new, temperature=0, repetition_penalty=1.3)):
        free = narrow.alone(RAGGED, sampling)
        assert tokens(generate(Decoder(model), RAGGED, sampling, None)) == free
        assert tokens(generate(Decoder(model), RAGGED[::-1], sampling, None)) == free[::-1]
        # Now some rows end early, and the others go on without them.
        eos = free[2][7]
        expected = narrow.alone(RAGGED, sampling, eos)
        assert len({len(row) for row in expected}) > 1
        assert tokens(generate(Decoder(model), RAGGED, sampling, eos)) == expected
        assert tokens(generate(Decoder(model, use_cache=False), RAGGED, sampling, eos)) == expected


needs_static_cache = pytest.mark.skipif(
    not compat.static_cache_counts(), reason="static caches of Transformers before 5.4 don't know how full they are"
)


@needs_static_cache
@pytest.mark.parametrize("new", [10, pytest.param(LONG, marks=pytest.mark.slow)])
def test_a_static_cache_is_a_growing_one(narrow: Narrow, new: int) -> None:
    assert StaticDecoder.fits(narrow.model)
    sampling = Sampling(new, seed=7)
    eos = narrow.alone(RAGGED, sampling)[2][7]
    feed = StaticDecoder(narrow.model, lambda step, rewind: step)
    shorter = [row[:2] for row in RAGGED]  # in memory that is there already
    for prompts in (RAGGED[:2], [RAGGED[2]], RAGGED, shorter, RAGGED):
        assert tokens(generate(feed, prompts, sampling, eos)) == narrow.alone(prompts, sampling, eos)


@needs_static_cache
def test_a_static_step_is_the_same_work_each_time(built: Any) -> None:
    """What a GPU would record: a trace of one step's kernels, replayed, gives the following steps."""
    recorded: list[Any] = []

    def record(step: Any, rewind: Any) -> Any:
        for _ in range(3):
            step()
            rewind()
        recorded.append(make_fx(lambda: step())())  # tracing runs the step as well
        return recorded[-1]

    expected = alone(built, RAGGED, Sampling(20, seed=7))
    assert tokens(generate(StaticDecoder(built, record), RAGGED, Sampling(20, seed=7), None)) == expected
    assert len(recorded) == 1


class Backend:
    """What torch has for a device that records: a stream, and a context in which a step is recorded."""

    def __init__(self, refuses: Exception | None) -> None:
        self.refuses = refuses

    Stream = lambda self: types.SimpleNamespace(wait_stream=lambda other: None)  # noqa: E731
    current_stream = Stream
    stream = lambda self, stream: nullcontext()  # noqa: E731

    @contextmanager
    def graph(self, graph: Any) -> Iterator[None]:
        if self.refuses is not None:
            raise self.refuses
        yield


@needs_static_cache
def test_a_step_that_cannot_be_recorded_is_taken_as_it_is(built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As eager attention's on a GPU, which copies a number from the host in every step."""
    refused = RuntimeError("Cannot copy between CPU and CUDA tensors during CUDA graph capture")
    expected = alone(built, RAGGED, Sampling(20, seed=7))
    for refuses in (refused, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")):
        with monkeypatch.context() as patch:
            patch.setattr(devices, "graph_type", lambda device: object)
            patch.setattr(torch, "get_device_module", lambda device, refuses=refuses: Backend(refuses))
            record = recorder(torch.device("cpu"))
        feed = StaticDecoder(built, record)
        if refuses is refused:
            assert tokens(generate(feed, RAGGED, Sampling(20, seed=7), None)) == expected
        else:
            with pytest.raises(torch.OutOfMemoryError):
                generate(feed, RAGGED, Sampling(20, seed=7), None)


@pytest.mark.slow
@needs_onednn
@pytest.mark.parametrize("way", [Way(0, ONEDNN), Way(2, ONEDNN), Way(1, TORCH)], ids=str)
def test_matrices_in_another_order_give_the_same_text(built: Any, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    built = copy.deepcopy(built)
    for parameter in built.parameters():
        if parameter.dim() == 1:  # biases are zeros at first
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    sampling = Sampling(20, seed=7)
    expected = alone(built, RAGGED, sampling)
    few = torch.tensor([[token] for token in PROMPT])
    monkeypatch.setattr(packed_linear, "choice", lambda: way)
    with torch.no_grad():
        logits = built(few).logits
        assert pack(built)
        torch.testing.assert_close(built(few).logits, logits, rtol=1e-5, atol=1e-5)
    assert tokens(generate(Decoder(built), RAGGED, sampling, None)) == expected
    assert alone(built, RAGGED, sampling) == expected


@needs_onednn
def test_copies_of_matrices_are_made_when_a_step_needs_them(gpt2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reordered: list[Any] = []
    reorder = torch.ops.mkldnn._reorder_linear_weight
    counted = lambda weight, rows: reordered.append(weight) or reorder(weight, rows)  # noqa: E731
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", counted)
    monkeypatch.setattr(packed_linear, "choice", lambda: Way(2, ONEDNN))
    assert pack(gpt2)
    generate(Decoder(gpt2), [PROMPT] * 2, Sampling(3), None)  # the prompts are ten rows
    assert not reordered
    generate(Decoder(gpt2), [PROMPT] * 3, Sampling(3), None)
    assert len(reordered) == 4 * gpt2.config.n_layer + 1
    generate(Decoder(gpt2), [PROMPT] * 3, Sampling(3), None)
    assert len(reordered) == 4 * gpt2.config.n_layer + 1


def test_a_cache_grows_in_place(gpt2: Any) -> None:
    feed = Decoder(gpt2)
    feed.start(RAGGED, 20)
    feed.step(torch.tensor([1, 2, 3, 4]))
    places = [layer.keys.data_ptr() for layer in feed._cache.layers]
    feed.step(torch.tensor([1, 2, 3, 4]))
    assert [layer.keys.data_ptr() for layer in feed._cache.layers] == places
    feed.select_rows([2])
    found = feed.step(torch.tensor([5]))
    fresh = Decoder(gpt2)
    torch.testing.assert_close(found, fresh.start([[*RAGGED[2], 3, 3, 5]], 0))


@needs_onednn
def test_only_what_fits_is_packed(gpt2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not pack(gpt2.to(torch.bfloat16))
    gpt2.to(torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1}))
        assert not pack(gpt2)
    assert pack(gpt2)


def test_a_continuation_depends_on_seed_prompt_and_sample_alone(gpt2: Any) -> None:
    first = one(gpt2, PROMPT, Sampling(20))
    torch.manual_seed(99)
    several = generate(Decoder(gpt2), [PROMPT] * 3, Sampling(20), None, samples=[2, 0, 1])
    assert several[1].tokens == first == one(gpt2, PROMPT, Sampling(20))
    others = [one(gpt2, PROMPT, Sampling(20, seed=1)), one(gpt2, PROMPT[:2], Sampling(20)), *tokens(several[::2])]
    assert len({*map(tuple, [first, *others])}) == 5


def test_each_draw_has_its_own_number(gpt2: Any) -> None:
    """With logits that are all alike, a token is its random number, times the size of the vocabulary."""
    for parameter in gpt2.transformer.ln_f.parameters():
        torch.nn.init.zeros_(parameter)
    flat = {"top_k": 0, "top_p": 1.0}
    drawn = [
        generate(Decoder(gpt2), [[first]] * 3, Sampling(50, seed=seed, **flat), None, samples=range(3))
        for first in range(4)
        for seed in range(3)
    ]
    series = torch.tensor([row.tokens for batch in drawn for row in batch]).double() / 320  # [36, 50]
    assert abs(series.mean() - 0.5) < 4 * (1 / 12 / series.numel()) ** 0.5
    assert len(series.unique()) > 310
    # No series is another one, nor another one shifted.
    correlations = torch.corrcoef(torch.cat([series[:, :-1], series[:, 1:]])).fill_diagonal_(0)
    assert correlations.abs().max() < 0.75


def test_a_model_that_takes_no_positions_is_fed_rows_of_one_length(tokenizer_folder: Path) -> None:
    bloom = build("bloom", tokenizer_folder)
    assert not takes_positions(bloom) and not StaticDecoder.fits(bloom)
    prompts, sampling = [PROMPT, PROMPT[::-1]], Sampling(20, seed=7)
    assert tokens(generate(Decoder(bloom), prompts, sampling, None)) == alone(bloom, prompts, sampling)


def test_a_text_ends_at_the_end_of_text_and_at_tokens_to_stop_at(gpt2: Any) -> None:
    free = one(gpt2, PROMPT, Sampling(20, seed=1))
    for sampling, eos in ((Sampling(20, seed=1), free[4]), (Sampling(20, seed=1, stop_tokens=(free[4],)), None)):
        found = generate(Decoder(gpt2), [PROMPT], sampling, eos)[0]
        assert found.tokens == free[: free.index(free[4])] and found.finish_reason == "stop"
    assert generate(Decoder(gpt2), [PROMPT], Sampling(20, seed=1), None)[0].finish_reason == "length"


def test_a_full_context_works_and_older_tokens_slide_out(built: Any) -> None:
    prompt = [*range(CONTEXT)]
    notices: list[str] = []
    found = generate(Decoder(built), [prompt], Sampling(30, temperature=0), None, notice=notices.append)[0].tokens
    text = list(prompt)
    for _ in range(30):
        text.append(int(built(torch.tensor([text[slid_out(len(text), CONTEXT) :]])).logits[0, -1].argmax()))
    assert prompt + found == text
    assert notices == ["the model's context of 32 tokens is full: the oldest tokens slide out"]
    with pytest.raises(InputError, match="33 tokens exceed the model's context of 32"):
        one(built, [*prompt, 1], Sampling())


def test_what_slides_out() -> None:
    assert [slid_out(length, 8) for length in range(6, 14)] == [0, 0, 0, 2, 2, 4, 4, 6]
    assert [slid_out(length, 1) for length in (1, 2, 3)] == [0, 1, 2]
    assert slid_out(10**9, None) == 0
    for length in range(1, 200):
        assert 24 < length - slid_out(length, 32) <= 32 or length <= 24


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(banned_tokens=(5, 320)), r"banned_tokens \[320\]: not in the vocabulary, whose ids are 0 to 319"),
        (Sampling(stop_tokens=(-1,)), r"stop_tokens \[-1\]"),
        (Sampling(banned_tokens=tuple(range(320))), "banned_tokens: leave no token to draw"),
    ],
)
def test_tokens_that_the_model_does_not_have(gpt2: Any, sampling: Sampling, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        one(gpt2, PROMPT, sampling)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_no_text(gpt2: Any, value: float, temperature: float) -> None:
    with torch.no_grad():
        gpt2.transformer.wte.weight[7] = value
    with pytest.raises(NotFiniteError, match="logits are not finite"):
        generate(Decoder(gpt2), [PROMPT], Sampling(5, temperature=temperature), None)


def test_a_token_that_the_model_does_not_know_is_refused(gpt2: Any) -> None:
    with pytest.raises(InputError, match="has the token 320, but the model knows only those from 0 to 319"):
        generate(Decoder(gpt2), [[5, 320]], Sampling(5), None)
