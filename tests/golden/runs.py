"""A handful of small runs and what they come to: numbers.json, which no change of the code may change.

    python -m tests.golden.runs              measures, and prints what numbers.json would hold
    python -m tests.golden.runs --write      writes it

For each run its losses, and SHA-256 of everything: metrics, statistics, weights with moments, what the run comes to
when it is resumed from step 3, an evaluation, samples, a replayed step. What is measured of the machine is left out.

A sum has other bits in another order, and torch, MKL and oneDNN each choose kernels, and with them an order, by the
processor. So the runs are made on one thread with kernels that every x86-64 processor of the last ten years has
(`KERNELS`; torch and oneDNN: AVX2, MKL: those that promise the same bits on all). With the versions in numbers.json:

- They were made on a Xeon with AVX-512 and AMX. glibc 2.36 and 2.41 make no difference.
- Without `KERNELS`, all bits differ, and losses by up to 1e-7, in bf16 by 1e-4. So they do with torch 2.9 and 2.11;
  with 2.15 only some statistics do. So bits are compared with the same versions only.

Not tried: another processor, so bits are compared on the same model only; and torch's build for CUDA of the same
version, which counts as another version.
fp16's retry is computed in fp32, with a double, as a CPU has no fp16; see `scaled`.
"""

import contextlib
import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scripts.same_numbers import digest, logged, write_text
from tests.support import launch
from tests.support.runs import TINY_MODELS

NUMBERS = Path(__file__).parent / "numbers.json"
KERNELS = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "AVX2"}
LIBRARIES = ("torch", "transformers", "accelerate", "tokenizers", "numpy")  # those that numbers come from

GPT2 = TINY_MODELS["gpt2"]
LLAMA = TINY_MODELS["llama"] | {"attention_dropout": 0.1}
BITWISE = {"run.reproducible": "bitwise", "batch.micro_batch_size": "2"}
SCALED = "gpt2, loss scaled"
RUNS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {  # architecture, settings
    "gpt2": (GPT2, {"batch.micro_batch_size": "3", "study.every": "4"}),
    "llama, isolated": (LLAMA, {"data.isolate_documents": "true", "study.every": "4"}),
    "gpt2, bf16": (GPT2, {"run.mixed_precision": "bf16"}),
    SCALED: (GPT2, {}),
    "gpt2, bitwise": (GPT2, BITWISE),
}
ON_TWO: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "llama, two processes": (LLAMA, {"batch.micro_batch_size": "2"}),
    "gpt2, two processes, bitwise": (GPT2, BITWISE),
}


def measure() -> dict[str, Any]:
    """What numbers.json holds, as it comes out here."""
    with tempfile.TemporaryDirectory(prefix="golden-") as scratch:
        write_text(Path(scratch) / "text")
        command = [sys.executable, "-m", "tests.golden.runs", "--in", scratch]
        variables = launch.environment(launch.ON_CPU | KERNELS)
        with subprocess.Popen(command, cwd=launch.ROOT, env=variables, stdout=subprocess.PIPE, text=True) as alone:
            on_two = launched(Path(scratch))
            out, _ = alone.communicate()
        if alone.returncode:
            raise SystemExit(f"{' '.join(command)}: exit code {alone.returncode}")
        found = json.loads(out)
    found["runs"] |= on_two
    return dict(found)


def launched(folder: Path) -> dict[str, Any]:
    """The runs on two processes."""
    commands = []
    for name in ON_TWO:
        given = settings(folder, name)
        commands += [["train", *given], ["evaluate", "--model", str(folder / name), *given]]
    outcomes = launch.fresh(2, commands, **KERNELS)
    for outcome in outcomes:
        if outcome.code:
            raise SystemExit(outcome.err)
    evaluations = [json.loads(outcome.out) for outcome in outcomes[1::2]]
    return {
        name: summary(dict(trained(folder / name)) | {"evaluation": evaluation})
        for name, evaluation in zip(ON_TWO, evaluations, strict=True)
    }


def in_this_process(folder: Path) -> dict[str, Any]:
    """The runs on one process, and what they were made with."""
    from train_loop import devices

    devices.cpu_computes_bf16 = lambda: True  # type: ignore[assignment]  # `KERNELS` do without its instructions
    os.chdir(folder)  # documents are told by their paths
    found = {}
    for name in RUNS:
        with scaled() if name == SCALED else contextlib.nullcontext():
            found[name] = summary(dict(facts(name)))
    import torch

    return {
        "versions": {name: version(name) for name in LIBRARIES} | {"torch": torch.__version__},
        "kernels": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {processor()}",
        "runs": found,
    }


def processor() -> str:
    """The model of this machine's processor, as Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def facts(name: str) -> Iterator[tuple[str, Any]]:
    """All that a run and what is done with it come to, by what it is."""
    run, given = Path(name), settings(Path(), name)
    call("train", *given)
    yield from trained(run)
    for step in (6, 8):  # back to step 3
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    shutil.rmtree(run / "model")
    call("train", *given)
    yield "metrics, resumed", logged(run / "metrics.jsonl")
    yield "weights, resumed", digest(run)
    yield "evaluation", json.loads(call("evaluate", "--model", name, *given))
    prompts = ("--prompt", "ab", "--prompt", "c", "--max_new_tokens", "20")
    yield "samples", call("sample", "--model", name, *prompts, "--json").splitlines()
    replayed = json.loads(call("inspect", "--run", name, "--step", "5", "--json", codes=(0, 1)))  # 1: another loss
    yield "replay", replayed | {"verification": replayed["verification"]["verdict"]}


def trained(run: Path) -> Iterator[tuple[str, Any]]:
    """What a run has left in its folder."""
    yield "metrics", logged(run / "metrics.jsonl")
    if (run / "study.jsonl").exists():
        yield "statistics", logged(run / "study.jsonl")
    yield "weights", digest(run)


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """The losses of a run, to compare to rounding, and SHA-256 of everything, to compare to the bit."""
    sums = {name: hashlib.sha256(json.dumps(fact, sort_keys=True).encode()).hexdigest() for name, fact in found.items()}
    losses = {
        kind: [event["loss"] for event in found["metrics"] if event["event"] == kind] for kind in ("step", "evaluation")
    }
    return {"losses": losses, "replay": found.get("replay", {}).get("verification"), "sha256": sums}


def settings(folder: Path, name: str) -> list[str]:
    """The settings of a run of eight steps, on the text in the folder."""
    architecture, changes = (RUNS | ON_TWO)[name]
    values = {
        "run.output_dir": str(folder / name),
        "model.architecture": json.dumps(architecture),
        "tokenizer.train_vocab_size": "300",
        "data.source": "files",
        "data.files": str(folder / "text" / "*.txt"),
        "data.cache_dir": str(folder / f"cache of {name}"),
        "data.block_size": "32",
        "batch.sequences_per_step": "7",
        "optimizer.learning_rate": "3e-3",
        "schedule.warmup_steps": "2",
        "train.max_steps": "8",
        "evaluation.every": "4",
        "sample.max_new_tokens": "20",
        "checkpoint.every": "3",
        "checkpoint.keep": "9",
        "export.verify": "false",
        **changes,
    }
    return [part for key, value in values.items() for part in (f"--{key}", value)]


def call(*command: str, codes: tuple[int, ...] = (0,)) -> str:
    """What a command prints on stdout, run in this process, where it ends with one of the exit codes."""
    from accelerate.state import AcceleratorState

    from train_loop.cli import main

    AcceleratorState._reset_state(reset_partial_state=True)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(command))
    if code not in codes:
        raise SystemExit(f"{' '.join(command)}: exit code {code}\n{err.getvalue()}")
    return out.getvalue()


@contextlib.contextmanager
def scaled() -> Iterator[None]:
    """Within this, Accelerate scales the loss as for fp16, and gradients overflow where fp16's would, in fp32.

    The scale is too large at first: the first step is computed several times.
    """
    import torch
    from accelerate import Accelerator

    prepare: Callable[..., Any] = Accelerator.prepare

    def double(self: Any, *objects: Any, **options: Any) -> Any:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
        for each in objects:
            for parameter in each.parameters() if isinstance(each, torch.nn.Module) else ():
                parameter.register_hook(lambda gradient: gradient.masked_fill(gradient.abs() > 65504, float("inf")))
        return prepare(self, *objects, **options)

    Accelerator.prepare = double  # type: ignore[method-assign]
    try:
        yield
    finally:
        Accelerator.prepare = prepare  # type: ignore[method-assign]


def main() -> None:
    """Measure, and print or write what comes out."""
    if sys.argv[1:2] == ["--in"]:
        print(json.dumps(in_this_process(Path(sys.argv[2]))))
        return
    text = json.dumps(measure(), indent=1) + "\n"
    if sys.argv[1:] == ["--write"]:
        NUMBERS.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
