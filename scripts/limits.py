"""The limits of the house: prints what each one counts and exits with 1 where one is broken.

    python scripts/limits.py            # a table, and a line for each limit that is broken
    python scripts/limits.py --write    # also writes the line counts into the README's reading path

It reads files and imports nothing but the standard library, so it runs without an environment.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

READING_PATH = 1300  # lines of train_loop/training/, data/order.py and data/loader.py together
FILE = 450  # lines of any file of train_loop/
LOOP_FILE = 150  # lines of training/loop.py
LOOP = 50  # lines of its longest function
STEP = 40  # lines of train_step
STEP_PARAMETERS = 6
ONE_FILE_LOOP = 200  # lines of scripts/one_file_loop.py
README = 10_240  # bytes

BEGIN, END = "<!-- reading path -->", "<!-- end of reading path -->"
ROW = re.compile(r"^(\|.*\]\((train_loop/[^)]+\.py)\).*\| *)[\d,?]+( *\|)$")
TOTAL = re.compile(r"^(\|.*\btogether\b.*\| *)[\d,?]+( *\|)$")


class Measure(NamedTuple):
    """What is limited, how much of it there is and how much there may be. None: there is no such thing."""

    what: str
    found: int | None
    limit: int
    unit: str

    @property
    def broken(self) -> bool:
        """Whether the limit does not hold."""
        return self.found is None or self.found > self.limit


def lines(path: Path) -> int:
    """How many lines a file has."""
    return len(path.read_text(encoding="utf-8").splitlines())


def reading_path(root: Path) -> list[Path]:
    """The files that a reader reads in an afternoon."""
    package = root / "train_loop"
    rest = (package / "data" / "order.py", package / "data" / "loader.py")
    return [*sorted((package / "training").glob("*.py")), *(path for path in rest if path.is_file())]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions and methods of a file; none where there is no file."""
    if path.is_file():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function, from `def` to its last one."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many parameters a function takes."""
    given = function.args
    single = [each for each in (given.vararg, given.kwarg) if each is not None]
    return len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs) + len(single)


def measure(root: Path) -> list[Measure]:
    """Every limit, in the order in which they are printed."""
    training = root / "train_loop" / "training"
    path = reading_path(root)
    found = [Measure("the reading path", sum(map(lines, path)) if path else None, READING_PATH, "lines")]
    longest = max(functions(training / "loop.py"), key=length, default=None)
    step = next((each for each in functions(training / "step.py") if each.name == "train_step"), None)
    name = f"training/loop.py: {longest.name}" if longest else "training/loop.py: its longest function"
    loop, one = training / "loop.py", root / "scripts" / "one_file_loop.py"
    found += [
        Measure("training/loop.py", lines(loop) if loop.is_file() else None, LOOP_FILE, "lines"),
        Measure(name, length(longest) if longest else None, LOOP, "lines"),
        Measure("training/step.py: train_step", length(step) if step else None, STEP, "lines"),
        Measure("training/step.py: train_step", parameters(step) if step else None, STEP_PARAMETERS, "parameters"),
        Measure("scripts/one_file_loop.py", lines(one) if one.is_file() else None, ONE_FILE_LOOP, "lines"),
        Measure("README.md", len((root / "README.md").read_bytes()), README, "bytes"),
    ]
    sizes = sorted(((lines(each), each) for each in (root / "train_loop").rglob("*.py")), reverse=True)
    shown = max(3, sum(size > FILE for size, _ in sizes))
    return found + [Measure(str(each.relative_to(root)), size, FILE, "lines") for size, each in sizes[:shown]]


def counted(readme: str, root: Path) -> str:
    """The README with the reading path's line counts as they are.

    Raises:
        ValueError: where it has no such table, or one that names other files than the reading path's.
    """
    head, begin, rest = readme.partition(BEGIN)
    table, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md: no reading path between {BEGIN} and {END}")
    named, written = set(), []
    for line in table.split("\n"):
        if row := ROW.match(line):
            path = root / row[2]
            if not path.is_file():
                raise ValueError(f"README.md: the reading path names {row[2]}, which is not there")
            named.add(path)
            line = f"{row[1]}{lines(path):,}{row[3]}"
        elif total := TOTAL.match(line):
            line = f"{total[1]}{sum(map(lines, reading_path(root))):,}{total[2]}"
        written.append(line)
    if missing := [path for path in reading_path(root) if path not in named and path.name != "__init__.py"]:
        raise ValueError(f"README.md: the reading path does not name {missing[0].relative_to(root)}")
    return head + begin + "\n".join(written) + end + tail


def main() -> int:
    """Print the table; 1 where a limit is broken or the README's counts are not the files'."""
    parser = argparse.ArgumentParser(description="Print the limits of the house; exit with 1 where one is broken.")
    parser.add_argument("--write", action="store_true", help="write the line counts into README.md")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    given = parser.parse_args()
    found = measure(given.root)
    print("reading path")
    for path in reading_path(given.root):
        print(f"  {lines(path):>7,}  {path.relative_to(given.root)}")
    print("limits")
    for each in found:
        count = "none" if each.found is None else f"{each.found:,}"
        print(f"  {count:>7} of {each.limit:>6,} {each.unit:<10}  {each.what}")
    problems = [
        f"{each.what}: not there"
        if each.found is None
        else f"{each.what}: {each.found:,} {each.unit}, at most {each.limit:,}"
        for each in found
        if each.broken
    ]
    readme = given.root / "README.md"
    try:
        before = readme.read_text(encoding="utf-8")
        after = counted(before, given.root)
        if after != before and given.write:
            readme.write_text(after, encoding="utf-8")
        elif after != before:
            problems.append("README.md: its line counts are not the files'; run python scripts/limits.py --write")
    except ValueError as error:
        problems.append(str(error))
    for problem in problems:
        print(f"limits: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
