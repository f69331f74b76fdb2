"""The limits of the house: each is counted, and broken by one line too many."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "limits.py"
STEP = "def train_step(a, b, *, c=0):\n    return a\n"
LOOP = "def fit():\n    pass\n\n\ndef other(): pass\n"
README = """# A name
<!-- reading path -->
| file | what | lines |
|---|---|---|
| [`loop.py`](train_loop/training/loop.py) | the loop | 0 |
| [`step.py`](train_loop/training/step.py) | a step | 0 |
| [`order.py`](train_loop/data/order.py) | the order | 0 |
| [`loader.py`](train_loop/data/loader.py) | the tensors | ? |
| together | | 0 |
<!-- end of reading path -->
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository in which every limit holds."""
    written = {"training/__init__.py": '"""Read first."""\n', "training/loop.py": LOOP, "training/step.py": STEP}
    for name, text in (written | {"data/order.py": "\n" * 30, "data/loader.py": "\n" * 400}).items():
        path = tmp_path / "train_loop" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "one_file_loop.py").write_text("\n" * 200)
    (tmp_path / "README.md").write_text(README)
    assert limits(tmp_path, "--write").returncode == 0
    return tmp_path


def limits(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--root", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_readme_gets_the_counts(root: Path) -> None:
    text = (root / "README.md").read_text()
    assert "| the loop | 5 |" in text and "| a step | 2 |" in text and "| the tensors | 400 |" in text
    assert "| together | | 438 |" in text
    assert limits(root).returncode == 0


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        ("train_loop/training/loop.py", LOOP + "\n" * 150, "training/loop.py: 155 lines, at most 150"),
        ("train_loop/training/loop.py", "def fit():\n" + "    pass\n" * 50, "loop.py: fit: 51 lines, at most 50"),
        ("train_loop/training/step.py", "def train_step(a):\n" + "    a\n" * 40, "train_step: 41 lines, at most 40"),
        (
            "train_loop/training/step.py",
            "def train_step(a, b, *c, d, e, f, **g):\n    pass\n",
            "7 parameters, at most 6",
        ),
        ("train_loop/training/step.py", "def another():\n    pass\n", "train_step: not there"),
        ("train_loop/models/big.py", "\n" * 451, "train_loop/models/big.py: 451 lines, at most 450"),
        ("train_loop/training/state.py", "\n" * 900, "the reading path: 1,338 lines, at most 1,300"),
        ("train_loop/training/state.py", "", "the reading path does not name train_loop/training/state.py"),
        ("train_loop/data/order.py", "\n", "its line counts are not the files'"),
        ("scripts/one_file_loop.py", "\n" * 201, "one_file_loop.py: 201 lines, at most 200"),
        ("README.md", README + "." * 10_240, "bytes, at most 10,240"),
        ("README.md", "# A name\n", "no reading path"),
    ],
)
def test_each_limit_is_named_when_it_is_broken(root: Path, file: str, text: str, named: str) -> None:
    path = root / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    result = limits(root)
    assert result.returncode == 1
    assert named in result.stderr
