"""Multiply by `jax.lax.ragged_dot`: grouped kernels on TPU, masked products elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moe_shard.moe.grouped import tpu_kernel


def ragged_product(
    x: Float[Array, "N A"], w: Float[Array, "G A P"], group_sizes: Int[Array, "G"]
) -> Float[Array, "N P"]:
    """Multiply each row by its group's weights, of any sizes; rows past the groups give 0."""
    # A narrow dtype is its own result dtype: the hardware sums in float32, and a float32 result
    # would be an array of twice the size that only waits for its cast.
    wide = jnp.float32 if x.dtype == jnp.float32 else None
    y = lax.ragged_dot(x, w, group_sizes, preferred_element_type=wide)
    return only_groups(y, group_sizes)


def only_groups(y: Float[Array, "N P"], group_sizes: Int[Array, "G"]) -> Float[Array, "N P"]:
    """Set the rows past the groups to 0, and their gradients too.

    A kernel may leave uninitialised memory there, and NaN times a combine weight of 0 is NaN.
    """
    inside = jnp.arange(y.shape[0]) < jnp.sum(group_sizes)
    return jnp.where(inside[:, None], y, 0)


@dataclass(frozen=True)
class OnTpu:
    """Use `lax.ragged_dot` for the rows, and a kernel here for the gradient of the weights.

    Attributes:
        interpret: whether that kernel runs in Pallas's interpreter, on a CPU.
    """

    interpret: bool = False

    def multiply(
        self,
        x: Float[Array, "N A"],
        w: Float[Array, "G A P"] | Float[Array, "G P A"],
        group_sizes: Int[Array, "G"],
        *,
        transposed: bool,
    ) -> Float[Array, "N P"]:
        """Multiply rows by their group's weights or the transpose; rows past the groups give 0."""
        return ragged_product(x, jnp.swapaxes(w, 1, 2) if transposed else w, group_sizes)

    def outer(
        self, x: Float[Array, "N A"], dy: Float[Array, "N P"], group_sizes: Int[Array, "G"]
    ) -> Float[Array, "G A P"]:
        """Sum the outer products of x's and dy's rows over each group; 0 for an empty group."""
        return tpu_kernel.outer(x, dy, group_sizes, interpret=self.interpret)
