"""What the loop adds to forward, backward and optimizer, in milliseconds a step.

    python scripts/bench/loop_overhead.py [--steps 20] [--rounds 200] [--json]

A model so small that a step takes two or three milliseconds on one thread, trained by the loop (plan, loader, dropout
keys, learning rate, clipping, finite check, a line of metrics.jsonl and progress each step), by the same without what
it measures (the parts of a step's time, tokens per second, MFU, memory), and bare (forward, backward, AdamW, nothing
else, batches in memory), with clipping by torch and without. They take turns of a few steps within one run of the loop,
so that all see the same machine, which is a third slower in some seconds than in others; seconds are of processor time,
which other programs' turns are no part of.
"""

import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import parser, report

BARE = {"forward, backward, AdamW alone": False, "forward, backward, clipping, AdamW alone": True}
LOOP, UNMEASURED = "the loop", "the loop, measuring nothing"


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__, rounds=200)
    options.add_argument("--steps", type=int, default=20, help="steps of one turn (20)")
    given = options.parse_args()

    import torch

    from train_loop.checkpoint.manager import CheckpointManager
    from train_loop.config.load import config_from_arguments
    from train_loop.data.loader import loader
    from train_loop.metrics.log import MetricsLog
    from train_loop.metrics.throughput import Stopwatch, Throughput
    from train_loop.signals import StopRequest
    from train_loop.training import loop

    torch.set_num_threads(1)  # a second thread would only add noise to work this small
    folder = Path(tempfile.mkdtemp(prefix="bench-loop-"))
    run = loop.set_up(
        config_from_arguments(
            [
                *("--model.architecture", "{model_type: gpt2, n_layer: 1, n_embd: 16, n_head: 1}"),
                *("--tokenizer.train_vocab_size", "512", "--data.block_size", "8", "--batch.sequences_per_step", "2"),
                *("--train.max_steps", str(2 * given.steps * (given.rounds + 1)), "--evaluation.every", "1000000"),
                *("--checkpoint.every", "1000000", "--run.output_dir", str(folder)),
            ]
        )
    )
    shares = (run.plan.share(step, 0, 1) for step in range(given.steps))
    batches = list(loader(run.train, itertools.chain.from_iterable(shares)))
    objective, optimizer = run.accelerator.unwrap_model(run.objective), run.optimizer.optimizer
    parameters = list(objective.parameters())
    turns: dict[str, list[float]] = {name: [] for name in (*BARE, UNMEASURED, LOOP)}

    def bare(clip: bool) -> float:
        began = time.process_time()
        for batch in batches:
            (objective(batch.inputs, batch.targets) / batch.targets.numel()).backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return time.process_time() - began

    between_steps, lap, of_step, began = loop._between_steps, Stopwatch.lap, Throughput.of_step, 0.0

    def take_turns(run: Any, log: Any, saver: Any, step: int, *rest: Any) -> bool:
        nonlocal began
        stopping = between_steps(run, log, saver, step, *rest)
        if step % given.steps == 0:
            turn, number = time.process_time() - began, step // given.steps
            measured = number % 2 == 0
            if number > 2:  # the first ones warm up: imports, caches, first allocations
                turns[LOOP if measured else UNMEASURED].append(turn)
            if number > 2 and measured:
                for name, clip in BARE.items():
                    turns[name].append(bare(clip))
            # Next is a turn of the other kind.
            Stopwatch.lap = (lambda *_: None) if measured else lap  # type: ignore[method-assign]
            Throughput.of_step = (lambda *_: {"tokens_per_second": 0.0}) if measured else of_step  # type: ignore[method-assign]
            began = time.process_time()
        return stopping

    loop._between_steps = take_turns  # type: ignore[assignment]
    # Evaluation and checkpoint of the last step are not part of a step.
    loop._evaluate = lambda *_: False
    loop._checkpoint = lambda *_: None
    saver = CheckpointManager(run.accelerator, run.folder.checkpoints, keep=1, background=True)
    loop._loop(run, MetricsLog(run.accelerator, run.folder.metrics, 0), saver, 0, StopRequest())

    report(f"{given.steps} steps", turns, given.steps, "steps", given.json)
    for name in (*BARE, UNMEASURED):
        pairs = [(mine - bare) / given.steps * 1e3 for mine, bare in zip(turns[LOOP], turns[name], strict=True)]
        if given.json:
            print(json.dumps({"beyond": name, "overhead_ms_a_step": statistics.median(pairs)}))
        else:
            print(f"the loop takes {statistics.median(pairs):.3f} ms a step beyond {name}")


if __name__ == "__main__":
    main()
