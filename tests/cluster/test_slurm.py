"""The scripts that people submit, on a real SLURM: queues, time limits, lost nodes."""

import functools
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.runs import Command, arguments_for, events
from tests.support.slurm import Slurm
from train_loop.checkpoint import storage
from train_loop.metrics.throughput import MEASURED

pytestmark = pytest.mark.slow

STEPS = 250
MEGABITS = 10  # a second, of the second node's cable: a step on both of them takes a quarter of one
MANY, ONE, SWEEP, SUBMIT = (f"scripts/slurm/{name}.sh" for name in ("many_nodes", "one_node", "sweep", "submit"))
# Nothing else of the scripts is changed.
OPTIONS = ["--partition=test", "--gres=none", "--cpus-per-task=1"]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    folder = Path(tempfile.mkdtemp(prefix="tl-slurm-"))  # short: a socket's name has at most 107 characters
    try:
        with Slurm(folder, TRAIN_LOOP_CACHE=str(folder / "cache")) as cluster:
            cluster.hosts.slow("n2", MEGABITS)
            yield cluster
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def make(corpus: Path, tokenizer_folder: Path) -> Callable[..., list[str]]:
    """A run whose steps take so long on two nodes, by what they send, that there is time to disturb it."""
    base = {"batch__sequences_per_step": 6, "batch__micro_batch_size": 2, "optimizer__learning_rate": 1e-3}
    base |= {"checkpoint__every": 10, "train__max_steps": STEPS, "evaluation__every": 100, "sample__prompts": "[]"}
    base |= {"run__reproducible": "bitwise", "run__timeout_seconds": 20}
    return functools.partial(arguments_for, corpus, tokenizer_folder, **base)


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in MEASURED} for line in lines]


def step_of(run: Path) -> int:
    try:
        return int(events(run, "step")[-1]["step"])
    except (FileNotFoundError, IndexError, ValueError):
        return 0


def log_of(tmp_path: Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in tmp_path.glob("*.out"))


def workers(processes: list[int]) -> list[psutil.Process]:
    """Those of some processes that train."""
    found = []
    for number in processes:
        try:
            process = psutil.Process(number)
            if "RANK" in process.environ() and "train_loop" in process.cmdline():
                found.append(process)
        except psutil.Error:  # it has ended meanwhile
            continue
    return found


class Job:
    """A job and its run."""

    def __init__(self, slurm: Slurm, number: str, run: Path) -> None:
        self.slurm, self.number, self.run = slurm, number, run

    def until_step(self, step: int, seconds: float = 60) -> None:
        began = time.monotonic()
        while step_of(self.run) < step:
            state = self.slurm.job(self.number)["JobState"]
            told = log_of(self.run.parent)
            assert state in ("RUNNING", "PENDING", "COMPLETING", "CONFIGURING"), (state, told)
            assert time.monotonic() - began < seconds, told
            time.sleep(0.2)

    def until_said(self, what: str, seconds: float = 60) -> None:
        """Wait until something stands in the job's log."""
        began = time.monotonic()
        while what not in (told := log_of(self.run.parent)):
            assert time.monotonic() - began < seconds, told
            time.sleep(0.2)

    def again(self, restarts: int, seconds: float = 60) -> None:
        """Wait until SLURM has put it back, and let it start at once."""
        self.put_back(restarts, seconds)
        self.slurm.hasten(self.number)
        self.slurm.wait(self.number, lambda job: job["JobState"] == "RUNNING", seconds)

    def put_back(self, restarts: int, seconds: float = 60) -> None:
        """Wait until SLURM has put it back."""

        def is_back(job: dict[str, str]) -> bool:
            return int(job["Restarts"]) == restarts and job["JobState"] in ("PENDING", "RUNNING")

        self.slurm.wait(self.number, is_back, seconds)


def test_a_run_survives_the_life_of_a_cluster(
    slurm: Slurm, make: Callable[..., list[str]], tmp_path: Path, command: Command
) -> None:
    """Prepared by a job of its own, a process lost, put back, cancelled, out of time, a node lost: no loss differs."""
    run = tmp_path / "run"
    arguments = make(run)
    options = [*OPTIONS, f"--output={tmp_path}/%x-%j.out"]

    # The preparation comes first, in a job that the training depends on.
    said = slurm.do("bash", SUBMIT, MANY, *arguments, SBATCH_OPTIONS=" ".join(options))
    prepared, number = re.findall(r"job (\d+)", said)
    job = Job(slurm, number, run)
    assert slurm.job(number)["Dependency"].startswith(f"afterok:{prepared}")
    job.until_step(15)
    assert slurm.job(prepared)["JobState"] == "COMPLETED"
    present = json.loads((run / "truth.json").read_text())["processes"]
    assert [each["host"] for each in present["each"]] == ["n1", "n2"]

    # A process is lost: the launchers of both nodes start theirs again, and the job stays where it is.
    (worker,) = workers(slurm.hosts.processes("n2"))
    worker.kill()
    job.until_said("resuming from")
    assert log_of(tmp_path).count("train-loop: lost process 1 (n2)") == 1
    job.until_step(20)
    assert slurm.job(number)["Restarts"] == "0"

    # Put back by hand.
    slurm.do("scontrol", "requeue", number)
    job.again(1)
    before = step_of(run)
    job.until_step(before + 5)

    # Cancelled for good: nothing puts it back, and it can be resumed.
    slurm.do("scancel", number)
    slurm.wait(number, lambda job: job["JobState"] == "CANCELLED" and "EndTime" in job)
    slurm.wait_idle()
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    found, damaged = storage.newest(run / "checkpoints")
    assert found is not None and found.step == step_of(run) and not damaged

    # Out of time: two minutes after the start, with a signal two minutes ahead. It comes when SLURM looks, twice a
    # minute; so that there is a step before it does, the limit is set only then.
    limit = ["--time=10", "--signal=B:USR1@119", "--nodes=1-2"]
    number = slurm.do("sbatch", "--parsable", *options, *limit, MANY, *arguments).strip()
    job = Job(slurm, number, run)
    job.until_step(found.step + 5)
    slurm.do("scontrol", "update", f"JobId={number}", "TimeLimit=2")
    job.put_back(1)
    slurm.do("scontrol", "update", f"JobId={number}", "TimeLimit=10")
    job.again(1)
    assert "the time is nearly up; back into the queue" in log_of(tmp_path)
    assert found.step + 5 <= step_of(run) < STEPS

    # A node is lost. The job goes on with the other one.
    job.until_step(step_of(run) + 12)
    slurm.fail_node("n2")
    slurm.wait(number, lambda job: int(job["Restarts"]) == 2 or job["JobState"] not in ("RUNNING", "COMPLETING"))
    lost = step_of(run)
    job.again(2)
    done = slurm.wait(number, lambda job: job["JobState"] not in ("RUNNING", "PENDING", "COMPLETING"), 120)
    assert done["JobState"] == "COMPLETED", log_of(tmp_path)
    assert lost < STEPS and json.loads((run / "status.json").read_text())["state"] == "complete"

    present = json.loads((run / "truth.json").read_text())["processes"]
    assert [each["host"] for each in present["each"]] == ["n1"]
    slurm.start_node("n2")

    assert log_of(tmp_path).count("resuming from") == 5
    whole = tmp_path / "whole"
    assert command("train", *make(whole)) == 0  # on one process: with bitwise, that makes no difference
    assert metrics(run) == metrics(whole) and step_of(run) == STEPS
    exported = [(folder / "model" / "model.safetensors").read_bytes() for folder in (run, whole)]
    assert exported[0] == exported[1]


def test_a_sweep_trains_one_run_for_each_value(slurm: Slurm, make: Callable[..., list[str]], tmp_path: Path) -> None:
    arguments = make(tmp_path / "unused", train__max_steps=3, optimizer__learning_rate=None)
    place = arguments.index("--run.output_dir")
    del arguments[place : place + 2]
    set_ = {"VALUES": "1e-3 2e-3", "SWEEP": str(tmp_path / "sweep")}
    options = [*OPTIONS, "--array=0-1", f"--output={tmp_path}/%x-%A-%a.out"]
    number = slurm.do("sbatch", "--parsable", *options, SWEEP, *arguments, **set_).strip()
    for task in ("0", "1"):
        done = slurm.wait(f"{number}_{task}", lambda job: job["JobState"] not in ("RUNNING", "PENDING", "COMPLETING"))
        assert done["JobState"] == "COMPLETED", log_of(tmp_path)
    rates = {}
    for value in ("1e-3", "2e-3"):
        run = tmp_path / "sweep" / f"optimizer.learning_rate-{value}"
        assert json.loads((run / "status.json").read_text())["state"] == "complete"
        rates[value] = events(run, "step")[0]["learning_rate"]
    assert rates == {"1e-3": 1e-3, "2e-3": 2e-3}


def test_tasks_of_a_step_train_together(slurm: Slurm, make: Callable[..., list[str]], tmp_path: Path) -> None:
    """Without `accelerate launch`, and without a variable of torch's or Accelerate's."""
    train = ("env", "-u", "ACCELERATE_USE_CPU", "python", "-m", "train_loop", "train")
    slurm.do("srun", "--ntasks=2", "--nodes=2", *train, *make(tmp_path / "run", train__max_steps=2))
    found = json.loads((tmp_path / "run" / "truth.json").read_text())["processes"]
    assert [each["host"] for each in found["each"]] == ["n1", "n2"] and found["parallelism"] == "DDP"


def test_a_mistake_goes_back_into_no_queue(slurm: Slurm, make: Callable[..., list[str]], tmp_path: Path) -> None:
    arguments = make(tmp_path / "run", data__files="nowhere.txt")
    number = slurm.do("sbatch", "--parsable", *OPTIONS, f"--output={tmp_path}/%x-%j.out", ONE, *arguments).strip()
    done = slurm.wait(number, lambda job: job["JobState"] not in ("RUNNING", "PENDING", "COMPLETING"))
    assert done["JobState"] == "FAILED" and done["Restarts"] == "0"
    assert "no such file" in log_of(tmp_path) and "is not started yet" in log_of(tmp_path)
