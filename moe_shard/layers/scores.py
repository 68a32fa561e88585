"""Decide which token sees which, and attend from scores to values. Arithmetic only; no mesh.

T is the number of keys and values: S or, with a cache, its places.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_shard.config.attention_config import AttentionConfig, AttentionSpan


def seen_tokens(
    positions: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
    key_positions: Int[Array, "B T"],
    key_segment_ids: Int[Array, "B T"],
    *,
    config: AttentionConfig,
    span: AttentionSpan,
) -> Bool[Array, "B 1 S T"]:
    """Mask what a token may attend to: itself and earlier tokens of its document, in its span.

    Args:
        positions: positions, in their documents, of the tokens that attend.
        segment_ids: their documents.
        key_positions: positions of the tokens attended to.
        key_segment_ids: their documents.
        config: sizes of the spans.
        span: the layer's span.
    """
    at, of = positions[:, None, :, None], key_positions[:, None, None, :]
    seen = (segment_ids[:, None, :, None] == key_segment_ids[:, None, None, :]) & (of <= at)
    if span == "sliding":
        seen &= at - of < config.sliding_window_size
    elif span == "chunked":
        seen &= at // config.chunk_attn_window_size == of // config.chunk_attn_window_size
    return seen


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
        soft_cap: replaces a score s by soft_cap * tanh(s / soft_cap) (Gemma 2, arXiv
            2408.00118); 0 leaves scores alone.
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


def attend(
    query: Float[Array, "B S N D"],
    key: Float[Array, "B T J D"],
    value: Float[Array, "B T J Dv"],
    seen: Bool[Array, "B 1 S T"],
    *,
    scale: float,
    soft_cap: float,
    sink: Float[Array, "N"] | None,
) -> Float[Array, "B S N Dv"]:
    """Compute `jax.nn.dot_product_attention` with a soft cap, a sink, or values of another size.

    Args:
        query: N / J consecutive heads for each key head, rotated by their positions.
        key: rotated by their positions.
        value: values of the same tokens.
        seen: mask, see `seen_tokens`.
        scale: factor of the scores.
        soft_cap: see `attention_weights`.
        sink: see `attention_weights`.
    """
    rows, tokens, heads, dim = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(rows, tokens, kv_heads, heads // kv_heads, dim)
    scores = scale * jnp.einsum(
        "bsjgd,btjd->bjgst", grouped, key, preferred_element_type=jnp.float32
    )
    of_heads = rows, heads, *scores.shape[-2:]
    weights = attention_weights(scores.reshape(of_heads), seen, soft_cap=soft_cap, sink=sink)
    weights = weights.astype(value.dtype).reshape(scores.shape)
    attended = jnp.einsum("bjgst,btjd->bsjgd", weights, value)
    return attended.reshape(rows, tokens, heads, value.shape[-1])
