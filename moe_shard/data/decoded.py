"""Keep the documents of a file that is not plain text as UTF-8, one behind the other, in a cache.

A compressed file, or one of records, allows no access in any order. It is read once, before the
first step, into a file that does, with an array of where its documents end. Later runs and other
processes reuse it as long as the file, and how it is read, are the same. Memory holds one record,
and 8 bytes a document.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from moe_shard.data.fields import Columns, DocumentPiece, NoText, Problem
from moe_shard.data.formats import FileFormat
from moe_shard.data.long_work import sole_writer
from moe_shard.data.records import read_records
from moe_shard.errors import UserError
from moe_shard.files import cache_folder, new_folder, write_text

_VERSION = 1
_MOST_NAMED = 5


@dataclass
class FileCounts:
    """Count what a file had besides documents.

    Attributes:
        without_text: records whose field is empty or null.
        corrupt: records that were passed over.
        named: the first of these, in words.
        fields: fields of the first record that lacks the one asked for.
        lacking: records that lack it.
    """

    without_text: int = 0
    corrupt: int = 0
    named: list[str] = field(default_factory=list)
    fields: list[str] = field(default_factory=list)
    lacking: int = 0

    def add(self, problem: Problem) -> None:
        """Count one more corrupt record."""
        self.corrupt += 1
        if problem.fields:
            self.lacking += 1
            self.fields = self.fields or list(problem.fields)
        if len(self.named) < _MOST_NAMED:
            self.named.append(f"{problem.where}: {problem.what}")


@dataclass(frozen=True)
class Decoded:
    """Describe the copy of one file.

    Attributes:
        path: its documents in UTF-8, one behind the other.
        ends: where each of them ends, in bytes.
        counts: what else there was.
        key: equal only for equal copies.
    """

    path: Path
    ends: Int64[np.ndarray, "documents"]
    counts: FileCounts
    key: str


class CorruptRecord(Exception):
    """Stop at a record from which no text can be read.

    Args:
        problem: what is wrong with it.
        before: documents before it in the file.
    """

    def __init__(self, problem: Problem, before: int) -> None:
        super().__init__(problem.what)
        self.problem, self.before = problem, before


def text_cache() -> Path:
    """Return where decoded copies are kept, a folder for each."""
    return cache_folder() / "text"


def decode(
    path: Path,
    form: FileFormat,
    *,
    columns: Columns,
    encoding: str,
    skip: bool,
    watch: Callable[[int], object] = lambda _: None,
) -> Decoded:
    """Return the copy of a file, which is made unless an earlier run did.

    Args:
        path: the file.
        form: what it is.
        columns: see `read_records`.
        encoding: see `read_records`.
        skip: count corrupt records instead of stopping at the first.
        watch: receives now and then the bytes of text that are read, if the copy is made.

    Raises:
        CorruptRecord: there is one, and `skip` is false.
        UserError: the cache cannot be written, or a library is missing.
    """
    info = path.stat()
    facts = (
        *(_VERSION, str(path.resolve()), info.st_size, info.st_mtime_ns),
        *(form, columns.key if form.kind != "text" else "", encoding, skip),
    )
    key = hashlib.blake2b(repr(facts).encode("utf-8", "surrogateescape"), digest_size=16)
    folder = text_cache() / key.hexdigest()
    found = _kept(folder)
    if found is None:
        try:
            with sole_writer(folder):
                found = _kept(folder)  # another process may have been faster
                if found is None:
                    _write(folder, path, form, columns, encoding, skip=skip, watch=watch)
                    found = _kept(folder)
        except OSError as error:
            found = _kept(folder)
            if found is None:
                raise UserError(
                    f"cannot keep the text of {path} in {folder.parent}: {error.strerror}\n"
                    "fix: room there, or XDG_CACHE_HOME=FOLDER in the environment, where you may "
                    "write"
                ) from error
    if found is None:
        raise UserError(f"{folder} is incomplete\nfix: remove it; the next run makes it again")
    return found


def _kept(folder: Path) -> Decoded | None:
    """Read a copy; None if it is missing or incomplete."""
    try:
        ends = np.load(folder / "ends.npy")
        counts = FileCounts(**json.loads((folder / "counts.json").read_bytes()))
        whole = os.stat(folder / "text").st_size == (int(ends[-1]) if len(ends) else 0)
    except (OSError, ValueError, EOFError, TypeError):
        return None
    return Decoded(folder / "text", ends, counts, folder.name) if whole else None


def _write(
    folder: Path,
    path: Path,
    form: FileFormat,
    columns: Columns,
    encoding: str,
    *,
    skip: bool,
    watch: Callable[[int], object],
) -> None:
    ends, counts = array("q"), FileCounts()
    end = 0
    shutil.rmtree(folder, ignore_errors=True)  # what is there is damaged
    with new_folder(folder) as aside:
        with open(aside / "text", "wb") as file:
            for item in read_records(path, form, columns, encoding):
                if isinstance(item, DocumentPiece):
                    end += file.write(item.text)
                    watch(end)
                    if item.ends:
                        ends.append(end)
                elif isinstance(item, NoText):
                    counts.without_text += 1
                else:
                    if not skip:
                        raise CorruptRecord(item, len(ends))
                    counts.add(item)
            if end > (ends[-1] if ends else 0):
                ends.append(end)  # a text whose compressed file is cut
        np.save(aside / "ends.npy", np.array(ends, np.int64))
        write_text(aside / "counts.json", json.dumps(asdict(counts)))
