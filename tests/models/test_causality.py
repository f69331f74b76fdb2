"""Causality is measured: a model that sees the future is refused wherever it would be used as one that does not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from scripts import architectures
from tests.support.runs import TINY_MODELS, Command
from train_loop import Sampler, job
from train_loop.config.load import config_from_arguments
from train_loop.data import tokenizer
from train_loop.errors import InputError
from train_loop.models import causality
from train_loop.ops import dropout

ENCODERS = (
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
    "roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod"
).split()
SEES: dict[str, dict[str, Any]] = {name: {"is_decoder": False} for name in ENCODERS} | {
    "xlm": {"causal": False},
    "xlnet": {"attn_type": "bi"},
    "llama": {"is_causal": False},
}
CAUSAL = ("gpt2", "bart", "mixtral", "olmoe", "mamba2", "rwkv", "qwen3_next", "xlstm", "deepseek_v3", "gemma3_text")


def built(model_type: str, **changes: Any) -> PreTrainedModel:
    ids = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(ids | architectures.small(model_type) | changes))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("name", SEES)
def test_a_model_that_sees_the_future_is_refused_with_what_would_end_that(name: str) -> None:
    """A fresh one, in which one token hardly minds another."""
    with pytest.raises(InputError, match=r"^model x: \w+ is not causal: [^\n]*$") as error:
        causality.check(built(name, **SEES[name]), "model x")
    ((setting, wrong),) = SEES[name].items()
    right = {False: True, "bi": "uni"}[wrong]
    assert f"set {setting}: {json.dumps(right).strip(chr(34))} in its configuration" in str(error.value)
    causality.check(built(name, **{setting: right}), "model x")


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_model_is_not_refused(name: str) -> None:
    """In half precision neither; mixtures of experts round differently when later tokens change."""
    model = built(name).train()
    causality.check(model, "model x")
    assert model.training
    causality.check(built(name).bfloat16(), "model x")


def test_what_moves_is_told_from_rounding_and_chance() -> None:
    weights = torch.randn(8, 300, generator=torch.Generator().manual_seed(1))
    table = torch.randn(300, 8, generator=torch.Generator().manual_seed(2))
    draw = torch.Generator().manual_seed(3)

    def model(leak: float = 0.0, chance: float = 0.0, bad: bool = False) -> Callable[[torch.Tensor], torch.Tensor]:
        def logits(ids: torch.Tensor) -> torch.Tensor:
            x = table[ids[0]]
            past = x.cumsum(0) / torch.arange(1, len(x) + 1)[:, None]
            found = (past + leak * x.mean(0)) @ weights + chance * torch.randn(len(x), 300, generator=draw)
            if bad:
                found[3] = torch.nan
            return found

        return logits

    def moved(**how: Any) -> float:
        return causality.movement(model(**how), 300, 16)

    assert moved() == moved(bad=True) == moved(chance=1e-3) == 0
    assert 1e-4 < moved(leak=1e-3) < 1e-2 < moved(leak=1)
    assert 1e-4 < moved(leak=1e-2, chance=1e-5)
    assert 0 < moved(leak=1e-7) < causality.tolerance(torch.float32) < causality.tolerance(torch.float16)
    assert causality.movement(model(leak=1), 300, 1) == 0  # there is no later token


def test_a_model_that_sees_the_future_is_not_trained(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path
) -> None:
    architecture = {"model_type": "electra"} | architectures.small("electra")
    for changed, cure in (({"is_decoder": False}, "set is_decoder: true in model.architecture"), ({}, "")):
        shape = json.dumps(architecture | changed)
        code = command("train", *settings(model__architecture=shape, train__max_steps=2))
        assert code == (2 if cure else 0), command.err
        assert cure in command.err.splitlines()[-1] and (tmp_path / "run").exists() == (not cure)
    sheet = json.loads((tmp_path / "run" / "truth.json").read_text())
    assert sheet["causality"]["moved"] == 0 and "no earlier logit moves if later tokens change\n" in command.err


def test_neither_is_it_evaluated_or_sampled(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, tokenizer_folder: Path
) -> None:
    model, its_tokenizer = built("ernie", is_decoder=False, vocab_size=320), tokenizer.load(str(tokenizer_folder))
    folder = tmp_path / "folder"
    model.save_pretrained(folder)
    its_tokenizer.save_pretrained(folder)
    message = "is not causal: a later token changes what it predicts for earlier ones; set is_decoder: true in its"
    for arguments in (["evaluate", *settings()], ["sample", "--prompt", "a"]):
        assert command(*arguments, "--model", folder) == 2
        assert f"model {folder}: ErnieForCausalLM {message}" in command.err.splitlines()[-1]
    with pytest.raises(InputError, match=f"the ErnieForCausalLM: ErnieForCausalLM {message}"):
        Sampler(model, its_tokenizer)
    with pytest.raises(InputError, match=f"the ErnieForCausalLM: ErnieForCausalLM {message}"):
        job.evaluate(model, config_from_arguments(settings()))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"is_decoder": True}))
    assert command("sample", "--prompt", "a", "--max_new_tokens", 2, "--model", folder) == 0, command.err
    assert command("evaluate", *settings(), "--model", folder) == 0, command.err


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_it_is_the_model_as_it_trains_that_is_measured(
    command: Command, settings: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """An attention that forgets its mask, used only where dropout is on."""

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, dropout: float = 0.0, **more: Any) -> Any:
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=dropout == 0)
        return mixed.transpose(1, 2).contiguous(), None

    monkeypatch.setattr(dropout, "attention", attention)
    wide = TINY_MODELS["gpt2"] | {"initializer_range": 0.2}
    assert command("train", *settings(model__architecture=json.dumps(wide), run__mixed_precision=precision)) == 2
    assert "truth sheet: model.architecture: GPT2LMHeadModel is not causal" in command.err
