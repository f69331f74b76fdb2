"""The loss: the model's own, summed, whatever the architecture does to its logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support.runs import PATHS, TINY_MODELS, batch, configured
from train_loop.data import tokenizer
from train_loop.data.loader import IGNORED
from train_loop.models import building
from train_loop.training import objective as objective_module
from train_loop.training.objective import Objective, head_is_plain


@pytest.mark.parametrize(("architecture", "path"), PATHS.values(), ids=PATHS)
def test_loss_gradient_and_statistics_are_those_of_the_models_own_logits(
    tokenizer_folder: Path, architecture: dict[str, Any], path: str
) -> None:
    built = building.build(configured(architecture), tokenizer.load(str(tokenizer_folder))).eval()
    objective = Objective(built)
    assert objective.loss_path == path
    inputs, targets = batch()
    logits = built(input_ids=inputs).logits.flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), reduction="sum", ignore_index=IGNORED)
    names, parameters = zip(*built.named_parameters(), strict=True)
    gradients = torch.autograd.grad(expected, parameters)
    nll = objective(inputs, targets)
    torch.testing.assert_close(nll, expected, rtol=1e-6, atol=0)
    for name, mine, theirs in zip(names, torch.autograd.grad(nll, parameters), gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    with torch.no_grad():
        found = objective(inputs, targets, statistics=True)
    double = -logits.double().log_softmax(-1).gather(1, targets.flatten().clamp(min=0)[:, None])[:, 0]
    real = targets.flatten() != IGNORED
    assert found.nll.dtype == torch.float64
    torch.testing.assert_close(found.nll, double[real].sum(), rtol=1e-7, atol=0)
    assert found.targets == real.sum() and found.correct == (logits.argmax(-1) == targets.flatten())[real].sum()


def test_a_cap_is_seen_although_a_fresh_models_logits_are_far_below_it(tokenizer_folder: Path) -> None:
    built = building.build(configured(PATHS["gemma2"][0]), tokenizer.load(str(tokenizer_folder)))
    inputs, _ = batch()
    hidden = built.base_model(input_ids=inputs).last_hidden_state
    # The cap changes nothing here ...
    torch.testing.assert_close(built(input_ids=inputs).logits, built.lm_head(hidden), rtol=1e-2, atol=1e-3)
    assert not head_is_plain(Objective(built))  # ... and is found all the same


def test_no_targets_no_loss_no_gradient(tokenizer_folder: Path) -> None:
    built = building.build(configured(TINY_MODELS["gpt2"]), tokenizer.load(str(tokenizer_folder)))
    objective = Objective(built)
    inputs, targets = batch(1)
    nll = objective(inputs, torch.full_like(targets, IGNORED))
    nll.backward()
    assert nll == 0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in built.parameters())


def test_bf16_loss_is_not_summed_in_bf16(tokenizer_folder: Path) -> None:
    objective = Objective(
        building.build(configured(TINY_MODELS["llama"]), tokenizer.load(str(tokenizer_folder))).eval()
    )
    inputs, targets = batch(64)
    with torch.no_grad():
        exact = objective(inputs, targets)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = objective(inputs, targets)
    assert rounded.dtype == torch.float32
    assert abs(rounded / exact - 1) < 1e-3


def test_a_head_that_is_wider_than_the_hidden_states_is_the_models_own_business(tokenizer_folder: Path) -> None:
    wider = {"model_type": "rembert", "is_decoder": True, "hidden_size": 32, "num_hidden_layers": 1}
    wider |= {
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "input_embedding_size": 16,
        "output_embedding_size": 48,
    }
    built = building.build(configured(wider), tokenizer.load(str(tokenizer_folder)))
    assert not head_is_plain(Objective(built))
    inputs, targets = batch()
    logits = built.eval()(input_ids=inputs).logits.flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), reduction="sum", ignore_index=IGNORED)
    torch.testing.assert_close(Objective(built)(inputs, targets), expected, rtol=1e-6, atol=0)


def test_the_loss_is_compiled_for_the_shapes_that_layers_are_compiled_for(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(objective_module, "linear_cross_entropy", lambda *given: told.append(given[-1]))
    objective = Objective(building.build(configured(TINY_MODELS["gpt2"]), tokenizer.load(str(tokenizer_folder))))
    inputs, targets = batch()
    objective(inputs, targets)
    objective.compiled = {(True, *inputs.shape)}
    for training, rows in ((True, len(inputs)), (True, 1), (False, len(inputs))):
        objective.train(training)(inputs[:rows], targets[:rows])
    assert told == [False, True, False, False]
