"""What launchers say in variables of their own, said in torch's."""

import os
from typing import Any

import pytest

from tests.support.runs import Command
from train_loop import environment, launchers
from train_loop.errors import InputError

TORCHS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# As SLURM 24 sets them in the second of two tasks, without those that nobody reads; SLURM_NTASKS is what a script
# would read that does not know better.
JOB = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NODELIST": "n[1-2]"}
BATCH = JOB | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_LAUNCH_NODE_IPADDR": "10.77.0.1"}
SHELL = BATCH | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "n1"}
STEP = JOB | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "n[1-2]"}
STEP |= {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "1"}
OPEN_MPI = {f"OMPI_COMM_WORLD_{name}": "2" for name in ("SIZE", "LOCAL_SIZE")}
OPEN_MPI |= {f"OMPI_COMM_WORLD_{name}": "1" for name in ("RANK", "LOCAL_RANK")}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets all variables of this process, which then has no others; returns torch's after they were translated."""

    def tell(variables: dict[str, str]) -> dict[str, str]:
        monkeypatch.setattr(os, "environ", dict(variables))
        environment.check()
        launchers.check()
        return {name: os.environ[name] for name in TORCHS if name in os.environ}

    return tell


@pytest.mark.parametrize(
    "alone",
    [
        {},
        JOB,  # salloc, whose shell runs where it was called
        BATCH,
        SHELL,  # salloc with an interactive step: SLURM_NTASKS counts what srun may start in it
        BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "n1"},  # srun of one task
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        {"PMI_RANK": "0", "PMI_SIZE": "1"},
        {"JOB_COMPLETION_INDEX": "3"},  # an indexed Job of independent runs
        {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "auto"},
    ],
)
def test_one_process_is_alone(told: Any, alone: dict[str, str]) -> None:
    assert told(alone) == {}


@pytest.mark.parametrize("many", [STEP, OPEN_MPI, HYDRA, {"JOB_COMPLETION_INDEX": "3"}])
def test_a_world_of_one_overrides_every_launcher(told: Any, many: dict[str, str]) -> None:
    assert told(many | {"WORLD_SIZE": "1", "RANK": "0"}) == {"WORLD_SIZE": "1", "RANK": "0"}


def test_several_tasks_of_a_step(told: Any) -> None:
    found = told(STEP)
    assert 10_000 <= int(found.pop("MASTER_PORT")) < 30_000
    assert found == {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "n1"}
    # Every task finds the same port; other steps and jobs find others.
    ports = [told(STEP | change)["MASTER_PORT"] for change in ({"SLURM_PROCID": "0"}, {}, {"SLURM_STEP_ID": "1"})]
    assert ports[0] == ports[1] != ports[2] != told(STEP | {"SLURM_JOB_ID": "2"})["MASTER_PORT"]
    own = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"}
    assert {**told(STEP | own), **own} == told(STEP | own)
    # What many job scripts export.
    assert told(STEP | {"RANK": "1", "WORLD_SIZE": "2"})["MASTER_ADDR"] == "n1"
    assert told(STEP | {"WORLD_SIZE": "2"})["RANK"] == "1"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("n[07,09-11]", "n07"),
        ("alpha,beta", "alpha"),
        ("rack2n[07-11,13],login", "rack2n07"),
        ("rack[2,4]n[07-11]", "rack2n07"),
        ("gpu-a-1,gpu-a-[3-4]", "gpu-a-1"),
        ("n[001-128].site", "n001.site"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert launchers.first_host(nodes) == first


def test_mpi(told: Any) -> None:
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    local = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    two = {"RANK": "1", "WORLD_SIZE": "2"}
    assert told(OPEN_MPI) == two | local | here
    assert told({name.replace("OMPI", "MV2"): value for name, value in OPEN_MPI.items()}) == two | local | here
    on_two_hosts = HYDRA | {"MASTER_ADDR": "n1"}
    assert told(on_two_hosts) == {"RANK": "3", "WORLD_SIZE": "4"} | local | here | {"MASTER_ADDR": "n1"}
    # In a job of SLURM, where mpirun's own helpers are tasks of a step; and with srun --mpi=pmi2.
    assert told(OPEN_MPI | STEP | {"SLURM_PROCID": "0"}) == two | local | here
    assert told({"PMI_RANK": "1", "PMI_SIZE": "2"} | STEP)["MASTER_ADDR"] == "n1"


def test_an_indexed_job_with_torchs_variables(told: Any) -> None:
    template = {"JOB_COMPLETION_INDEX": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "run-0.run", "MASTER_PORT": "29500"}
    expected = template | {"RANK": "1"}
    assert told(template) == {name: expected[name] for name in TORCHS if name in expected}


KUBEFLOW = {"MASTER_ADDR": "run-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "2", "RANK": "1"}
TORCHRUN = KUBEFLOW | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}


def test_torchs_own_variables_stay(told: Any) -> None:
    assert told(KUBEFLOW | {"PET_NNODES": "2", "PET_NODE_RANK": "1"}) == KUBEFLOW
    expected = {name: value for name, value in TORCHRUN.items() if name in TORCHS}
    for outer in ({}, STEP, OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "3"}, {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "2"}):
        assert told(TORCHRUN | outer) == expected


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RANK": "1"}, "RANK is 1, but WORLD_SIZE is not set"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK is 0, but WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "but MASTER_ADDR is not set; export the first host's name"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": ""}, "but MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a"}, "but MASTER_PORT is not set; export a free port"),
        (KUBEFLOW | {"RANK": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
        (KUBEFLOW | {"LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE is 4, but WORLD_SIZE is 2"),
        (KUBEFLOW | {"MASTER_PORT": "http"}, "MASTER_PORT: expected a whole number from 0 to 65535, got 'http'"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "two"}, "OMPI_COMM_WORLD_SIZE: expected a whole number"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE is 2, but OMPI_COMM_WORLD_RANK is not set"),
        ({"MV2_COMM_WORLD_RANK": "1"}, "MV2_COMM_WORLD_RANK is 1, but MV2_COMM_WORLD_SIZE is not set"),
        (HYDRA, "WORLD_SIZE is 4, but MASTER_ADDR is not set"),
        (OPEN_MPI | {"WORLD_SIZE": "4"}, "WORLD_SIZE is 4, but RANK is not set"),
        (STEP | {"SLURM_PROCID": "x"}, "SLURM_PROCID: expected a whole number"),
        ({"JOB_COMPLETION_INDEX": "2", "WORLD_SIZE": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
        ({"PET_NNODES": "1:2"}, "PET_NNODES asks torchrun for 2 hosts, but torchrun did not start this process"),
        (KUBEFLOW | {"PET_NPROC_PER_NODE": "8"}, "asks torchrun for 8 processes on each host, but torchrun did not"),
    ],
)
def test_half_set_and_contradictory_variables_are_refused(told: Any, variables: dict[str, str], expected: str) -> None:
    with pytest.raises(InputError, match="environment variable") as error:
        told(variables)
    assert expected in str(error.value) and "; " in str(error.value)


def test_a_run_with_half_set_variables_ends_in_one_line(
    command: Command, settings: Any, told: Any, tmp_path: Any
) -> None:
    told({"HOME": str(tmp_path)} | {name: os.environ[name] for name in ("HF_HOME", "TRAIN_LOOP_CACHE", "PATH")})
    os.environ["WORLD_SIZE"] = "2"
    assert command("train", *settings()) == 2
    assert "RANK is not set" in command.err and command.err.count("\n") == 1
    assert not (tmp_path / "run").exists()
