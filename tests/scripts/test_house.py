"""The picture of the house: floors, arrows and circles as the imports say, and no text across a wall."""

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "house.py"
SVG = "{http://www.w3.org/2000/svg}"
LETTER = 0.602  # width of a letter of DejaVu Sans Mono and of Menlo, for its size

HOUSE = {
    "__init__.py": "from app.job import run",
    "__main__.py": "from app.cli import main",
    "cli.py": '"""The commands."""\nfrom app import job\nfrom app.page.draw import page\nfrom app.errors import Bad',
    "job.py": "def run():\n    from app.work.loop import loop",
    "work/__init__.py": '"""The work: read first."""',
    "work/loop.py": "from .step import step\nfrom ..parts import wheel\nimport app.errors",
    "work/step.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from app.tools.saw import Saw",
    "parts/__init__.py": "",
    "parts/wheel.py": "import os\nfrom app.tools.saw import saw",
    "tools/__init__.py": "",
    "tools/saw.py": "from app import errors, text",
    "page/__init__.py": "",
    "page/draw.py": "from app.text import words",
    "errors.py": "",
    "text.py": "from app.errors import Bad",
}


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("house")


def built(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / "app" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "app"


def drawn(house: Any, package: Path) -> ElementTree.Element:
    return ElementTree.fromstring(house.picture(package))


def texts(page: ElementTree.Element, kind: str) -> list[str]:
    return [each.text or "" for each in page.iter(f"{SVG}text") if each.get("class") == kind]


def test_every_import_counts_wherever_it_stands(house: Any, tmp_path: Path) -> None:
    package = built(tmp_path, HOUSE)
    uses = house.imports(package, house.rooms(package))
    assert uses == {
        "cli": {"job", "page", "errors"},
        "job": {"work"},
        "work": {"parts", "tools", "errors"},
        "parts": {"tools"},
        "tools": {"errors", "text"},
        "page": {"text"},
        "errors": set(),
        "text": {"errors"},
    }
    assert house.ground(house.rooms(package), uses) == ["errors", "text"]


def test_a_room_stands_above_all_that_it_imports(house: Any, tmp_path: Path) -> None:
    uses = {"top": {"left", "right", "low"}, "left": {"low"}, "right": set(), "low": set()}
    assert house.floors(uses) == [["low", "right"], ["left"], ["top"]]
    assert house.needed(uses) == [("left", "low"), ("top", "left"), ("top", "right")]
    assert house.circles(uses) == []


def test_a_circle_is_named_and_drawn_all_the_same(house: Any, tmp_path: Path) -> None:
    package = built(tmp_path, HOUSE | {"tools/saw.py": "from app.work import loop"})
    page = drawn(house, package)
    assert "a circle: tools imports work" in texts(page, "wrong")
    assert {"work/", "parts/", "tools/"} <= {*texts(page, "title")}
    assert texts(drawn(house, built(tmp_path / "whole", HOUSE)), "wrong") == []


def test_the_picture_has_every_room_and_file_once(house: Any, tmp_path: Path) -> None:
    page = drawn(house, built(tmp_path, HOUSE))
    assert sorted(texts(page, "title")) == ["cli.py", "job.py", "page/", "parts/", "tools/", "work/"]
    assert sorted(texts(page, "leaf")) == ["errors.py", "text.py"]
    assert sorted(" ".join(texts(page, "files")).split()) == ["draw", "loop", "saw", "step", "wheel"]
    assert "apart" in texts(page, "says")  # page/ stands on the ground, and only cli.py uses it


def test_no_text_crosses_a_wall_and_no_room_another(house: Any, tmp_path: Path) -> None:
    many = {f"tools/a_file_with_a_long_name_{n}.py": "" for n in range(30)}
    beside = {f"a_module_with_a_long_name_{n}.py": "from app.tools import saw" for n in range(6)}
    page = drawn(house, built(tmp_path, HOUSE | many | beside))
    rooms = [
        [float(each.get(key, 0)) for key in ("x", "y", "width", "height")]
        for each in page.iter(f"{SVG}rect")
        if each.get("class") in ("room", "module")
    ]
    for n, (x, y, width, height) in enumerate(rooms):
        assert x >= 0 and x + width <= house.WIDTH
        for other_x, other_y, other_width, other_height in rooms[:n]:
            apart = x >= other_x + other_width or other_x >= x + width or y >= other_y + other_height
            assert apart or other_y >= y + height
    sizes = {"title": house.TITLE, "says": house.TEXT, "files": house.TEXT, "leaf": house.TEXT}
    inside = 0
    for each in page.iter(f"{SVG}text"):
        kind, text = each.get("class", ""), each.text or ""
        size = float(each.get("style", f"font-size:{sizes.get(kind, 0)}px").removeprefix("font-size:")[:-2])
        left, base = float(each.get("x", 0)), float(each.get("y", 0))
        for x, y, width, height in rooms:
            if x <= left <= x + width and y <= base <= y + height:
                assert left + len(text) * size * LETTER <= x + width, text
                inside += 1
    assert inside >= 40


def test_check_says_so_in_one_line_when_an_import_has_changed(tmp_path: Path) -> None:
    package, output = built(tmp_path, HOUSE), tmp_path / "house.svg"

    def script(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), "--package", str(package), "--output", str(output), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)

    assert script("--check").returncode == 1
    assert script().returncode == 0
    assert script("--check").returncode == 0
    (package / "parts" / "wheel.py").write_text("")
    result = script("--check")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "house.svg" in line and "python scripts/house.py" in line
