"""Read the documents of one file, one after another: lines, rows or records, or the whole text.

Nothing here holds more of a file than one record, or one batch of rows.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from moe_shard.config.keys import shown
from moe_shard.data.example_records import example_texts
from moe_shard.data.formats import DECODING, FileFormat, needed, open_bytes
from moe_shard.errors import UserError, first_line

MOST_RECORD_BYTES = 1 << 29
"""Longest line, or value of JSON, that is read as one record."""
_PIECE_CHARS = 1 << 20
_ROWS = 256
_BETWEEN = re.compile(r"[ \t\r\n,]*")


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


def read_records(path: Path, form: FileFormat, column: str, encoding: str) -> Iterator[Read]:
    """Yield what is in a file, in order.

    Args:
        path: the file.
        form: what it is.
        column: field of a record that holds its text.
        encoding: codec of bytes that are not UTF-8; empty: there must be none in records, and in
            text they become U+FFFD.

    Raises:
        UserError: a library that reads the file is not installed.
    """
    readers = {
        "text": _text,
        "jsonl": _lines,
        "json": _values,
        "csv": _csv,
        "parquet": _parquet,
        "arrow": _arrow,
        "arrayrecord": _array_records,
    }
    place = "its start"
    errors: tuple[type[Exception], ...] = DECODING
    if form.kind in ("parquet", "arrow"):
        errors = (*DECODING, needed("pyarrow", str(path)).ArrowException)
    try:
        for item in readers[form.kind](path, form, column, encoding):
            place = f"after {item.where}" if isinstance(item, Problem | NoText) else "on the way"
            yield item
    except UserError:
        raise
    except errors as error:
        yield Problem(place, f"the file is damaged: {shown(first_line(error))}", rest=True)


def _decoded(content: bytes, encoding: str) -> str:
    """Decode UTF-8, or what is not in the codec `encoding` if there is one.

    Raises:
        UnicodeDecodeError: it is in neither.
    """
    try:
        return content.decode()
    except UnicodeDecodeError:
        if not encoding:
            raise
        return content.decode(encoding)


def utf8(text: str) -> bytes:
    """Encode text; halves of surrogate pairs, which JSON can hold, become U+FFFD."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def _is_utf8(path: Path, form: FileFormat) -> bool:
    check = codecs.getincrementaldecoder("utf-8")()
    with open_bytes(path, form.compression) as file:
        try:
            while content := file.read(_PIECE_CHARS):
                check.decode(content)
            check.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True


def _chars(path: Path, form: FileFormat, encoding: str) -> IO[str]:
    """Open a file as text, in the codec of its mark, UTF-8, or else `encoding`."""
    codec = "utf-8-sig" if form.encoding in ("", "utf-8") else form.encoding
    if encoding and not form.encoding and not _is_utf8(path, form):
        codec = encoding
    file = open_bytes(path, form.compression)
    return io.TextIOWrapper(file, codec, errors="replace", newline="")


def _text(path: Path, form: FileFormat, _: str, encoding: str) -> Iterator[Read]:
    empty = True
    with _chars(path, form, encoding) as file:
        while text := file.read(_PIECE_CHARS):
            empty = False
            yield DocumentPiece(utf8(text), ends=False)
    yield NoText("the file") if empty else DocumentPiece(b"")


def _raw_lines(path: Path, form: FileFormat) -> Iterator[tuple[int, bytes]]:
    """Yield lines that are not blank, with their numbers, in UTF-8 where a mark tells the codec."""
    if form.encoding in ("utf-16", "utf-32"):
        with _chars(path, form, "") as text:
            for number, line in enumerate(iter(lambda: text.readline(MOST_RECORD_BYTES), ""), 1):
                if line.strip():
                    yield number, utf8(line)
        return
    with open_bytes(path, form.compression) as file:
        for number, raw in enumerate(iter(lambda: file.readline(MOST_RECORD_BYTES), b""), 1):
            content = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            if content.strip():
                yield number, content


def _lines(path: Path, form: FileFormat, column: str, encoding: str) -> Iterator[Read]:
    for number, content in _raw_lines(path, form):
        where = f"line {number}"
        try:
            value = json.loads(_decoded(content, encoding))
        except UnicodeDecodeError as error:
            yield Problem(where, f"not UTF-8: byte {error.start} of the line")
        except (ValueError, RecursionError) as error:
            yield Problem(where, f"not JSON: {shown(first_line(error))}")
        else:
            yield _field(value, column, where)


def _field(value: Any, column: str, where: str) -> Read:
    """Return the text of a JSON record."""
    if not isinstance(value, dict):
        return Problem(where, f"{_kind_of(value)}, not an object with fields")
    if column not in value:
        return Problem(where, f"no field {shown(column)}", fields=tuple(value)[:20])
    return _text_of(value[column], column, where, tuple(value)[:20])


def _text_of(text: Any, column: str, where: str, fields: tuple[str, ...] = ()) -> Read:
    if text is None or text == "":
        return NoText(where)
    if isinstance(text, str):
        return DocumentPiece(utf8(text))
    return Problem(where, f"{shown(column)} is {_kind_of(text)}, not text", fields)


def _kind_of(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return kinds.get(type(value), "null" if value is None else "a number")


def _values(path: Path, form: FileFormat, column: str, encoding: str) -> Iterator[Read]:
    """Read a .json file: JSON Lines, values one after another, or one list of them."""
    for _, first in _raw_lines(path, form):
        try:
            is_line = isinstance(json.loads(_decoded(first, encoding)), dict)
        except (ValueError, RecursionError):
            is_line = False
        if is_line:
            yield from _lines(path, form, column, encoding)
            return
        break
    for number, value in enumerate(_json_values(path, form, encoding), 1):
        where = f"record {number}"
        yield value if isinstance(value, Problem) else _field(value[0], column, where)


def _json_values(path: Path, form: FileFormat, encoding: str) -> Iterator[tuple[Any] | Problem]:
    """Yield the values of a list, or values one after another, each as a tuple of one."""
    decode = json.JSONDecoder().raw_decode
    with _chars(path, form, encoding) as file:
        text = ""
        while not text and (content := file.read(_PIECE_CHARS)):
            text = content.lstrip()
        listed = text.startswith("[")
        at, done, more = int(listed), 0, True
        while True:
            at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]  # it may be empty
            if listed and text.startswith("]", at):
                return
            problem, value = "the list has no end", None
            try:
                value, end = decode(text, at) if at < len(text) else (None, -1)
            except (ValueError, RecursionError) as error:
                end, problem = -1, f"not JSON: {shown(first_line(error))}"
            # A number may go on behind what was read so far.
            if end >= 0 and (end < len(text) or isinstance(value, dict | list | str) or not more):
                yield (value,)
                at, done = end, done + 1
                continue
            if more and len(text) - at < MOST_RECORD_BYTES:
                content = file.read(max(_PIECE_CHARS, len(text) - at))
                text, at, more = text[at:] + content, 0, content != ""
                continue
            if listed or at < len(text):
                yield Problem(f"record {done + 1}", problem, rest=True)
            return


def _csv(path: Path, form: FileFormat, column: str, encoding: str) -> Iterator[Read]:
    csv.field_size_limit(MOST_RECORD_BYTES)
    with _chars(path, form, encoding) as file:
        tabs = any(ending == ".tsv" for ending in path.suffixes)
        rows = csv.reader(file, delimiter="\t" if tabs else ",")
        try:
            names = next(rows, [])
            if column not in names:
                yield Problem("line 1", f"no column {shown(column)}", tuple(names)[:20], rest=True)
                return
            at = names.index(column)
            for row in rows:
                where = f"line {rows.line_num}"
                if row and len(row) != len(names):
                    what = f"{len(row)} fields under a head of {len(names)}"
                    yield Problem(where, what)
                elif row:
                    yield _text_of(row[at], column, where)
        except csv.Error as error:
            yield Problem(f"line {rows.line_num}", first_line(error), rest=True)


def _parquet(path: Path, _: FileFormat, column: str, __: str) -> Iterator[Read]:
    parquet = needed("pyarrow.parquet", str(path))
    # Without pre_buffer no more of a row group is held than the pages being read.
    with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
        if problem := _schema_problem(file.schema_arrow, column):
            yield problem
            return
        row = 0
        for batch in file.iter_batches(_ROWS, columns=[column], use_threads=False):
            yield from _column(batch.column(0), column, row)
            row += batch.num_rows


def _arrow(path: Path, _: FileFormat, column: str, __: str) -> Iterator[Read]:
    arrow = needed("pyarrow", str(path))
    ipc = needed("pyarrow.ipc", str(path))
    with arrow.memory_map(str(path)) as source:
        try:
            reader = ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        except arrow.ArrowInvalid:
            source.seek(0)
            reader = ipc.open_stream(source)
            batches = iter(reader)
        if problem := _schema_problem(reader.schema, column):
            yield problem
            return
        row = 0
        for batch in batches:
            for first in range(0, batch.num_rows, _ROWS):
                yield from _column(batch.column(column).slice(first, _ROWS), column, row)
                row += min(_ROWS, batch.num_rows - first)


def _schema_problem(schema: Any, column: str) -> Problem | None:
    """Return what is wrong with a table that has no text in the column."""
    names = tuple(schema.names)
    if column not in names:
        what = f"no column {shown(column)}"
    else:
        kind = str(schema.field(column).type)
        nested = "list" in kind or kind.startswith(("struct", "map"))
        if not nested and ("string" in kind or "binary" in kind or kind == "null"):
            return None
        what = f"column {shown(column)} is {kind}, not text"
    return Problem("its schema", what, names[:20], rest=True)


def _column(array: Any, column: str, first: int) -> Iterator[Read]:
    for number, value in enumerate(array.to_pylist(), first):
        where = f"row {number}"
        if isinstance(value, bytes):
            try:
                value = value.decode()
            except UnicodeDecodeError:
                yield Problem(where, f"{shown(column)} is bytes that are not UTF-8")
                continue
        yield _text_of(value, column, where)


def _array_records(path: Path, _: FileFormat, column: str, __: str) -> Iterator[Read]:
    library = needed("array_record.python.array_record_module", str(path))
    try:
        reader = library.ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
    except RuntimeError as error:
        yield Problem("its start", f"the file is damaged: {shown(first_line(error))}", rest=True)
        return
    try:
        for number in range(reader.num_records()):
            where = f"record {number}"
            try:
                content = reader.read()
            except RuntimeError as error:
                yield Problem(where, f"damaged: {shown(first_line(error))}", rest=True)
                return
            fields = example_texts(content)
            if fields is None:
                try:
                    yield DocumentPiece(content) if content.decode() else NoText(where)
                except UnicodeDecodeError:
                    yield Problem(where, "neither text nor a tf.train.Example")
            elif column not in fields:
                yield Problem(where, f"no field {shown(column)}", tuple(fields)[:20])
            else:
                yield _text_of(fields[column], column, where)
    finally:
        reader.close()
