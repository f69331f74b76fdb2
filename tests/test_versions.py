"""What is said of libraries that don't fit, and what stands in for what older ones lack."""

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn  # noqa: F401  what is evaluated names it

from tests.support.runs import TINY_MODELS, Command, events
from train_loop import compat, versions
from train_loop.ops import cpu

ROOT = Path(__file__).parent.parent
LOSSES = Path(__file__).parent / "golden" / "losses.json"
FLOORS = {name: floor for name, (floor, _) in versions.WORK.items()}


def pins(path: Path) -> dict[str, str]:
    """The versions that a file of constraints pins."""
    return dict(re.findall(r"^([\w-]+)==(\S+)$", path.read_text().lower(), re.MULTILINE))


def test_the_floors_are_those_of_the_package_and_those_that_are_tested() -> None:
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert dict(each.split(">=") for each in asked) == FLOORS
    oldest = pins(ROOT / "constraints-oldest.txt")
    assert {name: versions.release(oldest[name]) for name in FLOORS} == {
        name: versions.release(floor) for name, floor in FLOORS.items()
    }


def test_nothing_is_tested_with_that_is_newer_than_the_newest() -> None:
    pinned = pins(ROOT / "constraints.txt")
    for name, (_, newest) in versions.WORK.items():
        assert versions.release(pinned[name]) <= versions.release(newest), name


@pytest.mark.parametrize("fits", [True, False], ids=["", "torch's own loss"])
@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_losses_are_those_of_every_version(
    command: Command,
    settings: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    fits: bool,
) -> None:
    """Ten steps, dropout on, and an evaluation: to 1e-6 what the newest libraries gave when this was written down."""
    if not fits:  # as on a GPU: torch 2.13's loss without all logits, before that what stands in for it
        monkeypatch.setattr(cpu, "fits", lambda *tensors: False)
    shape = {"model__architecture": json.dumps(TINY_MODELS[name]), "optimizer__learning_rate": 1e-3}
    assert command("train", *settings(**shape, train__max_steps=10)) == 0, command.err
    found = [event["loss"] for kind in ("step", "evaluation") for event in events(tmp_path / "run", kind)]
    assert found == pytest.approx(json.loads(LOSSES.read_text())[name], rel=1e-6)


def installed(monkeypatch: pytest.MonkeyPatch, **other: str | None) -> None:
    """Let some libraries have other versions, or None: not be there."""
    real = versions.version
    monkeypatch.setattr(versions, "version", lambda name: other[name] if name in other else real(name))


@pytest.mark.parametrize(
    "arguments", [("train",), ("evaluate", "--model", "m"), ("sample", "--model", "m", "--prompt", "")]
)
@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("2.8.1", "torch 2.8.1 is too old; train_loop needs 2.9 or later: pip install 'torch>=2.9'"),
        ("1.13.1+cu117", "torch 1.13.1+cu117 is too old"),
        (None, "torch is not installed; pip install 'torch>=2.9'"),
    ],
)
def test_a_library_that_is_missing_or_too_old_is_named(
    command: Command, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], found: str | None, expected: str
) -> None:
    installed(monkeypatch, torch=found)
    model = () if arguments[0] == "sample" else ("--model.name_or_path", "x")
    assert command(*arguments, *model) == 2
    assert expected in command.err and len(command.err.strip().splitlines()) == 1


@pytest.mark.parametrize("found", ["2.9.0a0+50eac811a6.nv25.09", "2.9", "2.13.0+cpu", "99.0"])
def test_what_is_new_enough_is_taken_for_it(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    """A vendor's build before the release counts as it; the newest of all is tried."""
    installed(monkeypatch, torch=found)
    versions.check()


@pytest.mark.parametrize("kind", [AttributeError, ImportError, TypeError])
def test_what_a_library_newer_than_any_that_was_tried_lacks_is_one_line(
    command: Command, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def gone() -> None:
        raise kind("module 'transformers' has no attribute 'Cache'")

    monkeypatch.setattr(versions, "check", gone)
    newest = {name: newest for name, (_, newest) in versions.WORK.items()}
    installed(monkeypatch, **newest)
    with pytest.raises(kind):  # with versions that were tried it is a fault of ours, and shows itself whole
        command("prepare", "--model.name_or_path", "x")
    installed(monkeypatch, **newest | {"transformers": "77.1.0"})
    assert command("prepare", "--model.name_or_path", "x") == 2
    assert len(command.err.strip().splitlines()) == 1
    assert f"{kind.__name__}: module 'transformers' has no attribute 'Cache' (" in command.err
    cure = f"pip install 'transformers<={newest['transformers']}'"
    assert f"transformers 77.1.0 is newer than the versions train_loop was tested with; {cure}" in command.err


@pytest.mark.parametrize(
    ("lacking", "newer", "blamed"),
    [
        ("torch.nn.no_such_name", "torch", True),
        ("torch.nn.no_such_name", "numpy", False),
        ("compat.no_such_name", "torch", False),
        ("__import__('transformers.no_such_module')", "transformers", True),
        ("__import__('transformers.no_such_module')", "torch", False),
        ("nn.Linear(2, 2).no_such_name", "torch", True),
        ("nn.Linear(no_such_option=2)", "torch", True),
    ],
)
def test_only_a_library_that_may_be_to_blame_is_blamed(
    monkeypatch: pytest.MonkeyPatch, lacking: str, newer: str, blamed: bool
) -> None:
    installed(monkeypatch, **{name: newest for name, (_, newest) in versions.WORK.items()} | {newer: "99.0"})
    with pytest.raises((AttributeError, ImportError, TypeError)) as caught:
        eval(lacking)
    assert (versions.too_new(caught.value) is not None) == blamed


def test_what_is_printed_meanwhile_goes_to_stderr(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import os

    for number, (version, expected) in enumerate((("2.9.1+cu128", ("", "gloo\n")), ("2.11.0", ("gloo\n", "")))):
        monkeypatch.setattr(torch, "__version__", version)
        with compat.stdout_kept_clean():
            os.write(1, b"gloo\n")
        assert tuple(capfd.readouterr()) == expected, number
