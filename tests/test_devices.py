"""Any kind of accelerator: one without float64, CUDA and pinned memory does all that a CPU does, with its numbers."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.support import forked
from tests.support.runs import NO_DROPOUT, TINY_MODELS, Command, arguments_for, events
from train_loop import devices
from train_loop.distributed import collectives
from train_loop.distributed.collectives import reduce_exactly
from train_loop.generation import logits_processors

CPU = torch.device("cpu")
COMPUTES_BF16: Any = devices.cpu_computes_bf16
RUNS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model__architecture": json.dumps(TINY_MODELS["gpt2"] | NO_DROPOUT),  # tied weights
        "data__isolate_documents": "true",
        "train__max_steps": 12,
    },
    "llama": {"model__architecture": json.dumps(TINY_MODELS["llama"]), "batch__micro_batch_size": 3},
}
EVERYTHING = {"study__every": 4, "evaluation__every": 8, "checkpoint__every": 5, "sample__prompts": '["the "]'}


def has_devices_in_python() -> bool:
    """Whether this torch lets a device be written in Python, as toy_device.py is (torch 2.10 or later)."""
    spec = importlib.util.find_spec("torch.utils.backend_registration")
    return spec is not None and "_setup_privateuseone_for_python_backend" in Path(str(spec.origin)).read_text()


SAMPLING = (
    ("--temperature", "0.8"),
    ("--typical_p", "0.9", "--min_p", "0.01"),
    ("--top_k", "0", "--repetition_penalty", "1.2"),
)
REFUSED = {
    "run__mixed_precision": ("bf16", "this device (TOY) does not support it; it supports no | fp16"),
    "run__reproducible": ("bitwise", "needs 64-bit numbers, which this device (TOY) does not have"),
}


class Outcome(NamedTuple):
    """What a command came to."""

    code: int
    out: str
    err: str


class Both(NamedTuple):
    """The folders of a run on "toy" and on the CPU, and what commands on "toy" came to, by name."""

    toy: Path
    cpu: Path
    outcomes: dict[str, Outcome]


def sample(folder: Path, *options: str) -> list[str]:
    return ["sample", "--model", str(folder), "--prompt", "the ", "--max_new_tokens", "20", *options]


def on_toy(commands: dict[tuple[str, str], list[str]]) -> dict[tuple[str, str], Outcome]:
    """What commands of train_loop come to, in a process of their own, on the device that has no float64."""
    # Not ACCELERATE_USE_CPU, which the tests set elsewhere.
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.toy_device"],
        cwd=Path(__file__).parents[1],
        env=environment,
        input=json.dumps(list(commands.values())),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return {name: Outcome(*each) for name, each in zip(commands, json.loads(done.stdout), strict=True)}


@pytest.fixture(scope="module")
def all_of_both(corpus: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Both]:
    """`RUNS` on both; those on "toy" one after the other in one process."""
    if not has_devices_in_python():
        pytest.skip("this torch has no devices written in Python")
    root = tmp_path_factory.mktemp("both")
    commands: dict[tuple[str, str], list[str]] = {}
    for name, changes in RUNS.items():
        settings = functools.partial(arguments_for, corpus, tokenizer_folder, **EVERYTHING, **changes)
        folder, toy = root / name, root / name / "toy"
        commands |= {
            (name, "train"): ["train", *settings(toy)],
            (name, "evaluate"): ["evaluate", "--model", str(toy), *settings(toy)],
            (name, "inspect"): ["inspect", "--run", str(toy), "--step", "8", "--json"],
            **{(name, " ".join(options)): sample(toy, *options) for options in SAMPLING},
            **{
                (name, key): ["train", *settings(folder / "refused", **{key: value})]
                for key, (value, _) in REFUSED.items()
            },
        }
        on_cpu = forked.run(["train", *settings(folder / "cpu")], root, 300)
        assert on_cpu.code == 0, on_cpu
    outcomes = on_toy(commands)
    return {
        name: Both(
            root / name / "toy",
            root / name / "cpu",
            {what: end for (run, what), end in outcomes.items() if run == name},
        )
        for name in RUNS
    }


@pytest.fixture(params=RUNS)
def both(request: pytest.FixtureRequest, all_of_both: dict[str, Both]) -> Both:
    found = all_of_both[request.param]
    assert found.outcomes["train"].code == 0, found.outcomes["train"].err
    assert "1 x TOY" in found.outcomes["train"].err
    return found


def test_training_evaluation_and_samples_are_the_cpus(both: Both) -> None:
    for kind, number, tolerance in (("step", "loss", 1e-5), ("step", "grad_norm", 3e-5), ("evaluation", "loss", 1e-6)):
        found, expected = ([event[number] for event in events(folder, kind)] for folder in (both.toy, both.cpu))
        if number == "grad_norm":  # training magnifies rounding, and norms show it first
            found, expected = found[:24], expected[:24]
        assert len(found) > 1 and found == pytest.approx(expected, rel=tolerance)
    found, expected = ([event["continuation"] for event in events(folder, "sample")] for folder in (both.toy, both.cpu))
    assert len(found) > 1 and found[0] == expected[0]


def test_what_is_studied_is_the_cpus(both: Both) -> None:
    def numbers(folder: Path) -> list[float]:
        def of(value: Any) -> list[float]:
            if isinstance(value, dict):
                return [number for name, each in value.items() if name != "gradient_noise" for number in of(each)]
            if isinstance(value, list):
                return [number for each in value for number in of(each)]
            return [value] if isinstance(value, float) and not isinstance(value, bool) else []

        first = json.loads((folder / "study.jsonl").read_text().splitlines()[0])
        return of({name: value for name, value in first.items() if name != "gradient_noise_scale"})

    assert len(numbers(both.toy)) > 100
    assert numbers(both.toy) == pytest.approx(numbers(both.cpu), rel=1e-3, abs=1e-6)


def test_a_step_is_replayed(both: Both) -> None:
    code, out, err = both.outcomes["inspect"]
    assert code == 0, err
    found = json.loads(out)
    assert found["loss"] == events(both.toy, "step")[7]["loss"] and found["statistics"]["layers"]["0"]["grad_norm"] > 0


def test_evaluate_and_sample(both: Both, command: Command) -> None:
    code, out, err = both.outcomes["evaluate"]
    assert code == 0, err
    assert json.loads(out)["loss"] == pytest.approx(events(both.toy, "evaluation")[-1]["loss"], rel=1e-6)
    for options in SAMPLING:
        code, out, err = both.outcomes[" ".join(options)]
        assert code == 0, err
        assert command(*sample(both.toy, *options)) == 0
        assert out == command.out and len(out) > 10


def test_what_the_device_lacks_is_refused_in_one_line(both: Both) -> None:
    for key, (_, message) in REFUSED.items():
        code, _, err = both.outcomes[key]
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1
    assert not (both.toy.parent / "refused").exists()


def test_a_cpu_says_what_it_has(command: Command, settings: Callable[..., list[str]]) -> None:
    assert devices.precisions(CPU) == ("no", "bf16")
    assert devices.has_float64(CPU) and devices.has_fused_adamw(CPU)
    assert not devices.pins_memory(CPU) and not devices.has_events(CPU) and devices.graph_type(CPU) is None
    assert devices.name(CPU) == "CPU" and devices.peak_memory(CPU)() > 2**20
    assert command("train", *settings(run__mixed_precision="fp16")) == 2
    assert "run.mixed_precision fp16: this device (CPU) does not support it; it supports no | bf16" in command.err


@pytest.mark.parametrize(
    ("told", "capability", "expected"),
    [
        ({"flags": "avx2 avx512f avx512_bf16"}, "AVX512", True),
        ({"flags": "avx2 avx512f amx_bf16 amx_tile"}, "AVX512", True),
        ({"flags": "avx2 avx512f amx_bf16 amx_tile"}, "AVX2", False),  # was told to do without
        ({"flags": "avx2 avx512f"}, "AVX512", False),
        ({"flags": "avx2 fma"}, "AVX2", False),
        ({"Features": "fp asimd sve bf16"}, "DEFAULT", True),
        ({"Features": "fp asimd"}, "DEFAULT", False),
        ({}, "DEFAULT", True),  # does not say
    ],
)
def test_a_cpus_bf16_is_read_off_its_flags(
    monkeypatch: pytest.MonkeyPatch, told: dict[str, str], capability: str, expected: bool
) -> None:
    monkeypatch.setattr(devices, "_told_of_cpu", lambda: told)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert COMPUTES_BF16.__wrapped__() == expected


def test_what_is_exact_goes_where_float64_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device without float64 to the CPU; draws come back as token numbers of the logits' device."""
    assert devices.exact(torch.ones(2)).dtype == torch.float64
    logits, uniform = torch.randn(3, 10), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    expected = logits_processors.draw(logits, uniform)
    monkeypatch.setattr(devices, "has_float64", lambda device: False)
    assert torch.equal(logits_processors.draw(logits, uniform), expected)


def test_sums_over_processes_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies on another device than the processes' own is sent as Python's numbers."""

    class TwoProcesses:
        num_processes = 2
        device = torch.device("meta")

    mine = torch.tensor([[1 / 3, -2.0]], dtype=torch.float64)
    monkeypatch.setattr(collectives, "gather_object", lambda values: [*values, [[2e-17, 5.0]]])
    total: Any = functools.partial(reduce_exactly, TwoProcesses(), mine)
    assert total("sum").tolist() == [[1 / 3 + 2e-17, 3.0]] and total("max").tolist() == [[1 / 3, 5.0]]


@pytest.fixture
def flash_attention(monkeypatch: pytest.MonkeyPatch) -> str:
    """What stands in for FlashAttention: it has half precision only, too, but is there, and works on a CPU."""

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):  # Transformers casts what rotations have made fp32
            query, key, value = (each.to(torch.get_autocast_dtype("cpu")) for each in (query, key, value))
        if {query.dtype, key.dtype, value.dtype} != {torch.bfloat16}:
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    def adjust(model: PreTrainedModel, attention: str | None, *others: Any, **options: Any) -> str:
        return attention or "sdpa"

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", attend)
    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", adjust)
    return "flash_attention_2"


@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_attention_in_half_precision_trains_samples_and_is_verified(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, flash_attention: str, name: str
) -> None:
    architecture = TINY_MODELS[name] | (NO_DROPOUT if name == "gpt2" else {})
    shape = {"model__architecture": json.dumps(architecture), "run__mixed_precision": "bf16"}
    few = {"train__max_steps": 4, "study__every": 2, "sample__prompts": '["the "]', "export__verify": "true"}
    assert command("train", *settings(**shape, **few, model__attention=flash_attention)) == 0, command.err
    assert "verified in a clean process" in command.err
    found = [event["loss"] for event in events(tmp_path / "run", "step")]
    plain = few | {"run__output_dir": tmp_path / "sdpa", "export__verify": "false"}
    assert command("train", *settings(**shape, **plain)) == 0
    assert found == pytest.approx([event["loss"] for event in events(tmp_path / "sdpa", "step")], rel=1e-3)
    assert len(events(tmp_path / "run", "sample")) == 1
    model = ("--model", tmp_path / "run", *settings(**shape, model__attention=flash_attention))
    assert command("evaluate", *model) == 0, command.err


@pytest.mark.parametrize(
    ("attention", "precision", "expected"),
    [
        ("flash_attention_2", "no", "model.attention flash_attention_2: needs half precision; say --run.mixed_"),
        (
            "flash_attention_2",
            "bf16",
            "model.attention flash_attention_2: fails with this model, device or installation (",
        ),
        ("flex_attention", "no", "model.attention flex_attention: fails with this model, device or installation ("),
        ("sdpaa", "no", "model.attention sdpaa: fails with this model, device or installation ("),
    ],
)
@pytest.mark.parametrize("pretrained", [False, True])
def test_attention_that_is_not_to_be_had_is_refused(
    command: Command,
    settings: Callable[..., list[str]],
    model_folder: Path,
    attention: str,
    precision: str,
    expected: str,
    pretrained: bool,
) -> None:
    source = {"model__architecture": None, "tokenizer__name_or_path": None, "model__name_or_path": model_folder}
    changes = source if pretrained else {}
    assert command("train", *settings(model__attention=attention, run__mixed_precision=precision, **changes)) == 2
    assert expected in command.err and "sdpa" in command.err
    assert len([line for line in command.err.splitlines() if line.startswith("train-loop: ")]) == 1
