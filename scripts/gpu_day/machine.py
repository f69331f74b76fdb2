"""Part "machine": what computes here, and how fast it can at best: the bounds that all other rates are seen against."""

import importlib.metadata
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gpu_day.models import device, only_on, settle
from gpu_day.rows import Finding, Rows, Skipped, figure, holds, part

_PACKAGES = (
    *("torch", "transformers", "accelerate", "tokenizers", "safetensors", "huggingface_hub", "datasets", "evaluate"),
    *("numpy", "pyarrow", "triton", "flash-attn", "flash-attn-3", "kernels", "liger-kernel", "torchao", "matplotlib"),
)
_SECONDS = 0.3  # for each rate
_ASKED = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem,persistence_mode"


def checks(rows: Rows, cpu: bool, folder: Path) -> None:
    """Names and versions, then rates."""
    rows.check("Python", lambda: figure(sys.version.split()[0], why=platform.platform()))
    rows.check("packages", packages)
    rows.check("devices", devices_there)
    rows.check("driver", driver)
    rows.check("this torch has kernels for this GPU", has_kernels)
    side = 512 if cpu else 8192
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        rows.check(f"matrix product, {name}", product_rate, side, dtype)
        if name == "fp32":
            rows.check("matrix product, TF32", tf32_rate, side)
    rows.check("matrix product, fp8", fp8_rate, side)
    rows.check("matrix products of GPT-2 124M's head, bf16", head_rate, cpu)
    size = 1 << (22 if cpu else 30)
    rows.check("memory, copied within the device", memory_rate, size, "copy")
    rows.check("memory, read", memory_rate, size, "read")
    rows.check("memory, written", memory_rate, size, "write")
    for pinned in (False, True):
        name = f"{'pinned' if pinned else 'ordinary'} memory of the host"
        rows.check(f"{name} to the device", transfer_rate, size // 4, pinned, True)
        rows.check(f"the device to {name}", transfer_rate, size // 4, pinned, False)
    rows.check("starting a kernel", launch_time)


def packages() -> Finding:
    """The versions of what matters, as far as it is there."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "-"
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return figure(found | {"CUDA": torch.version.cuda, "cuDNN": cudnn, "git": torch.version.git_version})


def devices_there() -> Finding:
    """Kind, name, memory and number of the devices, and the processor's threads."""
    on = device()
    found: dict[str, Any] = {"kind": on.type, "CPU threads": torch.get_num_threads()}
    if on.type != "cpu":
        found["count"] = torch.accelerator.device_count()
    if on.type == "cuda":
        told = torch.cuda.get_device_properties(on)
        found |= {"name": told.name, "capability": f"{told.major}.{told.minor}", "GB": told.total_memory / 1e9}
        found["processors"] = told.multi_processor_count
    return figure(found)


def driver() -> Finding:
    """What nvidia-smi says."""
    only_on("cuda")
    if shutil.which("nvidia-smi") is None:
        raise Skipped("nvidia-smi is not there")
    asked = ["nvidia-smi", f"--query-gpu={_ASKED}", "--format=csv,noheader"]
    told = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.strip().splitlines()
    return figure(dict(zip(_ASKED.split(","), told[0].split(", "), strict=False)), why=f"{len(told)} in all")


def has_kernels() -> Finding:
    """Whether torch was built for this GPU; else its driver compiles kernels of an older one, or nothing runs."""
    only_on("cuda")
    major, minor = torch.cuda.get_device_capability()
    built = torch.cuda.get_arch_list()
    # A build for 8.0 runs on 8.6, one for 9.0 not on 10.0.
    fitting = [
        each for each in built if each.startswith(f"sm_{major}") and int(each.rstrip("af")[3:]) <= 10 * major + minor
    ]
    return holds(
        bool(fitting), ", ".join(fitting) or "none", f"one for {major}.{minor}", f"built for {', '.join(built)}"
    )


def fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of many runs, until the device has done it."""
    from train_loop.devices import synchronize

    best, began = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - began < _SECONDS:
        synchronize(device())
        start = time.perf_counter()
        work()
        synchronize(device())
        best = min(best, time.perf_counter() - start)
    return best


def _rate(m: int, k: int, n: int, dtype: torch.dtype) -> Finding:
    x, y = torch.randn(m, k, dtype=dtype, device=device()), torch.randn(k, n, dtype=dtype, device=device())
    out = torch.empty(m, n, dtype=dtype, device=device())
    return figure(2e-12 * m * k * n / fastest(lambda: torch.mm(x, y, out=out)), "TFLOP/s", f"{m} x {k} x {n}")


def product_rate(side: int, dtype: torch.dtype) -> Finding:
    """Of square matrices."""
    return _rate(side, side, side, dtype)


def tf32_rate(side: int) -> Finding:
    """Of square matrices in fp32, rounded to TF32 on their way."""
    only_on("cuda")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return _rate(side, side, side, torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)


def fp8_rate(side: int) -> Finding:
    """Of square matrices in fp8 (e4m3), to bf16."""
    only_on("cuda")
    if torch.cuda.get_device_capability() < (8, 9):
        raise Skipped("this GPU has no fp8")
    x, y = (torch.randn(side, side, device=device()).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device())
    seconds = fastest(lambda: torch._scaled_mm(x, y.t(), one, one, out_dtype=torch.bfloat16))
    return figure(2e-12 * side**3 / seconds, "TFLOP/s", f"{side} x {side} x {side}")


def head_rate(cpu: bool) -> Finding:
    """Of hidden states and an embedding matrix, the largest product of a small model."""
    settle()
    return _rate(256 if cpu else 16384, 768, 1024 if cpu else 50304, torch.bfloat16)


def memory_rate(size: int, kind: str) -> Finding:
    """Of memory that no cache holds."""
    settle()
    x, y = (torch.ones(size, dtype=torch.uint8, device=device()).view(torch.float32) for _ in range(2))
    ways: dict[str, tuple[int, Callable[[], object]]] = {
        "copy": (2, lambda: y.copy_(x)),
        "read": (1, x.sum),
        "write": (1, lambda: y.fill_(2.0)),
    }
    times, work = ways[kind]
    return figure(
        times * size / 1e9 / fastest(work), "GB/s", f"{size / 2**20:.0f} MiB" + (", read and written" * (times == 2))
    )


def transfer_rate(size: int, pinned: bool, to_device: bool) -> Finding:
    """Between the host's memory and the device's."""
    if device().type == "cpu":
        raise Skipped("a CPU's memory is the host's")
    host = torch.ones(size, dtype=torch.uint8, pin_memory=pinned)
    there = torch.ones(size, dtype=torch.uint8, device=device())
    goal, source = (there, host) if to_device else (host, there)
    return figure(
        size / 1e9 / fastest(lambda: goal.copy_(source, non_blocking=pinned)), "GB/s", f"{size / 2**20:.0f} MiB"
    )


def launch_time() -> Finding:
    """What one small operation costs, of a thousand in a row."""
    x = torch.zeros(1, device=device())

    def thousand() -> None:
        for _ in range(1000):
            x.add_(1.0)

    return figure(fastest(thousand) * 1e3, "microseconds", "add_ of one number, from Python")


if __name__ == "__main__":
    part(checks)
