"""Show the progress of long work: a live line, or plain lines where output is a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
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


def live_line(
    console: Console, what: str, amount: ProgressColumn, *more: ProgressColumn, transient: bool
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
def bytes_line(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
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
