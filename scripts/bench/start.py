"""From the command to the first step, against the imports that it needs, and how soon help is there.

    python scripts/bench/start.py [--shape tiny | distilgpt2] [--rounds 3] [--json]

Every contender is a new process. "The imports" is one that loads torch, Accelerate, Transformers' automatic classes and
the model's own, and safetensors, and ends at once. A run counts until its first line of metrics.jsonl: configuration,
prepared data, model, truth sheet, the step itself; the first run also prepares its data (Python's standard library,
with a tokenizer of 4,096 entries). Resuming counts until the line of the step after the checkpoint's.

The checkpoint of step 1,000,000 is that of step 1 with another number in its state.json, manifest and folder's name.
Its metrics.jsonl has a line for each of the steps. What it takes to find the step's data is timed alone as well.
"""

import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import Contender, alternate, parser, report, seconds

SHAPES = {
    "tiny": "{model_type: llama, hidden_size: 128, intermediate_size: 384, num_hidden_layers: 4, "
    "num_attention_heads: 4}",
    "distilgpt2": "{model_type: gpt2, n_layer: 6, vocab_size: 50257}",
}
MODEL_CLASSES = {"tiny": "LlamaForCausalLM", "distilgpt2": "GPT2LMHeadModel"}
FAR = 1_000_000


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__, rounds=3)
    options.add_argument("--shape", choices=SHAPES, default="tiny", help="of the model (tiny)")
    options.add_argument("--lines", type=int, default=FAR, help="lines of metrics.jsonl at step 1,000,000 (1,000,000)")
    given = options.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="bench-start-"))
    os.environ["TRAIN_LOOP_CACHE"] = str(scratch / "cache")
    os.environ["HF_HUB_OFFLINE"] = "1"
    command = [sys.executable, "-m", "train_loop", "train"]
    settings = [
        *("--model.architecture", SHAPES[given.shape], "--tokenizer.train_vocab_size", "4096"),
        *("--data.block_size", "128", "--batch.sequences_per_step", "8", "--train.max_steps", str(2 * FAR)),
        *("--evaluation.every", str(FAR * 2), "--checkpoint.every", "1", "--checkpoint.keep", "9"),
    ]
    needed = (
        "import torch, accelerate, safetensors.torch; "
        "from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, "
        f"PreTrainedTokenizerFast, {MODEL_CLASSES[given.shape]}; import os; os._exit(0)"
    )

    def run(folder: Path, step: int) -> float:
        """Seconds until a step is in the log of a run in a folder."""
        began = time.perf_counter()
        process = subprocess.Popen([*command, *settings, "--run.output_dir", str(folder)], stderr=subprocess.DEVNULL)
        try:
            while not _logged(folder / "metrics.jsonl", step):
                if process.poll() is not None:
                    raise SystemExit(f"the run in {folder} ended before step {step}, with {process.returncode}")
                time.sleep(0.005)
            return time.perf_counter() - began
        finally:
            process.kill()
            process.wait()

    def fresh() -> float:
        folder = Path(tempfile.mkdtemp(dir=scratch))
        return run(folder, 1)

    def resumed(template: Path, step: int) -> Callable[[], float]:
        def work() -> float:
            folder = Path(tempfile.mkdtemp(dir=scratch)) / "run"
            shutil.copytree(template, folder)
            os.sync()  # a log that a run finds has long been on disk
            taken = run(folder, step + 1)
            shutil.rmtree(folder)
            return taken

        return work

    def started(*arguments: str) -> Callable[[], float]:
        return lambda: seconds(lambda: subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL))

    preparing = fresh()
    near, far = scratch / "near", scratch / "far"
    _leave_checkpoint(run, near)
    _move_to(near, far, FAR, given.lines)
    contenders = [
        Contender("the imports alone", started(sys.executable, "-c", needed)),
        Contender("command to first step, data prepared", fresh),
        Contender("resumed at step 1", resumed(near, 1)),
        Contender(f"resumed at step {FAR:,}", resumed(far, FAR)),
        Contender("train-loop --help", started(sys.executable, "-m", "train_loop", "--help")),
        Contender("train-loop train --help", started(*command, "--help")),
    ]
    found = alternate(contenders, given.rounds)
    shutil.rmtree(scratch)
    report(f"starting, {given.shape}", found, 1, "starts", given.json)
    pairs = zip(found[contenders[1].name], found[contenders[0].name], strict=True)
    beyond = statistics.median(mine - theirs for mine, theirs in pairs)
    told = {"beyond_imports_seconds": round(beyond, 2), "first_run_with_preparation_seconds": round(preparing, 2)}
    print(json.dumps(told | _finding(), indent=None if given.json else 2))


def _logged(metrics: Path, step: int) -> bool:
    """Whether the last line of a metrics.jsonl is of that step or a later one."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - 2000))
            lines = file.read().splitlines(keepends=True)
    except FileNotFoundError:
        return False
    return bool(lines) and lines[-1].endswith(b"\n") and json.loads(lines[-1])["step"] >= step


def _leave_checkpoint(run: Callable[[Path, int], float], folder: Path) -> None:
    """A run that was killed after its first checkpoint was whole, with nothing but that one in it."""
    run(folder, 3)
    checkpoints = folder / "checkpoints"
    whole = sorted(each for each in checkpoints.glob("step-*") if (each / "manifest.json").exists())
    for each in checkpoints.iterdir():
        if each != whole[0]:
            shutil.rmtree(each)
    _renumber(whole[0], 1)
    _cut(folder, 1)


def _move_to(near: Path, far: Path, step: int, lines: int) -> None:
    """A copy of a run whose checkpoint and log say that they are of another step."""
    shutil.copytree(near, far)
    (checkpoint,) = (far / "checkpoints").glob("step-*")
    _renumber(checkpoint, step)
    (line,) = [json.loads(each) for each in (far / "metrics.jsonl").read_text().splitlines()]
    with (far / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(line | {"step": each}) + "\n" for each in range(step - lines + 1, step + 1))


def _renumber(checkpoint: Path, step: int) -> None:
    """Let a checkpoint be of another step: state.json, its checksum, and the folder's name."""
    from train_loop.checkpoint.storage import _digest, _sums, folder_of

    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(state | {"step": step}))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["state.json"] = _sums(checkpoint / "state.json")
    manifest["sha256"] = _digest(manifest["files"])
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    checkpoint.rename(folder_of(checkpoint.parent, step))


def _cut(folder: Path, step: int) -> None:
    """Keep one line of metrics.jsonl."""
    first = (folder / "metrics.jsonl").read_text().splitlines()[0]
    (folder / "metrics.jsonl").write_text(json.dumps(json.loads(first) | {"step": step}) + "\n")


def _finding() -> dict[str, float]:
    """Milliseconds to find the blocks of the first step after a given one, of a data set of ten million."""
    from train_loop.data.order import Plan

    plan = Plan(10_000_000, 512, 8, 0)
    taken = {}
    for step in (1, FAR, 1, FAR):  # the second turn counts
        steps = plan.steps(step, 2 * FAR)
        taken[f"finding_the_data_of_step_{step}_ms"] = round(1e3 * seconds(functools.partial(next, steps)), 3)
    return taken


if __name__ == "__main__":
    main()
