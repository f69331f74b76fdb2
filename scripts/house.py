"""Draws docs/house.svg: the rooms of train_loop/, one floor above the other, as the imports say.

    python scripts/house.py            # writes docs/house.svg
    python scripts/house.py --check    # exits with 1 where the file is not what the imports say

A room is a folder of the package, or a module that lies beside the folders. It stands one floor above the highest room
that it imports. Modules that import nothing but each other are the ground: every room may use them, and no arrow shows
it. An arrow that other arrows imply is left out. A folder that stands on the ground and that only the top room uses is
an annex. It reads files and imports nothing but the standard library.
"""

import argparse
import ast
import itertools
import re
import sys
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
WIDTH, MARGIN, GAP = 1000, 28, 18
FLOOR_GAP = 40  # between floors, where arrows change places
TITLE, TEXT = 17, 12.5  # sizes of letters
LETTER = 0.62  # width of a letter of a monospaced font, for its size; most have 0.60
PAD = 12
ANNEX, WIDEST = 150, 350

Imports = dict[str, set[str]]


class Room(NamedTuple):
    """A folder of the package, or a module beside the folders."""

    name: str
    files: tuple[str, ...]  # of a folder
    purpose: str

    @property
    def title(self) -> str:
        """What stands above its door."""
        return f"{self.name}/" if self.files else f"{self.name}.py"


def rooms(package: Path) -> dict[str, Room]:
    """The rooms of a package, by name. Its face (`__init__.py`, `__main__.py`) is none."""
    found = {}
    for path in sorted(package.iterdir()):
        if path.is_dir() and (path / "__init__.py").is_file():
            files = sorted(
                each.name if each.is_dir() else each.stem
                for each in path.iterdir()
                if (each.suffix == ".py" and each.stem != "__init__") or (each / "__init__.py").is_file()
            )
            found[path.name] = Room(path.name, tuple(files) or ("__init__",), _purpose(path / "__init__.py"))
        elif path.suffix == ".py" and not path.stem.startswith("__"):
            found[path.stem] = Room(path.stem, (), _purpose(path))
    return found


def _purpose(path: Path) -> str:
    """What a module's docstring says first, up to the first full stop, colon or semicolon."""
    says = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split())
    return re.split(r"[.:;](?:\s|$)", says, maxsplit=1)[0][:90]


def imports(package: Path, names: Iterable[str]) -> Imports:
    """For each room, the other rooms that its files import, wherever in the file."""
    found: Imports = {name: set() for name in names}
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package)
        room = place.parts[0] if len(place.parts) > 1 else place.stem
        if room in found:
            wanted = _imported(path, (package.name, *place.parent.parts))
            found[room] |= {each for each in wanted if each in found and each != room}
    return found


def _imported(path: Path, inside: tuple[str, ...]) -> Iterator[str]:
    """The second part of each name `package.room...` that a file imports; `inside` is its package."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [each.name.split(".") for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = list(inside[: len(inside) - node.level + 1]) if node.level else []
            base = above + (node.module.split(".") if node.module else [])
            names = [[*base, each.name] for each in node.names]
        else:
            continue
        yield from (name[1] for name in names if name[0] == inside[0] and len(name) > 1)


def ground(house: dict[str, Room], uses: Imports) -> list[str]:
    """The modules that import nothing but each other."""
    found = {name for name, room in house.items() if not room.files}
    while outside := {name for name in found if not uses[name] <= found}:
        found -= outside
    return sorted(found)


def reachable(uses: Imports) -> Imports:
    """For each room, all rooms that it imports, also by way of others."""
    found: Imports = {}
    for name in uses:
        todo, seen = [*uses[name]], set[str]()
        while todo:
            if (each := todo.pop()) not in seen:
                seen.add(each)
                todo += uses[each]
        found[name] = seen
    return found


def floors(uses: Imports) -> list[list[str]]:
    """The rooms of each floor, from the lowest. Rooms of a circle share one."""
    below = reachable(uses)
    level: dict[str, int] = {}
    for name in sorted(uses, key=lambda name: (len(below[name] | {name}), name)):
        level[name] = 1 + max((level.get(each, -1) for each in below[name] if name not in below[each]), default=-1)
    for name in uses:  # those of a circle may have been reached from different heights
        level[name] = max(level[each] for each in below[name] | {name} if each == name or name in below[each])
    return [sorted(name for name in uses if level[name] == n) for n in range(max(level.values(), default=-1) + 1)]


def needed(uses: Imports) -> list[tuple[str, str]]:
    """The arrows that no other arrows imply."""
    below = reachable(uses)
    return [
        (one, other)
        for one in sorted(uses)
        for other in sorted(uses[one])
        if one not in below[other]
        and not any(other in below[each] for each in uses[one] - {other} if each not in below[other])
    ]


def circles(uses: Imports) -> list[tuple[str, str]]:
    """The imports that are part of a circle."""
    below = reachable(uses)
    return [(one, other) for one in sorted(uses) for other in sorted(uses[one]) if one in below[other]]


class Box(NamedTuple):
    """A room's place, or, without lines, the place of an arrow that passes a floor."""

    x: float
    y: float
    width: float
    height: float

    @property
    def middle(self) -> float:
        """Half way between its walls."""
        return self.x + self.width / 2


Spot = str | tuple[str, str, int]  # a room, or an arrow on a floor that it passes


def picture(package: Path) -> str:
    """The whole SVG."""
    house = rooms(package)
    uses = imports(package, house)
    base = ground(house, uses)
    upper = {name: used - {*base} for name, used in uses.items() if name not in base}
    top = floors(upper)[-1] if upper else []
    annex = [
        name
        for name in upper
        if house[name].files and not upper[name] and (users := {one for one in upper if name in upper[one]})
        if len(upper) > 2 and users <= {*top}
    ]
    standing = {name: used - {*annex} for name, used in upper.items() if name not in annex}
    width = WIDTH - (ANNEX + GAP if annex else 0)
    spots, paths = _arranged(floors(standing), needed(standing))
    drawn: list[str] = []
    places: dict[Spot, Box] = {}
    y = 74.0
    for floor in reversed(spots):
        texts = _fitted([house[each] for each in floor if isinstance(each, str)], len(floor), width - 2 * MARGIN)
        height = max((_height(lines) for _, lines in texts.values()), default=0)
        used = sum(texts[each][0] if isinstance(each, str) else PAD for each in floor) + GAP * (len(floor) - 1)
        x = MARGIN + (width - 2 * MARGIN - used) / 2
        for each in floor:
            wide = texts[each][0] if isinstance(each, str) else PAD
            places[each] = Box(x, y, wide, height)
            if isinstance(each, str):
                drawn += _room(house[each], places[each], texts[each][1])
            x += wide + GAP
        y += height + FLOOR_GAP
    if annex:
        drawn += _annex([house[each] for each in annex], width, y - FLOOR_GAP)
    arrows = [*_arrows(paths, places)]
    if base:
        drawn += _ground(base, y - FLOOR_GAP / 2)
        y += _ground_height(base) + 6
    for one, other in circles(upper):
        drawn.append(f'<text class="wrong" x="{MARGIN}" y="{y:.0f}">a circle: {one} imports {other}</text>')
        y += 20
    rule = "a room imports only rooms below it" + (
        ", but for the circles that are named below" if circles(upper) else ""
    )
    return _page(package.name, rule, round(y), [*arrows, *drawn])


def _arranged(levels: list[list[str]], edges: list[tuple[str, str]]) -> tuple[list[list[Spot]], list[list[Spot]]]:
    """Each floor's rooms and passing arrows, in an order in which few arrows cross, and the way of each arrow."""
    level = {name: n for n, floor in enumerate(levels) for name in floor}
    spots: list[list[Spot]] = [[*floor] for floor in levels]
    paths: list[list[Spot]] = []
    for one, other in edges:
        passed: list[Spot] = [(one, other, n) for n in range(level[one] - 1, level[other], -1)]
        for each, n in zip(passed, range(level[one] - 1, level[other], -1), strict=True):
            spots[n].append(each)
        paths.append([one, *passed, other])
    links: dict[Spot, list[Spot]] = {each: [] for floor in spots for each in floor}
    for path in paths:
        for upper, lower in itertools.pairwise(path):
            links[upper].append(lower)
            links[lower].append(upper)
    at = {each: (n + 1) / (len(floor) + 1) for floor in spots for n, each in enumerate(floor)}
    for _ in range(24):  # towards the mean of what each is linked to, floor by floor
        for floor in [*spots, *reversed(spots)]:
            wish = {each: sum(at[link] for link in links[each]) / max(1, len(links[each])) for each in floor}
            floor.sort(key=lambda each: (wish[each] if links[each] else at[each], str(each)))
            at |= {each: (n + 1) / (len(floor) + 1) for n, each in enumerate(floor)}
    return spots, paths


def _fitted(found: list[Room], spots: int, room: float) -> dict[str, tuple[float, list[tuple[str, str]]]]:
    """For each room of a floor its width and the lines of its text, as (class, text)."""
    free = room - GAP * (spots - 1) - PAD * (spots - len(found))
    wide = min(WIDEST, free / max(1, len(found)))
    return {
        each.name: (
            wide,
            [
                ("title", each.title),
                *(("says", line) for line in _wrapped(each.purpose.split(), wide, TEXT, " ")),
                *(("files", line) for line in _wrapped(each.files, wide, TEXT, "  ")),
            ],
        )
        for each in found
    }


def _wrapped(words: Iterable[str], wide: float, size: float, between: str) -> list[str]:
    """Words in lines that fit into a box."""
    most = max(6, int((wide - 2 * PAD) / (size * LETTER)))
    lines: list[str] = []
    for word in words:
        word = word if len(word) <= most else word[: most - 1] + "…"
        if lines and len(lines[-1]) + len(between) + len(word) <= most:
            lines[-1] += between + word
        else:
            lines.append(word)
    return lines


def _height(lines: list[tuple[str, str]]) -> float:
    return 2 * PAD + TITLE + (len(lines) - 1) * (TEXT + 4)


def _room(room: Room, box: Box, lines: list[tuple[str, str]]) -> list[str]:
    drawn = [
        f'<rect class="{"room" if room.files else "module"}" x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" '
        f'height="{box.height:.1f}" rx="6"/>'
    ]
    y = box.y + PAD + TITLE - 3
    for kind, text in lines:
        fits = (box.width - 2 * PAD) / (len(text) * LETTER)
        size = f' style="font-size:{fits:.1f}px"' if kind == "title" and fits < TITLE else ""
        drawn.append(f'<text class="{kind}" x="{box.x + PAD:.1f}" y="{y:.1f}"{size}>{escape(text)}</text>')
        y += TEXT + 4
    return drawn


def _annex(found: list[Room], x: float, bottom: float) -> list[str]:
    """Rooms that stand apart, beside the house."""
    drawn, y = [], bottom
    for room in found:
        ((wide, lines),) = _fitted([room], 1, ANNEX).values()
        y -= _height(lines)
        drawn += _room(room, Box(x, y, wide, _height(lines)), lines)
        drawn.append(f'<text class="says" x="{x:.1f}" y="{y - 8:.1f}">apart</text>')
        y -= 40
    return drawn


def _chips(names: list[str]) -> list[list[tuple[str, float]]]:
    """Names in rows, each with its width."""
    rows: list[list[tuple[str, float]]] = [[]]
    used = 0.0
    for name in names:
        wide = (len(name) + 3) * (TEXT + 1) * LETTER + PAD
        if rows[-1] and used + wide > WIDTH - 2 * MARGIN - 2 * PAD:
            rows.append([])
            used = 0.0
        rows[-1].append((f"{name}.py", wide))
        used += wide + 8
    return rows


def _ground_height(names: list[str]) -> float:
    return 34 + 32 * len(_chips(names))


def _ground(names: list[str], y: float) -> list[str]:
    """The modules that everybody may use."""
    drawn = [
        f'<rect class="ground" x="{MARGIN}" y="{y:.1f}" width="{WIDTH - 2 * MARGIN}" '
        f'height="{_ground_height(names):.1f}" rx="6"/>',
        f'<text class="says" x="{MARGIN + PAD}" y="{y + 20:.1f}">every room may use these; they use no room</text>',
    ]
    for row, chips in enumerate(_chips(names)):
        x = MARGIN + PAD + 0.0
        for name, wide in chips:
            top = y + 30 + 32 * row
            drawn.append(f'<rect class="module" x="{x:.1f}" y="{top:.1f}" width="{wide:.1f}" height="24" rx="5"/>')
            drawn.append(f'<text class="leaf" x="{x + PAD / 2:.1f}" y="{top + 16.5:.1f}">{escape(name)}</text>')
            x += wide + 8
    return drawn


def _arrows(paths: list[list[Spot]], places: dict[Spot, Box]) -> Iterator[str]:
    """Each arrow as one line: straight down past the rooms of a floor, curved between floors."""
    leaving: dict[Spot, list[int]] = {}
    coming: dict[Spot, list[int]] = {}
    for n, path in enumerate(paths):
        leaving.setdefault(path[0], []).append(n)
        coming.setdefault(path[-1], []).append(n)
    for ends, next_to in ((leaving, 1), (coming, -2)):
        for numbers in ends.values():
            numbers.sort(key=lambda n: places[paths[n][next_to]].middle)

    def door(ends: dict[Spot, list[int]], spot: Spot, n: int) -> float:
        """Where on a wall an arrow stands, beside the others."""
        step = min(16.0, places[spot].width / (len(ends[spot]) + 1))
        return places[spot].middle + step * (ends[spot].index(n) - (len(ends[spot]) - 1) / 2)

    for n, path in enumerate(paths):
        x, y = door(leaving, path[0], n), places[path[0]].y + places[path[0]].height
        way = [f"M{x:.1f} {y:.1f}"]
        for spot in path[1:]:
            box, last = places[spot], spot == path[-1]
            across, down = door(coming, spot, n) if last else box.middle, box.y - (5 if last else 0)
            half = (y + down) / 2
            way.append(f"C{x:.1f} {half:.1f} {across:.1f} {half:.1f} {across:.1f} {down:.1f}")
            x, y = across, down
            if not last:
                y = box.y + box.height
                way.append(f"V{y:.1f}")
        yield f'<path class="arrow" d="{" ".join(way)}" marker-end="url(#tip)"/>'


def _page(name: str, rule: str, height: int, drawn: list[str]) -> str:
    light = "--paper:#ffffff;--wall:#eef3fb;--line:#5b7db1;--ink:#1b2733;--soft:#51606f;--floor:#f1f1ee;--arrow:#8a97a6"
    dark = "--paper:#15191f;--wall:#1f2a3a;--line:#6f93cc;--ink:#e8edf3;--soft:#a8b4c1;--floor:#20242a;--arrow:#7f8c9b"
    mono = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
            f'role="img" aria-label="The rooms of {name} and what they import">',
            "<style>",
            f"svg{{{light}}}@media (prefers-color-scheme:dark){{svg{{{dark}}}}}",
            f"text{{font-family:{mono};fill:var(--ink);white-space:pre}}",
            f".title{{font-size:{TITLE}px;font-weight:700}}.says,.files{{font-size:{TEXT}px}}.says{{fill:var(--soft)}}",
            f".leaf{{font-size:{TEXT}px}}.head{{font-size:22px;font-weight:700}}.wrong{{font-size:14px;fill:#d1383d}}",
            ".paper{fill:var(--paper)}.room{fill:var(--wall);stroke:var(--line);stroke-width:1.5}",
            ".module{fill:var(--paper);stroke:var(--line)}.ground{fill:var(--floor)}",
            ".arrow{fill:none;stroke:var(--arrow);stroke-width:1.5}.tip{fill:var(--arrow)}",
            "</style>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="4" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path class="tip" d="M0 0L8 4L0 8z"/></marker></defs>',
            f'<rect class="paper" width="{WIDTH}" height="{height}" rx="10"/>',
            f'<text class="head" x="{MARGIN}" y="38">{name}/</text>',
            f'<text class="says" x="{MARGIN}" y="58">{rule}</text>',
            *drawn,
            "</svg>",
            "",
        ]
    )


def main() -> int:
    """Write the picture, or compare it; 1 where it is not what the imports say."""
    parser = argparse.ArgumentParser(description="Draw the rooms of train_loop/ from its imports.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the picture is old")
    parser.add_argument("--package", type=Path, default=ROOT / "train_loop", help="folder of the package")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "house.svg", help="the picture")
    given = parser.parse_args()
    drawn = picture(given.package)
    if not given.check:
        given.output.write_text(drawn, encoding="utf-8")
    elif not given.output.is_file() or given.output.read_text(encoding="utf-8") != drawn:
        print(f"house: {given.output.name} is not what the imports say; run python scripts/house.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
