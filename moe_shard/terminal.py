"""Print for a person: lines that outlast their reader, and the progress of long work."""

from __future__ import annotations

import errno
import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

import rich.console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from moe_shard.units import human_bytes, human_time_left

PLAIN_SECONDS = 5.0
"""Least time between two plain lines."""


class Console(rich.console.Console):
    """Print as rich does, but leave it to `run_command` what a pipe without a reader means."""

    def on_broken_pipe(self) -> None:
        """Raise the error again.

        Raises:
            BrokenPipeError: always.
        """
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class LastingOutput(io.TextIOBase):
    """Write to a stream for as long as it takes what is written, and never raise when it does not.

    A run does not end because the disk of its log is full, or because `tee` was stopped. What
    cannot be written is lost; the next line is tried again.

    Args:
        stream: standard output or standard error.
        say: receives one line when something could not be written.
    """

    def __init__(self, stream: TextIO, say: Callable[[str], object] = lambda _: None) -> None:
        self._stream, self._say = stream, say
        self._said = False

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Return the stream's encoding."""
        return self._stream.encoding or "utf-8"

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """Return the stream's descriptor."""
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write a text, or lose it."""
        try:
            self._stream.flush()
            try:
                descriptor = self._stream.fileno()
            except OSError:  # of no file, as in a test
                return self._stream.write(text)
            # Not through its buffer, which would keep what a full disk refuses until Python ends.
            left = text.encode(self.encoding, "backslashreplace")
            while left:
                left = left[os.write(descriptor, left) :]
        except OSError as error:
            if not self._said:
                self._said = True
                self._say(f"standard output is lost: {error.strerror}; the run goes on")
        return len(text)

    def flush(self) -> None:
        """Do nothing: all is written at once."""


def live_line(
    console: rich.console.Console,
    what: str,
    amount: ProgressColumn,
    *more: ProgressColumn,
    transient: bool,
) -> Progress:
    """Return a live line that ends with the time left; on no terminal it shows nothing.

    Args:
        console: where to print.
        what: what is counted or done, shown first.
        amount: the amount that is done.
        more: columns between the bar and the time left.
        transient: whether the line disappears when it ends.
    """
    return Progress(
        TextColumn(what),
        amount,
        BarColumn(bar_width=20),
        *more,
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=transient,
    )


@contextmanager
def bytes_line(console: rich.console.Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """Show how many bytes have been read or written, and the time left.

    Work that takes less than `PLAIN_SECONDS` writes no plain line.

    Args:
        console: where to print.
        what: what is done, such as "reading parameters".

    Yields:
        A function to call with the bytes done and all bytes.
    """
    started = shown = time.monotonic()
    live = live_line(console, what, DownloadColumn(), transient=True)
    task = live.add_task(what, total=None)

    def show(done: int, total: int) -> None:
        nonlocal shown
        live.update(task, completed=done, total=total)
        now = time.monotonic()
        if console.is_terminal or now - shown < PLAIN_SECONDS or not done:
            return
        shown = now
        left = human_time_left((now - started) / done * (total - done))
        console.print(f"{what}: {human_bytes(done)} of {human_bytes(total)}, left {left}")

    with live:
        yield show
