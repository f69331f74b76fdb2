"""Texts from prompts, in Python and by command, from a model folder and from a run in progress."""

import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.conftest import Command
from train_loop.checkpoint import pretrained, storage
from train_loop.config.sampling import Sampling
from train_loop.data import tokenizer
from train_loop.errors import InputError
from train_loop.generation import sampler
from train_loop.generation.prompts import converse
from train_loop.generation.sampler import Sampler, Text
from train_loop.models import building

PROMPTS = ["the ü ", "of", "and to in is that", "a"]


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> Sampler:
    return Sampler.load(str(model_folder))


def texts(found: Any) -> list[list[str]]:
    return [[each.text for each in continuations] for continuations in found]


def test_two_lines_of_python(loaded: Sampler) -> None:
    text = loaded("the ", seed=2, max_new_tokens=40)
    assert text == texts(loaded.sample(["the "], Sampling(40, seed=2)))[0][0] and len(text) > 20


def test_streamed_text_is_the_text_and_the_mode_is_put_back(model_folder: Path) -> None:
    built, its_tokenizer = building.load(str(model_folder)), tokenizer.load(str(model_folder))
    built.train()
    mine = Sampler(built, its_tokenizer)
    stretches: list[str] = []
    text = texts(mine.sample(["the ü "], Sampling(40, seed=2), on_text=stretches.append))[0][0]
    assert "".join(stretches) == text and len(stretches) > 5
    assert text == mine("the ü ", max_new_tokens=40, seed=2)  # no dropout
    assert built.training


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_several_samples_of_several_prompts(loaded: Sampler, batch_size: int) -> None:
    sampling = Sampling(20, seed=4, samples=3)
    found = texts(loaded.sample(PROMPTS, sampling, batch_size))
    assert found == [texts(loaded.sample([prompt], sampling))[0] for prompt in PROMPTS]
    assert len({text for each in found for text in each}) == 12
    assert [each[0] for each in found] == [loaded(prompt, max_new_tokens=20, seed=4) for prompt in PROMPTS]


def test_a_model_without_positions_has_rows_of_one_length(
    model_folder: Path, loaded: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[set[int]] = []
    generate = sampler.generate

    def watched(feed: Any, prompts: Any, *rest: Any, **named: Any) -> Any:
        lengths.append({len(prompt) for prompt in prompts})
        return generate(feed, prompts, *rest, **named)

    monkeypatch.setattr(sampler, "generate", watched)
    monkeypatch.setattr(sampler, "takes_positions", lambda model: False)
    prompts = ["the ", "an ", "of", *PROMPTS]
    assert texts(loaded.sample(prompts, Sampling(9))) == [[loaded(prompt, max_new_tokens=9)] for prompt in prompts]
    assert all(len(each) == 1 for each in lengths)


def test_a_string_ends_the_text_and_is_no_part_of_it(loaded: Sampler) -> None:
    free = loaded("the ", seed=2, max_new_tokens=40)
    for stop in ((free[7:9],), (free[12], free[7:10], "never"), (free[:1],)):
        stretches: list[str] = []
        (found,) = next(loaded.sample(["the "], Sampling(40, seed=2, stop=stop), on_text=stretches.append))
        assert found.text == "".join(stretches) == free[: min(free.find(each) for each in stop if each in free)]
        assert found.generated.finish_reason == "stop"


class Characters:
    """Decodes each token as one byte of UTF-8."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(ids).decode(errors="replace")


@given(st.text(alphabet="abüあ", max_size=30), st.lists(st.text("abüあ", min_size=1, max_size=4), max_size=3))
@example("ab", ["b", "ab"])
def test_stretches_are_never_taken_back(text: str, stop: list[str]) -> None:
    cuts = [at for each in stop if (at := text.find(each)) >= 0]
    stretches: list[str] = []
    growing: Any = Text(Characters(), b"prompt \xc3\xbc", stop, stretches.append)  # type: ignore[arg-type]
    for token in text.encode():
        if growing.add(token):
            break
    ended = [at + len(each) for each in stop if (at := text.find(each)) >= 0]
    # The first to be complete ends the text; of those complete at once, the one that begins first.
    expected = min((end, at) for end, at in zip(ended, cuts, strict=True))[1] if cuts else len(text)
    assert growing.finish() == "".join(stretches) == text[:expected]
    assert all(stretches)


def test_text_is_what_the_tokenizer_makes_of_all_tokens(tokenizer_folder: Path) -> None:
    loaded = tokenizer.load(str(tokenizer_folder))
    whole = "naïve “quotes” 日本 🙂 end"
    prompt, rest = loaded.encode("the ü"), loaded.encode(whole)
    growing = Text(loaded, prompt)
    for token in rest:
        growing.add(token)
    assert growing.finish() == whole
    broken = Text(loaded, prompt)
    broken.add(rest[-9])
    broken.add(loaded.encode("🙂")[0])
    assert broken.finish().endswith("\ufffd")  # what never became a character


def test_an_empty_prompt_begins_a_text(model_folder: Path) -> None:
    built, loaded = building.load(str(model_folder)), tokenizer.load(str(model_folder))
    assert sampler.prompt_ids(loaded, "") == [loaded.bos_token_id]
    assert loaded.bos_token_id not in sampler.prompt_ids(loaded, "<|endoftext|>")
    loaded.bos_token = None
    with pytest.raises(InputError, match=r"^prompt: is empty, and the tokenizer has no token"):
        Sampler(built, loaded)("", max_new_tokens=5)
    with pytest.raises(InputError, match=r"^prompt 2 of 2: is empty"):
        Sampler(built, loaded).sample(["a", ""], Sampling(5))


# The command.


def test_prompts_from_a_file_and_standard_input(
    command: Command, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, objects = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("the \n\nof ü\n", encoding="utf-8")
    objects.write_text('{"prompt": "the "}\n{"prompt": "of ü", "id": 3}\n', encoding="utf-8")
    options = ["sample", "--model", model_folder, "--max_new_tokens", 8]
    assert command(*options, "--prompt", "the ", "--prompt", "of ü") == 0
    expected = command.out
    for more in (["--prompts", lines], ["--prompts", objects]):
        assert command(*options, *more) == 0 and command.out == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO("the \nof ü\n"))
    assert command(*options, "--prompts", "-") == 0 and command.out == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO("the \nof ü\n"))
    assert command(*options) == 0 and command.out.startswith("the \nof ü")  # one prompt, of two lines
    monkeypatch.setattr(sys, "stdin", io.StringIO("the \nof ü\n"))
    assert command(*options, "--interactive") == 0
    assert command.out.splitlines() == expected.replace("\n\n", "\n").splitlines()


def test_samples_and_log_probabilities_in_json(command: Command, model_folder: Path) -> None:
    options = ["sample", "--model", model_folder, "--max_new_tokens", 6, "--prompt", "the ", "--json"]
    assert command(*options, "--samples", 2) == 0
    several = json.loads(command.out)
    assert several["prompt"] == "the " and len(several["samples"]) == 2
    assert command(*options, "--log_probabilities") == 0
    one = json.loads(command.out)
    assert one["continuation"] == several["samples"][0]["continuation"] and one["finish_reason"] == "length"
    assert len(one["tokens"]) == 6 and all(token["log_probability"] < 0 for token in one["tokens"])
    assert command(*options[:-1], "--samples", 2) == 0
    assert command.out == "\n\n".join(each["text"] for each in several["samples"]) + "\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--interactive", "--prompt", "a"], "--interactive asks for prompts"),
        (["--prompt", "a", "--log_probabilities"], "add --json"),
        (["--prompt", "a", "--batch_size", "0"], "--batch_size 0: must be at least 1"),
        (["--prompts", "nowhere.txt"], "--prompts nowhere.txt: cannot be read"),
        (["--prompts", "{folder}/bad.jsonl"], "bad.jsonl, line 2: expected an object like"),
        (["--prompt", "the " * 70], "tokens exceed the model's context of 64; shorten it"),
        (["--prompt", "a", "--prompt", "the " * 70], "prompt 2 of 2: "),
        (["--prompt", "a", "--banned_tokens", "3", "999"], "banned_tokens [999]: not in the vocabulary"),
        (["--prompt", "a", "--temperature", "0", "--samples", "2"], "samples 2: at temperature 0"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    command: Command, model_folder: Path, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n', encoding="utf-8")
    arguments = [argument.replace("{folder}", str(tmp_path)) for argument in arguments]
    assert command("sample", "--model", model_folder, *arguments) == 2
    assert expected in command.err and command.err.count("\n") == 1 and command.out == ""


def test_a_session_goes_on_after_a_mistake_and_after_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed: list[Any] = ["a\\nb", "too long", "", KeyboardInterrupt(), "c", EOFError()]
    heard: list[str] = []

    def type_in(_: str) -> str:
        line = typed.pop(0)
        if isinstance(line, BaseException):
            raise line
        return str(line)

    def answer(prompt: str) -> None:
        heard.append(prompt)
        if prompt == "too long":
            raise InputError("prompt: too long")
        if prompt == "c":
            raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", type_in)
    converse(answer)
    assert heard == ["a\nb", "too long", "c"] and typed == []
    assert "prompt: too long" in capsys.readouterr().err


@pytest.mark.slow
def test_a_session_on_a_terminal_edits_lines_and_brings_them_back(model_folder: Path) -> None:
    master, slave = pty.openpty()
    program = [sys.executable, "-m", "train_loop", "sample", "--interactive", "--max_new_tokens", "5"]
    process = subprocess.Popen(
        [*program, "--model", str(model_folder)], stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    shown = b""

    def until(text: bytes, times: int) -> None:
        nonlocal shown
        deadline = time.monotonic() + 60
        while shown.count(text) < times:
            assert time.monotonic() < deadline, shown
            if select.select([master], [], [], 1)[0]:
                shown += os.read(master, 4096)

    try:
        until(b"> ", 1)
        os.write(master, b"thX\x7fe and\n")  # an X, taken back
        until(b"> ", 2)
        os.write(master, b"\x1b[A to\n")  # arrow up, and two more words
        until(b"> ", 3)
        os.write(master, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
    answers = [line for line in shown.decode(errors="replace").splitlines() if line.startswith("the and")]
    assert len(answers) == 2 and answers[1].startswith("the and to"), shown


def test_a_run_in_progress_and_its_checkpoints(
    command: Command, settings: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    trained = settings(checkpoint__every=5, checkpoint__keep=9, evaluation__every=5, train__max_steps=10)
    assert command("train", *trained) == 0
    steps = [run / "checkpoints" / f"step-{step:08d}" for step in (5, 10)]
    ask = ["--prompt", "the ", "--max_new_tokens", 20, "--temperature", 0.5]

    def sampled(name: object) -> str:
        assert command("sample", "--model", name, *ask) == 0
        return command.out

    exported = sampled(run / "model")
    assert sampled(run) == sampled(steps[1]) == exported != sampled(steps[0])
    assert command("evaluate", "--model", steps[1], *trained) == 0
    found = json.loads(command.out)
    assert command("evaluate", "--model", run / "model", *trained) == 0
    assert found == json.loads(command.out)
    (run / "checkpoints").rename(tmp_path / "gone")
    assert sampled(run) == exported
    (tmp_path / "gone").rename(run / "checkpoints")
    # Before it is exported, a run is its newest whole checkpoint, wherever the command is given.
    (run / "model").rename(tmp_path / "exported")
    monkeypatch.chdir(run / "checkpoints")
    assert sampled("step-00000010") == sampled("..") == exported
    (steps[1] / "state.json").unlink()
    assert sampled(run) == sampled(steps[0])
    assert command("sample", "--model", steps[1], *ask) == 2 and "state.json is missing" in command.err
    # One that is removed while it is read is looked for again.
    load, calls = storage.load_weights, []

    def vanishing(*arguments: Any) -> None:
        calls.append(0)
        if len(calls) == 1:
            raise FileNotFoundError
        load(*arguments)

    monkeypatch.setattr(storage, "load_weights", vanishing)
    assert pretrained.load(str(run))[0] is not None and len(calls) == 2
    (run / "architecture").rename(run / "elsewhere")
    assert command("sample", "--model", run, *ask) == 2 and "has no architecture" in command.err
