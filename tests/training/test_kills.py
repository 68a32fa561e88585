"""Kill a run at every moment, and compare its metrics bit for bit with those of one left alone."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.quick import FLAGS
from tests.soak.matrix import judge
from tests.soak.runs import GONE_S, MOMENTS, Start, computed, reach, start, wait

pytestmark = pytest.mark.survival

STEPS = 60
SIGNALS = (
    *(signal.SIGINT, signal.SIGTERM, signal.SIGTERM),
    *(signal.SIGINT, signal.SIGKILL, signal.SIGKILL),
)
"""One for each moment."""


def test_a_run_killed_at_every_moment_is_the_run_left_alone(tmp_path: Path) -> None:
    def begin(name: str) -> Start:
        arguments = (f"steps={STEPS}", f"run_name={name}", f"jax_cache_dir={tmp_path}/jax")
        return start(tmp_path, 1, arguments, XLA_FLAGS=FLAGS)

    run = tmp_path / "outputs" / "killed"
    for moment, sent in zip(MOMENTS, SIGNALS, strict=True):
        started = begin("killed")
        assert reach(started, run, moment, 0), started.texts()
        started.processes[0].send_signal(sent)
        took = wait(started, GONE_S)
        assert judge(started, sent, 0, moment, took) == [], (moment, started.texts())
    for name in ("killed", "alone"):
        started = begin(name)
        wait(started, 300)
        assert started.processes[0].returncode == 0, started.texts()
    metrics = computed(run)
    assert len(metrics) == STEPS
    assert metrics == computed(run.with_name("alone"))
