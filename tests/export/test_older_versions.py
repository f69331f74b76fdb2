"""An exported folder is the same model for Transformers 4, which has other names for some settings."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.support.runs import TINY_MODELS, Command, text
from train_loop.data import tokenizer
from train_loop.export.older_versions import add_old_names

_SCALED = {
    "rope_type": "llama3",
    "rope_theta": 77.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_LAYERS = {
    "full_attention": {"rope_type": "default", "rope_theta": 99.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 77.0},
}


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}, {"rope_theta": 77.0}),
        ("llama", {"rope_parameters": _SCALED}, {"rope_theta": 77.0}),
        ("gemma3_text", {"rope_parameters": _LAYERS}, {"rope_theta": 99.0, "rope_local_base_freq": 77.0}),
        (
            "gpt_neox",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0, "partial_rotary_factor": 0.5}},
            {"rotary_emb_base": 77.0, "rotary_pct": 0.5},
        ),
        (
            "phi",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0, "partial_rotary_factor": 0.5}},
            {"rope_theta": 77.0, "partial_rotary_factor": 0.5},
        ),
        ("gpt2", {}, {}),
        # Of two kinds of layers with unlike rules: version 5 would not read them beside the old names.
        ("gemma4_text", {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}, {}),
    ],
)
def test_old_names_stand_beside_new_ones_which_mean_the_same(
    tmp_path: Path, kind: str, settings: dict[str, Any], expected: dict[str, Any]
) -> None:
    AutoConfig.for_model(kind, **settings).save_pretrained(tmp_path)
    before = AutoConfig.from_pretrained(tmp_path).to_dict()
    add_old_names(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert {name: written[name] for name in expected} == expected
    if settings.get("rope_parameters") is _SCALED:
        assert written["rope_scaling"] == {name: value for name, value in _SCALED.items() if name != "rope_theta"}
    else:
        assert "rope_scaling" not in written
    after = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert {name: after[name] for name in before} == before


def test_the_tokenizers_class_and_its_other_special_tokens(tokenizer_folder: Path, tmp_path: Path) -> None:
    loaded = tokenizer.load(str(tokenizer_folder))
    loaded.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    loaded.save_pretrained(tmp_path)
    add_old_names(tmp_path)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in written
    again = tokenizer.load(str(tmp_path))
    assert tokenizer.fingerprint(again) == tokenizer.fingerprint(loaded)
    assert AutoTokenizer.from_pretrained(tmp_path).all_special_tokens == loaded.all_special_tokens


_PROGRAM = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4.57"), transformers.__version__
found = []
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(sys.argv[1], return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
        greedy = model.generate(ids[:, :8], do_sample=False, max_new_tokens=12)[0].tolist()
    ends = model.generation_config.eos_token_id
    found.append([type(tokenizer).__name__, ids[0].tolist(), loss, greedy, ends])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def version_4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Transformers 4.57 and what it needs, but for torch."""
    folder = tmp_path_factory.mktemp("version-4")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--target", str(folder)]
    installed = subprocess.run([*pip, "transformers==4.57.*"], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"Transformers 4.57 cannot be installed: {installed.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.mark.slow
def test_transformers_4_reads_the_same_model(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, version_4: Path
) -> None:
    content, folders, expected = text(40, 7), [], []
    base = TINY_MODELS["llama"] | {"max_position_embeddings": 256}
    for number, architecture in enumerate(
        (
            TINY_MODELS["gpt2"] | {"n_positions": 256},
            base | {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
            base | {"rope_parameters": _SCALED},
            {"model_type": "gpt_neox"}
            | {k: v for k, v in base.items() if k not in ("model_type", "num_key_value_heads")},
            base
            | {"model_type": "qwen3", "head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
        )
    ):
        output = tmp_path / str(number)
        changes = {"model__architecture": json.dumps(architecture), "run__output_dir": output, "train__max_steps": 20}
        assert command("train", *settings(**changes)) == 0, command.err
        folder = output / "model"
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5]}), encoding="utf-8")
        model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
        ids = torch.tensor([tokenizer.load(str(folder))(content).input_ids])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss.item()
            greedy = model.generate(ids[:, :8], do_sample=False, max_new_tokens=12)[0].tolist()
        folders.append(str(folder))
        expected.append(["PreTrainedTokenizerFast", ids[0].tolist(), pytest.approx(loss, rel=1e-5), greedy, [0, 5]])
    found = subprocess.run(
        [sys.executable, "-c", _PROGRAM, content, *folders],
        env=os.environ | {"PYTHONPATH": str(version_4)},  # before what this environment has
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert json.loads(found.stdout.splitlines()[-1]) == expected
