"""Compute grouped products by blocks of rows, each of one group, with a common derivative.

A routine by blocks needs two products: rows by their group's weights (the forward, and with the
weights transposed the gradient of the rows), and rows by rows within a group (the gradient of the
weights). Where the groups are aligned, no block straddles two of them and no row is masked.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Routine(Protocol):
    """Compute the two products. Hashable: equal routines are one program."""

    def multiply(
        self,
        x: Float[Array, "N A"],
        w: Float[Array, "G A P"] | Float[Array, "G P A"],
        group_sizes: Int[Array, "G"],
        *,
        transposed: bool,
    ) -> Float[Array, "N P"]:
        """Multiply rows by their group's weights or the transpose; rows past the groups give 0."""
        ...

    def outer(
        self, x: Float[Array, "N A"], dy: Float[Array, "N P"], group_sizes: Int[Array, "G"]
    ) -> Float[Array, "G A P"]:
        """Sum the outer products of x's and dy's rows over each group; 0 for an empty group."""
        ...


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def product(
    x: Float[Array, "N A"],
    w: Float[Array, "G A P"],
    group_sizes: Int[Array, "G"],
    routine: Routine,
) -> Float[Array, "N P"]:
    """Multiply by a routine, with gradients by the same routine.

    Args:
        x: rows, those of a group one after another.
        w: weights of the groups. They vary over the same mesh axes as `x` and `group_sizes`;
            `vary_alike` sums the gradient over axes that they did not vary over.
        group_sizes: rows of each group.
        routine: computes the products.
    """
    return routine.multiply(x, w, group_sizes, transposed=False)


_Residuals = tuple[Float[Array, "N A"], Float[Array, "G A P"], Int[Array, "G"]]


def _forward(
    x: Float[Array, "N A"],
    w: Float[Array, "G A P"],
    group_sizes: Int[Array, "G"],
    routine: Routine,
) -> tuple[Float[Array, "N P"], _Residuals]:
    return product(x, w, group_sizes, routine), (x, w, group_sizes)


def _backward(
    routine: Routine, residuals: _Residuals, dy: Float[Array, "N P"]
) -> tuple[Float[Array, "N A"], Float[Array, "G A P"], None]:
    x, w, group_sizes = residuals
    dx = routine.multiply(dy, w, group_sizes, transposed=True)
    return dx, routine.outer(x, dy, group_sizes), None


product.defvjp(_forward, _backward)


def owners(group_sizes: Int[Array, "G"], *, blocks: int, block: int) -> Int[Array, "blocks"]:
    """Return the group of each block, -1 for a block past the last group.

    Args:
        group_sizes: multiples of `block`.
        blocks: number of blocks.
        block: rows of a block.
    """
    ends = jnp.cumsum(group_sizes) // block
    index = jnp.arange(blocks)
    ended = jnp.sum(ends[None, :] <= index[:, None], axis=1, dtype=jnp.int32)
    return jnp.where(ended < group_sizes.shape[0], ended, -1)
