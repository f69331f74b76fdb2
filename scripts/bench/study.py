"""What watching costs: steps with study.every 50 against steps with nothing watched.

    python scripts/bench/study.py [--shape small|distilgpt2] [--steps 50] [--rounds 3] [--json]

The same steps by the same loop, with its log, on one process: `--steps` of them, of which every 50th is watched. How
far apart two runs are with nothing watched in either says how much of a difference is noise of the machine. Measured by
themselves, too: the steps between those that are watched, which should cost what they always do, and what one that is
watched costs beyond the others.
"""

import json
import statistics
import tempfile

from measure import Contender, alternate, parser, report, seconds, steps_alone

SHAPES = {
    # name: (model, vocabulary of its tokenizer, block size, sequences a step, sequences a micro-batch)
    "small": ("{model_type: gpt2, n_layer: 4, n_embd: 128, n_head: 4}", 4096, 128, 16, 8),
    "distilgpt2": ("{model_type: gpt2, n_layer: 6, vocab_size: 50257}", 4096, 128, 8, 4),
}


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__, rounds=3)
    options.add_argument("--shape", choices=SHAPES, default="small", help="what is trained (small)")
    options.add_argument(
        "--steps", type=int, default=50, help="steps of one run, a multiple of 50; 0: a single step (50)"
    )
    given = options.parse_args()

    from train_loop import job
    from train_loop.analysis.step_statistics import StepStatistics
    from train_loop.config.load import config_from_arguments
    from train_loop.metrics.log import MetricsLog

    architecture, vocabulary, block, sequences, micro_batch = SHAPES[given.shape]
    setup = job.set_up(
        config_from_arguments(
            [
                *("--model.architecture", architecture, "--tokenizer.train_vocab_size", str(vocabulary)),
                *("--data.block_size", str(block), "--batch.sequences_per_step", str(sequences)),
                *("--batch.micro_batch_size", str(micro_batch), "--train.max_steps", str(given.steps or 4)),
                *("--evaluation.every", "1000000", "--checkpoint.every", "1000000"),
                *("--run.output_dir", tempfile.mkdtemp(prefix="bench-study-")),
            ]
        )
    )
    run, metrics = setup.run, setup.folder.metrics
    metrics.parent.mkdir(exist_ok=True)

    between: dict[int | None, list[float]] = {None: [], 50: []}  # seconds of steps that are not watched

    def steps(every: int | None) -> float:
        run.state.step = 0
        log = MetricsLog(run.context.accelerator, metrics, 0, study=every is not None)
        watching = [] if every is None else [StepStatistics(run, every, log.write_study)]
        took = seconds(lambda: steps_alone(run, log, *watching))
        log.close()
        if every in between:
            lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
            between[every] += [line["seconds"] for line in lines if line["step"] % 50]
        return took

    if given.steps:
        contenders = [
            Contender("nothing watched", lambda: steps(None)),
            Contender("study.every 50", lambda: steps(50)),
            Contender("nothing watched, again", lambda: steps(None)),
        ]
        found = alternate(contenders, given.rounds)
        report(f"{given.shape}: {given.steps} steps of {sequences} x {block}", found, given.steps, "steps", given.json)
        off, on = (statistics.median(between[every]) for every in (None, 50))
        print(f"\na step that is not watched: {off * 1e3:.1f} ms without, {on * 1e3:.1f} ms in a watched run (medians)")
    few = run.batches.total_steps = 4
    alone = alternate([Contender("off", lambda: steps(None)), Contender("each", lambda: steps(1))], given.rounds)
    step = statistics.median(alone["off"]) / few
    extra = statistics.median((each - off) / few for off, each in zip(alone["off"], alone["each"], strict=True))
    print(f"\na watched step costs {extra / step:.2f} of a step more: {extra / step / 50:.2%} at N = 50")


if __name__ == "__main__":
    main()
