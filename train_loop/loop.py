"""The run: set up, epochs of steps, and when to log, evaluate, checkpoint, sample and stop.

`train` is the whole job in order; `_loop` is the training loop, on one screen. One optimizer step is in `step.py`.
"""

import itertools
import time
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from train_loop import checkpoint, model, optimizer
from train_loop.config import Config, to_dict
from train_loop.data.loader import Windows, loader
from train_loop.data.order import Plan, share
from train_loop.data.store import Prepared, prepare
from train_loop.errors import TrainingError
from train_loop.evaluation import evaluate
from train_loop.export import export, push
from train_loop.objective import Objective
from train_loop.progress import Progress, say
from train_loop.run_folder import RunFolder
from train_loop.sampler import Sampling, check_prompt, prompt_ids, sample
from train_loop.signals import StopRequest
from train_loop.step import train_step
from train_loop.study.metrics import MetricsLog, check_trackers


@dataclass
class Run:
    """Everything a run is made of, after setting up. Its state is in `objective` and `optimizer`; the rest is fixed."""

    config: Config
    folder: RunFolder
    accelerator: Accelerator
    data: Prepared
    train: Windows
    validation: Windows
    plan: Plan
    total_steps: int
    objective: nn.Module
    optimizer: AcceleratedOptimizer

    @property
    def model(self) -> Any:
        """The language model itself, without what was wrapped around it."""
        return self.accelerator.unwrap_model(self.objective).model

    def due(self, every: int | str, step: int) -> bool:
        """Whether something that happens every `every` ("epoch" or steps) happens after `step` finished steps."""
        period = self.plan.steps_per_epoch if every == "epoch" else int(every)
        return step % period == 0 or step == self.total_steps


@dataclass
class Summary:
    """How a run ended: `stopped` names the signal that ended it early, `evaluation` is the last one."""

    run: Run
    step: int
    stopped: str | None
    evaluation: dict[str, Any] | None
    hub: str | None = None


def train(config: Config) -> Summary:
    """The whole job: prepare, train (resuming where it was cut off), evaluate, export.

    Raises:
        InputError: for a mistake in the configuration or the data; nothing was written to the run's folder then.
        TrainingError: when training cannot go on.
    """
    run = set_up(config)
    main = run.accelerator.is_main_process
    step = 0
    if main:
        run.folder.claim(config, run.data.ledger())
    run.accelerator.wait_for_everyone()
    if config.run.log_with:
        run.accelerator.init_trackers("train_loop", config=_flat(to_dict(config)))
    try:
        step = _resume(run)
        log = MetricsLog(run.accelerator, run.folder.metrics, step)
        if main:
            run.folder.set_status("running", step)
        with StopRequest() as stop:
            step = _loop(run, log, step, stop)
        log.close()
        last = log.evaluations[-1] if log.evaluations else None
        summary = Summary(run, step, stop.name if step < run.total_steps else None, last)
        if summary.stopped is None and main:
            language_model = run.model
            export(run.folder.model, language_model, run.data.tokenizer, config, run.data.ledger(), log.evaluations)
            if config.export.push_to_hub:
                summary.hub = push(run.folder.model, config)
        if main:
            run.folder.set_status("stopped" if summary.stopped else "complete", step, summary.stopped or "")
    except BaseException as error:
        if main:
            run.folder.set_status("failed", step, f"{type(error).__name__}: {error}")
        raise
    run.accelerator.end_training()
    return summary


def set_up(config: Config) -> Run:
    """Data, model, optimizer and processes of a run, checked; nothing is written to the run's folder.

    Raises:
        InputError: for whatever doesn't fit.
    """
    folder = RunFolder(config.output_dir)
    folder.check(config)
    check_trackers(config.run.log_with)
    accelerator = Accelerator(
        mixed_precision=config.run.mixed_precision,
        log_with=config.run.log_with or None,
        project_dir=str(folder.path),
    )
    data = prepare(config, shown=accelerator.is_local_main_process)
    filler = data.tokenizer.eos_token_id
    assert isinstance(filler, int)
    windows, validation = (Windows(side, config.data.block_size, filler) for side in (data.train, data.validation))
    plan = Plan(len(windows), config.batch.sequences_per_step, config.micro_batch_size, config.run.seed)
    objective = Objective(model.build(config, data.tokenizer).to(accelerator.device))
    for prompt in config.sample.prompts or []:
        check_prompt(objective.model, prompt_ids(data.tokenizer, prompt))
    prepared, adamw = accelerator.prepare(objective, optimizer.build(objective, config.optimizer))
    total_steps = config.train.max_steps or config.train.epochs * plan.steps_per_epoch
    return Run(config, folder, accelerator, data, windows, validation, plan, total_steps, prepared, adamw)


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in the flat form, of plain values, that trackers take."""
    return {f"{section}.{name}": str(value) for section, keys in settings.items() for name, value in keys.items()}


def _resume(run: Run) -> int:
    """Load the newest whole checkpoint, if there is one; returns its step."""
    found, passed = checkpoint.newest(run.folder.checkpoints)
    if run.accelerator.is_main_process:
        for line in passed:
            say(line)
    if found is None:
        return 0
    checkpoint.load(found, run.model, run.optimizer)
    if run.accelerator.is_main_process:
        say(f"resuming from {found.folder}")
    return found.step


def _loop(run: Run, log: MetricsLog, start: int, stop: StopRequest) -> int:
    """Train from step `start` to the end, or until a signal; returns the number of finished steps."""
    config, accelerator, plan = run.config, run.accelerator, run.plan
    process, processes = accelerator.process_index, accelerator.num_processes
    # The plan of a step is needed twice: by the loader, which may read ahead, and here.
    plans, to_load = itertools.tee(plan.steps(start, run.total_steps))
    batches = iter(
        loader(
            run.train,
            itertools.chain.from_iterable(share(step, process, processes) for step in to_load),
            num_workers=config.data.num_workers,
            pin_memory=accelerator.device.type == "cuda",
        )
    )
    bad_steps = 0
    run.objective.train()
    with Progress("training", "step", run.total_steps, start, accelerator.is_main_process) as progress:
        for step, micro_batches in enumerate(plans, start):
            began = time.perf_counter()
            count = -(-len(micro_batches) // processes)
            targets = sum(run.train.targets(micro_batch.blocks) for micro_batch in micro_batches)
            rate = optimizer.learning_rate(step, run.total_steps, config.optimizer.learning_rate, config.schedule)
            result = train_step(
                accelerator,
                run.objective,
                run.optimizer,
                itertools.islice(batches, count),
                count=count,
                targets=targets,
                learning_rate=rate,
                max_grad_norm=config.optimizer.max_grad_norm,
                seed=(config.run.seed, step),
            )
            speed = targets / (time.perf_counter() - began)
            done = step + 1
            epoch = done / plan.steps_per_epoch
            log.write(
                "step",
                done,
                epoch=epoch,
                loss=result.loss,
                learning_rate=rate,
                grad_norm=result.grad_norm,
                tokens=targets,
                tokens_per_second=speed,
                **({} if result.taken else {"skipped": True}),
            )
            progress.update(1, f"loss {result.loss:.4f}, {speed:,.0f} tokens/s")
            bad_steps = 0 if result.taken else bad_steps + 1
            if bad_steps == config.train.max_bad_steps:
                raise TrainingError(
                    f"step {done}: loss {result.loss}, gradient norm {result.grad_norm}, not finite for "
                    f"{bad_steps} steps in a row; try a lower optimizer.learning_rate or more warm-up"
                )
            if run.due(config.evaluation.every, done):
                _evaluate(run, log, done, epoch)
            stopping = _agree(run, stop)
            if run.due(config.checkpoint.every, done) or stopping:
                _checkpoint(run, done)
            if stopping:
                return done
    return run.total_steps


def _agree(run: Run, stop: StopRequest) -> bool:
    """Whether any process was asked to stop: all must leave the loop after the same step."""
    if run.accelerator.num_processes == 1:
        return stop.name is not None
    import torch

    asked = torch.tensor(float(stop.name is not None), device=run.accelerator.device)
    if run.accelerator.reduce(asked, "sum") > 0:
        stop.name = stop.name or "a signal to another process"
        return True
    return False


def _evaluate(run: Run, log: MetricsLog, step: int, epoch: float) -> None:
    """Evaluate, and sample a text or two; both go to the log and to stderr."""
    config = run.config
    main = run.accelerator.is_main_process
    metrics = evaluate(run.accelerator, run.objective, run.validation, config.evaluation_batch_size)
    log.write("evaluation", step, epoch=epoch, **metrics)
    if main:
        say(
            f"step {step}, epoch {epoch:.2f}: validation loss {metrics['loss']:.4f}, "
            f"perplexity {metrics['perplexity']:.3f}, {metrics['bits_per_byte']:.4f} bits per byte, "
            f"accuracy {metrics['accuracy']:.4f}"
        )
    settings = config.sample
    chosen = Sampling(
        settings.max_new_tokens, settings.temperature, settings.top_k, settings.top_p, seed=config.run.seed
    )
    for prompt in _prompts(run) if main else []:
        text = sample(run.model, run.data.tokenizer, prompt, chosen)
        log.write("sample", step, prompt=prompt, continuation=text)
        say(f"  sample: {prompt}{text}")


def _prompts(run: Run) -> list[str]:
    """What to continue after each evaluation: as configured, else one text from its beginning, where it has one."""
    if run.config.sample.prompts is not None:
        return run.config.sample.prompts
    return [""] if run.data.tokenizer.bos_token_id is not None else []


def _checkpoint(run: Run, step: int) -> None:
    """Save the state and drop old ones; the main process writes, the others wait."""
    if run.accelerator.is_main_process:
        state = {
            "step": step,
            "fingerprint": run.data.fingerprint,
            "processes": run.accelerator.num_processes,
            "versions": checkpoint.versions(),
        }
        checkpoint.save(run.folder.checkpoints, run.model, run.optimizer, state)
        checkpoint.prune(run.folder.checkpoints, run.config.checkpoint.keep)
    run.accelerator.wait_for_everyone()
