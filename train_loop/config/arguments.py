"""The options of a command that takes a few of its own: argparse, with mistakes in one line and nothing given twice."""

import argparse
import re
from collections.abc import Callable
from typing import Any, NoReturn

from train_loop.config import paths
from train_loop.config.yaml_core import parse_yaml
from train_loop.errors import InputError

_TAKEN = " taken"  # no option can have this name


def _once(action: Any) -> Any:
    """An argparse action that refuses to be taken twice: the first value would be lost without a word."""

    class Once(action):
        def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
            taken = namespace.__dict__.setdefault(_TAKEN, {})
            if self.dest in taken:
                both = f", as {taken[self.dest]!r} and {values!r}" if self.nargs != 0 else ""
                parser.error(f"{option_string} is given twice{both}")
            taken[self.dest] = values
            super().__call__(parser, namespace, values, option_string)

    return Once


def number_of(kind: Any) -> Callable[[str], Any]:
    """How argparse reads a number: as YAML 1.2 does, like all settings."""

    def read(text: str) -> Any:
        try:
            value = parse_yaml(text, "")
            if not isinstance(value, bool) and isinstance(value, int if kind is int else int | float):
                return kind(value)
        except (InputError, OverflowError):
            pass
        raise ValueError

    read.__name__ = kind.__name__  # which argparse names: "invalid int value"
    return read


def bytes_of(text: str) -> int:
    """How argparse reads an amount of memory: 80GB, 0.5 TB, 24GiB."""
    found = re.fullmatch(r"([0-9]+\.?[0-9]*) ?([MGT])(i?)B", text.strip())
    if found is None or not (amount := float(found[1])):
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory; write 80GB, say")
    return int(amount * (1024 if found[3] else 1000) ** " kMGT".index(found[2]))


def path_of(option: str) -> Callable[[str], str]:
    """How argparse reads the path, or the name on the Hub, that an option takes."""
    return lambda text: paths.expand(text, option)


class Parser(argparse.ArgumentParser):
    """argparse that raises mistakes as `InputError`s: one line, without a usage text."""

    def __init__(self, command: Callable[[list[str]], int], add_help: bool = True) -> None:
        name, meaning = f"train-loop {command.__name__}", command.__doc__
        super().__init__(prog=name, description=meaning, add_help=add_help, allow_abbrev=False)
        for action in (None, "store", "store_true"):
            self.register("action", action, _once(self._registry_get("action", action)))

    def error(self, message: str) -> NoReturn:
        """Raise InputError instead of printing and exiting."""
        raise InputError(f"{self.prog}: {message}")
