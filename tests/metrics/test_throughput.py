"""Where a step's time goes, and how fast the hardware is."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.runs import TINY_MODELS, Command, events
from train_loop import devices
from train_loop.metrics import throughput
from train_loop.metrics.throughput import MEASURED, STEP_PARTS, Span


def test_each_part_gets_its_own_time() -> None:
    spans = {part: Span(part, torch.device("cpu")) for part in (*STEP_PARTS, "step")}
    with spans["step"]:
        for part, seconds in (("data", 0.01), ("forward", 0.03), ("backward", 0.0), ("forward", 0.03)):
            with spans[part]:
                time.sleep(seconds)
    parts = {part: span.take_host() / 1e9 for part, span in spans.items()}
    assert 0.01 <= parts["data"] < 0.03 and 0.06 <= parts["forward"] < 0.08 and parts["backward"] < 0.01
    assert sum(parts[part] for part in STEP_PARTS) <= parts["step"] < 0.1
    assert sum(span.take_host() for span in spans.values()) == 0


def test_on_a_gpu_what_has_not_ended_is_told_later(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        clock = 0.0

        def __init__(self) -> None:
            Event.clock += 10
            self.at, self.ended = Event.clock, True

        def query(self) -> bool:
            return self.ended

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    monkeypatch.setattr(devices, "has_events", lambda device: True)
    monkeypatch.setattr(devices, "event", lambda device: Event())
    span = Span("optimizer", torch.device("cuda"))
    with span:
        pass
    with span:
        pass
    end = span._events[-1][1]
    end.ended = False
    assert span.take_device(0) == 10_000_000  # the first of the two, in nanoseconds
    with span:
        pass
    assert span.take_device(0) == 0  # in their order
    end.ended = True
    assert span.take_device(0) == 20_000_000
    assert Span("step", torch.device("cuda")).take_device(7) == 7  # which only the host measures


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_operations_are_those_that_torch_counts(kind: str, tied: bool) -> None:
    """torch's own counter sees every product of a forward and a backward pass; attention as if it were not causal."""
    from torch.utils.flop_counter import FlopCounterMode

    sizes = TINY_MODELS[kind] | {"vocab_size": 300, "tie_word_embeddings": tied}
    settings = AutoConfig.for_model(**sizes, attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(settings)
    tokens = torch.zeros(2, 32, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens, use_cache=False).logits.sum().backward()
    found = throughput.operations_per_token(model, 32)
    assert found is not None and found == pytest.approx(counter.get_total_flops() / tokens.numel(), rel=0.02)


def test_experts_are_not_counted() -> None:
    settings = AutoConfig.for_model("mixtral", hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=99)
    settings.update({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8})
    assert throughput.operations_per_token(AutoModelForCausalLM.from_config(settings), 32) is None


def test_the_rate_is_that_of_a_matrix_product() -> None:
    found = throughput.matrix_rate(torch.device("cpu"), torch.float32)
    x = torch.randn(512, 512)
    began = time.perf_counter()
    for _ in range(5):
        x @ x
    assert 0.1 < found / (5 * 2 * 512**3 / (time.perf_counter() - began)) < 50


def test_parts_add_up_to_the_step(command: Command, settings: Callable[..., list[str]], tmp_path: Path) -> None:
    assert command("train", *settings()) == 0
    steps = events(tmp_path / "run", "step")
    assert steps and all(MEASURED <= step.keys() for step in steps)
    for step in steps:
        assert 0.3 * step["seconds"] < sum(step[f"{part}_seconds"] for part in STEP_PARTS) <= step["seconds"] * 1.001
        assert step["communication_seconds"] == step["waiting_seconds"] == 0
        assert min(step["forward_seconds"], step["backward_seconds"], step["optimizer_seconds"]) > 0
        assert step["mfu"] > 0 and step["peak_memory_bytes"] > 10**8
    operations = json.loads((tmp_path / "run" / "truth.json").read_text())["operations_per_token"]
    rates = {round(operations * step["tokens_per_second"] / step["mfu"]) for step in steps}
    assert max(rates) == pytest.approx(min(rates))  # one hardware, measured once
