"""Part "exactness": what may not change a run's result, on this device: micro-batches, evaluation's batches, a kill.

Six trainings by the real command go on at once, in processes of their own, two of which are killed and started again,
while this process makes the checks that need no run's folder. Bitwise ones must agree to the bit; plain ones may differ
by the order in which a GPU's threads add numbers up, so how far they are apart is told as well.
"""

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from gpu_day.models import NO_DROPOUT, forget_accelerator, quiet, relative
from gpu_day.rows import Finding, Rows, Skipped, at_most, figure, holds, needs, part, same
from gpu_day.runs import STEPS, Command, Training, settings
from train_loop.training.state import Run
from train_loop.training.step import StepResult

_FEW_STEPS = 5  # of the runs in this process
_KINDS = ("bitwise", "no")  # run.reproducible
# fp32's rounding of a sum of ten thousand terms, in whatever order, grown over the steps; the project's own promise.
_LIMIT = 1e-5
# Per-token losses have fp32's rounding, some 1e-6 of themselves, of which a hundredth is left in a sum of thousands.
_EVALUATION_LIMIT = 1e-6


def checks(rows: Rows, cpu: bool, folder: Path) -> None:
    """First what needs no run's folder, while the runs go on."""
    quiet()
    torch.set_float32_matmul_precision("highest")
    runs = Runs(folder, cpu)
    try:
        needs("evaluate", "datasets")
        runs.start()
    except Skipped as reason:
        rows.add("runs by the real command", Finding(None, "skipped", why=str(reason)))
    sizes: dict[int, list[StepResult]] = {}
    rows.check("micro-batches of 1, 2, 4 and 8: losses", micro_batches, cpu, folder, sizes)
    rows.check("micro-batches of 1, 2, 4 and 8: gradients", gradients, sizes)
    rows.check("evaluation at batch 1, 7 and 64, against float64", evaluation, cpu, folder)
    rows.check("dropout is keyed", keyed_dropout, cpu, folder)
    if not runs.of:
        return
    rows.check("runs by the real command", runs.finish)
    for what, name in (("the same run twice", "second"), ("killed with -9, resumed", "killed")):
        rows.check(f"{what}, bitwise", equal_bits, *runs.beside_first("bitwise", name))
        rows.check(f"{what}, plain", close, *runs.beside_first("no", name))
        rows.check(f"{what}, plain: bits", bits, *runs.beside_first("no", name))
    rows.check("a step replayed, bitwise", replayed, runs.of["bitwise", "first"], folder, True, seconds=5)
    rows.check("a step replayed, plain", replayed, runs.of["no", "first"], folder, False, seconds=5)


class Runs:
    """Three equal trainings of each kind, one of which is killed and started again.

    Attributes:
        of: (kind, name) -> training.
    """

    def __init__(self, folder: Path, cpu: bool) -> None:
        self._folder, self._cpu = folder, cpu
        self._watchers = ThreadPoolExecutor(len(_KINDS))
        self._killed: dict[str, Future[int]] = {}
        self.of: dict[tuple[str, str], Training] = {}

    def _begin(self, kind: str, name: str) -> Training:
        return Training(self._folder / f"{kind}-{name}", settings(self._cpu, run__reproducible=kind))

    def beside_first(self, kind: str, name: str) -> tuple[Training, Training]:
        """The first training of a kind, and another one."""
        return self.of[kind, "first"], self.of[kind, name]

    def start(self) -> None:
        """Start them all; the first one prepares the data, and the others wait for it."""
        for name in ("killed", "first", "second"):
            for kind in _KINDS:
                self.of[kind, name] = self._begin(kind, name)
        self._killed = {kind: self._watchers.submit(self._kill, kind) for kind in _KINDS}

    def _kill(self, kind: str) -> int:
        """Kill one after a third of its steps, and start it again; returns the step that it was killed after."""
        victim = self.of[kind, "killed"]
        victim.kill_after(STEPS[self._cpu] // 3, seconds=300)
        step = len(victim.losses)
        self.of[kind, "killed"] = self._begin(kind, "killed")
        return step

    def finish(self) -> Finding:
        """Wait for all of them."""
        steps = [self._killed[kind].result() for kind in _KINDS]
        for run in self.of.values():
            run.finish_well()
        resumed = [self.of[kind, "killed"].log.read_text(encoding="utf-8").count("resuming from") for kind in _KINDS]
        expected = "both go on from a checkpoint"
        return holds(resumed == [1, 1], f"killed after steps {steps[0]} and {steps[1]} of {STEPS[self._cpu]}", expected)


def equal_bits(first: Training, second: Training) -> Finding:
    """Losses, gradient norms and evaluations of all steps, and the weights, to the bit."""
    mine, other = first.computed(), second.computed()
    if not mine["log"]:
        raise AssertionError("the log is empty: this check would see nothing")
    off = relative(second.losses, first.losses)
    return holds(
        mine == other, other["weights"][:16], mine["weights"][:16], f"SHA-256 of the weights; losses {off:.1g} apart"
    )


def close(first: Training, second: Training) -> Finding:
    """Losses of all steps, to rounding."""
    return at_most(relative(second.losses, first.losses), _LIMIT, why=f"losses of {len(first.losses)} steps, relative")


def bits(first: Training, second: Training) -> Finding:
    """Whether plain runs happen to have the same bits: they do where no kernel adds up in an order by chance."""
    mine, other = first.computed(), second.computed()
    logs = sum(x == y for x, y in zip(mine["log"], other["log"], strict=True))
    weights = "the same" if mine["weights"] == other["weights"] else "other"
    return figure(f"{logs} of {len(mine['log'])} lines of the log, {weights} weights")


def replayed(run: Training, folder: Path, exact: bool) -> Finding:
    """A step that is trained again from the checkpoint before it: its loss is the one in the log."""
    step = len(run.losses) - 2
    command = Command(folder / "inspect.log", ["inspect", "--run", str(run.folder), "--step", str(step), "--json"])
    code = command.finish()
    for line in reversed(command.log.read_text(encoding="utf-8").splitlines()):
        if line.startswith("{"):
            told = json.loads(line)["verification"]
            why = f"step {step}, {told['difference']:.1g} off"
            good = told["verdict"] == "bits" if exact else told["verdict"] in ("bits", "rounding")
            return holds(good and code == 0, told["verdict"], "bits" if exact else "bits or rounding", why)
    raise RuntimeError(f"exit code {code}: {command.last_line}")


def _run(cpu: bool, folder: Path, **changes: object) -> Run:
    """A run in this process that is set up, and never writes a file."""
    from train_loop.config.load import config_from_arguments
    from train_loop.job import set_up

    forget_accelerator()
    given = config_from_arguments([*settings(cpu, **changes), "--run.output_dir", str(folder / "never")])
    run = set_up(given).run
    run.context.objective.train()
    return run


def _without_dropout(cpu: bool, folder: Path, **changes: object) -> Run:
    given = settings(cpu)
    architecture = json.loads(given[given.index("--model.architecture") + 1]) | NO_DROPOUT
    return _run(cpu, folder, model__architecture=json.dumps(architecture), **changes)


def micro_batches(cpu: bool, folder: Path, found: dict[int, list[StepResult]]) -> Finding:
    """Losses of the first steps of 8 sequences, dropout off, at each size; the steps go into `found`."""
    from train_loop.analysis.replay import take

    for size in (8, 1, 2, 4):
        run = _without_dropout(cpu, folder, batch__micro_batch_size=size)
        found[size] = [take(run) for _ in range(_FEW_STEPS)]
    losses = {size: [step.loss for step in steps] for size, steps in found.items()}
    if losses[8][0] == losses[8][-1]:
        raise AssertionError("training changes nothing: this check would see nothing")
    return _beside_whole(losses, _LIMIT)


def gradients(found: dict[int, list[StepResult]]) -> Finding:
    """Their norms: Adam hides a wrong scale of the gradient from the losses."""
    if len(found) < 4:
        raise Skipped("the steps were not taken")
    # The norm of a sum of gradients, which cancel each other in part.
    return _beside_whole({size: [step.grad_norm for step in steps] for size, steps in found.items()}, 10 * _LIMIT)


def _beside_whole(numbers: dict[int, list[float]], limit: float) -> Finding:
    """How far each size's numbers are from those of one micro-batch."""
    off = {size: relative(each, numbers[8]) for size, each in numbers.items() if size != 8}
    return at_most(max(off.values()), limit, why="; ".join(f"{size}: {each:.1g}" for size, each in off.items()))


@torch.no_grad()
def evaluation(cpu: bool, folder: Path) -> Finding:
    """Summed nll of windows, the last one short, at each batch size, against the model in float64 on the CPU."""
    from transformers import AutoModelForCausalLM

    from train_loop.data.loader import IGNORED, loader
    from train_loop.data.order import cut
    from train_loop.training.evaluation import measure

    run = _without_dropout(cpu, folder)
    accelerator, objective = run.context.accelerator, run.context.objective
    blocks = np.arange(max(0, len(run.validation) - 65), len(run.validation))  # an odd number, the last one among them
    model = AutoModelForCausalLM.from_config(run.state.model.config, attn_implementation="eager")
    model.load_state_dict(run.state.model.state_dict())
    model.double().eval()
    nll, targets = 0.0, 0
    for batch in loader(run.validation, cut(blocks, 8, 0, 1)):
        logits = model(batch.inputs, use_cache=False).logits.flatten(0, 1)
        assert logits.dtype == torch.float64
        labels = batch.targets.flatten()
        nll += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
        targets += int((labels != IGNORED).sum())
    found = {size: measure(accelerator, objective, run.validation, blocks, size) for size in (1, 7, 64)}
    off = {size: abs(sums[0] / nll - 1) for size, sums in found.items() if sums is not None}
    counted = {sums[2] for sums in found.values() if sums is not None}
    if counted != {float(targets)}:
        return same(sorted(counted), [float(targets)], "each target counts once")
    why = f"{len(blocks)} windows, {targets} targets, each once; " + "; ".join(
        f"{n}: {each:.1g}" for n, each in off.items()
    )
    return at_most(max(off.values()), _EVALUATION_LIMIT, why=why)


def keyed_dropout(cpu: bool, folder: Path) -> Finding:
    """A micro-batch's masks follow from (seed, step, number) alone."""
    from train_loop.rng import seed_torch

    run = _run(cpu, folder)
    device = run.context.accelerator.device
    batch = run.batches[0].micro_batches[0].to(device)

    @torch.no_grad()
    def nll(*key: int) -> float:
        seed_torch(device, "dropout", *key)
        return float(run.context.objective(batch.inputs, batch.targets))

    first = nll(0, 3, 1)
    torch.rand(1000, device=device)  # whatever happens in between
    keys: dict[str, Callable[[], bool]] = {
        "the same key": lambda: nll(0, 3, 1) == first,
        "another seed": lambda: nll(1, 3, 1) != first,
        "another step": lambda: nll(0, 4, 1) != first,
        "another micro-batch": lambda: nll(0, 3, 2) != first,
    }
    wrong = [name for name, kept in keys.items() if not kept()]
    return holds(not wrong, f"{len(keys) - len(wrong)} of {len(keys)}", "one key, one mask", ", ".join(wrong))


if __name__ == "__main__":
    part(checks)
