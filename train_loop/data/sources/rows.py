"""Rows of files, each with its place: .jsonl, .json, .csv, .tsv and .parquet.

Text is text: nothing is guessed, cast, filled in or skipped. What does not follow its format is an InputError that says
where it is and what to do.
"""

import csv
import functools
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from train_loop.data.formats import ROWS_AT_ONCE, refuse_field
from train_loop.disguises import refuse_disguised
from train_loop.errors import InputError, one_line

Rows = Iterator[tuple[str, Any]]  # the place of a row in its file, and the row

_MOST_DIGITS = 4300  # of a whole number, which Python reads
_MOST_BYTES = 1 << 28  # of a file that is read as a whole to explain what is wrong with it
SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
# A cell of RFC 4180 and what ends it. In quotes, a quote is doubled; outside of quotes, there are none.
_CELL = {
    each: re.compile(rf'(?:"[^"]*+(?:""[^"]*+)*+"|[^"{each}\r\n]*+)(?:{re.escape(each)}|\r?\n|\Z)')
    for each in SEPARATORS
}


def not_utf8(name: str, start: int, error: UnicodeDecodeError) -> InputError:
    """The error for bytes that can't be decoded; `start` is where they begin in the file."""
    return InputError(
        f"{name}: not UTF-8 at byte {start + error.start} (value 0x{error.object[error.start]:02x}); "
        "convert the file, e.g. with iconv -f LATIN1 -t UTF-8 if that is what it is"
    )


def lines(path: str) -> Iterator[str]:
    r"""The lines of a file, which end in \n, decoded one by one as strict UTF-8."""
    start = 0
    with open(path, "rb") as file:
        for line in file:
            yield _decode(line, path, start)
            start += len(line)


def _decode(content: bytes, path: str, start: int = 0) -> str:
    """Strict UTF-8; `start` is where `content` begins in the file, in bytes."""
    try:
        text = content.decode("utf-8")
        return text.removeprefix("\ufeff") if start == 0 else text
    except UnicodeDecodeError as error:
        raise not_utf8(path, start, error) from None


def read_jsonl(path: str, text_field: str) -> Rows:
    """One object per line."""
    parse = _json_parser(text_field)
    first = True
    for number, line in enumerate(lines(path), 1):
        if line.strip():
            try:
                row = parse(line.rstrip())
            except (ValueError, RecursionError) as error:
                _refuse_json(error, path, number, _over_lines(path) if first else "")
            first = False
            if isinstance(row, list):
                cure = "one object per line is expected; a file that is a single array is named .json"
                raise InputError(f"{path}: line {number}: an array in place of a row; {cure}")
            yield f"line {number}", row


def read_json(path: str, text_field: str) -> Rows:
    """An array of objects, which is held in memory as a whole; or one object per line, as in .jsonl."""
    with open(path, "rb") as file:
        first = next((line.removeprefix(b"\xef\xbb\xbf").lstrip() for line in file if line.strip()), b"")
    if not first.startswith(b"["):
        found = read_jsonl(path, text_field)
        begin = list(itertools.islice(found, 2))
        if len(begin) == 1 and (where := _holder(begin[0][1], text_field)):
            raise InputError(f"{path}: one object for the whole file; {where}")
        yield from itertools.chain(begin, found)
        return
    try:
        rows = _json_parser(text_field)(_decode(Path(path).read_bytes(), path))
    except (ValueError, RecursionError) as error:
        _refuse_json(error, path, 1)
    yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _json_parser(text_field: str) -> Callable[[str], Any]:
    """Parses a JSON text; ValueError if it isn't one, or if an object has a name of the text field's path twice."""
    wanted = {text_field, *text_field.split(".")}

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            names = [name for name, _ in pairs]
            for name in wanted.intersection(row):
                if names.count(name) > 1:
                    raise _Twice(f"an object has the field {name} {names.count(name)} times; keep one of them")
        return row

    def whole(digits: str) -> float:
        return int(digits) if len(digits) < _MOST_DIGITS else float(digits)

    return json.JSONDecoder(object_pairs_hook=unique, parse_int=whole).decode


class _Twice(ValueError):
    """An object has a field twice."""


def _refuse_json(error: Exception, path: str, line: int, hint: str = "") -> NoReturn:
    """Raise the InputError for a JSON text that begins at a line of the file and can't be read."""
    place = f"line {line}"
    if isinstance(error, json.JSONDecodeError) and not hint:
        place = f"line {line + error.lineno - 1}, column {error.colno}"
        if error.msg == "Extra data":
            rest = error.doc[error.pos :].strip()[:20]
            what = "another value" if rest.startswith(("{", "[", '"')) else repr(rest)
            hint = f"{what} after the end of the first; expected one object per line, or one array in a .json file"
    if isinstance(error, RecursionError):
        hint = "nested too deeply to be read"
    if isinstance(error, _Twice):
        hint = one_line(error)
    said = error.msg if isinstance(error, json.JSONDecodeError) else one_line(error)
    raise InputError(f"{path}: {place}: {hint or f'not valid JSON ({said})'}") from None


def _over_lines(path: str) -> str:
    """If a file begins with a value over several lines: what it is and what to do, in words. Otherwise empty."""
    if os.path.getsize(path) > _MOST_BYTES:
        return ""
    text = "".join(lines(path))
    try:
        value, end = json.JSONDecoder().raw_decode(text, len(text) - len(text.lstrip()))
    except (ValueError, RecursionError):
        return ""
    if "\n" not in text[:end].strip():
        return ""
    if isinstance(value, list):
        return "an array over several lines; name the file .json, or write one object per line, e.g. with jq -c '.[]'"
    where = "" if text[end:].strip() else _holder(value, "")
    return f"an object over several lines; {where or 'write one object per line, e.g. with jq -c .'}"


def _holder(row: Any, text_field: str) -> str:
    """For an object that holds all rows in one of its fields: which one, in words, and what to do. Otherwise empty."""
    if not isinstance(row, dict) or {text_field, text_field.partition(".")[0]} & row.keys():
        return ""
    fields = [name for name, rows in row.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
    return (
        f"its field {fields[0]} holds the rows: write one per line, e.g. with jq -c '.{fields[0]}[]'" if fields else ""
    )


def read_csv(path: str, text_field: str, separator: str = ",") -> Rows:
    """Rows of comma-separated values, by RFC 4180, below a line with the names of the columns."""
    csv.field_size_limit(2**31 - 1)
    record: list[str] = []  # the lines of the record that is being read

    def recorded() -> Iterator[str]:
        for line in lines(path):
            record.append(line)
            yield line

    parsed = csv.reader(recorded(), delimiter=separator, strict=True)
    width = column = number = 0
    while True:
        line = parsed.line_num + 1
        record.clear()
        try:
            cells = next(parsed)
            raw = "".join(record)
            if '"' in raw:  # csv lets quotes stand where RFC 4180 does not
                _refuse_quotes(path, raw, line, separator)
        except StopIteration:
            return
        except csv.Error as error:
            _refuse_quotes(path, "".join(record), line, separator)
            raise InputError(f"{path}: line {line}: not valid CSV ({one_line(error)})") from None
        if not cells:
            continue  # an empty line
        if not width:
            column, width = _column(path, cells, text_field, separator), len(cells)
            continue
        number += 1
        if len(cells) != width:
            kind = SEPARATORS[separator]
            cure = f"a cell with {kind}, quotes or line breaks in it must stand in double quotes"
            raise InputError(f"{path}: line {line}: {len(cells)} cells, but the header has {width}; {cure}")
        yield f"row {number}", {text_field: cells[column]}


def _column(path: str, header: list[str], text_field: str, separator: str) -> int:
    """Which column has the text; InputError if none has, or several."""
    if header.count(text_field) > 1:
        raise InputError(f"{path}: line 1: the header names {text_field} {header.count(text_field)} times")
    if text_field not in header:
        for other, kind in SEPARATORS.items():
            if len(header) == 1 and other in header[0]:
                means = f"{Path(path).suffix or 'the format'} means {SEPARATORS[separator]}"
                named = {"\t": "name the file .tsv", ",": "name the file .csv"}
                cure = named.get(other, f"write it with {SEPARATORS[separator]}")
                found = f"the header's cells seem to be separated by {kind}, but {means}; {cure}"
                raise InputError(f"data.text_field: {path}, line 1: no field {text_field}; {found}")
        refuse_field(dict.fromkeys(header, ""), text_field, f"{path}, line 1 (the header)")
    return header.index(text_field)


def _refuse_quotes(path: str, raw: str, line: int, separator: str) -> None:
    """Raise an InputError if the lines of a record, the first of which is `line`, don't follow RFC 4180."""
    cell, place = _CELL[separator], 0
    while place < len(raw):
        found = cell.match(raw, place)
        if found is None:
            break
        place = found.end()
    else:
        return
    line += raw.count("\n", 0, place)
    if raw[place] != '"':
        end = re.compile(r'["\r]').search(raw, place)
        if end is not None and end.group() == "\r":
            raise InputError(
                f"{path}: line {line}: a carriage return without a line feed; end lines with \\n or \\r\\n"
            )
        cure = 'put the whole cell in double quotes, and write each quote in it twice ("")'
        raise InputError(f"{path}: line {line}: a quote inside a cell that does not begin with one; {cure}")
    closed = re.compile(r'"[^"]*+(?:""[^"]*+)*+"').match(raw, place)
    if closed is None:
        raise InputError(f"{path}: line {line}: a quote opens here and never closes; close it")
    begun = f", which began in line {line}" if "\n" in closed.group() else ""
    line += closed.group().count("\n")
    cure = 'write a quote inside a cell twice ("")'
    raise InputError(f"{path}: line {line}: text after the closing quote of a cell{begun}; {cure}, or close the cell")


def read_parquet(path: str, text_field: str) -> Rows:
    """The rows of a Parquet file, of which only the text's column is read."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            top = text_field if text_field in names else text_field.partition(".")[0]
            if names.count(top) != 1:
                if top in names:
                    raise InputError(f"{path}: {names.count(top)} columns are named {top}")
                refuse_field(_example(file.schema_arrow), text_field, path)
            number = 0
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=[top]):
                for value in batch.column(0):
                    number += 1
                    try:
                        row = {top: value.as_py()}
                    except UnicodeDecodeError as error:
                        raise InputError(f"{path}, row {number}: not UTF-8 ({one_line(error)})") from None
                    yield f"row {number}", row
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InputError(f"{path}: not valid Parquet ({one_line(error)}); make or download it again") from None


def _example(schema: Any) -> dict[str, Any]:
    """What a row of this Arrow schema looks like, for the names of its fields."""
    from pyarrow import types

    def value(kind: Any) -> Any:
        if types.is_struct(kind):
            return {field.name: value(field.type) for field in kind}
        return [value(kind.value_type)] if types.is_list(kind) or types.is_large_list(kind) else ""

    return {field.name: value(field.type) for field in schema}


READERS: dict[str, Callable[[str, str], Rows]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": functools.partial(read_csv, separator="\t"),
    ".parquet": read_parquet,
}


def rows(path: str, text_field: str, suffix: str, read: Callable[[str, str], Rows] | None = None) -> Rows:
    """The rows of a file of the kind that has this suffix, by its reader or another; InputError where that fails."""
    try:
        refuse_disguised(path, suffix, path)
        yield from (read or READERS[suffix])(path, text_field)
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: str, error: OSError) -> InputError:
    """The error for a file that the system can't read."""
    reason = one_line(error) if error.errno is None else error.strerror
    return InputError(f"{path}: cannot be read ({reason})")
