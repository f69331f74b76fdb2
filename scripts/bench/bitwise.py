"""What run.reproducible bitwise costs a step.

    python scripts/bench/bitwise.py [--shape small|distilgpt2] [--rounds 5] [--json]

The same steps (forward, backward, sums, clipping, AdamW) on one process, gradients summed as usual and in fixed point.
On a CPU bitwise computes on one thread, so the usual way is timed on one thread, too, and on all: the first ratio is
what the sums cost, the second what a user with idle cores gives up (and gets back by starting one process a core).
"""

import os
import tempfile
import time

from measure import Contender, alternate, parser, report

SHAPES = {
    # name: (model, vocabulary of its tokenizer, block size, sequences a step, sequences a micro-batch)
    "small": ("{model_type: gpt2, n_layer: 4, n_embd: 128, n_head: 4}", 4096, 128, 16, 8),
    "distilgpt2": ("{model_type: gpt2, n_layer: 6, vocab_size: 50257}", 4096, 128, 8, 4),
}


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__, rounds=5)
    options.add_argument("--shape", choices=SHAPES, default="small", help="what is trained (small)")
    options.add_argument("--steps", type=int, default=5, help="steps of one run (5)")
    given = options.parse_args()

    import torch

    from train_loop import job
    from train_loop.config.load import config_from_arguments
    from train_loop.training.step import train_step

    architecture, vocabulary, block, sequences, micro_batch = SHAPES[given.shape]
    every_core = torch.get_num_threads()
    folder = tempfile.mkdtemp(prefix="bench-bitwise-")

    def contender(name: str, reproducible: str, threads: int) -> Contender:
        run = job.set_up(
            config_from_arguments(
                [
                    *("--model.architecture", architecture, "--tokenizer.train_vocab_size", str(vocabulary)),
                    *("--data.block_size", str(block), "--batch.sequences_per_step", str(sequences)),
                    *("--batch.micro_batch_size", str(micro_batch), "--run.reproducible", reproducible),
                    *("--train.max_steps", "100", "--run.output_dir", os.path.join(folder, name)),
                ]
            )
        ).run
        run.context.objective.train()
        steps = [run.batches[step] for step in range(given.steps)]

        def work() -> float:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(reproducible == "bitwise")
            began = time.perf_counter()
            for batch in steps:
                train_step(run.context, run.state, batch, 1e-4)
            return time.perf_counter() - began

        return Contender(name, work)

    found = alternate(
        [
            contender("as usual, 1 thread", "no", 1),
            contender("bitwise, 1 thread", "bitwise", 1),
            contender(f"as usual, {every_core} threads", "no", every_core),
        ],
        given.rounds,
    )
    report(f"{given.shape}: {given.steps} steps of {sequences} x {block}", found, given.steps, "steps", given.json)


if __name__ == "__main__":
    main()
