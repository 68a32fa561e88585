"""Describe documents as parts of files, so that a corpus of millions is a few arrays."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
from jaxtyping import Bool, Int32, Int64

_GOLDEN, _FACTORS = 0x9E3779B97F4A7C15, ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


@dataclass(frozen=True, eq=False)
class Documents(Sequence[Path]):
    """Hold documents, in order: each a whole file, or a part of one.

    As a sequence, its items are the paths of the files that the documents are in.

    Attributes:
        files: the files that are read.
        sizes: bytes of each file.
        keys: text for each file, equal only for files of equal content.
        origins: what each file is a copy of, or the file itself; for messages.
        file: number of each document's file.
        start: first byte of each document in its file.
        length: bytes of each document.
        whole: whether every document is a file of its own.
    """

    files: tuple[str, ...]
    sizes: Int64[np.ndarray, "files"]
    keys: tuple[str, ...]
    origins: tuple[str, ...]
    file: Int32[np.ndarray, "documents"]
    start: Int64[np.ndarray, "documents"]
    length: Int64[np.ndarray, "documents"]
    whole: bool

    @classmethod
    def of_files(cls, paths: Sequence[Path]) -> Documents:
        """Take each file as a document.

        Raises:
            OSError: one of them is not there.
        """
        if isinstance(paths, Documents):
            return paths
        parts = [FilePart.whole_file(path) for path in paths]
        return cls.of_parts(parts)

    @classmethod
    def of_parts(cls, parts: Sequence[FilePart]) -> Documents:
        """Join the documents of files.

        Args:
            parts: the documents of each file.
        """
        counts = [len(part.start) for part in parts]
        none: list[Int64[np.ndarray, "_"]] = [np.zeros(0, np.int64)]
        return cls(
            files=tuple(part.file for part in parts),
            sizes=np.array([part.size for part in parts], np.int64),
            keys=tuple(part.key for part in parts),
            origins=tuple(part.origin for part in parts),
            file=np.repeat(np.arange(len(parts), dtype=np.int32), counts),
            start=np.concatenate([part.start for part in parts] or none),
            length=np.concatenate([part.length for part in parts] or none),
            whole=all(part.whole for part in parts),
        )

    def __len__(self) -> int:
        return len(self.file)

    @overload
    def __getitem__(self, item: int) -> Path: ...
    @overload
    def __getitem__(self, item: slice) -> Sequence[Path]: ...
    def __getitem__(self, item: int | slice) -> Path | Sequence[Path]:
        if isinstance(item, slice):
            return [self[i] for i in range(*item.indices(len(self)))]
        return Path(self.origins[self.file[item]])

    def __iter__(self) -> Iterator[Path]:
        return (Path(self.origins[number]) for number in self.file)

    @property
    def num_bytes(self) -> int:
        """Return the size of all documents."""
        return int(self.length.sum())

    def select(self, chosen: Bool[np.ndarray, "documents"]) -> Documents:
        """Return some of the documents, in the same order."""
        return Documents(
            files=self.files,
            sizes=self.sizes,
            keys=self.keys,
            origins=self.origins,
            file=self.file[chosen],
            start=self.start[chosen],
            length=self.length[chosen],
            whole=self.whole,
        )


@dataclass(frozen=True)
class FilePart:
    """Hold the documents of one file; see `Documents` for the attributes."""

    file: str
    size: int
    key: str
    origin: str
    start: Int64[np.ndarray, "documents"]
    length: Int64[np.ndarray, "documents"]
    whole: bool

    @classmethod
    def whole_file(cls, path: Path, *, skip: int = 0) -> FilePart:
        """Take a file as one document.

        Args:
            path: the file.
            skip: bytes at its beginning that are not of the text.
        """
        info = path.stat()
        key = repr((os.fsencode(path.resolve()), info.st_size, info.st_mtime_ns))
        start, length = np.array([skip], np.int64), np.array([info.st_size - skip], np.int64)
        name = os.fspath(path)
        return cls(name, info.st_size, key, name, start, length, whole=True)

    @classmethod
    def of_copy(
        cls, copy: Path, ends: Int64[np.ndarray, "documents"], *, key: str, origin: Path
    ) -> FilePart:
        """Take what a decoded copy holds.

        Args:
            copy: the documents, one behind the other.
            ends: where each of them ends.
            key: name of its content.
            origin: the file that it is a copy of.
        """
        size = int(ends[-1]) if len(ends) else 0
        start = np.concatenate([np.zeros(1, np.int64), ends])[: len(ends)]
        name = os.fspath(copy)
        return cls(name, size, key, os.fspath(origin), start, ends - start, whole=False)


def scattered(count: int, seed: int) -> Int64[np.ndarray, "count"]:
    """Order numbers by their hash (SplitMix64): a shuffle of millions in a second.

    It is a function of its arguments alone, as no library's random stream is.

    Args:
        count: how many numbers.
        seed: a seed in [0, 2**32).
    """
    bits = np.arange(count, dtype=np.uint64) + np.uint64(seed * _GOLDEN % 2**64)
    for shift, factor in _FACTORS:
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    order: Int64[np.ndarray, "count"] = np.argsort(bits ^ (bits >> np.uint64(31)), kind="stable")
    return order
