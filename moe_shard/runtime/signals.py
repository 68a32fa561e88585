"""Answer signals in a thread of their own."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def finished(code: int) -> int:
    """Ignore signals from now on, as the work is done; return the exit code."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    return code


def watch_signals(answer: Callable[[int], None]) -> Callable[[], None]:
    """Answer signals in a thread; return a function that restores what was.

    Python's own handlers run in the main thread, and so not before a compilation or a collective
    has ended. The system's handler writes the signal's number to a socket at once.
    """
    near, far = socket.socketpair()
    far.setblocking(False)

    def ignore(_number: int, _frame: FrameType | None) -> None:
        """Let the thread answer."""

    # First the socket: a signal between a handler that ignores it and the socket would be lost.
    before = signal.set_wakeup_fd(far.fileno(), warn_on_full_buffer=False)
    previous = {number: signal.signal(number, ignore) for number in SIGNALS}

    def read() -> None:
        while number := near.recv(1):
            if number[0] in SIGNALS:
                answer(number[0])
        near.close()

    threading.Thread(target=read, daemon=True, name="moe-shard-signals").start()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        far.close()

    return restore
