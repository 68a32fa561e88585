"""Embed tokens, and project activations back to the vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal
from jaxtyping import Array, Float, Int

from moe_shard.config.model_config import ModelConfig
from moe_shard.sharding.annotate import Sharding
from moe_shard.sharding.parameter import parameter

TABLE = ("vocab", "embed_vocab")
KERNEL = ("embed_vocab", "vocab")


class Embedding(nnx.Module):
    """Look up one vector per token; compute logits with the same table or a separate kernel.

    Args:
        config: the model; logits are float32 whatever its dtype.
        sharding: the mesh and its rules.
        rngs: source of the initial weights.
    """

    def __init__(self, config: ModelConfig, sharding: Sharding, *, rngs: nnx.Rngs) -> None:
        vocab_size, model_dim = config.vocab_size, config.emb_dim
        tied, weight_dtype = config.logits_via_embedding, config.weight_dtype
        # A tied table also makes the logits, which must start near 0.
        table_init = normal(stddev=model_dim**-0.5 if tied else 1.0)
        self.table = parameter(
            table_init(rngs.params(), (vocab_size, model_dim), weight_dtype),
            TABLE,
        )
        kernel_init = normal(stddev=1 / model_dim)  # logits near 0: the first loss is log V
        self.kernel = (
            None
            if tied
            else parameter(
                kernel_init(rngs.params(), (model_dim, vocab_size), weight_dtype),
                KERNEL,
            )
        )
        self.bias = (
            parameter(jnp.zeros((vocab_size,), weight_dtype), ("vocab",))
            if config.logits_bias
            else None
        )
        self.multiplier = config.embedding_multiplier
        self.scaling, self.soft_cap = config.logits_scaling, config.final_logits_soft_cap
        self.dtype = config.dtype
        self.sharding = sharding

    def embed(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S M"]:
        """Look up the vectors of tokens."""
        with jax.named_scope("embedding"):
            # Gather whole vectors before the lookup, and in its gradient sum them before they go
            # back to the shards. Without this the partitioner looks up slices of vectors, and on
            # some meshes replicates all tokens to join them.
            table = self.sharding(
                self.table[...].astype(self.dtype), *TABLE, name="embedding table as stored"
            )
            table = self.sharding(table, "vocab", None, name="embedding table in use")
            x = jnp.take(table, tokens, axis=0)
            x = self.sharding(
                x, "activation_batch", "activation_length", "activation_embed", name="embedded"
            )
            return x if self.multiplier == 1 else x * self.multiplier

    def logits(self, x: Float[Array, "B S M"]) -> Float[Array, "B S V"]:
        """Score every token of the vocabulary, in float32."""
        with jax.named_scope("logits"):
            weight = self.table[...].T if self.kernel is None else self.kernel[...]
            kernel = self.sharding.use_weight(
                weight.astype(self.dtype), KERNEL, (None, "activation_vocab"), name="logits kernel"
            )
            logits = jnp.einsum("bsm,mv->bsv", x, kernel, preferred_element_type=jnp.float32)
            logits = self.sharding(
                logits, "activation_batch", "activation_length", "activation_vocab", name="logits"
            )
            if self.bias is not None:
                logits = logits + self.sharding.use_weight(
                    self.bias[...].astype(jnp.float32),
                    ("vocab",),
                    ("activation_vocab",),
                    name="logits bias",
                )
            if self.scaling != 1:
                logits = logits / self.scaling
            if self.soft_cap != 0:
                logits = self.soft_cap * jnp.tanh(logits / self.soft_cap)
            return logits
