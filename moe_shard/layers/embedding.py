"""Embed tokens, and project activations back to the vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import normal
from jaxtyping import Array, Bool, Float, Int

from moe_shard.config.model_config import CrossEntropyName, ModelConfig
from moe_shard.layers.lookup import lay_out_lookup
from moe_shard.layers.loss import CrossEntropy, bounded, lay_out_loss
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
        self.config = config
        self.multiplier, self.dtype = config.embedding_multiplier, config.dtype
        self.sharding = sharding

    def embed(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S M"]:
        """Look up the vectors of tokens."""
        with jax.named_scope("embedding"):
            lookup = lay_out_lookup(
                self.sharding,
                (tokens.shape[0], tokens.shape[1], self.config.emb_dim),
                vocab_size=self.config.vocab_size,
                stored=TABLE,
                dtype=self.dtype,
            )
            x = self.sharding(
                lookup(self.table[...], tokens),
                *("activation_batch", "activation_length", "activation_embed"),
                name="embedded",
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
            return bounded(logits, self.config.logits_scaling, self.config.final_logits_soft_cap)

    def cross_entropy(
        self,
        x: Float[Array, "B S M"],
        targets: Int[Array, "B S"],
        routine: CrossEntropyName = "auto",
        num_vocab_tiling: int = -1,
        counted: Bool[Array, "B S"] | None = None,
        divisor: Float[Array, ""] | None = None,
    ) -> Float[Array, ""]:
        """Compute the mean negative log-likelihood of targets, in nats, without [B S V] logits.

        Args:
            x: hidden states.
            targets: ids of the tokens to predict.
            routine: see `loss_of`, as the next.
            num_vocab_tiling: chunks that a device divides its tokens into; -1: by size.
            counted: the tokens that the mean is over; None: all.
            divisor: what the sum over them is divided by; None: their number.

        Raises:
            UserError: more chunks than tokens, or tokamax where it cannot run.
        """
        tokens = x.shape[0], x.shape[1]
        masked = counted is not None
        loss = loss_of(self.config, self.sharding, tokens, routine, num_vocab_tiling, masked=masked)
        weight = self.table if self.kernel is None else self.kernel
        bias = None if self.bias is None else self.bias[...]
        return loss(x, targets, weight[...], bias, counted, divisor)


def loss_of(
    config: ModelConfig,
    sharding: Sharding,
    tokens: tuple[int, int],
    routine: CrossEntropyName,
    num_vocab_tiling: int,
    *,
    masked: bool = False,
) -> CrossEntropy:
    """Describe a model's loss; nothing is traced or run.

    Args:
        config: the model.
        sharding: the mesh and its rules.
        tokens: [B S], of a microbatch on all devices together.
        routine: "auto": by chunks of tokens; "tokamax": its kernel.
        num_vocab_tiling: chunks of a device's tokens; -1: see `loss.number_of_chunks`.
        masked: whether some tokens may not count.

    Raises:
        UserError: more chunks than tokens, or tokamax where it cannot run.
    """
    return lay_out_loss(
        sharding,
        (*tokens, config.emb_dim),
        vocab_size=config.vocab_size,
        stored=TABLE if config.logits_via_embedding else KERNEL,
        dtype=config.dtype,
        scaling=config.logits_scaling,
        soft_cap=config.final_logits_soft_cap,
        chunks=num_vocab_tiling,
        routine=routine,
        biased=config.logits_bias,
        masked=masked,
    )
