"""Write the records of steps: layers every so often, and once for the last step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest

from moe_shard.program.step import make_program
from moe_shard.training.pace import _FIRST, _LAST
from moe_shard.training.step_records import StepRecords
from tests.models.build import annotator, small_config


@pytest.mark.parametrize(("steps", "layers"), [(5, [0, 3, 4]), (7, [0, 3, 6])])
def test_the_last_step_has_a_record_of_layers_once(steps: int, layers: list[int]) -> None:
    config = small_config({"data": 8}, "log_period=3")
    written: dict[str, list[int]] = {"steps": [], "layers": [], "made": [], "seen": []}
    fake: Any = SimpleNamespace(
        write=lambda record: written["steps"].append(record["step"]),
        write_layers=lambda record: written["layers"].append(record),
        made=lambda updates: written["made"].append(updates),
        show=lambda _: None,
        see=lambda step, *_: written["seen"].append(step),
    )
    records = StepRecords(
        config,
        make_program(config, annotator(config)),
        writer=fake,
        progress=fake,
        wall=fake,
        bad_steps=fake,
    )
    records._layers = SimpleNamespace(record=lambda step, _: step)  # type: ignore[assignment]
    metrics: Any = {name: jnp.ones(()) for name in (*_FIRST, *_LAST, "skipped")}
    other: Any = None
    for step in range(steps):
        records.write(step, metrics | {"loss": jnp.full((), step)}, other, other)
    records.write_layers()
    records.write_layers()
    assert written["layers"] == layers
    assert written["steps"] == written["seen"] == [*range(steps)]
    assert written["made"] == [*range(1, steps + 1)]
    assert records.last is not None
    assert records.last["loss"] == steps - 1
