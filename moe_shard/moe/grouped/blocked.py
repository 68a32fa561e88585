"""Multiply block by block of rows, in a loop: the fastest on a CPU, which has no grouped kernels.

A block is multiplied by the weights of its own group only, so the FLOPs are those of one product
over the rows. The overhead is a copy of a group's weights for each block, hence blocks are as large
as the padding allows (`GroupedProduct.alignment`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moe_shard.config.model_config import GatingConfig
from moe_shard.layers.activation import gated
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

        def step(_: None, each: tuple[Array, Array]) -> tuple[None, Array]:
            rows, owner = each
            return None, _times(rows, w, owner, transposed=transposed).astype(x.dtype)

        _, y = lax.scan(step, None, (self._split(x), self._owners(x, group_sizes)))
        return y.reshape(x.shape[0], -1)

    def gated(
        self,
        x: Float[Array, "N A"],
        gate: Float[Array, "G A P"],
        up: Float[Array, "G A P"],
        biases: Sequence[Float[Array, "G P"]],
        group_sizes: Int[Array, "G"],
        *,
        gating: GatingConfig,
        keep: bool,
    ) -> tuple[Float[Array, "N P"], ...]:
        """Compute the activation of gate and up block by block, see `gated.GatedRoutine`."""

        def step(_: None, each: tuple[Array, Array]) -> tuple[None, tuple[Array, ...]]:
            rows, owner = each
            of_gate, of_up = (_times(rows, w, owner) for w in (gate, up))
            if biases:
                inside = owner >= 0
                of_gate += jnp.where(inside, biases[0][owner], 0)
                of_up += jnp.where(inside, biases[1][owner], 0)
            hidden = gated(of_gate, of_up, gating)
            found = (hidden, of_gate, of_up) if keep else (hidden,)
            return None, tuple(y.astype(x.dtype) for y in found)

        _, found = lax.scan(step, None, (self._split(x), self._owners(x, group_sizes)))
        return tuple(y.reshape(x.shape[0], -1) for y in found)

    def gated_dx(
        self,
        by_gate: Float[Array, "N P"],
        by_up: Float[Array, "N P"],
        gate: Float[Array, "G A P"],
        up: Float[Array, "G A P"],
        group_sizes: Int[Array, "G"],
    ) -> Float[Array, "N A"]:
        """Add up the gradients of the rows by gate and by up, see `gated.GatedRoutine`."""

        def step(_: None, each: tuple[Array, Array, Array]) -> tuple[None, Array]:
            of_gate, of_up, owner = each
            dx = _times(of_gate, gate, owner, transposed=True)
            return None, (dx + _times(of_up, up, owner, transposed=True)).astype(by_gate.dtype)

        each = (self._split(by_gate), self._split(by_up), self._owners(by_gate, group_sizes))
        _, dx = lax.scan(step, None, each)
        return dx.reshape(by_gate.shape[0], -1)

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


def _times(
    rows: Float[Array, "block _"], w: Float[Array, "G _ _"], owner: Array, transposed: bool = False
) -> Float[Array, "block _"]:
    """Multiply a block by its group's weights in float32; 0 past the groups."""
    rows = jnp.where(owner >= 0, rows, 0)
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return lax.dot_general(rows, w[owner], dims, preferred_element_type=jnp.float32)
