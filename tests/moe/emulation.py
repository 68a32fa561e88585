"""`jax.lax.ragged_all_to_all` for backends without it, written from its documentation.

Slow, and made of nothing that the package uses: every device gathers every operand and then copies
what is meant for it, slice by slice. It lets the transport that TPU and GPU use be judged on CPU.
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
    """As documented, for slices along the first dim."""
    del recv_sizes  # redundant: they are the senders' sizes
    size = jax.lax.axis_size(axis_name)
    me = jax.lax.axis_index(axis_name)
    operands, starts, sizes, places = (
        jax.lax.all_gather(each, axis_name)
        for each in (operand, input_offsets, send_sizes, output_offsets)
    )
    each_device = input_offsets.shape[0] // size
    row = jnp.arange(output.shape[0])

    def receive(index: jax.Array, result: jax.Array) -> jax.Array:
        sender, slot = index // each_device, me * each_device + index % each_device
        place, count = places[sender, slot], sizes[sender, slot]
        here = (row >= place) & (row < place + count)
        source = jnp.clip(starts[sender, slot] + row - place, 0, operand.shape[0] - 1)
        return jnp.where(here[:, None], operands[sender][source], result)

    for index in range(size * each_device):
        output = receive(jnp.int32(index), output)
    return output
