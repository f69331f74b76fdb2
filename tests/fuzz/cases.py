"""Cases: each is a command in a folder of its own, made from a kind and a seed.

A case starts from what works (`base`: settings, documents, a trained run) and changes a little of it, so that it gets
past the first check.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.runs import text
from train_loop.config.parsing import keys
from train_loop.config.sampling import Sampling
from train_loop.config.schema import Config

Draw = random.Random
Case = list[str]  # the arguments of `train-loop`

SETTINGS = """\
run: {seed: 1, output_dir: run}
model:
  architecture: {model_type: gpt2, n_layer: 1, n_embd: 16, n_head: 2}
tokenizer:
  train_vocab_size: 280
data:
  source: files
  files: ["corpus/*.txt"]
  test_size: 0.2
  block_size: 16
batch: {sequences_per_step: 4, micro_batch_size: 2}
optimizer:
  learning_rate: 1e-2
  betas: [0.9, 0.95]
schedule: {name: cosine, warmup_steps: 1}
train: {max_steps: 3}
evaluation: {every: 2}
sample: {prompts: ["the"], max_new_tokens: 4}
checkpoint: {every: 2}
export: {verify: false}
"""
# No path here leads out of the case's folder to anything that exists: a case may be written to, also by root.
WORDS = (
    *(
        "",
        "0",
        "-1",
        "1",
        "2",
        "-0",
        "0.5",
        "1e-300",
        "1e400",
        "1e20",
        "nan",
        ".nan",
        ".inf",
        "-.inf",
        "1_0",
        "010",
        "0x10",
    ),
    *(
        str(10**20),
        "9" * 5000,
        "null",
        "~",
        "true",
        "no",
        "auto",
        "epoch",
        "x",
        " ",
        "\t",
        "'",
        '"',
        "[",
        "{",
        "[]",
        "{}",
    ),
    *(
        "[1, 1]",
        "[[[]]]",
        "{a: {b: 1}}",
        "!!python/name:os.system",
        "!x",
        "&a [*a]",
        "*a",
        "- ",
        "? ",
        "<<",
        "|",
        "%",
        "@",
    ),
    *(
        "/dev/null/x",
        "~",
        "~x/y",
        "$HOME",
        "$NO/x",
        "a" * 300,
    ),
    *(
        "caf\xe9",
        "\u2028",
        "\ufeff",
        "\x1b[2J",
        "gpt2",
        "a/b",
        "a/b/c",
        "./no",
        "fp16",
        "bf16",
        "fp8",
        "llama",
        "bert",
        "mamba",
    ),
    *(
        "stdlib",
        "hub",
        "files",
        "corpus",
        "corpus/0.txt",
        "*",
        "**",
        "[",
        "run",
        "run/model",
        "config.yaml",
        "--",
        "--help",
        "-h",
        "-1",
    ),
)
SETTING_NAMES = [name for name, _ in keys(Config)]
# What would take long without being wrong, and what is on a network or a device.
TOO_LONG = (
    "preflight_timeout",
    "timeout_seconds",
    "num_workers",
    "push_to_hub",
    "verify",
    "log_with",
    "compile",
    "stdlib",
)


def prepared(base: Path) -> None:
    """Write what the cases start from, other than the run."""
    (base / "corpus").mkdir(parents=True)
    for number in range(8):
        (base / "corpus" / f"{number}.txt").write_text(text(60, number))
    (base / "settings.yaml").write_text(SETTINGS)


def configuration(draw: Draw, base: Path, folder: Path) -> Case:
    """A file of settings, changed in one to three places."""
    shutil.copytree(base / "corpus", folder / "corpus")
    content = SETTINGS.encode()
    for _ in range(draw.randint(1, 3)):
        lines = content.split(b"\n")
        place = draw.randrange(len(lines))
        match draw.randrange(6):
            case 0:
                content = flipped(draw, content)
            case 1:
                lines.insert(draw.randrange(len(lines)), lines[place])
                content = b"\n".join(lines)
            case 2:
                del lines[place]
                content = b"\n".join(lines)
            case 3:
                content = draw.choice([b"\xef\xbb\xbf", b"---\n", b"%YAML 1.1\n---\n", b"\0", b"\t", b"# \n"]) + content
            case _:
                key, colon, _ = lines[place].partition(b":")
                lines[place] = key + (colon or b":") + b" " + draw.choice(WORDS).encode()
                content = b"\n".join(lines)
    (folder / "c.yaml").write_bytes(content)
    end = ["--train.max_steps", "1"] if draw.random() < 0.8 else []
    return [draw.choice(["prepare", "train", "train"]), "--config", "c.yaml", *(end if b"max_steps" in content else [])]


def command_line(draw: Draw, base: Path, folder: Path) -> Case:
    """Any command, with odd options."""
    shutil.copytree(base, folder, dirs_exist_ok=True)
    sampling = [*Sampling.__dataclass_fields__, "model", "prompt", "prompts", "json", "batch_size", "interactive"]
    options: dict[str, list[str]] = {
        "train": SETTING_NAMES,
        "prepare": SETTING_NAMES,
        "evaluate": [*SETTING_NAMES, "model"],
        "sample": sampling,
        "inspect": ["run", "step", "compare", "set", "json", "html"],
        "report": ["run", "output", "png"],
    }
    usual: dict[str, list[str]] = {
        "train": ["--config", "settings.yaml"],
        "prepare": ["--config", "settings.yaml"],
        "evaluate": ["--config", "settings.yaml", "--model", "run/model"],
        "sample": ["--model", "run/model", "--prompt", "the", "--max_new_tokens", "2"],
        "inspect": ["--run", "run", "--step", "2"],
        "report": ["--run", "run"],
    }
    command = draw.choice([*options])
    names = [name for name in options[command] if not any(part in name for part in TOO_LONG)]
    given = list(usual[command])
    if draw.random() < 0.2:
        del given[draw.randrange(len(given))]
    for _ in range(draw.randint(1, 3)):
        name, value = draw.choice(names), draw.choice(WORDS)
        odd = draw.choice([[f"--{name}", value], [f"--{name}", value], [f"--{name}={value}"], [f"--{name}"], [value]])
        place = draw.randrange(len(given) + 1)
        given[place:place] = odd
    return [part.replace("\0", "") for part in (command if draw.random() < 0.97 else draw.choice(WORDS), *given)]


def data(draw: Draw, base: Path, folder: Path) -> Case:
    """A file of documents, damaged."""
    rows = [{"text": text(40, number), "id": number, "inner": {"text": text(20, number)}} for number in range(12)]
    suffix = draw.choice([".txt", ".jsonl", ".json", ".csv", ".parquet", ".odd"])
    match suffix:
        case ".jsonl":
            content = "".join(
                json.dumps(changed(draw, row) if draw.random() < 0.1 else row) + "\n" for row in rows
            ).encode()
        case ".json":
            content = json.dumps(changed(draw, rows), indent=draw.choice([None, 1])).encode()
        case ".csv":
            content = "".join(
                f'{row["id"]},"{row["text"]}"\r\n' for row in [{"id": "id", "text": "text"}, *rows]
            ).encode()
        case ".parquet":
            import pyarrow
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "made")
            content = (folder / "made").read_bytes()
        case _:
            content = "\n".join(row["text"] for row in rows).encode()
    for _ in range(draw.choice([0, 1, 1, 1, 3])):
        content = flipped(draw, content)
    (folder / f"d{suffix}").write_bytes(content)
    for number in range(6):
        (folder / f"more{number}.txt").write_text(text(60, number))
    fields = ["text", "text", "text", "id", "inner.text", "no", "", "inner", "text.x"]
    return [
        *("prepare", "--model.architecture", "{model_type: gpt2}", "--tokenizer.train_vocab_size", "270"),
        *("--data.source", "files", "--data.files", f"[d{suffix}, 'more*.txt']", "--data.block_size", "8"),
        *("--data.text_field", draw.choice(fields)),
    ]


def model_folder(draw: Draw, base: Path, folder: Path) -> Case:
    """A model's folder, damaged."""
    shutil.copytree(base / "run" / "model", folder / "model")
    for _ in range(draw.randint(1, 2)):
        damage(draw, folder / "model")
    shutil.copytree(base / "corpus", folder / "corpus")
    sample = ["sample", "--model", "model", "--prompt", "the of", "--max_new_tokens", "3"]
    (folder / "settings.yaml").write_text(SETTINGS)
    evaluate = ["evaluate", "--model", "model", "--config", "settings.yaml"]
    return draw.choice([sample, evaluate])


def run_folder(draw: Draw, base: Path, folder: Path) -> Case:
    """A run's folder, damaged."""
    for name in ("corpus", "run", "cache"):
        shutil.copytree(base / name, folder / name, symlinks=True)
    (folder / "settings.yaml").write_text(SETTINGS)
    for _ in range(draw.randint(1, 2)):
        damage(draw, folder / draw.choice(["run", "run", "run", "cache"]))
    return draw.choice(
        [
            ["train", "--config", "settings.yaml"],
            ["train", "--config", "settings.yaml"],
            ["report", "--run", "run"],
            ["inspect", "--run", "run", "--step", "2"],
            ["sample", "--model", "run", "--prompt", "the", "--max_new_tokens", "2"],
            ["evaluate", "--model", "run/checkpoints/step-00000002", "--config", "settings.yaml"],
        ]
    )


KINDS: dict[str, Callable[[Draw, Path, Path], Case]] = {
    each.__name__: each for each in (configuration, command_line, data, model_folder, run_folder)
}


def damage(draw: Draw, folder: Path) -> None:
    """Change one file somewhere below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        return
    path = draw.choice(files)
    match draw.randrange(8):
        case 0:
            path.unlink()
        case 1:
            path.unlink()
            path.mkdir()
        case 2:
            path.write_bytes(b"")
        case 3 | 4 if path.suffix == ".json":
            try:
                path.write_text(json.dumps(changed(draw, json.loads(path.read_text()))))
            except ValueError:  # damaged before
                path.unlink()
        case 5:
            path.write_bytes(draw.choice(files).read_bytes())
        case _:
            path.write_bytes(flipped(draw, path.read_bytes()))


def flipped(draw: Draw, content: bytes) -> bytes:
    """Bytes with a piece changed, cut out, repeated or put in."""
    start = draw.randrange(len(content) + 1)
    stop = min(len(content), start + draw.choice([1, 1, 2, 8, 64, 10**9]))
    piece = content[start:stop]
    new = [
        b"",
        piece * 2,
        draw.randbytes(len(piece[:64])),
        draw.choice(WORDS).encode(),
        b'"',
        b",",
        b"\0",
        b"\n",
        b"\xff",
    ]
    return content[:start] + draw.choice(new) + content[stop:]


def changed(draw: Draw, value: Any) -> Any:
    """JSON with one value somewhere in it replaced, removed or added."""
    odd: list[Any] = [
        None,
        True,
        -1,
        0,
        1,
        1.5,
        10**20,
        1e308,
        "",
        "x",
        [],
        {},
        [value],
        {"x": 1},
        "\ud800",
        float("nan"),
    ]
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(sorted(value))
        if draw.random() < 0.15:
            return {name: each for name, each in value.items() if name != key}
        if draw.random() < 0.1:
            return value | {draw.choice(["auto_map", "x", "quantization_config", "model_type"]): draw.choice(odd)}
        return value | {key: changed(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.85:
        place = draw.randrange(len(value))
        return [*value[:place], changed(draw, value[place]), *value[place + 1 :]]
    return draw.choice(odd)
