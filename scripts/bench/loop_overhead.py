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
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from measure import parser, report, steps_alone

BARE = {"forward, backward, AdamW alone": False, "forward, backward, clipping, AdamW alone": True}
LOOP, UNMEASURED = "the loop", "the loop, measuring nothing"
NOTHING = nullcontext()


class Silent:
    """A clock that measures nothing."""

    def __call__(self, part: str) -> AbstractContextManager[None]:
        """A context that does nothing."""
        return NOTHING

    def of_step(self, tokens: int) -> dict[str, Any]:
        """What the loop can't do without."""
        return {"tokens_per_second": 0.0}


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__, rounds=200)
    options.add_argument("--steps", type=int, default=20, help="steps of one turn (20)")
    given = options.parse_args()

    import torch

    from train_loop import job
    from train_loop.config.load import config_from_arguments
    from train_loop.metrics.log import MetricsLog
    from train_loop.training.state import Observer, TrainState

    torch.set_num_threads(1)  # a second thread would only add noise to work this small
    setup = job.set_up(
        config_from_arguments(
            [
                *("--model.architecture", "{model_type: gpt2, n_layer: 1, n_embd: 16, n_head: 1}"),
                *("--tokenizer.train_vocab_size", "512", "--data.block_size", "8", "--batch.sequences_per_step", "2"),
                *("--train.max_steps", str(2 * given.steps * (given.rounds + 1)), "--evaluation.every", "1000000"),
                *("--checkpoint.every", "1000000", "--run.output_dir", tempfile.mkdtemp(prefix="bench-loop-")),
            ]
        )
    )
    run, accelerator, optimizer = setup.run, setup.run.context.accelerator, setup.run.state.optimizer
    batches = [each for step in itertools.islice(run.batches.after(0), given.steps) for each in step.micro_batches]
    objective = accelerator.unwrap_model(run.context.objective)
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

    clock: Any = run.context.clock
    silent: Any = Silent()

    class TakeTurns(Observer):
        """Lets the loop, measuring nothing and as it is, and the bare steps take turns."""

        def __init__(self) -> None:
            run.context.clock = silent
            self.began = time.process_time()

        def after_step(self, state: TrainState, record: dict[str, Any]) -> None:
            if state.step % given.steps:
                return
            turn, number = time.process_time() - self.began, state.step // given.steps
            measured = number % 2 == 0
            if number > 2:  # the first ones warm up: imports, caches, first allocations
                turns[LOOP if measured else UNMEASURED].append(turn)
            if number > 2 and measured:
                for name, clip in BARE.items():
                    turns[name].append(bare(clip))
            run.context.clock = silent if measured else clock  # next is a turn of the other kind
            self.began = time.process_time()

    steps_alone(run, MetricsLog(accelerator, setup.folder.metrics, 0), TakeTurns())

    report(f"{given.steps} steps", turns, given.steps, "steps", given.json)
    for name in (*BARE, UNMEASURED):
        pairs = [(mine - bare) / given.steps * 1e3 for mine, bare in zip(turns[LOOP], turns[name], strict=True)]
        if given.json:
            print(json.dumps({"beyond": name, "overhead_ms_a_step": statistics.median(pairs)}))
        else:
            print(f"the loop takes {statistics.median(pairs):.3f} ms a step beyond {name}")


if __name__ == "__main__":
    main()
