"""Make what a cache keeps where that takes minutes: one process does, and says how far it is."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

LINE_SECONDS = 10.0
"""Time between two lines."""


class LongWork:
    """Say now and then how far a work is.

    Args:
        say: receives the lines.
        clock: seconds.
    """

    def __init__(
        self, say: Callable[[str], object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._say, self._clock = say, clock
        self._began = self._said = clock()
        self.long = False

    @property
    def seconds(self) -> float:
        """Return the time since it began."""
        return self._clock() - self._began

    def tell(self, line: Callable[[], str]) -> None:
        """Say a line if the last one is some seconds old.

        Args:
            line: makes the line.
        """
        now = self._clock()
        if now - self._said >= LINE_SECONDS:
            self._said, self.long = now, True
            self._say(f"{line()}, {now - self._began:.0f} s")


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Let other processes that would make the same folder wait, where the file system can.

    What a process has left that was killed on the way, `files.new_folder`'s own folder, is removed.

    Args:
        folder: the folder that will be made, in a cache.

    Raises:
        OSError: its parent cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f".{folder.name}.lock")
    file, locked = _lock(lock)
    try:
        if locked:
            for left in folder.parent.glob(f".{folder.name}.*"):
                if left != lock:
                    shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        lock.unlink(missing_ok=True)
        file.close()


def _lock(path: Path) -> tuple[BinaryIO, bool]:
    """Open and lock a file; return it, and whether it could be locked."""
    while True:
        file = path.open("wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            return file, False
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file, True
        file.close()  # whoever held it has removed it
