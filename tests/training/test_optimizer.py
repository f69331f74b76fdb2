"""Decay groups and the learning rate."""

import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from scripts import architectures
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


# By what their authors call them: nothing of this multiplies as a matrix, whatever its number of dimensions.
ADDS_OR_SCALES = re.compile(
    r"bias(_[uvhw])?$|[._]b[12]$|norm[^.]*\.weight$|(^|\.)(ln_?\w*|layernorm\w*)\.weight$|A_log$|\.D$|\.scale$|"
    r"time_(decay|first|mix_\w+)$|(mask_emb|probe)$|_feature_extensor$|layer_scale"
)
# The names of weights that do, in attention, feed-forward layers, experts, routers, convolutions and heads.
MULTIPLIES = re.compile(
    r"(q|k|v|o|qkv|out|in|up|down|gate|gate_up|query|key|value|dense|fc\d|c_attn|c_proj|c_fc|router|lm_head)(_proj)?\.weight$|"
    r"experts\.(gate_up|up|down)_proj$|conv1d\.weight$|\.(w1|w2|v1|x_proj_weight|input_gate_weight|recurrent_gate_weight)$"
)
LOOKED_UP = re.compile(
    r"((?<!vision_)embed_tokens(?!_extend)|wte|wpe|word_embeddings|position_embeddings|relative_embedding|seg_embed|pos_embed)"
)
UNLIKE = (
    "gpt2 gpt_oss recurrent_gemma rwkv mamba jamba zamba xlnet deepseek_v4 kimi_linear dbrx qwen3_next lfm2".split()
)


def small(model_type: str) -> Any:
    """The configuration of a small model."""
    ids = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return AutoConfig.for_model(model_type, **(ids | architectures.small(model_type)))


def check_names(model_type: str) -> None:
    """What decays is what the names above say. (The model is made on a device without memory.)"""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small(model_type))
    groups = optimizer.decay_groups(model, decay_embeddings=False)
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert groups["decay"].keys() | groups["no_decay"].keys() == trained
    for name in groups["decay"]:
        assert not ADDS_OR_SCALES.search(name) and not LOOKED_UP.search(name.rpartition(".")[0]), (model_type, name)
    for name, parameter in groups["no_decay"].items():
        tied = parameter is getattr(model.get_input_embeddings(), "weight", None)
        assert tied or parameter.ndim < 2 or not MULTIPLIES.search(name), (model_type, name)


class Multiplied(TorchDispatchMode):
    """Which parameters of a model enter a product or a convolution as a factor, and which are used at all."""

    FACTORS: ClassVar = dict.fromkeys(("mm", "bmm", "_grouped_mm", "dot", "mv"), (0, 1)) | dict.fromkeys(
        ("addmm", "baddbmm", "convolution", "_scaled_dot_product_flash_attention_for_cpu"), (1, 2)
    )

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.names = {each.untyped_storage().data_ptr(): name for name, each in model.named_parameters()}
        self.copies: list[torch.Tensor] = []
        self.multiplied: set[str] = set()
        self.used: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind, found = function._schema.name.partition("::")[2], function(*args, **(kwargs or {}))
        for place, each in enumerate(args):
            name = self.names.get(each.untyped_storage().data_ptr()) if isinstance(each, torch.Tensor) else None
            if name is not None:
                self.used.add(name)
                if place in self.FACTORS.get(kind, ()):
                    self.multiplied.add(name)
                if kind == "clone":
                    self.copies.append(found)
                    self.names[found.untyped_storage().data_ptr()] = name
        return found


def check_use(model_type: str) -> None:
    """What decays enters a product or a convolution as it is, and no other matrix does."""
    model = AutoModelForCausalLM.from_config(small(model_type), dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad(), Multiplied(model) as seen:
        model(input_ids=torch.arange(64).view(2, 32), use_cache=False)
    decays = optimizer.decay_groups(model, decay_embeddings=False)["decay"].keys()
    looked_up = {id(each.weight) for each in model.modules() if isinstance(each, torch.nn.Embedding)}
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    used = {name for name, each in trained.items() if each.ndim > 1 and id(each) not in looked_up} & seen.used
    assert used and decays & used == seen.multiplied & used, (model_type, (decays & used) ^ (seen.multiplied & used))


@pytest.mark.parametrize("model_type", UNLIKE)
def test_what_decays_is_what_multiplies(model_type: str) -> None:
    check_names(model_type)
    check_use(model_type)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_what_decays_is_what_multiplies_in_every_architecture(part: int) -> None:
    page = architectures.PAGE.read_text(encoding="utf-8")
    trained = [each for each in architectures.types() if f"\n| `{each}` |" in page.split("## What does not train")[0]]
    assert len(trained) > 150
    for model_type in trained[part::4]:
        check_names(model_type)
        if model_type not in ("inkling2_text", "inkling_text"):  # which multiply by sums of weights
            check_use(model_type)
