"""GPT-2 on a GPU: tokens per second and MFU of the loop against a plain one, losses against each other, a profile.

    python scripts/bench/gpu.py [--sequences 32] [--rounds 5] [--profile] [--json]

GPT-2 of 124 million parameters at 1,024 tokens, bf16, compiled, no dropout, from random weights, 32 sequences a step.
The rival is what a person who knows nanoGPT would write around the same model: bf16 autocast, the whole model compiled,
cross entropy over all logits, clipping, fused AdamW, batches that lie on the device, nothing logged. MFU is the share
of the rate of a large matrix product, measured on the same device (`train_loop/study/speed.py`).

Then the loss alone, forward and backward: over all logits, torch's `linear_cross_entropy` as train_loop calls it, and
Liger's fused one where `liger_kernel` is installed. --profile writes where the time of a run goes to stderr.

--cpu runs all of it on a CPU, to see that it works; say small sizes with it:

    python scripts/bench/gpu.py --cpu --layers 2 --width 64 --vocabulary 512 --block 64 --sequences 4 --steps 2
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import Contender, alternate, parser, report

LIGER = importlib.util.find_spec("liger_kernel") is not None


def main() -> int:
    """Run the benchmark; returns the exit code."""
    options = parser(__doc__, rounds=5)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("--steps", type=int, default=20, help="steps of one run (20)")
    options.add_argument("--sequences", type=int, default=32, help="of a step (32)")
    options.add_argument("--block", type=int, default=1024, help="tokens of a sequence (1024)")
    options.add_argument("--layers", type=int, default=12, help="of the model (12)")
    options.add_argument("--width", type=int, default=768, help="of the model, a multiple of 64 (768)")
    options.add_argument("--vocabulary", type=int, default=50304, help="of the model (50304: a multiple of 128)")
    options.add_argument("--profile", action="store_true", help="write where the time goes to stderr")
    options.add_argument("--cpu", action="store_true", help="run on a CPU, where there is no GPU")
    given = options.parse_args()
    import torch

    if not given.cpu and not torch.cuda.is_available():
        print("gpu.py: there is no GPU here; --cpu runs it on the CPU, to try it with small sizes", file=sys.stderr)
        return 2
    torch.set_float32_matmul_precision("high")
    mine, run = _the_loop(given)
    found = alternate([Contender("a plain loop", _plain_loop(given)), Contender("train_loop", mine)], given.rounds)
    tokens = given.steps * given.sequences * given.block
    title = f"{given.steps} steps of {given.sequences} x {given.block}, {given.layers} layers of {given.width}, bf16"
    report(title, found, tokens, "tokens", given.json)
    speed = run.speed
    told: dict[str, Any] = {"device": _name(given.cpu), "measured_rate": speed.rate}
    told["operations_per_token"] = speed.operations
    for name, times in found.items():
        told[f"mfu, {name}"] = round(speed.operations * tokens / statistics.median(times) / speed.rate, 4)
    print(json.dumps(told, indent=None if given.json else 2))
    if given.profile:
        _profile(mine, given.cpu)
    _losses(given)
    return 0


def _name(cpu: bool) -> str:
    import torch

    return "CPU" if cpu else torch.cuda.get_device_name()


def _wait(cpu: bool) -> None:
    import torch

    if not cpu:
        torch.cuda.synchronize()


def _timed(work: Callable[[], object], cpu: bool) -> Callable[[], float]:
    """Seconds of `work` until the device has done it."""

    def run() -> float:
        _wait(cpu)
        began = time.perf_counter()
        work()
        _wait(cpu)
        return time.perf_counter() - began

    return run


def _architecture(given: argparse.Namespace) -> dict[str, Any]:
    return {
        "n_layer": given.layers,
        "n_embd": given.width,
        "n_head": given.width // 64,
        "n_positions": given.block,
        "vocab_size": given.vocabulary,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    }


def _the_loop(given: argparse.Namespace) -> tuple[Callable[[], float], Any]:
    """The loop of train_loop, with its log, and the run that it trains."""
    from train_loop import config, loop
    from train_loop.saver import Saver
    from train_loop.signals import StopRequest
    from train_loop.study.metrics import MetricsLog

    folder = Path(tempfile.mkdtemp(prefix="bench-gpu-"))
    run = loop.set_up(
        config.load(
            [
                *("--model.architecture", json.dumps({"model_type": "gpt2"} | _architecture(given))),
                *("--tokenizer.train_vocab_size", str(min(4096, given.vocabulary))),
                *("--data.block_size", str(given.block), "--batch.sequences_per_step", str(given.sequences)),
                *("--model.compile", "true", "--run.mixed_precision", "bf16", "--train.max_steps", str(given.steps)),
                *("--evaluation.every", "1000000", "--checkpoint.every", "1000000", "--run.output_dir", str(folder)),
            ]
        )
    )
    # Evaluation and checkpoint of the last step are not part of a step.
    loop._evaluate = lambda *_: False
    loop._checkpoint = lambda *_: None
    saver = Saver(run.accelerator, run.folder.checkpoints, keep=1, background=True)

    def work() -> None:
        loop._loop(run, MetricsLog(run.accelerator, run.folder.metrics, 0), saver, 0, StopRequest())

    run.folder.path.mkdir(parents=True, exist_ok=True)
    return _timed(work, given.cpu), run


def _plain_loop(given: argparse.Namespace) -> Callable[[], float]:
    import torch
    import torch.nn.functional as F
    from transformers import GPT2Config, GPT2LMHeadModel

    device = "cpu" if given.cpu else "cuda"
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config(**_architecture(given)))
    model.to(device).train()
    compiled = torch.compile(model)
    decayed = [each for each in model.parameters() if each.ndim > 1]
    others = [each for each in model.parameters() if each.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    ids = torch.randint(0, given.vocabulary, (4, given.sequences, given.block + 1), device=device)

    def work() -> None:
        for step in range(given.steps):
            rows = ids[step % len(ids)]
            with torch.autocast(device, torch.bfloat16):
                logits = compiled(input_ids=rows[:, :-1], use_cache=False).logits
                loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return _timed(work, given.cpu)


def _losses(given: argparse.Namespace) -> None:
    import torch
    import torch.nn.functional as F

    from train_loop.data.loader import IGNORED
    from train_loop.objective import _FUSED

    device = "cpu" if given.cpu else "cuda"
    positions = given.sequences * given.block
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16, "requires_grad": True}
    hidden, weight = (torch.randn(rows, given.width, **options) for rows in (positions, given.vocabulary))
    targets = torch.randint(0, given.vocabulary, (positions,), device=device)

    def whole() -> Any:
        return F.cross_entropy((hidden @ weight.t()).float(), targets, reduction="sum")

    def fused() -> Any:
        nll = F.linear_cross_entropy(hidden, weight, targets, reduction="none", ignore_index=IGNORED, options=_FUSED)
        return nll.float().sum()

    ways: dict[str, Callable[[], Any]] = {"over all logits": whole, "torch's linear_cross_entropy": fused}
    if LIGER and not given.cpu:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        ways["Liger's fused linear cross entropy"] = lambda: liger(weight, hidden, targets)
    else:
        why = "runs on GPUs only" if LIGER else "is not installed (pip install liger-kernel)"
        print(f"Liger's loss is left out: it {why}", file=sys.stderr)
    memory: dict[str, float] = {}

    def contender(name: str) -> Contender:
        def both() -> None:
            hidden.grad = weight.grad = None
            ways[name]().backward()

        def run() -> float:
            if not given.cpu:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            taken = _timed(both, given.cpu)()
            if not given.cpu:
                memory[name] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
            return taken

        return Contender(name, run)

    found = alternate([contender(name) for name in ways], given.rounds)
    report(f"the loss alone, {positions:,} positions, forward and backward", found, positions, "tokens", given.json)
    if memory:
        print(json.dumps({"peak_mb": memory}, indent=None if given.json else 2))


def _profile(work: Callable[[], float], cpu: bool) -> None:
    """A table of operations by the time that they take on the device."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] if cpu else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=kinds) as seen:
        work()
    order = "self_cpu_time_total" if cpu else "self_cuda_time_total"
    print(seen.key_averages().table(sort_by=order, row_limit=30), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
