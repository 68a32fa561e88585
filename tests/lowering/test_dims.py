"""Following dims through layouts and products, against NumPy's strides."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from moe_shard.lowering.dims import free_dims, product_dims, reshaped, whole
from moe_shard.lowering.hlo import parse_module


def dims_by_numpy(before: tuple[int, ...], after: tuple[int, ...]) -> list[set[int]]:
    """For each dim of the result, the dims of the operand that change along it."""
    coordinates = np.stack(np.meshgrid(*map(np.arange, before), indexing="ij"), -1)
    moved = coordinates.reshape(*after, len(before))
    found: list[set[int]] = []
    for dim, size in enumerate(after):
        first, second = moved.take(range(size - 1), dim), moved.take(range(1, size), dim)
        changes = (first != second).any(axis=tuple(range(len(after))))
        found.append({int(at) for at in np.flatnonzero(changes)})
    return found


BEFORE = [(2, 3, 4), (6, 4), (4, 6), (1, 8, 3), (2, 2, 2, 3), (24,)]
AFTER = [
    shape
    for rank in (1, 2, 3)
    for shape in itertools.product([1, 2, 3, 4, 6, 8, 12, 24], repeat=rank)
    if math.prod(shape) == 24
]


@pytest.mark.parametrize("before", BEFORE)
def test_a_reshape_keeps_track_of_the_dims(before: tuple[int, ...]) -> None:
    for after in AFTER:
        text = [f"f32[{','.join(map(str, shape))}]" for shape in (before, after)]
        found = reshaped(whole(len(before)), *text, in_memory=False)
        assert found is not None
        for size, told, true in zip(after, found, dims_by_numpy(before, after), strict=True):
            if size > 1:
                assert true <= set(told), (before, after, found)


def test_a_bitcast_goes_by_memory() -> None:
    # f32[2,3]{0,1} lies in memory as f32[3,2]{1,0} does.
    assert reshaped(whole(2), "f32[2,3]{0,1}", "f32[3,2]{1,0}", in_memory=True) == ((1,), (0,))
    assert reshaped(whole(2), "f32[2,3]{1,0}", "f32[2,3]{1,0}", in_memory=True) == ((0,), (1,))
    assert reshaped(whole(2), "f32[2,3]", "f32[7]", in_memory=False) is None


def test_of_dropped_dims_of_one_element_any_may_be_left() -> None:
    assert reshaped(whole(4), "f32[1,1,8,4]", "f32[1,8,4]", in_memory=False) == (
        (0, 1),
        (2,),
        (3,),
    )


PRODUCTS = """\
HloModule step

ENTRY %main (x: f32[6,7,9], w: f32[6,9,5]) -> f32[6,7,5] {
  %x = f32[6,7,9]{2,1,0} parameter(0)
  %w = f32[6,9,5]{2,1,0} parameter(1)
  %dot = f32[6,7,5]{2,1,0} dot(%x, %w), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}
  ROOT %conv = f32[6,7,5]{2,1,0} convolution(%x, %w), window={size=6 stride=5 lhs_dilate=6}, dim_labels=0bf_0io->0bf
}
"""  # noqa: E501


@pytest.mark.parametrize("name", ["dot", "conv"])
def test_a_product_and_how_tpu_writes_it(name: str) -> None:
    computation = parse_module(PRODUCTS).entry
    product = computation.instruction(name)
    left, right = (product_dims(computation, product, side) for side in (0, 1))
    assert (left.batch, left.contracted) == ((0,), (2,))
    assert (right.batch, right.contracted) == ((0,), (1,))
    assert free_dims(computation, product, 1) == ((), (), (-1,))
    assert free_dims(computation, product, 0) == ((), (-1,), ())
