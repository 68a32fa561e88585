"""How far reading or writing of weights has come, on the terminal."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from moe_shard.units import human_bytes

PLAIN_SECONDS = 5.0
"""Nothing is said of what takes less; then, where output is a file, a line each time it passes."""


class BytesLine:
    """A live line, or plain lines where output is a file, with the time left.

    Args:
        console: where to.
        what: is done, such as "reading parameters".
    """

    def __init__(self, console: Console, what: str) -> None:
        self._console, self._what = console, what
        self._started = self._said = time.monotonic()
        self._live = Progress(
            TextColumn(what),
            DownloadColumn(),
            BarColumn(bar_width=20),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._live.add_task(what, total=None)

    def __enter__(self) -> BytesLine:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def __call__(self, done: int, total: int) -> None:
        """Show bytes done of bytes in all."""
        self._live.update(self._task, completed=done, total=total)
        now = time.monotonic()
        if self._console.is_terminal or now - self._said < PLAIN_SECONDS or not done:
            return
        self._said = now
        left = round((now - self._started) / done * (total - done))
        minutes, seconds = divmod(left, 60)
        self._console.print(
            f"{self._what}: {human_bytes(done)} of {human_bytes(total)}, "
            f"left {minutes}:{seconds:02d}"
        )
