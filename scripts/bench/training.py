"""Tokens per second and memory of training, against `Trainer` and against the rate of matrix products.

    python scripts/bench/training.py [--shape distilgpt2 | llama-128k] [--mixed_precision bf16] [--capability avx2]
        [--rounds 5] [--json]

8 x 128 tokens a step, in fp32 if nothing else is said, dropout as the model has it, from random weights. Each contender
is a process of its own (how the C library keeps memory is a property of a process) that trains a step when it is its
turn; the first steps warm up. Memory is the process's peak beyond what it had before the model, weights, gradients and
moments (16 bytes a parameter) not counted. The bound is all fp32 products of a step and nothing else (`products.py`),
by the fastest of the libraries; each of them is a contender, too, so that it meets the same minutes of the machine.
"""

import contextlib
import functools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import Contender, alternate, parser, report
from products import Library, libraries

SEQUENCES, BLOCK = 8, 128
SHAPES: dict[str, dict[str, Any]] = {
    "distilgpt2": {"model_type": "gpt2", "n_layer": 6, "vocab_size": 50257},
    "llama-128k": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "tie_word_embeddings": True,
    },
}
CONTENDERS = ("Trainer", "train_loop", "train_loop, run.keep_memory false")


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__, rounds=5)
    options.add_argument("--shape", choices=SHAPES, default="distilgpt2", help="of the model (distilgpt2)")
    options.add_argument("--mixed_precision", choices=("no", "bf16"), default="no", help="of both loops (no)")
    options.add_argument("--contender", choices=CONTENDERS, help="what a process started by this one is")
    given = options.parse_args()
    if given.contender:
        with contextlib.redirect_stdout(sys.stderr):
            if given.contender == "Trainer":
                _trainer(given.shape, given.mixed_precision == "bf16")
            else:
                _loop(given.shape, given.mixed_precision, keep_memory=given.contender == "train_loop")
        return
    command = [sys.executable, __file__, "--shape", given.shape, "--mixed_precision", given.mixed_precision]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    processes = {name: subprocess.Popen([*command, "--contender", name], text=True, **pipes) for name in CONTENDERS}
    told: dict[str, dict[str, float]] = {}

    def step(name: str) -> float:
        process = processes[name]
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("step\n")
        process.stdin.flush()
        told[name] = json.loads(process.stdout.readline())
        return float(told[name]["seconds"])

    for name in CONTENDERS:  # begin one after the other, and warm up
        step(name)
    in_fp32 = given.mixed_precision == "no"
    alone = {f"products alone, {name}": Library(name, given.shape) for name in libraries() if in_fp32}
    tokens = SEQUENCES * BLOCK
    contenders = [Contender(name, functools.partial(step, name)) for name in CONTENDERS]
    contenders += [Contender(name, library.step) for name, library in alone.items()]
    found = alternate(contenders, given.rounds)
    for process in processes.values():
        process.kill()
    for library in alone.values():
        library.kill()
    title = f"a training step, {given.shape}, {SEQUENCES} x {BLOCK} tokens, mixed precision {given.mixed_precision}"
    report(title, found, tokens, "tokens", given.json)
    bound = min((statistics.median(found[name]) for name in alone), default=math.nan)
    memory = {name: round(each["extra_mb"]) for name, each in told.items()}
    rows = {
        "parameters": told["train_loop"]["parameters"],
        "share_of_bound": bound / statistics.median(found["train_loop"]) if in_fp32 else None,
        "memory_beyond_state_mb": memory,
        "memory_of_trainers": round(memory["train_loop"] / memory["Trainer"], 3),
    }
    print(json.dumps(rows, indent=None if given.json else 2))


def _memory(name: str) -> float:
    """VmRSS or VmHWM, the peak, of this process, in MB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


class _Turns:
    """Lets this process train a step for each line of standard input, and tells what it took."""

    def __init__(self) -> None:
        self.before, self.parameters, self._began = _memory("VmRSS"), 0, 0.0

    def __call__(self) -> None:
        """To be called between steps."""
        if self._began:
            taken = time.perf_counter() - self._began
            extra = _memory("VmHWM") - self.before - 16 * self.parameters / 2**20
            told = {"seconds": taken, "parameters": self.parameters, "extra_mb": extra}
            print(json.dumps(told), file=sys.__stdout__, flush=True)
        if not sys.stdin.readline():
            sys.exit()
        self._began = time.perf_counter()


def _model(shape: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(SHAPES[shape])
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))


def _loop(shape: str, precision: str, keep_memory: bool) -> None:
    from train_loop import job
    from train_loop.config.load import config_from_arguments
    from train_loop.training.state import Observer, StepBatch, TrainState

    folder = Path(tempfile.mkdtemp(prefix="bench-training-"))
    turns = _Turns()

    class Callback(Observer):
        def before_step(self, state: TrainState, batch: StepBatch) -> None:
            turns.parameters = sum(parameter.numel() for parameter in state.model.parameters())
            turns()

    job.train(
        config_from_arguments(
            [
                *("--model.architecture", json.dumps(SHAPES[shape]), "--tokenizer.train_vocab_size", "4096"),
                *("--data.block_size", str(BLOCK), "--batch.sequences_per_step", str(SEQUENCES)),
                *("--train.max_steps", "1000", "--evaluation.every", "1000", "--checkpoint.every", "1000"),
                *("--run.mixed_precision", precision),
                *("--run.keep_memory", str(keep_memory).lower(), "--run.output_dir", str(folder)),
            ]
        ),
        callbacks=[Callback()],
    )


def _trainer(shape: str, bf16: bool) -> None:
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments, logging

    logging.set_verbosity_error()
    turns = _Turns()

    class Callback(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns()

    torch.manual_seed(0)
    model = _model(shape)
    turns.parameters = sum(parameter.numel() for parameter in model.parameters())
    ids = torch.randint(0, SHAPES[shape]["vocab_size"], (8000, BLOCK))
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(prefix="bench-training-"),
        per_device_train_batch_size=SEQUENCES,
        max_steps=1000,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=bf16,
    )
    data: Any = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Callback()]).train()


if __name__ == "__main__":
    main()
