"""Trust: whatever a folder asks for, no code of it runs, and nobody is asked whether it may."""

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train_loop
from tests.support.runs import Command, configured
from train_loop.checkpoint import pretrained
from train_loop.data import tokenizer
from train_loop.errors import InputError
from train_loop.models import building, loading

CODE = (
    "from pathlib import Path\nPath({marker!r}).touch()\nclass Own:\n    pass\ndef generate(*args, **keys):\n    pass\n"
)


@pytest.fixture
def strange(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder with code in it that leaves a mark where it runs; whoever is asked says yes."""
    folder = Path(shutil.copytree(model_folder, tmp_path / "strange"))
    for name in ("configuration_own.py", "modeling_own.py", "tokenization_own.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(CODE.format(marker=str(tmp_path / "marker")))
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n" * 20))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    return folder


def write(folder: Path, file: str, **settings: Any) -> None:
    path = folder / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | settings))


MODEL_CODE = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
TOKENIZER_CODE = {"AutoTokenizer": ["tokenization_own.Own", None]}


def needs_code(folder: Path) -> None:
    write(folder, "config.json", model_type="own", auto_map=MODEL_CODE)


def code_elsewhere(folder: Path) -> None:
    write(folder, "config.json", model_type="own", auto_map={"AutoConfig": f"{folder}--configuration_own.Own"})


def kernel(folder: Path) -> None:
    write(folder, "config.json", attn_implementation="somebody/kernel")


def kernel_of_a_part(folder: Path) -> None:
    write(folder, "config.json", text_config={"_attn_implementation": {"": "somebody/kernel:forward"}})


def adapter(folder: Path) -> None:
    write(folder, "adapter_config.json", base_model_name_or_path="somebody/base", auto_mapping=MODEL_CODE)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def pickled_by_name(folder: Path) -> None:
    torch.save({}, folder / "adapter_model.bin")
    write(folder, "config.json", transformers_weights="adapter_model.bin")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (needs_code, "needs code of its own (configuration_own.Own, modeling_own.Own in config.json)"),
        (code_elsewhere, "needs code of its own"),
        (kernel, "asks for code from the Hub (attn_implementation: somebody/kernel)"),
        (kernel_of_a_part, "asks for code from the Hub (_attn_implementation: somebody/kernel:forward)"),
        (adapter, "brings an adapter (adapter_config.json), which would change the model; merge it into its base"),
        (pickled, "cannot be loaded from safetensors"),
        (pickled_by_name, "config.json names adapter_model.bin as its weights"),
    ],
)
def test_a_model_that_needs_code_is_refused(
    strange: Path, change: Callable[[Path], None], expected: str, command: Command, tmp_path: Path
) -> None:
    change(strange)
    for arguments in (
        ("sample", "--model", strange, "--prompt", "the"),
        ("evaluate", "--model", strange, "--data.source", "stdlib", "--model.name_or_path", strange),
    ):
        assert command(*arguments) == 2
        assert command.err.count("\n") == 1 and expected in command.err, command.err
    with pytest.raises(InputError, match=r"^[^\n]*$"):
        train_loop.Sampler.load(str(strange))
    assert not (tmp_path / "marker").exists()


def test_code_beside_a_known_model_is_left_alone_and_said(
    strange: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(strange, "config.json", auto_map=MODEL_CODE)
    write(strange, "tokenizer_config.json", auto_map=TOKENIZER_CODE)
    built = building.build(configured(name_or_path=str(strange)), tokenizer.load(str(strange)))
    built.save_pretrained(tmp_path / "again")
    said = capsys.readouterr().err
    code = "configuration_own.Own, modeling_own.Own, custom_generate/generate.py"
    assert f"brings code of its own ({code}), which is not run" in said
    assert "auto_map" not in (tmp_path / "again" / "config.json").read_text()
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("code", [TOKENIZER_CODE, TOKENIZER_CODE["AutoTokenizer"]])
def test_a_tokenizer_that_needs_code_is_refused(strange: Path, tmp_path: Path, code: object) -> None:
    write(strange, "tokenizer_config.json", tokenizer_class="Own", auto_map=code)
    with pytest.raises(InputError, match=r"^tokenizer [^\n]*needs code of its own \(tokenization_own.Own in"):
        tokenizer.load(str(strange))
    assert not (tmp_path / "marker").exists()


def test_a_tokenizer_may_lie_beside_a_model_that_needs_code(strange: Path, tmp_path: Path) -> None:
    needs_code(strange)
    assert len(tokenizer.load(str(strange))) == 320
    assert not (tmp_path / "marker").exists()


def test_a_file_is_no_folder(model_folder: Path) -> None:
    with pytest.raises(InputError, match="is a file; name the folder that holds it"):
        loading.load(str(model_folder / "model.safetensors"))


def test_a_repository_in_the_hub_s_cache_is_like_a_folder(strange: Path, tmp_path: Path) -> None:
    place = Path(os.environ["HF_HOME"], "hub", f"models--{tmp_path.name}--strange")
    blobs, commit = place / "blobs", "0" * 40
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)

    def publish() -> None:  # the files are links out of their folder
        shutil.rmtree(place / "snapshots", ignore_errors=True)
        for file in (path for path in strange.rglob("*") if path.is_file()):
            link = place / "snapshots" / commit / file.relative_to(strange)
            link.parent.mkdir(parents=True, exist_ok=True)
            blobs.mkdir(exist_ok=True)
            link.symlink_to(shutil.copy(file, blobs / file.name))

    publish()
    name = f"{tmp_path.name}/strange"
    model, _ = pretrained.load(name)
    assert torch.equal(model.lm_head.weight, loading.load(str(strange)).lm_head.weight)
    needs_code(strange)
    publish()
    with pytest.raises(InputError, match=f"model {name}: needs code of its own"):
        pretrained.load(name)
    assert not (tmp_path / "marker").exists()


def test_a_data_set_with_a_script_is_refused(strange: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "rows").mkdir()
    shutil.copy(strange / "modeling_own.py", tmp_path / "rows" / "rows.py")
    for name in (tmp_path / "rows", tmp_path / "rows" / "rows.py"):
        given = ("--model.architecture.model_type", "gpt2", "--tokenizer.train_vocab_size", "300")
        assert command("prepare", "--data.source", "hub", "--data.name", name, *given) == 2
        assert command.err.count("\n") == 1, command.err
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_pointer_in_place_of_any_file_is_named(model_folder: Path, tmp_path: Path, file: str) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "cloned"))
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    for load in (tokenizer.load, lambda name: loading.load(name)):
        with pytest.raises(InputError, match=rf"{file} is a Git LFS pointer.*git lfs pull"):
            load(str(folder))
