"""How far reading or writing of weights has come, on the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from moe_shard.units import human_bytes

PLAIN_SECONDS = 5.0
"""Nothing is said of what takes less; then, where output is a file, a line each time it passes."""


@contextmanager
def bytes_line(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A live line, or plain lines where output is a file, with the time left.

    Args:
        console: where to.
        what: is done, such as "reading parameters".

    Yields:
        What is to be told of bytes done and bytes in all.
    """
    started = said = time.monotonic()
    live = Progress(
        TextColumn(what),
        DownloadColumn(),
        BarColumn(bar_width=20),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    task = live.add_task(what, total=None)

    def show(done: int, total: int) -> None:
        nonlocal said
        live.update(task, completed=done, total=total)
        now = time.monotonic()
        if console.is_terminal or now - said < PLAIN_SECONDS or not done:
            return
        said = now
        minutes, seconds = divmod(round((now - started) / done * (total - done)), 60)
        console.print(
            f"{what}: {human_bytes(done)} of {human_bytes(total)}, left {minutes}:{seconds:02d}"
        )

    with live:
        yield show
