"""A real run, killed at random moments: the short version, eight kills, of what scripts/soak.py does fifty times."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "seed"), [(1, 4), (2, 1)])  # kills of all kinds
def test_a_run_that_is_killed_at_random_ends_in_the_same_bits(processes: int, seed: int, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "soak.py"), "--kills", "4", "--processes", str(processes)]
    result = subprocess.run(
        [*command, "--seed", str(seed), "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    assert f"4 kills on {processes} processes" in result.stdout
    assert "every bit the same as without" in result.stdout
