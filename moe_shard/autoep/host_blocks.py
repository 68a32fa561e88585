"""Parts of parameters on the host: what is in them, one after the other, never all at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_shard.errors import UserError
from moe_shard.models.params import Params

Path = tuple[str, ...]
Index = tuple[int, ...]
Bounds = tuple[tuple[int, int], ...]
"""First and one past the last element along each dim."""

_LARGE, _SMALL = 16 * 2**20, 2**20
"""Bytes: a block is no larger where its parts would not be smaller."""


class Block(NamedTuple):
    """A part of a parameter.

    Attributes:
        param: the parameter's path.
        shape: the parameter's.
        bounds: of the part in it.
        values: of the part.
    """

    param: Path
    shape: tuple[int, ...]
    bounds: Bounds
    values: np.ndarray


def leaves_of(tree: Any) -> list[tuple[Path, Any]]:
    """The leaves of nested dicts, each with its path."""
    return [
        (tuple(key.key for key in path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def bounds_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    """What slices take of a shape."""
    cut = (part.indices(size) for part, size in zip(index, shape, strict=True))
    return tuple((low, high) for low, high, _ in cut)


def blocks_of(params: Params) -> Iterator[Block]:
    """Parameters on devices, copied to the host shard by shard, of large ones a layer at a time.

    Args:
        params: on devices of this process.

    Raises:
        UserError: a part of them is on other processes' devices.
    """
    arrays = leaves_of(params)
    if not all(array.is_fully_addressable for _, array in arrays):
        raise UserError(
            "an export of parameters that are on other processes' devices as well\n"
            "fix: export from their checkpoint, in one process: moe-shard export"
        )
    for path, array in arrays:
        shards = {bounds_of(shard.index, array.shape): shard.data for shard in array.global_shards}
        for bounds, shard in shards.items():
            outer = _outer_dims(shard)
            for index in np.ndindex(shard.shape[:outer]):
                lows = (low + at for (low, _), at in zip(bounds, index, strict=False))
                within = (*((low, low + 1) for low in lows), *bounds[outer:])
                part = np.array(index, np.int32)
                yield Block(path, array.shape, within, np.asarray(_take(shard, part)))


def _outer_dims(array: jax.Array) -> int:
    """How many of the first dims are gone through one by one."""

    def size(outer: int) -> int:
        return math.prod(array.shape[outer:]) * array.dtype.itemsize

    outer = 0
    while size(outer) > _LARGE and outer < array.ndim and size(outer + 1) >= _SMALL:
        outer += 1
    return outer


@jax.jit
def _take(array: jax.Array, index: jax.Array) -> jax.Array:
    """The part at an index of the first dims, which it keeps; an array that is freed after use."""
    outer = index.size
    starts = [*index, *[0] * (array.ndim - outer)]
    return jax.lax.dynamic_slice(array, starts, [*[1] * outer, *array.shape[outer:]])
