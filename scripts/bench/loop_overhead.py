"""What the loop adds to forward, backward and optimizer, in milliseconds a step.

    python scripts/bench/loop_overhead.py [--steps 200] [--rounds 30] [--json]

A model so small that a step takes two or three milliseconds on one thread, trained twice on the same batches: by the
loop (plan, loader, dropout keys, learning rate, clipping, finite check, a line of metrics.jsonl and progress each
step), and bare (forward, backward, clipping, AdamW, nothing else, batches in memory). Short turns, so that both see the
same machine; seconds are of processor time, which other programs' turns are no part of.
"""

import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from measure import Contender, alternate, parser, report


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__, rounds=30)
    options.add_argument("--steps", type=int, default=200, help="steps of one run (200)")
    given = options.parse_args()

    import torch

    from train_loop import config, loop
    from train_loop.data.loader import loader
    from train_loop.saver import Saver
    from train_loop.signals import StopRequest
    from train_loop.study.metrics import MetricsLog

    torch.set_num_threads(1)  # a second thread would only add noise to work this small
    folder = Path(tempfile.mkdtemp(prefix="bench-loop-"))
    run = loop.set_up(
        config.load(
            [
                *("--model.architecture", "{model_type: gpt2, n_layer: 1, n_embd: 16, n_head: 1}"),
                *("--tokenizer.train_vocab_size", "512", "--data.block_size", "8", "--batch.sequences_per_step", "2"),
                *("--train.max_steps", str(given.steps), "--evaluation.every", "1000000"),
                *("--checkpoint.every", "1000000", "--run.output_dir", str(folder)),
            ]
        )
    )
    shares = (run.plan.share(step, 0, 1) for step in range(given.steps))
    batches = list(loader(run.train, itertools.chain.from_iterable(shares)))
    # Evaluation and checkpoint of the last step are not part of a step.
    loop._evaluate = lambda *_: False
    loop._checkpoint = lambda *_: None
    saver = Saver(run.accelerator, run.folder.checkpoints, keep=1, background=True)

    def with_loop() -> float:
        log = MetricsLog(run.accelerator, run.folder.metrics, 0)
        began = time.process_time()
        loop._loop(run, log, saver, 0, StopRequest())
        return time.process_time() - began

    def bare() -> float:
        objective, optimizer = run.accelerator.unwrap_model(run.objective).train(), run.optimizer.optimizer
        parameters = list(objective.parameters())
        began = time.process_time()
        for batch in batches:
            (objective(batch.inputs, batch.targets) / batch.targets.numel()).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return time.process_time() - began

    def unwatched() -> float:
        told, run.speed = (
            run.speed,
            SimpleNamespace(  # type: ignore[assignment]
                watch=SimpleNamespace(begin=lambda: None, lap=lambda part: None),
                of_step=lambda tokens, seconds: {"tokens_per_second": tokens / seconds},
            ),
        )
        try:
            return with_loop()
        finally:
            run.speed = told

    contenders = [
        Contender("forward, backward, clip, AdamW alone", bare),
        Contender("the loop, without times of parts", unwatched),
        Contender("the loop", with_loop),
    ]
    found = alternate(contenders, given.rounds)
    report(f"{given.steps} steps", found, given.steps, "steps", given.json)
    whole, alone = found["the loop"], found["forward, backward, clip, AdamW alone"]
    pairs = [(mine - bare) / given.steps * 1e3 for mine, bare in zip(whole, alone, strict=True)]
    quiet = (min(whole) - min(alone)) / given.steps * 1e3
    told = {"overhead_ms_a_step": statistics.median(pairs), "of_the_fastest_turns_ms_a_step": quiet}
    if given.json:
        print(json.dumps(told))
    else:
        print(f"\nthe loop adds {told['overhead_ms_a_step']:.3f} ms a step; by the fastest turns {quiet:.3f} ms")


if __name__ == "__main__":
    main()
