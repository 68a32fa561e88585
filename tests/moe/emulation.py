"""Emulate `jax.lax.ragged_all_to_all` on backends without it, written from its documentation.

The emulation is slow and shares nothing with the package: every device gathers every operand and
then looks up, for each row of its output, the slice that contains it. So the exchange that TPU and
GPU use can be tested on CPU.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def ragged_all_to_all(
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    *,
    axis_name: Any,
) -> jax.Array:
    """Exchange slices along the first dim, as JAX documents it."""
    del recv_sizes  # redundant: they are the senders' sizes
    size = jax.lax.axis_size(axis_name)
    me = jax.lax.axis_index(axis_name)
    operands, starts, sizes, places = (
        jax.lax.all_gather(each, axis_name)
        for each in (operand, input_offsets, send_sizes, output_offsets)
    )
    # Each sender's slice for this device; each row of the output is in at most one of them.
    each_device = input_offsets.shape[0] // size
    mine = me * each_device + jnp.arange(each_device)
    start, count, place = (each[:, mine].reshape(-1, 1) for each in (starts, sizes, places))
    row = jnp.arange(output.shape[0])
    within = (row >= place) & (row < place + count)
    of = jnp.argmax(within, axis=0)
    source = row + jnp.take_along_axis(start - place, of[:, None], axis=0)[:, 0]
    received = operands[of // each_device, jnp.clip(source, 0, operand.shape[0] - 1)]
    return jnp.where(within.any(axis=0)[:, None], received, output)
