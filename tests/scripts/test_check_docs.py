"""The documents say what is there: each kind of slip in them is found, and named with its line."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "check_docs.py"

TREE = {
    "README.md": "# A name\n\n[more](docs/more.md#the-second-part) and [this](#a-name)\n",
    "docs/more.md": "# More\n\n## The second part\n\n```bash\nbash scripts/run.sh --config configs/*.yaml\n```\n",
    "scripts/run.sh": "",
    "configs/small.yaml": "",
    "train_loop/__init__.py": '_NAMES = {"train": "train_loop.training.loop"}\n',
    "train_loop/__main__.py": """
import sys
HELP = {
    "": "commands:\\n  train     Train.\\n  sample    Sample.\\n",
    "train": "  --run.seed  (an integer)\\n  --model.architecture  (a mapping)\\n",
    "sample": "  --top_k K\\n  --json\\n",
}
print(HELP[" ".join(sys.argv[1:-1])])
""",
    "train_loop/training/__init__.py": "",
    "train_loop/training/loop.py": "def fit(): ...\n",
    "tests/test_loop.py": "",
}
SOUND = """
`training/loop.py`, `loop.py`, `train_loop/training/`, `tests/test_loop.py`, `run.sh`, `run_clm.py`, `metrics.jsonl`
`run.seed: 3`, `model.architecture.n_layer`, `--run.seed 1`, `train-loop sample --top_k 5`, `run.jsonl`, `other.key`
[outside](https://example.org/nothing), `[a link](in/code.md)`

| old | new |
|---|---|
| `gone.py` | `training/loop.py` |

```bash
accelerate launch -m train_loop train --run.seed 2 \\
    --model.architecture.n_layer 2
train-loop sample --json \\
    --top_k 3 # --not an option
python other.py
```

```python
import train_loop
from train_loop.training.loop import fit
train_loop.train(None)
```
"""


def checked(folder: Path, text: str = "", files: dict[str, str] | None = None) -> list[str]:
    """What the script says of a small repository whose README ends with `text`."""
    for name, content in (TREE | (files or {})).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    with (folder / "README.md").open("a") as readme:
        readme.write(text)
    command = [sys.executable, str(SCRIPT), "--root", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    said = result.stderr.splitlines()
    assert result.returncode == (
        1 if any(line.startswith(("README.md:", "docs/", "train_loop/")) for line in said) else 0
    )
    return said


def test_what_is_there_is_not_complained_about(tmp_path: Path) -> None:
    assert checked(tmp_path, SOUND) == []


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[x](docs/gone.md)", "the link docs/gone.md leads to no file"),
        ("[x](docs/more.md#the-third-part)", "the link docs/more.md#the-third-part leads to no heading"),
        ("[x](#nowhere)", "the link #nowhere leads to no heading"),
        ('<img src="docs/gone.svg">', "the link docs/gone.svg leads to no file"),
        ("`train_loop/loop.py`", "there is no train_loop/loop.py"),
        ("`tests/test_gone.py`", "there is no tests/test_gone.py"),
        ("`training/gone.py`", "there is no training/gone.py"),
        ("`gone.py`", "there is no gone.py"),
        ("`python scripts/gone.py --now`", "there is no scripts/gone.py"),
        ("```bash\nx --config configs/gone.yaml\n```", "there is no configs/gone.yaml"),
        ("| now |\n|---|\n| `gone.py` |", "there is no gone.py"),
        ("`train-loop fly`", "there is no command train-loop fly"),
        ("```bash\npython -m train_loop fly\n```", "there is no command train-loop fly"),
        ("`--run.speed 3`", "there is no setting run.speed"),
        ("`run.speed: 3`", "there is no setting run.speed"),
        ("```bash\ntrain-loop sample \\\n    --top_q 1\n```", "train-loop sample has no option --top_q"),
        ("```python\nfrom train_loop.gone import fit\n```", "there is no module train_loop.gone"),
        ("```python\nfrom train_loop.training.loop import gone\n```", "train_loop.training.loop has no gone"),
        ("```python\ntrain_loop.fly(1)\n```", "train_loop has no fly"),
    ],
)
def test_each_slip_is_named(text: str, named: str, tmp_path: Path) -> None:
    (line,) = checked(tmp_path, text)
    place, _, problem = line.partition(": ")
    assert place.startswith("README.md:")
    assert problem == named


def test_old_names_in_docstrings_are_named(tmp_path: Path) -> None:
    source = '"""A loop; see `gone.py` and `training/loop.py`.\n\n    >>> from train_loop.gone import fit\n"""\n'
    assert checked(tmp_path, "", {"train_loop/training/loop.py": source}) == [
        "train_loop/training/loop.py:1: there is no gone.py",
        "train_loop/training/loop.py:3: there is no module train_loop.gone",
    ]


def test_a_message_that_nobody_gives_is_named(tmp_path: Path) -> None:
    source = 'def fit(n):\n    raise ValueError(f"only {n} steps "\n        "are left")\n'
    table = "| message | why |\n|---|---|\n| `only … steps are left` | so |\n| `only … steps are lost` | so |\n"
    found = checked(tmp_path, "", {"train_loop/training/loop.py": source, "docs/troubleshooting.md": table})
    assert found == ["docs/troubleshooting.md:4: no message says: steps are lost"]


def test_files_names_and_links_are_checked_where_the_package_does_not_run(tmp_path: Path) -> None:
    found = checked(tmp_path, "`gone.py` `run.speed`", {"train_loop/__main__.py": "raise SystemExit(1)"})
    assert found[0].startswith("check_docs: train_loop does not run here")
    assert found[1:] == ["README.md:4: there is no gone.py"]
