"""What `model.compile` gains a step, and what it takes before.

    python scripts/bench/compile.py [--rounds 5] [--steps 10] [--json]

The same run twice, with layers compiled and as they are, by the loop's own step; on a CPU the second one has the
matrix products of `train_loop/ops/cpu.py`, which compiled layers do without. Warm-up, in which layers are compiled, is
timed alone.
"""

import json
import os
import tempfile
import time

from measure import Contender, alternate, parser, report, seconds

SEQUENCES, BLOCK = 8, 128
ARCHITECTURE = "{model_type: gpt2, n_layer: 4, n_embd: 128, n_head: 4}"


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__, rounds=5)
    options.add_argument("--steps", type=int, default=10, help="steps of one run (10)")
    options.add_argument("--architecture", default=ARCHITECTURE, help=f"of the model ({ARCHITECTURE})")
    given = options.parse_args()

    from torch._dynamo.utils import counters

    from train_loop import job
    from train_loop.config.load import config_from_arguments
    from train_loop.training.step import train_step

    folder = tempfile.mkdtemp(prefix="bench-compile-")

    def contender(name: str, compiled: bool) -> Contender:
        run = job.set_up(
            config_from_arguments(
                [
                    *("--model.architecture", given.architecture, "--tokenizer.train_vocab_size", "4096"),
                    *("--data.block_size", str(BLOCK), "--batch.sequences_per_step", str(SEQUENCES)),
                    *("--model.compile", str(compiled).lower(), "--train.max_steps", "1000"),
                    *("--run.output_dir", os.path.join(folder, name)),
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

        return Contender(name, work)

    plain, compiled = contender("as it is", False), contender("model.compile", True)
    warm_up = seconds(compiled.run)
    graphs = counters["stats"]["unique_graphs"]
    found = alternate([plain, compiled], given.rounds)
    tokens = given.steps * SEQUENCES * BLOCK
    report(f"{given.steps} steps of {SEQUENCES} x {BLOCK}", found, tokens, "tokens", given.json)
    told = {"warm_up_seconds": round(warm_up, 1), "compiled_again": counters["stats"]["unique_graphs"] - graphs}
    print(json.dumps(told, indent=None if given.json else 2))


if __name__ == "__main__":
    main()
