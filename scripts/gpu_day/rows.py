"""What a part of GPU day found: rows, written to its JSON file after each check, so that a killed part keeps them.

    def checks(rows: Rows, cpu: bool, folder: Path) -> None:
        rows.check("dropout is keyed", is_keyed, model)          # is_keyed(model) -> Finding

    if __name__ == "__main__":
        part(checks)

A check returns a `Finding`, or raises `Skipped` where it can't be made here. After any other exception its row says
"failed", and the part goes on with the next check. `day.py` says what a row holds.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

LIBRARIES = (
    "accelerate",
    "evaluate",
    "train_loop.job",
    "train_loop.metrics.language_model",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.pipelines",
)
"""What parts load before it is their turn."""


class Skipped(Exception):
    """A check that can't be made here; the message says why."""


class Finding(NamedTuple):
    """What a check found; without a verdict ("yes" or "no") it is a figure."""

    value: Any
    verdict: str | None = None
    expected: str = ""
    unit: str = ""
    why: str = ""


def figure(value: Any, unit: str = "", why: str = "") -> Finding:
    """A measurement that is neither right nor wrong."""
    return Finding(value, unit=unit, why=why)


def holds(promise: bool, value: Any, expected: str, why: str = "") -> Finding:
    """Whether a promise is kept, beside what was seen and what was expected."""
    return Finding(value, "yes" if promise else "no", expected, why=why)


def at_most(value: float, limit: float, unit: str = "", why: str = "") -> Finding:
    """Whether a number stays below its limit; one that is not a number doesn't."""
    return Finding(value, "yes" if value <= limit else "no", f"at most {limit:g}", unit, why)


def same(value: Any, expected: Any, why: str = "") -> Finding:
    """Whether two things are equal."""
    return Finding(value, "yes" if value == expected else "no", str(expected), why=why)


def every(found: dict[str, bool]) -> Finding:
    """Whether several promises are kept, by name."""
    broken = [name for name, kept in found.items() if not kept]
    why = f"not: {', '.join(broken)}" if broken else ", ".join(found)
    return holds(not broken, f"{len(found) - len(broken)} of {len(found)}", "all", why)


def one_line(error: BaseException | str) -> str:
    """An error as one line of at most 300 characters."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:300]


def needs(*packages: str) -> None:
    """Skip a check where a package is missing.

    Raises:
        Skipped: naming it.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise Skipped(f"needs {package}; put its wheel on PYTHONPATH")


class Rows:
    """The rows of one part.

    Args:
        path: the JSON file that they are written to.
        seconds: that the part has.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self._path, self._ends = path, time.monotonic() + seconds
        self._rows: list[dict[str, Any]] = []
        self._write()

    @property
    def seconds_left(self) -> float:
        """Until the part is ended."""
        return self._ends - time.monotonic()

    def check(self, name: str, work: Callable[..., Finding], *arguments: Any, seconds: float = 0) -> None:
        """Make a check and write down its row.

        Args:
            name: of the row.
            work: makes the check, given `arguments`.
            seconds: what it takes; where fewer are left, it is skipped.
        """
        began = time.monotonic()
        try:
            if self.seconds_left < seconds:
                raise Skipped(f"{self.seconds_left:.0f} s are left, and it takes {seconds:.0f} s")
            found = work(*arguments)
        except Skipped as reason:
            found = Finding(None, "skipped", why=str(reason))
        except Exception as error:
            traceback.print_exc()  # into the part's log
            found = Finding(None, "failed", why=one_line(error))
        self.add(name, found, time.monotonic() - began)

    def add(self, name: str, found: Finding, seconds: float = 0.0) -> None:
        """Write down a row."""
        row = {"name": name, **found._asdict(), "seconds": round(seconds, 3)}
        self._rows.append(row | {"value": _plain(found.value)})
        self._write()
        print(json.dumps(self._rows[-1]), flush=True)

    def _write(self) -> None:
        beside = self._path.with_suffix(".new")
        beside.write_text(json.dumps({"rows": self._rows}, indent=1), encoding="utf-8")
        beside.replace(self._path)


def _plain(value: Any) -> Any:
    """A value that JSON has a word for: not a number and infinity are words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def part(checks: Callable[[Rows, bool, Path], None]) -> None:
    """Make the checks of one part, as `day.py` has asked for on the command line."""
    options = argparse.ArgumentParser()
    options.add_argument("--json", type=Path, required=True, help="file that the rows go to")
    options.add_argument("--wait", action="store_true", help="begin at a line of standard input: the seconds it has")
    options.add_argument("--folder", type=Path, required=True, help="for whatever the part writes")
    options.add_argument("--cpu", action="store_true", help="tiny shapes on the CPU")
    given = options.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    seconds = 600.0
    if given.wait:
        for name in LIBRARIES:
            with contextlib.suppress(Exception):  # whatever is wrong with it is a check's to find out
                importlib.import_module(name)
        seconds = float(sys.stdin.readline())
    rows = Rows(given.json, seconds)
    try:
        checks(rows, given.cpu or os.environ.get("ACCELERATE_USE_CPU") == "true", given.folder)
    except Exception as error:  # between two checks
        traceback.print_exc()
        rows.add("the rest of this part", Finding(None, "failed", why=one_line(error)))
