"""Decay groups and the learning rate."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from tests.support.runs import PATHS, TINY_MODELS, configured
from train_loop.config.schema import OptimizerConfig, ScheduleConfig
from train_loop.data import tokenizer
from train_loop.models import building
from train_loop.training import optimizer
from train_loop.training.schedule import learning_rate


def build(architecture: dict[str, Any], tokenizer_folder: Path) -> Any:
    return building.build(configured(architecture), tokenizer.load(str(tokenizer_folder)))


@pytest.mark.parametrize("architecture", [path[0] for path in PATHS.values()], ids=PATHS)
def test_every_parameter_is_in_one_group(tokenizer_folder: Path, architecture: dict[str, Any]) -> None:
    built = build(architecture, tokenizer_folder)
    for decay_embeddings in (True, False):
        groups = optimizer.decay_groups(built, decay_embeddings)
        grouped = [id(parameter) for group in groups.values() for parameter in group.values()]
        assert sorted(grouped) == sorted(map(id, built.parameters()))  # tied weights once
        assert all(parameter.ndim == 2 for parameter in groups["decay"].values())
        embeddings = {"wte", "wpe", "embed_tokens", "embed_in", "word_embeddings"}
        found = {name for name in groups["decay"] if name.split(".")[-2] in embeddings}
        assert bool(found) == decay_embeddings


@pytest.mark.parametrize("architecture", TINY_MODELS.values(), ids=TINY_MODELS)
def test_groups_are_those_of_trainer(tokenizer_folder: Path, architecture: dict[str, Any]) -> None:
    built = build(architecture, tokenizer_folder)
    forbidden = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    theirs = set(get_parameter_names(built, [torch.nn.LayerNorm], forbidden)) - {"lm_head.weight"}
    mine = set(optimizer.decay_groups(built, decay_embeddings=True)["decay"]) - {"lm_head.weight"}
    assert mine == theirs


def test_frozen_parameters_are_left_out(tokenizer_folder: Path) -> None:
    built = build(TINY_MODELS["gpt2"], tokenizer_folder)
    built.transformer.wte.weight.requires_grad = False
    groups = optimizer.decay_groups(built, decay_embeddings=True)
    assert "transformer.wte.weight" not in groups["decay"] | groups["no_decay"]


def test_adamw_is_fused_with_two_groups(tokenizer_folder: Path) -> None:
    adamw = optimizer.build(build(TINY_MODELS["gpt2"], tokenizer_folder), OptimizerConfig(weight_decay=0.3))
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.3, 0.0]
    assert all(group["fused"] for group in adamw.param_groups)


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "wsd"])
def test_the_schedule_is_transformers(name: Any, warmup: int) -> None:
    total, peak = 50, 3e-4
    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    specific = {"num_decay_steps": 5, "decay_type": "linear"} if name == "wsd" else {}
    reference = get_scheduler(
        {"constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}.get(name, name),
        adamw,
        num_warmup_steps=warmup,
        num_training_steps=total,
        scheduler_specific_kwargs=specific,
    )
    schedule = ScheduleConfig(name=name, warmup_steps=warmup)
    for step in range(total):
        mine = learning_rate(step, total, peak, schedule)
        assert mine == pytest.approx(reference.get_last_lr()[0], rel=1e-12, abs=1e-18)
        adamw.step()
        reference.step()


def test_the_schedule_never_leaves_its_range() -> None:
    for name in ("linear", "cosine", "constant", "wsd"):
        for total, warmup in ((1, 0), (1, 5), (3, 3), (10, 20)):
            rates = [
                learning_rate(step, total, 1.0, ScheduleConfig(name=name, warmup_steps=warmup))  # type: ignore[arg-type]
                for step in range(total)
            ]
            assert all(0 <= rate <= 1 for rate in rates)
