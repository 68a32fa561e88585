"""The decoder: embedding, scanned layers of attention and MoE (or a dense MLP), logits."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from moe_shard.config.schema import ModelConfig
from moe_shard.layers.attention import Attention
from moe_shard.layers.embedding import Embedding
from moe_shard.layers.mlp import MLP
from moe_shard.layers.norm import RMSNorm
from moe_shard.models.remat import remat
from moe_shard.moe.layer import MoELayer, MoEStats
from moe_shard.sharding.annotate import Annotator


class DecoderLayer(nnx.Module):
    """Attention, then MoE or MLP; each normalised before and added to the residual stream."""

    def __init__(self, config: ModelConfig, annotate: Annotator, *, rngs: nnx.Rngs) -> None:
        dtypes = {"dtype": config.dtype, "weight_dtype": config.weight_dtype}
        self.attention_norm = self._norm(config)
        self.attention = Attention(
            model_dim=config.emb_dim,
            num_query_heads=config.num_query_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rope_max_timescale=config.rope_max_timescale,
            qk_norm_epsilon=config.norm_epsilon if config.use_qk_norm else None,
            annotate=annotate,
            rngs=rngs,
            **dtypes,
        )
        self.mlp_norm = self._norm(config)
        self.mlp: MoELayer | MLP
        if config.moe is not None:
            self.mlp = MoELayer(
                config=config.moe,
                model_dim=config.emb_dim,
                activation=config.activation,
                annotate=annotate,
                rngs=rngs,
                **dtypes,
            )
        else:
            self.mlp = MLP(
                model_dim=config.emb_dim,
                hidden_dim=config.mlp_dim,
                activation=config.activation,
                annotate=annotate,
                rngs=rngs,
                **dtypes,
            )

    def __call__(
        self,
        x: Float[Array, "B S M"],
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
    ) -> tuple[Float[Array, "B S M"], MoEStats | None]:
        """Apply the layer; the statistics are None for a dense model."""
        x = x + self.attention(self.attention_norm(x), positions, segment_ids)
        normalised = self.mlp_norm(x)
        if isinstance(self.mlp, MoELayer):
            y, stats = self.mlp(normalised)
            return x + y, stats
        return x + self.mlp(normalised), None

    @staticmethod
    def _norm(config: ModelConfig) -> RMSNorm:
        return RMSNorm(
            dim=config.emb_dim, epsilon=config.norm_epsilon, weight_dtype=config.weight_dtype
        )


class Decoder(nnx.Module):
    """A causal language model.

    The layers' parameters are stacked along a leading dim, `layers`, and the layers run in a
    scan, so that the program, and the time to compile it, do not grow with their number.

    Args:
        config: the model.
        annotate: the mesh and its rules.
        rngs: source of the initial weights.
    """

    def __init__(self, config: ModelConfig, annotate: Annotator, *, rngs: nnx.Rngs) -> None:
        self.embedding = Embedding(
            vocab_size=config.vocab_size,
            model_dim=config.emb_dim,
            tied=config.logits_via_embedding,
            dtype=config.dtype,
            weight_dtype=config.weight_dtype,
            annotate=annotate,
            rngs=rngs,
        )

        @nnx.split_rngs(splits=config.num_decoder_layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> DecoderLayer:
            return DecoderLayer(config, annotate, rngs=rngs)

        self.layers = stack(rngs)
        for _, param in nnx.iter_graph(self.layers):
            if isinstance(param, nnx.Param):
                param.set_metadata(logical_axes=("layers", *param.get_metadata("logical_axes")))
        self.final_norm = RMSNorm(
            dim=config.emb_dim, epsilon=config.norm_epsilon, weight_dtype=config.weight_dtype
        )
        self.remat_policy = config.remat_policy

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
    ) -> tuple[Float[Array, "B S V"], MoEStats | None]:
        """Predict the token after each token.

        Args:
            tokens: ids below the vocabulary size.
            positions: place of each token in its document.
            segment_ids: equal for tokens of one document; no token attends across documents.

        Returns:
            Logits in float32, and the MoE layers' statistics, each with a leading dim L (None for
            a dense model).
        """
        graph, params = nnx.split(self.layers)

        def layer(
            x: Float[Array, "B S M"], params: nnx.State[Any, Any]
        ) -> tuple[Float[Array, "B S M"], MoEStats | None]:
            return nnx.merge(graph, params)(x, positions, segment_ids)

        x = self.embedding.embed(tokens)
        with jax.named_scope("layers"):
            x, stats = jax.lax.scan(remat(layer, self.remat_policy), x, params)
        return self.embedding.logits(self.final_norm(x)), stats
