"""Kill a real run at random moments, resume it each time, and compare its end with an uninterrupted run's, to the bit.

    python scripts/soak.py [--kills 50] [--processes 1] [--seed 0] [--folder FOLDER] [--section.key value ...]

A small GPT-2 with dropout is trained for three epochs on part of Python's standard library. Each kill is `kill -9`, of
all processes or of one, at a moment of one of these kinds, in turn:

    training     after some more steps            start        while libraries, data and checkpoint are loaded
    save         while a checkpoint is written    evaluation   after a step that is evaluated and sampled from
    preparation  while the token store is written               finish       while the model is exported

At the end the metrics (all but the speeds) and the exported weights must be the uninterrupted run's; exit code 1 if
they are not. Also printed: what the kills hit, and how long it took from each to the next step. Further arguments are
settings of the run (both runs get them).
"""

import argparse
import collections
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from train_loop.metrics.throughput import MEASURED

KINDS = ("training", "save", "evaluation", "start", "save", "training", "preparation", "finish", "evaluation")
SETTINGS = {
    "model.architecture": "{model_type: gpt2, n_layer: 2, n_embd: 64, n_head: 2}",  # dropout 0.1
    "tokenizer.train_vocab_size": "512",
    "data.max_documents": "12",
    "data.test_size": "0.2",
    "data.block_size": "64",
    "batch.sequences_per_step": "8",
    "batch.micro_batch_size": "2",
    "optimizer.learning_rate": "1e-3",
    "train.epochs": "3",
    "evaluation.every": "25",
    "sample.max_new_tokens": "20",
    "checkpoint.every": "7",
    "export.verify": "false",
}
SECONDS = 300  # longer than any start takes


class Victim:
    """A run that is started, killed and started again."""

    def __init__(self, folder: Path, name: str, processes: int, settings: dict[str, str]) -> None:
        self.folder, self.processes, self.settings = folder / name, processes, settings
        self.cache = folder / f"cache-{name}"
        self.log = folder / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, or start it again: the same command every time."""
        arguments = ["-m", "train_loop", "train", "--run.output_dir", str(self.folder)]
        arguments += [part for key, value in self.settings.items() for part in (f"--{key}", value)]
        variables = {"TRAIN_LOOP_CACHE": str(self.cache), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, *arguments]
        if self.processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(self.processes)]
            command = [sys.executable, *launch, "--main_process_port", port, *arguments]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=os.environ | variables, start_new_session=True
            )

    def running(self) -> bool:
        """Whether it has not ended yet."""
        assert self.process is not None
        return self.process.poll() is None

    def kill(self, draw: random.Random) -> str:
        """`kill -9` of all its processes, or of one of those that train; returns which."""
        assert self.process is not None
        workers = psutil.Process(self.process.pid).children() if self.processes > 1 else []
        one = len(workers) == self.processes and draw.random() < 0.5
        if one:
            draw.choice(workers).kill()
            try:
                self.process.wait(60)  # the launcher ends the others
            except subprocess.TimeoutExpired:
                one = False
        if self.running():
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for worker in workers:  # not the launcher's session any more, or slow to go
            if worker.is_running():
                worker.kill()
                worker.wait(30)
        return "one" if one else "all"

    def events(self) -> list[dict[str, Any]]:
        """Its metrics so far, but for the speeds."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        events = [json.loads(line) for line in lines if line.endswith("\n")]
        return [{name: value for name, value in event.items() if name not in MEASURED} for event in events]

    def step(self) -> int:
        """Its last step in the metrics, seen through the file's last lines only: it is looked at very often."""
        try:
            with open(self.folder / "metrics.jsonl", "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
                lines = file.read().splitlines(keepends=True)[1:]
        except FileNotFoundError:
            return 0
        whole = [line for line in lines if line.endswith(b"\n")]
        return int(json.loads(whole[-1])["step"]) if whole else 0


def wait_until(victim: Victim, condition: Callable[[], bool]) -> bool:
    """Whether it came true before the run ended."""
    began = time.monotonic()
    while victim.running():
        if condition():
            return True
        if time.monotonic() - began > SECONDS:
            raise SystemExit(f"nothing happened for {SECONDS} s; see {victim.log}")
        time.sleep(0.001)
    return False


def moment(kind: str, victim: Victim, draw: random.Random, total: int) -> bool:
    """Wait for a moment of a kind; False when the run ended before."""
    first, began = victim.step(), time.monotonic()
    if kind == "start":
        seconds = draw.uniform(0, 8)
        return wait_until(victim, lambda: time.monotonic() - began > seconds)
    if kind == "preparation":
        found = wait_until(victim, lambda: any((victim.cache / "stores").glob("*.tmp-*")))
    elif kind == "finish":
        found = wait_until(victim, lambda: any(victim.folder.glob(".train_loop-*-model")))
    elif kind == "save":
        after = first + draw.randrange(0, max(1, total // 10))
        found = wait_until(
            victim, lambda: victim.step() > after and any((victim.folder / "checkpoints").glob(".train_loop-*-step-*"))
        )
    elif kind == "evaluation":
        every = int(victim.settings["evaluation.every"])
        found = wait_until(victim, lambda: victim.step() > first and victim.step() % every == 0)
    else:
        after = first + draw.randrange(1, max(2, total // 10))
        found = wait_until(victim, lambda: victim.step() > after)
    time.sleep(draw.uniform(0, 0.03))
    return found


def next_step(victim: Victim) -> bool:
    """Wait for the first step after a start; False when there was none."""
    metrics = victim.folder / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns if metrics.exists() else None
    # Cutting off the lines of lost steps changes the file, also where there are none.
    if not wait_until(victim, lambda: metrics.exists() and metrics.stat().st_mtime_ns != before):
        return False
    resumed = victim.step()
    return wait_until(victim, lambda: victim.step() != resumed)


def main() -> int:
    """Run the reference, then the victim; compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to keep both runs; else they are removed")
    given, rest = parser.parse_known_args()
    settings = SETTINGS | dict(zip((key.removeprefix("--") for key in rest[::2]), rest[1::2], strict=True))
    folder = given.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)

    reference = Victim(folder, "uninterrupted", given.processes, settings)
    reference.start()
    wait_until(reference, lambda: False)
    expected = reference.events()
    total = max((event["step"] for event in expected), default=0)
    if reference.process is None or reference.process.returncode or not total:
        raise SystemExit(f"the uninterrupted run failed; see {reference.log}")

    victim = Victim(folder, "killed", given.processes, settings)
    hits: collections.Counter[str] = collections.Counter()
    recovery: list[float] = []
    kills, completed, killed_at = 0, 0, 0.0
    while kills < given.kills:
        kind = KINDS[(kills + given.seed) % len(KINDS)]
        draw = random.Random(f"{given.seed} {kills} {completed}")
        if kind == "preparation":
            shutil.rmtree(victim.cache, ignore_errors=True)  # else there is nothing to prepare
        victim.start()
        if kind in ("training", "evaluation", "save") and next_step(victim) and killed_at:
            recovery.append(time.monotonic() - killed_at)
        if not moment(kind, victim, draw, total):
            if victim.process is None or victim.process.returncode:
                raise SystemExit(f"the run failed after {kills} kills; see {victim.log}")
            # It came to its end before it could be killed; kill another one from its beginning.
            compare(victim, expected, reference)
            shutil.rmtree(victim.folder)
            completed, killed_at = completed + 1, 0.0
            continue
        which = victim.kill(draw)
        killed_at = time.monotonic()
        half_written = any((victim.folder / "checkpoints").glob("tmp-*"))
        hits[f"{kind}, {which} of the processes" + (", half a checkpoint left" if half_written else "")] += 1
        kills += 1
        print(f"{kills:3} {kind:12} step {victim.step():4} of {total}", file=sys.stderr, flush=True)
    victim.start()
    wait_until(victim, lambda: False)
    if victim.process is None or victim.process.returncode:
        raise SystemExit(f"the run failed after {kills} kills; see {victim.log}")
    compare(victim, expected, reference)

    runs = f"{completed + 1} whole runs of {total} steps"
    print(f"{kills} kills on {given.processes} processes, {runs}: every bit the same as without")
    for hit, count in sorted(hits.items()):
        print(f"  {count:3} {hit}")
    if recovery:
        print(f"from a kill to the next step: median {statistics.median(recovery):.1f} s (start of Python included)")
    if given.folder is None:
        shutil.rmtree(folder)
    return 0


def compare(victim: Victim, expected: list[dict[str, Any]], reference: Victim) -> None:
    """Stop where metrics or weights are not those of the uninterrupted run."""
    found = victim.events()
    if found != expected:
        other = next((pair for pair in zip(found, expected, strict=False) if pair[0] != pair[1]), ("length", "length"))
        raise SystemExit(f"metrics differ: {other[0]}, uninterrupted {other[1]}; see {victim.folder}")
    weights = [(each.folder / "model" / "model.safetensors").read_bytes() for each in (victim, reference)]
    if weights[0] != weights[1]:
        raise SystemExit(f"weights differ; see {victim.folder}")


if __name__ == "__main__":
    sys.exit(main())
