"""Split experts over two mesh axes: the table `context-as-expert`, under every strategy."""

from __future__ import annotations

from typing import Any

import pytest

from moe_shard.config.load import load_config
from tests.moe.build import build_layer, mesh_of
from tests.moe.conftest import variants
from tests.moe.inputs import random_inputs
from tests.moe.oracle import moe_layer
from tests.moe.test_contract import (  # noqa: F401  (pytest finds fixtures by their name here)
    DIMS,
    WHOLE,
    ragged_all_to_all,
    route,
)
from tests.moe.test_factorisations import assert_equal_to_oracle, label

RULES = load_config(
    "mixtral-tiny", ["custom_mesh_and_rule=context-as-expert"]
).mesh.logical_axis_rules
MESHES = [
    {"context": 2, "expert": 4},
    {"context": 8},
    {"data": 2, "context": 2, "expert": 2},
    {"tensor": 2, "context": 2, "expert": 2},
]


# An additional axis cannot affect einsum differently from gather.
@variants(without="einsum")
@pytest.mark.parametrize("sizes", MESHES, ids=label)
def test_outputs_and_gradients_are_the_oracles(
    sizes: dict[str, int],
    route: dict[str, Any],  # noqa: F811
) -> None:
    inputs = random_inputs(**DIMS)
    layer = build_layer(mesh_of(sizes), WHOLE, flag=True, rules=RULES, **DIMS, **route)
    expert_axes = [axis for axis in ("expert", "context") if sizes.get(axis, 1) > 1]
    assert layer.sharding.table.expert_axes == tuple(expert_axes)
    found = layer.run(inputs)
    expected = moe_layer(inputs.x, inputs.params, inputs.cotangent, WHOLE)
    assert_equal_to_oracle(found, expected)
