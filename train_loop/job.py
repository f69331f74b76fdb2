"""Puts one run together: set up, resume, train, finish. This is the only module that knows all the others."""

import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from train_loop import libraries, versions
from train_loop.analysis import batch_size, probe, truth_sheet
from train_loop.analysis.replay import Replay
from train_loop.analysis.samples import Samples
from train_loop.analysis.step_statistics import StepStatistics
from train_loop.checkpoint import pretrained, storage
from train_loop.checkpoint.manager import CheckpointManager
from train_loop.checkpoint.ownership import Ownership
from train_loop.checkpoint.restore import check_disk, check_step, find, restore
from train_loop.checkpoint.run_folder import RunFolder, json_of
from train_loop.config.load import checked, flatten, shared_settings, to_dict
from train_loop.config.schema import Config
from train_loop.console import Progress, say
from train_loop.data import preparation
from train_loop.data.documents import Documents, configure
from train_loop.data.loader import Windows
from train_loop.data.order import Plan
from train_loop.data.token_store import Prepared, TokenStore
from train_loop.devices import pins_memory
from train_loop.distributed import launch, shards
from train_loop.distributed.agreement import any_rank_stopping
from train_loop.distributed.collectives import check_same, run_on_all_ranks
from train_loop.distributed.heartbeat import Heartbeat, is_communication_error
from train_loop.errors import InputError, TrainingError
from train_loop.export.finalize import finalize
from train_loop.export.summary import Summary, summarize
from train_loop.generation.decoding import check_prompt
from train_loop.generation.sampler import prompt_ids
from train_loop.metrics.balance import BalanceLoss
from train_loop.metrics.log import MetricsLog
from train_loop.metrics.past import last_steps
from train_loop.metrics.progress import ProgressLines
from train_loop.metrics.throughput import Throughput
from train_loop.metrics.trackers import check_trackers, start_trackers
from train_loop.models import building, ends, experts, loading
from train_loop.models.initialization import Weights
from train_loop.models.parameters import digest
from train_loop.ops import cpu, products
from train_loop.signals import StopRequest
from train_loop.training import accumulators, evaluation, optimizer
from train_loop.training.loop import History, Loop, Save, for_study
from train_loop.training.objective import Objective
from train_loop.training.state import Observer, Run, StepBatches, StepContext, TrainState


@dataclass
class Setup:
    """A run that is set up, its folder, the checkpoint that it continues from, and the damaged later ones."""

    run: Run
    folder: RunFolder
    found: storage.CheckpointRef | None
    damaged: dict[int, str]


@libraries.ready()
def train(
    config: Config,
    *,
    model: PreTrainedModel | None = None,
    documents: Documents | tuple[str, Iterable[str]] | None = None,
    callbacks: Sequence[Observer] = (),
) -> Summary:
    """Do the whole job: prepare, train (resuming where it was cut off), evaluate, export, verify.

    Args:
        model: a causal language model in fp32, which is trained in place, instead of the configured one.
        documents: a name and texts, instead of the configured source.
        callbacks: called for each step and each evaluation, on every process.

    Raises:
        InputError: for a mistake in the configuration or the data; the run's folder is then untouched.
        TrainingError: if training cannot go on.
        LostError: if another process is gone.
        KeyboardInterrupt: if a signal came before there was something to save; later ones end with a summary.
    """
    _check_given(config, model, callbacks)
    config = configure(config, documents)
    heartbeat = Heartbeat(config.run, shared_settings(config))
    with Ownership(config.output_dir) as own, heartbeat.naming_failures(), StopRequest(is_communication_error) as stop:
        return _train(set_up(config, model, heartbeat, stop, own), heartbeat, own, callbacks)


def _check_given(config: object, model: object, callbacks: Sequence[object]) -> None:
    """Refuse what a script gives instead of a configuration, a model or an observer."""
    if not isinstance(config, Config):
        raise InputError(f"config: expected a Config, got a {type(config).__name__}; train_loop.load_config makes one")
    if not isinstance(model, PreTrainedModel | None):
        raise InputError(f"model: expected a causal language model of Transformers, got a {type(model).__name__}")
    for callback in callbacks:
        for method in ("before_step", "after_step", "after_evaluation"):
            if not callable(getattr(callback, method, None)):
                name = type(callback).__name__
                raise InputError(f"callbacks: {name} has no method {method}; derive it from train_loop.Observer")


def _train(setup: Setup, heartbeat: Heartbeat, own: Ownership, callbacks: Sequence[Observer]) -> Summary:
    run, folder = setup.run, setup.folder
    config, accelerator, state, stop = run.config, run.context.accelerator, run.state, run.context.stop
    main = accelerator.is_main_process
    _claim(setup, heartbeat, own)
    manager = finished = None
    try:
        _resume(setup)
        if config.run.log_with:
            flat = {key: str(value) for key, value in flatten(to_dict(config))}
            start_trackers(accelerator, folder.path, state.step, flat)
        studied = config.study.every is not None or config.study.probing
        log = MetricsLog(accelerator, folder.metrics, state.step, studied)
        history = History(log.past.evaluations, log.past.skipped)
        keep, background = config.checkpoint.keep, config.checkpoint.background
        manager = CheckpointManager(accelerator, folder.checkpoints, keep, background, setup.damaged)
        manager.step = None if setup.found is None else state.step
        if main:
            folder.set_status("running", state.step)
        heartbeat.step, own.beat = (lambda: state.step), (lambda: folder.move_status(state.step))
        save = _saving(setup, manager, history, log)
        with Progress("training", "step", run.batches.total_steps, state.step, main) as progress:
            observers = [*_observers(setup, log, progress), *callbacks]
            stopped = any_rank_stopping(accelerator, stop) or _fit(Loop(run, history, observers, save))
        save(state, wait=True)
        if not stopped:
            finished = finalize(run, folder, history.evaluations)
        if finished is None and accelerator.num_processes > 1:
            stop.ignore_from_now_on()
        log.close()
        if main and finished is None:
            folder.set_status("stopped", state.step, stop.name or "")
        elif main:
            early = f"no lower validation loss in {config.train.patience} evaluations"
            folder.set_status("complete", state.step, early if state.step < run.batches.total_steps else "")
    except BaseException as error:
        if manager is not None:
            manager.abandon()
        if main:
            folder.set_status("failed", state.step, f"{type(error).__name__}: {error}")
        # An error of a DataLoader's worker holds on to the loader, and the process would wait for its workers forever.
        traceback.clear_frames(error.__traceback__)
        raise
    accelerator.end_training()
    return summarize(run, folder, history.evaluations, finished)


def _claim(setup: Setup, heartbeat: Heartbeat, own: Ownership) -> None:
    """Measure what the run is, refuse contradictions, and mark the folder as this run's."""
    run, folder, accelerator = setup.run, setup.folder, setup.run.context.accelerator
    sheet = truth_sheet.measure(run)
    truth_sheet.check(sheet)

    def lost(reason: str) -> None:
        folder.set_status("stopped" if reason.startswith("stopped") else "failed", heartbeat.step(), reason)
        own.release()

    run.context.stop.defer()  # from here on, the folder says what became of the run
    if accelerator.is_main_process:
        heartbeat.lost = lost
        model, tokenizer = run.state.model, run.data.tokenizer
        folder.claim(run.config, run.data.ledger(), sheet, [model.config, tokenizer, ends.settings(model, tokenizer)])
        say(truth_sheet.table(sheet))
    accelerator.wait_for_everyone()
    check_disk(accelerator, folder.path / "truth.json")


def _resume(setup: Setup) -> None:
    """Continue from the checkpoint that was found, if there is one."""
    if setup.found is None:
        return
    accelerator, state = setup.run.context.accelerator, setup.run.state
    try:
        restore(accelerator, setup.found, state.model, state.optimizer)
    except ValueError as error:
        raise InputError(f"{error}; model.name_or_path has changed since; name another run.output_dir") from None
    state.step = setup.found.step
    if accelerator.is_main_process:
        say(f"resuming from {setup.found.folder}")
        then, now = setup.found.state.get("products"), products.told(accelerator.device)
        if then is not None and then != now:
            was, is_now = products.in_words(then), products.in_words(now) or "by the device"
            say(f"careful: matrix products until now: {was}; from here on: {is_now}; so losses are rounded otherwise")


def _observers(setup: Setup, log: MetricsLog, progress: Progress) -> list[Observer]:
    """A run's observers, in the order in which they are called."""
    run, past, step = setup.run, log.past, setup.run.state.step
    study, evaluated = run.config.study, past.evaluations[-1]["step"] if past.evaluations else None
    found = run.context.accelerator.unwrap_model(run.context.objective).experts
    balanced = found is not None and found.weight > 0
    observers: list[Observer] = [BalanceLoss(run.context.accelerator, found)] if balanced else []
    observers += [log, ProgressLines(progress, evaluated)]
    if study.every is not None:
        steps = last_steps(setup.folder.metrics, study.every) if run.context.accelerator.is_main_process else []
        observers.append(StepStatistics(run, study.every, log.write_study, [each.get("grad_norm") for each in steps]))
    if study.probing:
        observers.append(probe.Probe(run, log.write_study, past.probed))
    return [*observers, Samples(run, log.write, (step, past.samples))]


def _fit(loop: Loop) -> bool:
    """Train to the end, with smaller micro-batches if memory runs out; returns whether a signal came first."""
    while True:
        try:
            return loop.train()
        except RuntimeError as error:
            batch_size.halve(loop.run, error)  # or raise the error
            _choose_compiled(loop.run)


def _saving(setup: Setup, manager: CheckpointManager, history: History, log: MetricsLog) -> Save:
    """How the loop saves a state."""
    run, context = setup.run, setup.run.context

    def begin(state: TrainState) -> None:
        if manager.step is not None and manager.step >= state.step:
            return
        scaler = context.accelerator.scaler
        content = {
            "step": state.step,
            "fingerprint": run.data.fingerprint,
            "processes": context.accelerator.num_processes,
            "micro_batch_size": run.batches.plan.micro_batch_size,
            "loss_scale": None if scaler is None else scaler.state_dict(),
            "for_study": for_study(run.config.checkpoint.at, state.step),
            "config": json_of(run.config),
            "versions": versions.installed(),
            "products": products.told(context.accelerator.device),
        }
        best = [] if history.best is None else [history.best["step"]]

        def before(step: int = state.step) -> None:
            log.flush()
            setup.folder.move_status(step)

        manager.save_async(state.model, state.optimizer, content, protected_steps=best, before=before)

    def save(state: TrainState, wait: bool = False) -> None:
        begin(state)
        if not wait or manager.wait() is None:
            return
        begin(state)  # once more
        if (problem := manager.wait()) is not None:
            raise TrainingError(
                f"step {state.step}: the checkpoint could not be written ({problem}); make room for it in "
                f"{setup.folder.path}, then start the same command again to go on from the last whole one"
            )

    return save


def set_up(
    config: Config,
    model: PreTrainedModel | None = None,
    heartbeat: Heartbeat | None = None,
    stop: StopRequest | None = None,
    own: Ownership | None = None,
    padded: bool | None = None,
) -> Setup:
    """Set up and check data, model, optimizer and processes of a run. Its folder is taken if asked to, else only read.

    For `model` see `train`, for `padded` `RunFolder`, which tells if it is None. Raises InputError for whatever doesn't
    fit.
    """
    folder = RunFolder(config.output_dir)
    check_trackers(config.run.log_with)
    heartbeat = heartbeat or Heartbeat(config.run, shared_settings(config))
    accelerator = launch.start(config.run, heartbeat, folder.path)
    run_on_all_ranks(accelerator, "own", lambda: _take(folder, config, own) if accelerator.is_main_process else None)
    data = _data(accelerator, config)
    padded = folder.padded if padded is None else padded
    in_shards = accelerator.is_fsdp2 and model is None and not padded

    def build() -> tuple[PreTrainedModel, Weights | None]:
        if in_shards:
            return building.outline(config, data.tokenizer)
        return building.build(config, data.tokenizer, model, padded), None

    language_model, weights = run_on_all_ranks(accelerator, "build", build)
    check_same(accelerator, "the data", data.fingerprint, "give every host the same documents and tokenizer")
    found, damaged = find(accelerator, folder, config, data.fingerprint)
    if config.study.probing:
        probe.check(language_model, data.tokenizer, config)
    for prompt in config.sample.prompts or []:
        check_prompt(language_model, prompt_ids(data.tokenizer, prompt))
    objective = Objective(language_model, experts=experts.find(language_model, config.model.balance_weight))
    prepared = _prepared(accelerator, objective, weights)
    linear, keep_memory = not config.model.compile, config.run.keep_memory and not accelerator.is_fsdp2
    objective.tied = cpu.speed_up(language_model, training=True, linear=linear, keep_memory=keep_memory)
    adamw = optimizer.build(objective, config.optimizer)
    size = config.micro_batch_size
    if config.batch.micro_batch_size == "auto":
        previous = None if found is None else int(found.state["micro_batch_size"])
        size = batch_size.fitting(config, accelerator, prepared, adamw, previous)
    windows = _windows(data.train, config, data.tokenizer)
    plan = Plan(len(windows), config.batch.sequences_per_step, size, config.run.seed)
    batches = StepBatches(
        windows,
        plan,
        total_steps=config.train.max_steps or config.train.epochs * plan.steps_per_epoch,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=config.data.num_workers,
        pin_memory=pins_memory(accelerator.device),
    )
    check_step(found, batches.total_steps)
    context = StepContext(
        accelerator,
        prepared,
        accumulators.build(accelerator, prepared.parameters(), adamw, config.run.reproducible == "bitwise"),
        config.optimizer.max_grad_norm,
        config.run.seed,
        Throughput(accelerator, prepared, language_model, config.data.block_size),
        stop or StopRequest(),
    )
    state = TrainState(accelerator.unwrap_model(prepared).model, adamw)
    run = Run(config, data, batches, _windows(data.validation, config, data.tokenizer), context, state)
    _choose_compiled(run)
    return Setup(run, folder, found, damaged)


def _prepared(
    accelerator: Accelerator, objective: Objective, weights: Weights | None, training: bool = True
) -> torch.nn.Module:
    """An objective on its devices. If `weights` is given, its model has none yet, and gets them in shards."""
    same = "give every host the same model"
    if weights is None:
        check_same(accelerator, "the initial weights' digest", digest(objective.model), same)
        objective.to(accelerator.device)
        return launch.prepare(accelerator, objective, training)
    prepared = launch.prepare(accelerator, objective, training)
    held = shards.Shards(objective.model)
    run_on_all_ranks(accelerator, "weights", lambda: weights(held.place))
    check_same(accelerator, "the initial weights' digest", held.digest(), same)
    objective.choose_path()
    shards.reshard(objective)
    return prepared


def _take(folder: RunFolder, config: Config, own: Ownership | None) -> None:
    """Refuse a folder that is another run's, or that another process owns."""
    if own is not None:
        own.take()
    folder.check(config)


def replay(folder: Path, steps: Sequence[int]) -> Replay:
    """Get ready to replay steps of a run; see `Replay`."""
    padded = RunFolder(folder).padded
    return Replay(folder, steps, lambda config, heartbeat: set_up(config, None, heartbeat, padded=padded).run)


def _data(accelerator: Accelerator, config: Config, tokenizer: PreTrainedTokenizerFast | None = None) -> Prepared:
    shown = accelerator.is_local_main_process
    return run_on_all_ranks(accelerator, "prepare", lambda: preparation.prepare(config, tokenizer, shown))


def _windows(store: TokenStore, config: Config, tokenizer: PreTrainedTokenizerFast) -> Windows:
    filler = tokenizer.eos_token_id
    assert isinstance(filler, int)
    return Windows(store, config.data.block_size, filler, config.data.isolate_documents)


def _choose_compiled(run: Run) -> None:
    """If layers are compiled, choose the shapes that occur in every step and in every evaluation."""
    if not run.config.model.compile:
        return
    plan, length = run.batches.plan, run.config.data.block_size
    training = {plan.micro_batch_size, plan.sequences_per_step % plan.micro_batch_size} - {0}
    shapes = {(True, rows, length) for rows in training} | {(False, run.evaluation_batch_size, length)}
    run.context.accelerator.unwrap_model(run.context.objective).compiled = shapes


@libraries.ready()
def evaluate(model: str | Path | PreTrainedModel, config: Config) -> dict[str, Any]:
    """Evaluate a model exactly on the configured validation data; all processes get the same result.

    Args:
        model: a folder, a name on the Hub, a run or one of its checkpoints; or a model, with the configured tokenizer.
        config: its section data, and whatever in the others says how to compute.

    Returns:
        loss (nats per target), perplexity, bits_per_byte, accuracy, tokens (of targets); a `reason` if one is None.

    Raises:
        InputError: if the model or the data cannot be loaded, or they don't fit together.
    """
    config = checked(config)
    heartbeat = Heartbeat(config.run, shared_settings(config))
    with heartbeat.naming_failures():
        accelerator = launch.start(config.run, heartbeat)
        if isinstance(model, PreTrainedModel):
            language_model, tokenizer, weights, source = model, None, None, f"the {type(model).__name__}"
            loading.check_present(model, source)
            loading.check_finite(model, source)
        else:
            name, attention, source = str(model), config.model.attention, f"model {model}"

            def load() -> pretrained.Loaded:
                return (
                    pretrained.outline(name, attention)
                    if accelerator.is_fsdp2
                    else (*pretrained.load(name, attention), None)
                )

            language_model, tokenizer, weights = run_on_all_ranks(accelerator, "load", load)
            # Before the data is prepared, too, which takes longer.
            building.check_fits(language_model, tokenizer, config.data.block_size, source)
        if config.data.isolate_documents:
            building.check_positions(language_model)
        data = _data(accelerator, config, tokenizer)
        building.check_fits(language_model, data.tokenizer, config.data.block_size, source)
        objective = _prepared(accelerator, Objective(language_model), weights, training=False)
        keep_memory = config.run.keep_memory and not accelerator.is_fsdp2
        cpu.speed_up(language_model, training=False, keep_memory=keep_memory)
        truth_sheet.check_reading(accelerator, objective, config, source)
        batch_size = config.evaluation.batch_size or config.micro_batch_size
        windows = _windows(data.validation, config, data.tokenizer)
        metrics = evaluation.evaluate(accelerator, objective, windows, batch_size)
        accelerator.end_training()
    assert metrics is not None
    return metrics
