"""Check the account of a run's wall time with a clock set by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_shard.training.goodput import FILE, Start, WallTime, goodput, read_starts


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_each_moment_counts_once(tmp_path: Path) -> None:
    clock = Clock(1000)
    wall = WallTime(tmp_path, clock=clock)
    clock.now += 1
    with wall.part("compile"):
        clock.now += 20
    wall.begin(0)
    with wall.part("steps"):
        clock.now += 60
        with wall.waiting("data", hidden=lambda: False):
            clock.now += 4
        with wall.waiting("data", hidden=lambda: True):
            clock.now += 7
        with wall.part("save"):
            clock.now += 8
    found = wall.goodput()
    assert found is not None
    assert found.seconds == {"steps": 67, "compile": 20, "save": 8, "data": 4, "other": 1}
    assert (found.total_s, found.share, found.starts) == (100, 0.67, 1)
    assert found.line() == (
        "goodput: 67% of 0:01:40 in steps, the rest: compile 20%, save 8%, data 4%, other 1%"
    )


def test_time_between_starts_and_steps_done_twice_count(tmp_path: Path) -> None:
    clock = Clock(0)
    first = WallTime(tmp_path, clock=clock)
    first.begin(0)
    assert [each.updates for each in read_starts(tmp_path)] == [0]
    with first.part("steps"):
        clock.now += 50
        first.made(10)  # killed here: the checkpoint is after step 6
    assert len(read_starts(tmp_path)) == 1
    clock.now += 30
    second = WallTime(tmp_path, clock=clock)
    second.begin(6)
    with second.part("steps"):
        clock.now += 20
        second.made(10)
    second.write()
    found = goodput(read_starts(tmp_path))
    assert found is not None
    assert found.seconds == {"steps": 50, "down": 30, "repeated": 20}
    assert (found.share, found.starts) == (0.5, 2)
    assert "2 starts" in found.line()


def test_the_file_is_written_now_and_then(tmp_path: Path) -> None:
    clock = Clock(0)
    wall = WallTime(tmp_path, clock=clock)
    for step in range(25):
        clock.now += 1
        wall.made(step + 1)
    assert [each.updates for each in read_starts(tmp_path)] == [20]
    silent = WallTime(tmp_path, writer=False, clock=clock)
    silent.write()
    assert [each.updates for each in read_starts(tmp_path)] == [20]


@pytest.mark.parametrize(
    "content",
    ["", "[1", "[]", "null", '{"starts": 3}', '{"starts": [{"started": "x"}]}', "[" * 9999],
)
def test_a_damaged_file_counts_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    assert read_starts(tmp_path) == []
    wall = WallTime(tmp_path)
    wall.write()
    assert len(json.loads((tmp_path / FILE).read_text())["starts"]) == 1


def test_a_folder_in_its_place_does_not_end_a_run(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    WallTime(tmp_path).write()


def test_no_time_is_no_goodput() -> None:
    assert goodput([]) is None
    assert goodput([Start(5, 0, 5, 0)]) is None
