"""Several processes that meet signals, numbers that are none, and other processes than those they began with."""

import functools
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.launch import ON_CPU, ROOT, Outcome, command, environment, processes, several
from tests.support.runs import TINY_MODELS, arguments_for, events
from train_loop.checkpoint import storage
from train_loop.metrics.throughput import MEASURED

pytestmark = pytest.mark.slow

LLAMA = json.dumps(TINY_MODELS["llama"] | {"attention_dropout": 0.1})
SIGNALS = {"step": 12, "evaluation": 1, "save": 10, "last evaluation": 3}
SHARDED_SIGNALS = {"step": 12, "evaluation": 1, "save": 10, "sampling": 1}


def metrics(folder: Path) -> list[dict[str, Any]]:
    """A run's metrics, but for the speeds."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in MEASURED} for line in lines]


def exported(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


Make = Callable[..., list[str]]


@pytest.fixture(scope="module")
def make(corpus: Path, tokenizer_folder: Path) -> Make:
    def arguments(output: Path, **changes: object) -> list[str]:
        base = {"batch__sequences_per_step": 6, "batch__micro_batch_size": 2, "sample__max_new_tokens": 5}
        base |= {"optimizer__learning_rate": 1e-3, "checkpoint__every": 10, "model__architecture": LLAMA}
        return ["train", *arguments_for(corpus, tokenizer_folder, output, **base | changes)]

    return arguments


class World:
    """The runs of two processes, made when first asked for: one that goes through, and broken ones, each twice."""

    def __init__(self, root: Path, make: Make, fsdp2: bool) -> None:
        self.root, self.fsdp2 = root, fsdp2
        small = functools.partial(make, train__max_steps=30, evaluation__every=12)
        self.commands: dict[str, list[Any]] = {"whole": small(root / "whole")}
        for name, at in (SHARDED_SIGNALS if fsdp2 else SIGNALS).items():
            what = {"fault": name.split()[-1], "process": 1, "at": at}
            self.commands |= {f"{name}/broken": [*small(root / name), what], f"{name}/again": small(root / name)}
        self.commands["nan"] = [*small(root / "nan"), {"fault": "nan", "process": 1, "at": 5}]
        self.commands["auto"] = small(root / "auto", batch__micro_batch_size="auto")

    @functools.cached_property
    def outcomes(self) -> dict[str, Outcome]:
        return dict(zip(self.commands, several(2, list(self.commands.values()), self.fsdp2), strict=True))


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory, make: Make) -> World:
    return World(tmp_path_factory.mktemp("ddp"), make, fsdp2=False)


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory: pytest.TempPathFactory, make: Make) -> World:
    return World(tmp_path_factory.mktemp("fsdp2"), make, fsdp2=True)


def stopped_and_resumed(world: World, name: str) -> None:
    first, second = world.outcomes[f"{name}/broken"], world.outcomes[f"{name}/again"]
    assert first.codes == [3, 3], first.err
    assert second.codes == [0, 0] and "resuming from" in second.err, second.err
    assert "stopped by a signal to another process at step" in first.out
    assert metrics(world.root / name) == metrics(world.root / "whole")
    assert exported(world.root / name) == exported(world.root / "whole")


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_to_one_process_stops_both_and_nothing_is_lost(ddp: World, name: str) -> None:
    stopped_and_resumed(ddp, name)


def test_a_signal_to_one_process_before_the_first_step_ends_both_at_once(make: Make, tmp_path: Path) -> None:
    """The other one waits for it in a collective by then."""
    (found,) = several(2, [[*make(tmp_path / "run"), {"fault": "before", "process": 1, "at": 0}]], seconds=90)
    assert found.codes == [3, 3] and "stopped by SIGTERM; the same command starts again" in found.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", SHARDED_SIGNALS)
def test_a_signal_to_one_process_stops_both_that_share_the_weights(fsdp2: World, name: str) -> None:
    stopped_and_resumed(fsdp2, name)


@pytest.mark.parametrize("world", ["ddp", "fsdp2"])
def test_what_is_not_a_number_on_one_process_reaches_no_weights(world: str, request: pytest.FixtureRequest) -> None:
    made: World = request.getfixturevalue(world)
    assert made.outcomes["nan"].codes == [0, 0]
    broken, whole = (events(made.root / name, "step") for name in ("nan", "whole"))
    assert [event["step"] for event in broken if event.get("skipped")] == [5]
    assert broken[4]["loss"] is None and len(broken[4]["blocks"]) == 6
    assert [event["loss"] for event in broken[:4]] == [event["loss"] for event in whole[:4]]
    # The step after it sees the weights of before: its loss is finite, and not the one it would have been.
    assert broken[5]["loss"] is not None and broken[5]["loss"] != whole[5]["loss"] and len(broken) == 30


def test_each_process_writes_what_it_holds_and_no_more(ddp: World, fsdp2: World) -> None:
    kept = [storage.newest(world.root / "whole" / "checkpoints")[0] for world in (ddp, fsdp2)]
    assert all(ddp.outcomes["whole"].codes[place] == fsdp2.outcomes["whole"].codes[place] == 0 for place in (0, 1))
    assert kept[0] and kept[1]
    sizes = [{path.name: path.stat().st_size for path in found.folder.glob("*.safetensors")} for found in kept if found]
    assert sorted(sizes[1]) == [
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        *("optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors"),
    ]
    for kind in ("model", "optimizer"):
        whole = sizes[0][f"{kind}-00001-of-00001.safetensors"]
        assert max(size for name, size in sizes[1].items() if name.startswith(kind)) < 0.65 * whole
        one, sharded = (storage.tensors(found, kind) for found in kept if found)
        assert one.keys() == sharded.keys()
        assert all(one[name].shape == sharded[name].shape for name in one)


def test_a_size_that_is_found_by_trying_needs_processes_that_try_alone(ddp: World, fsdp2: World) -> None:
    assert ddp.outcomes["auto"].codes == [0, 0]
    truth = json.loads((ddp.root / "auto" / "truth.json").read_text())
    assert truth["batch"]["micro_batch_size"] == 3  # a process's share of six
    assert fsdp2.outcomes["auto"].codes == [2, 2]
    assert "batch.micro_batch_size auto does not work with FSDP2" in fsdp2.outcomes["auto"].err


def test_other_processes_in_the_middle_of_a_run(tmp_path: Path, make: Make) -> None:
    """2 -> 1 -> 3 processes, in plain sums and in fixed point; DDP -> FSDP2 -> DDP."""

    def stop(at: int) -> dict[str, Any]:
        return {"fault": "step", "process": 0, "at": at}

    worlds, bits, sharded = (
        make(tmp_path / name, run__reproducible="bitwise" if name == "bits" else "no")
        for name in ("worlds", "bits", "sharded")
    )
    whole = [make(tmp_path / "whole"), make(tmp_path / "whole-bits", run__reproducible="bitwise")]
    first = several(2, [[*worlds, stop(17)], [*bits, stop(17)], [*sharded, stop(17)]])
    second = several(1, [[*worlds, stop(38)], [*bits, stop(38)], *whole])
    third = several(2, [[*sharded, stop(38)]], fsdp2=True)
    last = [*several(3, [worlds, bits]), *several(2, [sharded])]
    assert [each.code for each in first + second + third + last] == [3, 3, 3, 3, 3, 0, 0, 3, 0, 0, 0]
    assert [each.err.count("resuming from") for each in second[:2] + third + last] == [1] * 6
    expected, exact = (events(tmp_path / name, "step") for name in ("whole", "whole-bits"))
    assert len(expected) == 62
    for name in ("worlds", "sharded"):
        steps = events(tmp_path / name, "step")
        assert [(event["step"], event["tokens"]) for event in steps] == [
            (event["step"], event["tokens"]) for event in expected
        ]
        assert [event["loss"] for event in steps] == pytest.approx([event["loss"] for event in expected], rel=1e-5)
    assert metrics(tmp_path / "bits") == metrics(tmp_path / "whole-bits") and len(exact) == 62
    assert exported(tmp_path / "bits") == exported(tmp_path / "whole-bits")
    kept = storage.newest(tmp_path / "sharded" / "checkpoints")[0]
    assert kept and kept.state["processes"] == 2 and kept.state["parts"] == 1


@pytest.mark.parametrize("victim", [0, 1])
def test_sigterm_to_one_real_process(make: Make, tmp_path: Path, victim: int) -> None:
    """As a scheduler does it: from outside, while the launcher watches."""
    arguments = make(tmp_path / "run", train__max_steps=3000, evaluation__every=1000)
    launched = subprocess.Popen(
        command(processes(2), arguments),
        cwd=ROOT,
        env=environment(ON_CPU),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists() or log.read_text().count("\n") < 20:
        assert time.monotonic() < deadline and launched.poll() is None
        time.sleep(0.05)
    workers = psutil.Process(launched.pid).children()
    ranks = {int(worker.environ()["RANK"]): worker.pid for worker in workers if "RANK" in worker.environ()}
    steps = len(events(tmp_path / "run", "step"))
    os.kill(ranks[victim], signal.SIGTERM)
    out, err = launched.communicate(timeout=60)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "stopped", (out, err)
    assert steps <= status["step"] < 3000
    assert "the same command resumes" in out
    assert "exitcode  : 3" in err and "exitcode  : -" not in err  # what the launcher makes of it
    found, damaged = storage.newest(tmp_path / "run" / "checkpoints")
    assert found is not None and found.step == status["step"] and not damaged
    assert [event["step"] for event in events(tmp_path / "run", "step")] == list(range(1, found.step + 1))
