"""Devices and processes: what `accelerate launch` started, checked against what it was asked for.

Some ways of launching quietly give something else than they say: one process instead of two, two that each believe to
be alone, plain data parallelism where FSDP was meant. All of them stop here, with the command that does it.
"""

import atexit
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from train_loop import compat, devices
from train_loop.config import RunConfig
from train_loop.errors import InputError, TrainingError, one_line
from train_loop.peers import Peers

Result = TypeVar("Result")

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.01, 0.5


def start(run: RunConfig, peers: Peers, project_dir: Path | None = None) -> Accelerator:
    """The processes and devices of a run.

    Raises:
        InputError: where the launcher or the hardware gives something else than was asked for.
        LostError: where the processes don't reach each other in time.
    """
    _check_launcher(run)
    if run.reproducible == "bitwise":
        _compute_reproducibly()
    # Each process builds the whole model from the same numbers; nobody has to wait for the first one's weights.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    with peers.reaching(), compat.stdout_kept_clean():
        try:
            accelerator = Accelerator(
                mixed_precision=run.mixed_precision,
                log_with=run.log_with or None,
                project_dir=None if project_dir is None else str(project_dir),
                # `train_step` accumulates by itself; a number from the launcher would divide its gradients once more.
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
                kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=run.timeout_seconds))],
            )
        except (ValueError, ImportError, NotImplementedError) as error:
            raise InputError(f"accelerate: {one_line(error)}") from None
        _check_processes(accelerator, run)
        if accelerator.num_processes > 1:
            reached = accelerator.reduce(torch.ones(1, device=accelerator.device)).item()
            assert reached == accelerator.num_processes
    if accelerator.num_processes > 1:
        # The process group has to outlive the model. Freed together with DDP's reducer, as its last owner, gloo's group
        # joins its threads while holding the interpreter's lock, for which one of them may be waiting: a run would
        # hang after its last line (github.com/pytorch/pytorch/issues/56297). Freed by Python, it lets go of the lock.
        atexit.register(lambda group: None, torch.distributed.group.WORLD)
    if accelerator.is_fsdp2:
        plugin = accelerator.state.fsdp_plugin
        if plugin.mixed_precision_policy is not None:
            # Accelerate would round gradients to half precision before adding them up over the processes, and the
            # loss, which is an output, with them.
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=plugin.mixed_precision_policy.param_dtype, reduce_dtype=torch.float32
            )
    return accelerator


def asked_for() -> int | None:
    """How many processes the launcher was asked to start; None where there is no launcher."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    try:
        arguments = _after_launch(psutil.Process(os.getppid()).cmdline())
    except psutil.Error:
        return None
    if arguments is None:
        return None
    # Late, since it takes a while to load: how `accelerate launch` itself reads its command line and files.
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    try:
        given = launch_command_parser().parse_args(arguments)
        if given.num_processes is None and (given.config_file or os.path.isfile(default_config_file)):
            return int(load_config_from_file(given.config_file).num_processes)
        return given.num_processes
    except (OSError, ValueError, TypeError, SystemExit):
        return None


def _after_launch(command: list[str]) -> list[str] | None:
    """The arguments of a command line that is `accelerate launch` in one of its spellings."""
    for number, part in enumerate(command[:4]):
        name = Path(part).name
        if name in ("accelerate-launch", "accelerate.commands.launch"):
            return command[number + 1 :]
        if name == "launch" and number and Path(command[number - 1]).name == "accelerate":
            return command[number + 1 :]
    return None


def _check_launcher(run: RunConfig) -> None:
    """Refuse what the launcher asks for through its variables and a run cannot or must not have."""

    def asked(name: str) -> str:
        return os.environ.get(name, "").lower()

    precision = asked("ACCELERATE_MIXED_PRECISION")
    if precision not in ("", "no", run.mixed_precision):
        raise InputError(
            f"the launcher asks for mixed precision {precision}, but run.mixed_precision is {run.mixed_precision}; "
            f"say --run.mixed_precision {precision}, or launch with --mixed_precision no"
        )
    if asked("ACCELERATE_DYNAMO_BACKEND") not in ("", "no"):
        raise InputError(
            "the launcher asks for torch.compile, which would rename the weights; "
            "launch with --dynamo_backend no and say --model.compile true"
        )
    for name, what in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")):
        if asked(name) == "true":
            raise InputError(
                f"the launcher asks for {what}; train_loop shards with FSDP2 (configs/accelerate/fsdp2.yaml)"
            )
    for name in ("TP_SIZE", "CP_SIZE", "SP_SIZE"):
        if int(asked(f"PARALLELISM_CONFIG_{name}") or 1) > 1:
            raise InputError(
                f"the launcher asks for {name.lower()} > 1; train_loop has data parallelism only (DDP, FSDP2)"
            )
    if asked("ACCELERATE_USE_FSDP") == "true":
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise InputError(
                "the launcher asks for FSDP version 1; set fsdp_version: 2 (configs/accelerate/fsdp2.yaml)"
            )
        if run.reproducible == "bitwise":
            raise InputError(
                "run.reproducible bitwise does not go with FSDP2, which adds gradients up in an order of its own; "
                "launch with --multi_gpu, or say --run.reproducible no"
            )


def _check_processes(accelerator: Accelerator, run: RunConfig) -> None:
    """Refuse devices and processes that are not what was asked for."""
    wanted, found = asked_for() or 1, accelerator.num_processes
    on_cpu = accelerator.device.type == "cpu"
    if wanted > found:
        start_them = f"accelerate launch --multi_gpu --num_processes {wanted} -m train_loop ..."
        raise InputError(
            f"asked for {wanted} processes, but each works alone ({found} present); on a CPU start them with: "
            f"ACCELERATE_USE_CPU=true {start_them}"
            if on_cpu
            else f"asked for {wanted} processes, but only {found} present; start them with: {start_them}"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not accelerator.is_fsdp2:
        raise InputError(
            "FSDP2 was asked for, but Accelerate does not shard "
            + ("on a CPU" if on_cpu else f"one process ({accelerator.distributed_type.value})")
            + f"; use plain data parallelism: {'ACCELERATE_USE_CPU=true ' if on_cpu else ''}accelerate launch "
            f"--multi_gpu --num_processes {found} -m train_loop ..."
        )
    if accelerator.distributed_type == DistributedType.XLA:
        raise InputError("train_loop does not run on TPUs; use GPUs or CPUs")
    device, name = accelerator.device, devices.name(accelerator.device)
    if run.reproducible == "bitwise" and not devices.has_float64(device):
        raise InputError(
            f"run.reproducible bitwise needs 64-bit numbers, which this device ({name}) does not have; use the CPU "
            "(ACCELERATE_USE_CPU=true)"
        )
    if run.mixed_precision not in (present := devices.precisions(device)):
        raise InputError(
            f"run.mixed_precision {run.mixed_precision}: this device ({name}) does not have it; "
            f"it has {' | '.join(present)}"
        )


def _compute_reproducibly() -> None:
    """Have every kernel give the same bits for the same input, wherever it runs."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # kernels on a CPU split their sums by thread


def together(accelerator: Accelerator, purpose: str, work: Callable[[], Result]) -> Result:
    """Do some work of unknown length on every process, and go on when all have done it.

    Nobody waits in a collective, which would time out after minutes: processes look into the launcher's key-value
    store now and then. A mistake on any of them is raised on all.

    Args:
        accelerator: the processes.
        purpose: a name for the work, the same on all processes.
        work: what to do; its result is returned.

    Raises:
        InputError, TrainingError: where `work` raised one on any process.
    """
    if accelerator.num_processes == 1:
        return work()
    store = torch.distributed.distributed_c10d._get_default_store()
    processes = accelerator.num_processes
    mistake, kind, result = "", "", None
    try:
        result = work()
    except (InputError, TrainingError) as error:
        mistake, kind = str(error), type(error).__name__
        if os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):  # which of the hosts?
            mistake += f" (on {socket.gethostname()})"
    arrived = store.add(f"{purpose}/done", 0)
    round_ = arrived // processes  # the same work may be done again later
    if mistake:
        store.set(f"{purpose}/{round_}/mistake", json.dumps([kind, mistake]))
    store.add(f"{purpose}/done", 1)
    pause = _FIRST_PAUSE_SECONDS
    while store.add(f"{purpose}/done", 0) < (round_ + 1) * processes:
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
    if store.check([f"{purpose}/{round_}/mistake"]):
        kind, mistake = json.loads(store.get(f"{purpose}/{round_}/mistake"))
        raise InputError(mistake) if kind == InputError.__name__ else TrainingError(mistake)
    return result  # type: ignore[return-value]


class Board:
    """A board in the launcher's key-value store, for threads that must not take part in the training's collectives.

    Args:
        accelerator: the processes.
        topic: a name that is used once.
    """

    def __init__(self, accelerator: Accelerator, topic: str) -> None:
        self.store = torch.distributed.distributed_c10d._get_default_store()
        self.keys = [f"{topic}/{process}" for process in range(accelerator.num_processes)]

    def write(self, process: int, text: str) -> None:
        """Put up a process's text."""
        self.store.set(self.keys[process], text)

    def read_all(self, pause: Callable[[float], bool], seconds: float) -> list[str]:
        """Wait for the texts of all processes and take them off.

        Args:
            pause: waits for that many seconds; True ends the waiting.
            seconds: between two looks.

        Raises:
            OSError: when the waiting ended before they were there.
        """
        while not self.store.check(self.keys):
            if pause(seconds):
                raise OSError("another process did not answer")
        texts = [self.store.get(key).decode() for key in self.keys]
        for key in self.keys:
            self.store.delete_key(key)
        return texts


def from_main(accelerator: Accelerator, value: Result) -> Result:
    """The main process's value, on all of them."""
    return broadcast_object_list([value])[0] if accelerator.num_processes > 1 else value


def reduce_exactly(accelerator: Accelerator, tensor: torch.Tensor, operation: Literal["sum", "max"]) -> torch.Tensor:
    """The sum or maximum of a float64 tensor over all processes, also where their devices have no float64.

    It lies on the CPU there, and is sent as Python's numbers, which are 64-bit ones.
    """
    if accelerator.num_processes == 1:
        return tensor
    if tensor.device.type == accelerator.device.type:  # processes on a CPU count theirs: cpu:0, cpu:1
        operations = {"sum": torch.distributed.ReduceOp.SUM, "max": torch.distributed.ReduceOp.MAX}
        torch.distributed.all_reduce(tensor, operations[operation])
        return tensor
    everyones = torch.tensor(gather_object([tensor.tolist()]), dtype=torch.float64)
    return everyones.sum(0) if operation == "sum" else everyones.amax(0)


def check_same(accelerator: Accelerator, what: str, value: object, cure: str) -> None:
    """Refuse processes that don't agree on something they must share.

    Raises:
        InputError: on all of them, naming two that differ.
    """
    if accelerator.num_processes == 1:
        return
    values = gather_object([(str(value), socket.gethostname(), accelerator.process_index)])
    first, first_host, _ = values[0]
    for other, host, process in values:
        if other != first:
            raise InputError(
                f"{what} differs: {first} on process 0 ({first_host}), {other} on process {process} ({host}); {cure}"
            )


def describe(accelerator: Accelerator) -> list[dict[str, Any]]:
    """Host, device and CPU threads of every process, in their order; all must call this."""
    mine = {
        "process": accelerator.process_index,
        "host": socket.gethostname(),
        "device": str(accelerator.device),
        "name": devices.name(accelerator.device),
        "threads": torch.get_num_threads(),
    }
    return gather_object([mine]) if accelerator.num_processes > 1 else [mine]


def prepare_to_evaluate(accelerator: Accelerator, objective: nn.Module) -> nn.Module:
    """A module that is not trained, prepared: sharded where FSDP2 is used, else as it is, with mixed precision."""
    if accelerator.is_fsdp2:  # Accelerate shards a module together with its optimizer only
        prepared, _ = accelerator.prepare(objective, torch.optim.SGD(objective.parameters(), lr=0.0))
        return prepared
    return accelerator.prepare_model(objective, evaluation_mode=True)


@contextmanager
def whole(accelerator: Accelerator, objective: nn.Module) -> Iterator[None]:
    """Within this context the parts of a model may be called by themselves, also where FSDP2 sharded them.

    Outside of the objective there is no mixed precision, without which FlashAttention cannot run.

    Its layers gather their weights when they are called; what belongs to no layer (embeddings, head) does so only when
    the whole is called, so it is gathered here. All processes must do the same within.
    """
    flash = "flash" in str(accelerator.unwrap_model(objective).model.config._attn_implementation)
    with accelerator.autocast() if flash else nullcontext():
        if not isinstance(objective, FSDPModule):
            yield
            return
        objective.unshard()
        try:
            yield
        finally:
            objective.reshard()
