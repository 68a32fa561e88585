"""Train as two processes: stop by a signal to one of them, lose one, and go on."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from tests.quick import FLAGS
from tests.soak.kills import GONE_S, NOISE, Start, records, start, wait

ARGUMENTS = ("steps=5000", "run_name=two")


def after_steps(started: Start, run: Path, steps: int) -> None:
    """Wait until this start has recorded some steps."""
    made, deadline = len(records(run)), time.monotonic() + 300
    while len(records(run)) < made + steps:
        assert all(each.poll() is None for each in started.processes), started.texts()
        assert time.monotonic() < deadline, started.texts()
        time.sleep(0.05)


def test_a_signal_to_one_stops_both_and_a_death_ends_both(tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "two"
    started = start(tmp_path, 2, ARGUMENTS, XLA_FLAGS=FLAGS)
    after_steps(started, run, 3)
    started.processes[1].send_signal(signal.SIGINT)
    assert wait(started, GONE_S) < GONE_S
    assert [each.returncode for each in started.processes] == [75, 75], started.texts()
    made = len(records(run))
    for index, text in enumerate(started.texts()):
        (line,) = (each for each in text.splitlines() if "stopped by" in each)
        assert line == (
            f"process {index}: stopped by Ctrl-C to process 1 after step {made}: "
            "a checkpoint was saved; the same command continues"
        )

    # Process 0 has jax's coordination service, whose loss ends a process with a C++ stack.
    started = start(tmp_path, 2, ARGUMENTS, XLA_FLAGS=FLAGS)
    after_steps(started, run, 3)
    started.processes[0].kill()
    assert wait(started, GONE_S) < GONE_S
    assert [each.returncode for each in started.processes] == [-9, 75], started.texts()
    first, other = started.texts()
    assert f"continuing from the checkpoint after step {made}" in first
    assert "process 1: ends: process 0 is gone; the same command continues" in other
    assert not [mark for mark in NOISE if mark in other]
