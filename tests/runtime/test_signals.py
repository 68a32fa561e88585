"""No signal is lost, also none that arrives while its handler is being set or restored."""

from __future__ import annotations

import os
import queue
import signal
from collections.abc import Callable
from typing import Any

import pytest

from moe_shard.runtime.signals import SIGNALS, watch_signals

WAIT_S = 60


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_between_its_handler_and_the_socket_is_answered(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    was = signal.getsignal(number)
    answered: queue.Queue[int] = queue.Queue()
    with monkeypatch.context() as patch:
        patch.setattr(signal, "signal", followed_by(number))
        restore = watch_signals(answered.put)
    try:
        assert answered.get(timeout=WAIT_S) == number
    finally:
        restore()
    assert signal.getsignal(number) is was


def test_a_signal_while_the_handlers_are_restored_is_for_who_had_them_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answered: queue.Queue[int] = queue.Queue()
    before: list[int] = []
    was = signal.signal(signal.SIGTERM, lambda number, _: before.append(number))
    try:
        restore = watch_signals(answered.put)
        with monkeypatch.context() as patch:
            patch.setattr(signal, "signal", followed_by(signal.SIGTERM))
            restore()
        assert before == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, was)


def followed_by(number: signal.Signals) -> Callable[..., Any]:
    """Return `signal.signal`, after whose call for a number that signal arrives."""
    known = signal.signal

    def install(which: int, handler: Any) -> Any:
        previous = known(which, handler)
        if which == number:
            os.kill(os.getpid(), number)
        return previous

    return install
