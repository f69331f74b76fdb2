"""The loop in one file computes what the package computes: the same losses, evaluations and texts.

The models are so small that none of their tensors has 8,192 numbers: there the package leaves dropout to torch, as the
file does, so it is on.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from scripts import one_file_loop
from tests.support.launch import ON_CPU, ROOT, environment, free_port, several
from tests.support.runs import TINY_MODELS, Command, events, forget_accelerator, text

SCRIPT = ROOT / "scripts" / "one_file_loop.py"
# Only for the package: what is left out of the file.
ONLY_THE_PACKAGE = ("--export.verify", "false")


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve texts to train on, four to validate on."""
    folder = tmp_path_factory.mktemp("documents")
    for number in range(16):
        words = text(5 + 9 * number, number)
        if number == 3:  # line ends and special tokens are text like any other
            words = f"\ufeffna\u00efve\r\n<|endoftext|> {words}\n"
        side = folder / ("train" if number % 4 else "validation")
        side.mkdir(exist_ok=True)
        (side / f"{number:02d}.txt").write_bytes(words.encode())
    return folder


def write_config(documents: Path, tokenizer: Path, folder: Path, **sections: dict[str, Any]) -> Path:
    """A configuration for both: three micro-batches a step, of which the last is short, as is an epoch's last step."""
    config: dict[str, dict[str, Any]] = {
        "run": {"seed": 3},
        "tokenizer": {"name_or_path": str(tokenizer)},
        "data": {"source": "files", "block_size": 32}
        | {"files": [f"{documents}/train/*.txt"], "validation_files": [f"{documents}/validation/*.txt"]},
        "batch": {"sequences_per_step": 7, "micro_batch_size": 3},
        "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.5, "max_grad_norm": 0.9},
        "train": {"max_steps": 24},
        "sample": {"prompts": ["the ", ""], "max_new_tokens": 20},
    }
    for section, keys in sections.items():
        config[section] = config.get(section, {}) | keys
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(params=["gpt2", "llama"])
def config(
    request: pytest.FixtureRequest, documents: Path, tokenizer_folder: Path, model_folder: Path, tmp_path: Path
) -> Path:
    """A GPT-2 from a folder, with dropout, and a Llama from scratch."""
    if request.param == "gpt2":
        return write_config(documents, model_folder, tmp_path, model={"name_or_path": str(model_folder)})
    schedule = {"name": "cosine", "warmup_steps": 5}
    model = {"architecture": TINY_MODELS["llama"]}
    more = {"evaluation": {"every": 10, "batch_size": 2}, "sample": {"prompts": ["the "], "temperature": 0}}
    return write_config(documents, tokenizer_folder, tmp_path, model=model, schedule=schedule, **more)


def launched(*command: object) -> str:
    """What a command prints on two processes."""
    launcher = ["--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port())]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launcher, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=environment(ON_CPU),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def of_kind(kind: str, printed: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == kind]


def compare(run: Path, printed: str, processes: int) -> None:
    """The package's run and what the file printed: relative differences of all losses, and equal texts."""
    for kind, number, allowed in (("step", "loss", 1e-6), ("step", "grad_norm", 1e-5), ("evaluation", "loss", 1e-7)):
        theirs, ours = events(run, kind), of_kind(kind, printed)
        assert [event["step"] for event in ours] == [event["step"] for event in theirs]
        pairs = [(a[number], b[number]) for a, b in zip(theirs, ours, strict=True)]
        furthest = max(abs(a - b) / abs(a) for a, b in pairs)
        print(f"{processes} processes, {kind} {number}: {pairs[-1]} at the end, at most {furthest:.1e} apart")
        assert furthest < allowed, (kind, number, pairs)
    assert {event["processes"] for event in of_kind("step", printed)} == {processes}
    theirs, ours = events(run, "sample"), of_kind("sample", printed)
    assert [event["continuation"] for event in ours] == [event["continuation"] for event in theirs]


def test_on_one_process(config: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    assert command("train", "--config", config, "--run.output_dir", run, *ONLY_THE_PACKAGE) == 0
    forget_accelerator()
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--config", str(config)])
    one_file_loop.main()
    printed = command.capsys.readouterr().out
    compare(run, printed, 1)
    # It means the same by every setting that is not given.
    given, resolved = yaml.safe_load(config.read_text()), yaml.safe_load((run / "config.yaml").read_text())
    for section, keys in one_file_loop.SETTINGS.items():
        left_out = keys.keys() - given.get(section, {}).keys() - {"output_dir"}
        assert {key: keys[key] for key in left_out} == {key: resolved[section][key] for key in left_out}


@pytest.mark.parametrize("config", ["gpt2"], indirect=True)
def test_on_two_processes(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (package,) = several(2, [["train", "--config", str(config), "--run.output_dir", str(run), *ONLY_THE_PACKAGE]])
    assert package.codes == [0, 0], package.err
    compare(run, launched(SCRIPT, "--config", config), 2)


def test_it_is_short_and_stands_alone() -> None:
    source = SCRIPT.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 200
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).partition(".")[0])
    assert imported - sys.stdlib_module_names == {"torch", "yaml", "accelerate", "transformers"}


@pytest.mark.parametrize(("k", "p"), [(0, 1.0), (1, 1.0), (5, 1.0), (0, 0.6), (0, 1e-6), (20, 0.9), (99, 0.5)])
@pytest.mark.parametrize("kind", ["random", "tied", "peaked", "flat"])
def test_its_filter_is_that_of_transformers(kind: str, k: int, p: float) -> None:
    random = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    kinds = {"random": random, "tied": (random * 2).round(), "peaked": random * 50, "flat": random * 0}
    warpers: list[Any] = [*([TopKLogitsWarper(k)] if k else []), TopPLogitsWarper(p)]
    expected = LogitsProcessorList(warpers)(torch.zeros(8, 1, dtype=torch.int64), kinds[kind])
    assert torch.equal(one_file_loop.keep_likeliest(kinds[kind], k, p), expected)


def test_what_only_the_package_has_is_refused(tmp_path: Path) -> None:
    for section, key, value in (("run", "mixed_precision", "bf16"), ("data", "source", "hub"), ("study", "every", 5)):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({section: {key: value}}))
        with pytest.raises(SystemExit, match=rf"^{path}: {section}.{key} {value}: only the whole package has this$"):
            one_file_loop.read_settings(str(path))
