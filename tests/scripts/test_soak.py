"""A real run, killed at random moments: the short version, eight kills, of what scripts/soak.py does fifty times."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts import soak
from tests.support import forked, launch


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "seed"), [(1, 4), (2, 1)])  # kills of all kinds
def test_a_run_that_is_killed_at_random_ends_in_the_same_bits(
    processes: int, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are forked each time, to be there at once; scripts/soak.py itself starts two by Accelerate's launcher."""
    command = ["soak.py", "--kills", "4", "--processes", str(processes), "--seed", str(seed), "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)

    def start(command: Sequence[str], **options: Any) -> forked.Popen:
        if processes > 1:
            options["environments"] = launch.launchers(processes, launch.processes(processes), options["env"])
        return forked.Popen(command, **options)

    started = SimpleNamespace(Popen=start, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(soak, "subprocess", started)
    assert soak.main() == 0
    told = capsys.readouterr().out
    assert f"4 kills on {processes} processes" in told
    assert "every bit the same as without" in told
