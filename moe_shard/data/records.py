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
from pathlib import Path
from typing import IO, Any

from moe_shard.config.keys import shown
from moe_shard.data.example_records import example_texts
from moe_shard.data.fields import Columns, DocumentPiece, NoText, Problem, Read, utf8
from moe_shard.data.formats import DECODING, FileFormat, needed, open_bytes
from moe_shard.errors import UserError, first_line

MOST_RECORD_BYTES = 1 << 29
"""Longest line, or value of JSON, that is read as one record."""
_PIECE_CHARS = 1 << 20
_ROWS = 256
_BETWEEN = re.compile(r"[ \t\r\n,]*")


def read_records(path: Path, form: FileFormat, columns: Columns, encoding: str) -> Iterator[Read]:
    """Yield what is in a file, in order.

    Args:
        path: the file.
        form: what it is.
        columns: what is taken from a record.
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
        for item in readers[form.kind](path, form, columns, encoding):
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


def _text(path: Path, form: FileFormat, _: Columns, encoding: str) -> Iterator[Read]:
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


def _lines(path: Path, form: FileFormat, columns: Columns, encoding: str) -> Iterator[Read]:
    for number, content in _raw_lines(path, form):
        where = f"line {number}"
        try:
            value = json.loads(_decoded(content, encoding))
        except UnicodeDecodeError as error:
            yield Problem(where, f"not UTF-8: byte {error.start} of the line")
        except (ValueError, RecursionError) as error:
            yield Problem(where, f"not JSON: {shown(first_line(error))}")
        else:
            yield columns.read(value, where)


def _values(path: Path, form: FileFormat, columns: Columns, encoding: str) -> Iterator[Read]:
    """Read a .json file: JSON Lines, values one after another, or one list of them."""
    for _, first in _raw_lines(path, form):
        try:
            is_line = isinstance(json.loads(_decoded(first, encoding)), dict)
        except (ValueError, RecursionError):
            is_line = False
        if is_line:
            yield from _lines(path, form, columns, encoding)
            return
        break
    for number, value in enumerate(_json_values(path, form, encoding), 1):
        where = f"record {number}"
        yield value if isinstance(value, Problem) else columns.read(value[0], where)


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


def _csv(path: Path, form: FileFormat, columns: Columns, encoding: str) -> Iterator[Read]:
    csv.field_size_limit(MOST_RECORD_BYTES)
    with _chars(path, form, encoding) as file:
        tabs = any(ending == ".tsv" for ending in path.suffixes)
        rows = csv.reader(file, delimiter="\t" if tabs else ",")
        try:
            names = next(rows, [])
            chosen = columns.chosen(dict.fromkeys(names, ""))
            if isinstance(chosen, Problem):
                yield Problem("line 1", chosen.what, tuple(names)[:20], rest=True)
                return
            places = {name: names.index(name) for name in chosen}
            for row in rows:
                where = f"line {rows.line_num}"
                if row and len(row) != len(names):
                    what = f"{len(row)} fields under a head of {len(names)}"
                    yield Problem(where, what)
                elif row:
                    yield columns.read({name: row[at] for name, at in places.items()}, where)
        except csv.Error as error:
            yield Problem(f"line {rows.line_num}", first_line(error), rest=True)


def _parquet(path: Path, _: FileFormat, columns: Columns, __: str) -> Iterator[Read]:
    parquet = needed("pyarrow.parquet", str(path))
    # Without pre_buffer no more of a row group is held than the pages being read.
    with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
        chosen = columns.chosen(_types(file.schema_arrow))
        if isinstance(chosen, Problem):
            yield chosen
            return
        row = 0
        for batch in file.iter_batches(_ROWS, columns=[*chosen], use_threads=False):
            yield from _rows(batch, columns, row)
            row += batch.num_rows


def _arrow(path: Path, _: FileFormat, columns: Columns, __: str) -> Iterator[Read]:
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
        chosen = columns.chosen(_types(reader.schema))
        if isinstance(chosen, Problem):
            yield chosen
            return
        row = 0
        for batch in batches:
            for first in range(0, batch.num_rows, _ROWS):
                part = batch.select([*chosen]).slice(first, _ROWS)
                yield from _rows(part, columns, row)
                row += part.num_rows


def _types(schema: Any) -> dict[str, str]:
    return {field.name: str(field.type) for field in schema}


def _rows(batch: Any, columns: Columns, first: int) -> Iterator[Read]:
    for number, record in enumerate(batch.to_pylist(), first):
        yield columns.read(record, f"row {number}")


def _array_records(path: Path, _: FileFormat, columns: Columns, __: str) -> Iterator[Read]:
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
                yield columns.read_whole(content, where)
            else:
                yield columns.read(fields, where)
    finally:
        reader.close()
