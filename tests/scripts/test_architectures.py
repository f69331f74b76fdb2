"""Types as unlike as Transformers has them train, evaluate, sample and resume; docs/architectures.md has them all."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import architectures
from tests.support.launch import ROOT

UNLIKE = (
    "bart",  # half of an encoder and decoder, whose own loss does not move labels
    "bert",  # an encoder that became a decoder
    "camembert",  # counts positions from its padding token
    "deepseek_v3",  # latent attention, experts
    "gemma3n_text",  # changes what a product returns
    "gemma4_text",  # layers of unlike widths
    "gpt_oss",  # biases that are matrices
    "jamba",  # attention, a state space and experts
    "mamba2",  # a state space
    "recurrent_gemma",  # gates
    "rembert",  # a head wider than the hidden state
    "rwkv",  # no positions, no attention
    "xlnet",  # attention in all directions by default
    "xlstm",  # a cache of its own
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("architectures")
    architectures.prepare(folder)
    return folder


@pytest.mark.parametrize("model_type", UNLIKE)
def test_everything_works_with_it(prepared: Path, model_type: str) -> None:
    row = architectures.attempt(model_type, prepared, verify=False)
    assert architectures.works(row), row
    page = architectures.PAGE.read_text(encoding="utf-8")
    (told,) = re.findall(rf"^\| `{model_type}` \| (.*) \|$", page, re.MULTILINE)
    assert told.split(" | ")[1] == row["decay"]


def test_what_does_not_train_is_told_why(prepared: Path) -> None:
    row = architectures.attempt("cpmant", prepared)
    assert row.keys() == {"train"} and "CpmAntForCausalLM is not causal" in row["train"]
    assert architectures.attempt("git", prepared) == {"train": architectures.REASONS["git"]}


def test_the_page_has_every_type() -> None:
    """And says of none that it gave a traceback, or that something was wrong with it."""
    page = architectures.PAGE.read_text(encoding="utf-8")
    told = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert sorted(told) == sorted(architectures.types())
    assert "traceback" not in page


@pytest.mark.slow
def test_the_page_is_what_comes_out() -> None:
    """All types, which takes a quarter of an hour: asked for by TRAIN_LOOP_EVERY_ARCHITECTURE=1."""
    if not os.environ.get("TRAIN_LOOP_EVERY_ARCHITECTURE"):
        pytest.skip("takes a quarter of an hour; set TRAIN_LOOP_EVERY_ARCHITECTURE=1 to try every type")
    command = [sys.executable, str(ROOT / "scripts" / "architectures.py"), "--unverified"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    trained, rest = done.stdout.split("## What does not train")
    page = architectures.PAGE.read_text(encoding="utf-8").split("## What does not train")
    for found, told in zip((trained, rest), page, strict=True):
        assert re.findall(r"^\| `([^`]+)` \|", found, re.MULTILINE) == re.findall(
            r"^\| `([^`]+)` \|", told, re.MULTILINE
        )
