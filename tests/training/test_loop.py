"""Check the loop's order of events, with a step that computes nothing."""

from __future__ import annotations

from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from moe_shard.runtime.team import Team
from moe_shard.training import loop
from moe_shard.training.goodput import WallTime
from moe_shard.training.loop import Trainer
from moe_shard.training.profile import StepProfile
from tests.models.build import small_config


def make_steps(
    monkeypatch: pytest.MonkeyPatch, *overrides: str, stop_during: int | None = None
) -> tuple[list[str], int]:
    """Return a run's events and its updates; a stop is requested while one step runs."""
    events: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda _: events.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    trainer = object.__new__(Trainer)
    trainer.config = small_config({"data": 8}, *overrides)
    trainer.folder, trainer.first = Path("unused"), 0
    trainer.wall = WallTime(trainer.folder, writer=False)
    monkeypatch.setattr(loop, "in_flight", lambda _: True)
    team = Team(signals=False)

    def step(state: Any, _batch: Any) -> tuple[Any, dict[str, float]]:
        events.append(f"step {state}")
        if state == stop_during:
            team.ask("Ctrl-C")
        return state + 1, {}

    trainer.step = step  # type: ignore[assignment]
    trainer.checkpointer = SimpleNamespace(  # type: ignore[assignment]
        poll=lambda: None,
        save=lambda _, updates: events.append(f"save {updates}"),
    )
    trainer.evaluation = SimpleNamespace(  # type: ignore[assignment]
        end=None, due=lambda _: False
    )
    trainer.bad_steps = SimpleNamespace(  # type: ignore[assignment]
        next_may_end_the_run=False, in_a_row=0
    )
    trainer.records = SimpleNamespace(  # type: ignore[assignment]
        start_clock=lambda: None, write=lambda step, *_: events.append(f"record {step}")
    )
    data: Any = repeat(None)
    state: Any = 0
    profile = StepProfile(trainer.folder, trainer.config.train, first_step=0)
    with profile as trainer.profile, team.running(0):
        updates = trainer._steps(state, data, team)
    return events, updates


def test_each_step_is_recorded_once_and_before_its_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events, updates = make_steps(monkeypatch, "steps=5", "checkpoint_period=2")
    assert updates == 5
    assert [e for e in events if e.startswith("record")] == [f"record {n}" for n in range(5)]
    for saved in (2, 4, 5):
        assert events.index(f"save {saved}") == events.index(f"record {saved - 1}") + 1
    # One step is in flight while the one before is recorded.
    assert events.index("step 1") < events.index("record 0")


def test_a_stop_ends_after_the_step_in_flight_and_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    events, updates = make_steps(monkeypatch, "steps=9", stop_during=3)
    assert updates == 4
    assert events[-4:] == ["step 3", "record 2", "record 3", "save 4"]


@pytest.mark.parametrize("stop_during", [None, *range(8)])
def test_a_profile_is_stopped_once_wherever_the_run_ends(
    monkeypatch: pytest.MonkeyPatch, stop_during: int | None
) -> None:
    keys = ("profile=true", "skip_first_n_steps_for_profiler=2", "profiler_steps=3")
    events, updates = make_steps(monkeypatch, "steps=8", *keys, stop_during=stop_during)
    marks = [e for e in events if e in {"start", "stop"}]
    assert marks == (["start", "stop"] if updates > 2 else [])


@pytest.mark.parametrize("steps", range(1, 8))
def test_a_profile_is_stopped_once_however_short_the_run(
    monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    keys = ("profile=true", "skip_first_n_steps_for_profiler=2", "profiler_steps=3")
    events, _ = make_steps(monkeypatch, f"steps={steps}", *keys)
    marks = [e for e in events if e in {"start", "stop"}]
    assert marks == (["start", "stop"] if steps > 2 else [])
