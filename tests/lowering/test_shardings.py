"""How parameters are split, and the mesh that a text names, against grids made by NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from moe_shard.lowering.shardings import (
    has_names,
    mesh_before_optimization,
    mesh_of_groups,
    mesh_of_shardings,
    parse_split,
    shardings_before_optimization,
    unnamed_mesh,
)

GRID = np.arange(8).reshape(2, 4)


def groups(rows: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(int(device) for device in row) for row in rows}


@pytest.mark.parametrize(
    ("sharding", "parts", "dim", "expected"),
    [
        ("{devices=[8,1,1]<=[8]}", (8, 1, 1), 0, groups(GRID.reshape(1, 8))),
        # Dim 0 over the second axis of 2 x 4, replicated over the first.
        (
            "{devices=[4,1,2]<=[2,4]T(1,0) last_tile_dim_replicate}",
            (4, 1),
            0,
            groups(GRID),
        ),
        ("{devices=[1,4,1,2]<=[2,4]T(1,0)}", (1, 4, 1, 2), 3, groups(GRID.T)),
        ("{devices=[2,2]0,2,1,3}", (2, 2), 1, {frozenset({0, 2}), frozenset({1, 3})}),
        ("{mesh['data'=2,'ep'=4], [{'ep'}, {}, {'data'}]}", (4, 1, 2), 0, groups(GRID)),
        ("{mesh['data'=2,'ep'=4], [{'data','ep'}, {}]}", (8, 1), 0, groups(GRID.reshape(1, 8))),
        # A half of the axis: 0 and 2, 1 and 3, ... hold the two parts.
        (
            "{mesh['x'=8], [{'x':(1)2}]}",
            (2,),
            0,
            {frozenset({at, at + 4}) for at in range(4)},
        ),
    ],
)
def test_parts_and_groups(
    sharding: str, parts: tuple[int, ...], dim: int, expected: set[frozenset[int]]
) -> None:
    split = parse_split(sharding, len(parts))
    assert split is not None
    assert split.parts == parts
    assert {frozenset(group) for group in split.device_groups[dim]} == expected
    for other, count in enumerate(parts):
        assert (split.device_groups[other] == ()) == (count == 1)


@pytest.mark.parametrize(
    "sharding", ["{replicated}", "{manual}", "{maximal device=3}", "{devices=[3,1]<=[8]}", "{", ""]
)
def test_what_is_not_split(sharding: str) -> None:
    assert parse_split(sharding, 2) is None


def test_meshes_of_texts() -> None:
    named = "{mesh['data'=2,'ep'=4], [{'ep'}, {}]}"
    mesh = mesh_of_shardings(["{replicated}", named], 8)
    assert mesh is not None
    assert mesh.sizes == {"data": 2, "ep": 4}
    assert mesh_of_shardings([named], 16) is None
    assert mesh_of_shardings(["{mesh['axis_0'=8], [{'axis_0'}]}"], 8) is None

    groups_text = "replica_groups=mesh['axis_0'=8] {'axis_0'}, mesh['fsdp'=2,'ep'=4] {'ep'}"
    mesh = mesh_of_groups(groups_text, 8)
    assert mesh is not None
    assert mesh.sizes == {"fsdp": 2, "ep": 4}
    assert mesh_of_groups("replica_groups=mesh['axis_0'=8] {'axis_0'}", 8) is None

    header = (
        'HloModule f, frontend_attributes={xla.sdy.meshes={mesh = #sdy.mesh<["a"=2, "b"=4]>}}\n'
    )
    mesh = mesh_before_optimization(header, 8)
    assert mesh is not None
    assert mesh.sizes == {"a": 2, "b": 4}


def test_the_order_of_devices_is_that_of_the_mesh() -> None:
    mesh = mesh_of_shardings(["{mesh['a'=2,'b'=2], device_ids=(0,2,1,3), [{'a'}]}"], 4)
    assert mesh is not None
    assert mesh.device_ids == (0, 2, 1, 3)
    split = parse_split("{mesh['a'=2,'b'=2], device_ids=(0,2,1,3), [{'a'}]}", 1)
    assert split is not None
    assert {frozenset(group) for group in split.device_groups[0]} == {
        frozenset({0, 1}),
        frozenset({2, 3}),
    }


def test_an_unnamed_mesh_refines_all_that_is_counted() -> None:
    assert unnamed_mesh("<=[2,4] <=[8]", 8).sizes == {"axis_0": 2, "axis_1": 4}
    assert unnamed_mesh("<=[2,4] <=[4,2]", 8).sizes == {"axis_0": 2, "axis_1": 2, "axis_2": 2}
    assert unnamed_mesh("<=[2,6] <=[3,4]", 12).sizes == {"axis_0": 2, "axis_1": 6}
    assert unnamed_mesh("", 1).sizes == {}
    text = "devices=[4,1,2]<=[2,4]T(1,0) replica_groups=[4,2]<=[2,2,2]T(1,0,2) <=[8] <=[16]"
    assert unnamed_mesh(text, 8).sizes == {"axis_0": 2, "axis_1": 2, "axis_2": 2}
    assert unnamed_mesh("", 8).sizes == {"axis_0": 8}
    assert not has_names(unnamed_mesh("", 8).sizes)
    assert has_names(["data", "ep"])


def test_shardings_of_the_module_before_optimization() -> None:
    text = (
        "HloModule f\n\n%g {\n  %p = f32[] parameter(0), sharding={replicated}\n}\n\n"
        "ENTRY %main {\n  %w = f32[8] parameter(0), sharding={mesh['e'=8], [{'e'}]}\n"
        "  %x = f32[8] parameter(1)\n}\n"
    )
    assert shardings_before_optimization(text) == {0: "{mesh['e'=8], [{'e'}]}"}
