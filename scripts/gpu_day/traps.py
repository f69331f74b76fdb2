"""Part "traps": what GPUs and their libraries have got wrong in silence, each fault as a small input that shows it.

Every check compares two things that must be equal to the bit, or to a rounding that is worked out, and most of them
first make sure that the input would show the fault: what is changed must change something.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gpu_day import arithmetic
from gpu_day.models import (
    ATTENTIONS,
    FAMILIES,
    changed,
    device,
    distance,
    forget_accelerator,
    quiet,
    recorder,
    tiny,
    tokens,
)
from gpu_day.rows import Finding, Rows, Skipped, at_most, every, figure, holds, part

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LENGTHS = (31, 32, 33, 38)  # of caches: around the width of a kernel's block
_NEW_TOKENS = 12
_FLEX_SECONDS = 15


def checks(rows: Rows, cpu: bool, folder: Path) -> None:
    """All traps of devices."""
    rows.check("vectors right after the start, in threads", arithmetic.vectors_from_the_start)  # must be the first
    quiet()
    rows.check("fp32 is fp32", arithmetic.fp32_is_fp32)
    rows.check("TF32 on and off", arithmetic.switches)
    for name, dtype in _DTYPES.items():
        rows.check(f"products, {name}", arithmetic.products, dtype)
    rows.check("products in threads", arithmetic.threads)
    rows.check("a product's bits", arithmetic.repeated)
    rows.check("seeds in compiled code", seeds_in_compiled_code)
    rows.check("seeds in recorded graphs", seeds_in_graphs)
    rows.check("evaluation, then training, under autocast", gradients_after_evaluation)
    rows.check("the same in one autocast block of torch's", gradients_in_one_block)
    for family in FAMILIES:
        rows.check(f"other weights under a recorded step, {family}", other_weights, family)
    for attention in ATTENTIONS:
        for name, dtype in _DTYPES.items():
            # Flex attention is compiled for each kind of number and length, which takes seconds: one kind is enough.
            if attention != "flex_attention" or name == "bf16":
                seconds = _FLEX_SECONDS if attention == "flex_attention" else 0
                rows.check(f"no look at the future, {attention}, {name}", no_future, attention, dtype, seconds=seconds)
                rows.check(f"cached = uncached, {attention}, {name}", cached, attention, dtype, seconds=seconds)


@torch.no_grad()
def no_future(attention: str, dtype: torch.dtype) -> Finding:
    """Late tokens are changed: the logits before them keep their bits, with padding and without."""
    broken, seen = [], 0
    for family in FAMILIES if attention != "flex_attention" else ("llama",):
        model = tiny(family, attention, dtype)
        for length in (33, 64):
            early = length // 2
            ids = tokens(2, length)
            other = torch.cat([ids[:, :early], changed(ids[:, early:])], dim=1)
            padding = torch.ones_like(ids)
            padding[0, :3] = 0
            for mask in (None, padding):
                first, second = (model(each, attention_mask=mask, use_cache=False).logits for each in (ids, other))
                seen += 1
                if torch.equal(first[:, early:], second[:, early:]):
                    raise AssertionError("changing late tokens changed nothing: this check would see nothing")
                rows = slice(0 if mask is None else 1, None)  # logits of padding mean nothing
                if not torch.equal(first[rows, :early], second[rows, :early]):
                    broken.append(f"{family}, {length} tokens{'' if mask is None else ', padded'}")
    return holds(not broken, f"{seen - len(broken)} of {seen}", "earlier logits bit-equal", "; ".join(broken))


@torch.no_grad()
def cached(attention: str, dtype: torch.dtype) -> Finding:
    """One more token after caches of several lengths, together and padded, against all tokens at once."""
    from train_loop.generation.kv_cache import Decoder, StaticDecoder

    # Other kernels add up in another order: in fp32 that was seen to make 1e-6, in half precision it rounds hidden
    # states otherwise here and there, each time by 2^-8 or 2^-11 of itself.
    limit = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 8e-3}[dtype]
    worst, where, kinds = 0.0, "", set()
    for family in FAMILIES if attention != "flex_attention" else ("llama",):
        model = tiny(family, attention, dtype)
        texts = [tokens(1, length + 1, length)[0].tolist() for length in _LENGTHS]
        whole = [model(torch.tensor([text], device=device()), use_cache=False).logits[:, -1] for text in texts]
        _must_differ(model, texts[0], whole[0], limit)
        feeds: dict[str, Any] = {"growing cache": Decoder(model)}
        if attention in ("sdpa", "eager") and StaticDecoder.fits(model):
            feeds["fixed cache"] = StaticDecoder(model, recorder())
        for kind, feed in feeds.items():
            kinds.add(kind)
            for group in [[number] for number in range(len(texts))] + [list(range(len(texts)))]:
                feed.start([texts[number][:-1] for number in group], 1)
                logits = feed.step(torch.tensor([texts[number][-1] for number in group], device=device()))
                for row, number in enumerate(group):
                    off = distance(logits[row], whole[number][0])
                    if not off <= worst:
                        worst, where = off, f"{family}, {kind}, {_LENGTHS[number]} tokens cached, {len(group)} rows"
    return at_most(worst, limit, why=f"{', '.join(sorted(kinds))}; most: {where}")


def _must_differ(model: Any, text: list[int], logits: torch.Tensor, limit: float) -> None:
    """Make sure that the first cached token matters more than the tolerance, or this check would see nothing."""
    other = torch.tensor([text], device=device())
    other[:, :1] = changed(other[:, :1])
    seen = distance(model(other, use_cache=False).logits[:, -1], logits)
    if not seen > limit:
        raise AssertionError(f"another first token changes the logits by {seen:.1g} only: this check would see nothing")


class _Layer(nn.Module):
    """A layer with dropout; the compiler passes over torch's own containers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(64, 64), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, 64]."""
        dropped: torch.Tensor = self.dropout(self.linear(x))
        return dropped


def seeds_in_compiled_code() -> Finding:
    """Dropout in a compiled layer: one key gives the same masks, another others, and nothing is compiled again."""
    from torch._dynamo.utils import counters

    from train_loop.rng import seed_torch

    layer = _Layer().to(device()).train()
    x = torch.randn(8, 64, device=device())

    def masks(key: int) -> torch.Tensor:
        seed_torch(device(), "dropout", 0, key, 0)
        return layer(x) == 0

    plain = [masks(key) for key in (1, 2)]
    layer.compile(dynamic=False, options={"fallback_random": True})  # as `building.compile_layers` does
    first = masks(1)
    graphs = counters["stats"]["unique_graphs"]
    found = {
        "one key the same": torch.equal(first, masks(1)),
        "another differs": not torch.equal(first, masks(2)),
        "as without compiling": torch.equal(first, plain[0]) and torch.equal(masks(2), plain[1]),
        "compiled once": counters["stats"]["unique_graphs"] == graphs > 0,
    }
    return every(found)


def seeds_in_graphs() -> Finding:
    """Dropout in a recorded graph: its masks follow the key that is set before it is replayed."""
    from train_loop.devices import graph_type
    from train_loop.rng import seed_torch

    kind, backend = graph_type(device()), torch.get_device_module(device())
    if kind is None:
        raise Skipped(f"{device().type} records no graphs")
    x = torch.ones(1 << 16, device=device())
    side = backend.Stream()
    side.wait_stream(backend.current_stream())
    with backend.stream(side):
        F.dropout(x, 0.5)
    backend.current_stream().wait_stream(side)
    graph = kind()
    with backend.graph(graph):
        dropped = F.dropout(x, 0.5)

    def replayed(key: int) -> torch.Tensor:
        seed_torch(device(), "dropout", 0, key, 0)
        graph.replay()
        return dropped.clone()

    first = replayed(1)
    graph.replay()
    found = {
        "a replay goes on": not torch.equal(first, dropped),
        "one key the same": torch.equal(first, replayed(1)),
        "another differs": not torch.equal(first, replayed(2)),
    }
    return every(found)


def gradients_after_evaluation() -> Finding:
    """The prepared objective is evaluated without gradients, then trained: each parameter has a gradient."""
    from accelerate import Accelerator

    from train_loop.training.objective import Objective

    forget_accelerator()
    accelerator = Accelerator(mixed_precision="bf16")
    objective = accelerator.prepare_model(Objective(tiny("llama")))
    ids = tokens(2, 32)
    with torch.no_grad():
        objective(ids[:, :-1], ids[:, 1:], statistics=True)
    objective.train()
    objective(ids[:, :-1], ids[:, 1:]).backward()
    missing = [name for name, each in objective.named_parameters() if each.grad is None or not each.grad.any()]
    count = sum(1 for _ in objective.parameters())
    return holds(not missing, f"{count - len(missing)} of {count}", "a gradient for each", ", ".join(missing[:3]))


def gradients_in_one_block() -> Finding:
    """What torch alone does where one block holds both (pytorch #105211, #158232); train_loop has no such block."""
    layer = nn.Linear(64, 64).to(device())
    x = torch.randn(8, 64, device=device())
    with torch.autocast(device().type, torch.bfloat16):
        with torch.no_grad():
            layer(x)
        loss = layer(x).float().sum()
    if not loss.requires_grad:
        return figure("no gradient at all")
    loss.backward()
    return figure(f"{sum(each.grad is not None for each in layer.parameters())} of 2 gradients")


def other_weights(family: str) -> Finding:
    """Sample, load other weights into the same model, sample, take a fresh model, sample: as the growing cache does."""
    from train_loop.config.sampling import Sampling
    from train_loop.generation.decoding import generate
    from train_loop.generation.kv_cache import Decoder, StaticDecoder

    model, others = tiny(family), tiny(family, seed=1)
    if not StaticDecoder.fits(model):
        raise Skipped("this Transformers has no cache of fixed size that can be recorded")
    prompts = [tokens(1, length, length)[0].tolist() for length in (5, 9)]

    def sampled(feed: Any) -> list[list[int]]:
        settings = (Sampling(_NEW_TOKENS, temperature=0), Sampling(_NEW_TOKENS))
        return [each.tokens for sampling in settings for each in generate(feed, prompts, sampling, None)]

    recorded = StaticDecoder(model, recorder())
    before = sampled(recorded)
    found = {"first weights": before == sampled(Decoder(model))}
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), others.parameters(), strict=True):
            mine.copy_(theirs)
    after = sampled(recorded)
    if before == after:
        return holds(False, "the old weights' tokens", "the new ones'", "the replay does not see new weights")
    found["other weights"] = after == sampled(Decoder(model)) == sampled(Decoder(others))
    model.load_state_dict(tiny(family, seed=2).state_dict())
    found["loaded state"] = sampled(recorded) == sampled(Decoder(model))
    found["a fresh model"] = sampled(StaticDecoder(others, recorder())) == after
    return every(found)


if __name__ == "__main__":
    part(checks)
