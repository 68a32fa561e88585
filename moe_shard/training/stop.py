"""End a run on request, after the step in flight, with a checkpoint."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

import jax


class StopRequest:
    """Turn Ctrl-C and SIGTERM within the block into a request to stop.

    A second Ctrl-C ends the process at once. In a run of several processes jax handles SIGTERM, and
    agrees with the other processes on the step to stop at.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._signals = [signal.SIGINT]
        if jax.process_count() == 1:
            self._signals.append(signal.SIGTERM)
        self._previous: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._ask) for number in self._signals}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        self.reason = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
