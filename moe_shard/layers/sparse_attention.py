"""Attend to the tokens that an indexer has chosen, block by block of the tokens that attend.

No array of S x T exists: a block's scores are computed, and in the backward pass computed again.
The products are those of full attention, under a mask: this is about being right, not fast.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from moe_shard.layers.indexer import Indexed, chosen
from moe_shard.layers.kernels.dot_product import attention_weights
from moe_shard.layers.kernels.rule import AttentionRule, Tokens, named_context, seen_tokens

BLOCK = 128
"""Tokens that attend at once."""

_NOWHERE = -2
"""Document of what fills the last block up; no token is of it."""


def attend_sparsely(
    query: Float[Array, "B S N D"],
    key: Float[Array, "B T N D"],
    value: Float[Array, "B T N Dv"],
    queries: Tokens,
    keys: Tokens,
    indexed: Indexed,
    index_key: Float[Array, "B T Di"],
    *,
    rule: AttentionRule,
    sink: Float[Array, "N"] | None,
    most: int,
) -> Float[Array, "B S N Dv"]:
    """Weight values by the softmax of the scores of the tokens that are chosen.

    Args:
        query: rotated by their positions.
        key: rotated by their positions.
        value: values of the same tokens.
        queries: the tokens that attend; each must see at least one.
        keys: the tokens attended to.
        indexed: what the indexer makes of the tokens that attend.
        index_key: the indexer's keys of the tokens attended to.
        rule: mask and scores.
        sink: see `attention_weights`.
        most: tokens that each token attends to.
    """
    tokens = query.shape[1]
    size = min(BLOCK, tokens)
    blocks = -(-tokens // size)

    def divided(x: Shaped[Array, "B S ..."], fill: int = 0) -> Shaped[Array, "blocks B s ..."]:
        pad = ((0, 0), (0, blocks * size - tokens), *((0, 0),) * (x.ndim - 2))
        x = jnp.pad(x, pad, constant_values=fill)
        return jnp.moveaxis(x.reshape(x.shape[0], blocks, size, *x.shape[2:]), 1, 0)

    def block(each: Any) -> Float[Array, "B s N Dv"]:
        query, indexed, positions, segment_ids = each
        seen = seen_tokens(Tokens(positions, segment_ids), keys, rule=rule)
        mask = chosen(indexed, index_key, seen, most=most)
        scores = rule.scale * jnp.einsum(
            "bsnd,btnd->bnst", query, key, preferred_element_type=jnp.float32
        )
        weights = attention_weights(scores, mask[:, None], soft_cap=rule.soft_cap, sink=sink)
        return jnp.einsum("bnst,btnd->bsnd", weights.astype(value.dtype), value)

    each = (
        divided(query),
        jax.tree.map(divided, indexed),
        divided(queries.positions),
        divided(queries.segment_ids, _NOWHERE),
    )
    # The loop keeps no block's scores for the backward pass.
    attended = jax.lax.map(jax.checkpoint(block, prevent_cse=False), each)
    attended = jnp.moveaxis(attended, 0, 1).reshape(query.shape[0], -1, *attended.shape[3:])
    return named_context(attended[:, :tokens])
