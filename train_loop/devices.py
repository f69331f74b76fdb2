"""What a device can do: we ask the device instead of guessing from its name.

An accelerator that we have never seen (xpu, npu, ...) is treated according to what it can do. Only the CPU is special
by name, because it needs no copying, no waiting and no warming up.
"""

import contextlib
import functools
import itertools
import platform
import resource
import sys
from collections.abc import Callable
from typing import Any

import psutil
import torch
from accelerate.utils.memory import should_reduce_batch_size


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in float64: on its own device if that has float64, otherwise (e.g. on Apple's GPUs) on the CPU."""
    return (tensor if has_float64(tensor.device) else tensor.cpu()).double()


@functools.cache
def has_float64(device: torch.device) -> bool:
    """Whether a device has 64-bit floating-point numbers."""
    return _works(lambda: torch.ones(1, device=device).double().sum().item())


@functools.cache
def pins_memory(device: torch.device) -> bool:
    """Whether copies to and from a device can run in the background, from pinned memory of the host."""
    return device.type != "cpu" and _works(lambda: torch.empty(1).pin_memory())


@functools.cache
def has_events(device: torch.device) -> bool:
    """Whether a device's queue takes events, and measures the time between two of them."""
    if device.type == "cpu":
        return False

    def two_events() -> None:
        first, second = event(device), event(device)
        synchronize(device)
        second.query()
        first.elapsed_time(second)

    return _works(two_events)


def event(device: torch.device) -> Any:
    """An event in the queue of a device for which `has_events` is true."""
    made: Any = torch.get_device_module(device).Event(enable_timing=True)
    made.record()
    return made


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished all its work."""
    torch.get_device_module(device).synchronize()


def graph_type(device: torch.device) -> Any:
    """The type of a device's recorded graphs (CUDAGraph, XPUGraph, ...); None if it has none."""
    return getattr(torch.get_device_module(device), f"{device.type.upper()}Graph", None)


@functools.cache
def has_fused_adamw(device: torch.device) -> bool:
    """Whether a device has one AdamW kernel for all parameters."""

    def step() -> None:
        parameter = torch.zeros(1, device=device, requires_grad=True)
        parameter.grad = torch.zeros_like(parameter)
        torch.optim.AdamW([parameter], fused=True).step()

    return _works(step)


@functools.cache
def precisions(device: torch.device) -> tuple[str, ...]:
    """The values that run.mixed_precision may have on a device."""

    def multiplies(dtype: torch.dtype) -> bool:
        x = torch.ones(16, 16, device=device)
        return _works(lambda: (x.to(dtype) @ x.to(dtype)).sum().item())

    def multiplies_fp8() -> None:
        x = torch.ones(16, 16, device=device).to(torch.float8_e4m3fn)
        one = torch.ones((), device=device)
        torch._scaled_mm(x, x.t(), one, one, out_dtype=torch.bfloat16)

    found = ["no"]
    if multiplies(torch.bfloat16):
        found.append("bf16")
    if device.type != "cpu":  # on a CPU, fp16 gains nothing, and autocast does not scale the loss
        found += ["fp16"] if multiplies(torch.float16) else []
        found += ["fp8"] if _works(multiplies_fp8) else []
    return tuple(found)


def name(device: torch.device) -> str:
    """A device's own name, or else its kind: NVIDIA H100, CPU, MPS."""
    named = getattr(torch.get_device_module(device), "get_device_name", None)
    return str(named(device)) if named is not None else device.type.upper()


def identities(kind: torch.device) -> list[str]:
    """What tells each device of a kind that this process sees from all others; nothing where that cannot be asked."""
    module, found = torch.get_device_module(kind), []
    with contextlib.suppress(AttributeError, RuntimeError, AssertionError):
        found = [str(module.get_device_properties(number).uuid) for number in range(module.device_count())]
    return found


@functools.cache
def processor() -> tuple[str, str]:
    """The maker of the CPU as it calls itself (GenuineIntel, AuthenticAMD, arm64), and what torch uses of it (AVX2)."""
    return _told_of_cpu().get("vendor_id", platform.machine()), torch.backends.cpu.get_cpu_capability()


@functools.cache
def cpu_computes_bf16() -> bool:
    """Whether the CPU has instructions for bf16 that torch may use, or doesn't say: without them, fp32 is faster."""
    told = _told_of_cpu()
    flags = told.get("flags", told.get("Features", "")).split()
    if not flags:
        return True
    wide = "Features" in told or torch.backends.cpu.get_cpu_capability() == "AVX512"  # and not told to do without
    return wide and bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))


def _told_of_cpu() -> dict[str, str]:
    """What Linux says of the first CPU; nothing on other systems."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        lines = itertools.takewhile(str.strip, file)
        return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return {}


def has_peak_memory(device: torch.device) -> bool:
    """Whether a device's allocator knows the peak of its tensors' bytes."""
    return device.type != "cpu" and hasattr(torch.get_device_module(device), "max_memory_allocated")


def memory(device: torch.device) -> int:
    """A device's memory in bytes; on a CPU, the machine's."""
    if device.type != "cpu":
        module: Any = torch.get_device_module(device)
        with contextlib.suppress(AttributeError, RuntimeError):
            return int(module.get_device_properties(device).total_memory)
        with contextlib.suppress(AttributeError, RuntimeError):
            return int(module.mem_get_info(device)[1])
    return int(psutil.virtual_memory().total + psutil.swap_memory().total)


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a device, or (on a CPU) on this machine; infinitely many if the device doesn't say."""
    if device.type == "cpu":
        return float(psutil.virtual_memory().available)
    told = getattr(torch.get_device_module(device), "mem_get_info", None)
    return float("inf") if told is None or not _works(lambda: told(device)) else float(told(device)[0])


def peak_memory(device: torch.device) -> Callable[[], int]:
    """A function that returns the peak bytes of tensors on a device, or else (on a CPU) of this process's memory."""
    counted = getattr(torch.get_device_module(device), "max_memory_allocated", None)
    if counted is not None and _works(counted):
        return lambda: int(counted())
    return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _works(attempt: Callable[[], object]) -> bool:
    """Whether an attempt succeeds. Devices and builds of torch refuse with various errors."""
    try:
        attempt()
        return True
    except (RuntimeError, TypeError, NotImplementedError, AssertionError, AttributeError, ValueError):
        return False


is_out_of_memory = should_reduce_batch_size
