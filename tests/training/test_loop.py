"""The whole job: what a run does, prints and leaves behind, and that Transformers takes the model it exports."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file

from tests.support.runs import TINY_MODELS, Command, events, text
from train_loop import job
from train_loop.config.load import config_from_arguments
from train_loop.config.schema import Config
from train_loop.data import preparation
from train_loop.data.token_store import window_count
from train_loop.training import loop

ROOT = Path(__file__).parents[2]


def test_a_run_and_its_folder(command: Command, settings: Callable[..., list[str]], tmp_path: Path) -> None:
    prompts = json.dumps(["the ", "and "])
    arguments = settings(sample__prompts=prompts, sample__max_new_tokens=5, schedule__warmup_steps=3)
    assert command("train", *arguments) == 0
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {
        *("config.yaml", "ledger.json", "truth.json", "status.json", "metrics.jsonl"),
        *("architecture", "checkpoints", "model"),
    }
    prepared = preparation.prepare(config_from_arguments(arguments), shown=False)
    steps, evaluations = events(run, "step"), events(run, "evaluation")
    blocks = window_count(len(prepared.train), 32)
    per_epoch = math.ceil(blocks / 8)
    assert [event["step"] for event in steps] == list(range(1, 2 * per_epoch + 1))
    assert [event["step"] for event in evaluations] == [per_epoch, 2 * per_epoch]
    assert [event["epoch"] for event in evaluations] == [1.0, 2.0]
    # Every target of every epoch was trained on.
    assert sum(event["tokens"] for event in steps) == 2 * prepared.train.ledger.trained_targets
    assert steps[0]["learning_rate"] == 0 and steps[3]["learning_rate"] == 1e-2
    assert {"loss", "grad_norm", "tokens_per_second", "epoch"} <= steps[0].keys()
    for event in evaluations:
        assert event["perplexity"] == math.exp(event["loss"])
    assert evaluations[1]["loss"] < evaluations[0]["loss"] < math.log(320)  # it learns
    assert [event["prompt"] for event in events(run, "sample")] == ["the ", "and "] * 2
    assert json.loads((run / "status.json").read_text()) == {"state": "complete", "step": 2 * per_epoch, "reason": ""}
    assert json.loads((run / "ledger.json").read_text()) == prepared.ledger()
    assert f"perplexity       {evaluations[-1]['perplexity']:.3f}" in command.out
    assert "(gzip -9: " in command.out and str(run / "model") in command.out
    assert "validation loss" in command.err and "\r" not in command.err  # plain lines: stderr is no terminal
    assert config_from_arguments(["--config", str(run / "config.yaml")]) == config_from_arguments(arguments)


def test_the_same_command_again_changes_nothing(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path
) -> None:
    def state() -> dict[str, Any]:
        return {str(path): path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    assert command("train", *settings()) == 0
    before, printed = state(), command.out
    assert command("train", *settings()) == 0
    assert state() == before and command.out == printed
    assert command("train", *settings(), "--run.resume", "never") == 2
    assert "already holds a run" in command.err and state() == before


def test_the_order_and_the_result_depend_on_the_seed_alone(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path
) -> None:
    losses = []
    for name, changes in (("a", {}), ("b", {"data__num_workers": 1}), ("c", {"run__seed": 1})):
        changes |= {"run__output_dir": tmp_path / name, "train__epochs": 1}
        assert command("train", *settings(**changes)) == 0
        losses.append([event["loss"] for event in events(tmp_path / name, "step")])
    assert losses[0] == losses[1] != losses[2]


def test_transformers_takes_the_exported_model(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path
) -> None:
    """In a process without this package: the same evaluation loss, and text from a pipeline; for each kind of model."""
    for name, architecture in TINY_MODELS.items():
        arguments = settings(model__architecture=json.dumps(architecture), run__output_dir=tmp_path / name)
        assert command("train", *arguments) == 0
    prepared = preparation.prepare(config_from_arguments(arguments), shown=False)
    tokens = prepared.validation.tokens[:].astype("int64").tolist()
    program = """
import sys, json, torch
assert "train_loop" not in sys.modules
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
tokens = json.loads(sys.stdin.read())
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    nll = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 32):
            ids = torch.tensor([tokens[start : start + 33]])
            picked = model(ids[:, :-1]).logits.double().log_softmax(-1).gather(2, ids[:, 1:, None])
            nll -= picked.sum().item()
    text = pipeline("text-generation", model=folder)("the ", max_new_tokens=5)[0]["generated_text"]
    print(json.dumps([nll / (len(tokens) - 1), text, AutoTokenizer.from_pretrained(folder).model_max_length]))
"""
    result = subprocess.run(
        [sys.executable, "-c", program, *(str(tmp_path / name / "model") for name in TINY_MODELS)],
        input=json.dumps(tokens),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
    for name, (loss, generated, context) in zip(TINY_MODELS, found, strict=True):
        assert loss == pytest.approx(events(tmp_path / name, "evaluation")[-1]["loss"], rel=1e-6)
        assert generated.startswith("the ") and context == 32


def test_the_model_folder(command: Command, settings: Callable[..., list[str]], tmp_path: Path) -> None:
    assert command("train", *settings(sample__top_k=7, sample__temperature=0.5)) == 0
    folder = tmp_path / "run" / "model"
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json", "README.md"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["top_k"], generation["temperature"], generation["do_sample"]) == (7, 0.5, True)
    card = (folder / "README.md").read_text()
    evaluation, ledger = (
        events(tmp_path / "run", "evaluation")[-1],
        json.loads((tmp_path / "run/ledger.json").read_text()),
    )
    for expected in (
        "library_name: transformers",
        f"{evaluation['perplexity']:.3f}",
        f"| trained targets | {ledger['train']['trained_targets']:,} | {ledger['validation']['trained_targets']:,} |",
        ledger["fingerprint"],
        "sequences_per_step: 8",
    ):
        assert expected in card


def test_the_guides_job_with_local_stand_ins(
    command: Command, model_folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """configs/eli5_distilgpt2.yaml as it is, but for the two names: a parquet folder and a model folder."""
    from train_loop.data import tokenizer
    from train_loop.models import building

    settings = Config()
    settings.model.architecture = TINY_MODELS["gpt2"] | {"n_positions": 256}
    its_tokenizer = tokenizer.load(str(tokenizer_folder))
    building.build(settings, its_tokenizer).save_pretrained(tmp_path / "distilgpt2")
    its_tokenizer.save_pretrained(tmp_path / "distilgpt2")
    rows = [
        {
            "q_id": f"q{number}",
            "title": "Why?",
            "selftext": "",
            "category": "Biology",
            "subreddit": "explainlikeimfive",
            "answers": {
                "a_id": [f"a{number}", "b"],
                "text": [text(20, number), text(10 * (number % 3), number + 1)],
                "score": [3, 1],
                "text_urls": [[], []],
            },
            "title_urls": ["url"],
            "selftext_urls": ["url"],
        }
        for number in range(5010)
    ]
    (tmp_path / "eli5_category").mkdir()
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "eli5_category" / "train.parquet")
    arguments = [
        *("--config", ROOT / "configs" / "eli5_distilgpt2.yaml"),
        *("--model.name_or_path", tmp_path / "distilgpt2"),
        *("--data.name", tmp_path / "eli5_category"),
    ]
    loaded = config_from_arguments([str(argument) for argument in arguments])
    # The guide's own figures.
    assert (loaded.data.split, loaded.data.text_field, loaded.data.test_size) == ("train[:5000]", "answers.text", 0.2)
    assert (loaded.data.block_size, loaded.batch.sequences_per_step, loaded.train.epochs) == (128, 8, 3)
    assert (loaded.optimizer.learning_rate, loaded.optimizer.weight_decay) == (2e-5, 0.01)
    assert (loaded.sample.top_k, loaded.sample.top_p, loaded.sample.max_new_tokens) == (50, 0.95, 100)
    # Its end within seconds: few questions (a shorter slice), and the folder in the test's own place.
    quick = ["--data.max_documents", 300, "--run.output_dir", tmp_path / "run"]
    assert command("train", *arguments, *quick) == 0
    evaluations = events(tmp_path / "run", "evaluation")
    assert [event["epoch"] for event in evaluations] == [1.0, 2.0, 3.0]
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert (ledger["train"]["documents"], ledger["validation"]["documents"]) == (240, 60)
    assert command("sample", "--model", tmp_path / "run" / "model", "--prompt", loaded.sample.prompts[0]) == 0
    assert command.out.startswith("Somatic hypermutation allows the immune system to")
    assert command("prepare", *arguments) == 0
    assert json.loads(command.out)["train"]["documents"] == 4000


def test_a_folder_of_another_run_is_refused(
    command: Command, settings: Callable[..., list[str]], corpus: Path, tmp_path: Path
) -> None:
    for path in corpus.iterdir():
        shutil.copy(path, tmp_path)
    same = {"train__epochs": 1, "data__files": f"{tmp_path}/*.txt"}
    assert command("train", *settings(**same)) == 0
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    assert command("train", *settings(**same, optimizer__weight_decay=0.5, run__seed=3)) == 2
    assert "belongs to a different run (optimizer.weight_decay: 0.01 -> 0.5; run.seed: 0 -> 3)" in command.err
    assert command.err.count("\n") == 1
    # The same settings, other documents under the same names: the folder knows, and so do its checkpoints.
    for number in range(40):
        (tmp_path / f"{number:02d}.txt").write_text(text(50, number + 100), encoding="utf-8")
    assert command("train", *settings(**same)) == 2
    assert "checkpoints/step-" in command.err and "belongs to a different run (data: fingerprint " in command.err
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert command("train", *settings(**same)) == 2
    assert "belongs to a run on other data" in command.err
    assert sorted(str(path) for path in tmp_path.rglob("*")) == [each for each in before if "checkpoints" not in each]
    # A folder with something else in a run's place.
    (tmp_path / "other" / "model").mkdir(parents=True)
    assert command("train", *settings(run__output_dir=tmp_path / "other")) == 2
    assert "holds model of something else" in command.err


def test_a_run_that_diverges_fails_with_a_clear_error(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = loop.train_step

    def diverging(*arguments: Any, **named: Any) -> Any:
        result = take(*arguments, **named)
        return result._replace(loss=float("nan"), applied=False) if arguments[2].index >= 2 else result

    monkeypatch.setattr(loop, "train_step", diverging)
    assert command("train", *settings(train__max_bad_steps=3)) == 1
    assert "step 5: loss nan" in command.err and "3 steps in a row" in command.err
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    steps = events(tmp_path / "run", "step")
    assert [event.get("skipped", False) for event in steps] == [False, False, True, True, True]
    assert steps[-1]["loss"] is None  # JSON has no NaN
    plan = job.set_up(config_from_arguments(settings(run__output_dir=tmp_path / "other"))).run.batches.plan
    assert [event.get("blocks") for event in steps[2:]] == [plan.blocks(step).tolist() for step in (2, 3, 4)]
    assert "blocks" not in steps[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_stops_politely_and_the_same_command_resumes(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, number: int
) -> None:
    arguments = settings(train__epochs=50, train__max_steps=60)
    metrics = tmp_path / "run" / "metrics.jsonl"

    def stop_after_some_steps() -> None:
        while not metrics.exists() or metrics.read_text().count("\n") < 5:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop_after_some_steps)
    thread.start()
    code = command("train", *arguments)
    thread.join()
    assert code == 3 and "the same command resumes" in command.out
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "stopped" and status["reason"] == signal.Signals(number).name
    assert (tmp_path / "run" / "checkpoints" / f"step-{status['step']:08d}").is_dir()
    assert command("train", *arguments) == 0
    assert [event["step"] for event in events(tmp_path / "run", "step")] == list(range(1, 61))


def test_trackers_of_accelerate(command: Command, settings: Callable[..., list[str]], tmp_path: Path) -> None:
    assert command("train", *settings(run__log_with="[tensorboard]", train__epochs=1)) == 0
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))
    for wrong, expected in (("tensorbord", "did you mean tensorboard?"), ("aim", "aim is not installed")):
        assert command("train", *settings(run__log_with=wrong, run__output_dir=tmp_path / wrong)) == 2
        assert expected in command.err


def losses(command: Command, arguments: list[str], folder: Path) -> list[float]:
    """Of each step of a run in `folder`."""
    assert command("train", *arguments, "--run.output_dir", folder) == 0, command.err
    return [event["loss"] for event in events(folder, "step")]


SHAPES = {"gpt2": TINY_MODELS["gpt2"], "llama": TINY_MODELS["llama"] | {"attention_dropout": 0.1}}


@pytest.mark.parametrize("name", SHAPES)
def test_bf16_trains_within_two_percent_of_fp32(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, name: str
) -> None:
    arguments = settings(
        model__architecture=json.dumps(SHAPES[name]), train__max_steps=60, optimizer__learning_rate=3e-3
    )
    exact = losses(command, arguments, tmp_path / "fp32")
    rounded = losses(command, [*arguments, "--run.mixed_precision", "bf16"], tmp_path / "bf16")
    assert len(exact) == 60 and exact[-1] < exact[0] - 0.5 and rounded != exact
    assert rounded == pytest.approx(exact, rel=2e-2)
    assert not json.loads((tmp_path / "bf16" / "truth.json").read_text())["precision"]["loss_scaling"]


@pytest.mark.parametrize("name", SHAPES)
def test_activation_checkpointing_changes_neither_losses_nor_names(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, name: str
) -> None:
    arguments = settings(model__architecture=json.dumps(SHAPES[name]), train__epochs=1, optimizer__learning_rate=1e-3)
    expected = losses(command, arguments, tmp_path / "plain")
    found = losses(command, [*arguments, "--model.activation_checkpointing", "true"], tmp_path / "less-memory")
    assert found == pytest.approx(expected, rel=1e-5)
    assert weights(tmp_path / "plain").keys() == weights(tmp_path / "less-memory").keys()
    assert json.loads((tmp_path / "less-memory" / "truth.json").read_text())["model"]["activation_checkpointing"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_compiling_changes_neither_losses_nor_names(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, name: str
) -> None:
    arguments = settings(
        model__architecture=json.dumps(SHAPES[name]), train__max_steps=20, optimizer__learning_rate=1e-3
    )
    expected = losses(command, arguments, tmp_path / "plain")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found = losses(command, [*arguments, "--model.compile", "true"], tmp_path / "compiled")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs  # something was compiled
    assert found == pytest.approx(expected, rel=1e-5)
    assert weights(tmp_path / "plain").keys() == weights(tmp_path / "compiled").keys()


@pytest.mark.slow
def test_nothing_is_compiled_again_after_the_first_evaluation(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever comes: short last micro-batches, steps and batches of evaluation, samples, other epochs."""
    torch._dynamo.reset()
    graphs: list[int] = []
    between = loop.Loop._between_steps

    def counted(*arguments: Any, **named: Any) -> bool:
        stopping = between(*arguments, **named)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return stopping

    monkeypatch.setattr(loop.Loop, "_between_steps", counted)
    shapes = {"batch__sequences_per_step": 10, "batch__micro_batch_size": 4, "evaluation__batch_size": 7}
    arguments = settings(**shapes, evaluation__every=2, train__epochs=2, model__compile="true")
    assert command("train", *arguments) == 0
    sizes = [step["tokens"] for step in events(tmp_path / "run", "step")]
    assert (
        len(events(tmp_path / "run", "sample")) > 2 and sum(size <= 32 for size in sizes) == 2
    )  # one row, once an epoch
    assert -(-events(tmp_path / "run", "evaluation")[0]["tokens"] // 32) % 7 == 3  # rows in the last batch
    before, evaluated = graphs[0], graphs[2]
    assert graphs[1] - before == 2 and evaluated - graphs[1] == 1  # 4 rows and 2 of a step, 7 of an evaluation
    assert graphs[-1] == evaluated


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of a run's exported model."""
    return load_file(folder / "model" / "model.safetensors")


def test_the_same_bits_twice_and_a_curve_close_to_the_usual_one(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path
) -> None:
    arguments = settings(batch__micro_batch_size=3, train__max_steps=30, optimizer__learning_rate=1e-3)
    usual = losses(command, arguments, tmp_path / "usual")
    bitwise = [*arguments, "--run.reproducible", "bitwise"]
    first, second = (losses(command, bitwise, tmp_path / name) for name in ("first", "second"))
    assert first == second and first == pytest.approx(usual, rel=1e-5)
    assert "to the bit, on any number of processes" in command.err


def test_pushing_to_the_hub_uploads_the_model_folder(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    calls: list[tuple[str, Any]] = []

    class Api:
        """Stands for the Hub: remembers what it was asked."""

        def create_repo(self, name: str, exist_ok: bool) -> Any:
            calls.append(("create", name))
            return huggingface_hub.RepoUrl(f"https://huggingface.co/somebody/{name}")

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
            calls.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    shared = settings(export__push_to_hub="true", export__hub_model_id="mine", train__epochs=1)
    assert command("train", *shared) == 0
    assert calls[0] == ("create", "mine") and calls[1][0] == "somebody/mine"
    assert "model.safetensors" in calls[1][1] and "huggingface.co/somebody/mine" in command.out
    monkeypatch.undo()
    assert command("train", *settings(export__push_to_hub="true", run__output_dir=tmp_path / "b", train__epochs=1)) == 2
    assert "export.push_to_hub" in command.err and (tmp_path / "b" / "model" / "config.json").exists()
