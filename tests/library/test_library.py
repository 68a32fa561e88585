"""The files beside this one, run here; `tests/test_wheel.py` runs the same ones from a wheel."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.library import placed
from tests.library.expected import check

README = Path(__file__).with_name("readme_example.py")


def test_a_model_of_ones_own_and_a_linen_one() -> None:
    check(placed.run({"data": 2, "expert": 4}, explicit=True), expert=4)


def test_the_example_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(README.read_text().splitlines()) <= 30
    made: dict[str, Any] = runpy.run_path(str(README))
    assert "verdict: expert-parallel" in capsys.readouterr().out
    down = made["layer"].experts.down
    assert tuple(down.sharding.spec) == ("expert", None, None)
    assert down.sharding.shard_shape(down.shape) == (2, 512, 256)
