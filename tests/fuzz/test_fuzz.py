"""Whatever is given, a command runs, or says in one line what is wrong: no traceback, no hang, no stray file.

`TRAIN_LOOP_FUZZ=2000 pytest tests/fuzz` tries so many cases of each kind, and lists all that fail. A case is found
again by its kind and its seed: `TRAIN_LOOP_FUZZ=data:17 pytest -s tests/fuzz`.
"""

import os
import random
import shutil
import time
from pathlib import Path

import pytest

from tests.fuzz.cases import KINDS, prepared
from tests.support.forked import run

ASKED = os.environ.get("TRAIN_LOOP_FUZZ", "")
SHORT = {"configuration": 40, "command_line": 40, "data": 40, "model_folder": 20, "run_folder": 20}
SECONDS_A_KIND = 9.0  # of the short form; cases beyond it are left out
SECONDS_A_CASE, BYTES_A_CASE = 60, 3 << 30


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What cases start from: settings, documents, and the run that these make."""
    folder = tmp_path_factory.mktemp("fuzz") / "base"
    prepared(folder)
    outcome = run(["train", "--config", "settings.yaml"], folder)
    assert outcome.code == 0, outcome
    return folder


def tried(kind: str, seed: int, base: Path) -> str | None:
    """What is wrong about how a case ends; None if nothing is."""
    folder = base.with_name(f"{kind}-{seed}")
    folder.mkdir()
    arguments = KINDS[kind](random.Random(f"{kind} {seed}"), base, folder)
    outcome = run(arguments, folder, SECONDS_A_CASE, BYTES_A_CASE)
    problem = outcome.problem()
    if ASKED.startswith(f"{kind}:"):
        print(f"\n{folder}\n{arguments}\n{outcome.out}\n{outcome.err}\n{outcome}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    last = outcome.err.strip().splitlines()[-1:]
    return problem and f"{kind}:{seed}: {problem}: {' '.join(arguments)[:150]!r} {''.join(last)[:300]!r}"


@pytest.mark.parametrize("kind", KINDS)
def test_odd_input_runs_or_gets_one_line(kind: str, base: Path) -> None:
    if ":" in ASKED:
        seeds = [int(ASKED.partition(":")[2])] if ASKED.startswith(f"{kind}:") else []
    else:
        seeds = list(range(int(ASKED or SHORT[kind])))
    began = time.monotonic()
    problems: list[str] = []
    for seed in seeds:
        if not ASKED and time.monotonic() - began > SECONDS_A_KIND:
            break
        problems += filter(None, [tried(kind, seed, base)])
    assert not problems, "\n".join(problems)
