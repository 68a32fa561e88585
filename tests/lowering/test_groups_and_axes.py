"""Replica groups in every spelling against numpy, and groups back to mesh axes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_shard.errors import UserError
from moe_shard.lowering.mesh_axes import MeshAxes
from moe_shard.lowering.replica_groups import iota_ids, parse_groups, parse_pairs

dims = st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4)


def groups_along(mesh: np.ndarray, chosen: list[int]) -> set[frozenset[int]]:
    others = [axis for axis in range(mesh.ndim) if axis not in chosen]
    width = math.prod(mesh.shape[axis] for axis in chosen)
    rows = mesh.transpose([*others, *chosen]).reshape(-1, width)
    return {frozenset(map(int, row)) for row in rows}


def as_set(groups: list[list[int]]) -> set[frozenset[int]]:
    return {frozenset(group) for group in groups}


def test_listed() -> None:
    assert parse_groups("{{0,1},{2,3}}", 4) == [[0, 1], [2, 3]]
    assert parse_groups("{{0, 2}, {1, 3}}", 4) == [[0, 2], [1, 3]]
    assert parse_groups("{}", 4) == [[0, 1, 2, 3]]


@given(dims, st.data())
def test_iota_is_numpy_transpose(shape: list[int], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(shape))))
    total = math.prod(shape)
    width = data.draw(st.sampled_from([n for n in range(1, total + 1) if total % n == 0]))
    expected = np.arange(total).reshape(shape).transpose(order).reshape(-1, width)
    written = f"T({','.join(map(str, order))})"
    text = f"[{total // width},{width}]<=[{','.join(map(str, shape))}]{written}"
    assert parse_groups(text, total) == expected.tolist()
    assert iota_ids(shape, order) == expected.reshape(-1).tolist()


def test_iota_without_transpose() -> None:
    assert parse_groups("[2,4]<=[8]", 8) == [[0, 1, 2, 3], [4, 5, 6, 7]]


@given(dims, st.data())
def test_mesh_is_numpy_indexing(shape: list[int], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from(range(len(shape))), unique=True))
    axes = ",".join(f"'axis_{i}'={size}" for i, size in enumerate(shape))
    names = ",".join(f"'axis_{i}'" for i in chosen)
    total = math.prod(shape)
    grid = np.arange(total).reshape(shape)
    expected = groups_along(grid, sorted(chosen))
    assert as_set(parse_groups(f"mesh[{axes}] {{{names}}}", total)) == expected
    listed = data.draw(st.permutations(range(total)))
    permuted = np.array(listed).reshape(shape)
    text = f"mesh[{axes}], device_ids=({','.join(map(str, listed))}) {{{names}}}"
    assert as_set(parse_groups(text, total)) == groups_along(permuted, sorted(chosen))


def test_mesh_with_device_ids_as_iota() -> None:
    # Seen in XLA: a 4 x 2 mesh over the transpose of 2 x 4 devices.
    text = "mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0'}"
    grid = np.arange(8).reshape(2, 4).T.reshape(4, 1, 2)
    assert as_set(parse_groups(text, 8)) == groups_along(grid, [0])


def test_mesh_with_a_part_of_an_axis() -> None:
    # 'a':(2)4 is the middle of 'a' = 2 * 4 * 1.
    assert as_set(parse_groups("mesh['a'=8] {'a':(2)4}", 8)) == {
        frozenset({0, 1, 2, 3}),
        frozenset({4, 5, 6, 7}),
    }
    assert as_set(parse_groups("mesh['a'=8,'b'=2] {'a':(1)2,'b'}", 16)) == groups_along(
        np.arange(16).reshape(2, 4, 2), [0, 2]
    )


@pytest.mark.parametrize(
    "text",
    [
        "{{0,1},{1,2}}",
        "{{0,9}}",
        "[3,3]<=[8]",
        "[2,4]<=[2,4]T(0,0)",
        "[2,4]<=[2,4]T(5,1)",
        "mesh['a'=8] {'b'}",
        "mesh['a'=8] {'a':(3)2}",
        "mesh['a'=8], device_ids=([2,2]T(1,0)) {'a'}",
        "groups of four",
        "",
    ],
)
def test_what_does_not_add_up_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        parse_groups(text, 8)


def test_pairs() -> None:
    assert parse_pairs("{{0,1},{1,0}}") == [(0, 1), (1, 0)]
    for text in ("", "{{0,1,2}}", "[2,2]<=[4]"):
        with pytest.raises(UserError):
            parse_pairs(text)


SHAPES = [(8,), (2, 4), (4, 2), (2, 2, 2), (1, 2, 1, 4), (2, 1, 2, 2), (2, 2, 2, 2), (3, 2, 4)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("permuted", [False, True])
def test_axes_are_recovered(shape: tuple[int, ...], permuted: bool) -> None:
    total = math.prod(shape)
    ids = np.random.default_rng(0).permutation(total) if permuted else np.arange(total)
    mesh = {f"a{i}": size for i, size in enumerate(shape)}
    axes = MeshAxes(mesh, total, [int(i) for i in ids] if permuted else None)
    real = [axis for axis, size in enumerate(shape) if size > 1]
    for count in range(len(real) + 1):
        for chosen in itertools.combinations(real, count):
            groups = groups_along(ids.reshape(shape), list(chosen))
            assert axes.of_groups(groups) == tuple(f"a{axis}" for axis in chosen)


def test_groups_of_no_axes() -> None:
    axes = MeshAxes({"data": 2, "expert": 4}, 8)
    assert axes.of_groups([[0, 1], [2, 3], [4, 5], [6, 7]]) == ("?",)  # half of expert
    assert axes.of_groups([[0, 5], [1, 4], [2, 7], [3, 6]]) == ("?",)


def test_axes_of_pairs() -> None:
    axes = MeshAxes({"data": 2, "expert": 4}, 8)
    assert axes.of_pairs([(0, 1), (1, 2)]) == ("expert",)
    assert axes.of_pairs([(0, 4)]) == ("data",)
    assert axes.of_pairs([(0, 5)]) == ("data", "expert")
    assert axes.of_pairs([(0, 99)]) == ("?",)


def test_a_mesh_of_another_size_is_refused() -> None:
    with pytest.raises(UserError, match=r"data=2,expert=2 has 4 devices.*compiled for 8"):
        MeshAxes({"data": 2, "expert": 2}, 8)
    with pytest.raises(UserError, match="device_ids"):
        MeshAxes({"data": 2}, 2, [0, 0])
