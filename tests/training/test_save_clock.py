"""Check when a checkpoint is due by the clock: in time, and alike on all processes."""

from __future__ import annotations

from typing import Any

import jax
import pytest

from moe_shard.training import save_clock
from moe_shard.training.save_clock import SaveClock


class Clock:
    """Count seconds that a test lets pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def saves(clock: SaveClock, time: Clock, *, steps: int, step_s: float) -> list[float]:
    """Run steps, and return when they saved."""
    found = []
    for updates in range(1, steps + 1):
        time.now += step_s
        if clock.due(updates):
            clock.saved()
            found.append(time.now)
    return found


def test_without_minutes_none_is_due() -> None:
    time = Clock()
    assert saves(SaveClock(0, time), time, steps=100, step_s=1e6) == []


def test_the_first_step_after_the_period_saves() -> None:
    time = Clock()
    assert saves(SaveClock(1, time), time, steps=20, step_s=7) == [63, 126]


@pytest.mark.parametrize("step_s", [0.05, 1.0, 50.0, 700.0])
def test_several_processes_agree_with_few_messages(
    monkeypatch: pytest.MonkeyPatch, step_s: float
) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def send(value: Any) -> Any:
        sent.append(value)
        return value

    monkeypatch.setattr(save_clock, "broadcast_one_to_all", send)
    first_time = Clock()
    first = SaveClock(10, first_time)
    steps = max(int(3000 / step_s), 4)
    found = saves(first, first_time, steps=steps, step_s=step_s)
    late = max(step_s, 1)
    assert all(
        600 <= now - before <= 600 + late + step_s
        for before, now in zip([0, *found], found, strict=False)
    )
    assert len(found) >= steps * step_s // (600 + late + step_s)
    assert len(sent) <= min(steps, 20 * (len(found) + 1))
    # Another process, whose clock says something else, saves at the same steps.
    messages = iter(list(sent))
    monkeypatch.setattr(save_clock, "broadcast_one_to_all", lambda _: next(messages))
    other_time = Clock()
    other = saves(SaveClock(10, other_time), other_time, steps=steps, step_s=step_s * 1.001)
    assert len(other) == len(found)
    assert other == pytest.approx([second * 1.001 for second in found])
