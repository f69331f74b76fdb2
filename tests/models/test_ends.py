"""Every token that ends a text counts, wherever it is named, and Transformers' `generate` stops at the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.support.runs import Command
from train_loop.config.sampling import Sampling
from train_loop.data import tokenizer
from train_loop.errors import InputError
from train_loop.generation.decoding import generate
from train_loop.generation.kv_cache import Decoder
from train_loop.generation.sampler import Sampler
from train_loop.models import loading
from train_loop.models.ends import ends


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of a model folder, to change."""
    copy = tmp_path / "model"
    copy.mkdir()
    for path in model_folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def name_ends(folder: Path, file: str, value: object) -> None:
    path = folder / file
    found = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(found | {"eos_token_id": value}), encoding="utf-8")


def greedy(folder: Path) -> tuple[list[int], list[int]]:
    """A prompt, and what follows it if nothing ends the text."""
    prompt = tokenizer.load(str(folder)).encode("the of")
    found = generate(Decoder(loading.load(str(folder)).eval()), [prompt], Sampling(20, temperature=0), None)
    return prompt, found[0].tokens


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_a_text_ends_where_generate_ends_it(folder: Path, file: str) -> None:
    prompt, free = greedy(folder)
    later = free[6]
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    name_ends(folder, file, [319, later])
    sampler = Sampler.load(str(folder))
    (found,) = next(sampler.sample(["the of"], Sampling(20, temperature=0)))
    theirs = (
        AutoModelForCausalLM.from_pretrained(folder)
        .generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20)[0, len(prompt) :]
        .tolist()
    )
    assert found.generated.finish_reason == "stop" and [*found.generated.tokens, later] == theirs
    assert found.generated.tokens == free[: free.index(later)]


def test_rows_of_a_batch_end_each_at_its_own_end(folder: Path) -> None:
    free = [each[0].generated.tokens for each in Sampler.load(str(folder)).sample(["the", "of and"], Sampling(20))]
    chosen = [free[0][3], free[1][9]]
    name_ends(folder, "generation_config.json", chosen)
    found = [each[0].generated.tokens for each in Sampler.load(str(folder)).sample(["the", "of and"], Sampling(20))]
    for row, whole in zip(found, free, strict=True):
        assert row == whole[: min(whole.index(end) for end in chosen if end in whole)]
    (late,) = next(Sampler.load(str(folder)).sample(["the"], Sampling(20, min_new_tokens=12)))
    assert len(late.generated.tokens) >= 12 and not {*chosen} & {*late.generated.tokens[:12]}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([5, 7], [0, 5, 7]),
        (5, [0, 5]),
        ([], [0]),
        (None, [0]),
        ([0, 0, 5], [0, 5]),
        ([5, 999999, -1], [0, 5, 999999, -1]),
    ],
)
def test_the_tokenizers_own_comes_first_and_others_once(folder: Path, value: Any, expected: list[int]) -> None:
    built, own = loading.load(str(folder)), tokenizer.load(str(folder))
    built.config.eos_token_id = None
    built.generation_config = GenerationConfig(eos_token_id=value)
    assert ends(built, own) == expected
    # Ids that are not in the vocabulary never come; before the least length none of the others does.
    sampled = Sampler(built, own).sample(["a"], Sampling(5, min_new_tokens=5))
    assert len(next(sampled)[0].generated.tokens) == 5


@pytest.mark.parametrize("value", ["a", [1.5], [True], [[1]]])
def test_what_is_no_id_is_refused(folder: Path, value: Any) -> None:
    built, own = loading.load(str(folder)), tokenizer.load(str(folder))
    built.generation_config.eos_token_id = value
    with pytest.raises(InputError, match="is no token id"):
        Sampler(built, own)


@pytest.mark.parametrize("content", ["", "[1]", '{"eos_token_id": [1,'])
def test_damaged_generation_settings_are_not_passed_over(folder: Path, command: Command, content: str) -> None:
    (folder / "generation_config.json").write_text(content, encoding="utf-8")
    assert command("sample", "--model", folder, "--prompt", "a") == 2
    assert "generation_config.json" in command.err and command.err.count("\n") == 1


def test_a_minimum_that_no_token_can_reach_is_refused(folder: Path) -> None:
    built, own = loading.load(str(folder)), tokenizer.load(str(folder))
    built.generation_config.eos_token_id = [*range(1, 320)]
    with pytest.raises(InputError, match="min_new_tokens 1: every token is banned or ends the text"):
        Sampler(built, own)("a", min_new_tokens=1, max_new_tokens=3)


def test_an_export_and_a_run_in_progress_keep_all_ends(
    folder: Path, command: Command, settings: Callable[..., list[str]], tmp_path: Path
) -> None:
    name_ends(folder, "generation_config.json", [17, 0])
    run = tmp_path / "run"
    trained = settings(model__architecture=None, model__name_or_path=folder, train__max_steps=2, data__block_size=32)
    assert command("train", *trained) == 0
    for part in ("model", "architecture"):
        saved = json.loads((run / part / "generation_config.json").read_text(encoding="utf-8"))
        assert saved["eos_token_id"] == [0, 17]
    sampler = Sampler.load(str(run / "checkpoints" / "step-00000002"))
    assert ends(sampler.model, sampler.tokenizer) == [0, 17]
