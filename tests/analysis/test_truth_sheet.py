"""The truth sheet: what it says is so, measuring changes nothing, and a contradiction stops the run."""

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.runs import TINY_MODELS, Command, events, last_of_each
from train_loop import devices, job
from train_loop.analysis import truth_sheet
from train_loop.config.load import config_from_arguments
from train_loop.errors import InputError
from train_loop.models import building
from train_loop.training import objective, optimizer

SHAPES = TINY_MODELS | {"llama-tied": TINY_MODELS["llama"] | {"tie_word_embeddings": True}}
Settings = Callable[..., list[str]]


@pytest.mark.parametrize("name", SHAPES)
def test_a_sheet_says_what_is(command: Command, settings: Settings, tmp_path: Path, name: str) -> None:
    shape = json.dumps(SHAPES[name])
    arguments = settings(
        model__architecture=shape,
        batch__micro_batch_size=3,
        schedule__warmup_steps=5,
        optimizer__weight_decay=0.1,
        train__max_steps=30,
    )
    assert command("train", *arguments) == 0
    sheet = json.loads((tmp_path / "run" / "truth.json").read_text())
    assert sheet["processes"]["asked"] == sheet["processes"]["present"] == len(sheet["processes"]["each"]) == 1
    assert sheet["processes"]["each"][0]["device"] == "cpu"
    precision = sheet["precision"]
    elsewhere = last_of_each([*arguments, "--run.output_dir", tmp_path / "other"])
    built = job.set_up(config_from_arguments(elsewhere)).run.state.model
    tensors = len(list(built.parameters()))
    assert precision["compute"] == "float32" and precision["moments"] == {"float32": 2 * tensors}
    assert precision["parameters"] == precision["gradients"] == {"float32": tensors}
    parameters = sheet["parameters"]
    assert parameters["total"] == sum(parameter.numel() for parameter in built.parameters())
    names = [each for group in parameters["groups"] for each in group["names"]]
    assert sorted(names) == sorted(each for each, _ in built.named_parameters())
    decays = {each: group["weight_decay"] for group in parameters["groups"] for each in group["names"]}
    for each, parameter in built.named_parameters():
        assert decays[each] == (0.1 if parameter.ndim == 2 else 0.0), each
    first = {"gpt2": "transformer.wte.weight", "llama-tied": "model.embed_tokens.weight"}
    assert parameters["tied"] == ([[first[name], "lm_head.weight"]] if name in first else [])
    assert sheet["loss"]["path"] == "fused" and sheet["loss"]["difference"] < 1e-6
    steps, batch = events(tmp_path / "run", "step"), sheet["batch"]
    assert batch["steps"] == len(steps) and batch["micro_batches_per_step"] == 3
    assert batch["targets"] == sum(event["tokens"] for event in steps)
    assert batch["targets_per_full_step"] == steps[0]["tokens"]
    rates, logged = sheet["learning_rate"], [event["learning_rate"] for event in steps]
    assert (rates["first_step"], rates["after_warmup"], rates["last_step"]) == (logged[0], logged[5], logged[-1])
    for line in (
        "1 of 1 asked for",
        "weights float32",
        "tied: " if name in first else "parameters",
        "3 micro-batches of 3",
        "validation documents are also training documents; 0 of ",
    ):
        assert line in command.err


def test_measuring_changes_nothing(settings: Settings, tmp_path: Path) -> None:
    run = job.set_up(config_from_arguments(settings())).run

    def state() -> list[Any]:
        weights = [
            hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for tensor in run.state.model.state_dict().values()
        ]
        rates = [group["lr"] for group in run.state.optimizer.param_groups]
        gradients = [parameter.grad for parameter in run.state.model.parameters()]
        return [weights, rates, gradients, dict(run.state.optimizer.state), run.context.objective.training]

    before = state()
    truth_sheet.measure(run)
    assert state() == before


def test_precision_is_what_was_found(command: Command, settings: Settings, tmp_path: Path) -> None:
    assert command("train", *settings(run__mixed_precision="bf16", train__epochs=1)) == 0
    precision = json.loads((tmp_path / "run" / "truth.json").read_text())["precision"]
    assert precision["compute"] == "bfloat16"
    assert set(precision["parameters"]) == set(precision["gradients"]) == set(precision["moments"]) == {"float32"}


def test_without_instructions_for_bf16_a_cpu_computes_in_fp32_and_says_so(
    command: Command, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "cpu_computes_bf16", lambda: False)
    assert command("train", *settings(run__mixed_precision="bf16", train__epochs=1)) == 0
    assert command.err.count("this CPU has no instructions for it, so all is computed in fp32") == 1
    precision = json.loads((tmp_path / "run" / "truth.json").read_text())["precision"]
    assert (precision["asked"], precision["granted"], precision["compute"]) == ("bf16", "no", "float32")
    plain = settings(train__epochs=1, run__output_dir=tmp_path / "plain")
    assert command("train", *plain) == 0
    found, expected = (events(tmp_path / name, "step") for name in ("run", "plain"))
    assert [each["loss"] for each in found] == [each["loss"] for each in expected]


def change(*path: str | int, to: object) -> Callable[[dict[str, Any]], None]:
    def apply(sheet: Any) -> None:
        for step in path[:-1]:
            sheet = sheet[step]
        sheet[path[-1]] = to

    return apply


@pytest.mark.parametrize(
    ("contradiction", "expected"),
    [
        (change("processes", "asked", to=4), "asked for 4 processes, but only 1 present"),
        (change("precision", "parameters", to={"bfloat16": 3}), "parameters are bfloat16 but should be float32"),
        (change("precision", "gradients", to={"float16": 3}), "gradients are float16"),
        (change("precision", "moments", to={"float32": 3, "bfloat16": 1}), "moments are float32, bfloat16"),
        (change("precision", "granted", to="bf16"), "should compute in bfloat16, but the model computes in float32"),
        (change("parameters", "in_no_group", to=["lm_head.weight"]), "lm_head.weight"),
        (change("parameters", "in_several_groups", to=["wte.weight"]), "holds ['wte.weight'] more than once"),
        (change("loss", "difference", to=1e-3), "the model's own"),
        (change("loss", "difference", to=float("nan")), "the model's own"),
        (change("documents", to={"isolated": True, "cross": True}), "lets one document influence another"),
    ],
)
def test_a_contradiction_stops(settings: Settings, contradiction: Callable[[Any], None], expected: str) -> None:
    sheet = truth_sheet.measure(job.set_up(config_from_arguments(settings())).run)
    truth_sheet.check(sheet)
    changed = copy.deepcopy(sheet)
    contradiction(changed)
    with pytest.raises(InputError) as error:
        truth_sheet.check(changed)
    assert expected in str(error.value) and "\n" not in str(error.value)


def refused(command: Command, arguments: list[str], tmp_path: Path, expected: str) -> None:
    assert command("train", *arguments) == 2
    assert expected in command.err and not (tmp_path / "run").exists()


def test_weights_in_half_precision_stop_the_run(
    command: Command, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = building.build
    monkeypatch.setattr(building, "build", lambda *arguments: build(*arguments).bfloat16())
    refused(command, settings(), tmp_path, "parameters are bfloat16 but should be float32")


def test_a_loss_that_is_not_the_models_own_stops_the_run(
    command: Command, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled = TINY_MODELS["llama"] | {"model_type": "granite", "logits_scaling": 4.0}
    monkeypatch.setattr(objective, "head_is_plain", lambda objective: True)
    refused(command, settings(model__architecture=json.dumps(scaled)), tmp_path, "the model's own")


@pytest.mark.parametrize("mistake", ["left out", "twice"])
def test_a_parameter_that_is_not_in_one_group_stops_the_run(
    command: Command, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    groups = optimizer.decay_groups

    def wrong(module: torch.nn.Module, decay_embeddings: bool) -> Any:
        found = groups(module, decay_embeddings)
        name, parameter = next(iter(found["no_decay"].items()))
        if mistake == "left out":
            del found["no_decay"][name]
        else:
            found["no_decay"] |= {"again": parameter}
        return found

    monkeypatch.setattr(optimizer, "decay_groups", wrong)
    refused(command, settings(), tmp_path, "the optimizer does not hold")
