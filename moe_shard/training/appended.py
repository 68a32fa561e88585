"""Append to a file in blocks that are written whole or not at all, also on a disk that is full."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from pathlib import Path

HELD_MOST = 64 << 20
"""Most bytes that are held for a disk without room; beyond it the oldest are lost, and counted."""


class AppendedFile:
    """Append blocks to a file; hold those that the disk refuses and try again with the next.

    A block that the disk takes in part is cut off again, so that a reader never sees one torn.

    Args:
        path: the file; it is created if it is not there.
        say: receives two lines when the disk first refuses, and one when all has been written.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, say: Callable[[str], object]) -> None:
        self._path, self._say = path, say
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._size = os.lseek(self._descriptor, 0, os.SEEK_END)
        self._held: deque[bytes] = deque()
        self._held_bytes = 0
        self.lost = 0
        self.refused = ""

    @property
    def missing(self) -> int:
        """Return the number of blocks that are not in the file."""
        return len(self._held) + self.lost

    def write(self, block: bytes) -> None:
        """Append a block, or hold it where the disk refuses."""
        self._held.append(block)
        self._held_bytes += len(block)
        self._write_held()
        while self._held_bytes > HELD_MOST:
            self._held_bytes -= len(self._held.popleft())
            self.lost += 1

    def close(self) -> None:
        """Try once more to write what is held, and close the file."""
        self._write_held()
        os.close(self._descriptor)

    def _write_held(self) -> None:
        while self._held:
            if reason := self._refusal(self._held[0]):
                if not self.refused:
                    self._say(
                        f"cannot write {self._path}: {reason}; training goes on, and what belongs "
                        "there is held in memory\nfix: make room on that disk, and it is written"
                    )
                self.refused = reason
                return
            self._held_bytes -= len(self._held.popleft())
        if self.refused:
            lost = f", but for {self.lost} records" if self.lost else ""
            self._say(f"{self._path} is written again{lost}")
            self.refused = ""

    def _refusal(self, block: bytes) -> str:
        """Append one block; return why the disk refuses it, and empty if it does not."""
        try:
            done = 0
            while done < len(block):
                done += os.pwrite(self._descriptor, block[done:], self._size + done)
        except OSError as error:
            os.ftruncate(self._descriptor, self._size)
            return error.strerror or type(error).__name__
        self._size += len(block)
        return ""
