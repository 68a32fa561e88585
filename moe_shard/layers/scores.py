"""Which token sees which, and attention from scores to values. Arithmetic only; no mesh.

T: keys and values, as many as S or, with a cache, its places.
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
    """True where a token may attend: to itself and earlier ones of its document, within its span.

    Args:
        positions: of the tokens that attend, in their documents.
        segment_ids: their documents.
        key_positions: of the tokens attended to.
        key_segment_ids: their documents.
        config: sizes of the spans.
        span: the layer's.
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
    """The softmax over what is seen.

    Args:
        scores: in float32, scaled.
        seen: at least one token for each that attends.
        soft_cap: scores s become soft_cap * tanh(s / soft_cap) (Gemma 2, arXiv 2408.00118);
            0: they stay.
        sink: for each head the score of a token without a value (GPT-OSS, arXiv 2508.10925), so
            that a row's weights need not sum to 1; None: there is none.
    """
    if soft_cap != 0:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
    if sink is None:
        return jax.nn.softmax(scores, axis=-1)
    nothing = sink.astype(scores.dtype)[:, None, None]
    most = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), nothing)
    most = jax.lax.stop_gradient(most)
    shares = jnp.exp(scores - most)
    return shares / (jnp.sum(shares, axis=-1, keepdims=True) + jnp.exp(nothing - most))


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
    """What `jax.nn.dot_product_attention` computes, with soft cap, sink, or values of another size.

    Args:
        query: as many for each key head as N / J, one after the other.
        key: turned by their positions.
        value: likewise.
        seen: see `seen_tokens`.
        scale: of the scores.
        soft_cap: see `attention_weights`.
        sink: see there.
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
