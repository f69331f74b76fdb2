"""Every way of launching gives what it says, or stops with the command that does."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import forked
from tests.support.launch import (
    CONFIGS,
    ON_CPU,
    ROOT,
    command,
    environment,
    free_port,
    launchers,
    processes,
    run,
    under,
)
from tests.support.runs import Command, events
from train_loop.config.load import config_from_arguments
from train_loop.distributed import launch

Settings = Callable[..., list[str]]
CURE = "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 -m train_loop"


def complaints(result: subprocess.CompletedProcess[str]) -> list[str]:
    assert result.returncode != 0 and "Traceback" not in result.stderr.split("train-loop: ")[0]
    return [line for line in result.stderr.splitlines() if "train-loop: " in line]


def of_two(folder: Path) -> str | None:
    """The parallelism of a run that was asked to have two processes; None where it did not have them."""
    found = json.loads((folder / "truth.json").read_text())["processes"]
    return str(found["parallelism"]) if found["asked"] == found["present"] == 2 else None


@pytest.mark.parametrize(
    ("launcher", "variables", "expected"),
    [
        (["--cpu", "--num_processes", "2"], {}, CURE),
        (["--config_file", "MULTI_CPU"], {}, CURE),
        (["--multi_gpu", "--num_processes", "2"], {}, CURE),
        (["--config_file", str(CONFIGS / "fsdp2.yaml")], ON_CPU, "FSDP2 was asked for, but Accelerate does not shard"),
    ],
    ids=["--cpu", "MULTI_CPU", "--multi_gpu alone", "FSDP2"],
)
def test_a_launch_that_would_not_do_what_it_says_stops(
    settings: Settings, tmp_path: Path, launcher: list[str], variables: dict[str, str], expected: str
) -> None:
    on_cpu = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_CPU", "use_cpu": True}
    file = tmp_path / "accelerate.yaml"
    file.write_text(yaml.safe_dump(on_cpu | {"num_processes": 2, "num_machines": 1, "mixed_precision": "no"}))
    launcher = [str(file) if part == "MULTI_CPU" else part for part in launcher]
    result = run(launcher, ["train", *settings(train__max_steps=2)], **variables)
    if result.returncode == 0:  # two processes on a CPU, taken for what they are
        assert of_two(tmp_path / "run") == ("FSDP2" if "FSDP2" in expected else "DDP")
        return
    found = complaints(result)
    assert len(found) == 1 and expected in found[0], result.stderr
    assert not (tmp_path / "run").exists() and not result.stdout


def test_torchrun_starts_a_run_also_where_there_are_only_cpus(settings: Settings, tmp_path: Path) -> None:
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    arguments = [*start, "-m", "train_loop", "train", *settings(train__max_steps=3)]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=ROOT, env=environment({}))
    assert result.returncode == 0, result.stderr
    assert of_two(tmp_path / "run") == "DDP"


def told_by(launcher: str, rank: int, port: int) -> dict[str, str]:
    """All that a launcher tells one of two processes on this machine; nothing of Accelerate's."""
    number, master = str(rank), {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if launcher == "srun":  # it also derives address and port: those of tests/test_launchers.py
        job = {"SLURM_JOB_ID": str(port), "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "localhost"}
        step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
        return job | step | {"SLURM_PROCID": number, "SLURM_LOCALID": number}
    if launcher == "PyTorchJob":
        return master | {"WORLD_SIZE": "2", "RANK": number, "PET_NNODES": "2", "PET_NODE_RANK": number}
    if launcher == "JobSet":
        return master | {"WORLD_SIZE": "2", "JOB_COMPLETION_INDEX": number}
    if launcher == "Open MPI":
        names = {"RANK": number, "SIZE": "2", "LOCAL_RANK": number, "LOCAL_SIZE": "2"}
        return {f"OMPI_COMM_WORLD_{name}": value for name, value in names.items()} | {"MASTER_PORT": str(port)}
    return {"PMI_RANK": number, "PMI_SIZE": "2", "MPI_LOCALRANKID": number, "MPI_LOCALNRANKS": "2"} | {
        "MASTER_PORT": str(port)
    }


def test_any_launcher_starts_a_run(command: Command, settings: Settings, tmp_path: Path) -> None:
    """With nothing but its own variables; the losses are those of one process."""
    once = {"train__max_steps": 2, "batch__micro_batch_size": 2, "run__reproducible": "bitwise"}
    assert command("train", *settings(run__output_dir=tmp_path / "alone", **once)) == 0
    expected = [event["loss"] for event in events(tmp_path / "alone", "step")]
    for launcher in ("srun", "PyTorchJob", "JobSet", "Open MPI", "Hydra"):
        port, folder = free_port(), tmp_path / launcher
        told = [told_by(launcher, rank, port) for rank in (0, 1)]
        (outcome,) = under(told, [["train", *settings(run__output_dir=folder, **once)]])
        assert outcome.codes == [0, 0], (launcher, outcome.err)
        assert of_two(folder) == "DDP" and outcome.out.count("perplexity") == 1
        assert [event["loss"] for event in events(folder, "step")] == expected, launcher


@pytest.mark.parametrize(
    ("variables", "changes", "expected"),
    [
        ({}, {"run__mixed_precision": "fp16"}, "fp16: this device (CPU) does not support it; it supports no | bf16"),
        ({}, {"run__mixed_precision": "fp8"}, "fp8"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, "say --run.mixed_precision bf16, or launch with"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {}, "--model.compile true"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "asks for DeepSpeed; train_loop shards with FSDP2"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "Megatron-LM"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, {}, "set fsdp_version: 2"),
        ({"FSDP_VERSION": "2"}, {}, "FSDP_VERSION is set, but ACCELERATE_USE_FSDP is not true"),
        ({"ACCELERATE_USE_FSDP": "1", "FSDP_VERSION": "2"}, {}, "ACCELERATE_USE_FSDP is not true"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            {},
            "set fsdp_activation_checkpointing: false and say --model.activation_checkpointing full",
        ),
        ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, {}, "tp_size > 1"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
            {"run__reproducible": "bitwise"},
            "bitwise does not work with FSDP2",
        ),
        (
            {},
            {"run__reproducible": "bitwise", "run__mixed_precision": "fp16"},
            "does not work with run.mixed_precision",
        ),
        ({}, {"run__reproducible": "bitwise", "model__compile": "true"}, "does not work with model.compile"),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_line(
    command: Command,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    changes: dict[str, str],
    expected: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert command("train", *settings(**changes)) == 2
    assert expected in command.err and len(command.err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_number_of_accumulation_steps_from_the_launcher_divides_nothing(
    command: Command, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for number in ("1", "4"):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", number)
        folder = tmp_path / number
        assert command("train", *settings(run__output_dir=folder, train__max_steps=5)) == 0
        losses.append([(event["loss"], event["grad_norm"]) for event in events(folder, "step")])
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu", "gpus"])
def test_the_configurations_of_one_machine_start_two_processes(settings: Settings, tmp_path: Path, name: str) -> None:
    verify = name == "cpu"  # takes five seconds: once is enough
    arguments = settings(train__max_steps=3, export__verify=str(verify).lower())
    result = run(["--config_file", str(CONFIGS / f"{name}.yaml")], ["train", *arguments], **ON_CPU)
    assert result.returncode == 0, result.stderr
    # Several processes on a CPU have devices cpu:0, cpu:1, of which a process by itself knows nothing.
    assert ("exported model verified in a clean process" in result.stderr) == verify
    sheet = json.loads((tmp_path / "run" / "truth.json").read_text())
    assert sheet["processes"]["present"] == 2 and sheet["processes"]["parallelism"] == "DDP"


def two_hosts(tmp_path: Path, *arguments: list[str], module: str = "train_loop") -> list[tuple[int, str, str]]:
    """What a run on two hosts comes to: two launchers on this machine, each with a cache of its own, stand for them."""
    port = str(free_port())
    hosts = []
    for rank in (0, 1):
        launcher = ["--config_file", str(CONFIGS / "machines.yaml"), "--machine_rank", str(rank)]
        start = command([*launcher, "--num_processes", "2", "--main_process_ip", "127.0.0.1"], arguments[rank], module)
        start[start.index("--main_process_port") + 1] = port
        variables = environment(ON_CPU | {"TRAIN_LOOP_CACHE": str(tmp_path / f"cache-{rank}")})
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        hosts.append(subprocess.Popen(start, text=True, cwd=ROOT, env=variables, **pipes))
    said = [host.communicate(timeout=200) for host in hosts]
    return [(host.returncode, *each) for host, each in zip(hosts, said, strict=True)]


@pytest.mark.slow
def test_machines_without_a_shared_disk(settings: Settings, tmp_path: Path) -> None:
    arguments = ["train", *settings(train__max_steps=3)]
    first, second = two_hosts(tmp_path, arguments, arguments)
    assert first[0] == second[0] == 0, (first, second)
    assert "perplexity" in first[1] and second[1] == ""
    assert all((tmp_path / f"cache-{rank}" / "stores").is_dir() for rank in (0, 1))
    assert json.loads((tmp_path / "run" / "truth.json").read_text())["processes"]["present"] == 2
    assert len(events(tmp_path / "run", "step")) == 3


@pytest.mark.slow
def test_hosts_that_differ_are_told_apart(settings: Settings, tmp_path: Path, corpus: Path) -> None:
    """Three commands one after the other, in the same two processes."""
    few = json.dumps([f"{corpus}/{number:02d}.txt" for number in range(6)])
    nowhere = json.dumps([f"{corpus}/nowhere.txt"])
    changes: list[dict[str, Any]] = [{"optimizer__learning_rate": 1.0}, {"data__files": few}, {"data__files": nowhere}]
    todo = []
    for name, here in (("first", [{}, {}, {}]), ("second", changes)):
        todo.append([str(tmp_path / f"{name}.json"), str(tmp_path / "done")])
        Path(todo[-1][0]).write_text(json.dumps([["train", *settings(**each)] for each in here]))
    outcomes = two_hosts(tmp_path, *todo, module="tests.support.several")
    assert [code for code, _, _ in outcomes] == [0, 0], outcomes
    for rank in (0, 1):
        found = json.loads((tmp_path / f"done.{rank}").read_text())
        assert [code for code, _, _ in found] == [2, 2, 2], found
        for (_, _, err), expected in zip(
            found, ("the configuration differs", "the data differs", "no such file (on "), strict=True
        ):
            said = [line for line in err.splitlines() if "train-loop: " in line]
            assert len(said) == 1 and expected in said[0], err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_says_how_it_is_used(path: Path) -> None:
    """The command in its header names this file, a configuration that is there, and settings that there are."""
    lines = [line.removeprefix("#").strip() for line in path.read_text(encoding="utf-8").splitlines()]
    first = next(number for number, line in enumerate(lines) if "accelerate launch" in line)
    last = next(number for number, line in enumerate(lines) if number >= first and not line.endswith("\\"))
    parts = " ".join(line.rstrip("\\") for line in lines[first : last + 1]).split()
    assert parts[parts.index("--config_file") + 1] == f"configs/accelerate/{path.name}"
    arguments = parts[parts.index("train") + 1 :]
    assert (ROOT / arguments[1]).is_file()
    config_from_arguments(["--config", str(ROOT / arguments[1]), *arguments[2:]])


@pytest.fixture(scope="module")
def waited() -> dict[str, list[tuple[int, str]]]:
    """How two processes end that wait for each other, in each way of `waiting.py`; all at once: they mostly sleep."""
    ways = {what: launchers(2, processes(2), ON_CPU) for what in ("together", "barrier", "mistake")}
    with ThreadPoolExecutor(len(ways)) as pool:
        ended = pool.map(lambda way: forked.together("tests.support.waiting", way[:1], way[1], 100), ways.items())
        return dict(zip(ways, ended, strict=True))


def test_waiting_for_the_slowest_does_not_time_out(waited: dict[str, list[tuple[int, str]]]) -> None:
    """Collectives time out after two seconds here, and one process is busy for five, twice."""
    assert [(code, said.count(f"done by {rank}\n")) for rank, (code, said) in enumerate(waited["together"])] == [
        (0, 2),
        (0, 2),
    ], waited["together"]
    assert any(code and "imed out" in said for code, said in waited["barrier"]), waited["barrier"]


def test_a_mistake_on_one_host_is_everybodys(waited: dict[str, list[tuple[int, str]]]) -> None:
    for rank, (code, said) in enumerate(waited["mistake"]):
        assert code == 0 and said.count(f"process {rank}: a file is missing on this host\n") == 2, said


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("python /bin/accelerate launch --cpu --num_processes 2 -m train_loop train --num_processes 9", 2),
        ("/bin/accelerate launch --num_processes=3 train.py", 3),
        ("python -m accelerate.commands.launch --num_processes 4 -m train_loop", 4),
        ("accelerate-launch --config_file configs/accelerate/machines.yaml -m train_loop", 16),
        ("accelerate launch --config_file nowhere.yaml -m train_loop", None),
        ("accelerate config", None),
        ("bash -c train-loop train", None),
    ],
)
def test_what_the_launcher_was_asked_is_read_from_its_command_line(
    monkeypatch: pytest.MonkeyPatch, line: str, expected: int | None
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(launch.psutil.Process, "cmdline", lambda self: line.split())
    assert launch.asked_for() == expected


@pytest.mark.parametrize(
    ("bound", "variables", "expected"),
    [
        (64, {"LOCAL_WORLD_SIZE": "4"}, 8),  # of 64 hardware threads, torch uses 32
        (8, {"LOCAL_WORLD_SIZE": "4"}, 32),  # each process has cores of its own
        (64, {"LOCAL_WORLD_SIZE": "99"}, 1),
        (64, {"LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "3"}, 32),  # which torch has read
        (64, {}, 32),
    ],
)
def test_processes_of_a_host_share_its_cores(
    monkeypatch: pytest.MonkeyPatch, bound: int, variables: dict[str, str], expected: int
) -> None:
    threads = [32]
    monkeypatch.setattr(os, "environ", dict(variables))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(bound))
    monkeypatch.setattr(launch.torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(launch.torch, "set_num_threads", threads.append)
    launch._share_cores()
    assert threads[-1] == expected
    if "LOCAL_WORLD_SIZE" in variables:
        assert os.environ["OMP_NUM_THREADS"] == variables.get("OMP_NUM_THREADS", str(expected))


def test_without_a_launcher_nothing_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launch.asked_for() is None
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert launch.asked_for() == 3
    assert "ACCELERATE_USE_CPU" in os.environ
