"""Multiply block by block of rows, in a loop: the fastest on a CPU, which has no grouped kernels.

A block is multiplied by the weights of its own group only, so the FLOPs are those of one product
over the rows. The overhead is a copy of a group's weights for each block, hence blocks are as large
as the padding allows (`GroupedProduct.alignment`).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moe_shard.moe.grouped.blocks import owners
from moe_shard.sharding import varying


@dataclass(frozen=True)
class Blocked:
    """Multiply `block` rows at a time, by `lax.scan`.

    Attributes:
        block: rows of a block; a divisor of the rows and of every group's size.
    """

    block: int

    def multiply(
        self,
        x: Float[Array, "N A"],
        w: Float[Array, "G A P"] | Float[Array, "G P A"],
        group_sizes: Int[Array, "G"],
        *,
        transposed: bool,
    ) -> Float[Array, "N P"]:
        """Multiply rows by their group's weights or the transpose; rows past the groups give 0."""
        contracted = 1 if transposed else 0

        def step(_: None, each: tuple[Array, Array]) -> tuple[None, Array]:
            rows, owner = each
            rows = jnp.where(owner >= 0, rows, 0)
            y = lax.dot_general(
                rows,
                w[owner],
                (((1,), (contracted,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            return None, y.astype(x.dtype)

        _, y = lax.scan(step, None, (self._split(x), self._owners(x, group_sizes)))
        return y.reshape(x.shape[0], -1)

    def outer(
        self, x: Float[Array, "N A"], dy: Float[Array, "N P"], group_sizes: Int[Array, "G"]
    ) -> Float[Array, "G A P"]:
        """Sum the outer products of x's and dy's rows over each group; 0 for an empty group."""

        def step(dw: Array, each: tuple[Array, Array, Array]) -> tuple[Array, None]:
            rows, dy_rows, owner = each
            rows = jnp.where(owner >= 0, rows, 0)
            more = lax.dot_general(
                rows, dy_rows, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )
            return dw.at[owner].add(more), None

        shape = (group_sizes.shape[0], x.shape[1], dy.shape[1])
        each = (self._split(x), self._split(dy), self._owners(x, group_sizes))
        zeros = varying.zeros(shape, jnp.float32, x, dy, group_sizes)
        dw, _ = lax.scan(step, zeros, each)
        return dw.astype(x.dtype)

    def _split(self, x: Float[Array, "N A"]) -> Float[Array, "blocks block A"]:
        return x.reshape(-1, self.block, x.shape[1])

    def _owners(self, x: Float[Array, "N A"], group_sizes: Int[Array, "G"]) -> Int[Array, "blocks"]:
        return owners(group_sizes, blocks=x.shape[0] // self.block, block=self.block)
