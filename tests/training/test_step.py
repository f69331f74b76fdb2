"""One optimizer step: the gradient of the mean over all its targets, and `Trainer`'s losses and weights."""

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from tests.support.runs import NO_DROPOUT, TINY_MODELS
from train_loop import job
from train_loop.checkpoint import storage
from train_loop.checkpoint.manager import CheckpointManager
from train_loop.checkpoint.restore import restore
from train_loop.config.load import config_from_arguments
from train_loop.config.schema import ScheduleConfig
from train_loop.data.loader import IGNORED
from train_loop.training.accumulators import FixedPoint, LossScaled
from train_loop.training.loop import History, Loop
from train_loop.training.schedule import learning_rate
from train_loop.training.state import Observer, Run, TrainState
from train_loop.training.step import gradient_norm, reduce_scalars, train_step


def set_up(settings: Callable[..., list[str]], name: str, **changes: object) -> Run:
    architecture = TINY_MODELS[name] | (NO_DROPOUT if name == "gpt2" else {}) | {"max_position_embeddings": 33}
    return job.set_up(config_from_arguments(settings(model__architecture=json.dumps(architecture), **changes))).run


class Ordered(Trainer):
    """Trainer that keeps the order of its data set."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


class Records(Observer):
    """Keeps the records of all steps."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def after_step(self, state: TrainState, record: dict[str, Any]) -> None:
        self.steps.append(record)


def rows_for_trainer(run: Run, step: int) -> list[dict[str, list[int]]]:
    """A step's windows, in the plan's order, as the block_size + 1 tokens that Trainer's model shifts itself.

    A short step is filled up with windows without targets, which weigh nothing in either loop.
    """
    rows = []
    for batch in run.batches[step].micro_batches:
        for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            rows.append({"input_ids": [*inputs, max(targets[-1], 0)], "labels": [IGNORED, *targets]})
    filler = {"input_ids": [0] * 33, "labels": [IGNORED] * 33}
    return rows + [filler] * (run.batches.plan.sequences_per_step - len(rows))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_losses_and_weights_are_those_of_trainer(settings: Callable[..., list[str]], tmp_path: Path, name: str) -> None:
    """50 steps with warm-up, linear decay, clipping, decay groups, two micro-batches, a short last window."""
    run = set_up(
        settings,
        name,
        train__max_steps=50,
        batch__sequences_per_step=8,
        batch__micro_batch_size=4,
        schedule__warmup_steps=5,
        optimizer__max_grad_norm=0.5,
        optimizer__weight_decay=0.1,
        optimizer__learning_rate=3e-3,
        evaluation__every=1000,
    )
    assert (
        run.batches.plan.steps_per_epoch < 50 and run.batches.plan.blocks_per_epoch % 8
    )  # crosses epochs, has short steps
    reference = type(run.state.model)(run.state.model.config)
    reference.load_state_dict(run.state.model.state_dict())
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        max_steps=50,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        warmup_steps=5,
        lr_scheduler_type="linear",
        weight_decay=0.1,
        max_grad_norm=0.5,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        optim="adamw_torch_fused",
        disable_tqdm=True,
    )
    rows = [row for step in range(50) for row in rows_for_trainer(run, step)]
    trainer = Ordered(model=reference, args=arguments, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    mine = Records()
    Loop(run, History(), [mine], save=lambda state, wait=False: None).train()
    assert len(theirs) == len(mine.steps) == 50
    assert max(step["grad_norm"] for step in mine.steps) > 0.5  # it did clip
    assert [step["loss"] for step in mine.steps] == pytest.approx(theirs, abs=1e-5)
    for (parameter, mine_), theirs_ in zip(run.state.model.named_parameters(), reference.parameters(), strict=True):
        difference = (mine_ - theirs_).abs()
        if parameter.endswith("c_attn.bias"):
            # A key's bias adds the same to all of a query's scores, so its true gradient is zero and Adam, which
            # divides by the gradient's size, moves it by rounding noise.
            width = len(mine_) // 3
            difference = torch.cat([difference[:width], difference[2 * width :]])
        assert difference.max() < 1e-5, parameter


def gradient(run: Run, step: int, micro_batch_size: int, max_grad_norm: float | None = None) -> dict[str, torch.Tensor]:
    """The gradient of one step, seen just before the update (which learning rate 0 makes harmless)."""
    found: dict[str, torch.Tensor] = {}

    def remember(*_: Any) -> None:
        found.update({name: parameter.grad.clone() for name, parameter in run.state.model.named_parameters()})

    handle = run.state.optimizer.register_step_pre_hook(remember)
    batches = replace(run.batches, plan=replace(run.batches.plan, micro_batch_size=micro_batch_size))
    train_step(replace(run.context, max_grad_norm=max_grad_norm), run.state, batches[step], 0.0)
    handle.remove()
    return found


@pytest.mark.parametrize("reproducible", ["no", "bitwise"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_gradient_is_that_of_the_mean_over_all_targets(
    settings: Callable[..., list[str]], name: str, reproducible: str
) -> None:
    """At every micro-batch size, also in the short last step: against an unaccumulated float64 reference."""
    run = set_up(settings, name, run__reproducible=reproducible)
    last = run.batches.plan.steps_per_epoch - 1
    with_short_window = next(
        step for step in range(last + 1) if run.batches.windows.count - 1 in run.batches.plan.blocks(step)
    )
    assert len(run.batches.plan.blocks(last)) < 8
    for step in {0, last, with_short_window}:
        double = type(run.state.model)(run.state.model.config).double().train()
        double.load_state_dict(run.state.model.state_dict())
        nll, count = torch.zeros((), dtype=torch.float64), 0
        for batch in run.batches[step].micro_batches:
            logits = double(input_ids=batch.inputs, use_cache=False).logits
            real = batch.targets != IGNORED
            picked = logits.log_softmax(-1).gather(2, batch.targets.clamp(min=0)[..., None])[..., 0]
            nll, count = nll - picked[real].sum(), count + int(real.sum())
        (nll / count).backward()
        for micro_batch_size in (1, 3, 8):
            found = gradient(run, step, micro_batch_size)
            for parameter, expected in double.named_parameters():
                assert expected.grad is not None
                difference = (found[parameter].double() - expected.grad).norm()
                assert difference <= 1e-5 * expected.grad.norm(), parameter


def test_gradients_are_clipped_as_torch_does(settings: Callable[..., list[str]]) -> None:
    """To the bit: far above the limit, at it, and below it, where they stay as they are."""
    run = set_up(settings, "gpt2")
    whole = gradient(run, 0, 4)
    parameters = dict(run.state.model.named_parameters())
    for name, parameter in parameters.items():
        parameter.grad = whole[name].clone()
    norm = gradient_norm(parameters.values())
    for limit in (float(norm) / 7, float(norm), float(norm) * 2, None):
        for name, parameter in parameters.items():
            parameter.grad = whole[name].clone()
        torch.nn.utils.clip_grads_with_norm_(parameters.values(), limit or math.inf, norm)
        expected = {name: parameter.grad for name, parameter in parameters.items()}
        run.state.optimizer.zero_grad()
        found = gradient(run, 0, 4, limit)
        assert all(torch.equal(found[name], expected[name]) for name in found), limit
        assert all(torch.equal(found[name], whole[name]) for name in found) == (limit is None or limit > float(norm))


def test_gradients_beyond_the_fixed_points_room_are_added_with_another_scale(
    settings: Callable[..., list[str]],
) -> None:
    """A gradient a million times as large is the same, a million times as large; both scales are powers of two."""
    found = []
    for factor in (1.0, 2.0**30, 2.0**-60):
        run = set_up(settings, "gpt2", run__reproducible="bitwise")
        accumulator = run.context.accumulator
        assert isinstance(accumulator, FixedPoint)
        for parameter in run.state.model.parameters():
            parameter.register_hook(lambda gradient, factor=factor: gradient * factor)
        begun: list[int] = []
        begin = accumulator.sum.begin
        accumulator.sum.begin = lambda *arguments, begun=begun, begin=begin: (begun.append(1), begin(*arguments))[1]  # type: ignore[method-assign]
        gradients = gradient(run, 0, 3)
        assert len(begun) == (1 if factor == 1 else 2)
        found.append({name: tensor.double() / factor for name, tensor in gradients.items()})
    for name in found[0]:
        assert (found[1][name] - found[0][name]).norm() <= 1e-6 * found[0][name].norm()
        assert (found[2][name] - found[0][name]).norm() <= 1e-6 * found[0][name].norm()


class TestLossScaling:
    """As fp16 has it on a GPU; here with fp32's gradients, which are made to overflow where fp16's would."""

    def step(self, settings: Callable[..., list[str]], scale: float | None) -> tuple[Any, Run]:
        run = set_up(settings, "gpt2")
        if scale is not None:
            run.context.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            run.context.accumulator = LossScaled(run.context.accelerator, run.state.optimizer)
            for parameter in run.state.model.parameters():
                parameter.register_hook(lambda each: each.masked_fill(each.abs() > 65504, float("inf")))
        return train_step(run.context, run.state, run.batches[0], 1e-2), run

    @pytest.mark.parametrize("scale", [2.0**10, 2.0**24, 2.0**30])
    def test_an_overflow_of_the_scaled_loss_repeats_the_step(
        self, settings: Callable[..., list[str]], scale: float
    ) -> None:
        expected, plain = self.step(settings, None)
        result, run = self.step(settings, scale)
        accumulator = run.context.accumulator
        assert isinstance(accumulator, LossScaled)
        overflows = accumulator.overflows
        assert result.applied and (overflows > 0) == (scale > 2.0**20)
        assert run.context.accelerator.scaler.get_scale() == scale / 2**overflows
        assert result.loss == expected.loss and result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-6)
        for mine, theirs in zip(run.state.model.parameters(), plain.state.model.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        assert accumulator.record() == {
            "loss_scale": run.context.accelerator.scaler.get_scale(),
            "overflows": overflows,
        }

    def test_a_step_that_is_bad_at_any_scale_is_skipped(self, settings: Callable[..., list[str]]) -> None:
        _, run = self.step(settings, 2.0**4)
        before = {name: tensor.clone() for name, tensor in run.state.model.state_dict().items()}
        hook = run.state.model.lm_head.weight.register_hook(lambda gradient: gradient * float("nan"))
        result = train_step(run.context, run.state, run.batches[1], 1e-2)
        accumulator = run.context.accumulator
        assert isinstance(accumulator, LossScaled)
        assert not result.applied and accumulator.overflows == 4  # 16, 8, 4, 2, and given up at 1
        assert all(torch.equal(tensor, before[name]) for name, tensor in run.state.model.state_dict().items())
        hook.remove()
        assert train_step(run.context, run.state, run.batches[2], 1e-2).applied

    def test_the_scale_is_kept_in_checkpoints(self, settings: Callable[..., list[str]], tmp_path: Path) -> None:
        _, run = self.step(settings, 2.0**30)
        _, other = self.step(settings, 2.0**10)
        content = {"step": 1, "loss_scale": run.context.accelerator.scaler.state_dict()}
        manager = CheckpointManager(run.context.accelerator, tmp_path, 1, True)
        manager.save_async(run.state.model, run.state.optimizer, content)
        assert manager.wait() is None
        found, _ = storage.newest(tmp_path)
        assert found is not None
        restore(other.context.accelerator, found, other.state.model, other.state.optimizer)
        assert (
            2.0**10
            < other.context.accelerator.scaler.get_scale()
            == run.context.accelerator.scaler.get_scale()
            < 2.0**30
        )


def test_a_mask_depends_on_step_and_micro_batch_alone(settings: Callable[..., list[str]]) -> None:
    dropout = TINY_MODELS["gpt2"] | {"resid_pdrop": 0.3}
    run = job.set_up(config_from_arguments(settings(model__architecture=json.dumps(dropout)))).run
    run.context.objective.train()

    def loss(step: int, *before: int) -> float:
        torch.manual_seed(sum(before))  # whatever was drawn before
        return train_step(run.context, run.state, replace(run.batches[0], index=step), 0.0).loss

    assert loss(5) == loss(5, 1, 2) and loss(5) != loss(6)


@pytest.mark.parametrize("reproducible", ["no", "bitwise"])
def test_a_step_without_a_target_has_no_loss_and_no_gradient(
    settings: Callable[..., list[str]], reproducible: str
) -> None:
    run = set_up(settings, "gpt2", run__reproducible=reproducible)
    batch = run.batches[0]
    nothing = [each._replace(targets=each.targets * 0 + IGNORED) for each in batch.micro_batches]
    batch = replace(batch, micro_batches=nothing, targets=0)
    assert train_step(run.context, run.state, batch, 1e-2) == (0.0, 0.0, True, False)


def test_the_norm_of_large_gradients_is_float64s() -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.empty(shape)) for shape in ((4000, 2500), (70_000,), (3, 5), (2,))]
    for parameter in parameters[:-1]:  # the last one has no gradient
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    exact = math.sqrt(sum(float(each.grad.double().square().sum()) for each in parameters[:-1]))
    assert float(gradient_norm(parameters)) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(
    settings: Callable[..., list[str]], poison: float
) -> None:
    run = set_up(settings, "gpt2")
    handle = run.state.model.transformer.h[0].attn.c_attn.weight.register_hook(lambda gradient: gradient * poison)
    before = {name: tensor.clone() for name, tensor in run.state.model.state_dict().items()}
    result = train_step(run.context, run.state, run.batches[0], 0.1)
    handle.remove()
    assert not result.applied
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.state.model.state_dict().items())
    assert train_step(run.context, run.state, run.batches[1], 0.1).applied


def test_no_limit_leaves_gradients_as_they_are() -> None:
    accelerator = Accelerator(cpu=True)
    layer = torch.nn.Linear(4, 1)
    (layer(torch.full((1, 4), 1e6)) * 1e6).sum().backward()
    assert layer.weight.grad is not None
    before = layer.weight.grad.clone()
    accelerator.clip_grad_norm_(layer.parameters(), float("inf"))
    assert torch.equal(layer.weight.grad, before)
    assert learning_rate(0, 1, 1.0, ScheduleConfig()) == 1.0


@pytest.mark.parametrize("asked", [0, 1, 2])
def test_one_process_that_is_asked_to_stop_stops_all(asked: int) -> None:
    """Whichever it is, and the loss is the sum of all processes, whatever their order."""
    others = [[2.0, float(asked == rank), 5.0] for rank in (1, 2)]

    class Three:
        num_processes = 3
        gather = staticmethod(lambda ranks: torch.cat([ranks, torch.tensor(others)]))

    context: Any = SimpleNamespace(
        accelerator=Three(), stop=SimpleNamespace(asked=asked == 0), clock=lambda part: nullcontext()
    )
    assert reduce_scalars(context, [torch.tensor(1.0)], torch.tensor(5.0)) == (5.0, 5.0, True)
    context.stop.asked, others[0][1], others[1][1] = False, 0.0, 0.0
    assert reduce_scalars(context, [torch.tensor(1.0)], torch.tensor(5.0)) == (5.0, 5.0, False)
