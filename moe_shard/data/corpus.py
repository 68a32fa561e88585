"""The tokens of documents, to be read from anywhere: of bytes as they lie, of others from a cache.

What a tokenizer makes of a document is known only when it has been made, so a corpus is tokenized
once, before the first step, into a file that is then read as the bytes are. The file is found
again, by the next run or the next process, as long as the tokenizer and the documents are the same.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Int32, Int64

from moe_shard.data.documents import unreadable
from moe_shard.data.tokenizer import Tokenizer
from moe_shard.errors import UserError
from moe_shard.files import cache_folder, new_folder

PIECE_BYTES = 4 * 2**20
"""A longer document is tokenized in pieces of about this size that end with a line."""
_VERSION = b"1"
_TOKEN = np.dtype("<u4")

Say = Callable[[str], object]


class Corpus(Protocol):
    """Documents as tokens, without marks.

    Attributes:
        lengths: tokens of each document.
        num_bytes: of all documents.
    """

    lengths: Int64[np.ndarray, "documents"]
    num_bytes: int

    def read(self, document: int, offset: int, size: int) -> Int32[np.ndarray, "size"]:
        """Tokens of a document; safe from many threads."""


class ByteCorpus:
    """Documents whose bytes are their tokens; nothing is read before it is asked for."""

    def __init__(self, documents: Sequence[Path]) -> None:
        self.paths = tuple(map(os.fspath, documents))
        self.lengths = np.array([os.stat(path).st_size for path in self.paths], np.int64)
        self.num_bytes = int(self.lengths.sum())

    def read(self, document: int, offset: int, size: int) -> Int32[np.ndarray, "size"]:
        """See `Corpus`.

        Raises:
            UserError: a file has gone or changed its size.
        """
        path, length = self.paths[document], int(self.lengths[document])
        text = _read(path, offset, size, length)
        if text is None:
            raise UserError(
                f"dataset_path: {path} was {length} bytes long at the start of the run and has "
                "changed since\nfix: leave the text alone while it is trained on; start again"
            )
        return np.frombuffer(text, np.uint8).astype(np.int32)


class TokenCorpus:
    """Documents tokenized into the cache, now or by an earlier run.

    Args:
        documents: files, from `find_documents`.
        tokenizer: of their text.
        say: told what was done, if it was.

    Raises:
        UserError: a document cannot be read, or the cache cannot be written.
    """

    def __init__(
        self, documents: Sequence[Path], tokenizer: Tokenizer, *, say: Say = lambda _: None
    ) -> None:
        folder = corpus_cache() / _key(documents, tokenizer)
        self._file = os.fspath(folder / "tokens")
        found = _lengths(folder)
        if found is None:
            _tokenize(documents, tokenizer, folder, say)
            found = _lengths(folder)
        if found is None:
            raise UserError(f"{folder} is not whole\nfix: remove it; it is made again")
        self.lengths = found
        self.num_bytes = sum(path.stat().st_size for path in documents)
        self._starts = np.cumsum(found) - found
        self._file_size = int(found.sum()) * _TOKEN.itemsize

    def read(self, document: int, offset: int, size: int) -> Int32[np.ndarray, "size"]:
        """See `Corpus`.

        Raises:
            UserError: the cache has gone or changed.
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
    """Part of a file; None where the file has no longer the size that it had as a whole."""
    try:
        # Opened for each read: nothing to share between threads, to pickle or to run out of.
        with open(path, "rb") as file:
            changed = os.fstat(file.fileno()).st_size != whole
            file.seek(offset)
            content = file.read(size)
    except OSError as error:
        raise unreadable(path, error) from error
    return None if changed or len(content) != size else content


def _key(documents: Sequence[Path], tokenizer: Tokenizer) -> str:
    """A name that changes with the tokenizer, and with a document's place, size or time."""
    key = hashlib.blake2b(_VERSION + tokenizer.digest, digest_size=16)
    for path in documents:
        info = path.stat()
        told = os.fsencode(path.resolve()), info.st_size, info.st_mtime_ns
        key.update(repr(told).encode())
    return key.hexdigest()


def _lengths(folder: Path) -> Int64[np.ndarray, "documents"] | None:
    """Of the documents in a cache; None where it is not there or not whole."""
    try:
        lengths = np.load(folder / "lengths.npy")
        whole = os.stat(folder / "tokens").st_size == int(lengths.sum()) * _TOKEN.itemsize
    except (OSError, ValueError, EOFError):
        return None
    return lengths if whole else None


def _tokenize(documents: Sequence[Path], tokenizer: Tokenizer, folder: Path, say: Say) -> None:
    started = time.perf_counter()
    lengths = np.zeros(len(documents), np.int64)
    num_bytes = 0
    try:
        with new_folder(folder) as aside:
            with open(aside / "tokens", "wb") as file:
                for batch in _batches(documents):
                    all_tokens = tokenizer.encode_texts([text for _, text in batch])
                    for (document, text), tokens in zip(batch, all_tokens, strict=True):
                        file.write(tokens.astype(_TOKEN).tobytes())
                        lengths[document] += len(tokens)
                        num_bytes += len(text)
            np.save(aside / "lengths.npy", lengths)
            if _lengths(folder) is None:  # there is none, or a damaged one
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        # Where another process was faster, its folder refuses the rename and serves as well.
        if _lengths(folder) is None:
            raise UserError(
                f"cannot keep tokens in {folder.parent}: {error.strerror}\n"
                "fix: XDG_CACHE_HOME=FOLDER in the environment, where you may write"
            ) from error
    seconds = time.perf_counter() - started
    say(
        f"tokenized {num_bytes / 1e6:,.1f} MB to {int(lengths.sum()):,} tokens in {seconds:.1f} s, "
        f"kept in {folder}"
    )


def _batches(documents: Sequence[Path]) -> Iterator[list[tuple[int, bytes]]]:
    """Documents, or pieces of them, with their numbers: enough at once to keep the cores busy."""
    batch: list[tuple[int, bytes]] = []
    size = 0
    for document, path in enumerate(documents):
        for piece in _pieces(path):
            batch.append((document, piece))
            size += len(piece)
            if size >= PIECE_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _pieces(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                # To the end of the line; a line without end is cut between two characters.
                piece += file.readline(PIECE_BYTES)
                for _ in range(3):
                    if not _continues(file.peek(1)[:1]):
                        break
                    piece += file.read(1)
                yield piece
    except OSError as error:
        raise unreadable(path, error) from error


def _continues(byte: bytes) -> bool:
    """Whether a byte is inside a character of UTF-8."""
    return byte != b"" and 0x80 <= byte[0] < 0xC0
