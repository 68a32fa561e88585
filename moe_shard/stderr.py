"""Take lines out of standard error while a block runs, those that C++ writes as well.

C++ writes to file descriptor 2, which nothing in Python can replace, so the descriptor itself is
redirected. `collect_lines` passes every other line on at once, through a pipe, for blocks that run
for minutes. `drop_lines` holds everything back in a file until the block ends: importing a library
can write more than a pipe holds while it keeps Python, and so the reader of the pipe, from running.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from re import Pattern

_CHUNK = 1 << 16

_collecting = threading.Lock()


@contextlib.contextmanager
def collect_lines(mark: str) -> Iterator[list[str]]:
    """Collect the lines of file descriptor 2 that contain a mark while the block runs.

    Every other line is passed on to where the descriptor pointed, as soon as it is complete. When
    the block raises, the collected lines follow. Where descriptor 2 is closed, or another block (of
    another thread, or around this one) is collecting already, nothing is collected and nothing is
    changed.

    Args:
        mark: text that the collected lines contain.

    Yields:
        A list, filled by the end of the block.
    """
    lines: list[str] = []
    if not _collecting.acquire(blocking=False):
        yield lines
        return
    try:
        try:
            original = os.dup(2)
        except OSError:  # closed: C++ cannot write anything either
            yield lines
            return
        with _Tap(original, mark.encode(), lines):
            yield lines
    finally:
        _collecting.release()


@contextlib.contextmanager
def drop_lines(unwanted: Pattern[str]) -> Iterator[None]:
    """Hold back file descriptor 2 while the block runs, then print the lines that do not match.

    Args:
        unwanted: pattern that is searched for in a line to drop it.
    """
    original = os.dup(2)
    try:
        with tempfile.TemporaryFile() as held:
            try:
                with _redirected(held.fileno(), original):
                    yield
            finally:
                held.seek(0)
                for line in held.read().decode(errors="replace").splitlines():
                    if not unwanted.search(line):
                        print(line, file=sys.stderr)
    finally:
        os.close(original)


@contextlib.contextmanager
def _redirected(descriptor: int, original: int) -> Iterator[None]:
    """Redirect descriptor 2 while the block runs; it is `original` again afterwards."""
    _flush_stderr()
    os.dup2(descriptor, 2)
    try:
        yield
    finally:
        _flush_stderr()
        os.dup2(original, 2)


class _Tap:
    """Replace descriptor 2 by a pipe, which a thread reads."""

    def __init__(self, original: int, mark: bytes, lines: list[str]) -> None:
        self._original = original
        self._mark = mark
        self._lines = lines
        # What follows this in the pipe was written after the block, by a child that inherited it.
        self._end = f"\0{uuid.uuid4().hex}\n".encode()
        self._drained = threading.Event()

    def __enter__(self) -> None:
        readable, self._writable = os.pipe()
        self._redirection = _redirected(self._writable, self._original)
        self._redirection.__enter__()
        self._thread = threading.Thread(
            target=self._forward, args=(readable,), name="stderr-lines", daemon=True
        )
        self._thread.start()

    def __exit__(self, raised: type[BaseException] | None, *_: object) -> None:
        self._redirection.__exit__(None, None, None)
        # Not end of file, which a child still running would withhold: all before this was read.
        _write(self._writable, self._end)
        os.close(self._writable)
        self._drained.wait()
        if raised is not None:  # nothing will report them otherwise
            _write(2, "".join(f"{line}\n" for line in self._lines).encode())

    def _forward(self, readable: int) -> None:
        pending = b""
        try:
            while chunk := os.read(readable, _CHUNK):
                pending += chunk
                if self._end in pending:
                    before, _, pending = pending.partition(self._end)
                    self._sort(before)
                    self._drained.set()
                *whole, pending = pending.split(b"\n")
                if whole:
                    self._sort(b"\n".join(whole) + b"\n")
            self._sort(pending)
        finally:
            self._drained.set()
            os.close(readable)
            os.close(self._original)

    def _sort(self, text: bytes) -> None:
        """Collect the lines with the mark and pass the others on."""
        others = b""
        for line in text.splitlines(keepends=True):
            if self._mark in line and not self._drained.is_set():
                self._lines.append(line.decode("utf-8", "replace").rstrip("\r\n"))
            else:
                others += line
        _write(self._original, others)


def _flush_stderr() -> None:
    # None under pythonw, closed by a daemon, or an object of a test's own.
    with contextlib.suppress(AttributeError, ValueError, OSError):
        sys.stderr.flush()


def _write(descriptor: int, text: bytes) -> None:
    """Write all of it; a reader that has gone must not end a compilation."""
    while text:
        try:
            text = text[os.write(descriptor, text) :]
        except BlockingIOError:
            select.select([], [descriptor], [])
        except OSError:
            return
