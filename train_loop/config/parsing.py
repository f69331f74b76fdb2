"""Fill nested dataclasses from YAML and from the command line, and name every mistake.

The dataclasses (`config/schema.py`) are the only description of the settings. Values are checked against their types,
and their docstrings are the help.
"""

import dataclasses
import difflib
import inspect
import keyword
import re
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from train_loop.config.yaml_core import WrittenFloat, WrittenInt, as_python, parse_yaml
from train_loop.errors import InputError


class Range(NamedTuple):
    """A condition on a number: in words for the error message, and as a test.

    Numbers that are not 0 and whose size is not from `least` to `most` can't be meant, and would not fit later.
    """

    words: str
    holds: Callable[[float], bool]
    least: float = 0
    most: float = 2**53  # the last whole number that every program that reads JSON can read


class _AbsurdError(InputError):
    """A number of the right kind that can't be meant."""


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]B)?", re.ASCII | re.IGNORECASE)
_OPTION = re.compile(r"--(config|[a-z]+\.[\w.]+)(=|\Z)", re.ASCII)


def split_arguments(arguments: Sequence[str]) -> tuple[str | None, list[tuple[str, str]]]:
    """`--config FILE --a.b 1 --c.d=2` -> (FILE, [("a.b", "1"), ("c.d", "2")])."""
    given: dict[str, str] = {}
    queue = iter(arguments)
    for argument in queue:
        if not argument.startswith("--"):
            raise InputError(f"command line: unexpected {argument!r}; write settings as --section.key value")
        option, equals, value = argument.removeprefix("--").partition("=")
        if not equals:
            following = next(queue, None)
            if following is None or _OPTION.match(following):
                raise InputError(f"command line: --{option} needs a value")
            value = following
        if option in given:
            cure = "give one of them; a list is one value: '[a, b]'"
            raise InputError(f"command line: --{option} is given twice, as {given[option]!r} and {value!r}; {cure}")
        for other in given:
            if other.startswith(f"{option}."):
                raise InputError(f"command line: --{option} would undo --{other}, which stands before it; swap them")
        given[option] = value
    return given.pop("config", None), list(given.items())


def keys(cls: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted name and type of every setting: ("optimizer.learning_rate", float), ..."""
    for each in dataclasses.fields(cls):
        if dataclasses.is_dataclass(each.type):
            yield from keys(each.type, f"{prefix}{each.name}.")
        else:
            yield f"{prefix}{key_of(each.name)}", each.type


def key_of(field: str) -> str:
    """The key of a field: the field `from_` has the key `from`, which is a keyword in Python."""
    return field.removesuffix("_")


def _field_of(key: str) -> str:
    """The field of a key; see `key_of`."""
    return f"{key}_" if keyword.iskeyword(key) else key


def nearest(name: str, valid: Sequence[str]) -> str:
    """`did you mean X?` for the valid name nearest to `name`; if none is close, all valid names."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"valid here: {', '.join(valid)}"


def fill(settings: Any, values: dict[str, Any], where: str, prefix: str = "", root: Any = None) -> None:
    """Set the fields of a dataclass from a mapping, section by section.

    Raises InputError for an unknown key (and names the nearest one) or a wrong type; `where` says in which file.
    """
    root = root or type(settings)
    kinds = {key_of(each.name): each.type for each in dataclasses.fields(settings)}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in kinds:
            elsewhere = [other for other, _ in keys(root) if other.endswith(f".{name}")]
            hint = f"did you mean {elsewhere[0]}?" if len(elsewhere) == 1 else nearest(str(name), list(kinds))
            raise InputError(f"{where}unknown key {key}; {hint}")
        if not dataclasses.is_dataclass(kinds[name]):
            setattr(settings, _field_of(name), _convert(value, kinds[name], f"{where}{key}"))
        elif isinstance(value, dict):
            fill(getattr(settings, name), value, where, f"{key}.", root)
        elif value is not None:
            raise InputError(f"{where}{key} is a section; expected `{name}:` with keys below it")


def override(settings: Any, key: str, text: str) -> None:
    """Set the setting with a dotted name to what was typed on the command line; raises InputError as `fill` does."""
    where = f"command line: --{key}"
    kinds = dict(keys(type(settings)))
    section_name, _, name = key.partition(".")
    mapping, _, entry = name.partition(".")
    if entry and dict in _plain_types(kinds.get(f"{section_name}.{mapping}")):  # an entry of a mapping
        section = getattr(settings, section_name)
        setattr(section, mapping, (getattr(section, mapping) or {}) | {entry: as_python(_typed(text, where))})
        return
    if key not in kinds:
        raise InputError(f"command line: unknown option --{key}; {nearest(key, list(kinds))}")
    plain = _plain_types(kinds[key])
    # Text stays as it was typed (YAML would read "def f(x):" as a mapping). Everything else is a YAML value.
    is_text = str in plain and text != "null" and dict not in plain and not (list in plain and text.startswith("["))
    value = text if is_text else _typed(text, where)
    setattr(getattr(settings, section_name), _field_of(name), _convert(value, kinds[key], where))


def _typed(text: str, where: str) -> Any:
    """The YAML value of what was typed."""
    if not text.strip():
        raise InputError(f"{where} needs a value; for none, say null")
    return parse_yaml(text, f"{where}: ")


def _plain_types(kind: Any) -> set[Any]:
    """The plain types in a type: {list, str} of list[str], {int, "epoch" literal's str} of int | Literal[...]."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (None, dict, tuple, Literal):
        return {origin or kind}
    plain = set().union(*map(_plain_types, inner[:1] if origin is Annotated else inner))
    return plain | {list} if origin is list else plain


def _convert(value: Any, kind: Any, where: str) -> Any:
    """`value` as the type `kind`. A whole number also passes as a float, and a string as a list of strings.

    A number passes as text as well, as it was written.
    """
    problem = InputError(f"{where}: expected {describe(kind)}, got {_shown(value)}")
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        for each in inner:
            try:
                return _convert(value, each, where)
            except _AbsurdError:
                raise
            except InputError:
                continue
    elif origin is Annotated:
        try:
            number = _convert(value, inner[0], where)
        except InputError:
            raise problem from None
        if inner[1].holds(number):
            return _sensible(number, inner[1], where)
    elif (origin is Literal and value in inner) or (kind is types.NoneType and value is None):
        return value
    elif origin is list and isinstance(value, list | tuple | str):
        return [_convert(each, inner[0], where) for each in ([value] if isinstance(value, str) else value)]
    elif origin is tuple and isinstance(value, list | tuple) and len(value) == len(inner):
        return tuple(_convert(each, type_, where) for each, type_ in zip(value, inner, strict=True))
    elif isinstance(value, bool) or kind is bool:  # Python takes True for the number 1
        if isinstance(value, bool) and kind is bool:
            return value
    elif kind is int and (isinstance(value, int) or (isinstance(value, float) and value.is_integer())):
        return int(value)
    elif kind is float and isinstance(value, int | float):
        try:
            return float(value)
        except OverflowError:
            raise problem from None
    elif kind is str and isinstance(value, WrittenInt | WrittenFloat):
        return value.written
    elif kind is str and isinstance(value, int | float):
        try:
            return str(value)
        except ValueError:  # more than 4,300 digits
            raise problem from None
    elif kind is str and isinstance(value, str):
        if value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value):
            return value
        raise InputError(f"{where}: {value!a} is not UTF-8")
    elif origin is dict and isinstance(value, dict):
        return as_python(value)
    raise problem


def _sensible(number: float, allowed: Range, where: str) -> float:
    """The number, unless it is so large or so small that it can't be meant."""
    if number and abs(number) > allowed.most:
        raise _AbsurdError(f"{where}: {_shown(number)} is too large; at most {allowed.most:,}")
    if number and abs(number) < allowed.least:
        raise _AbsurdError(f"{where}: {_shown(number)} is too small; at least {allowed.least:,}")
    return number


def _shown(value: Any) -> str:
    """A value for a message."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number with more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 100 else f"{text[:100]}..."


def describe(kind: Any) -> str:
    """A type in words: `an integer > 0, or epoch`."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return ", or ".join(describe(each) for each in inner)
    if origin is Annotated:
        return f"{describe(inner[0])} {inner[1].words}"
    if origin is Literal:
        return " | ".join(str(each) for each in inner)
    if origin is list:
        return f"a list of {describe(inner[0])}"
    if origin is tuple:
        return f"a list of {len(inner)}: {', '.join(describe(each) for each in inner)}"
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text", types.NoneType: "null"}
    return names.get(kind, "a mapping")


def bytes_of(text: str, where: str = "a size") -> int:
    """A size as Transformers takes it, in bytes: 5GB, 500MB, 0.5 tb (powers of 1,000), or a number of bytes.

    InputError, which begins with `where`, for anything else.
    """
    found = _SIZE.fullmatch(text.strip())
    size = int(float(found[1]) * _UNITS[(found[2] or "").upper()]) if found else 0
    if size < 1:
        raise InputError(f"{where}: expected a size such as 5GB or 500MB (TB, GB, MB, KB), got {_shown(text)}")
    return size


def documented(cls: Any) -> tuple[str, dict[str, str]]:
    """What a dataclass's docstring says about it, and about each of its fields, by name."""
    summary, _, described = (inspect.getdoc(cls) or "").partition("Args:")  # unindented, as from Python 3.13 on
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", described, re.MULTILINE)
    return " ".join(summary.split()), {name: " ".join(meaning.split()) for name, meaning in found}


def help_text(cls: Any) -> str:
    """Every setting with its type, default and meaning, from the dataclasses and their docstrings."""
    lines = []
    for section in dataclasses.fields(cls):
        kind: Any = section.type
        summary, meanings = documented(kind)
        lines.append(f"\n{section.name}: {summary}")
        for each in dataclasses.fields(kind):
            default = getattr(kind(), each.name)
            shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
            lines.append(f"  --{section.name}.{key_of(each.name)}  ({describe(each.type)}; default {shown})")
            lines.append(f"      {meanings[key_of(each.name)]}")
    return "\n".join(lines)
