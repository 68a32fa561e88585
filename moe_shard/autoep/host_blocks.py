"""Describe parts of parameters on the host, which are processed one at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

ParamPath = tuple[str, ...]
"""Path of a parameter, such as ("layers", "mlp", "experts", "gate")."""
Index = tuple[int, ...]
Bounds = tuple[tuple[int, int], ...]
"""Index of the first element and one past the last, along each dim."""

_LARGE, _SMALL = 16 * 2**20, 2**20
"""Bytes of a block at most, if it can be split that far."""


class HostBlock(NamedTuple):
    """Hold a part of a parameter.

    Attributes:
        param: the parameter's path.
        shape: the parameter's shape.
        bounds: the part's bounds in the parameter.
        values: the part's values.
    """

    param: ParamPath
    shape: tuple[int, ...]
    bounds: Bounds
    values: np.ndarray


def leaves_of(tree: Any) -> list[tuple[ParamPath, Any]]:
    """List the leaves of nested dicts, each with its path."""
    return [
        (tuple(key.key for key in path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def bounds_of_slices(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    """Return the bounds that slices select in a shape."""
    cut = (part.indices(size) for part, size in zip(index, shape, strict=True))
    return tuple((low, high) for low, high, _ in cut)
