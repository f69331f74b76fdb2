"""One run on one, two and three processes, with DDP and with FSDP2: the same numbers.

The runs are two epochs of 16 steps with a last step of one sequence, dropout on, documents of 5 to 200 words, and three
micro-batches a step, which two processes cannot share evenly.
"""

import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.launch import ON_CPU, Outcome, processes, run, several
from tests.support.runs import NO_DROPOUT, TINY_MODELS, arguments_for, events
from train_loop import job
from train_loop.checkpoint import storage
from train_loop.config.load import config_from_arguments
from train_loop.data.loader import IGNORED, loader
from train_loop.data.order import Plan, cut

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": TINY_MODELS["gpt2"],  # its dropout is 0.1
    "llama": TINY_MODELS["llama"] | {"attention_dropout": 0.1},
    "llama-tied": TINY_MODELS["llama"] | {"attention_dropout": 0.1, "tie_word_embeddings": True},
}
WITHOUT_DROPOUT: dict[str, dict[str, Any]] = {
    "gpt2": TINY_MODELS["gpt2"] | NO_DROPOUT,
    "llama": TINY_MODELS["llama"],
    "llama-tied": TINY_MODELS["llama"] | {"tie_word_embeddings": True},
}
FILES = "[03]*.txt"  # of the corpus: 20 of its 40 documents, the shortest and the longest
STEPS = 32
WORLDS = ["1", "2", "3", "2-fsdp2"]
DDP = ["1", "2", "3"]

Jobs = dict[str, list[str]]


class Runs:
    """All runs of a world (a number of processes), made when first asked for."""

    def __init__(self, root: Path, make: Callable[..., list[str]], corpus: Path) -> None:
        self.root, self.make, self.corpus = root, make, corpus
        self.outcomes: dict[str, dict[str, Outcome]] = {}

    def folder(self, world: str, name: str) -> Path:
        """A run's folder."""
        self.made(world)
        return self.root / f"{world}-{name}"

    def steps(self, world: str, name: str, key: str) -> list[Any]:
        """A value of every step's line in the log."""
        return [event[key] for event in events(self.folder(world, name), "step")]

    def made(self, world: str) -> dict[str, Outcome]:
        if world not in self.outcomes:
            jobs = self._jobs(world)
            number, fsdp2 = int(world[0]), world.endswith("fsdp2")
            self.outcomes[world] = dict(zip(jobs, several(number, list(jobs.values()), fsdp2), strict=True))
            for name, outcome in self.outcomes[world].items():
                assert outcome.code == 0, (name, outcome.err)
        return self.outcomes[world]

    def _jobs(self, world: str) -> Jobs:
        def train(name: str, **changes: object) -> None:
            base = {"batch__sequences_per_step": 6, "batch__micro_batch_size": 2, "sample__max_new_tokens": 5}
            base |= {"optimizer__learning_rate": 1e-3}
            jobs[name] = ["train", *self.make(self.root / f"{world}-{name}", **base | changes)]

        jobs: Jobs = {}
        for name, architecture in SHAPES.items():
            train(name, model__architecture=json.dumps(architecture))
        for name, architecture in WITHOUT_DROPOUT.items():
            once = {"train__max_steps": 1, "optimizer__max_grad_norm": "null", "model__architecture": architecture}
            train(f"{name}-once", **once | {"model__architecture": json.dumps(architecture)})
        # One window to validate on, two steps' worth of text and a last step of one sequence.
        few = {"data__files": f"{self.corpus}/0[1-6].txt", "data__validation_files": f"{self.corpus}/00.txt"}
        few |= {"batch__sequences_per_step": "7", "train__max_steps": "20"}
        for name, architecture in SHAPES.items():
            train(f"{name}-few", data__test_size=None, model__architecture=json.dumps(architecture), **few)
        train("isolated", data__isolate_documents="true")
        train("bf16", run__mixed_precision="bf16")
        train("less-memory", model__activation_checkpointing="true")
        if not world.endswith("fsdp2"):
            for name, architecture in SHAPES.items():
                shape = {"model__architecture": json.dumps(architecture)}
                train(f"{name}-bitwise", run__reproducible="bitwise", **shape)
                if world != "3":
                    for size in (1, 2, 4, 8):
                        batch = {"batch__sequences_per_step": 8, "batch__micro_batch_size": size}
                        without = {"model__architecture": json.dumps(WITHOUT_DROPOUT[name])}
                        train(f"{name}-of-{size}", train__max_steps=10, **batch | without)
        if world != "1":  # one process's run, cut off after its first epoch, goes on here
            train("llama-resumed", model__architecture=json.dumps(SHAPES["llama"]))
            folder = self.root / f"{world}-llama-resumed"
            shutil.copytree(self.folder("1", "llama"), folder)
            shutil.rmtree(folder / "checkpoints" / f"step-{STEPS:08d}")
            shutil.rmtree(folder / "model")
        for name in SHAPES:
            for size in (1, 3, 7):
                settings = self.make(self.root / "none", evaluation__batch_size=size)
                jobs[f"{name}-evaluate-{size}"] = ["evaluate", "--model", f"{self.root}/1-{name}/model", *settings]
        return jobs


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer_folder: Path) -> Runs:
    make = functools.partial(arguments_for, corpus, tokenizer_folder, data__files=f"{corpus}/{FILES}")
    return Runs(tmp_path_factory.mktemp("runs"), make, corpus)


def same(one: list[float], two: list[float], tolerance: float) -> None:
    assert len(one) == len(two)
    assert one == pytest.approx(two, rel=tolerance, abs=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SHAPES, "isolated", "less-memory"])
@pytest.mark.parametrize("world", WORLDS[1:])
def test_losses_and_evaluations_do_not_depend_on_the_processes(runs: Runs, world: str, name: str) -> None:
    for key in ("learning_rate", "tokens", "step", "epoch"):
        assert runs.steps("1", name, key) == runs.steps(world, name, key)
    assert len(runs.steps("1", name, "loss")) == STEPS and min(runs.steps("1", name, "tokens")) <= 32
    same(runs.steps("1", name, "loss"), runs.steps(world, name, "loss"), 1e-5)
    one, other = (events(runs.folder(each, name), "evaluation") for each in ("1", world))
    assert [event["tokens"] for event in one] == [event["tokens"] for event in other]
    same([event["loss"] for event in one], [event["loss"] for event in other], 1e-6)
    assert runs.made(world)[name].out.count("perplexity") == 1
    truth = json.loads((runs.folder(world, name) / "truth.json").read_text())
    assert truth["processes"]["present"] == truth["processes"]["asked"] == int(world[0])
    assert truth["processes"]["parallelism"] == ("FSDP2" if "fsdp2" in world else "DDP")


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_sharded_weights_are_exported_and_kept_whole(runs: Runs, name: str) -> None:
    folders = [runs.folder(world, name) for world in ("1", "2-fsdp2")]
    kept = [storage.newest(folder / "checkpoints")[0] for folder in folders]
    assert kept[0] and kept[1] and (kept[0].state["parts"], kept[1].state["parts"]) == (1, 2)
    for one, sharded in (
        [load_file(folder / "model" / "model.safetensors") for folder in folders],
        [storage.tensors(each, "optimizer") for each in kept if each],
    ):
        assert one.keys() == sharded.keys()
        for key in one:
            assert one[key].shape == sharded[key].shape
            torch.testing.assert_close(one[key], sharded[key], rtol=1e-2, atol=1e-4)
    samples = [[event["continuation"] for event in events(runs.folder(world, name), "sample")] for world in WORLDS]
    assert samples[0] == samples[3]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_bitwise_means_the_same_bits_on_any_number_of_processes(runs: Runs, name: str) -> None:
    kept: list[Any] = []
    for world in DDP:
        folder = runs.folder(world, f"{name}-bitwise")
        weights = hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()
        losses = [(event["loss"], event["grad_norm"]) for event in events(folder, "step")]
        kept.append((weights, losses, events(folder, "evaluation")))
    assert len(kept[0][1]) == STEPS
    assert kept[0] == kept[1] == kept[2]
    same(runs.steps("1", f"{name}-bitwise", "loss"), runs.steps("1", name, "loss"), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("world", ["1", "2"])
def test_micro_batches_of_any_size_give_the_same_losses(runs: Runs, world: str, name: str) -> None:
    expected = runs.steps("1", f"{name}-of-8", "loss")
    assert len(expected) == 10
    for size in (1, 2, 4, 8):
        same(expected, runs.steps(world, f"{name}-of-{size}", "loss"), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("world", WORLDS[1:])
def test_fewer_micro_batches_and_windows_than_processes(runs: Runs, world: str, name: str) -> None:
    targets = runs.steps("1", f"{name}-few", "tokens")
    assert min(targets) <= 32 < max(targets) and len(set(targets)) > 2  # a last step of one sequence; a short window
    assert targets == runs.steps(world, f"{name}-few", "tokens")
    same(runs.steps("1", f"{name}-few", "loss"), runs.steps(world, f"{name}-few", "loss"), 1e-5)
    one, other = (events(runs.folder(each, f"{name}-few"), "evaluation") for each in ("1", world))
    ledger = json.loads((runs.folder(world, f"{name}-few") / "ledger.json").read_text())["validation"]
    assert {event["tokens"] for event in [*one, *other]} == {ledger["trained_targets"]}
    assert ledger["trained_targets"] < 32
    same([event["loss"] for event in one], [event["loss"] for event in other], 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_evaluation_counts_every_target_once_on_any_processes(runs: Runs, name: str) -> None:
    jobs = [(world, f"{name}-evaluate-{size}") for world in WORLDS for size in (1, 3, 7)]
    found = [json.loads(runs.made(world)[job].out) for world, job in jobs]
    books = json.loads((runs.folder("1", name) / "ledger.json").read_text())["validation"]
    assert {metrics["tokens"] for metrics in found} == {books["trained_targets"]}
    losses = [metrics["loss"] for metrics in found]
    assert max(losses) / min(losses) - 1 < 1e-7
    at_one_size = [metrics for number, metrics in enumerate(found) if number % 3 == 1]
    assert all(metrics == at_one_size[0] for metrics in at_one_size)  # to the bit


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS[1:])
def test_a_run_goes_on_with_other_processes(runs: Runs, world: str) -> None:
    assert "resuming from" in runs.made(world)["llama-resumed"].err
    same(runs.steps("1", "llama", "loss"), runs.steps(world, "llama-resumed", "loss"), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_bf16_stays_within_two_percent_and_keeps_fp32_where_it_belongs(runs: Runs, world: str) -> None:
    same(runs.steps("1", "gpt2", "loss"), runs.steps(world, "bf16", "loss"), 2e-2)
    precision = json.loads((runs.folder(world, "bf16") / "truth.json").read_text())["precision"]
    assert precision["compute"] == "bfloat16"
    assert set(precision["parameters"]) == set(precision["gradients"]) == set(precision["moments"]) == {"float32"}
    # The loss itself is no bf16 number: those have 8 bits.
    values = torch.tensor(runs.steps(world, "bf16", "loss"))
    assert (values.bfloat16().float() != values).float().mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("world", WORLDS)
def test_the_gradient_is_that_of_a_plain_float64_reference(runs: Runs, world: str, name: str) -> None:
    """Read off AdamW's first moment after one step: (1 - beta1) times the gradient."""
    folder = runs.folder(world, f"{name}-once")
    found, _ = storage.newest(folder / "checkpoints")
    assert found is not None
    moments = storage.tensors(found, "optimizer")
    settings = ["--config", str(folder / "config.yaml"), "--run.output_dir", str(folder.with_name("reference"))]
    mine = job.set_up(config_from_arguments(settings)).run
    double = type(mine.state.model)(mine.state.model.config).double()
    double.load_state_dict(mine.state.model.state_dict())
    (batch,) = loader(mine.batches.windows, cut(Plan(mine.batches.plan.blocks_per_epoch, 6, 6, 0).blocks(0), 6))
    logits = double(input_ids=batch.inputs, use_cache=False).logits
    real = batch.targets != IGNORED
    nll = -logits.log_softmax(-1).gather(2, batch.targets.clamp(min=0)[..., None])[..., 0][real]
    nll.mean().backward()
    for parameter, reference in double.named_parameters():
        gradient = moments[f"{parameter}.exp_avg"].double() / (1 - 0.9)
        assert reference.grad is not None
        assert (gradient - reference.grad).norm() <= 1e-5 * reference.grad.norm(), parameter


def test_a_mistake_is_one_line_on_several_processes(settings: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")
    result = run(processes(2), ["train", *settings(data__files=tmp_path / "a.txt")], **ON_CPU)
    assert result.returncode != 0
    ours = [line for line in result.stderr.splitlines() if "train-loop: " in line]
    assert len(ours) == 1 and "not UTF-8 at byte 0" in ours[0]
    assert not (tmp_path / "run").exists()
