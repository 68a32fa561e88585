"""Choose the next token from the logits: the most probable one, or a sample."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from moe_shard.config.generate_config import GenerateConfig


def next_tokens(
    logits: Float[Array, "B V"], key: PRNGKeyArray, config: GenerateConfig
) -> Int[Array, "B"]:
    """Choose a token for each sequence.

    A sample depends on the key, the number of the sequence and its logits alone: not on the batch
    size, nor on the mesh.

    Args:
        logits: logits in float32.
        key: random key of this step.
        config: the strategy and its sizes.
    """
    if config.decode_sampling_strategy == "greedy":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / config.decode_sampling_temperature
    if config.decode_sampling_strategy in ("topk", "composite"):
        logits = keep_top_k(logits, config.decode_sampling_top_k)
    if config.decode_sampling_strategy in ("nucleus", "composite"):
        logits = keep_nucleus(logits, config.decode_sampling_nucleus_p)
    rows = jnp.arange(logits.shape[0])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def keep_top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """Keep the logits of the k most probable tokens, and of ties with the last of them.

    The others become -inf.
    """
    best = jnp.sort(logits, axis=-1, descending=True)
    least = best[:, min(k, logits.shape[-1]) - 1]
    return jnp.where(logits >= least[:, None], logits, -jnp.inf)


def keep_nucleus(logits: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    """Keep the logits of the fewest, most probable tokens whose probabilities add up to p.

    Ties with the last of them are kept too; the others become -inf (arXiv 1904.09751).
    """
    best = jnp.sort(logits, axis=-1, descending=True)
    probability = jax.nn.softmax(best, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    least = jnp.min(jnp.where(before < p, best, jnp.inf), axis=-1)
    return jnp.where(logits >= least[:, None], logits, -jnp.inf)
