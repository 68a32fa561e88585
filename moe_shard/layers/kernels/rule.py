"""Say which token sees which, and how scores become weights, for every attention implementation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int

from moe_shard.config.attention_config import AttentionConfig, AttentionSpan

CONTEXT = "context"
"""Name of what an implementation's gradient needs of its forward pass, for remat policies: the
weighted values and, where a kernel has them, the logarithms of the weights' sums."""

_Arrays = TypeVar("_Arrays")


class Tokens(NamedTuple):
    """Describe the tokens that attend, or those attended to.

    Attributes:
        positions: position of each token in its document.
        segment_ids: its document.
        order: place of each token in its sequence, the same in all sequences. A document's tokens
            stand together, so their positions differ as their indices do, and no token sees one of
            a higher index. A NumPy array is known when a program is traced, and what it rules out
            is not in the program. None where the order is not known.
    """

    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    order: Int[Array, "S"] | Int[np.ndarray, "S"] | None = None


@dataclass(frozen=True, kw_only=True)
class AttentionRule:
    """Describe a layer's attention without its sizes.

    Attributes:
        scale: factor of the products of queries and keys.
        soft_cap: replaces a score s by soft_cap * tanh(s / soft_cap) (Gemma 2, arXiv 2408.00118);
            0 leaves scores alone.
        span: which earlier tokens of its document a token sees: "global": all of them; "sliding":
            the nearest `window`, itself included; "chunked": those of its own chunk of `window`.
        window: tokens; 0 where the span is global.
    """

    scale: float
    soft_cap: float = 0.0
    span: AttentionSpan = "global"
    window: int = 0

    @classmethod
    def of(cls, config: AttentionConfig, span: AttentionSpan) -> AttentionRule:
        """Make the rule of a layer with this span."""
        windows = {"sliding": config.sliding_window_size, "chunked": config.chunk_attn_window_size}
        return cls(
            scale=_scale(config),
            soft_cap=config.attn_logits_soft_cap,
            span=span,
            window=windows.get(span, 0),
        )


def _scale(config: AttentionConfig) -> float:
    """Return the scale of the scores: by key size and, with MLA and YaRN, by the extension."""
    latent, rope = config.attention_type == "mla", config.rope
    dim = config.qk_nope_head_dim + config.qk_rope_head_dim if latent else config.head_dim
    scale = 1 / math.sqrt(dim) if config.attention_scale == -1 else config.attention_scale
    if latent and rope.rope_type == "yarn":
        scale *= (0.1 * rope.mscale * math.log(rope.rope_factor) + 1) ** 2
    return scale


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """Describe what one device computes, as far as the choice of an implementation needs it.

    Attributes:
        platform: "cpu", "tpu", "cuda" or "rocm"; "unknown" where nothing will run.
        rule: the layer's rule.
        sink: whether the heads have sinks.
        rows: B, sequences.
        queries: S.
        keys: T.
        heads: N.
        kv_heads: J.
        key_dim: D, elements of a query and key.
        value_dim: Dv.
        dtype: dtype of queries, keys and values.
        same_tokens: whether queries and keys are those of the same tokens, in order.
    """

    platform: str
    rule: AttentionRule
    sink: bool
    rows: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: DTypeLike
    same_tokens: bool = True


def seen_tokens(queries: Tokens, keys: Tokens, *, rule: AttentionRule) -> Bool[Array, "B S T"]:
    """Mask what a token may attend to: itself and earlier tokens of its document, in its span.

    Args:
        queries: the tokens that attend.
        keys: the tokens attended to.
        rule: the layer's span.
    """
    at, of = queries.positions[:, :, None], keys.positions[:, None, :]
    seen = (queries.segment_ids[:, :, None] == keys.segment_ids[:, None, :]) & (of <= at)
    if rule.span == "sliding":
        seen &= at - of < rule.window
    elif rule.span == "chunked":
        seen &= at // rule.window == of // rule.window
    return seen


def named_context(made: _Arrays) -> _Arrays:
    """Name arrays as what attention has computed, see `CONTEXT`."""
    named: _Arrays = jax.tree.map(lambda array: checkpoint_name(array, CONTEXT), made)
    return named
