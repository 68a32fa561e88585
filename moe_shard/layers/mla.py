"""Attend through latents: MLA of DeepSeek-V2 (arXiv 2405.04434, section 2.1).

The keys and values of all heads are computed from one latent per token. The part of the keys that
RoPE rotates is separate, and shared by the heads. Further dims:

    R  latent of keys and values     Rq  latent of queries      Dn  elements not rotated
    Dr  elements rotated             Dq  Dn + Dr, of a query    Dv  elements of a value
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_shard.config.attention_config import AttentionConfig
from moe_shard.config.model_config import LayerKind
from moe_shard.layers.adapter import adapter_of
from moe_shard.layers.cache import LayerCache, Memory
from moe_shard.layers.heads import Heads, make_vector, make_weight
from moe_shard.layers.indexer import Indexed, Indexer, chosen
from moe_shard.layers.kernels.choose import SHORT
from moe_shard.layers.kernels.dot_product import attention_weights
from moe_shard.layers.kernels.rule import seen_tokens
from moe_shard.layers.norm import RMSNorm
from moe_shard.layers.sparse_attention import attend_sparsely
from moe_shard.sharding.annotate import Sharding


class LatentAttention(Heads):
    """Attend with keys and values that are projections of a latent.

    Args:
        config: ranks, heads, positions.
        kind: the layer's span, and whether it has RoPE.
        model_dim: M, the model dim.
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
        dtype: DTypeLike,
        weight_dtype: DTypeLike,
        sharding: Sharding,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(config=config, kind=kind, dtype=dtype, sharding=sharding)
        heads, rank = config.num_query_heads, config.kv_lora_rank
        nope, turned = config.qk_nope_head_dim, config.qk_rope_head_dim

        def up(shape: tuple[int, int, int], axis: str) -> nnx.Param[Array]:
            return make_weight(shape, (axis, "heads", "head_dim"), dtype=weight_dtype, rngs=rngs)

        def down(size: int) -> nnx.Param[Array]:
            # The latent is a head that all share. Without a logical axis on this dim the optimizer
            # would take the matrix for a vector, and not decay it.
            axes = ("embed", "head_dim")
            return make_weight((model_dim, size), axes, dtype=weight_dtype, rngs=rngs)

        def bias(size: int) -> nnx.Param[Array] | None:
            return (
                make_vector((size,), ("norm",), dtype=weight_dtype)
                if config.attention_bias
                else None
            )

        def norm(size: int) -> RMSNorm:
            return RMSNorm(dim=size, epsilon=config.latent_norm_epsilon, weight_dtype=weight_dtype)

        if config.q_lora_rank == 0:
            self.query = up((model_dim, heads, nope + turned), "embed")
        else:
            self.query_down = down(config.q_lora_rank)
            self.query_down_bias = bias(config.q_lora_rank)
            self.query_norm = norm(config.q_lora_rank)
            self.query_up = up((config.q_lora_rank, heads, nope + turned), "q_lora")
        self.latent_down = down(rank + turned)
        self.latent_down_bias = bias(rank + turned)
        self.latent_norm = norm(rank)
        self.latent_up = up((rank, heads, nope + config.v_head_dim), "kv_lora")
        self._make_output(
            model_dim=model_dim, value_dim=config.v_head_dim, dtype=weight_dtype, rngs=rngs
        )
        self.indexer = (
            Indexer(
                config=config,
                model_dim=model_dim,
                rope=kind.rope,
                dtype=dtype,
                weight_dtype=weight_dtype,
                sharding=sharding,
                rngs=rngs,
            )
            if config.use_indexer
            else None
        )

    def _attended(
        self,
        x: Float[Array, "B S M"],
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        memory: Memory | None,
        order: Int[np.ndarray, "S"] | None,
    ) -> tuple[Float[Array, "B S N Dv"], LayerCache]:
        of_queries = self._query_latent(x)
        by_head = self._queries(of_queries)
        nope, turned = jnp.split(by_head, [self.config.qk_nope_head_dim], axis=-1)
        latent, key = self._latents(x)
        if self.kind.rope:
            turned = self._turn(turned, positions, memory)
            key = self._turn(key[:, :, None], positions, memory)[:, :, 0]
        length = x.shape[1] if memory is None else memory.positions.shape[1]
        new = {"latent": latent, "rope_key": key}
        indexed = None
        if self.indexer is not None and length > self.config.indexer_topk:
            indexed = self.indexer.queries(x, of_queries, positions, length)
            new["index_key"] = self.indexer.keys(x, positions, length)
        if memory is None:
            tokens = positions, segment_ids, None, order
            return self._expanded(nope, turned, new, indexed, *tokens), {}
        cache = self._remember(memory, new)
        if x.shape[1] > SHORT:  # a prompt: every latent is used often enough to be expanded once
            of_prompt = positions, segment_ids, memory, None
            return self._expanded(nope, turned, cache, indexed, *of_prompt), cache
        return self._absorbed(nope, turned, cache, indexed, positions, segment_ids, memory), cache

    def empty_cache(self, rows: int, places: int) -> LayerCache:
        """Make a cache without tokens.

        Args:
            rows: B, sequences.
            places: T, tokens that a sequence may come to have.
        """
        config = self.config
        dims = {"latent": (config.kv_lora_rank,), "rope_key": (config.qk_rope_head_dim,)}
        if config.use_indexer and places > config.indexer_topk:
            dims["index_key"] = (config.indexer_head_dim,)
        return self._empty_cache(rows, places, dims)

    def _query_latent(self, x: Float[Array, "B S M"]) -> Float[Array, "B S R"]:
        """Compute the normalised latent of the queries; x itself where they have none."""
        if self.config.q_lora_rank == 0:
            return x
        x = self._latent(x, self.query_down, self.query_down_bias, "query down")
        x = self.query_norm(checkpoint_name(x, "query_wa_proj"))
        return checkpoint_name(x, "mla_q")

    def _queries(self, latent: Float[Array, "B S R"]) -> Float[Array, "B S N Dq"]:
        if self.config.q_lora_rank == 0:
            return self._expand(latent, self.query, "query")
        return self._expand(latent, self.query_up, "query up")

    def _latents(
        self, x: Float[Array, "B S M"]
    ) -> tuple[Float[Array, "B S R"], Float[Array, "B S Dr"]]:
        """Compute the normalised latent, and the part of the keys that heads share."""
        both = self._latent(x, self.latent_down, self.latent_down_bias, "latent down")
        both = checkpoint_name(both, "kv_wa_proj")
        latent, key = jnp.split(both, [self.config.kv_lora_rank], axis=-1)
        return checkpoint_name(self.latent_norm(latent), "mla_kv"), key

    def _latent(
        self,
        x: Float[Array, "B S M"],
        weight: nnx.Param[Array],
        bias: nnx.Param[Array] | None,
        name: str,
    ) -> Float[Array, "B S R"]:
        kernel = self._in_use(weight, (None, None), name)
        y = self.sharding(
            self._adapted(jnp.einsum("bsm,mr->bsr", x, kernel), x, (None, None), name),
            "activation_batch",
            "activation_length",
            None,
            name=name,
        )
        return y if bias is None else y + self._in_use(bias, (None,), f"{name} bias")

    def _expand(
        self,
        x: Float[Array, "B S R"],
        weight: nnx.Param[Array],
        name: str,
        length: str = "activation_length",
    ) -> Float[Array, "B S N D"]:
        used = (None, "activation_heads", "activation_head_dim")
        kernel = self._in_use(weight, used, name)
        y = self._adapted(jnp.einsum("bsr,rnd->bsnd", x, kernel), x, used, name)
        return self._by_head(y, "heads", name, length)

    def _expanded(
        self,
        nope: Float[Array, "B S N Dn"],
        turned: Float[Array, "B S N Dr"],
        cache: LayerCache,
        indexed: Indexed | None,
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        memory: Memory | None,
        order: Int[np.ndarray, "S"] | None,
    ) -> Float[Array, "B S N Dv"]:
        """Attend with keys and values expanded to heads: cheapest where many tokens are new."""
        length = "activation_kv_length"
        if memory is None and self.config.context_parallel_strategy == "ring":
            length = "activation_length"  # each device expands its own tokens' latents
        # Gather the latents over a context axis here, not the keys and values of all heads later.
        latent, key = (
            self.sharding(x, "activation_batch", length, None, name=name)
            for x, name in (
                (cache["latent"], "latents attended to"),
                (cache["rope_key"], "shared keys attended to"),
            )
        )
        by_head = self._expand(latent, self.latent_up, "latent up", length)
        key_nope, value = jnp.split(by_head, [self.config.qk_nope_head_dim], axis=-1)
        shared = jnp.broadcast_to(key[:, :, None], (*key_nope.shape[:-1], key.shape[-1]))
        projected = (
            checkpoint_name(jnp.concatenate([nope, turned], axis=-1), "query_proj"),
            checkpoint_name(jnp.concatenate([key_nope, shared], axis=-1), "key_proj"),
            checkpoint_name(value, "value_proj"),
        )
        if indexed is not None:
            return attend_sparsely(
                *projected,
                *self._tokens(positions, segment_ids, memory, order),
                indexed,
                cache["index_key"],
                rule=self._rule,
                sink=self._sink_in_use(),
                most=self.config.indexer_topk,
            )
        return self._attend(
            *projected,
            positions,
            segment_ids,
            memory,
            order,
            key_length=length,
        )

    def _absorbed(
        self,
        nope: Float[Array, "B S N Dn"],
        turned: Float[Array, "B S N Dr"],
        cache: LayerCache,
        indexed: Indexed | None,
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        memory: Memory,
    ) -> Float[Array, "B S N Dv"]:
        """Attend by projecting queries to the latent dim, not the cache's T latents to heads.

        q . (W_k l) = (W_k^T q) . l, and the weighted values are W_v of the weighted latents.
        """
        used = (None, "activation_heads", "activation_head_dim")
        up = self._in_use(self.latent_up, used, "latent up")
        if (adapter := adapter_of(self, "latent_up")) is not None:
            up += adapter.whole(used, dtype=self.dtype, sharding=self.sharding, name="latent up")
        to_key, to_value = jnp.split(up, [self.config.qk_nope_head_dim], axis=-1)
        query = jnp.einsum("bsnd,rnd->bsnr", nope, to_key)
        rule = self._rule
        scores = rule.scale * (
            jnp.einsum("bsnr,btr->bnst", query, cache["latent"], preferred_element_type=jnp.float32)
            + jnp.einsum(
                "bsnd,btd->bnst", turned, cache["rope_key"], preferred_element_type=jnp.float32
            )
        )
        seen = seen_tokens(*self._tokens(positions, segment_ids, memory), rule=rule)
        if indexed is not None:
            seen = chosen(indexed, cache["index_key"], seen, most=self.config.indexer_topk)
        weights = attention_weights(
            scores,
            seen[:, None],
            soft_cap=rule.soft_cap,
            sink=self._sink_in_use(),
        )
        mixed = jnp.einsum("bnst,btr->bsnr", weights.astype(self.dtype), cache["latent"])
        return jnp.einsum("bsnr,rnd->bsnd", mixed, to_value)
