"""Devices and processes: what a launcher started, checked against what it was asked to start.

Some ways of launching silently do something other than what they say: one process instead of two, two processes that
each believe they are alone, plain data parallelism instead of FSDP. All stop here, with the command that works.
"""

import atexit
import os
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from train_loop import compat, devices
from train_loop.config.schema import RunConfig
from train_loop.console import say
from train_loop.distributed import hsdp, shards
from train_loop.distributed.heartbeat import Heartbeat
from train_loop.errors import InputError, one_line


def start(run: RunConfig, heartbeat: Heartbeat, project_dir: Path | None = None) -> Accelerator:
    """The processes and devices of a run.

    Raises InputError if the launcher or the hardware provides something other than what was asked for; LostError if the
    processes don't reach each other in time.
    """
    _check_launcher(run)
    mesh = hsdp.mesh()
    # Without `cpu`, each of several processes would work alone where there are only CPUs.
    cpu = int(os.environ.get("WORLD_SIZE", "1")) > 1 and torch.accelerator.current_accelerator(True) is None
    if cpu or parse_flag_from_env("ACCELERATE_USE_CPU"):
        _share_cores()
    if run.reproducible == "bitwise":  # every kernel gives the same bits for the same input, wherever it runs
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(1)  # kernels on a CPU split their sums by thread
    # Each process builds the whole model from the same numbers, so none has to wait for the first one's weights.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    os.environ.setdefault("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")  # Accelerate's default gathers all at once
    with heartbeat.connecting(), compat.stdout_kept_clean():
        try:
            accelerator = Accelerator(
                cpu=cpu,
                parallelism_config=mesh,
                mixed_precision=_granted(run.mixed_precision),
                log_with=run.log_with or None,
                project_dir=None if project_dir is None else str(project_dir),
                # `train_step` accumulates by itself. A number from the launcher would divide its gradients again.
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
                kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=run.timeout_seconds))],
            )
        except (ValueError, ImportError, NotImplementedError) as error:
            if mesh is not None and PartialState().distributed_type == DistributedType.MULTI_CPU:
                raise _not_sharded() from None
            raise InputError(f"accelerate: {one_line(error)}") from None
        _check_processes(accelerator, run)
        if accelerator.num_processes > 1:
            reached = accelerator.reduce(torch.ones(1, device=accelerator.device)).item()
            assert reached == accelerator.num_processes
    if accelerator.num_processes > 1:
        # The process group has to outlive the model. If DDP's reducer is its last owner and frees it, gloo's group
        # joins its threads while it holds the interpreter's lock, and one of them may be waiting for that lock: a run
        # would hang after its last line (github.com/pytorch/pytorch/issues/56297). If Python frees it, it releases the
        # lock.
        atexit.register(lambda group: None, torch.distributed.group.WORLD)
    if accelerator.is_fsdp2 and (policy := accelerator.state.fsdp_plugin.mixed_precision_policy) is not None:
        # Accelerate would round gradients to half precision before adding them up over the processes, and also the
        # loss, because it is an output.
        policy = MixedPrecisionPolicy(param_dtype=policy.param_dtype, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    return accelerator


def _share_cores() -> None:
    """Let the processes of a host share its cores, unless the launcher or the user has said how many threads each has.

    Where each process is bound to cores of its own, as srun does, torch has counted them when it was loaded.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local == 1 or "OMP_NUM_THREADS" in os.environ:
        return
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) == os.cpu_count():
        torch.set_num_threads(max(1, torch.get_num_threads() // local))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # else Accelerate would choose, and say so


def _granted(precision: str) -> str:
    """The precision that a run gets: as asked, but fp32 instead of bf16 on a CPU that has no instructions for bf16."""
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or torch.accelerator.current_accelerator(True) is None
    if precision == "bf16" and on_cpu and not devices.cpu_computes_bf16():
        if os.environ.get("RANK", "0") == "0":
            say("careful: run.mixed_precision bf16: this CPU has no instructions for it, so all is computed in fp32")
        return "no"
    return precision


def asked_for() -> int | None:
    """How many processes the launcher was asked to start; None if there is no launcher."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    try:
        arguments = _after_launch(psutil.Process(os.getppid()).cmdline())
    except psutil.Error:
        arguments = None
    if arguments is None:
        return None
    # Read its command line and files as `accelerate launch` itself does. Imported here, because it loads slowly.
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
    """The arguments of a command line that is some form of `accelerate launch`; None for any other command."""
    for number, part in enumerate(command[:4]):
        name = Path(part).name
        split = name == "launch" and number and Path(command[number - 1]).name == "accelerate"
        if split or name in ("accelerate-launch", "accelerate.commands.launch"):
            return command[number + 1 :]
    return None


def _check_launcher(run: RunConfig) -> None:
    """Refuse what the launcher asks for in its environment variables, if a run can't or mustn't have it."""

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
            cure = "train_loop shards with FSDP2 (configs/accelerate/fsdp2.yaml)"
            raise InputError(f"the launcher asks for {what}; {cure}")
    for name in ("TP_SIZE", "CP_SIZE", "SP_SIZE"):
        if int(asked(f"PARALLELISM_CONFIG_{name}") or 1) > 1:
            only = "train_loop only has data parallelism (DDP, FSDP2, HSDP)"
            raise InputError(f"the launcher asks for {name.lower()} > 1; {only}")
    if asked("ACCELERATE_USE_FSDP") == "true":
        if os.environ.get("FSDP_VERSION", "1") != "2":
            cure = "set fsdp_version: 2 (configs/accelerate/fsdp2.yaml), or FSDP_VERSION=2"
            raise InputError(f"the launcher asks for FSDP version 1; {cure}")
        if asked("FSDP_ACTIVATION_CHECKPOINTING") == "true":  # github.com/huggingface/accelerate/issues/3897
            cure = "set fsdp_activation_checkpointing: false and say --model.activation_checkpointing full"
            raise InputError(f"the launcher asks for recomputation, which would draw other dropout masks; {cure}")
        if run.reproducible == "bitwise":
            raise InputError(
                "run.reproducible bitwise does not work with FSDP2, which adds up gradients in its own order; "
                "launch with --multi_gpu, or say --run.reproducible no"
            )
    elif asked("FSDP_VERSION"):
        cure = "set ACCELERATE_USE_FSDP=true, or unset FSDP_VERSION"
        raise InputError(f"environment variables: FSDP_VERSION is set, but ACCELERATE_USE_FSDP is not true; {cure}")


def _check_processes(accelerator: Accelerator, run: RunConfig) -> None:
    """Refuse devices and processes that are not what was asked for."""
    wanted, found = asked_for() or 1, accelerator.num_processes
    on_cpu = accelerator.device.type == "cpu"
    if wanted > found:
        start_them = f"accelerate launch --multi_gpu --num_processes {wanted} -m train_loop ..."
        raise InputError(
            f"asked for {wanted} processes, but each works alone ({found} present); on a CPU, start them with: "
            f"ACCELERATE_USE_CPU=true {start_them}"
            if on_cpu
            else f"asked for {wanted} processes, but only {found} present; start them with: {start_them}"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not accelerator.is_fsdp2:
        raise _not_sharded()
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
            f"run.mixed_precision {run.mixed_precision}: this device ({name}) does not support it; "
            f"it supports {' | '.join(present)}"
        )


def _not_sharded() -> InputError:
    """The error of a launcher that asked for FSDP2 or HSDP where Accelerate has no branch for it."""
    state = PartialState()
    on_cpu = state.device.type == "cpu"
    return InputError(
        "FSDP2 was asked for, but Accelerate does not shard "
        + ("on a CPU" if on_cpu else f"one process ({state.distributed_type.value})")
        + f"; use plain data parallelism: {'ACCELERATE_USE_CPU=true ' if on_cpu else ''}accelerate launch "
        f"--multi_gpu --num_processes {state.num_processes} -m train_loop ..."
    )


def prepare(accelerator: Accelerator, module: nn.Module, training: bool = True) -> nn.Module:
    """A module as Accelerate prepares it: sharded with FSDP2, else (to be trained) with DDP; with mixed precision."""
    if accelerator.is_fsdp2:
        return shards.shard(accelerator, module)
    return accelerator.prepare_model(module, evaluation_mode=not training)
