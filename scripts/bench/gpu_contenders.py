"""The contenders of `gpu.py`: a plain loop, train_loop's and Transformers' `Trainer`, each in a process of its own."""

import argparse
import contextlib
import json
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import steps_alone

CONTENDERS = PLAIN, LOOP, TRAINER = "a plain loop", "train_loop", "Trainer"
WARM_UP = 3  # steps of Trainer's
Commands = dict[str, Callable[[], dict[str, Any]]]


class Process:
    """A contender in a process of its own, which does what a line on its standard input says, and tells a line of JSON.

    Args:
        script: that is one with --contender NAME.
        name: of the contender.
        options: the sizes, as on the command line.

    Attributes:
        peak_mb: the most memory that it took in any turn, in MB.
    """

    def __init__(self, script: str, name: str, options: list[str]) -> None:
        self.peak_mb = 0.0
        self._log = tempfile.TemporaryFile("w+")
        command = [sys.executable, script, *options, "--contender", name]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )

    def wait_until_ready(self, seconds: float) -> str | None:
        """Wait until it has warmed up; returns why it is not ready, if it isn't."""
        assert self._process.stdout is not None
        there, _, _ = select.select([self._process.stdout], [], [], max(0.0, seconds))
        if not there:
            return "was not ready in time"
        return None if self._process.stdout.readline() else self._last_words()

    def ask(self, command: str) -> dict[str, Any]:
        """What it tells after it has done something.

        Raises:
            RuntimeError: with its last words, where it ends instead.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(self._last_words())
        told: dict[str, Any] = json.loads(line)
        return told

    def seconds(self, command: str) -> float:
        """How long it took to do something."""
        told = self.ask(command)
        self.peak_mb = max(self.peak_mb, told["peak_mb"])
        return float(told["seconds"])

    def end(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()

    def _last_words(self) -> str:
        self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return lines[-1] if lines else f"ended with exit code {self._process.returncode}"


def serve(given: argparse.Namespace) -> None:
    """Be a contender: warm up, say so, then do what the lines of standard input say until there are no more."""
    import torch

    torch.set_float32_matmul_precision("high")
    with contextlib.redirect_stdout(sys.stderr):
        if given.contender == TRAINER:
            _trainer(given)
            return
        commands: Commands = (_plain_loop if given.contender == PLAIN else _the_loop)(given)
        commands["turn"]()
        _tell({"ready": True})
        for line in sys.stdin:
            _tell(commands[line.strip()]())


def _tell(found: dict[str, Any]) -> None:
    print(json.dumps(found), file=sys.__stdout__, flush=True)


def device_of(given: argparse.Namespace) -> Any:
    """Where a contender computes."""
    import torch

    found = None if given.cpu else torch.accelerator.current_accelerator()
    return found or torch.device("cpu")


class _Turn:
    """Times a turn until the device has done it, and gives back memory that the next contender may want."""

    def __init__(self, given: argparse.Namespace) -> None:
        import torch

        self._device = device_of(given)
        self._backend: Any = None if given.cpu else torch.get_device_module(self._device)
        self._began = 0.0

    def begin(self) -> None:
        """The turn begins."""
        if self._backend is not None:
            self._backend.reset_peak_memory_stats()
            self._backend.synchronize()
        self._began = time.perf_counter()

    def end(self) -> dict[str, Any]:
        """What it took."""
        from train_loop import devices

        devices.synchronize(self._device)
        taken = time.perf_counter() - self._began
        peak = devices.peak_memory(self._device)() / 2**20
        if self._backend is not None:
            self._backend.empty_cache()
        return {"seconds": taken, "peak_mb": peak}

    def of(self, work: Callable[[], object]) -> Callable[[], dict[str, Any]]:
        """A turn that does `work`."""

        def run() -> dict[str, Any]:
            self.begin()
            work()
            return self.end()

        return run


def _architecture(given: argparse.Namespace) -> dict[str, Any]:
    heads = max(1, given.width // 64)
    if given.shape == "gpt2-124m":
        sizes = {"n_layer": given.layers, "n_embd": given.width, "n_head": heads, "n_positions": given.block}
        none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return {"model_type": "gpt2", "vocab_size": given.vocabulary} | sizes | none
    return {
        "model_type": "llama",
        "vocab_size": given.vocabulary,
        "hidden_size": given.width,
        "intermediate_size": 4 * given.width,
        "num_hidden_layers": given.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "max_position_embeddings": given.block,
        "tie_word_embeddings": True,
    }


def _model(given: argparse.Namespace) -> Any:
    """The model, on the device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = _architecture(given)
    torch.manual_seed(0)
    with device_of(given):  # a billion random numbers take ten seconds on a CPU
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    return model.train()


def _the_loop(given: argparse.Namespace) -> Commands:
    """The loop of train_loop, with its log; its bare step; a rate to compare with, once nobody else is at work."""
    import torch

    from train_loop import devices, job
    from train_loop.config.load import config_from_arguments
    from train_loop.metrics.log import MetricsLog
    from train_loop.metrics.throughput import matrix_rate

    folder = Path(tempfile.mkdtemp(prefix="bench-gpu-"))
    few = ("--data.max_documents", "50") if given.cpu else ()
    setup = job.set_up(
        config_from_arguments(
            [
                *("--model.architecture", json.dumps(_architecture(given)), *few, "--data.test_size", "0.05"),
                *("--tokenizer.train_vocab_size", str(min(4096, given.vocabulary))),
                *("--data.block_size", str(given.block), "--batch.sequences_per_step", str(given.sequences)),
                *("--model.compile", str(not given.eager).lower(), "--run.mixed_precision", "bf16"),
                *("--train.max_steps", str(given.steps), "--evaluation.every", "1000000"),
                *("--checkpoint.every", "1000000", "--run.output_dir", str(folder)),
            ]
        )
    )
    run, context, optimizer = setup.run, setup.run.context, setup.run.state.optimizer
    setup.folder.path.mkdir(parents=True, exist_ok=True)
    few_steps = [run.batches[step].micro_batches for step in range(min(given.steps, 4))]
    batches = [each.to(context.accelerator.device) for micro_batches in few_steps for each in micro_batches]

    def train() -> None:
        run.state.step = 0
        steps_alone(run, MetricsLog(context.accelerator, setup.folder.metrics, 0))

    def bare() -> None:
        for step in range(given.steps):
            batch = batches[step % len(batches)]
            (context.objective(batch.inputs, batch.targets) / batch.targets.numel()).backward()
            torch.nn.utils.clip_grad_norm_(context.objective.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def rate() -> dict[str, Any]:
        device = context.accelerator.device
        found = {"rate": matrix_rate(device, torch.bfloat16), "operations": context.clock.operations}
        return found | {"device": devices.name(device)}

    turn = _Turn(given)
    return {"turn": turn.of(train), "bare": turn.of(bare), "rate": rate, "profile": lambda: _profile(train, given.cpu)}


def _plain_loop(given: argparse.Namespace) -> Commands:
    import torch
    import torch.nn.functional as F

    device, model = device_of(given), _model(given)
    compiled = model if given.eager else torch.compile(model)
    decayed = [each for each in model.parameters() if each.ndim > 1]
    others = [each for each in model.parameters() if each.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    ids = torch.randint(0, given.vocabulary, (4, given.sequences, given.block + 1), device=device)

    def train() -> None:
        for step in range(given.steps):
            rows = ids[step % len(ids)]
            with torch.autocast(device.type, torch.bfloat16):
                logits = compiled(input_ids=rows[:, :-1], use_cache=False).logits
                loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return {"turn": _Turn(given).of(train)}


def _trainer(given: argparse.Namespace) -> None:
    """Transformers' Trainer, which trains without end, but waits between two turns."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments, logging

    logging.set_verbosity_error()
    turn = _Turn(given)

    class Turns(TrainerCallback):
        left = WARM_UP

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.left -= 1
            if self.left:
                return
            _tell(turn.end())  # after the warm-up this says no more than that it is ready
            if not sys.stdin.readline():
                sys.exit()
            self.left = given.steps
            turn.begin()

    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(prefix="bench-gpu-"),
        per_device_train_batch_size=given.sequences,
        max_steps=10**6,
        bf16=True,
        torch_compile=not given.eager,
        optim="adamw_torch_fused",
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=given.cpu,
    )
    ids = torch.randint(0, given.vocabulary, (64 * given.sequences, given.block))
    data: Any = [{"input_ids": row, "labels": row} for row in ids]
    turn.begin()
    Trainer(model=_model(given), args=arguments, train_dataset=data, callbacks=[Turns()]).train()


def _profile(work: Callable[[], object], cpu: bool) -> dict[str, Any]:
    """A table of operations by the time that they take on the device."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] if cpu else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=kinds) as seen:
        work()
    order = "self_cpu_time_total" if cpu else "self_cuda_time_total"
    return {"table": seen.key_averages().table(sort_by=order, row_limit=30)}
