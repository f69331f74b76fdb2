"""What tokenizer.json says counts: a class, a setting or a damaged file that says something else is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.support.runs import text
from train_loop.data import tokenizer, tokenizer_file
from train_loop.errors import InputError

PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
FILES = Path("tokenizer.json"), Path("tokenizer_config.json")


@pytest.fixture(scope="module")
def content(tokenizer_folder: Path) -> dict[str, Any]:
    """What a byte-level tokenizer.json holds."""
    found: dict[str, Any] = json.loads((tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))
    return found


def write(folder: Path, content: object, settings: object = PLAIN, **others: object) -> str:
    for name, value in {"tokenizer.json": content, "tokenizer_config.json": settings, **others}.items():
        if value is not None:
            text = value if isinstance(value, str) else json.dumps(value)
            (folder / name).write_text(text, encoding="utf-8")
    return str(folder)


def ids(core: Tokenizer) -> list[list[int]]:
    return [core.encode(each, add_special_tokens=False).ids for each in tokenizer_file.PROBES]


@pytest.mark.parametrize(
    "name", ["CLIPTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "NllbTokenizer", "Qwen2Tokenizer", "T5Tokenizer"]
)
def test_a_class_of_another_family_is_refused(tmp_path: Path, content: dict[str, Any], name: str) -> None:
    folder = write(tmp_path, content, PLAIN | {"tokenizer_class": name})
    with pytest.raises(InputError, match=r"set tokenizer_class to PreTrainedTokenizerFast in .*tokenizer_config.json"):
        tokenizer.load(folder)
    write(tmp_path, content)
    assert ids(tokenizer.encoder(tokenizer.load(folder))) == ids(tokenizer_file.for_data(core(content)))


def core(content: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(content))


def test_a_class_that_is_not_named_is_the_models_and_may_be_wrong(tmp_path: Path, content: dict[str, Any]) -> None:
    folder = write(tmp_path, content, {"eos_token": "<|endoftext|>"}, **{"config.json": {"model_type": "qwen2"}})
    with pytest.raises(InputError, match=r"its class Qwen2Tokenizer and its tokenizer.json disagree"):
        tokenizer.load(folder)
    write(tmp_path, content)  # Transformers 5 takes Qwen2Tokenizer all the same
    loaded = tokenizer.load(folder)
    assert ids(tokenizer.encoder(loaded)) == ids(tokenizer_file.for_data(core(content)))
    assert tokenizer_file.misread(folder, loaded) == "Qwen2Tokenizer"
    write(tmp_path, content, **{"config.json": {"model_type": "llama"}})
    assert tokenizer_file.misread(folder, loaded) is None


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "LlamaTokenizer", "RobertaTokenizer", "NoSuchTokenizer", "", None])
def test_a_class_that_agrees_with_its_file_is_taken(tmp_path: Path, content: dict[str, Any], name: str | None) -> None:
    assert tokenizer.load(write(tmp_path, content, PLAIN | {"tokenizer_class": name})).eos_token_id == 0


def changed(*path: str | int, to: object) -> Callable[[dict[str, Any]], object]:
    def change(content: dict[str, Any]) -> object:
        copy: Any = json.loads(json.dumps(content))
        place = copy
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to
        return copy

    return change


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "GPT2Tokenizer"])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda content: "", "tokenizer.json is damaged"),
        (lambda content: [1], "holds no settings but a list"),
        (lambda content: json.dumps(content)[:900], "tokenizer.json is damaged"),
        (lambda content: {}, "cannot read .Model missing"),
        (lambda content: content | {"model": []}, "cannot read .data did not match any variant of untagged enum"),
        (changed("version", to="9.0"), "of a version that the library tokenizers cannot read"),
        (changed("model", "type", to="Other"), "untagged enum"),
        (changed("model", "merges", to=[]), "entries are never used, because its tokenizer.json has no merges"),
        (changed("added_tokens", 0, "id", to=7), "'<|endoftext|>' has the id 0 when it is loaded, but 7 in its tok"),
        (changed("model", "vocab", "zqzq", to=7), "two entries have the id 7"),
        (changed("added_tokens", 0, "content", to="<|other|>"), "'<|other|>' has the id 320 when it is loaded, but 0"),
    ],
)
def test_a_damaged_file_is_one_line(
    tmp_path: Path, content: dict[str, Any], name: str, change: Callable[[dict[str, Any]], Any], expected: str
) -> None:
    folder = write(tmp_path, change(content), PLAIN | {"tokenizer_class": name})
    with pytest.raises(InputError) as caught:
        tokenizer.load(folder)
    assert expected.replace(" .", " (") in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"eos_token": "<|nowhere|>"}, "its end-of-text token '<|nowhere|>' is no entry of its tokenizer.json"),
        ({"eos_token": None}, "has no end-of-text token"),
        ({"eos_token": 5}, "cannot be loaded"),
        ({"added_tokens_decoder": {"7": {"content": "<|endoftext|>"}}}, "but 7 in its tokenizer_config.json"),
        ({"added_tokens_decoder": {"400": {"content": "<|hole|>"}}}, "but 400 in its tokenizer_config.json"),
        ({"added_tokens_decoder": [1]}, "cannot be loaded"),
        ({"tokenizer_class": ["a"]}, "cannot be loaded"),
    ],
)
def test_settings_that_contradict_the_file_are_refused(
    tmp_path: Path, content: dict[str, Any], settings: dict[str, Any], expected: str
) -> None:
    with pytest.raises(InputError) as caught:
        tokenizer.load(write(tmp_path, content, PLAIN | settings))
    assert expected in str(caught.value)


def test_an_entry_that_the_settings_add_is_taken(tmp_path: Path, content: dict[str, Any]) -> None:
    added = {"added_tokens_decoder": {"320": {"content": "<|im_end|>", "special": True}}, "eos_token": "<|im_end|>"}
    assert tokenizer.load(write(tmp_path, content, PLAIN | added)).eos_token_id == 320


@pytest.mark.parametrize(
    ("settings", "others", "expected"),
    [
        (None, {}, "has no tokenizer.json, and cannot be loaded"),
        (PLAIN, {}, "has no tokenizer.json, and cannot be loaded"),
        (PLAIN | {"tokenizer_class": "GPT2Tokenizer"}, {}, "makes no tokens of any text"),
        (None, {"config.json": {"model_type": "gpt2"}}, "makes no tokens of any text"),
        (PLAIN | {"tokenizer_class": "LlamaTokenizer"}, {"tokenizer.model": "x"}, "has no tokenizer.json"),
    ],
)
def test_a_folder_without_a_vocabulary_is_refused(
    tmp_path: Path, settings: object, others: dict[str, object], expected: str
) -> None:
    with pytest.raises(InputError, match=expected):
        tokenizer.load(write(tmp_path, None, settings, **others))


@pytest.mark.parametrize(
    "extra",
    [
        {"truncation": {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}},
        {
            "padding": {
                "strategy": {"Fixed": 64},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 1,
                "pad_type_id": 0,
                "pad_token": "!",
            }
        },
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
            }
        },
        {"dropout": 0.9},
    ],
)
def test_nothing_that_a_file_asks_for_cuts_or_adds_tokens(
    tmp_path: Path, content: dict[str, Any], extra: dict[str, Any]
) -> None:
    baked = json.loads(json.dumps(content))
    if "dropout" in extra:
        baked["model"] |= extra
    else:
        baked |= extra
    loaded = tokenizer.load(write(tmp_path, baked))
    words = text(60, 3)
    [[found]] = tokenizer.encode_batches(tokenizer.encoder(loaded), [[words]])
    assert found.tolist() == core(content).encode(words, add_special_tokens=False).ids
