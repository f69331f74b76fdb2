"""A real run, killed at random moments: the short version of what scripts/soak.py does fifty times."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_killed_at_random_ends_in_the_same_bits(processes: int, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "soak.py"), "--kills", "8", "--processes", str(processes)]
    result = subprocess.run(
        [*command, "--folder", str(tmp_path)], capture_output=True, text=True, timeout=900, check=False, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    assert f"8 kills on {processes} processes" in result.stdout
    assert "every bit the same as without" in result.stdout
