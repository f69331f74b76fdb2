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

from train_loop import checkpoint, model, optimizer, processes
from train_loop.config import Config, shared_digest, to_dict
from train_loop.data.loader import Windows, loader
from train_loop.data.order import Plan, share
from train_loop.data.store import Prepared, prepare
from train_loop.errors import TrainingError
from train_loop.evaluation import evaluate
from train_loop.export import export, push
from train_loop.objective import Objective
from train_loop.progress import Progress, say
from train_loop.reproducible import TOLERANCE, FixedPointSums
from train_loop.run_folder import RunFolder
from train_loop.sampler import Sampling, check_prompt, prompt_ids, sample
from train_loop.signals import StopRequest
from train_loop.step import StepResult, train_step
from train_loop.study import truth
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
    sums: FixedPointSums | None

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
    sheet = truth.measure(run)
    truth.check(sheet)
    step = 0
    if main:
        run.folder.claim(config, run.data.ledger(), sheet)
        say(truth.table(sheet))
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
        if summary.stopped is None:
            weights = checkpoint.weights_of(run.model, keep=main)
            if main:
                ledger, tokenizer = run.data.ledger(), run.data.tokenizer
                export(run.folder.model, run.model, weights, tokenizer, config, ledger, log.evaluations)
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
    accelerator = processes.start(config.run, folder.path)
    processes.check_same(accelerator, "the configuration", shared_digest(config), "give every host the same settings")
    data = processes.together(accelerator, "prepare", lambda: prepare(config, shown=accelerator.is_local_main_process))
    language_model = processes.together(accelerator, "build", lambda: model.build(config, data.tokenizer))
    processes.check_same(accelerator, "the data", data.fingerprint, "give every host the same documents and tokenizer")
    digest = model.digest(language_model)
    processes.check_same(accelerator, "the initial weights' digest", digest, "give every host the same model")
    filler = data.tokenizer.eos_token_id
    assert isinstance(filler, int)
    windows, validation = (
        Windows(side, config.data.block_size, filler, config.data.isolate_documents)
        for side in (data.train, data.validation)
    )
    plan = Plan(len(windows), config.batch.sequences_per_step, config.micro_batch_size, config.run.seed)
    objective = Objective(language_model.to(accelerator.device))
    for prompt in config.sample.prompts or []:
        check_prompt(objective.model, prompt_ids(data.tokenizer, prompt))
    prepared, adamw = accelerator.prepare(objective, optimizer.build(objective, config.optimizer))
    sums = FixedPointSums(accelerator, objective.parameters()) if config.run.reproducible == "bitwise" else None
    total_steps = config.train.max_steps or config.train.epochs * plan.steps_per_epoch
    return Run(config, folder, accelerator, data, windows, validation, plan, total_steps, prepared, adamw, sums)


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in the flat form, of plain values, that trackers take."""
    return {f"{section}.{name}": str(value) for section, keys in settings.items() for name, value in keys.items()}


def _resume(run: Run) -> int:
    """Load the newest whole checkpoint, if there is one; returns its step."""
    found, passed = checkpoint.newest(run.folder.checkpoints)
    place = "run.output_dir has to be on a disk that all hosts share"
    processes.check_same(run.accelerator, "the step to resume from", found.step if found else 0, place)
    if run.accelerator.is_main_process:
        for line in passed:
            say(line)
    if found is None:
        return 0
    checkpoint.load(found, run.model, run.optimizer)
    if run.accelerator.scaler is not None and found.state.get("loss_scale"):
        run.accelerator.scaler.load_state_dict(found.state["loss_scale"])
    if run.accelerator.is_main_process:
        say(f"resuming from {found.folder}")
    return found.step


def _loop(run: Run, log: MetricsLog, start: int, stop: StopRequest) -> int:
    """Train from step `start` to the end, or until a signal; returns the number of finished steps."""
    config, accelerator, plan = run.config, run.accelerator, run.plan
    process, others = accelerator.process_index, accelerator.num_processes
    # The plan of a step is needed twice: by the loader, which may read ahead, and here.
    plans, to_load = itertools.tee(plan.steps(start, run.total_steps))
    batches = iter(
        loader(
            run.train,
            itertools.chain.from_iterable(share(step, process, others) for step in to_load),
            num_workers=config.data.num_workers,
            pin_memory=accelerator.device.type == "cuda",
        )
    )
    bad_steps = 0
    run.objective.train()
    with Progress("training", "step", run.total_steps, start, accelerator.is_main_process) as progress:
        for step, micro_batches in enumerate(plans, start):
            began = time.perf_counter()
            targets = sum(run.train.targets(micro_batch.blocks) for micro_batch in micro_batches)
            rate = optimizer.learning_rate(step, run.total_steps, config.optimizer.learning_rate, config.schedule)
            result = train_step(
                accelerator,
                run.objective,
                run.optimizer,
                itertools.islice(batches, -(-len(micro_batches) // others)),
                count=len(micro_batches),
                targets=targets,
                learning_rate=rate,
                max_grad_norm=config.optimizer.max_grad_norm,
                seed=(config.run.seed, step),
                sums=run.sums,
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
                **_remarks(run, step, result),
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


def _remarks(run: Run, step: int, result: StepResult) -> dict[str, Any]:
    """What a step's line in the log says only where there is something to say."""
    remarks: dict[str, Any] = {}
    if not result.taken:
        remarks |= {"skipped": True, "blocks": run.plan.blocks(step).tolist()}
    if run.accelerator.scaler is not None:
        remarks |= {"loss_scale": run.accelerator.scaler.get_scale(), "overflows": result.overflows}
    if run.sums is not None and run.sums.rounding > TOLERANCE:
        remarks["fixed_point_rounding"] = run.sums.rounding
    return remarks


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
    # Sharded weights are gathered layer by layer, so then all processes have to sample along.
    with processes.whole(run.objective), model.eagerly(config):
        for prompt in _prompts(run) if main or run.accelerator.is_fsdp2 else []:
            text = sample(run.model, run.data.tokenizer, prompt, chosen)
            log.write("sample", step, prompt=prompt, continuation=text)
            if main:
                say(f"  sample: {prompt}{text}")


def _prompts(run: Run) -> list[str]:
    """What to continue after each evaluation: as configured, else one text from its beginning, where it has one."""
    if run.config.sample.prompts is not None:
        return run.config.sample.prompts
    return [""] if run.data.tokenizer.bos_token_id is not None else []


def _checkpoint(run: Run, step: int) -> None:
    """Save the state and drop old ones; the main process writes, the others wait."""
    main, scaler = run.accelerator.is_main_process, run.accelerator.scaler
    weights, moments = checkpoint.collect(run.model, run.optimizer, keep=main)
    if main:
        state = {
            "step": step,
            "fingerprint": run.data.fingerprint,
            "processes": run.accelerator.num_processes,
            "loss_scale": None if scaler is None else scaler.state_dict(),
            "versions": checkpoint.versions(),
        }
        checkpoint.save(run.folder.checkpoints, weights, moments, state)
        checkpoint.prune(run.folder.checkpoints, run.config.checkpoint.keep)
    run.accelerator.wait_for_everyone()
