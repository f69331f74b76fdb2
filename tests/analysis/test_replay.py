"""A step of a run, again: the logged loss to the bit, what it read, and what it would have been with other settings."""

import functools
import hashlib
import json
import random
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import several
from tests.support.runs import Command, arguments_for, events
from train_loop import job
from train_loop.analysis import inspection
from train_loop.config.load import config_from_arguments
from train_loop.data import preparation

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)> & \x1b[31mred\x1b]0;title\x07 \u202eabc"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """The corpus, and documents that try to be something else than text."""
    folder = tmp_path_factory.mktemp("texts")
    for path in corpus.glob("*.txt"):
        shutil.copy(path, folder)
    for number in range(8):
        (folder / f"<b>{number}&.txt").write_text(HOSTILE * 3, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, texts: Path, tokenizer_folder: Path) -> Path:
    """Three epochs with dropout, two micro-batches a step, checkpoints every 50 steps."""
    from tests.support.runs import forget_accelerator
    from train_loop.cli import main

    folder = tmp_path_factory.mktemp("replayed") / "run"
    changes = {"train__epochs": 3, "checkpoint__every": 50, "checkpoint__keep": 99, "sample__prompts": "[]"}
    changes |= {"evaluation__every": 10**6}
    changes |= {"batch__sequences_per_step": 4, "batch__micro_batch_size": 3, "optimizer__max_grad_norm": 0.8}
    changes |= {"optimizer__learning_rate": 3e-3, "schedule__warmup_steps": 10}
    assert main(["train", *arguments_for(texts, tokenizer_folder, folder, **changes)]) == 0
    forget_accelerator()
    return folder


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file of a folder: its checksum, and when it was changed."""
    return {
        str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def inspected(command: Command, *arguments: object) -> list[dict[str, Any]]:
    """What `inspect --json` prints."""
    assert command("inspect", *arguments, "--json") == 0, command.err
    return [json.loads(line) for line in command.out.splitlines()]


def test_ten_random_steps_have_the_logged_losses_to_the_bit(run: Path) -> None:
    steps, before = events(run, "step"), contents(run)
    assert len(steps) > 120 and {path.name for path in (run / "checkpoints").iterdir()} >= {
        "step-00000050",
        "step-00000100",
    }
    drawn = random.Random(0).sample(range(1, len(steps) + 1), 10)
    replay = job.replay(run, drawn)
    assert {(step - 1) // 50 for step in drawn} >= {0, 1, 2}
    for step in drawn:  # in no order, so that some go back
        found, logged = replay.step(step), steps[step - 1]
        assert found["verification"] == {"verdict": "bits", "logged": logged["loss"], "difference": 0.0, "kind": []}
        for name in ("loss", "learning_rate", "grad_norm", "epoch"):
            assert found[name] == logged[name], name
        assert found["targets"] == logged["tokens"] and found["from_step"] == (step - 1) // 50 * 50
        losses = [loss for each in found["sequences"] for loss in each["losses"] if loss is not None]
        assert len(losses) == logged["tokens"]
        assert sum(losses) / len(losses) == pytest.approx(logged["loss"], rel=1e-6)  # with the same dropout
        assert found["loss_before"] != found["loss"]
        assert found["surprising"][0]["loss"] == max(losses)
    assert contents(run) == before


def test_a_step_is_told_where_its_text_comes_from(command: Command, run: Path, texts: Path) -> None:
    """Names and offsets lead back to the tokens of the documents themselves."""
    (found,) = inspected(command, "--run", run, "--step", 7)
    prepared = preparation.prepare(config_from_arguments(["--config", str(run / "config.yaml")]), shown=False)
    tokenizer = prepared.tokenizer
    assert len(found["sequences"]) == 4
    seen = set()
    for sequence in found["sequences"]:
        parts = []
        for document in sequence["documents"]:
            path = Path(document["name"])
            path = path if path.exists() else texts / path.name
            ids = [*tokenizer.backend_tokenizer.encode(path.read_text(encoding="utf-8")).ids, tokenizer.eos_token_id]
            parts += ids[document["offset"] : document["offset"] + document["tokens"]]
            seen.add(document["offset"] > 0)
        assert tokenizer.decode(parts) == "".join(sequence["tokens"]) and len(parts) == len(sequence["tokens"])
    assert seen == {True, False}
    assert found["statistics"]["layers"]["1"]["grad_norm"] > 0


def test_a_table_for_people(command: Command, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command("inspect", "--run", run, "--step", 60) == 0
    logged = events(run, "step")[59]
    assert f"the replayed loss equals the logged one bit for bit, {logged['loss']}" in command.out
    assert "replayed from" in command.out and "step 50" in command.out and "layer 1" in command.out
    assert "\x1b" not in command.out and "\u202e" not in command.out and "\x07" not in command.out
    (found,) = inspected(command, "--run", run, "--step", 60)
    assert "".join(found["sequences"][0]["tokens"][:4]).strip()[:3] in inspection.lines([found], colour=False)
    coloured = inspection.lines([found], colour=True)
    assert coloured.count("\x1b[48;5;") > 50
    # Every escape is one of ours: what the text has of them is shown by its code.
    for piece in coloured.split("\x1b")[1:]:
        assert piece.startswith(("[48;5;", "[0m"))
    assert "\\u001b" in "".join(
        inspection.lines([job.replay(run, [step]).step(step)], colour=True) for step in (1, 2, 3)
    )


def test_two_steps_beside_each_other(command: Command, run: Path) -> None:
    found = inspected(command, "--run", run, "--step", 53, "--compare", 4)
    steps = events(run, "step")
    assert [each["step"] for each in found] == [53, 4]
    assert [each["loss"] for each in found] == [steps[52]["loss"], steps[3]["loss"]]
    assert [each["from_step"] for each in found] == [50, 0]
    assert command("inspect", "--run", run, "--step", 53, "--compare", 4) == 0
    first = command.out.splitlines()[0].split()
    assert first == ["step", "53", "4"] and command.out.count("bit for bit") == 2


def test_what_a_step_would_have_been(command: Command, run: Path) -> None:
    def other(*changes: str) -> tuple[dict[str, Any], dict[str, Any]]:
        options = [part for change in changes for part in ("--set", change)]
        was, would = inspected(command, "--run", run, "--step", 55, *options)
        assert was["verification"]["verdict"] == "bits" and would["verification"] is None
        assert would["set"] == list(changes)
        return was, would

    def ratios(found: dict[str, Any]) -> list[float]:
        return [each["update_ratio"] for each in found["statistics"]["layers"].values()]

    was, would = other("optimizer.learning_rate=6e-3")
    assert would["loss"] == was["loss"] and would["grad_norm"] == was["grad_norm"]
    assert would["learning_rate"] == 2 * was["learning_rate"]
    assert ratios(would) == pytest.approx([2 * each for each in ratios(was)], rel=1e-3)
    assert would["loss_after"] != was["loss_after"] and would["loss_before"] == was["loss_before"]
    was, would = other("dropout=0")
    assert would["loss"] == pytest.approx(was["loss_before"], rel=1e-6) and would["loss"] != was["loss"]
    was, would = other("optimizer.max_grad_norm=0.01", "optimizer.weight_decay=0")
    assert would["loss"] == was["loss"] and would["clipped"] and ratios(would) != ratios(was)
    was, would = other("model.architecture.attn_pdrop=0.5")
    assert would["loss"] != was["loss"] and would["loss_before"] == was["loss_before"]


class _Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_hostile_text_stays_text_on_a_page(command: Command, run: Path, tmp_path: Path) -> None:
    replay = job.replay(run, [])
    whole = "<script>alert(1)</script>"
    step = next(
        step
        for step in range(1, 59)
        if any(whole in "".join(each["tokens"]) for each in replay.step(step)["sequences"])
    )
    file = tmp_path / "page.html"
    assert command("inspect", "--run", run, "--step", step, "--html", file) == 0
    page = _Page()
    page.feed(file.read_text(encoding="utf-8"))
    assert not {"script", "img", "b", "link"} & set(page.tags)
    assert not {name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")}
    assert whole in page.text and "<b>" in page.text
    assert not {"\x1b", "\x07", "\u202e"} & set(page.text)
    assert "prefers-color-scheme: dark" in page.text and "http" not in page.text and "bit for bit" in page.text


def test_mistakes(command: Command, run: Path, tmp_path: Path) -> None:
    steps = len(events(run, "step"))
    for arguments, message in (
        (["--run", tmp_path, "--step", 1], "holds no run"),
        (["--run", run, "--step", 0], f"has steps 1 to {steps}"),
        (["--run", run, "--step", steps + 1], f"has steps 1 to {steps}"),
        (["--run", run, "--step", 1, "--compare", 999], f"has steps 1 to {steps}"),
        (["--run", run, "--step", "x"], "invalid int value"),
        (["--run", run, "--step", 1, "--compare", 2, "--set", "dropout=0"], "give only one of them"),
        (["--run", run, "--step", 1, "--set", "optimizer.learning_rat=1"], "did you mean"),
        (["--run", run, "--step", 1, "--set", "optimizer.learning_rate"], "section.key=value"),
        (["--run", run, "--step", 1, "--set", "data.block_size=8"], "another run"),
        (["--run", run, "--step", 1, "--set", "dropout=0.5"], "turned off"),
        (["--run", run, "--step", 1, "--set", "model.architecture.n_embd=64"], "another model"),
        (["--run", run, "--step", 1, "--html", tmp_path / "no" / "page.html"], "cannot be written"),
        (["--step", 1], "required: --run"),
    ):
        assert command("inspect", *arguments) == 2, arguments
        assert message in command.err.splitlines()[-1], (arguments, command.err)
        assert "Traceback" not in command.err and not command.out


def test_damage_is_named(command: Command, run: Path, tmp_path: Path, texts: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    weights = next((copy / "checkpoints" / "step-00000100").glob("model-*"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert command("inspect", "--run", copy, "--step", 103, "--json") == 0  # from the one before
    assert "step-00000100" in command.err and "its checksum differs" in command.err
    found = json.loads(command.out)
    assert found["from_step"] == 50 and found["verification"]["verdict"] == "bits"
    shutil.rmtree(copy / "checkpoints" / "step-00000050")
    assert command("inspect", "--run", copy, "--step", 103) == 2
    assert "no checkpoint before step 103 is whole" in command.err.splitlines()[-1]
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    changed = [json.loads(line) for line in lines]
    for event in changed:
        event["loss"] = event["loss"] * 1.001
    (copy / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in changed))
    assert command("inspect", "--run", copy, "--step", 3) == 1
    assert "THE REPLAYED LOSS IS NOT THE LOGGED ONE" in command.out
    other = tmp_path / "texts"
    shutil.copytree(texts, other)
    (other / "39.txt").write_text("something else", encoding="utf-8")
    settings = (copy / "config.yaml").read_text().replace(str(texts), str(other))
    (copy / "config.yaml").write_text(settings)
    assert command("inspect", "--run", copy, "--step", 3) == 2
    assert "was trained on other data" in command.err.splitlines()[-1]


def test_a_damaged_run_is_replayed_from_what_is_left(command: Command, run: Path, tmp_path: Path) -> None:
    """The settings, the data's fingerprint and the micro-batches' size also stand in checkpoints."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    log = copy / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([lines[0], lines[1][:30], "\n[]\n", *lines[3:]]))
    for name, content in (("truth.json", "[]"), ("ledger.json", '{"fingerprint": NaN}'), ("config.yaml", "a: [1")):
        (copy / name).write_text(content)
    (found,) = inspected(command, "--run", copy, "--step", 60)
    assert found["verification"]["verdict"] == "bits" and found["from_step"] == 50
    for said in (
        "metrics.jsonl: lines 2 to 3 can't be read",
        "truth.json: missing",
        "ledger.json: missing",
        "not valid",
    ):
        assert said in command.err, said
    (found,) = inspected(command, "--run", copy, "--step", 2)  # lost from the log
    assert found["verification"] is None and found["loss"] == json.loads(lines[1])["loss"]
    assert "has no line for step 2, so there is no loss to compare with" in command.err
    log.unlink()
    last = max(int(path.name.removeprefix("step-")) for path in (copy / "checkpoints").iterdir())
    for step in (0, -1, last + 1):
        assert command("inspect", "--run", copy, "--step", step) == 2
        assert f"has steps 1 to {last}" in command.err and command.err.count("\n") == 1
    shutil.rmtree(copy / "checkpoints")
    assert command("inspect", "--run", copy, "--step", 1) == 2 and "no step yet" in command.err
    log.write_text("".join(lines))
    assert command("inspect", "--run", copy, "--step", 1) == 2
    assert "neither its files nor a checkpoint say its fingerprint" in command.err.splitlines()[-1]


def test_a_step_that_is_not_finite_is_shown(run: Path) -> None:
    found = {"step": 2, "from_step": 0, "sequences": [], "surprising": [], "statistics": None, "taken": False}
    found |= dict.fromkeys(("loss", "learning_rate", "grad_norm", "loss_before", "loss_after"))
    found |= {"targets": 3, "clipped": False}
    found["verification"] = {"verdict": "bits", "logged": None, "difference": None, "kind": []}
    assert "neither the replayed loss nor the logged one is finite" in inspection.lines([found], colour=False)
    assert "neither the replayed loss" in inspection.page([found], "title")


def test_a_page_without_a_place_is_refused_before_the_replay(command: Command, run: Path, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "no" / "page.html"):
        assert command("inspect", "--run", run, "--step", 1, "--html", place) == 2
        assert f"--html {place}: cannot be written" in command.err and command.err.count("\n") == 1
        assert command.out == ""


@pytest.mark.slow
def test_a_run_on_two_processes_is_replayed_on_one(
    command: Command, tmp_path: Path, corpus: Path, tokenizer_folder: Path
) -> None:
    make = functools.partial(arguments_for, corpus, tokenizer_folder)
    common = {"batch__sequences_per_step": 6, "batch__micro_batch_size": 2, "checkpoint__every": 20}
    common |= {"checkpoint__keep": 9, "sample__prompts": "[]", "optimizer__learning_rate": 1e-3}
    worlds = {"ddp": {}, "bitwise": {"run__reproducible": "bitwise"}}
    ran = several(2, [["train", *make(tmp_path / name, **common | changes)] for name, changes in worlds.items()])
    ran += several(2, [["train", *make(tmp_path / "fsdp2", **common)]], fsdp2=True)
    assert [each.code for each in ran] == [0, 0, 0], ran
    for name in ("ddp", "fsdp2", "bitwise"):
        for step in (1, 13, 38, 62):
            (found,) = inspected(command, "--run", tmp_path / name, "--step", step)
            verification = found["verification"]
            assert verification["difference"] <= 1e-5 and verification["logged"] == pytest.approx(found["loss"], 1e-5)
            if name == "bitwise":
                assert verification["verdict"] == "bits" and verification["kind"] == []
            else:
                assert verification["verdict"] in ("bits", "rounding") and verification["kind"] == ["2 processes"]
