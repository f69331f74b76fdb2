"""Two hosts with a cable between them and no disk in common: they train, lose each other, and go on."""

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.hosts import Hosts, need
from tests.conftest import arguments_for, events
from tests.distributed.launch import ON_CPU, ROOT, environment, several
from train_loop.metrics.throughput import MEASURED

pytestmark = pytest.mark.slow

NAMES = ("alpha", "beta")
TIMEOUT_SECONDS = 6
Ended = list[tuple[int, list[str], str]]  # of each host: exit code, our lines, all that it said


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    need(["ip", "unshare"])
    with Hosts(NAMES) as made:
        yield made


@pytest.fixture(scope="module")
def make(corpus: Path, tokenizer_folder: Path) -> Callable[..., list[str]]:
    base = {"batch__sequences_per_step": 6, "batch__micro_batch_size": 2, "optimizer__learning_rate": 1e-3}
    base |= {"checkpoint__every": 10, "train__max_steps": 120, "evaluation__every": 60, "sample__prompts": "[]"}
    return functools.partial(arguments_for, corpus, tokenizer_folder, **base)


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in MEASURED} for line in lines]


def surroundings(**variables: str) -> dict[str, str]:
    """The environment that the launch script is given."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return environment(ON_CPU | {"HOSTS": " ".join(NAMES), "PROCESSES": "1", "PATH": path} | variables)


def changed(folder: Path, what: str, configuration: str = "machines") -> Path:
    """scripts/launch/machines.sh with something else to start."""
    text = (ROOT / "scripts" / "launch" / "machines.sh").read_text()
    root, start = 'cd "$(dirname "${BASH_SOURCE[0]}")/../.."', "-m train_loop train"
    for old, new in ((root, f"cd {ROOT}"), (start, f"-m {what}"), ("/machines.yaml", f"/{configuration}.yaml")):
        assert text.count(old) == 1
        text = text.replace(old, new)
    (script := folder / "machines.sh").write_text(text)
    return script


def start(hosts: Hosts, name: str, arguments: list[str], disk: Path, **variables: str) -> subprocess.Popen[str]:
    """scripts/launch/machines.sh on one host, whose output folder and cache are on a disk of its own."""
    (own := disk / name / "runs").mkdir(parents=True, exist_ok=True)
    (shared := disk / "runs").mkdir(exist_ok=True)
    script = variables.pop("script", str(ROOT / "scripts" / "launch" / "machines.sh"))
    return hosts.start(
        name,
        ["bash", script, NAMES.index(name), *arguments],
        private={shared: own},
        env=surroundings(TRAIN_LOOP_CACHE=str(disk / name / "cache"), **variables),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def ended(started: list[subprocess.Popen[str]], seconds: float = 90) -> Ended:
    outcomes: Ended = []
    for each in started:
        _, err = each.communicate(timeout=seconds)
        outcomes.append((each.returncode, [line for line in err.splitlines() if line.startswith("train-loop: ")], err))
    return outcomes


def test_a_cut_cable_stops_both_sides_and_once_mended_nothing_was_lost(
    hosts: Hosts, make: Callable[..., list[str]], tmp_path: Path
) -> None:
    """The first host alone has the checkpoints: the second is sent the state."""
    arguments = make(tmp_path / "runs" / "run", run__timeout_seconds=TIMEOUT_SECONDS)
    run = tmp_path / "alpha" / "runs" / "run"
    started = [start(hosts, name, arguments, tmp_path) for name in NAMES]
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() or len(events(run, "step")) < 35:
        assert time.monotonic() < deadline and all(each.poll() is None for each in started)
        time.sleep(0.01)
    hosts.cut("beta")
    began = time.monotonic()
    outcomes = ended(started)
    seconds = time.monotonic() - began
    hosts.mend("beta")
    assert seconds < TIMEOUT_SECONDS + 15, outcomes
    assert [code for code, _, _ in outcomes] == [1, 1]
    for (_, lines, err), lost in zip(outcomes, ("lost process 1 (beta)", "lost process 0 (alpha)"), strict=True):
        assert len(lines) == 1 and lost in lines[0], err
        assert "the same command resumes" in lines[0]
        assert "Traceback" not in err.partition(lines[0])[0]  # what the launcher says after it is its own
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed" and "beta" in status["reason"] and 35 <= status["step"] < 120
    assert not (tmp_path / "beta" / "runs" / "run" / "checkpoints").exists()

    outcomes = ended([start(hosts, name, arguments, tmp_path) for name in NAMES])
    assert [code for code, _, _ in outcomes] == [0, 0], outcomes
    assert "resuming from" in outcomes[0][2]
    whole = make(tmp_path / "whole")
    assert several(2, [["train", *whole]])[0].code == 0
    assert metrics(run) == metrics(tmp_path / "whole") and len(events(run, "step")) == 120
    exported = [(folder / "model" / "model.safetensors").read_bytes() for folder in (run, tmp_path / "whole")]
    assert exported[0] == exported[1]


def test_a_host_that_never_comes_is_named(hosts: Hosts, make: Callable[..., list[str]], tmp_path: Path) -> None:
    began = time.monotonic()
    for name, missing in (("alpha", "host 1 (beta)"), ("beta", "host 0 (alpha)")):
        ((code, lines, _),) = ended([start(hosts, name, make(tmp_path / "runs" / "run"), tmp_path, PATIENCE="3")])
        assert code == 1 and len(lines) == 1 and f"{missing} of 2 did not report within 3 s" in lines[0]
    assert time.monotonic() - began < 20


def test_a_process_that_never_comes_is_named(hosts: Hosts, make: Callable[..., list[str]], tmp_path: Path) -> None:
    """The second host's launcher starts something that hangs before it can say a word."""
    arguments = make(tmp_path / "runs" / "run", run__preflight_timeout_seconds=4)
    started = [start(hosts, "alpha", arguments, tmp_path)]
    script = changed(tmp_path, "tests.cluster.hangs")
    other = hosts.start("beta", ["bash", script, 1], env=surroundings(), cwd=ROOT)
    began = time.monotonic()
    ((code, lines, err),) = ended(started)
    hosts.kill("beta")
    other.wait()
    assert code == 1 and time.monotonic() - began < 60
    assert len(lines) == 1 and "process 1 of 2 did not report within 4 s (machine 1" in lines[0], err


def test_a_host_that_differs_or_does_not_share_what_it_has_to_is_named_before_training(
    hosts: Hosts, make: Callable[..., list[str]], tmp_path: Path, corpus: Path
) -> None:
    """Another library, other settings, other data, FSDP2 without a shared disk; all in the same two processes."""
    script = str(changed(tmp_path, "tests.distributed.several", "fsdp2"))
    # What pip would have left of another version: Python finds it first.
    (information := tmp_path / "site" / "accelerate-1.15.99.dist-info").mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: accelerate\nVersion: 1.15.99\n")
    variables = {"TESTS_OTHER_VERSION": str(information.parent), "TESTS_FSDP2_ON_CPU": "true"}
    same = ["train", *make(tmp_path / "runs" / "run")]
    other = [
        ["train", *make(tmp_path / "runs" / "run", **each)]
        for each in ({"run__seed": 7}, {"data__files": corpus / "0*"})
    ]
    broken = [*same, {"fault": "version", "process": 1, "at": 0}]
    began, started = time.monotonic(), []
    for name, commands in (("alpha", [broken, same, same, same]), ("beta", [broken, *other, same])):
        (todo := tmp_path / f"{name}.json").write_text(json.dumps(commands))
        started.append(start(hosts, name, [str(todo), str(tmp_path / "done")], tmp_path, script=script, **variables))
    outcomes = ended(started)
    assert [code for code, _, _ in outcomes] == [0, 0] and time.monotonic() - began < 60, outcomes
    for rank in (0, 1):
        found = json.loads((tmp_path / f"done.{rank}").read_text())
        assert [code for code, _, _ in found] == [2, 2, 2, 2], found
        version, settings, data, disk = (err.splitlines()[-1].removeprefix("train-loop: ") for _, _, err in found)
        assert "and 1.15.99 on process 1 (beta); install the same on every host" in version
        assert settings.startswith("the configuration differs: run.seed is 0 on process 0 (alpha) and 7 on process 1 (")
        assert data.startswith("the data differs: ") and "on process 1 (beta); " in data
        assert disk.startswith("run.output_dir") and "is not the same folder on all hosts (beta lacks" in disk
    assert not (tmp_path / "alpha" / "runs" / "run" / "metrics.jsonl").exists()
