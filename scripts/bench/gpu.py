"""A language model on a GPU: tokens per second, MFU and memory of the loop, of a plain one and of `Trainer`.

    python scripts/bench/gpu.py [--shape gpt2-124m | llama-1b] [--sequences N] [--rounds 5] [--profile] [--json]

GPT-2 of 124 million parameters at 1,024 tokens, or a Llama of 1.2 billion at 2,048; bf16, compiled, no dropout, from
random weights. The first rival is what a person who knows nanoGPT would write around the same model: bf16 autocast, the
whole model compiled, cross entropy over all logits, clipping, fused AdamW, batches that lie on the device, nothing
logged. The second is Transformers' `Trainer`, with bf16 and torch_compile. The bare step is train_loop's own model and
optimizer without its loop: the difference is what the loop adds. MFU is the share of the rate of a large matrix
product, measured on the same device (`train_loop/metrics/throughput.py`).

Each contender is a process of its own, compiles beside the others where memory allows, and trains when it is its turn;
memory is the most that its tensors took in a turn. A contender that is not ready after --patience seconds is left out,
and a line on stderr says so.

Then the loss alone, forward and backward: over all logits, chunk by chunk as train_loop computes it, and Liger's fused
one where `liger_kernel` is installed (--loop_only leaves this out). --profile writes where a run's time goes to stderr.

--cpu runs all of it on a CPU, to see that it works; say small sizes with it:

    python scripts/bench/gpu.py --cpu --layers 2 --width 64 --vocabulary 512 --block 64 --sequences 4 --steps 2 --eager
"""

import argparse
import functools
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from gpu_contenders import CONTENDERS, LOOP, PLAIN, TRAINER, Process, device_of, serve
from measure import Contender, alternate, parser, report

LIGER = importlib.util.find_spec("liger_kernel") is not None
SHAPES: dict[str, dict[str, int]] = {
    "gpt2-124m": {"layers": 12, "width": 768, "vocabulary": 50304, "block": 1024, "sequences": 32},
    "llama-1b": {"layers": 16, "width": 2048, "vocabulary": 128256, "block": 2048, "sequences": 4},
}
BARE = "train_loop, the bare step"


def main() -> int:
    """Run the benchmark; returns the exit code."""
    given = _read()
    import torch

    if not given.cpu and not torch.accelerator.is_available():
        print("gpu.py: there is no GPU here; --cpu runs it on the CPU, to try it with small sizes", file=sys.stderr)
        return 2
    if given.contender:
        serve(given)
        return 0
    processes = _begin(given)
    if LOOP not in processes:
        return 1
    contenders = [Contender(name, functools.partial(each.seconds, "turn")) for name, each in processes.items()]
    contenders.append(Contender(BARE, functools.partial(processes[LOOP].seconds, "bare")))
    found = alternate(contenders, given.rounds)
    speed = processes[LOOP].ask("rate")
    memory = {name: round(each.peak_mb) for name, each in processes.items()}
    if given.profile:
        print(processes[LOOP].ask("profile")["table"], file=sys.stderr)
    for process in processes.values():
        process.end()
    _report(given, found, speed, memory)
    if not given.loop_only:
        _losses(given)
    return 0


def _read() -> argparse.Namespace:
    options = parser(__doc__, rounds=5)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    option = options.add_argument
    option("--shape", choices=SHAPES, default="gpt2-124m", help="of the model; the sizes below change it (gpt2-124m)")
    option("--steps", type=int, default=20, help="steps of one run (20)")
    option("--sequences", type=int, help="of a step (32, of llama-1b 4)")
    option("--block", type=int, help="tokens of a sequence (1024, of llama-1b 2048)")
    option("--layers", type=int, help="of the model (12, of llama-1b 16)")
    option("--width", type=int, help="of the model, a multiple of 64 (768, of llama-1b 2048)")
    option("--vocabulary", type=int, help="of the model (50304, of llama-1b 128256: multiples of 128)")
    option("--patience", type=float, default=600, help="seconds after which a contender must be ready (600)")
    option("--loop_only", action="store_true", help="leave out the loss alone")
    option("--eager", action="store_true", help="compile nothing")
    option("--profile", action="store_true", help="write where the time goes to stderr")
    option("--cpu", action="store_true", help="run on a CPU, where there is no GPU")
    option("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)  # what a process started by this one is
    given = options.parse_args()
    for name, size in SHAPES[given.shape].items():
        if getattr(given, name) is None:
            setattr(given, name, size)
    return given


def _begin(given: argparse.Namespace) -> dict[str, Process]:
    """The contenders that are ready in time, in their order."""
    sizes = [part for name in SHAPES[given.shape] for part in (f"--{name}", str(getattr(given, name)))]
    sizes += ["--shape", given.shape, "--steps", str(given.steps)]
    sizes += [f"--{flag}" for flag in ("cpu", "eager") if getattr(given, flag)]
    names, together = _fitting(given)
    ends = time.monotonic() + given.patience
    processes: dict[str, Process] = {}
    waiting = [(name, Process(__file__, name, sizes) if together else None) for name in names]
    for name, started in waiting:
        process = started or Process(__file__, name, sizes)
        problem = process.wait_until_ready(ends - time.monotonic())
        if problem is None:
            processes[name] = process
        else:
            process.end()
            print(f"{name} is left out: {problem}", file=sys.stderr)
    return processes


def _fitting(given: argparse.Namespace) -> tuple[list[str], bool]:
    """Which contenders there is memory for, and whether for all of them to be at work at once."""
    if given.cpu:
        return list(CONTENDERS), True
    import torch

    positions, rows = given.sequences * given.block, given.width * given.vocabulary
    parameters = 12 * given.layers * given.width**2 + rows
    state = 16 * parameters  # weights, gradients and two moments in fp32
    # bf16 copies of the weights; logits in bf16 and fp32, with their gradients; about 40 bytes a number of a layer.
    work = 2 * parameters + 16 * positions * given.vocabulary + 40 * positions * given.width * given.layers
    room = 0.9 * torch.get_device_module(device_of(given)).mem_get_info()[0]
    names = list(CONTENDERS)
    for name in (TRAINER, PLAIN):
        if len(names) * state + work > room:
            names.remove(name)
            print(f"{name} is left out: there is no memory for it beside the others", file=sys.stderr)
    return names, len(names) * (state + work) <= room


def _report(
    given: argparse.Namespace, found: dict[str, list[float]], speed: dict[str, Any], memory: dict[str, int]
) -> None:
    tokens = given.steps * given.sequences * given.block
    way = "bf16" + (", not compiled" if given.eager else "")
    size = f"{given.layers} layers of {given.width}"
    report(
        f"{given.steps} steps of {given.sequences} x {given.block}, {size}, {way}", found, tokens, "tokens", given.json
    )
    told: dict[str, Any] = {"device": speed["device"], "measured_rate": speed["rate"]}
    told["operations_per_token"] = speed["operations"]
    for name, times in found.items():
        told[f"mfu, {name}"] = round(speed["operations"] * tokens / statistics.median(times) / speed["rate"], 4)
    told |= {f"peak_mb, {name}": peak for name, peak in memory.items()}
    pairs = [loop - bare for loop, bare in zip(found[LOOP], found[BARE], strict=True)]
    told["loop_overhead_ms_a_step"] = round(statistics.median(pairs) / given.steps * 1e3, 3)
    told["loop_overhead_share"] = round(statistics.median(pairs) / statistics.median(found[BARE]), 4)
    print(json.dumps(told, indent=None if given.json else 2))


def _losses(given: argparse.Namespace) -> None:
    import torch
    import torch.nn.functional as F

    from train_loop import devices
    from train_loop.data.loader import IGNORED
    from train_loop.ops.cross_entropy import linear_cross_entropy

    device = device_of(given)
    positions = given.sequences * given.block
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16, "requires_grad": True}
    hidden, weight = (torch.randn(rows, given.width, **options) for rows in (positions, given.vocabulary))
    targets = torch.randint(0, given.vocabulary, (positions,), device=device)
    ways: dict[str, Callable[[], Any]] = {
        "over all logits": lambda: F.cross_entropy((hidden @ weight.t()).float(), targets, reduction="sum"),
        "chunk by chunk": lambda: linear_cross_entropy(hidden, weight, None, targets, IGNORED),
    }
    if LIGER and not given.cpu:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        ways["Liger's fused linear cross entropy"] = lambda: liger(weight, hidden, targets)
    else:
        why = "runs on GPUs only" if LIGER else "is not installed (pip install liger-kernel)"
        print(f"Liger's loss is left out: it {why}", file=sys.stderr)
    memory: dict[str, float] = {}

    def contender(name: str) -> Contender:
        def run() -> float:
            hidden.grad = weight.grad = None
            if not given.cpu:
                torch.get_device_module(device).reset_peak_memory_stats()
                before = torch.get_device_module(device).memory_allocated()
            devices.synchronize(device)
            began = time.perf_counter()
            ways[name]().backward()
            devices.synchronize(device)
            taken = time.perf_counter() - began
            if not given.cpu:
                memory[name] = round((devices.peak_memory(device)() - before) / 2**20)
            return taken

        return Contender(name, run)

    found = alternate([contender(name) for name in ways], given.rounds)
    report(f"the loss alone, {positions:,} positions, forward and backward", found, positions, "tokens", given.json)
    if memory:
        print(json.dumps({"peak_mb": memory}, indent=None if given.json else 2))


if __name__ == "__main__":
    sys.exit(main())
