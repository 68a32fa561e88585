"""End a process from any thread, in order: its last lines, and a code."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback

from moe_shard.errors import EXIT_FINDING, EXIT_USAGE, Finding, UserError


class End:
    """End the process from any thread, once, with one line on the terminal's standard error."""

    def __init__(self) -> None:
        self._once = threading.Lock()
        # Standard error itself may be held back just then (quiet.py).
        try:
            self._stderr = os.dup(2)
        except OSError:
            self._stderr = -1

    def __call__(self, lines: str, code: int) -> None:
        """Write lines and end the process with a code; a second call waits for the first."""
        self._once.acquire()
        flush = threading.Thread(target=_flush, daemon=True)
        flush.start()
        flush.join(1.0)  # another thread may hold the stream
        if sys.stderr is not None and sys.stderr.isatty():
            lines = f"\x1b[?25h{lines}"  # a live line has hidden the cursor
        self.note(lines)
        os._exit(code)

    def note(self, lines: str) -> None:
        """Write lines."""
        with contextlib.suppress(OSError):
            os.write(self._stderr, f"{lines}\n".encode())


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def show(error: BaseException) -> tuple[int, str]:
    """Return the exit code of an error, and what is written of it."""
    if isinstance(error, UserError):
        return EXIT_USAGE, f"error: {error}"
    if isinstance(error, Finding):
        return EXIT_FINDING, str(error)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else EXIT_FINDING, ""
    return EXIT_FINDING, "".join(traceback.format_exception(error)).rstrip()
