"""Say where the checkpoints of a run are, and what differs between a folder and a bucket.

Orbax writes and reads the arrays in both. `InFolder` is here; `in_bucket.py` has the other.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_shard.checkpoints.checksums import (
    Checksums,
    Damage,
    check_sizes,
    check_sums,
    committed_with_checksums,
    read_manifest,
)
from moe_shard.checkpoints.room import free_bytes, room_words, why_not_writable
from moe_shard.errors import UserError
from moe_shard.files import write_text

DAMAGED = ".damaged"
UNFINISHED = ".orbax-checkpoint-tmp"
_NUMBER = re.compile(r"0|[1-9]\d{0,17}")
_TRIES = 100
_AMPLE = 3
"""Room for so many times the least that a checkpoint needs is room for it however it is stored."""


class CheckpointPlace(ABC):
    """Be where the checkpoints of a run, or the parameters of an imported model, are.

    Attributes:
        path: what Orbax takes; `/` and a checkpoint's name give that checkpoint's.
        closes_after_failure: whether Orbax's manager is closed and opened again after a save that
            failed.
        fix: what helps where a checkpoint could not be written.
        allow: what helps where nothing may be written.
    """

    path: Any
    closes_after_failure: bool
    fix: str
    allow: str

    @abstractmethod
    def names(self) -> list[str]:
        """Return the names of all that is there.

        Raises:
            UserError: it cannot be read.
        """

    def numbers(self) -> list[str]:
        """Return the names of checkpoints, whole or not, from the newest.

        Raises:
            UserError: they cannot be read.
        """
        numbers = (int(name) for name in self.names() if _NUMBER.fullmatch(name))
        return [str(number) for number in sorted(numbers, reverse=True)]

    def aside(self) -> list[str]:
        """Return the names of damaged checkpoints that were set aside.

        Raises:
            UserError: they cannot be read.
        """
        return sorted(name for name in self.names() if DAMAGED in name)

    @abstractmethod
    def manifest(self, name: str) -> Checksums | None:
        """Read the manifest of a checkpoint; None if it was saved without one.

        Raises:
            Damage: it cannot be read, or is missing from a checkpoint that was saved with one.
        """

    @abstractmethod
    def compare(
        self, name: str, manifest: Checksums, *, verify: bool, part: int, parts: int
    ) -> tuple[str, ...]:
        """Compare a checkpoint with its manifest.

        Args:
            name: of the checkpoint.
            manifest: its manifest.
            verify: compare contents too, and not only names and sizes.
            part: which part of the contents this process compares, from 0.
            parts: number of processes that compare a part each.

        Returns:
            Names of files that the manifest does not name.

        Raises:
            Damage: they differ.
        """

    @abstractmethod
    def set_aside(self, name: str) -> str:
        """Give a damaged checkpoint another name, by which it is never counted, and return it.

        Raises:
            UserError: it cannot be done.
        """

    @abstractmethod
    def remove_unfinished(self) -> None:
        """Remove what a killed process, or a save that failed, has not finished."""

    @abstractmethod
    def hindrance(self, needed: int) -> str:
        """Return why a checkpoint of so many bytes cannot be written; empty if it may be."""

    @abstractmethod
    def is_tight(self, needed: int) -> bool:
        """Return whether a checkpoint that needs at least so many bytes may still not fit."""

    @abstractmethod
    def room(self, needed: int) -> str:
        """Put into words what a checkpoint of so many bytes finds there."""

    @abstractmethod
    def committed(self, run: Callable[[], str]) -> type[Any]:
        """Return the class by which Orbax makes a checkpoint complete, with its manifest.

        Args:
            run: returns the name of the run; called when a checkpoint is complete.
        """

    @abstractmethod
    def kept_text(self, name: str) -> str | None:
        """Read a line that is kept beside the checkpoints; None if there is none."""

    @abstractmethod
    def keep_text(self, name: str, text: str) -> None:
        """Keep a line beside the checkpoints."""


class InFolder(CheckpointPlace):
    """Keep checkpoints in a folder, which all processes see."""

    closes_after_failure = True
    fix = "make room there"
    allow = "base_output_directory=FOLDER that you may write to"

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        """Return the names of the folders and files."""
        folder = self.path
        if folder.is_symlink() and not folder.exists():
            raise UserError(f"{folder} is a link to nothing\nfix: restore what it points to")
        try:
            return [each.name for each in os.scandir(folder)] if os.path.lexists(folder) else []
        except OSError as error:
            raise UserError(
                f"cannot read {folder}: {error.strerror}\nfix: a folder of checkpoints there"
            ) from error

    def manifest(self, name: str) -> Checksums | None:
        """Read `checksums.json`."""
        path = self.path / name
        if not path.is_dir():
            is_link = path.is_symlink() and not path.exists()
            raise Damage("a link to nothing" if is_link else "not a folder")
        return read_manifest(path)

    def compare(
        self, name: str, manifest: Checksums, *, verify: bool, part: int, parts: int
    ) -> tuple[str, ...]:
        """Compare sizes, and SHA-256 where contents are verified."""
        foreign = check_sizes(self.path / name, manifest)
        if verify:
            check_sums(self.path / name, manifest, part=part, parts=parts)
        return foreign

    def set_aside(self, name: str) -> str:
        """Rename a damaged checkpoint."""
        path = self.path / name
        for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
            target = path.with_name(f"{name}{DAMAGED}{suffix}")
            if os.path.lexists(target):
                continue
            try:
                path.rename(target)
            except OSError as error:
                raise UserError(
                    f"{path} is damaged and cannot be renamed: {error.strerror}\n"
                    "fix: move it out of that folder; the run then continues from the one before it"
                ) from error
            return target.name
        raise UserError(f"{path} is damaged, as are 999 others of its name\nfix: move those away")

    def remove_unfinished(self) -> None:
        """Remove what has a name of its own while it is written."""
        # The run's folder is locked against other runs. Writes that are still on their way may put
        # a folder back that is being removed, so it is tried for a while.
        for _ in range(_TRIES):
            left = list(self.path.glob(f"*{UNFINISHED}*"))
            if not left:
                return
            for path in left:
                shutil.rmtree(path, ignore_errors=True)
            time.sleep(0.01)

    def hindrance(self, needed: int) -> str:
        """Look at the room on the disk, and try to write."""
        free = free_bytes(self.path)
        if free is not None and free < needed:
            return "it cannot fit on the disk"
        return why_not_writable(self.path)

    def is_tight(self, needed: int) -> bool:
        """Compare the room on the disk with more than a checkpoint may take."""
        free = free_bytes(self.path)
        return free is not None and free < _AMPLE * needed

    def room(self, needed: int) -> str:
        """Name what is free and what is needed."""
        return room_words(free_bytes(self.path), needed)

    def committed(self, run: Callable[[], str]) -> type[Any]:
        """Return the class that renames a checkpoint."""
        return committed_with_checksums(run)

    def kept_text(self, name: str) -> str | None:
        """Read a small file."""
        path = self.path / name
        return path.read_text().strip() if path.is_file() else None

    def keep_text(self, name: str, text: str) -> None:
        """Write a small file."""
        write_text(self.path / name, text + "\n")
