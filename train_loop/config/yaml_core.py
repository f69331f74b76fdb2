"""YAML as it is meant: the core schema of YAML 1.2, no key twice, and nothing that takes much memory or runs code.

`010` is ten, `0o10` eight, `1:30`, `1_000` and `no` are text (https://yaml.org/spec/1.2.2/, section 10.3.2). PyYAML
reads YAML 1.1, in which they are 8, text, 90, 1000 and false. Merge keys (`<<`) are kept from there.
"""

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from train_loop.errors import InputError

_MOST_BYTES, _MOST_NODES, _DEEPEST = 1 << 20, 30_000, 50  # of a file; of a text, with each alias written out
_TAG = "tag:yaml.org,2002:"
_PLAIN = {  # what an unquoted word is; anything else is text
    "null": (r"~|null|Null|NULL|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "merge": (r"<<", "<"),
}
_PATTERNS = {name: re.compile(rf"(?:{pattern})\Z") for name, (pattern, _) in _PLAIN.items()}


class WrittenInt(int):
    """A whole number that was `written` in another way than Python would: 007, 0x10, +1."""

    written: str


class WrittenFloat(float):
    """A number that was `written` in another way than Python would: 1e3, .5, 1.50."""

    written: str


class _Loader(yaml.SafeLoader):
    """Composes and constructs what the core schema knows. Errors are YAMLErrors, most of them with a place."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (PyYAML's own way)
    yaml_constructors: ClassVar[dict[Any, Any]] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0
        self._sizes: dict[str, int] = {}  # of what has an anchor, in nodes

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node and all below it, unless there are too many, or one key twice."""
        event = self.peek_event()
        alias, before = isinstance(event, yaml.AliasEvent), self._nodes
        if alias and event.anchor in self.anchors:
            if event.anchor not in self._sizes:
                raise _error(event, f"the alias *{event.anchor} stands within what it repeats")
            self._nodes += self._sizes[event.anchor]
        self._nodes, self._depth = self._nodes + 1, self._depth + 1
        if self._depth > _DEEPEST:
            raise _error(event, f"nested more than {_DEEPEST} levels deep")
        if self._nodes > _MOST_NODES:
            raise _error(event, f"more than {_MOST_NODES:,} values, with aliases written out")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if not alias and event.anchor is not None:
            self._sizes[event.anchor] = self._nodes - before
        if not alias and isinstance(node, yaml.MappingNode):
            self._refuse_repeats(node)
        return node

    def _refuse_repeats(self, mapping: yaml.MappingNode) -> None:
        lines: dict[Any, int] = {}
        for key, _ in mapping.value:
            if isinstance(key, yaml.ScalarNode):
                merges = key.tag == f"{_TAG}merge"
                value = ("<<",) if merges else self.construct_object(key)
                line = key.start_mark.line + 1
                if value in lines:
                    raise _error(key, f"{key.value} is given twice, first in line {lines[value]}; drop one of the two")
                lines[value] = line

    def scalar(self, node: Any) -> Any:
        """The value of a word, by its tag."""
        kind, text = node.tag.removeprefix(_TAG), self.construct_scalar(node)
        if kind in ("str", "merge"):
            if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise _error(node, "half a surrogate pair is no character")
            return text
        if not (_PATTERNS[kind].match(text) or (kind == "float" and _PATTERNS["int"].match(text))):
            raise _error(node, f"{text!r} is no {kind}")
        if kind in ("null", "bool"):
            return None if kind == "null" else text.lower() == "true"
        if kind == "float":
            return _written(WrittenFloat(text.lower().replace(".inf", "inf").replace(".nan", "nan")), text)
        try:
            return _written(WrittenInt(int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))), text)
        except ValueError:
            raise _error(node, f"a number of {len(text):,} digits") from None

    def refuse(self, node: Any) -> Any:
        """Raise the error for a tag that the core schema lacks."""
        raise _error(node, f"unknown tag {node.tag.replace(_TAG, '!!')}")


def _error(place: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


def _written(number: Any, text: str) -> Any:
    """A number; with its text, if that is not what Python would write."""
    plain = number.__class__.__base__(number)
    if str(plain) == text:
        return plain
    number.written = text
    return number


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would take for something else."""


for _name, (_, _first) in _PLAIN.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{_TAG}{_name}", _PATTERNS[_name], [*_first, *[""][: _name == "null"]])
    _Loader.add_constructor(f"{_TAG}{_name}", _Loader.scalar)
_Loader.add_constructor(f"{_TAG}str", _Loader.scalar)
_Loader.yaml_constructors |= {f"{_TAG}map": _Loader.construct_yaml_map, f"{_TAG}seq": _Loader.construct_yaml_seq}
_Loader.add_constructor(None, _Loader.refuse)
_Dumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar(f"{_TAG}str", text, None if text.isprintable() else '"')
)


def parse_yaml(text: str, where: str) -> Any:
    """YAML 1.2 text as plain values; an InputError gives `where`, line and column of a mistake.

    A number that is written in an unusual way is a `WrittenInt` or a `WrittenFloat`; see `as_python`.
    """
    if len(text) > _MOST_BYTES:
        raise InputError(f"{where}{len(text):,} characters; settings have at most {_MOST_BYTES:,}")
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except yaml.reader.ReaderError as error:
        place = f"line {text.count(chr(10), 0, error.position) + 1}: "
        raise InputError(f"{where}{place}not valid YAML (the character U+{ord(text[error.position]):04X})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        parts = (getattr(error, "context", None), getattr(error, "problem", None) or str(error))
        raise InputError(f"{where}{place}not valid YAML ({', '.join(filter(None, parts))})") from None
    except (ValueError, OverflowError) as error:  # "\UFFFFFFFF"
        place = "" if loader is None else f"line {loader.line + 1}: "
        raise InputError(f"{where}{place}not valid YAML ({error})") from None


def as_python(value: Any) -> Any:
    """A value from `parse_yaml` with Python's own numbers."""
    if isinstance(value, dict):
        return {as_python(key): as_python(each) for key, each in value.items()}
    if isinstance(value, list):
        return [as_python(each) for each in value]
    return int(value) if isinstance(value, WrittenInt) else float(value) if isinstance(value, WrittenFloat) else value


def dump_yaml(values: dict[str, Any]) -> str:
    """Plain values as YAML that `parse_yaml` reads back unchanged."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_yaml(path: str) -> dict[str, Any]:
    """The sections of a YAML file; InputError if it cannot be read or has no sections."""
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)  # no more of what has no end, such as /dev/zero
    except OSError as error:
        raise InputError(f"--config {path}: cannot be read ({error.strerror})") from None
    if len(content) > _MOST_BYTES:
        raise InputError(f"--config {path}: larger than {_MOST_BYTES:,} bytes, so it is no file of settings")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"--config {path}: UTF-16, which settings cannot be; save the file as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"--config {path}: not UTF-8 at byte {error.start}") from None
    values = parse_yaml(text, f"{Path(path)}: ")
    if not isinstance(values, dict | None):
        raise InputError(f"{path}: expected sections such as `run:` and `data:`, found a {type(values).__name__}")
    return values or {}
