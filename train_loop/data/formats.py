"""What a row of a source holds: a document, with its name and its text."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from train_loop.config.parsing import nearest
from train_loop.errors import InputError

ROWS_AT_ONCE = 100  # rows that are read at once from Parquet or from the Hub


class Document(NamedTuple):
    """One document: where it was found, and its text in blocks, which may be read from a file on demand."""

    name: str
    blocks: Iterable[str]

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.blocks)


def text_of(row: Any, text_field: str, join: str, place: str) -> str:
    """The text at a dotted path of a row. The strings of a list are joined; null counts as no text.

    Raises InputError if the row lacks the field (the message names those that it has), or if the field holds no text.
    """
    values = [row]
    listed = False
    for name in text_field.split("."):
        found: list[Any] = []
        for value in values:
            if isinstance(value, list):  # a list of records: take the field of each one
                listed = True
                found.extend(record.get(name) if isinstance(record, dict) else None for record in value)
            elif isinstance(value, dict) and name in value:
                found.append(value[name])
            elif value is not None:
                refuse_field(row, text_field, place)
        values = found
    if len(values) == 1 and isinstance(values[0], list):
        values, listed = values[0], True
    texts = [value for value in values if value is not None]
    for value in texts:
        if not isinstance(value, str):
            raise InputError(f"{place}: field {text_field} holds a {type(value).__name__}, expected text")
    return join.join(texts) if listed else "".join(texts)


def refuse_field(row: Any, text_field: str, place: str) -> None:
    """Raise an InputError that says that the row lacks the field, and names the fields that it has."""
    fields = list(_paths(row))
    raise InputError(f"data.text_field: {place}: no field {text_field}; {nearest(text_field, fields)}")


def _paths(row: Any, prefix: str = "") -> Iterator[str]:
    """The dotted paths of a row's fields."""
    if isinstance(row, list):
        row = row[0] if row else {}
    if not isinstance(row, dict):
        return
    for name, value in row.items():
        inner = list(_paths(value, f"{prefix}{name}."))
        yield from inner or [f"{prefix}{name}"]
