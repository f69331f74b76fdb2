"""How long a checkpoint holds up training, written beside it and not, and how soon a killed run is back.

    python scripts/bench/checkpoint.py [--rounds 5] [--steps 6] [--layers 6] [--json]

The model has DistilGPT2's shape (82 million parameters; a checkpoint of 984 MB), from scratch, on the standard library.
*Holding up* is what a save adds to the time of the steps around it: `--steps` steps with a save at the first, less as
many without one. Part of it is the wait for the copy, part is the processor time that writing and hashing take from the
training. `save_state` is Accelerate's: it pickles, neither syncs nor checksums, and leaves half if killed meanwhile.
*Recovery* is from `kill -9` until the next step is in the metrics, of the real command in a process of its own:
libraries, data, model, truth sheet, checking and loading the checkpoint, one step.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import parser

WAYS = ("beside training", "before training goes on", "Accelerate's save_state, not synced")


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__, rounds=5)
    options.add_argument("--steps", type=int, default=6, help="steps that a save is spread over (6)")
    options.add_argument("--layers", type=int, default=6, help="of the model (6: 82 million parameters)")
    given = options.parse_args()

    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-") as name:
        folder = Path(name)
        settings = {
            "model.architecture": f"{{model_type: gpt2, n_layer: {given.layers}, vocab_size: 50257}}",
            "tokenizer.train_vocab_size": "4096",
            "data.block_size": "64",
            "batch.sequences_per_step": "4",
            "evaluation.every": "100000",
            "sample.prompts": "[]",
            "run.output_dir": str(folder / "run"),
        }
        arguments = [part for key, value in settings.items() for part in (f"--{key}", value)]
        found = hold_up(arguments, given.steps, given.rounds)
        found["recovery_seconds"] = recovery(arguments, folder / "run")
    if given.json:
        print(json.dumps(found))
        return
    print(f"\n{found['parameters'] / 1e6:.0f} million parameters, checkpoint of {found['megabytes']:,.0f} MB, medians")
    print(f"a step                                      {found['step_seconds']:6.2f} s")
    for way in WAYS:
        blocked, whole = found[way]
        print(f"{way:40}    training waits {blocked:6.2f} s, {whole:6.2f} s later all in all")
    print(f"from kill -9 to the next step               {found['recovery_seconds']:6.2f} s")


def hold_up(arguments: list[str], steps: int, rounds: int) -> dict[str, Any]:
    """Seconds of a step, and for each way to write: seconds that the call takes, and that the steps take longer."""
    from train_loop import job
    from train_loop.checkpoint import storage
    from train_loop.checkpoint.manager import CheckpointManager
    from train_loop.config.load import config_from_arguments
    from train_loop.training.step import train_step

    setup = job.set_up(config_from_arguments(arguments))
    run, folder, accelerator = setup.run, setup.folder, setup.run.context.accelerator
    run.context.objective.train()

    def train(first: int, save: Callable[[int], object] | None) -> tuple[float, float]:
        """Seconds of `steps` steps, with a save after the first one; and of the save's call."""
        blocked = 0.0
        began = time.perf_counter()
        for step in range(first, first + steps):
            train_step(run.context, run.state, run.batches[step], 1e-4)
            if step == first and save is not None:
                before = time.perf_counter()
                save(step)
                blocked = time.perf_counter() - before
        return time.perf_counter() - began, blocked

    beside, before = (CheckpointManager(accelerator, folder.checkpoints, 1, background) for background in (True, False))
    saves: list[Callable[[int], object] | None] = [
        None,
        lambda step: beside.save_async(run.state.model, run.state.optimizer, {"step": step}),
        lambda step: before.save_async(run.state.model, run.state.optimizer, {"step": step}),
        lambda step: accelerator.save_state(str(folder.path / "rival")),
    ]
    taken: list[list[tuple[float, float]]] = [[] for _ in saves]
    for turn in range(rounds + 1):  # the first one warms up: memory for the copy is fetched once
        for save, times in zip(saves, taken, strict=True):
            times.append(train(turn * steps, save))
            beside.wait()
            os.sync()  # what one leaves to the kernel to write must not slow down the next
    found, _ = storage.newest(folder.checkpoints)
    assert found is not None
    size = sum(path.stat().st_size for path in found.folder.iterdir())
    plain = [seconds for seconds, _ in taken[0][1:]]
    result: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in run.state.model.parameters()),
        "megabytes": size / 1e6,
        "step_seconds": statistics.median(plain) / steps,
    }
    for name, times in zip(WAYS, (each[1:] for each in taken[1:]), strict=True):
        longer = [seconds - without for (seconds, _), without in zip(times, plain, strict=True)]
        result[name] = (statistics.median(blocked for _, blocked in times), statistics.median(longer))
    return result


def recovery(arguments: list[str], folder: Path) -> float:
    """Seconds from `kill -9` of a run with a checkpoint to its next step, where the same command is given at once."""
    command = [sys.executable, "-m", "train_loop", "train", *arguments, "--checkpoint.every", "3"]
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    metrics = folder / "metrics.jsonl"

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    first = start()
    while not any((folder / "checkpoints").glob("step-*")):
        assert first.poll() is None
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    killed, before = time.monotonic(), metrics.stat().st_mtime_ns
    second = start()
    while metrics.stat().st_mtime_ns == before:  # until it is cut back to the checkpoint
        assert second.poll() is None
        time.sleep(0.005)
    size = metrics.stat().st_size  # as cut back to the checkpoint's step
    while metrics.stat().st_size == size:
        assert second.poll() is None
        time.sleep(0.005)
    seconds = time.monotonic() - killed
    second.kill()
    second.wait()
    return seconds


if __name__ == "__main__":
    main()
