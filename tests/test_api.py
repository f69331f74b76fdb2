"""The public face: a script trains, evaluates and samples as the commands do, to the bit, with parts of its own."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import train_loop
from tests.support.launch import free_port
from tests.support.runs import ROOT, TINY_MODELS, Command, events, forget_accelerator, without_speeds


def overrides(arguments: list[str]) -> dict[str, Any]:
    """Command-line settings as a script has them."""
    values = dict(zip(arguments[::2], arguments[1::2], strict=True))
    return {key.removeprefix("--"): json.loads(v) if v[0] in "{[" else v for key, v in values.items()} | {
        "data.test_size": 0.2,
        "data.block_size": 32,
        "batch.sequences_per_step": 8,
        "optimizer.learning_rate": 1e-2,
        "train.epochs": 2,
        "sample.max_new_tokens": 9,
        "export.verify": False,
    }


class Seen(train_loop.Observer):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        self.before: list[tuple[int, int, int]] = []
        self.steps: list[tuple[int, float]] = []
        self.evaluations: list[tuple[int, float]] = []

    def before_step(self, state: train_loop.TrainState, batch: train_loop.StepBatch) -> None:
        self.before.append((state.step, batch.index, batch.targets))

    def after_step(self, state: train_loop.TrainState, record: dict[str, Any]) -> None:
        self.steps.append((state.step, record["loss"]))

    def after_evaluation(self, state: train_loop.TrainState, record: dict[str, Any]) -> None:
        self.evaluations.append((state.step, record["loss"]))


def test_importing_the_package_loads_no_library() -> None:
    code = "import sys, train_loop; print(sorted({'torch', 'transformers', 'yaml', 'numpy'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_public_name_is_there() -> None:
    for name in train_loop.__all__:
        assert getattr(train_loop, name) is not None and name in dir(train_loop)
    with pytest.raises(AttributeError, match="has no attribute fly"):
        train_loop.fly  # noqa: B018


def test_a_scripts_run_is_the_commands_to_the_bit(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path
) -> None:
    ours, theirs = (settings(run__output_dir=tmp_path / name) for name in ("script", "command"))
    assert command("train", *theirs) == 0
    forget_accelerator()
    seen = Seen()
    summary = train_loop.train(train_loop.load_config(None, overrides(ours)), callbacks=[seen])
    assert without_speeds(tmp_path / "script") == without_speeds(tmp_path / "command")
    models = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("script", "command")]
    assert models[0] == models[1]
    steps = events(tmp_path / "script", "step")
    assert seen.steps == [(step["step"], step["loss"]) for step in steps]
    assert seen.before == [(step["step"] - 1, step["step"] - 1, step["tokens"]) for step in steps]
    evaluations = events(tmp_path / "script", "evaluation")
    assert seen.evaluations == [(each["step"], each["loss"]) for each in evaluations]
    assert summary.evaluation == evaluations[-1] and summary.step == summary.total_steps == len(steps)
    assert (summary.stopped, summary.exported_step, summary.model_folder) == (
        None,
        len(steps),
        tmp_path / "script/model",
    )
    # Evaluation and samples likewise.
    forget_accelerator()
    found = train_loop.evaluate(summary.model_folder, train_loop.load_config(None, overrides(ours)))
    assert command("evaluate", "--model", summary.model_folder, *ours) == 0 and json.loads(command.out) == found
    assert command("sample", "--model", summary.model_folder, "--prompt", "the ", "--max_new_tokens", 9) == 0
    text = train_loop.Sampler.load(str(summary.model_folder))("the ", max_new_tokens=9)
    assert command.out == f"the {text}\n"


def test_own_documents_and_an_own_model(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, model_folder: Path, corpus: Path
) -> None:
    """The run can be resumed by a command, since the documents are files by then; the model is trained in place."""
    texts = [path.read_text() for path in sorted(corpus.glob("*.txt"))]
    values = overrides(settings(model__architecture=None, data__source=None, data__files=None))
    config = train_loop.load_config(None, values | {"train.max_steps": 4})
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    before = model.lm_head.weight.detach().clone()

    def read() -> Iterator[str]:
        yield from texts

    summary = train_loop.train(config, model=model, documents=("notes", read()))
    assert config.data.source == "stdlib"  # the script's own stays as it was
    assert summary.ledger["train"]["documents"] + summary.ledger["validation"]["documents"] == len(texts)
    assert not torch.equal(model.lm_head.weight, before)
    exported = AutoModelForCausalLM.from_pretrained(summary.model_folder)
    assert torch.equal(exported.lm_head.weight, model.lm_head.weight.detach())
    first = train_loop.prepare(config, train_loop.Documents("notes", texts))
    assert first.fingerprint == summary.ledger["fingerprint"]
    assert train_loop.prepare(config, ("notes", texts[1:])).fingerprint != first.fingerprint
    # From the run's own configuration, by a command.
    assert command("evaluate", "--model", summary.model_folder, "--config", tmp_path / "run" / "config.yaml") == 2
    assert "give exactly one of model.name_or_path" in command.err  # the model came from the script
    named = ["--config", tmp_path / "run" / "config.yaml", "--model.name_or_path", summary.model_folder]
    assert command("evaluate", "--model", summary.model_folder, *named) == 0
    forget_accelerator()
    of_object = train_loop.evaluate(exported.float(), train_loop.load_config(tmp_path / "run" / "config.yaml"))
    assert json.loads(command.out) == of_object


@pytest.mark.parametrize(
    ("values", "documents", "expected"),
    [
        ({"train.epoch": 1}, None, "unknown key train.epoch; did you mean epochs?"),
        ({"train.epochs": 0}, None, "train.epochs: expected an integer > 0, got 0"),
        ({"train": 3}, None, "train is a section"),
        ({"model.architecture": None}, None, "give exactly one of model.name_or_path"),
        ({}, ("a/b", []), "documents: the name 'a/b'"),
        ({}, ("notes", ["text", 3]), "documents: number 1 of notes is a int, expected text"),
        ({}, ("notes", ["text", "\ud800"]), "documents: number 1 of notes: character 1 of the text is \\ud800"),
        ({}, ("notes", "text"), "documents: notes: expected an iterable of texts, got a str"),
        ({}, "notes", "documents: expected a pair, a name and texts"),
        ({}, ("notes", ["", ""]), "no document with text"),
    ],
)
def test_a_mistake_is_an_input_error_with_one_line(
    settings: Callable[..., list[str]], tmp_path: Path, values: dict[str, Any], documents: Any, expected: str
) -> None:
    with pytest.raises(train_loop.InputError) as error:
        train_loop.train(train_loop.load_config(None, overrides(settings()) | values), documents=documents)
    assert expected in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"config": "run.yaml"}, "config: expected a Config, got a str; train_loop.load_config makes one"),
        ({"model": torch.nn.Linear(1, 1)}, "model: expected a causal language model of Transformers, got a Linear"),
        ({"callbacks": [print]}, "callbacks: builtin_function_or_method has no method before_step; derive it from"),
    ],
)
def test_what_is_no_part_of_a_run_is_refused(
    settings: Callable[..., list[str]], given: dict[str, Any], expected: str
) -> None:
    with pytest.raises(train_loop.InputError) as error:
        train_loop.train(**{"config": train_loop.load_config(None, overrides(settings())), **given})
    assert expected in str(error.value)


def test_the_commands_line_is_the_scripts(command: Command, settings: Callable[..., list[str]], tmp_path: Path) -> None:
    assert command("train", *settings(data__files=f"{tmp_path}/*.txt")) == 2
    with pytest.raises(train_loop.InputError) as error:
        train_loop.train(train_loop.load_config(None, overrides(settings(data__files=f"{tmp_path}/*.txt"))))
    assert command.err == f"train-loop: {error.value}\n"


def test_a_notebook_trains_on_two_processes(settings: Callable[..., list[str]], tmp_path: Path) -> None:
    """As a cell does it: `notebook_launcher` forks this very process, which must have no accelerator yet."""
    values = overrides(settings(model__architecture=json.dumps(TINY_MODELS["llama"]))) | {"batch.micro_batch_size": 4}
    code = (
        "import json, sys, train_loop\nfrom accelerate import notebook_launcher\n"
        "config = train_loop.load_config(None, json.loads(sys.argv[1]))\n"
        f"notebook_launcher(train_loop.train, (config,), num_processes=2, use_port='{free_port()}')\n"
    )
    for name, program in (
        ("two", code),
        ("one", code.split("notebook_launcher(")[0] + "train_loop.train(config)\n"),
    ):
        given = json.dumps(values | {"run.output_dir": str(tmp_path / name)}, default=str)
        done = subprocess.run(
            [sys.executable, "-c", program, given], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    two, one = (events(tmp_path / name, "step") for name in ("two", "one"))
    assert [step["loss"] for step in two] == pytest.approx([step["loss"] for step in one], rel=1e-5)
    truth = json.loads((tmp_path / "two" / "truth.json").read_text())
    assert truth["processes"]["present"] == 2


def test_absurd_settings_of_a_script_are_refused_before_anything_happens(tmp_path: Path) -> None:
    config = train_loop.load_config(
        None, {"model.architecture": TINY_MODELS["gpt2"], "tokenizer.train_vocab_size": 300}
    )
    config.run.output_dir, config.data.block_size = str(tmp_path / "run"), 10**9
    for act in (train_loop.prepare, train_loop.train, lambda config: train_loop.evaluate("x", config)):
        with pytest.raises(train_loop.InputError, match=r"^config: data.block_size: 1000000000 is too large"):
            act(config)
    assert list(tmp_path.iterdir()) == []
