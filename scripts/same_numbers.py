"""Prove that a change leaves every number as it was: run old and new code on this machine, and compare all bits.

    python scripts/same_numbers.py REVISION [--only NAME ...]

Checks REVISION out beside the working tree and runs both on the same text: GPT-2 and Llama shapes, one process and two,
fp32 and bf16, isolated documents, `run.reproducible: bitwise`, a run that goes on from a checkpoint, an evaluation,
samples, a replayed step. Compared are losses, gradient norms, statistics, texts and the SHA-256 of weights and moments.
Prints a line a run; exit code 1 where anything differs.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
}
BITWISE = {"run.reproducible": "bitwise"}
RUNS: dict[str, tuple[int, dict[str, Any], dict[str, str]]] = {  # processes, architecture, settings
    "gpt2": (1, GPT2, {"study.every": "4"}),
    "llama": (1, LLAMA, {"study.every": "4"}),
    "gpt2, bf16": (1, GPT2, {"run.mixed_precision": "bf16"}),
    "llama, bf16, recomputed": (1, LLAMA, {"run.mixed_precision": "bf16", "model.activation_checkpointing": "true"}),
    "llama, isolated": (1, LLAMA, {"data.isolate_documents": "true"}),
    "gpt2, bitwise": (1, GPT2, BITWISE),
    "llama, two processes": (2, LLAMA, {"batch.micro_batch_size": "3"}),
    "gpt2, two processes, bitwise": (2, GPT2, BITWISE | {"batch.micro_batch_size": "2"}),
}
MEASURED = ("seconds", "tokens_per_second", "mfu", "peak_memory_bytes")  # of the machine, not of the run
STEPS = 10


def main() -> int:
    """Run both; returns the exit code."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("revision", help="of the old code, as git knows it")
    options.add_argument("--only", nargs="+", choices=RUNS, metavar="NAME", help=f"runs ({', '.join(RUNS)})")
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="same-numbers-") as scratch:
        folder = Path(scratch)
        old = folder / "old-code"
        subprocess.run(["git", "worktree", "add", "--detach", "--quiet", old, given.revision], cwd=ROOT, check=True)
        try:
            write_text(folder / "text")
            return compare(old, folder, given.only or list(RUNS))
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", old], cwd=ROOT, check=True)


def write_text(folder: Path) -> None:
    """Forty files of made-up words, of 5 to 200 each."""
    folder.mkdir()
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 6))) for _ in range(60)]
    for number in range(40):
        (folder / f"{number:02d}.txt").write_text(" ".join(draw.choices(words, k=5 + 5 * number)), encoding="utf-8")


def compare(old: Path, folder: Path, names: list[str]) -> int:
    """Print what is the same and what differs; returns the exit code."""
    differ = 0
    for name in names:
        before, now = (dict(facts(code, folder / kind, folder / "text", name)) for code, kind in both(old))
        wrong = [fact for fact in before.keys() | now.keys() if before.get(fact) != now.get(fact)]
        differ += bool(wrong)
        told = f"differ: {', '.join(sorted(wrong))}" if wrong else f"the same: {', '.join(now)}"
        print(f"{name:30} {told}", flush=True)
    return int(differ > 0)


def both(old: Path) -> list[tuple[Path, str]]:
    """Where the code lies, and what its results are filed under."""
    return [(old, "old"), (ROOT, "new")]


def facts(code: Path, results: Path, text: Path, name: str) -> Iterator[tuple[str, Any]]:
    """All that a run and what is done with it come to, by what it is."""
    processes, architecture, changes = RUNS[name]
    run = results / name.replace(", ", "-").replace(" ", "-")
    settings = {
        "run.output_dir": str(run),
        "model.architecture": json.dumps(architecture),
        "tokenizer.train_vocab_size": "300",
        "data.source": "files",
        "data.files": json.dumps([f"{text}/*.txt"]),
        "data.cache_dir": str(results / "cache"),
        "data.block_size": "32",
        "batch.sequences_per_step": "7",
        "optimizer.learning_rate": "1e-2",
        "train.max_steps": str(STEPS),
        "evaluation.every": "5",
        "checkpoint.every": "4",
        "checkpoint.keep": "9",
        "export.verify": "false",
        **changes,
    }
    given = [part for key, value in settings.items() for part in (f"--{key}", value)]
    call(code, ["train", *given], processes)
    yield "losses", logged(run / "metrics.jsonl")
    if "study.every" in changes:
        yield "statistics", logged(run / "study.jsonl")
    yield "weights", digest(run)
    for step in (8, STEPS):  # back to step 4
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    shutil.rmtree(run / "model")
    call(code, ["train", *given], processes)
    yield "losses, resumed", logged(run / "metrics.jsonl")
    yield "weights, resumed", digest(run)
    yield "evaluation", call(code, ["evaluate", "--model", str(run), *given], processes)
    if processes == 1:
        yield "samples", call(code, ["sample", "--model", str(run), "--prompt", "ab", "--prompt", "c", "--json"])
        replayed = json.loads(call(code, ["inspect", "--run", str(run), "--step", "6", "--json"]))
        yield "replay", {key: value for key, value in replayed.items() if key != "verified"}


def call(code: Path, command: list[str], processes: int = 1) -> str:
    """What a command prints on stdout, run with the code of one of the two."""
    variables = {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(code)}
    start = [sys.executable, "-m", "train_loop"]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        launcher = ["--multi_gpu", "--num_processes", str(processes), "--main_process_port", port]
        start = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "-m", "train_loop"]
    done = subprocess.run([*start, *command], cwd=code, env=os.environ | variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{code}: {' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
    return done.stdout


def logged(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, without what they say of the machine."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        {key: value for key, value in line.items() if not key.endswith("_seconds") and key not in MEASURED}
        for line in lines
    ]


def digest(run: Path) -> str:
    """SHA-256 of the tensors of the exported model and of all checkpoints, with their names."""
    from safetensors import safe_open

    found = hashlib.sha256()
    for path in sorted(run.rglob("*.safetensors")):
        found.update(str(path.relative_to(run)).encode())
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                found.update(name.encode() + file.get_tensor(name).numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
