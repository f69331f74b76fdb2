"""Copies of what FSDP2 shards (HSDP), on 2 x 2 processes: the numbers of one process, at every turn of a run's life."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.support import forked
from tests.support.launch import CONFIGS, ON_CPU, Outcome, environment, free_port, launchers, several, under
from tests.support.runs import TINY_MODELS, Command, arguments_for, events
from train_loop.checkpoint import storage

Make = Callable[..., list[str]]

SHAPES = {
    "gpt2": TINY_MODELS["gpt2"],  # its dropout is 0.1
    "llama": TINY_MODELS["llama"] | {"attention_dropout": 0.1, "tie_word_embeddings": True},
}
STEPS = 16
FOUR = [*("--config_file", str(CONFIGS / "hsdp.yaml"), "--num_machines", "1", "--num_processes", "4")]
FOUR += ["--parallelism_config_dp_replicate_size", "2", "--parallelism_config_dp_shard_size", "2"]


@pytest.fixture(scope="module")
def make(corpus: Path, tokenizer_folder: Path) -> Make:
    def arguments(output: Path, shape: str = "gpt2", **changes: object) -> list[str]:
        base = {"batch__sequences_per_step": 6, "batch__micro_batch_size": 2, "sample__max_new_tokens": 5}
        base |= {"optimizer__learning_rate": 1e-3, "checkpoint__every": 4, "train__max_steps": STEPS}
        base |= {"model__architecture": json.dumps(SHAPES[shape]), "data__files": f"{corpus}/[03]*.txt"}
        return arguments_for(corpus, tokenizer_folder, output, **base | changes)

    return arguments


def stop(at: int) -> dict[str, Any]:
    """A signal to one process, in this step."""
    return {"fault": "step", "process": 0, "at": at}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, make: Make) -> tuple[Path, dict[str, Outcome]]:
    """Runs on one process and on 2 x 2; among them one that was killed while it wrote a checkpoint, and goes on."""
    root = tmp_path_factory.mktemp("hsdp")
    for shape, each in zip(
        SHAPES, several(1, [["train", *make(root / f"1-{name}", name)] for name in SHAPES]), strict=True
    ):
        assert each.code == 0, (shape, each.err)
    todo = root / "killed.json"
    todo.write_text(json.dumps([["train", *make(root / "killed"), {"fault": "killed", "process": 1, "at": 12}]]))
    (first,) = several(2, [["train", *make(root / "chain"), stop(4)]])
    assert first.code == 3, first.err
    each = launchers(4, FOUR, ON_CPU | {"TESTS_FSDP2_ON_CPU": "true"})
    ended = forked.together("tests.support.several", [str(todo), str(root / "done")], each, 100)
    assert ended[1][0] == -9, ended
    shutil.copytree(root / "killed", root / "as it was left")
    commands: dict[str, list[Any]] = {name: ["train", *make(root / name, name)] for name in SHAPES}
    commands["killed"] = ["train", *make(root / "killed")]
    commands["evaluate"] = ["evaluate", "--model", str(root / "1-gpt2" / "model"), *make(root / "none")]
    commands["chain"] = ["train", *make(root / "chain"), stop(8)]
    commands["bf16"] = ["train", *make(root / "bf16", run__mixed_precision="bf16", train__max_steps=4)]
    commands["auto"] = ["train", *make(root / "auto", batch__micro_batch_size="auto")]
    return root, dict(zip(commands, several(4, list(commands.values()), fsdp2=True, copies=2), strict=True))


def losses(folder: Path) -> list[float]:
    return [event["loss"] for event in events(folder, "step")]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_losses_are_those_of_one_process(runs: tuple[Path, dict[str, Outcome]], name: str) -> None:
    root, outcomes = runs
    assert outcomes[name].codes == [0] * 4, outcomes[name].err
    one, four = root / f"1-{name}", root / name
    assert len(losses(one)) == STEPS
    assert losses(four) == pytest.approx(losses(one), rel=1e-5, abs=0)
    for key in ("grad_norm", "tokens", "learning_rate"):
        told = [[event[key] for event in events(folder, "step")] for folder in (one, four)]
        assert told[1] == pytest.approx(told[0], rel=1e-4)
    for kind, key in (("evaluation", "loss"), ("evaluation", "tokens"), ("sample", "continuation")):
        told = [[event[key] for event in events(folder, kind)] for folder in (one, four)]
        assert told[1] == (pytest.approx(told[0], rel=1e-6) if key == "loss" else told[0])
    sheet = json.loads((four / "truth.json").read_text())["processes"]
    assert (sheet["parallelism"], sheet["dp_replicate_size"], sheet["dp_shard_size"]) == ("HSDP", 2, 2)
    assert "HSDP (dp_replicate_size 2 x dp_shard_size 2)" in outcomes[name].err
    assert "Warning" not in outcomes[name].err


@pytest.mark.slow
def test_each_share_is_written_once(runs: tuple[Path, dict[str, Outcome]]) -> None:
    root, _ = runs
    found = [storage.newest(root / name / "checkpoints")[0] for name in ("1-gpt2", "gpt2")]
    assert found[0] and found[1] and found[1].state["parts"] == 4
    for kind in storage.KINDS:
        rows: dict[str, int] = {}
        for path in sorted(found[1].folder.glob(f"{kind}-*")):
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    rows[name] = rows.get(name, 0) + file.get_slice(name).get_shape()[0]
        whole = storage.tensors(found[0], kind)
        assert {name: len(tensor) for name, tensor in whole.items()} == rows
        assert storage.tensors(found[1], kind).keys() == whole.keys()


@pytest.mark.slow
def test_killed_while_it_writes_its_share(runs: tuple[Path, dict[str, Outcome]]) -> None:
    root, outcomes = runs
    left, damaged = storage.newest(root / "as it was left" / "checkpoints")
    assert left is not None and left.step == 8 and not damaged
    assert any("00000012" in path.name for path in (root / "as it was left" / "checkpoints").iterdir())
    assert outcomes["killed"].codes == [0] * 4 and "step-00000008" in outcomes["killed"].err
    assert losses(root / "killed") == losses(root / "gpt2")
    exported = [(root / name / "model" / "model.safetensors").read_bytes() for name in ("killed", "gpt2")]
    assert exported[0] == exported[1]


@pytest.mark.slow
def test_other_commands_and_settings(runs: tuple[Path, dict[str, Outcome]], make: Make, command: Command) -> None:
    root, outcomes = runs
    assert command("evaluate", "--model", str(root / "1-gpt2" / "model"), *make(root / "none")) == 0
    alone, four = json.loads(command.out), json.loads(outcomes["evaluate"].out)
    assert four["tokens"] == alone["tokens"] and four["loss"] == pytest.approx(alone["loss"], rel=1e-7)
    assert outcomes["auto"].codes == [2] * 4 and "auto does not work with FSDP2" in outcomes["auto"].err
    assert command("inspect", "--run", root / "gpt2", "--step", 6) == 0


@pytest.mark.slow
def test_from_and_to_any_other_way(runs: tuple[Path, dict[str, Outcome]], make: Make, command: Command) -> None:
    """DDP -> HSDP -> FSDP2 -> one process, in the middle of a run."""
    root, outcomes = runs
    train = ["train", *make(root / "chain")]
    second = outcomes["chain"]
    (third,) = several(2, [[*train, stop(12)]], fsdp2=True)
    for outcome in (second, third):
        assert outcome.code == 3 and outcome.err.count("resuming from") == 1, outcome.err
    assert command(*train) == 0 and "step-00000012" in command.err
    assert losses(root / "chain") == pytest.approx(losses(root / "1-gpt2"), rel=1e-5, abs=0)


@pytest.mark.slow
def test_half_precision_is_added_up_in_fp32(runs: tuple[Path, dict[str, Outcome]]) -> None:
    root, outcomes = runs
    assert outcomes["bf16"].codes == [0] * 4, outcomes["bf16"].err
    assert losses(root / "bf16") == pytest.approx(losses(root / "1-gpt2")[:4], rel=2e-2)
    precision = json.loads((root / "bf16" / "truth.json").read_text())["precision"]
    assert precision["compute"] == "bfloat16"
    assert set(precision["parameters"]) == set(precision["gradients"]) == set(precision["moments"]) == {"float32"}


@pytest.mark.slow
def test_copies_are_equal_layers_are_not_and_a_norm_counts_one_copy(tmp_path: Path, make: Make) -> None:
    settings, output = tmp_path / "settings.json", tmp_path / "found"
    shape = json.dumps(TINY_MODELS["gpt2"] | {"n_layer": 4})
    settings.write_text(json.dumps(make(tmp_path / "run", train__max_steps=2, model__architecture=shape)))
    # No more than docs/clusters.md says: torch's variables, and those that choose HSDP.
    told = {"WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} | ON_CPU
    told |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    told |= {f"PARALLELISM_CONFIG_DP_{name}_SIZE": "2" for name in ("REPLICATE", "SHARD")}
    each = [environment(told | {"RANK": str(rank)}) for rank in range(4)]
    ended = forked.together("tests.support.replicas", [str(settings), str(output)], each, 100)
    assert [code for code, _ in ended] == [0] * 4, ended
    found = [json.loads(Path(f"{output}.{rank}").read_text()) for rank in range(4)]
    assert [(each["copy"], each["share"]) for each in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(each["units"] > 4 for each in found)  # every layer by itself, and what is left
    for when in ("start", "end"):
        assert found[0][when] == found[2][when] and found[1][when] == found[3][when]
        alike = [value for name, value in found[0][when].items() if name.endswith("c_fc.weight")]
        assert len(alike) == len(set(alike)) == 4
    assert found[0]["start"] != found[0]["end"]
    assert [each["norm"] for each in found] == pytest.approx([5.0] * 4)  # not 7.07
    assert [each["clipped"] for each in found] == pytest.approx([0.6, 0.8, 0.6, 0.8])


def test_cpus_are_refused_where_accelerate_would_not_shard(tmp_path: Path, make: Make) -> None:
    """`several` makes it shard there."""
    each = launchers(4, FOUR, {})
    (found,) = under(each, [["train", *make(tmp_path / "run")]])
    assert found.codes == [2] * 4 and found.err.count("train-loop: ") == 1
    assert "FSDP2 was asked for, but Accelerate does not shard on a CPU; use plain data parallelism" in found.err


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (
            ("2", "3"),
            "dp_replicate_size 2 x dp_shard_size 3 = 6, but for 4 processes; choose two sizes whose product is 4",
        ),
        (("2", "1"), "dp_replicate_size 2 x dp_shard_size 1 = 2, but for 4 processes"),
        (("1", "2"), "dp_replicate_size 1 x dp_shard_size 2 = 2, but for 4 processes"),
        (("4", "1"), "nothing would be sharded; use plain DDP"),
        (("2", "x"), "PARALLELISM_CONFIG_DP_SHARD_SIZE: expected a whole number from 1"),
        (("0", "4"), "PARALLELISM_CONFIG_DP_REPLICATE_SIZE: expected a whole number from 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    command: Command, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[str, str], expected: str
) -> None:
    from train_loop.distributed import heartbeat

    monkeypatch.setattr(heartbeat.Heartbeat, "__init__", lambda self, *_: setattr(self, "world_size", 1))
    for name, value in zip(("REPLICATE", "SHARD"), sizes, strict=True):
        monkeypatch.setenv(f"PARALLELISM_CONFIG_DP_{name}_SIZE", value)
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "4", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert command("train", *make(tmp_path / "run")) == 2
    assert expected in command.err and len(command.err.strip().splitlines()) == 1
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.delenv("FSDP_VERSION")
    if "expected" not in expected:
        assert command("train", *make(tmp_path / "run")) == 2 and "but not for FSDP2; set ACCELERATE" in command.err
