"""A real SLURM on this machine: a controller and two nodes, each a host of its own, with their daemons."""

import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from tests.support.hosts import Hosts, need
from tests.support.launch import ON_CPU, ROOT, environment

CONTROL, NODES = "control", ("n1", "n2")
PROGRAMS = ("ip", "tc", "unshare", "munged", "slurmctld", "slurmd", "sbatch", "pkill")

# One second here, a few there: on a real cluster these are minutes.
CONFIGURATION = """
ClusterName=train_loop
SlurmctldHost=control
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/linear
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0,default_queue_depth=20
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobRequeue=1
ReturnToService=2
SlurmdTimeout=6
KillWait=15
MessageTimeout=5
OverTimeLimit=0
NodeName={nodes} CPUs={cpus} State=UNKNOWN
PartitionName=test Nodes={nodes} Default=YES MaxTime=INFINITE OverSubscribe=EXCLUSIVE State=UP
"""


class Slurm:
    """A cluster; a context that starts its daemons and leaves none behind.

    Args:
        folder: of its files, short enough for a socket's name.
        variables: of the environment that jobs are submitted from.
    """

    def __init__(self, folder: Path, **variables: str) -> None:
        need(PROGRAMS)
        self.folder = folder
        self.hosts = Hosts([*NODES, CONTROL])
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        set_ = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": path, "PROCESSES_PER_NODE": "1"}
        self.environment = environment(ON_CPU | set_ | variables)

    def __enter__(self) -> "Slurm":
        for name in ("munge", "state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        text = CONFIGURATION.format(folder=self.folder, nodes=",".join(NODES), cpus=os.cpu_count())
        (self.folder / "slurm.conf").write_text(text)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self.hosts.__enter__()
        try:
            munge = self.folder / "munge"
            names = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
            options = [f"--{option}={munge / name}" for option, name in names.items()]
            self._daemon(CONTROL, "munged", "--foreground", "--force", *options)
            self._until(lambda: (munge / "socket").exists(), "munged", 20)
            self._daemon(CONTROL, "slurmctld", "-D", "-c")
            for node in NODES:
                self.start_node(node)
            self.wait_idle()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hosts.__exit__(kind, error, trace)

    def _daemon(self, host: str, *command: object) -> None:
        with open(self.folder / f"{host}.out", "ab") as log:
            self.hosts.start(host, command, env=self.environment, stdout=log, stderr=log, cwd=self.folder)

    def start_node(self, node: str) -> None:
        """Start a node's daemon."""
        self._daemon(node, "slurmd", "-D", "-N", node)

    def fail_node(self, node: str) -> None:
        """A node dies: its daemon and everything on it."""
        self.hosts.kill(node)

    def do(self, *command: object, **variables: str) -> str:
        """What a command of SLURM prints."""
        return self.hosts.run(CONTROL, *command, env=self.environment | variables, cwd=ROOT)

    def states(self) -> dict[str, str]:
        """State of each node."""
        try:
            lines = self.do("sinfo", "--Node", "--noheader", "--format=%N %t").split("\n")
        except AssertionError:  # the controller is not up yet
            return {}
        return dict(line.split() for line in lines if line)

    def wait_idle(self) -> None:
        """Wait until both nodes are there and have nothing to do."""
        self._until(lambda: self.states() == dict.fromkeys(NODES, "idle"), "the nodes", 40)

    def job(self, number: str) -> dict[str, str]:
        """What SLURM says of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.do("scontrol", "--oneliner", "show", "job", number)))

    def wait(self, number: str, condition: Callable[[dict[str, str]], bool], seconds: float = 90) -> dict[str, str]:
        """Wait for something of a job."""
        self._until(lambda: condition(self.job(number)), f"job {number}", seconds)
        return self.job(number)

    def hasten(self, number: str) -> None:
        """SLURM lets a job that was put back wait for up to two minutes; here it need not."""
        if self.job(number)["JobState"] == "PENDING":
            self.do("scontrol", "update", f"JobId={number}", "StartTime=now")

    def _until(self, condition: Callable[[], bool], what: str, seconds: float) -> None:
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > seconds:
                logs = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
                tails = "\n".join(f"== {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs)
                raise AssertionError(f"{what}: nothing for {seconds} s\n{tails}")
            time.sleep(0.2)
