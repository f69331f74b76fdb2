"""Starts a command on several real processes of this machine, as a user would."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence


def launch(processes: int, arguments: Sequence[str], seconds: float = 300) -> subprocess.CompletedProcess[str]:
    """`accelerate launch ... -m train_loop ARGUMENTS` with gloo; what it printed and its exit code.

    `--multi_gpu` together with ACCELERATE_USE_CPU is how Accelerate starts several processes on a CPU.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    command += ["--main_process_port", str(port), "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", *(["--multi_gpu"] if processes > 1 else ["--cpu"])]
    return subprocess.run(
        [*command, "-m", "train_loop", *arguments],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )
