"""After the last step: choose the weights, export them, verify them, upload them."""

from typing import Any, NamedTuple

from safetensors import SafetensorError

from train_loop import files
from train_loop.checkpoint import storage
from train_loop.checkpoint.restore import restore
from train_loop.checkpoint.run_folder import RunFolder
from train_loop.config.sampling import Sampling
from train_loop.console import say
from train_loop.distributed.agreement import StopPoll, any_rank_stopping
from train_loop.distributed.collectives import broadcast_from_main, run_on_all_ranks, unsharded
from train_loop.errors import TrainingError, one_line
from train_loop.export import model_folder, verify
from train_loop.generation.decoding import generate
from train_loop.generation.kv_cache import Decoder
from train_loop.models.building import without_compile
from train_loop.models.ends import ends
from train_loop.training.evaluation import measure
from train_loop.training.state import Run


class Finished(NamedTuple):
    """The step whose weights were exported, and the model's address on the Hub, if it was uploaded."""

    step: int
    hub: str | None


def finalize(run: Run, folder: RunFolder, evaluations: list[dict[str, Any]]) -> Finished | None:
    """Export the model and have it verified; None if a signal came first. All processes must call this.

    The run has a checkpoint of its state, and is not trained further. Raises TrainingError if the model cannot be
    written, or the written model is not the one that was trained; InputError if the Hub refuses it.
    """
    accelerator, state, stop = run.context.accelerator, run.state, run.context.stop
    _check_finite(run, evaluations)
    chosen = _choose(run, folder, evaluations)
    if chosen.step != state.step:
        restore(accelerator, chosen, state.model)
    expected = _expected(run) if run.config.export.verify else None
    if any_rank_stopping(accelerator, stop):
        return None

    def export() -> Finished | None:
        return _write(run, folder, evaluations, chosen, expected) if accelerator.is_main_process else None

    return broadcast_from_main(accelerator, run_on_all_ranks(accelerator, "export", export))


def _write(
    run: Run,
    folder: RunFolder,
    evaluations: list[dict[str, Any]],
    chosen: storage.CheckpointRef,
    expected: verify.Expected | None,
) -> Finished | None:
    """Write, verify, publish and upload the model; None if a signal came first."""
    temporary = files.private(folder.model)
    try:
        room = verify.room(run)
        verification = "" if expected is None else verify.in_words(room, expected)
        written = model_folder.write(temporary, run, storage.opened(chosen), evaluations, chosen.step, verification)
        if written is None:
            return None
        if expected is not None:
            if not verify.verify(temporary, run, written, expected, room):
                return None
            say(f"exported model {verification}")
        model_folder.publish(temporary, folder.model)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"export: {one_line(error)}; start the same command again to go on from here") from None
    finally:
        files.remove(temporary)
    return Finished(chosen.step, model_folder.push(folder.model, run.config) if run.config.export.push_to_hub else None)


def _check_finite(run: Run, evaluations: list[dict[str, Any]]) -> None:
    """Raise TrainingError if the model that would be exported has no finite loss."""
    if evaluations and evaluations[-1]["loss"] is None and run.config.export.from_ == "last":
        best = any(each["loss"] is not None for each in evaluations)
        cure = "--export.from best exports an earlier model, if its checkpoint is there; else t" if best else "t"
        raise TrainingError(
            f"step {run.state.step}: the model's loss on the validation data is not finite, so it is not exported; "
            f"{cure}ry a lower optimizer.learning_rate or more warm-up, in another run.output_dir"
        )


def _choose(run: Run, folder: RunFolder, evaluations: list[dict[str, Any]]) -> storage.CheckpointRef:
    """The checkpoint whose weights are exported: the last one, or the best one that is whole."""
    steps = [run.state.step]
    if run.config.export.from_ == "best":
        finite = [record for record in evaluations if record["loss"] is not None]
        steps = [record["step"] for record in sorted(finite, key=lambda record: record["loss"])]

    def look() -> tuple[storage.CheckpointRef | None, list[str]]:
        problems: list[str] = []
        for each in steps:
            found, problem = storage.of_step(folder.checkpoints, each)
            if found is not None:
                return found, problems
            problems.append(problem)
        return None, problems

    accelerator, main = run.context.accelerator, run.context.accelerator.is_main_process
    looked = run_on_all_ranks(accelerator, "choose", lambda: look() if main else (None, []))
    found, problems = broadcast_from_main(accelerator, looked)
    if found is None:
        problem = "; ".join(problems) or "no evaluation has a finite loss"
        raise TrainingError(f"export.from {run.config.export.from_}: {problem}")
    if problems and main:
        say(f"export.from best: {problems[0]}; exporting the weights of step {found.step} instead")
    return found


def _expected(run: Run) -> verify.Expected | None:
    """What the exported model must reproduce; None if asked to stop. All processes must call this."""
    accelerator, objective, model = run.context.accelerator, run.context.objective, run.state.model
    windows = run.validation
    blocks = verify.probed(windows)
    poll = StopPoll(accelerator, run.context.stop)
    sums = measure(accelerator, objective, windows, blocks, run.evaluation_batch_size, poll)
    if sums is None:
        return None
    prompt, new = verify.prompt(windows), verify.new_tokens(windows)
    continuation: list[int] = []
    model.eval()
    with unsharded(accelerator, objective), without_compile(model):
        if new and (accelerator.is_main_process or accelerator.is_fsdp2):
            greedy = Sampling(max_new_tokens=new, temperature=0)
            continuation = generate(Decoder(model), [prompt], greedy, ends(model, run.data.tokenizer))[0].tokens
    return verify.Expected(blocks, sums[0] / sums[2], prompt, continuation)
