"""Check the notes of the layer's placement: the flag's conflict, its consequence and its fix."""

from __future__ import annotations

import pytest

from tests.moe.build import BuiltLayer, build_layer, mesh_of
from tests.moe.oracle import Settings


def traced(sizes: dict[str, int], flag: bool) -> BuiltLayer:
    layer = build_layer(
        mesh_of(sizes),
        Settings(),
        dispatch="gather",
        flag=flag,
        rows=8,
        tokens=16,
        model=16,
        hidden=32,
        experts=8,
    )
    layer.lower()
    return layer


def test_flag_off_is_reported_with_its_consequence_and_fix() -> None:
    conflicts = traced({"fsdp": 2, "expert": 4}, flag=False).sharding.conflicts.values()
    assert conflicts
    for conflict in conflicts:
        assert conflict.dim == "activation_exp"
        assert "all-gathered over expert" in str(conflict)
        assert "moe_dispatch_no_expert_sharding=true" in str(conflict)


@pytest.mark.parametrize(
    ("sizes", "flag"), [({"fsdp": 2, "expert": 4}, True), ({"fsdp": 8}, False), ({"fsdp": 8}, True)]
)
def test_no_conflict_is_reported_where_there_is_none(sizes: dict[str, int], flag: bool) -> None:
    assert not traced(sizes, flag).sharding.conflicts
