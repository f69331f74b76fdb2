"""Architectures: a model's own config.json, of whatever age, means here what it means to Transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from tests.support.runs import Command, configured
from train_loop.config.load import config_from_arguments, load_config
from train_loop.data import tokenizer
from train_loop.errors import InputError
from train_loop.models import architecture, building

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
# As they lie on the Hub, but smaller.
PASTED: dict[str, tuple[dict[str, Any], str]] = {
    "llama": (
        {"architectures": ["LlamaForCausalLM"], "bos_token_id": 128000, "eos_token_id": [128001, 128008], **_SMALL}
        | {"head_dim": 16, "max_position_embeddings": 131072, "pretraining_tp": 1, "num_key_value_heads": 1}
        | {"rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"}}
        | {"rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 400}
        | {"transformers_version": "4.45.0.dev0", "use_cache": True, "pad_token_id": None},
        "bos_token_id 128000, eos_token_id [128001, 128008] give way to the tokenizer's own ids; "
        "vocab_size 400 is kept, but the tokenizer has 320 entries",
    ),
    "mistral": (
        {"architectures": ["MistralForCausalLM"], "rope_scaling": None, "sliding_window": None, "torch_dtype": "auto"}
        | {"_name_or_path": "somebody/base", "num_key_value_heads": 1, "vocab_size": 320, **_SMALL},
        "",
    ),
    "gpt2": (
        {"architectures": ["GPT2LMHeadModel"], "n_ctx": 1024, "n_embd": 32, "n_head": 2, "n_layer": 2}
        | {"n_positions": 1024, "task_specific_params": {"text-generation": {"max_length": 50}}, "summary_type": "mean"}
        | {"resid_pdrop": 0.2, "temperature": 0.7, "vocab_size": 320},
        "gpt2 has no n_ctx, task_specific_params, temperature (left out)",
    ),
    "gpt_neox": (
        {"architectures": ["GPTNeoXForCausalLM"], "rotary_emb_base": 20000, "rotary_pct": 0.5, **_SMALL}
        | {"bos_token_id": 0, "eos_token_id": 0, "torch_dtype": "float16", "vocab_size": 320},
        "",
    ),
    "bloom": (
        {"architectures": ["BloomForCausalLM"], "n_embed": 32, "n_layer": 2, "num_attention_heads": 2}
        | {"bias_dropout_fusion": True, "seq_length": 2048, "vocab_size": 320},
        "bloom has no bias_dropout_fusion, seq_length (left out)",
    ),
    "gemma3_text": (
        {"architectures": ["Gemma3ForCausalLM"], "rope_local_base_freq": 7000, "rope_theta": 1000000, "head_dim": 16}
        | {"sliding_window_pattern": 2, "num_key_value_heads": 1, "vocab_size": 320, **_SMALL},
        "",
    ),
    "phi3": (
        {"architectures": ["Phi3ForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}}
        | {"quantization_config": {"quant_method": "awq"}, "pad_token_id": 32000, "vocab_size": 320, **_SMALL},
        "phi3 has no auto_map, quantization_config (left out); pad_token_id 32000 give way to the tokenizer's own ids",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PASTED)
def test_a_pasted_configuration_means_what_it_means_to_transformers(
    kind: str, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pasted, note = PASTED[kind]
    loaded = tokenizer.load(str(tokenizer_folder))
    built = building.build(configured({"model_type": kind} | pasted), loaded)
    said = capsys.readouterr().err
    assert said == (f"model.architecture: {note}\n" if note else "")
    ids = {"bos_token_id", "eos_token_id", "pad_token_id"}
    plain = {name: value for name, value in pasted.items() if name not in {"torch_dtype", "quantization_config", *ids}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind} | plain))
    expected, found = AutoConfig.from_pretrained(tmp_path).to_dict(), built.config.to_dict()
    left_out = {name for name in pasted if name not in found}
    other = {*ids, "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", *left_out}
    if "max_position_embeddings" not in pasted:
        other |= {"max_position_embeddings", "rope_parameters"} & ({"max_position_embeddings"} & expected.keys())
    assert {name: value for name, value in found.items() if name not in other} == {
        name: value for name, value in expected.items() if name not in other
    }
    assert built.config.eos_token_id == loaded.eos_token_id


def test_names_that_mean_something_are_known_wherever_they_stand(tokenizer_folder: Path) -> None:
    loaded = tokenizer.load(str(tokenizer_folder))
    llama = {"model_type": "llama", "rope_theta": 20000.0, "rope_scaling": None, "torch_dtype": "float16", **_SMALL}
    assert architecture.configuration(llama, loaded, 32).rope_parameters["rope_theta"] == 20000.0
    for name in ("n_ctx", "temperature", "auto_map"):  # written by hand, they are mistakes
        with pytest.raises(InputError, match=f"llama has no {name}; "):
            architecture.configuration(llama | {name: 1}, loaded, 32)
    with pytest.raises(InputError, match=r"asks for code from the Hub \(attn_implementation: some/kernel\)"):
        architecture.configuration(llama | {"attn_implementation": "some/kernel"}, loaded, 32)


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ({"model_type": "llama", "vocab_size": 10**10}, "its weights would take 163,8"),
        ({"model_type": "gpt2", "n_positions": 10**12}, "its weights would take 3,072,"),
        ({"model_type": "llama", "intermediate_size": 10**30}, "no such model can be built"),
        ({"model_type": "llama", "num_hidden_layers": 10**9}, "num_hidden_layers 1,000,000,000 is more than any"),
        ({"model_type": "llama", "num_hidden_layers": 10_001}, "num_hidden_layers 10,001 is more than any"),
        ({"model_type": "gpt2", "n_layer": 0}, "num_hidden_layers is 0; a model has at least 1"),
        ({"model_type": "gpt2", "n_layer": -2}, "num_hidden_layers is -2"),
        ({"model_type": "gpt2", "n_embd": 0}, "hidden_size is 0"),
        ({"model_type": "gpt2", "n_head": 0}, "no such model can be built"),
        ({"model_type": "llama", "vocab_size": -5}, "no such model can be built"),
        ({"model_type": "mixtral", "num_local_experts": 10**9}, "its weights would take"),
        ({"model_type": "gpt2", "num_labels": 10**10}, "num_labels 10,000,000,000 is more than any"),
    ],
)  # fmt: skip
def test_absurd_sizes_are_refused_before_anything_is_allocated(
    architecture: dict[str, Any], expected: str, tokenizer_folder: Path
) -> None:
    with pytest.raises(InputError, match=r"^model.architecture[^\n]*$") as error:
        building.build(configured(architecture), tokenizer.load(str(tokenizer_folder)))
    assert expected in str(error.value)
    assert len(str(error.value)) < 700


def test_the_number_of_weights_has_an_end(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train_loop.models.size._MOST_TENSORS", 50)
    deep = {"model_type": "llama", **_SMALL, "num_hidden_layers": 9000}
    with pytest.raises(InputError, match="would take more than 50 tensors"):
        building.build(configured(deep), tokenizer.load(str(tokenizer_folder)))


GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2}


def test_a_path_stands_for_the_fields_in_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    yaml = tmp_path / "run.yaml"
    yaml.write_text("model: {architecture: config.json}\ntokenizer: {train_vocab_size: 300}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HERE", str(tmp_path))
    assert load_config(yaml).model.architecture == GPT2
    changed = config_from_arguments(["--config", str(yaml), "--model.architecture.n_layer", "3"])
    assert changed.model.architecture == GPT2 | {"n_layer": 3}
    for path in ("config.json", str(tmp_path), "$HERE/config.json"):
        given = ["--model.architecture", path, "--tokenizer.train_vocab_size", "300"]
        assert config_from_arguments(given).model.architecture == GPT2
    given = ["--model.architecture", json.dumps(GPT2), "--tokenizer.train_vocab_size", "300"]
    assert config_from_arguments(given).model.architecture == GPT2


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such file; give a mapping with model_type in it, or the path of a config.json"),
        ("{", "cannot be read as JSON"),
        ("[]", "holds no mapping but a list"),
        ('{"model_type": "gpt2", "n_layer": 1, "n_layer": 2}', "n_layer is in it twice"),
        ("{}", "model_type is missing"),
    ],
)
def test_mistakes_in_a_file(content: str | None, expected: str, tmp_path: Path, command: Command) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    assert command("train", "--model.architecture", path, "--tokenizer.train_vocab_size", "300") == 2
    assert expected in command.err and command.err.count("\n") == 1
