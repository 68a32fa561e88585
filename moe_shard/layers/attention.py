"""Attend causally within packed documents, with grouped queries (arXiv 2305.13245)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_shard.config.attention_config import AttentionConfig
from moe_shard.config.model_config import LayerKind
from moe_shard.layers.cache import LayerCache, Memory
from moe_shard.layers.heads import WHOLE_DIM, Heads, make_vector, make_weight
from moe_shard.layers.mla import LatentAttention
from moe_shard.layers.norm import RMSNorm, normalise
from moe_shard.sharding.annotate import Sharding


class Projected(NamedTuple):
    """Hold the queries, keys and values of a call's tokens."""

    query: Float[Array, "B S N D"]
    key: Float[Array, "B S J D"]
    value: Float[Array, "B S J D"]


class Attention(Heads):
    """Attend with fewer key and value heads than query heads.

    Args:
        config: heads, norms, positions.
        kind: the layer's span, and whether it has RoPE.
        model_dim: M, the model dim.
        norm_epsilon: epsilon of the norms of queries and keys.
        zero_centered: whether these norms multiply by 1 + scale.
        dtype: dtype of the products.
        weight_dtype: dtype of the parameters.
        sharding: the mesh and its rules.
        rngs: source of the initial weights.
    """

    def __init__(
        self,
        *,
        config: AttentionConfig,
        kind: LayerKind,
        model_dim: int,
        norm_epsilon: float,
        dtype: DTypeLike,
        weight_dtype: DTypeLike,
        sharding: Sharding,
        rngs: nnx.Rngs,
        zero_centered: bool = False,
    ) -> None:
        super().__init__(config=config, kind=kind, dtype=dtype, sharding=sharding)
        self.norm_epsilon = norm_epsilon
        dim = config.head_dim

        def project(heads: int, axis: str, variance: float = 1.0) -> nnx.Param[Array]:
            return make_weight(
                (model_dim, heads, dim),
                ("embed", axis, "head_dim"),
                variance=variance,
                dtype=weight_dtype,
                rngs=rngs,
            )

        def bias(heads: int, axis: str) -> nnx.Param[Array] | None:
            if not config.attention_bias:
                return None
            return make_vector((heads, dim), (axis, None), dtype=weight_dtype)

        def norm(heads: int, axis: str) -> RMSNorm | None:
            if not config.use_qk_norm or config.qk_norm_type == "l2":
                return None
            both = config.qk_norm_type == "projection"
            return RMSNorm(
                dim=(heads, dim) if both else dim,
                epsilon=norm_epsilon,
                weight_dtype=weight_dtype,
                axis=(axis, None) if both else "head_dim",
                zero_centered=zero_centered,
            )

        queries, keys = (config.num_query_heads, "heads"), (config.num_kv_heads, "kv_heads")
        # Scores are neither scaled nor normalised here, so small initial queries keep them small.
        variance = 1 / dim if config.attention_scale == 1 and not config.use_qk_norm else 1.0
        self.query = project(*queries, variance)
        shared = config.share_kv_projections
        self.key, self.value = project(*keys), None if shared else project(*keys)
        self.query_bias, self.key_bias = bias(*queries), bias(*keys)
        self.value_bias = None if shared else bias(*keys)
        self.query_norm, self.key_norm = norm(*queries), norm(*keys)
        gated = config.attention_output_gate
        self.gate = project(*queries) if gated else None
        self.gate_bias = bias(*queries) if gated else None
        self._make_output(model_dim=model_dim, value_dim=dim, dtype=weight_dtype, rngs=rngs)

    def _attended(
        self,
        x: Float[Array, "B S M"],
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        memory: Memory | None,
        order: Int[np.ndarray, "S"] | None,
    ) -> tuple[Float[Array, "B S N Dv"], LayerCache]:
        placed = self._placed(self._project(x), positions, memory)
        query, key, value = map(checkpoint_name, placed, ("query_proj", "key_proj", "value_proj"))
        cache: LayerCache = {}
        if memory is not None:
            cache = self._remember(memory, {"key": key, "value": value})
            key, value = cache["key"], cache["value"]
        return self._attend(query, key, value, positions, segment_ids, memory, order), cache

    def _gated(
        self, attended: Float[Array, "B S N D"], x: Float[Array, "B S M"]
    ) -> Float[Array, "B S N D"]:
        if self.gate is None:
            return attended
        gate = self._by_weight(x, self.gate, self.gate_bias, "heads", "output gate")
        return attended * jax.nn.sigmoid(gate)

    def empty_cache(self, rows: int, places: int) -> LayerCache:
        """Make a cache without tokens.

        Args:
            rows: B, sequences.
            places: T, tokens that a sequence may come to have.
        """
        each = (self.config.num_kv_heads, self.config.head_dim)
        return self._empty_cache(rows, places, {"key": each, "value": each})

    def _project(self, x: Float[Array, "B S M"]) -> Projected:
        """Compute queries, keys and values, without positions."""
        query = self._by_weight(x, self.query, self.query_bias, "heads", "query")
        key = self._by_weight(x, self.key, self.key_bias, "kv_heads", "key")
        value = key
        if self.value is not None:
            value = self._by_weight(x, self.value, self.value_bias, "kv_heads", "value")
        if self.config.use_v_norm:
            value = self._divided(value)
        if self.config.qk_norm_type != "head_after_rope":
            query, key = self._normalised(query, key)
        most = self.config.clip_qkv
        if most != -1:
            query, key, value = (jnp.clip(each, -most, most) for each in (query, key, value))
        return Projected(query, key, value)

    def _normalised(
        self, query: Float[Array, "B S N D"], key: Float[Array, "B S J D"]
    ) -> tuple[Float[Array, "B S N D"], Float[Array, "B S J D"]]:
        """Normalise queries and keys, where they have norms with scales."""
        if self.query_norm is None or self.key_norm is None:
            return query, key
        return self.query_norm(query), self.key_norm(key)

    def _by_weight(
        self,
        x: Float[Array, "B S M"],
        weight: nnx.Param[Array],
        bias: nnx.Param[Array] | None,
        heads: str,
        name: str,
    ) -> Float[Array, "B S N D"]:
        used = (f"activation_{heads}", "activation_head_dim")
        # For all projections and their gradients at once: XLA would gather it for either.
        x = self.sharding(x, *WHOLE_DIM, name="attention input")
        kernel = self._in_use(weight, (None, *used), name)
        product = self._adapted(jnp.einsum("bsm,mnd->bsnd", x, kernel), x, (None, *used), name)
        y = self._by_head(product, heads, name)
        return y if bias is None else y + self._in_use(bias, used, f"{name} bias")

    def _placed(
        self, projected: Projected, positions: Int[Array, "B S"], memory: Memory | None
    ) -> Projected:
        """Rotate queries and keys by their positions or, without RoPE, scale the queries."""
        query, key, value = projected
        config = self.config
        if self.kind.rope:
            query, key = self._turn(query, positions, memory), self._turn(key, positions, memory)
        elif config.temperature_tuning:
            query = _tempered(query, positions, config)
        if config.qk_norm_type == "head_after_rope":
            query, key = self._normalised(query, key)
        if self.kind.rope and config.use_qk_norm and config.qk_norm_type == "l2":
            query, key = self._divided(query), self._divided(key)
        return Projected(query, key, value)

    def _divided(self, x: Float[Array, "B S N D"]) -> Float[Array, "B S N D"]:
        """Divide each head by its root mean square."""
        return normalise(x.astype(jnp.float32), epsilon=self.norm_epsilon).astype(x.dtype)


def _tempered(
    query: Float[Array, "B S N D"], positions: Int[Array, "B S"], config: AttentionConfig
) -> Float[Array, "B S N D"]:
    """Scale queries by the logarithm of the position (arXiv 2501.19399, as in Llama 4)."""
    steps = ((positions + 1) // config.temperature_tuning_floor).astype(jnp.float32)
    growth = 1 + config.temperature_tuning_scale * jnp.log1p(steps)
    return (query * growth[..., None, None]).astype(query.dtype)


def make_attention(
    *,
    config: AttentionConfig,
    kind: LayerKind,
    model_dim: int,
    norm_epsilon: float,
    dtype: DTypeLike,
    weight_dtype: DTypeLike,
    sharding: Sharding,
    rngs: nnx.Rngs,
    zero_centered: bool = False,
) -> Attention | LatentAttention:
    """Make the attention that `attention_type` names for a layer; see the classes.

    Heads and positions are those that the configuration has for layers of this kind.
    """
    config = config.in_layers(kind.span)
    if config.attention_type == "mla":
        return LatentAttention(
            config=config,
            kind=kind,
            model_dim=model_dim,
            dtype=dtype,
            weight_dtype=weight_dtype,
            sharding=sharding,
            rngs=rngs,
        )
    return Attention(
        config=config,
        kind=kind,
        model_dim=model_dim,
        norm_epsilon=norm_epsilon,
        dtype=dtype,
        weight_dtype=weight_dtype,
        sharding=sharding,
        rngs=rngs,
        zero_centered=zero_centered,
    )
