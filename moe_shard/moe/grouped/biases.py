"""Expand the biases of groups to their rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_shard.sharding.varying import vary_alike


def of_groups(
    bias: Float[Array, "G *P"], group_sizes: Int[Array, "G"], *, rows: int
) -> Float[Array, "N *P"]:
    """Return the bias of each row's group; zero past the last group.

    It is a product with a mask, of cost N * G against N * A * P for the rows: its gradient is a
    product too, the sum over a group's rows in float32, the same on every run.

    Args:
        bias: bias of each group.
        group_sizes: rows of each group; groups follow each other from row 0.
        rows: N, number of rows.
    """
    bias, group_sizes = vary_alike(bias, group_sizes)
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(rows)[:, None]
    mask = ((ends - group_sizes <= row) & (row < ends)).astype(bias.dtype)
    flat = bias.reshape(bias.shape[0], -1)
    # HIGHEST: a TPU would round a float32 bias to bfloat16.
    chosen = jnp.matmul(mask, flat, precision=jax.lax.Precision.HIGHEST)
    return chosen.reshape(rows, *bias.shape[1:])
