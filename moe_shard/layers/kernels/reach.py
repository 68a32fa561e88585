"""Say which keys a query sees as one range of places in the sequence.

Where keys are in the order of the sequence and each document is in one piece, what a token sees is
a range that ends with itself: from the start of its document, its window or its chunk. Two numbers
a token take the place of a mask of S x T elements, and of positions and segment ids in a kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moe_shard.layers.kernels.rule import AttentionRule, Tokens


class Reach(NamedTuple):
    """Hold the places of the first and the last key that each query sees."""

    first: Int[Array, "B S"]
    last: Int[Array, "B S"]


def reach_of(queries: Tokens, keys: Tokens, *, rule: AttentionRule) -> Reach:
    """Return what each query sees.

    Args:
        queries: with the place of each in the sequence.
        keys: all tokens of the sequence in order, the tokens of a document one after another.
        rule: the layer's span.
    """
    assert queries.order is not None
    ids = keys.segment_ids
    place = jnp.arange(ids.shape[1], dtype=jnp.int32)
    starts = jnp.concatenate(
        [jnp.ones_like(ids[:, :1], dtype=bool), ids[:, 1:] != ids[:, :-1]], axis=1
    )
    of_document = jax.lax.cummax(jnp.where(starts, place, 0), axis=1)
    order = jnp.asarray(queries.order, jnp.int32)
    first = jnp.take(of_document, order, axis=1)
    if rule.span == "sliding":
        first = jnp.maximum(first, order - (rule.window - 1))
    elif rule.span == "chunked":
        in_chunk = (queries.positions % rule.window).astype(jnp.int32)
        first = jnp.maximum(first, order - in_chunk)
    return Reach(first, jnp.broadcast_to(order, first.shape))
