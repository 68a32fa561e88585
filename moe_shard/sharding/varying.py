"""Declare over which mesh axes arrays vary inside `jax.shard_map(check_vma=True)`.

JAX joins such types by itself in most places, but not for the first carry of a loop or the
gradient of a custom_vjp. Without check_vma, and outside shard_map, all of this does nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array


def varying_axes(*arrays: Array) -> frozenset[str]:
    """Return the mesh axes over which any of the arrays varies."""
    return frozenset[str]().union(*(jax.typeof(each).manual_axis_type.varying for each in arrays))


def vary_over(array: Array, axes: Iterable[str]) -> Array:
    """Declare that the array varies over these axes too; its gradient is the sum over them."""
    missing = tuple(sorted(frozenset(axes) - varying_axes(array)))
    return jax.lax.pcast(array, missing, to="varying") if missing else array


def vary_alike(*arrays: Array) -> tuple[Array, ...]:
    """Return the arrays, each varying over every mesh axis that any of them varies over."""
    axes = varying_axes(*arrays)
    return tuple(vary_over(array, axes) for array in arrays)


def zeros(shape: tuple[int, ...], dtype: DTypeLike, *like: Array) -> Array:
    """Return zeros that vary over the mesh axes that any of `like` varies over."""
    return vary_over(jnp.zeros(shape, dtype), varying_axes(*like))
