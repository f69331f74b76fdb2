"""What each choice of `model.activation_checkpointing` takes: time and memory of a step.

    python scripts/bench/activation_checkpointing.py [--rounds 5] [--steps 2] [--architecture A] [--json]

The same run once for each choice, by the loop's own step. Memory is counted in a step of its own, by what torch's
allocator hands out and takes back, which works on a CPU, too: `kept` is what a forward pass leaves for the backward
pass, `peak` the most that a step holds beside weights and moments, so gradients are part of it.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from itertools import accumulate

from measure import Contender, alternate, parser, report

CHOICES = ("none", "attention", "2", "full")
ARCHITECTURE = "{model_type: gpt2, n_layer: 4, n_embd: 128, n_head: 4}"


def allocated(work: Callable[[], object]) -> tuple[float, float]:
    """Megabytes that `work` leaves allocated, while its result lives, and the most that it holds at once."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    events = [each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
    del result
    held = list(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    return held[-1] / 1e6, max(held) / 1e6


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__, rounds=5)
    options.add_argument("--steps", type=int, default=2, help="steps of one run (2)")
    options.add_argument("--architecture", default=ARCHITECTURE, help=f"of the model ({ARCHITECTURE})")
    options.add_argument("--sequences", type=int, default=8, help="of a step (8)")
    options.add_argument("--block", type=int, default=256, help="tokens of a sequence (256)")
    given = options.parse_args()

    from train_loop import job
    from train_loop.config.load import config_from_arguments
    from train_loop.training.step import train_step

    folder = tempfile.mkdtemp(prefix="bench-recompute-")
    memory: dict[str, dict[str, float]] = {}

    def contender(choice: str) -> Contender:
        run = job.set_up(
            config_from_arguments(
                [
                    *("--model.architecture", given.architecture, "--tokenizer.train_vocab_size", "4096"),
                    *("--data.block_size", str(given.block), "--batch.sequences_per_step", str(given.sequences)),
                    *("--model.activation_checkpointing", choice, "--train.max_steps", "1000"),
                    *("--run.output_dir", os.path.join(folder, choice)),
                ]
            )
        ).run
        run.context.objective.train()
        steps = [run.batches[step] for step in range(given.steps)]

        def work() -> float:
            began = time.perf_counter()
            for batch in steps:
                train_step(run.context, run.state, batch, 1e-4)
            return time.perf_counter() - began

        work()
        (first, *_) = steps[0].micro_batches
        kept, _ = allocated(lambda: run.context.objective(first.inputs, first.targets, first.positions))
        _, peak = allocated(lambda: train_step(run.context, run.state, steps[0], 1e-4))
        memory[choice] = {"kept_megabytes": kept, "peak_megabytes": peak}
        return Contender(choice, work)

    found = alternate([contender(choice) for choice in CHOICES], given.rounds)
    tokens = given.steps * given.sequences * given.block
    report(f"{given.steps} steps of {given.sequences} x {given.block}", found, tokens, "tokens", given.json)
    if given.json:
        print(json.dumps(memory))
        return
    print(f"\n{'':44} {'kept, MB':>9} {'peak, MB':>9} {'of none':>8}")
    for choice, each in memory.items():
        share = each["peak_megabytes"] / memory["none"]["peak_megabytes"]
        print(f"{choice:44} {each['kept_megabytes']:9.1f} {each['peak_megabytes']:9.1f} {share:8.3f}")


if __name__ == "__main__":
    main()
