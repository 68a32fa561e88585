"""Say what is taken from a record: the text of one field, for text; see also `conversations`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from moe_shard.config.keys import shown


class DocumentPiece(NamedTuple):
    """Hold part of a document.

    Attributes:
        text: UTF-8.
        ends: whether the document ends with it.
    """

    text: bytes
    ends: bool = True


@dataclass(frozen=True)
class Problem:
    """Describe a record from which no text can be read.

    Attributes:
        where: its place in the file, such as "line 3".
        what: what is wrong.
        fields: names of the record's fields, if the one asked for is missing or no text.
        rest: whether the rest of the file cannot be read either.
    """

    where: str
    what: str
    fields: tuple[str, ...] = ()
    rest: bool = False


class NoText(NamedTuple):
    """Stand for a record whose field is empty or null."""

    where: str


Read = DocumentPiece | Problem | NoText


class Columns(Protocol):
    """Define what is taken from a record.

    Attributes:
        key: text that differs for what differs.
        words: the fields, for people.
    """

    key: str
    words: str

    def chosen(self, types: Mapping[str, str]) -> tuple[str, ...] | Problem:
        """Return the columns of a table that are read.

        Args:
            types: type of each column, in Arrow's words; "" where none is known.
        """

    def read(self, record: Any, where: str) -> Read:
        """Take it from a record, which should be a dict."""

    def read_whole(self, content: bytes, where: str) -> Read:
        """Take it from a record without fields."""


class TextColumn:
    """Take the text in one field.

    Args:
        column: the field.
    """

    def __init__(self, column: str) -> None:
        self.key, self.words = column, shown(column)

    def chosen(self, types: Mapping[str, str]) -> tuple[str, ...] | Problem:
        """Return the column, or what is wrong with a table that has no text in it."""
        kind = types.get(self.key)
        if kind is None:
            what = f"no column {self.words}"
        else:
            nested = "list" in kind or kind.startswith(("struct", "map"))
            if not nested and ("string" in kind or "binary" in kind or kind in ("null", "")):
                return (self.key,)
            what = f"column {self.words} is {kind}, not text"
        return Problem("its schema", what, tuple(types)[:20], rest=True)

    def read(self, record: Any, where: str) -> Read:
        """Return the text of a record."""
        if not isinstance(record, dict):
            return Problem(where, f"{json_kind(record)}, not an object with fields")
        fields = tuple(record)[:20]
        if self.key not in record:
            return Problem(where, f"no field {self.words}", fields=fields)
        text = record[self.key]
        if isinstance(text, bytes):
            try:
                text = text.decode()
            except UnicodeDecodeError:
                return Problem(where, f"{self.words} is bytes that are not UTF-8")
        if text is None or text == "":
            return NoText(where)
        if isinstance(text, str):
            return DocumentPiece(utf8(text))
        return Problem(where, f"{self.words} is {json_kind(text)}, not text", fields)

    def read_whole(self, content: bytes, where: str) -> Read:
        """Return the record, which is the text."""
        try:
            return DocumentPiece(content) if content.decode() else NoText(where)
        except UnicodeDecodeError:
            return Problem(where, "neither text nor a tf.train.Example")


def utf8(text: str) -> bytes:
    """Encode text; halves of surrogate pairs, which JSON can hold, become U+FFFD."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def json_kind(value: Any) -> str:
    """Return the kind of a value of JSON, in words."""
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return kinds.get(type(value), "null" if value is None else "a number")
