"""The run: epochs of steps, and when to log, evaluate, checkpoint, sample and stop.

`train` is the whole job in order; `_loop` is the training loop, on one screen. One optimizer step is in `step.py`, what
comes before the first one in `run.py`, what comes after the last one in `finish.py`.
"""

import itertools
import time
from dataclasses import dataclass, replace
from typing import Any

from accelerate.utils.memory import clear_device_cache

from train_loop import devices, versions
from train_loop.analysis import probe, truth_sheet
from train_loop.checkpoint.manager import CheckpointManager
from train_loop.checkpoint.restore import check_disk, restore
from train_loop.config.load import shared_settings, to_dict
from train_loop.config.schema import Config
from train_loop.console import Progress, say
from train_loop.data.loader import loader
from train_loop.data.order import cut
from train_loop.devices import pins_memory
from train_loop.distributed.agreement import StopPoll, any_rank_stopping
from train_loop.distributed.collectives import unsharded
from train_loop.distributed.heartbeat import Peers
from train_loop.errors import InputError, TrainingError
from train_loop.export import finalize
from train_loop.generation.params import Sampling
from train_loop.generation.sampler import Sampler
from train_loop.job import Run, set_up
from train_loop.metrics.log import MetricsLog
from train_loop.metrics.trackers import start_trackers
from train_loop.models import building
from train_loop.signals import StopRequest
from train_loop.training.accumulators import TOLERANCE
from train_loop.training.evaluation import evaluate
from train_loop.training.schedule import learning_rate
from train_loop.training.step import StepResult, train_step


@dataclass
class Summary:
    """How a run ended.

    step: of how many; stopped: the signal that ended it early; evaluation: that of the exported weights, or the last
    one; exported: the step of the exported weights; hub: the model's address there.
    """

    run: Run
    step: int
    stopped: str | None
    evaluation: dict[str, Any] | None
    exported: int | None = None
    hub: str | None = None


def train(config: Config) -> Summary:
    """The whole job: prepare, train (resuming where it was cut off), evaluate, export, verify.

    Raises:
        InputError: for a mistake in the configuration or the data; nothing was written to the run's folder then.
        TrainingError: when training cannot go on.
        LostError: when another process is gone.
    """
    peers = Peers(config.run, shared_settings(config))
    with peers.named():
        return _train(config, peers)


def _train(config: Config, peers: Peers) -> Summary:
    run = set_up(config, peers)
    main = run.accelerator.is_main_process
    sheet = truth_sheet.measure(run)
    truth_sheet.check(sheet)
    step, saver = 0, None
    if main:
        peers.lost = lambda reason: run.folder.set_status("failed", peers.step(), reason)
        run.folder.claim(config, run.data.ledger(), sheet, [run.model.config, run.data.tokenizer])
        say(truth_sheet.table(sheet))
    run.accelerator.wait_for_everyone()
    check_disk(run.accelerator, run.folder.path / "truth.json")
    try:
        with StopRequest() as stop:
            step = _resume(run)
            if config.run.log_with:
                start_trackers(run.accelerator, run.folder.path, step, _flat(to_dict(config)))
            studied = config.study.every is not None or config.study.probing
            log = MetricsLog(run.accelerator, run.folder.metrics, step, studied)
            if run.watch is not None:
                run.watch.recall()
            settings = config.checkpoint
            saver = CheckpointManager(
                run.accelerator, run.folder.checkpoints, settings.keep, settings.background, run.damaged
            )
            saver.step = None if run.found is None else step
            if main:
                run.folder.set_status("running", step)
            peers.step = lambda: log.step
            while True:
                try:
                    step, stopped = _loop(run, log, saver, step, stop)
                    break
                except RuntimeError as error:
                    _halve(run, error)  # or raise it
                    step = log.step
            _secure(run, log, saver, step)
            finished = None if stopped else finalize.finalize(run, log, step, stop)
            if finished is None and run.accelerator.num_processes > 1:
                stop.ignore_from_now_on()
        log.close()
        if main and finished is None:
            run.folder.set_status("stopped", step, stop.name or "")
        elif main:
            early = f"no lower validation loss in {config.train.patience} evaluations"
            run.folder.set_status("complete", step, early if step < run.total_steps else "")
    except BaseException as error:
        if saver is not None:
            saver.give_up()
        if main:
            run.folder.set_status("failed", step, f"{type(error).__name__}: {error}")
        raise
    run.accelerator.end_training()
    if finished is None:
        return Summary(run, step, stop.name, log.evaluations[-1] if log.evaluations else None)
    exported = [event for event in log.evaluations if event["step"] == finished.step]
    return Summary(run, step, None, exported[-1] if exported else None, finished.step, finished.hub)


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in the flat form, of plain values, that trackers take."""
    return {f"{section}.{name}": str(value) for section, keys in settings.items() for name, value in keys.items()}


def _resume(run: Run) -> int:
    """Load the checkpoint to go on from, if there is one; returns its step."""
    found = run.found
    if found is None:
        return 0
    try:
        restore(run.accelerator, found, run.model, run.optimizer)
    except ValueError as error:
        raise InputError(f"{error}; model.name_or_path has changed since; name another run.output_dir") from None
    if run.accelerator.scaler is not None and found.state.get("loss_scale"):
        run.accelerator.scaler.load_state_dict(found.state["loss_scale"])
    if run.accelerator.is_main_process:
        say(f"resuming from {found.folder}")
    return found.step


def _halve(run: Run, error: RuntimeError) -> None:
    """Let a run that is out of memory go on with smaller micro-batches from the step that it failed in.

    Raises:
        RuntimeError: the error, where it is another one, or smaller ones are not possible: with several processes, the
            others wait for this one in the middle of the step.
    """
    size, automatic = run.plan.micro_batch_size, run.config.batch.micro_batch_size == "auto"
    if not automatic or size == 1 or run.accelerator.num_processes > 1 or not devices.is_out_of_memory(error):
        raise error
    run.plan = replace(run.plan, micro_batch_size=size // 2)
    run.choose_compiled()
    run.optimizer.optimizer.zero_grad()
    clear_device_cache(garbage_collection=True)
    say(f"batch.micro_batch_size auto: out of memory with {size} sequences; goes on with {size // 2}")


def _loop(run: Run, log: MetricsLog, saver: CheckpointManager, start: int, stop: StopRequest) -> tuple[int, bool]:
    """Train from step `start` to the end, or until a signal.

    Returns:
        The number of finished steps, and whether a signal ended it.
    """
    config, accelerator, plan = run.config, run.accelerator, run.plan
    process, others = accelerator.process_index, accelerator.num_processes
    # A step's blocks are needed twice: by the loader, which may read ahead, and here.
    to_train, to_load = itertools.tee(plan.steps(start, run.total_steps))
    batches = loader(
        run.train,
        itertools.chain.from_iterable(cut(blocks, plan.micro_batch_size, process, others) for blocks in to_load),
        num_workers=config.data.num_workers,
        pin_memory=pins_memory(accelerator.device),
    )
    run.objective.train()
    watch = run.speed.watch
    # What a signal or a crash has left undone after the step that the run resumes from.
    stopping = _between_steps(run, log, saver, start, False, stop)
    with Progress("training", "step", run.total_steps, start, accelerator.is_main_process) as progress:
        for step, blocks in enumerate(to_train, start):
            if stopping or _enough(run, log):
                return step, stopping
            if run.watch is not None:
                run.watch.before(step)
            began = time.perf_counter()
            watch.begin()
            targets, count = run.train.targets(blocks), -(-len(blocks) // plan.micro_batch_size)
            rate = learning_rate(step, run.total_steps, config.optimizer.learning_rate, config.schedule)
            result = train_step(
                accelerator,
                run.objective,
                run.optimizer,
                itertools.islice(batches, -(-count // others)),
                count=count,
                targets=targets,
                learning_rate=rate,
                max_grad_norm=config.optimizer.max_grad_norm,
                seed=(config.run.seed, step),
                sums=run.sums,
                stop=lambda: stop.asked,
                lap=watch.lap,
            )
            measured = run.speed.of_step(targets, time.perf_counter() - began)
            done = step + 1
            log.write(
                "step",
                done,
                epoch=done / plan.steps_per_epoch,
                loss=result.loss,
                learning_rate=rate,
                grad_norm=result.grad_norm,
                tokens=targets,
                **measured,
                **_remarks(run, step, result),
            )
            if run.watch is not None and (seen := run.watch.after(step, result)) is not None:
                log.write_study("statistics", done, seen)
            told = f"loss {result.loss:.4f}, {measured['tokens_per_second']:,.0f} tokens/s"
            progress.update(1, told, curve=result.loss)
            if log.skipped >= config.train.max_bad_steps:
                _fail(run, log, saver, done, result)
            stopping = _between_steps(run, log, saver, done, stop.hear(result.stop), stop)
    return run.total_steps, stopping


def _between_steps(
    run: Run, log: MetricsLog, saver: CheckpointManager, step: int, stopping: bool, stop: StopRequest
) -> bool:
    """Evaluate, sample and checkpoint after `step` finished steps, where that is due; returns whether to stop.

    Whoever is asked to stop does not evaluate any more: that comes first when the run is resumed.
    """
    if run.due(run.config.evaluation.every, step) and not stopping:
        stopping = _evaluate(run, log, step, stop)
    is_best = log.best is not None and log.best["step"] == step
    if stopping or is_best or run.due(run.config.checkpoint.every, step) or _for_study(run, step) or _enough(run, log):
        _checkpoint(run, log, saver, step)
    return stopping


def _enough(run: Run, log: MetricsLog) -> bool:
    """Whether the last `train.patience` evaluations brought no lower loss."""
    return run.config.train.patience is not None and log.since_best >= run.config.train.patience


def _for_study(run: Run, step: int) -> bool:
    """Whether the step is 0 or a power of two, and such checkpoints are wanted."""
    return run.config.checkpoint.at == "log" and step & (step - 1) == 0


def _fail(run: Run, log: MetricsLog, saver: CheckpointManager, step: int, result: StepResult) -> None:
    """End a run whose steps are not finite any more, with a checkpoint from before them: they changed nothing."""
    before = step - log.skipped
    if before > (saver.step or 0):
        _secure(run, log, saver, before)
    raise TrainingError(
        f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}, not finite for {log.skipped} steps in a "
        f"row; the weights are those of step {before}; try a lower optimizer.learning_rate or more warm-up"
    )


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


def _evaluate(run: Run, log: MetricsLog, step: int, stop: StopRequest) -> bool:
    """Evaluate, and sample a text or two, as far as the log doesn't have them yet; both go to the log and to stderr.

    Returns:
        Whether some process was asked to stop meanwhile.
    """
    config, accelerator = run.config, run.accelerator
    main = accelerator.is_main_process
    if not log.evaluations or log.evaluations[-1]["step"] != step:
        asking = StopPoll(accelerator, stop)
        metrics = evaluate(accelerator, run.objective, run.validation, run.evaluation_batch_size, asking)
        if metrics is None:
            return True
        epoch = step / run.plan.steps_per_epoch
        log.write("evaluation", step, epoch=epoch, **metrics)
        if main:
            say(
                f"step {step}, epoch {epoch:.2f}: validation loss {metrics['loss']:.4f}, "
                f"perplexity {metrics['perplexity']:.3f}, {metrics['bits_per_byte']:.4f} bits per byte, "
                f"accuracy {metrics['accuracy']:.4f}"
            )
    if config.study.probing and log.probed != step:
        log.write_study("probe", step, probe.measure(run))
    settings = config.sample
    chosen = Sampling(
        settings.max_new_tokens, settings.temperature, settings.top_k, settings.top_p, seed=config.run.seed
    )
    # Sharded weights are gathered layer by layer, so then all processes have to sample along.
    asking = StopPoll(accelerator, stop, alone=not accelerator.is_fsdp2)
    sampler = Sampler(run.model, run.data.tokenizer, notice=lambda line: None)
    with unsharded(accelerator, run.objective), building.without_compile(config):
        for prompt in _prompts(run)[log.samples :] if main or accelerator.is_fsdp2 else []:
            text = next(sampler.sample([prompt], chosen, stop=asking))[0].text
            if asking():
                break
            log.write("sample", step, prompt=prompt, continuation=text)
            if main:
                say(f"  sample: {prompt}{text}")
    return any_rank_stopping(accelerator, stop)


def _prompts(run: Run) -> list[str]:
    """What to continue after each evaluation: as configured, else one text from its beginning, where it has one."""
    if run.config.sample.prompts is not None:
        return run.config.sample.prompts
    return [""] if run.data.tokenizer.bos_token_id is not None else []


def _checkpoint(run: Run, log: MetricsLog, saver: CheckpointManager, step: int) -> None:
    """Begin to save the state after `step` finished steps, unless that is the one that was saved last."""
    if saver.step == step:
        return
    scaler = run.accelerator.scaler
    state = {
        "step": step,
        "fingerprint": run.data.fingerprint,
        "processes": run.accelerator.num_processes,
        "micro_batch_size": run.plan.micro_batch_size,
        "loss_scale": None if scaler is None else scaler.state_dict(),
        "for_study": _for_study(run, step),
        "config": to_dict(run.config),
        "versions": versions.installed(),
    }
    best = [] if log.best is None else [log.best["step"]]
    saver.begin(run.model, run.optimizer, state, spared=best, before=log.flush)


def _secure(run: Run, log: MetricsLog, saver: CheckpointManager, step: int) -> None:
    """Have a whole checkpoint of the state after `step` finished steps, or fail.

    Raises:
        TrainingError: when it cannot be written.
    """
    for _ in range(2):
        _checkpoint(run, log, saver, step)
        problem = saver.wait()
        if problem is None:
            return
    raise TrainingError(
        f"step {step}: the checkpoint could not be written ({problem}); make room for it in {run.folder.path}, and the "
        "same command goes on from the last one that is whole"
    )
