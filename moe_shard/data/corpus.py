"""Read any part of a document's tokens: bytes from the document itself, others from a cache.

The number of tokens in a document is known only after tokenizing it, so a corpus is tokenized once,
before the first step, into a file that allows random access. Later runs and other processes reuse
the file as long as the tokenizer and the documents are the same.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from jaxtyping import Int32, Int64

from moe_shard.data.documents import unreadable
from moe_shard.data.long_work import LongWork, sole_writer
from moe_shard.data.spans import Documents
from moe_shard.errors import UserError
from moe_shard.files import cache_folder, new_folder

PIECE_BYTES = 4 * 2**20
"""Size of the pieces, ending at a line's end, in which longer documents are tokenized."""
_VERSION = b"2"
_TOKEN = np.dtype("<u4")

Say = Callable[[str], object]


class Encoder(Protocol):
    """Define what a corpus needs of a tokenizer; see `Tokenizer` for the attributes."""

    special: frozenset[int]
    digest: bytes

    def encode_texts(self, texts: Sequence[bytes]) -> list[Int32[np.ndarray, "T"]]:
        """Encode texts for training, without marks."""


class Corpus(Protocol):
    """Provide documents as tokens, without marks.

    Attributes:
        lengths: number of tokens of each document.
        num_bytes: size of all documents.
    """

    lengths: Int64[np.ndarray, "documents"]
    num_bytes: int

    def read(self, document: int, offset: int, size: int) -> Int32[np.ndarray, "size"]:
        """Return tokens of a document; many threads may call this at once."""


class ByteCorpus:
    """Use the bytes of documents as tokens, read on demand."""

    def __init__(self, documents: Sequence[Path]) -> None:
        self._documents = Documents.of_files(documents)
        self.lengths = self._documents.length
        self.num_bytes = self._documents.num_bytes

    def read(self, document: int, offset: int, size: int) -> Int32[np.ndarray, "size"]:
        """Return tokens of a document; see `Corpus`.

        Raises:
            UserError: a file was removed or has another size than before.
        """
        of = self._documents
        number = int(of.file[document])
        path, length = of.files[number], int(of.sizes[number])
        text = _read(path, int(of.start[document]) + offset, size, length)
        if text is None:
            raise UserError(
                f"dataset_path: {path} was {length} bytes long at the start of the run and has "
                "changed since\nfix: leave the text alone while it is trained on; start again"
            )
        return np.frombuffer(text, np.uint8).astype(np.int32)


class TokenCorpus:
    """Read tokens of documents from the cache, tokenizing them first unless an earlier run did.

    Args:
        documents: files, from `find_documents`.
        tokenizer: tokenizer of their text.
        say: receives a line about tokenizing, if any was done.

    Raises:
        UserError: a document cannot be read, or the cache cannot be written.
    """

    def __init__(
        self, documents: Sequence[Path], tokenizer: Encoder, *, say: Say = lambda _: None
    ) -> None:
        documents = Documents.of_files(documents)
        folder = corpus_cache() / _key(documents, tokenizer)
        self._file = os.fspath(folder / "tokens")
        found = _lengths(folder)
        if found is None:
            found = _make(documents, tokenizer, folder, say)
        if found is None:
            raise UserError(f"{folder} is incomplete\nfix: remove it; the next run makes it again")
        self.lengths = found
        self.num_bytes = documents.num_bytes
        self._starts = np.cumsum(found) - found
        self._file_size = int(found.sum()) * _TOKEN.itemsize

    def read(self, document: int, offset: int, size: int) -> Int32[np.ndarray, "size"]:
        """Return tokens of a document; see `Corpus`.

        Raises:
            UserError: the cache was removed or has changed.
        """
        first = (int(self._starts[document]) + offset) * _TOKEN.itemsize
        tokens = _read(self._file, first, size * _TOKEN.itemsize, self._file_size)
        if tokens is None:
            raise UserError(
                f"{self._file} has changed since the start of the run\nfix: start again"
            )
        return np.frombuffer(tokens, _TOKEN).astype(np.int32)


def corpus_cache() -> Path:
    """Return where tokens are kept, a folder for each tokenizer and set of documents."""
    return cache_folder() / "tokens"


def _read(path: str, offset: int, size: int, whole: int) -> bytes | None:
    """Read part of a file; return None if the size of the file is no longer `whole`."""
    try:
        # Open the file for each read: no handle to share between threads, pickle or run out of.
        with open(path, "rb") as file:
            changed = os.fstat(file.fileno()).st_size != whole
            file.seek(offset)
            content = file.read(size)
    except OSError as error:
        raise unreadable(path, error) from error
    return None if changed or len(content) != size else content


def _key(documents: Documents, tokenizer: Encoder) -> str:
    """Derive a name from the tokenizer, the content of each file and where the documents are."""
    key = hashlib.blake2b(_VERSION + tokenizer.digest, digest_size=16)
    for file in documents.keys:
        key.update(file.encode())
    for places in (documents.file, documents.start, documents.length):
        key.update(places.tobytes())
    return key.hexdigest()


def _lengths(folder: Path) -> Int64[np.ndarray, "documents"] | None:
    """Read the lengths of the documents in a cache; None if it is missing or incomplete."""
    try:
        lengths = np.load(folder / "lengths.npy")
        whole = os.stat(folder / "tokens").st_size == int(lengths.sum()) * _TOKEN.itemsize
    except (OSError, ValueError, EOFError):
        return None
    return lengths if whole else None


def _make(
    documents: Documents, tokenizer: Encoder, folder: Path, say: Say
) -> Int64[np.ndarray, "documents"] | None:
    """Tokenize documents into a cache, unless another process does; return their lengths.

    Raises:
        UserError: a document cannot be read, or the cache cannot be written.
    """
    try:
        with sole_writer(folder):
            if _lengths(folder) is None:
                _tokenize(documents, tokenizer, folder, say)
    except OSError as error:
        if _lengths(folder) is None:
            raise UserError(
                f"cannot keep tokens in {folder.parent}: {error.strerror}\n"
                "fix: XDG_CACHE_HOME=FOLDER in the environment, where you may write"
            ) from error
    return _lengths(folder)


def _tokenize(documents: Documents, tokenizer: Encoder, folder: Path, say: Say) -> None:
    work = LongWork(say)
    lengths = np.zeros(len(documents), np.int64)
    num_bytes = written = invalid = 0
    special = np.array(sorted(tokenizer.special), np.int32)
    total = documents.num_bytes

    def progress() -> str:
        return f"tokenized {num_bytes / 1e6:,.0f} of {total / 1e6:,.0f} MB so far"

    with new_folder(folder) as aside:
        with open(aside / "tokens", "wb") as file:
            for batch in _batches(documents):
                all_tokens = tokenizer.encode_texts([text for _, text in batch])
                for (document, text), tokens in zip(batch, all_tokens, strict=True):
                    file.write(tokens.astype(_TOKEN).tobytes())
                    lengths[document] += len(tokens)
                    num_bytes += len(text)
                    invalid += not _is_utf8(text)
                written += int(np.isin(np.concatenate(all_tokens), special).sum())
                work.tell(progress)
        np.save(aside / "lengths.npy", lengths)
        if _lengths(folder) is None:  # missing or damaged
            shutil.rmtree(folder, ignore_errors=True)
    marks = f"; {written:,} special tokens were written in the text" if written else ""
    if invalid:
        marks += f"; {invalid:,} documents (or pieces of 4 MiB) are not UTF-8 and have U+FFFD"
    say(
        f"tokenized {num_bytes / 1e6:,.1f} MB to {int(lengths.sum()):,} tokens in "
        f"{work.seconds:.1f} s, kept in {folder}{marks}"
    )


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _batches(documents: Documents) -> Iterator[list[tuple[int, bytes]]]:
    """Yield documents, or pieces of them, with their numbers: batches that keep all cores busy."""
    batch: list[tuple[int, bytes]] = []
    size = 0
    for document, piece in _all_pieces(documents):
        batch.append((document, piece))
        size += len(piece)
        if size >= PIECE_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _all_pieces(documents: Documents) -> Iterator[tuple[int, bytes]]:
    """Yield every document's pieces; neighbours in one file are read with the file open."""
    opened: BinaryIO | None = None
    number = -1
    try:
        for document in range(len(documents)):
            start, length = int(documents.start[document]), int(documents.length[document])
            if documents.file[document] != number or opened is None:
                number = int(documents.file[document])
                if opened:
                    opened.close()
                opened = _open(documents.files[number])
            if length > PIECE_BYTES:
                pieces = _pieces(Path(documents.files[number]), start, start + length)
                yield from ((document, piece) for piece in pieces)
            else:
                opened.seek(start)
                yield document, opened.read(length)
    finally:
        if opened:
            opened.close()


def _open(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise unreadable(path, error) from error


def _pieces(path: Path, start: int = 0, end: int = sys.maxsize) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            file.seek(start)
            while piece := file.read(min(PIECE_BYTES, end - file.tell())):
                # Read to the end of the line; cut an endless line between two characters.
                piece += file.readline(min(PIECE_BYTES, end - file.tell()))
                for _ in range(3):
                    if file.tell() >= end or not _continues(file.peek(1)[:1]):
                        break
                    piece += file.read(1)
                yield piece
    except OSError as error:
        raise unreadable(path, error) from error


def _continues(byte: bytes) -> bool:
    """Tell whether a byte continues a character of UTF-8."""
    return byte != b"" and 0x80 <= byte[0] < 0xC0
