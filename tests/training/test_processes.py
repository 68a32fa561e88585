"""Train as two processes: stop by a signal to one of them, lose one, fail to save, and go on."""

from __future__ import annotations

import json
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.quick import FLAGS
from tests.soak.matrix import judge
from tests.soak.runs import GONE_S, NOISE, Start, checkpoints, reach, records, start, wait

pytestmark = pytest.mark.survival

ARGUMENTS = ("steps=5000", "run_name=two")


def until(started: Start, condition: Callable[[], bool]) -> None:
    """Wait for something, while all processes run."""
    deadline = time.monotonic() + 300
    while not condition():
        assert all(each.poll() is None for each in started.processes), started.texts()
        assert time.monotonic() < deadline, started.texts()
        time.sleep(0.05)


def after_steps(started: Start, run: Path, steps: int) -> None:
    """Wait until this start has recorded some steps."""
    made = len(records(run))
    until(started, lambda: len(records(run)) >= made + steps)


@contextmanager
def files_of_at_most(started: Start, process: int, size: int) -> Iterator[None]:
    """Let no file of a process grow beyond a size in bytes, as a full disk does."""
    pid = started.processes[process].pid
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


def test_a_failed_save_a_signal_to_one_and_a_death_of_one(tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "two"
    for moment, sent, victim in (
        ("start-up", signal.SIGTERM, 0),
        ("compile", signal.SIGKILL, 1),
    ):
        started = start(tmp_path, 2, ARGUMENTS, XLA_FLAGS=FLAGS)
        assert reach(started, run, moment, victim), started.texts()
        started.processes[victim].send_signal(sent)
        assert judge(started, sent, victim, moment, wait(started, GONE_S)) == []

    started = start(tmp_path, 2, ARGUMENTS, XLA_FLAGS=FLAGS)
    until(started, lambda: bool(checkpoints(run)))
    with files_of_at_most(started, 1, 4000):
        until(started, lambda: all("was not saved" in text for text in started.texts()))
        after_steps(started, run, 3)
        kept = checkpoints(run)[-1]
    until(started, lambda: checkpoints(run)[-1] > kept)
    other, failed = (
        [line for line in text.splitlines() if "was not saved" in line] for text in started.texts()
    )
    assert len(failed) == len(other)
    where = f"the checkpoint after step {kept + 10} was not saved in {run}/checkpoints"
    assert failed[0].startswith(f"process 1: {where}: File too large (")
    assert other[0] == (f"{where}: process 1 could not write it: File too large; training goes on")

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
    first, other_text = started.texts()
    assert f"continuing from the checkpoint after step {made}" in first
    assert "process 1: ends: process 0 is gone; the same command continues" in other_text
    assert not [mark for mark in NOISE if mark in other_text]


def test_evaluation_and_post_mortem_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    overflow = ("steps=50", "learning_rate=1e30", "enable_checkpointing=false")
    judged = ("eval_interval=1", "eval_holdout_fraction=0.05", "eval_steps=2")
    folders = []
    for count in (2, 1):
        started = start(tmp_path, count, (*overflow, *judged, f"run_name={count}"), XLA_FLAGS=FLAGS)
        assert wait(started, 300) < 300
        assert {each.returncode for each in started.processes} == {1}, started.texts()
        for text in started.texts():
            assert "3 steps in a row were skipped, the last at step " in text
        folders.append(tmp_path / "outputs" / str(count))
    (found,) = folders[0].glob("bad_step_*.npz")
    two, one = (np.load(folder / found.name) for folder in folders)
    assert {*two} == {*one}
    assert {"inputs", "parameters.embedding.table"} <= {*two}, sorted(two)
    for key in one:
        np.testing.assert_allclose(two[key], one[key], rtol=1e-5, atol=0, err_msg=key)
    two_lines, one_lines = (
        [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
        for folder in folders
    )
    assert len(two_lines) == len(one_lines) > 0
    for of_two, of_one in zip(two_lines, one_lines, strict=True):
        assert (of_two["step"], of_two["tokens"]) == (of_one["step"], of_one["tokens"])
        np.testing.assert_allclose(of_two["loss"], of_one["loss"], rtol=1e-6)
