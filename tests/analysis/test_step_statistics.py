"""What is watched inside a run: against plain recomputation in float64, and without a trace in the run itself."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.runs import MIXTRAL, NO_DROPOUT, TINY_MODELS, Command, events
from train_loop import job
from train_loop.analysis import step_statistics
from train_loop.analysis.step_statistics import StepStatistics
from train_loop.checkpoint import storage
from train_loop.config.load import config_from_arguments
from train_loop.data import preparation
from train_loop.data.loader import IGNORED, loader
from train_loop.data.order import cut
from train_loop.data.tokenizer import strings
from train_loop.data.tokenizer import train as train_tokenizer
from train_loop.metrics.throughput import MEASURED
from train_loop.models.parameters import tensors_once
from train_loop.training.schedule import learning_rate
from train_loop.training.state import Run
from train_loop.training.step import train_step

Settings = Callable[..., list[str]]


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind in a run's study.jsonl."""
    found = map(json.loads, (folder / "study.jsonl").read_text(encoding="utf-8").splitlines())
    return [event for event in found if event["event"] == kind]


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """The steps of a run, without what depends on the machine's mood."""
    return [{name: value for name, value in each.items() if name not in MEASURED} for each in events(folder, "step")]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    found, _ = storage.newest(folder / "checkpoints")
    assert found is not None
    return storage.tensors(found) | storage.tensors(found, "optimizer")


def watched(arguments: list[str], steps: int) -> tuple[Run, list[nn.Module], list[dict[str, Any]]]:
    """A run's first steps, each watched; a float64 copy of the model before each, and after the last."""
    run = job.set_up(config_from_arguments([*arguments, "--study.every", "1"])).run
    run.context.objective.train()
    settings, copies, found = run.config, [], []
    seen: list[dict[str, Any]] = []
    watch = StepStatistics(run, 1, lambda event, step, values: seen.append(values))
    for step in range(steps):
        copies.append(copy_of(run))
        batch = run.batches[step]
        watch.before_step(run.state, batch)
        rate = learning_rate(step, run.batches.total_steps, settings.optimizer.learning_rate, settings.schedule)
        result = train_step(run.context, run.state, batch, rate)
        watch.after_step(run.state, {"grad_norm": result.grad_norm})
        assert result.applied
        values = seen.pop()
        found.append(values | {"loss": result.loss, "norm": result.grad_norm})
    copies.append(copy_of(run))
    return run, copies, found


def copy_of(run: Run) -> nn.Module:
    model_config = type(run.state.model.config).from_dict(run.state.model.config.to_dict())
    model_config._attn_implementation = "eager"
    model_config._experts_implementation = "eager"  # the others have no float64
    copy = type(run.state.model)(model_config).double()
    copy.load_state_dict(run.state.model.state_dict())
    return copy.eval()


def close(found: Any, expected: Any, tolerance: float = 2e-5) -> None:
    assert found == (None if expected is None else pytest.approx(expected, rel=tolerance, abs=1e-9))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt2", {"run__reproducible": "bitwise"}),
        ("llama", {}),
        ("llama", {"model__attention": "eager", "data__isolate_documents": "true"}),
    ],
)
def test_statistics_are_those_of_a_plain_recomputation(settings: Settings, name: str, changes: dict[str, Any]) -> None:
    architecture = TINY_MODELS[name] | (NO_DROPOUT if name == "gpt2" else {})
    batch = {"batch__sequences_per_step": 5, "batch__micro_batch_size": 2, "optimizer__max_grad_norm": 0.5}
    arguments = settings(model__architecture=json.dumps(architecture), **batch, **changes)
    run, copies, found = watched(arguments, 3)
    betas, eps, decay = run.config.optimizer.betas, run.config.optimizer.eps, run.config.optimizer.weight_decay
    decayed = {id(each) for each in run.state.optimizer.param_groups[0]["params"]}
    tensors = tensors_once(run.state.model)
    decays = {key: decay if id(tensors[key]) in decayed else 0.0 for key in found[0]["parameters"]}
    first = {key: torch.zeros_like(copies[0].get_parameter(key)) for key in decays}
    second = {key: torch.zeros_like(copies[0].get_parameter(key)) for key in decays}
    assert decays.keys() == dict(copies[0].named_parameters()).keys()
    assert any(each["norm"] > 0.5 for each in found)  # some are clipped
    tokens = 0
    for step, (copy, values) in enumerate(zip(copies[:-1], found, strict=True)):
        seen = plain_forward(copy, run, step)
        parameters = dict(copy.named_parameters())
        seen["nll"].mean().backward()
        gradients = {key: parameter.grad for key, parameter in parameters.items() if parameter.grad is not None}
        norm = math.sqrt(sum(float(each.square().sum()) for each in gradients.values()))
        close(values["norm"], norm)
        rate = learning_rate(step, run.batches.total_steps, run.config.optimizer.learning_rate, run.config.schedule)
        updates = {}
        for key, gradient in gradients.items():
            clipped = gradient * min(1.0, 0.5 / (norm + 1e-6))
            first[key] = betas[0] * first[key] + (1 - betas[0]) * clipped
            second[key] = betas[1] * second[key] + (1 - betas[1]) * clipped**2
            root = (second[key] / (1 - betas[1] ** (step + 1))).sqrt() + eps
            with torch.no_grad():
                updates[key] = rate * (first[key] / (1 - betas[0] ** (step + 1)) / root + decays[key] * parameters[key])
        for key, parameter in parameters.items():
            one = values["parameters"][key]
            close(one["weight_norm"], float(parameter.detach().norm()))
            close(one["grad_norm"], float(gradients[key].norm()))
            # Adam's first updates divide a gradient by itself: where it is all but zero, its sign is rounding's.
            close(one["update_ratio"], float(updates[key].norm() / parameter.detach().norm()), 1e-2)
            close(one["second_moment"], float(second[key].mean().sqrt()))
            after = copies[step + 1].get_parameter(key)
            close(one["update_ratio"], float((after - parameter).detach().norm() / parameter.detach().norm()), 1e-6)
        prefix = "transformer.h" if name == "gpt2" else "model.layers"
        assert values["layers"].keys() == {"0", "1"}
        for layer, one in values["layers"].items():
            mine = [key for key in parameters if key.startswith(f"{prefix}.{layer}.")]
            assert len(mine) > 5
            close(one["weight_norm"], math.sqrt(sum(float(parameters[key].detach().square().sum()) for key in mine)))
            close(one["grad_norm"], math.sqrt(sum(float(gradients[key].square().sum()) for key in mine)))
            changes_of = [copies[step + 1].get_parameter(key) - parameters[key] for key in mine]
            moved = math.sqrt(sum(float(each.detach().square().sum()) for each in changes_of))
            close(one["update_ratio"] * one["weight_norm"], moved)
            moments = torch.cat([second[key].flatten() for key in mine])
            close(one["second_moment"], float(moments.mean().sqrt()))
            x = seen["outputs"][int(layer)]
            close(one["activation_rms"], float(x.square().mean().sqrt()))
            close(one["activation_outliers"], float(x.abs().max() / x.square().mean().sqrt()))
            close(one["attention_entropy"], seen["entropies"][int(layer)])
            close(one["dead_units"], float((seen["units"][int(layer)] <= 0).all(0).double().mean()))
        nll, probability = seen["nll"].detach(), seen["logits"].softmax(-1)
        close(values["loss"], float(nll.mean()))
        close(values["logits"]["entropy"], float(-(probability * probability.log()).sum(-1).mean()))
        close(values["logits"]["top_1_probability"], float(probability.amax(-1).mean()))
        close(values["logits"]["z"], float(seen["logits"].exp().sum(-1).log().mean()))
        for position in range(32):  # a block has 32, each a bin
            there = seen["place"] == position
            close(values["loss_by_position"][position], float(nll[there].mean()) if there.any() else None)
        assert values["position_bins"] == list(range(32))
        counts = np.bincount(run.data.train.tokens[:], minlength=320)[seen["targets"]]
        assert values["frequency_bins"][:3] == ["0", "1-9", "10-99"]
        edges = [0, 1, 10, 100, 1000, 10000]
        for number, label in enumerate(values["frequency_bins"]):
            there = torch.from_numpy((counts >= edges[number]) & (counts < edges[number + 1]))
            assert label.startswith(f"{edges[number]:,}")
            close(values["loss_by_frequency"][number], float(nll[there].mean()) if there.any() else None)
        tokens += len(nll)
        assert values["tokens"] == tokens
        noise_is_plain(copy, run, step, values, norm)
    clipped = [each["norm"] > 0.5 for each in found]
    assert [each["clipped_share"] for each in found] == clipped  # every step is watched


def plain_forward(copy: nn.Module, run: Run, step: int) -> dict[str, Any]:
    """Of the targets of a step's windows, one after the other: logits, nll, layers' outputs, ..., in float64."""
    layers = copy.transformer.h if hasattr(copy, "transformer") else copy.model.layers  # type: ignore[union-attr]
    found: dict[str, Any] = {"outputs": [[], []], "units": [[], []]}
    handles = []
    for number, layer in enumerate(layers):  # type: ignore[arg-type]
        activation = layer.mlp.act if hasattr(layer.mlp, "act") else layer.mlp.act_fn
        for module, kept in ((layer, found["outputs"]), (activation, found["units"])):
            handles.append(
                module.register_forward_hook(
                    lambda module, inputs, output, kept=kept[number]: kept.append(
                        output[0] if isinstance(output, tuple) else output
                    )
                )
            )
    whole = type(run.batches.plan)(
        run.batches.plan.blocks_per_epoch, run.batches.plan.sequences_per_step, 8, run.batches.plan.seed
    )
    (batch,) = loader(run.batches.windows, cut(whole.blocks(step), 8))
    real = batch.targets != IGNORED
    assert run.config.data.isolate_documents or bool(real.all())
    arguments = {} if batch.positions is None else {"position_ids": batch.positions}
    output = copy(input_ids=batch.inputs, use_cache=False, output_attentions=True, **arguments)
    for handle in handles:
        handle.remove()
    found["outputs"], found["units"] = ([each[0].detach()[real] for each in found[key]] for key in ("outputs", "units"))
    found["entropies"] = [
        torch.special.entr(each.detach()).sum(-1).transpose(0, 1)[:, real].mean(1).tolist()
        for each in output.attentions
    ]
    found["logits"], found["targets"] = output.logits[real], batch.targets[real]
    found["nll"] = nn.functional.cross_entropy(found["logits"], found["targets"], reduction="none")
    found["logits"] = found["logits"].detach()
    found["place"] = torch.arange(real.shape[1]).expand_as(real)[real]
    return found


def noise_is_plain(copy: nn.Module, run: Run, step: int, values: dict[str, Any], norm: float) -> None:
    """The equations of McCandlish et al. hold for the gradients of the micro-batches' own mean losses."""
    squares, sizes = [], []
    for batch in run.batches[step].micro_batches:
        copy.zero_grad()
        arguments = {} if batch.positions is None else {"position_ids": batch.positions}
        logits = copy(input_ids=batch.inputs, use_cache=False, **arguments).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED).backward()
        squares.append(sum(float(each.grad.square().sum()) for each in copy.parameters() if each.grad is not None))
        sizes.append(int((batch.targets != IGNORED).sum()))
    assert len(sizes) == 3 and min(sizes) < max(sizes)
    signal, noise = values["gradient_noise"]["signal"], values["gradient_noise"]["noise"]
    close(signal + noise / sum(sizes), norm**2)
    close(signal + noise * np.mean([1 / size for size in sizes]), np.mean(squares))
    assert values["gradient_noise_scale"] == (noise / signal if signal > 0 else None)


def test_the_noise_scale_is_found_where_it_is_known() -> None:
    """Gradients made up of a true one and noise of a known variance."""
    draw = np.random.default_rng(0)
    true, deviation, sizes = draw.normal(size=50), 3.0, [8, 8, 4]
    found = []
    for _ in range(4000):
        parts = [true + deviation / math.sqrt(size) * draw.normal(size=50) for size in sizes]
        whole = sum(size * part for size, part in zip(sizes, parts, strict=True)) / sum(sizes)
        small = float(np.mean([part @ part for part in parts]))
        found.append(
            step_statistics.noise_of(float(whole @ whole), 20, small, float(np.mean([1 / each for each in sizes])))
        )
    signal, noise = np.mean(found, axis=0)
    assert signal == pytest.approx(true @ true, rel=0.05) and noise == pytest.approx(50 * deviation**2, rel=0.05)


def test_squares_are_added_up_exactly() -> None:
    for shape in ((), (3,), (4096,), (300, 500), (1 << 22,)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 100
        assert float(step_statistics.square_sum(x)) == pytest.approx(float(x.double().square().sum()), rel=1e-6)
    x = torch.randn(70, 80).t()
    assert float(step_statistics.square_sum(x)) == pytest.approx(float(x.double().square().sum()), rel=1e-6)


def test_frequencies(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    counts = np.array([0, 1, 9, 10, 99, 100, 999, 1000, 10**6])
    assert step_statistics.frequency_bins(counts).tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 7]
    train = preparation.prepare(config_from_arguments(settings()), shown=False).train
    exact = np.bincount(train.tokens[:], minlength=320)
    assert (step_statistics.token_counts(train, 320) == exact).all()
    monkeypatch.setattr(step_statistics, "_SAMPLED_TOKENS", len(train) // 2)
    estimated = step_statistics.token_counts(train, 320)
    assert estimated.sum() == pytest.approx(len(train)) and 0 < np.abs(estimated - exact).max()
    common = exact > 200
    assert (np.abs(estimated[common] / exact[common] - 1) < 0.3).all()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "model__architecture": json.dumps(
                TINY_MODELS["llama"] | {"attention_dropout": 0.1, "tie_word_embeddings": True}
            )
        },
        {"model__activation_checkpointing": "true", "run__mixed_precision": "bf16"},
        {"run__reproducible": "bitwise"},
    ],
    ids=["gpt2", "llama-tied", "checkpointing-bf16", "bitwise"],
)
def test_a_watched_run_is_the_same_run(
    command: Command, settings: Settings, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Bit for bit: losses, gradient norms, evaluations, weights, moments, samples; dropout is on."""
    folders = [tmp_path / "off", tmp_path / "on"]
    common = {"batch__micro_batch_size": 3, "sample__max_new_tokens": 5, "train__max_steps": 12} | changes
    for folder, every in zip(folders, ("null", "2"), strict=True):
        arguments = settings(run__output_dir=folder, study__every=every, **common)
        assert command("train", *arguments) == 0, command.err
    off, on = folders
    assert not (off / "study.jsonl").exists()
    assert [each["step"] for each in lines(on, "statistics")] == [2, 4, 6, 8, 10, 12]
    assert steps_of(off) == steps_of(on)
    assert events(off, "evaluation") == events(on, "evaluation") and events(off, "sample") == events(on, "sample")
    one, other = weights_of(off), weights_of(on)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    for line in lines(on, "statistics"):
        assert all(line["layers"][layer]["attention_entropy"] for layer in "01")
        assert all(one["weight_norm"] > 0 and one["grad_norm"] > 0 for one in line["parameters"].values())


def test_resuming_leaves_no_step_out_and_none_twice(command: Command, settings: Settings, tmp_path: Path) -> None:
    common = {"study__every": 3, "checkpoint__every": 5, "checkpoint__keep": 9, "evaluation__every": 4}
    common |= {"train__max_steps": 14, "optimizer__max_grad_norm": 0.7, "batch__micro_batch_size": 3}
    assert command("train", *settings(**common)) == 0
    whole = (tmp_path / "run" / "study.jsonl").read_text()
    found = [json.loads(line) for line in whole.splitlines()]
    expected = [(step, "statistics") for step in (3, 6, 9, 12)] + [(step, "probe") for step in (4, 8, 12, 14)]
    assert sorted((each["step"], each["event"]) for each in found) == sorted(expected)
    norms = [each["grad_norm"] for each in events(tmp_path / "run", "step")]
    for each in lines(tmp_path / "run", "statistics"):
        last = norms[each["step"] - 3 : each["step"]]
        assert each["clipped_share"] == sum(norm > 0.7 for norm in last) / 3
    assert 0 < sum(norm > 0.7 for norm in norms) < len(norms)
    # As if killed after step 5, between two that are watched: what was written of later steps goes.
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        if folder.name > "step-00000005":
            shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "run" / "model")
    assert command("train", *settings(**common)) == 0 and "checkpoints/step-00000005" in command.err
    assert (tmp_path / "run" / "study.jsonl").read_text() == whole


def test_a_step_that_is_skipped_has_no_statistics(command: Command, settings: Settings, tmp_path: Path) -> None:
    from tests.support.faults import fault

    with fault("nan", 0, 4):
        assert command("train", *settings(study__every=2, train__max_steps=6)) == 0
    assert [each["step"] for each in lines(tmp_path / "run", "statistics")] == [2, 6]


@pytest.mark.slow
def test_compiled_layers_are_looked_at(command: Command, settings: Settings, tmp_path: Path) -> None:
    arguments = settings(model__compile="true", study__every=2, train__max_steps=4, batch__micro_batch_size=4)
    assert command("train", *arguments) == 0, command.err
    found = lines(tmp_path / "run", "statistics")
    assert len(found) == 2 and found[-1]["layers"]["1"]["activation_rms"] > 0 and found[-1]["gradient_noise"]


def test_the_probe_is_what_the_model_says(command: Command, settings: Settings, tmp_path: Path) -> None:
    arguments = settings(study__probe="that which was ☃ not", train__max_steps=4, evaluation__every=2)
    assert command("train", *arguments) == 0
    run = tmp_path / "run"
    first, last = lines(run, "probe")
    assert (first["step"], last["step"]) == (2, 4) and not lines(run, "statistics")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(run / "model"), AutoTokenizer.from_pretrained(run / "model")
    ids = tokenizer("that which was ☃ not", return_tensors="pt").input_ids
    with torch.no_grad():
        log_p = model(ids).logits.double().log_softmax(-1)[0, :-1]
    assert last["losses"][0] is None and last["top"][0] is None
    close(last["losses"][1:], (-log_p.gather(1, ids[0, 1:, None])[:, 0]).tolist())
    likeliest = log_p.exp().topk(5)
    for found, tokens, probabilities in zip(last["top"][1:], likeliest.indices, likeliest.values, strict=True):
        assert [each for each, _ in found] == [tokenizer.decode([token]) for token in tokens]
        close([each for _, each in found], probabilities.tolist())
    assert "".join(last["tokens"]) == last["text"] == "that which was ☃ not"
    assert len(last["tokens"]) == len(last["losses"]) == ids.shape[1]
    assert first["losses"] != last["losses"]


def test_a_probe_that_cannot_be(command: Command, settings: Settings, tmp_path: Path) -> None:
    assert command("train", *settings(study__probe="a")) == 2 and "only one token" in command.err
    assert command("train", *settings(study__probe="which " * 40)) == 2 and "the model sees only 32" in command.err
    assert not (tmp_path / "run").exists()
    assert command("train", *settings(study__probe="", study__every=5, train__max_steps=5)) == 0
    assert [each["event"] for each in map(json.loads, (tmp_path / "run/study.jsonl").open())] == ["statistics"]


def test_strings_of_tokens_are_the_text(tokenizer_folder: Path) -> None:
    from train_loop.data import tokenizer

    trained = tokenizer.load(str(tokenizer_folder))
    for text in ("the of and", "naïve ☃☃ 漢字", " a\n\tb ", "\ufffd"):
        ids = trained(text).input_ids
        found = strings(trained, ids)
        assert len(found) == len(ids) and "".join(found) == text
    assert strings(trained, []) == []
    assert strings(train_tokenizer(["ab" * 50], 257), [1, 2])  # any bytes at all


def test_shares_of_experts_are_those_of_a_plain_recomputation(settings: Settings) -> None:
    """Whether experts are balanced or not; positions without a target don't count."""
    changes = {"batch__sequences_per_step": 5, "batch__micro_batch_size": 2, "data__isolate_documents": "true"}
    for weight in (0.0, 0.1):
        arguments = settings(model__architecture=json.dumps(MIXTRAL), model__balance_weight=weight, **changes)
        run, copies, found = watched(arguments, 2)
        for step, values in enumerate(found):
            tokens, probability, count = torch.zeros(2, 4), torch.zeros(2, 4), 0
            for batch in run.batches[step].micro_batches:
                logits: list[torch.Tensor] = []
                gates = [each for each in copies[step].modules() if type(each).__name__ == "MixtralTopKRouter"]
                hooks = [
                    each.register_forward_pre_hook(
                        lambda gate, given, seen=logits: seen.append(given[0] @ gate.weight.T)
                    )
                    for each in gates
                ]
                copies[step](input_ids=batch.inputs, position_ids=batch.positions, use_cache=False)
                for hook in hooks:
                    hook.remove()
                real = (batch.targets != IGNORED).flatten()
                count += int(real.sum())
                for layer, each in enumerate(logits):
                    scores = each.detach().flatten(0, -2)[real].softmax(-1)
                    probability[layer] += scores.sum(0)
                    tokens[layer] += torch.bincount(scores.topk(2).indices.flatten(), minlength=4)
            assert list(values["experts"]) == ["0", "1"]
            for layer in range(2):
                close(values["experts"][str(layer)]["tokens"], (tokens[layer] / count).tolist(), 1e-4)
                close(values["experts"][str(layer)]["probability"], (probability[layer] / count).tolist(), 1e-4)
                assert sum(values["experts"][str(layer)]["tokens"]) == pytest.approx(2, abs=1e-5)
