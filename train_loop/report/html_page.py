"""Build one HTML file from plain data: the template, its style and scripts, and the data as JSON.

Whatever comes from a run (names, prompts, texts, tokens) is data and stays text. Every `<` in it is escaped here, so
nothing can end the script element, and the page's script only sets text with textContent. A content security policy
forbids all requests.
"""

import html
import re
from importlib import resources
from pathlib import Path
from typing import Any

from train_loop.errors import InputError, one_line
from train_loop.files import unwritable, write_output
from train_loop.records import to_json

_FILE = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_SERVED = f"{_FILE}; connect-src 'self'"  # allows asking for newer data


def page(data: dict[str, Any], live: bool = False) -> str:
    """The page for what `gather` found; a live page asks its server for newer data."""
    parts = {
        "POLICY": _SERVED if live else _FILE,
        "TITLE": html.escape(", ".join(run["name"] for run in data["runs"])),
        "STYLE": _asset("page.css"),
        "SCRIPT": "\n".join(_asset(name) for name in ("charts.js", "page.js")),
        "DATA": as_json(data | {"live": live}),
    }
    whole = re.sub("<!--([A-Z]+)-->", lambda found: parts[found[1]], _asset("page.html"))
    return whole.encode("utf-8", "replace").decode("utf-8")  # a folder's name need not be UTF-8


def write(data: dict[str, Any], path: Path) -> None:
    """Write the page completely or not at all; InputError if the file can't be written."""
    check_place(path)
    try:
        write_output(path, page(data))
    except OSError as error:
        raise InputError(
            f"report {path}: cannot be written ({one_line(error)}); name another file with --output"
        ) from None


def check_place(path: Path) -> None:
    """Raise InputError if a page can't stand here."""
    if (reason := unwritable(path)) is not None:
        raise InputError(f"report {path}: cannot be written ({reason}); name another file with --output")


def as_json(data: dict[str, Any]) -> str:
    """JSON that is safe inside a script element."""
    return to_json(data, compact=True).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
