"""Two processes of one thread each against one of two threads; and what the order of the data costs at 1,024 processes.

    python scripts/bench/processes.py [--rounds 3] [--steps 40] [--json]

Real runs of the same configuration, started by `accelerate launch` with configs/accelerate/cpu.yaml where there are
two processes (gloo, on this machine). A run's seconds are those of its median step in metrics.jsonl, the first quarter
of the steps left out; from there is also what share of a step goes into the exchange of gradients (communication,
beyond what the backward pass hides) and into the wait for the slowest process's losses.

The order of the data needs no process but the one that computes it: the shares of a step of 8,192 sequences, one a
micro-batch, are computed as process 0 of 1,024 would, and then as all of them would, one after the other.
"""

import functools
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import Contender, alternate, parser, report, seconds

ROOT = Path(__file__).resolve().parents[2]
SEQUENCES, BLOCK = 8, 128
ARCHITECTURE = "{model_type: gpt2, n_layer: 4, n_embd: 256, n_head: 4}"
NAMES = {1: "one process, two threads", 2: "two processes, a thread each"}
PROCESSES, SEQUENCES_OF_MANY = 1024, 8192


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__, rounds=3)
    options.add_argument("--steps", type=int, default=40, help="steps of a run (40)")
    options.add_argument("--architecture", default=ARCHITECTURE, help=f"of the model ({ARCHITECTURE})")
    given = options.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="bench-processes-"))
    shares: dict[int, list[dict[str, float]]] = {number: [] for number in NAMES}

    def run(number: int) -> float:
        folder = scratch / "run"
        _train(number, given.steps, given.architecture, folder)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if line["event"] == "step"][given.steps // 4 :]
        shutil.rmtree(folder)
        shares[number].append(
            {
                part: statistics.median(step[f"{part}_seconds"] / step["seconds"] for step in steps)
                for part in ("communication", "waiting", "data")
            }
        )
        return statistics.median(step["seconds"] for step in steps)

    found = alternate([Contender(name, functools.partial(run, number)) for number, name in NAMES.items()], given.rounds)
    shutil.rmtree(scratch)
    report(f"a step of {SEQUENCES} x {BLOCK} tokens", found, SEQUENCES * BLOCK, "tokens", given.json)
    told: dict[str, Any] = {
        f"share of a step, {NAMES[number]}": {
            part: round(statistics.median(each[part] for each in rounds), 4) for part in rounds[0]
        }
        for number, rounds in shares.items()
    }
    print(json.dumps(told | {"the order at 1,024 processes": _order()}, indent=None if given.json else 2))


def _train(number: int, steps: int, architecture: str, folder: Path) -> None:
    """A run on so many processes, with two threads among them."""
    settings = [
        *("--model.architecture", architecture, "--tokenizer.train_vocab_size", "4096"),
        *("--data.block_size", str(BLOCK), "--batch.sequences_per_step", str(SEQUENCES)),
        *("--batch.micro_batch_size", str(SEQUENCES // 2), "--train.max_steps", str(steps)),
        *("--evaluation.every", str(10 * steps), "--data.test_size", "0.001", "--export.verify", "false"),
        *("--checkpoint.every", str(10 * steps), "--run.output_dir", str(folder)),
    ]
    launch = [sys.executable, "-m"]
    if number > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        file = str(ROOT / "configs" / "accelerate" / "cpu.yaml")
        launch += ["accelerate.commands.launch", "--config_file", file, "--main_process_port", port]
        launch += ["--num_processes", str(number), "-m"]
    variables = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(2 // number)}
    command = [*launch, "train_loop", "train", *settings]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-2000:]}")


def _order() -> dict[str, float]:
    """Milliseconds of a step's order, for one of its processes and for all, of ten million blocks."""
    from train_loop.data.order import Plan, cut

    plan = Plan(10_000_000, SEQUENCES_OF_MANY, 1, 0)
    steps = 20
    every = range(PROCESSES)
    # As the loop does: the plan of many steps at once, and this process's share of each.
    mine = seconds(lambda: [cut(blocks, 1, 0, PROCESSES) for blocks in plan.steps(0, steps)]) / steps
    all_of_them = seconds(lambda: [cut(plan.blocks(7), 1, process, PROCESSES) for process in every])
    dealt = sorted(each.number for process in every for each in cut(plan.blocks(7), 1, process, PROCESSES))
    assert dealt == list(range(SEQUENCES_OF_MANY))
    return {"one_process_ms_a_step": round(1e3 * mine, 2), "all_shares_ms": round(1e3 * all_of_them, 1)}


if __name__ == "__main__":
    main()
