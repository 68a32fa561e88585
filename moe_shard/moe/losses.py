"""Compute the auxiliary losses of the router.

A layer returns statistics of each sequence, and the losses are computed once for all layers, next
to the training loss, so that a layer adds no collective. Fractions count choices before any is
dropped.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_shard.config.moe_config import LoadBalanceLoss


def expert_counts(indices: Int[Array, "B S K"], num_experts: int) -> Int[Array, "B E"]:
    """Count the choices of each sequence for each expert."""
    return jnp.sum(jax.nn.one_hot(indices, num_experts, dtype=jnp.int32), axis=(1, 2))


def load_balance_loss(
    mean_probs: Float[Array, "L B E"],
    counts: Int[Array, "L B E"],
    *,
    tokens: int,
    k: int,
    convention: LoadBalanceLoss,
) -> Float[Array, ""]:
    """Sum over experts the mean probability times the fraction of choices.

    - "maxtext": for each sequence of each layer, times E, the fractions summing to K: K when
      balanced, E when k = 1 and all tokens choose one expert; then the mean. As in MaxText until
      0.2.5; local to a sequence.
    - "sequence": the same divided by K, 1 when balanced; as in MaxText from 0.2.5 on.
    - "gshard": for each layer over the whole batch, normalised to 1 when balanced (GShard, arXiv
      2006.16668; Switch Transformer, arXiv 2101.03961, for k = 1); then the mean over layers.
    - "huggingface": over the whole batch and all layers together, K when balanced, as
      transformers' `load_balancing_loss_func` computes it.

    Args:
        mean_probs: mean probabilities over the tokens of each sequence.
        counts: number of choices of each expert, see `expert_counts`.
        tokens: S, tokens of a sequence.
        k: K, experts per token.
        convention: one of the above.
    """
    num_experts = mean_probs.shape[-1]
    fraction = counts.astype(jnp.float32) / tokens
    match convention:
        case "maxtext":
            over: tuple[int, ...] = ()
        case "sequence":
            over, fraction = (), fraction / k
        case "gshard":
            over, fraction = (1,), fraction / k
        case "huggingface":
            over = (0, 1)
    together = jnp.mean(mean_probs, axis=over) * jnp.mean(fraction, axis=over)
    return num_experts * jnp.mean(jnp.sum(together, axis=-1))


def router_z_loss(logits: Float[Array, "B S E"]) -> Float[Array, "B"]:
    """Average the squared logsumexp of the logits (ST-MoE, arXiv 2202.08906, equation 5)."""
    log_z = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
    return jnp.mean(jnp.square(log_z), axis=-1)
