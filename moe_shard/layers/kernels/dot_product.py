"""Attend in two products with all scores between them, an array of S x T: for short sequences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_shard.layers.kernels.rule import (
    AttentionCase,
    AttentionRule,
    Tokens,
    named_context,
    seen_tokens,
)


def unsupported(_case: AttentionCase) -> str | None:
    """Return why this cannot compute a case: it always can."""
    return None


def attend(
    query: Float[Array, "B S N D"],
    key: Float[Array, "B T J D"],
    value: Float[Array, "B T J Dv"],
    queries: Tokens,
    keys: Tokens,
    *,
    rule: AttentionRule,
    sink: Float[Array, "N"] | None,
) -> Float[Array, "B S N Dv"]:
    """Weight values by the softmax of the scores of the tokens that are seen.

    Args:
        query: N / J consecutive heads for each key head, rotated by their positions.
        key: rotated by their positions.
        value: values of the same tokens.
        queries: the tokens that attend; each must see at least one.
        keys: the tokens attended to.
        rule: mask and scores.
        sink: see `attention_weights`.
    """
    rows, tokens, heads, dim = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(rows, tokens, kv_heads, heads // kv_heads, dim)
    scores = rule.scale * jnp.einsum(
        "bsjgd,btjd->bjgst", grouped, key, preferred_element_type=jnp.float32
    )
    of_heads = rows, heads, *scores.shape[-2:]
    seen = seen_tokens(queries, keys, rule=rule)[:, None]
    weights = attention_weights(scores.reshape(of_heads), seen, soft_cap=rule.soft_cap, sink=sink)
    weights = weights.astype(value.dtype).reshape(scores.shape)
    attended = jnp.einsum("bjgst,btjd->bsjgd", weights, value)
    return named_context(attended.reshape(rows, tokens, heads, value.shape[-1]))


def attention_weights(
    scores: Float[Array, "B N S T"],
    seen: Bool[Array, "B 1 S T"],
    *,
    soft_cap: float,
    sink: Float[Array, "N"] | None,
) -> Float[Array, "B N S T"]:
    """Take the softmax over the tokens that are seen.

    Args:
        scores: scaled, in float32.
        seen: the mask; each token must see at least one.
        soft_cap: see `AttentionRule`.
        sink: for each head, the score of a token without a value (GPT-OSS, arXiv 2508.10925), so
            that a token's weights need not sum to 1; None for no sink.
    """
    if soft_cap != 0:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
    if sink is None:
        return jax.nn.softmax(scores, axis=-1)
    nothing = sink.astype(scores.dtype)[:, None, None]
    most = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), nothing)
    most = jax.lax.stop_gradient(most)
    exp = jnp.exp(scores - most)
    return exp / (jnp.sum(exp, axis=-1, keepdims=True) + jnp.exp(nothing - most))
