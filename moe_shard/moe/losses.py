"""Auxiliary losses of the router, one number per batch row.

Rows, not one mean: the mean over the batch is taken once for all layers where the training loss is
formed, so that a layer adds no collective. Fractions count choices before any is dropped.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_shard.config.moe import LoadBalanceLoss


def expert_counts(indices: Int[Array, "B S K"], num_experts: int) -> Int[Array, "B E"]:
    """How many of a row's choices fell on each expert."""
    return jnp.sum(jax.nn.one_hot(indices, num_experts, dtype=jnp.int32), axis=(1, 2))


def load_balance_loss(
    probs: Float[Array, "B S E"], indices: Int[Array, "B S K"], convention: LoadBalanceLoss
) -> Float[Array, "B"]:
    """Load-balance loss, `sum over experts of mean probability * fraction of choices`, scaled.

    - "maxtext": per row, times E * 1/S-fractions that sum to K: K when balanced, E when k = 1
      and all tokens take one expert. MaxText's, and the only one local to a row.
    - "gshard": over the whole batch, normalised to 1 when balanced (GShard, arXiv 2006.16668;
      Switch Transformer, arXiv 2101.03961, for k = 1).
    - "huggingface": K times "gshard", as transformers' `load_balancing_loss_func` computes it.

    The batch-wide ones need the means of all devices' rows: one small all-reduce a layer. Every
    row then holds the same number.
    """
    batch, tokens, num_experts = probs.shape
    k = indices.shape[-1]
    fraction = expert_counts(indices, num_experts).astype(jnp.float32) / tokens
    mean_prob = jnp.mean(probs, axis=1)
    if convention == "maxtext":
        return num_experts * jnp.sum(mean_prob * fraction, axis=-1)
    loss = num_experts * jnp.sum(jnp.mean(mean_prob, axis=0) * jnp.mean(fraction, axis=0))
    if convention == "gshard":
        loss = loss / k
    return jnp.broadcast_to(loss, (batch,))


def router_z_loss(logits: Float[Array, "B S E"]) -> Float[Array, "B"]:
    """Mean squared logsumexp of the router's scores (ST-MoE, arXiv 2202.08906, equation 5)."""
    log_z = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
    return jnp.mean(jnp.square(log_z), axis=-1)
