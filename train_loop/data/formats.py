"""What a row of a source holds: a document, with its name and its text."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from train_loop.config.parsing import nearest
from train_loop.errors import InputError

ROWS_AT_ONCE = 100  # rows that are read at once from Parquet or from the Hub
_SHOWN_NAMES, _SHOWN_CHARACTERS, _SHOWN_DEPTH = 20, 40, 4  # how much of a row's names an error shows


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

    Raises InputError if the row, or a record of a list in it, lacks the field (the message names those that it has), if
    the field holds no text, or if the text cannot be written as UTF-8.
    """
    values = [row]
    listed = False
    # A field may have dots in its own name, as columns of tables do.
    for name in [text_field] if isinstance(row, dict) and text_field in row else text_field.split("."):
        found: list[Any] = []
        for value in values:
            records = [value]
            if isinstance(value, list) and value is not row:  # a list of records: take the field of each one
                records, listed = value, True
            for record in records:
                if isinstance(record, dict) and name in record:
                    found.append(record[name])
                elif record is not None or row is None:
                    refuse_field(row, text_field, place)
        values = found
    if len(values) == 1 and isinstance(values[0], list):
        values, listed = values[0], True
    texts = [value for value in values if value is not None]
    for value in texts:
        if not isinstance(value, str):
            kind = type(value).__name__
            raise InputError(f"{place}: field {text_field} holds a {kind}, expected text; name another data.text_field")
    return encodable(join.join(texts) if listed else "".join(texts), place)


def encodable(text: str, place: str) -> str:
    r"""The text itself; InputError if it holds half of a surrogate pair (\ud800 to \udfff), which is no character."""
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        code = f"\\u{ord(text[error.start]):04x}"
        reason = f"character {error.start + 1} of the text is {code}, half of a surrogate pair and no character"
        raise InputError(f"{place}: {reason}; remove it, or write the pair that was meant") from None
    return text


def refuse_field(row: Any, text_field: str, place: str) -> None:
    """Raise an InputError that says that the row lacks the field, and names the fields that it has."""
    if not isinstance(row, dict):
        kind = "null" if row is None else f"a {type(row).__name__}"
        hint = f"the row is {kind}, expected an object with named fields"
    elif not row:
        hint = "the row is an empty object"
    else:
        fields = [name[:_SHOWN_CHARACTERS] for name in _paths(row)]
        top = text_field.partition(".")[0]
        if text_field in fields:  # the row has it, but not every record in it
            hint = f"a record in {top} lacks it; write null where there is no text"
        elif row.get(top) is not None and top != text_field and not any(name.startswith(f"{top}.") for name in fields):
            hint = f"{top} holds a {type(row[top]).__name__} without named fields"
        else:
            hint = nearest(text_field, fields[:_SHOWN_NAMES]) + (" ..." if len(fields) > _SHOWN_NAMES else "")
    raise InputError(f"data.text_field: {place}: no field {text_field}; {hint}")


def _paths(row: Any, prefix: str = "", depth: int = _SHOWN_DEPTH) -> Iterator[str]:
    """The dotted paths of a row's fields."""
    if isinstance(row, list):
        row = row[0] if row else {}
    if not isinstance(row, dict) or not depth:
        return
    for name, value in row.items():
        inner = list(_paths(value, f"{prefix}{name}.", depth - 1))
        yield from inner or [f"{prefix}{name}"]
