"""After the last step: choose the weights, export them, have them verified, upload them."""

from typing import NamedTuple

from safetensors import SafetensorError

from train_loop.checkpoint import storage
from train_loop.checkpoint.restore import restore
from train_loop.console import say
from train_loop.distributed.agreement import StopPoll, any_rank_stopping
from train_loop.distributed.collectives import broadcast_from_main, run_on_all_ranks, unsharded
from train_loop.errors import TrainingError, one_line
from train_loop.export import model_folder, verify
from train_loop.generation.decoding import generate
from train_loop.generation.kv_cache import Decoder
from train_loop.generation.params import Sampling
from train_loop.job import Run
from train_loop.metrics.log import MetricsLog
from train_loop.models import building
from train_loop.signals import StopRequest
from train_loop.training.evaluation import measure


class Finished(NamedTuple):
    """The step whose weights were exported, and the model's address on the Hub, if it went there."""

    step: int
    hub: str | None


def finalize(run: Run, log: MetricsLog, step: int, stop: StopRequest) -> Finished | None:
    """Export the model and have it verified. All processes must call this.

    Args:
        run: that has been trained, and is no more afterwards.
        log: its evaluations.
        step: its last one, of which there is a checkpoint.
        stop: a signal ends this, too.

    Returns:
        None when a signal came first.

    Raises:
        TrainingError: when the model cannot be written, or what was written is not the model that was trained.
        InputError: when the Hub refuses it.
    """
    accelerator = run.accelerator
    chosen = _choose(run, log, step)
    if chosen.step != step:
        restore(accelerator, chosen, run.model)
    expected = _expected(run, stop) if run.config.export.verify else None
    if any_rank_stopping(accelerator, stop):
        return None
    main = accelerator.is_main_process
    finished = run_on_all_ranks(
        accelerator, "export", lambda: _write(run, log, chosen, expected, stop) if main else None
    )
    return broadcast_from_main(accelerator, finished)


def _write(
    run: Run, log: MetricsLog, chosen: storage.CheckpointRef, expected: verify.Expected | None, stop: StopRequest
) -> Finished | None:
    config, accelerator = run.config, run.accelerator
    temporary = run.folder.model.with_name("model.tmp")
    try:
        weights = storage.tensors(chosen)
        ledger, tokenizer = run.data.ledger(), run.data.tokenizer
        model_folder.write(temporary, run.model, weights, tokenizer, config, ledger, log.evaluations, chosen.step)
        if expected is not None:
            verified = verify.verify(
                temporary,
                weights,
                run.validation,
                expected,
                batch_size=run.evaluation_batch_size,
                precision=config.run.mixed_precision,
                # A sharded model may be larger than the memory of one device.
                device="cpu" if accelerator.is_fsdp2 or accelerator.device.type == "cpu" else str(accelerator.device),
                stop=lambda: stop.asked,
            )
            if not verified:
                return None
            say(f"exported model verified in a clean process: all weights, loss {expected.loss:.4f}, greedy tokens")
        model_folder.publish(temporary, run.folder.model)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"export: {one_line(error)}; the same command goes on from here") from None
    return Finished(chosen.step, model_folder.push(run.folder.model, config) if config.export.push_to_hub else None)


def _choose(run: Run, log: MetricsLog, step: int) -> storage.CheckpointRef:
    """The checkpoint whose weights are exported: the last one, or the best that is whole.

    Raises:
        TrainingError: when there is none.
    """
    steps = [step]
    if run.config.export.from_ == "best":
        finite = [event for event in log.evaluations if event["loss"] is not None]
        steps = [event["step"] for event in sorted(finite, key=lambda event: event["loss"])]

    def look() -> tuple[storage.CheckpointRef | None, list[str]]:
        problems: list[str] = []
        for each in steps:
            found, problem = storage.of_step(run.folder.checkpoints, each)
            if found is not None:
                return found, problems
            problems.append(problem)
        return None, problems

    main = run.accelerator.is_main_process
    looked = run_on_all_ranks(run.accelerator, "choose", lambda: look() if main else None)
    found, problems = broadcast_from_main(run.accelerator, looked) or (None, [])
    if found is None:
        problem = "; ".join(problems) or "no evaluation has a finite loss"
        raise TrainingError(f"export.from {run.config.export.from_}: {problem}")
    if problems and main:
        say(f"export.from best: {problems[0]}; exporting the weights of step {found.step} instead")
    return found


def _expected(run: Run, stop: StopRequest) -> verify.Expected | None:
    """What the exported model has to give to others; None when asked to stop. All processes must call this."""
    accelerator, windows = run.accelerator, run.validation
    blocks = verify.probed(windows)
    asking = StopPoll(accelerator, stop)
    sums = measure(accelerator, run.objective, windows, blocks, run.evaluation_batch_size, asking)
    if sums is None:
        return None
    prompt, new = verify.prompt(windows), verify.new_tokens(windows)
    continuation: list[int] = []
    run.model.eval()
    with unsharded(accelerator, run.objective), building.without_compile(run.config):
        if new and (accelerator.is_main_process or accelerator.is_fsdp2):
            greedy = Sampling(max_new_tokens=new, temperature=0)
            continuation = generate(Decoder(run.model), [prompt], greedy, run.data.tokenizer.eos_token_id)[0].tokens
    return verify.Expected(blocks, sums[0] / sums[2], prompt, continuation)
